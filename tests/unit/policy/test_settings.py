"""Settings: what is refused, and in which words."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest

from cotune.policy import PolicySettings, SettingError, make_policy


def test_the_defaults_are_valid() -> None:
    PolicySettings().validate()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gamma", -1.0),
        ("gamma", math.nan),
        ("delta_decode_s", math.inf),
        ("lambda_memory", -0.1),
        ("lambda_latency", math.inf),
        ("training_signal", "luck"),
        ("training_floor", -0.1),
        ("training_floor", 1.1),
        ("training_ceiling", math.nan),
        ("slack_use", 0.0),
        ("queue_use", 0.0),
        ("min_chunk_tokens", 0),
        ("min_chunk_tokens", True),
        ("prefill_floor", 2.0),
        ("iteration_ttft_share", 0.0),
        ("late_step", -1.0),
        ("prefix_patience_s", -1.0),
        ("quantum_slack", -1.0),
        ("packing_bins", 0),
        ("packing_window", 1.5),
        ("periodic_window_s", 0.0),
        ("periodic_share", 1.5),
    ],
)
def test_what_is_out_of_range_is_refused_with_field_value_and_remedy(
    field: str, value: object
) -> None:
    changes: dict[str, Any] = {field: value}
    with pytest.raises(SettingError) as caught:
        make_policy("cotune", replace(PolicySettings(), **changes))
    assert caught.value.field == field
    assert str(value) in caught.value.message
    assert "use " in caught.value.message or "give " in caught.value.message


@pytest.mark.parametrize(
    "changes",
    [
        {"delta_training_s": 11.0},
        {"delta_prefill_s": 21.0},
        {"lambda_memory": 0.0, "lambda_latency": 0.0},
        {"training_floor": 0.6, "training_ceiling": 0.5},
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingError):
        replace(PolicySettings(), **changes).validate()


def test_a_setting_error_is_a_value_error_that_names_its_field() -> None:
    error = SettingError("gamma", "no")
    assert isinstance(error, ValueError)
    assert str(error) == "gamma: no"


def test_every_setting_can_be_changed_by_its_name() -> None:
    for field in fields(PolicySettings):
        assert hasattr(PolicySettings(), field.name)
        replace(PolicySettings(), **{field.name: getattr(PolicySettings(), field.name)}).validate()
