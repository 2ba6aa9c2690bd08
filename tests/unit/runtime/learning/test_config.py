"""The settings of learning: each has a line that says what it is, and wrong ones are refused."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import math
import shlex
from pathlib import Path
from typing import Any

import pytest

from cotune.runtime.errors import ConfigError
from cotune.runtime.learning import config as module
from cotune.runtime.learning.config import LearningConfig
from cotune.tools.learning_options import (
    FLAG_OF_LEARNING_SETTING,
    add_learning_arguments,
    learning_config,
)

GROUPS = ("feedback", "training", "gate")


def with_setting(group: str, field: str, value: Any) -> LearningConfig:
    config = LearningConfig()
    part = dataclasses.replace(getattr(config, group), **{field: value})
    return dataclasses.replace(config, **{group: part})


@pytest.mark.parametrize(
    ("group", "field", "value"),
    [
        ("feedback", "response_retention_s", 0.0),
        ("feedback", "max_responses", 0),
        ("feedback", "event_retention_s", -1.0),
        ("feedback", "quota_events", 0),
        ("feedback", "quota_window_s", math.nan),
        ("training", "loss", "hinge"),
        ("training", "beta", 0.0),
        ("training", "label_smoothing", 0.5),
        ("training", "learning_rate", math.inf),
        ("training", "replay_share", 1.0),
        ("training", "batch_size", True),
        ("training", "max_length", 1),
        ("training", "threads", 0),
        ("gate", "held_out_share", 0.0),
        ("gate", "held_out_share", 1.0),
        ("gate", "min_held_out", 1000),
        ("gate", "confidence_z", -0.1),
        ("gate", "refusal_z", -0.1),
        ("gate", "patience", -1),
        ("gate", "min_entropy_ratio", 1.5),
    ],
)
def test_a_wrong_value_is_refused_by_name_with_the_value(
    group: str, field: str, value: Any
) -> None:
    with pytest.raises(ConfigError) as caught:
        with_setting(group, field, value).validate()
    assert caught.value.param == f"learning.{group}.{field}"
    assert repr(value) in caught.value.message


def test_tenants_are_named_once() -> None:
    with pytest.raises(ConfigError, match="once"):
        LearningConfig(adapters=("a", "a")).validate()


def test_every_setting_has_a_line_that_says_what_it_is() -> None:
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    for node in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for field, line in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign):
                assert isinstance(line, ast.Expr), f"{node.name}: {ast.unparse(field)}"


def test_flags_left_out_are_the_defaults_and_flags_given_arrive() -> None:
    parser = argparse.ArgumentParser()
    add_learning_arguments(parser, default=False)
    assert learning_config(parser.parse_args([])) == LearningConfig()
    given = learning_config(
        parser.parse_args(
            shlex.split(
                "--learning --state-dir here --beta 0.5 --keep-versions 3 --no-record-responses "
                "--no-training --learning-adapters tutor coach"
            )
        )
    )
    assert given.enabled
    assert not given.train
    assert given.state_dir == Path("here")
    assert given.training.beta == 0.5
    assert given.gate.keep_versions == 3
    assert given.adapters == ("tutor", "coach")
    assert not given.feedback.record_responses


def test_every_flag_names_a_setting_that_exists() -> None:
    config = LearningConfig()
    for setting in FLAG_OF_LEARNING_SETTING:
        owner: Any = config
        for part in setting.split(".")[1:]:
            owner = getattr(owner, part)
