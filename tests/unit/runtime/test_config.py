"""Settings: defaults that are valid, refusals that name field, value and remedy, shorthands."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from cotune import ConfigError
from cotune.runtime import config as module
from cotune.runtime.config import (
    AdapterConfig,
    CacheConfig,
    LaneConfig,
    ModelConfig,
    RuntimeConfig,
    ScheduleConfig,
    Shorthands,
)
from cotune.runtime.learning.config import LearningConfig

GROUPS = (ModelConfig, CacheConfig, ScheduleConfig, AdapterConfig, LaneConfig)


def test_the_defaults_are_valid_and_frozen() -> None:
    config = RuntimeConfig()
    config.validate()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.schedule.max_num_seqs = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("group", "field", "value"),
    [
        ("model", "source", " "),
        ("model", "device", "tpu"),
        ("model", "device", "cuda:x"),
        ("model", "dtype", "int8"),
        ("model", "max_model_len", 0),
        ("model", "max_model_len", 10.5),
        ("model", "served_name", ""),
        ("model", "served_name", "a@3"),
        ("cache", "page_size", 0),
        ("cache", "num_pages", -1),
        ("cache", "kv_bytes", True),
        ("cache", "memory_fraction", 0.0),
        ("cache", "memory_fraction", 1.5),
        ("schedule", "policy", "none"),
        ("schedule", "max_num_seqs", 0),
        ("schedule", "max_num_batched_tokens", 0),
        ("schedule", "max_queue", 0),
        ("schedule", "stop_grace_s", -1.0),
        ("schedule", "stop_grace_s", float("nan")),
        ("adapters", "max_loras", -1),
        ("adapters", "max_lora_rank", 0),
        ("lanes", "inference_threads", 0),
    ],
)
def test_a_wrong_value_is_refused_by_name(group: str, field: str, value: Any) -> None:
    config = RuntimeConfig()
    part = dataclasses.replace(getattr(config, group), **{field: value})
    config = dataclasses.replace(config, **{group: part})
    with pytest.raises(ConfigError) as caught:
        config.validate()
    assert caught.value.param == f"{group}.{field}"
    assert repr(value) in caught.value.message


def test_adapters_must_have_different_names_and_room() -> None:
    twice = AdapterConfig(modules=(("a", Path("x")), ("a", Path("y"))))
    with pytest.raises(ConfigError, match="once"):
        twice.validate()
    with pytest.raises(ConfigError, match="max_loras"):
        AdapterConfig(modules=(("a", Path("x")),), max_loras=0).validate()


def test_a_shorthand_reaches_its_group() -> None:
    config = RuntimeConfig().with_shorthands(
        {"dtype": "float32", "max_num_seqs": 3, "adapters": {"a": "dir"}, "max_loras": 2, "seed": 7}
    )
    assert config.model.dtype == "float32"
    assert config.schedule.max_num_seqs == 3
    assert config.adapters == AdapterConfig(modules=(("a", Path("dir")),), max_loras=2)
    assert config.seed == 7
    assert config.cache == CacheConfig()


def test_an_unknown_shorthand_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'max_seqs'.*max_num_seqs") as caught:
        RuntimeConfig().with_shorthands({"max_seqs": 3})
    assert caught.value.param == "max_seqs"


def test_every_setting_has_a_shorthand_of_the_same_type() -> None:
    hints = get_type_hints(Shorthands)
    settings = {
        name: hint
        for group in GROUPS
        for name, hint in get_type_hints(group).items()
        if name not in {"source", "device", "modules"}  # source and device are positional
    }
    others = {"adapters", "learning", "seed", "state_dir"}
    assert {name: hint for name, hint in hints.items() if name not in others} == settings


def test_learning_is_turned_on_by_a_word_by_a_directory_or_by_all_of_its_settings() -> None:
    plain = RuntimeConfig()
    assert not plain.learning.enabled
    assert plain.with_shorthands({"learning": True}).learning.enabled
    placed = plain.with_shorthands({"state_dir": "somewhere"}).learning
    assert placed.enabled
    assert placed.state_dir == Path("somewhere")
    own = LearningConfig(enabled=True, train=False)
    both = plain.with_shorthands({"learning": own, "state_dir": "elsewhere"}).learning
    assert both == dataclasses.replace(own, state_dir=Path("elsewhere"))


def test_learning_needs_two_slots_and_a_rank_that_they_take() -> None:
    learning = LearningConfig(enabled=True)
    with pytest.raises(ConfigError, match="max_loras"):
        RuntimeConfig(learning=learning, adapters=AdapterConfig(max_loras=1)).validate()
    with pytest.raises(ConfigError, match="max_lora_rank"):
        RuntimeConfig(learning=learning, adapters=AdapterConfig(max_lora_rank=3)).validate()


def test_every_setting_has_a_line_that_says_what_it_is() -> None:
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    for node in tree.body:
        if not (isinstance(node, ast.ClassDef) and node.name.endswith("Config")):
            continue
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                assert isinstance(after, ast.Expr), f"{node.name}.{ast.unparse(field.target)}"
                assert isinstance(after.value, ast.Constant)


def test_the_token_budget_is_the_devices_unless_set() -> None:
    assert ScheduleConfig().token_budget("cpu") == 512
    assert ScheduleConfig().token_budget("cuda") == 2048
    assert ScheduleConfig(max_num_batched_tokens=99).token_budget("cpu") == 99
