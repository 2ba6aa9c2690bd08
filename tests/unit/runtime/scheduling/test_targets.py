from __future__ import annotations

import math

import pytest

from cotune.policy.costs import Costs
from cotune.runtime.config import ScheduleConfig
from cotune.runtime.errors import ConfigError
from cotune.runtime.scheduling.targets import TBT_ITERATIONS, TTFT_ITERATIONS, choose_targets

COSTS = Costs(
    base_s=0.01,
    per_decode_s=0.001,
    per_context_s=1e-6,
    per_token_s=0.0005,
    per_attention_s=0.0,
    per_chunk_s=0.002,
    margin=1.5,
)


def test_targets_that_nobody_set_follow_from_what_work_costs() -> None:
    ttft_s, tbt_s = choose_targets(ScheduleConfig(), COSTS, 128)
    # A full iteration: 10 ms, a chunk's 2 ms and 128 tokens of half a millisecond.
    assert ttft_s == pytest.approx(TTFT_ITERATIONS * 1.5 * (0.01 + 0.002 + 128 * 0.0005))
    # A busy one: 16 decodes that read 512 entries each.
    assert tbt_s == pytest.approx(TBT_ITERATIONS * 1.5 * (0.01 + 16 * 0.001 + 16 * 512 * 1e-6))


def test_without_a_profile_there_is_no_target_but_those_that_were_set() -> None:
    assert choose_targets(ScheduleConfig(), None, 128) == (math.inf, math.inf)
    schedule = ScheduleConfig(ttft_target_s=1e-9, tbt_target_s=0.05)
    assert choose_targets(schedule, None, 128) == (1e-9, 0.05)


def test_targets_that_were_set_are_kept_where_the_device_can() -> None:
    # A prompt of 16 tokens takes 20 ms, a decode 11.001 ms.
    schedule = ScheduleConfig(ttft_target_s=0.0201, tbt_target_s=0.0111)
    assert choose_targets(schedule, COSTS, 128) == (0.0201, 0.0111)


@pytest.mark.parametrize(
    ("schedule", "field", "what", "alone"),
    [
        (
            ScheduleConfig(ttft_target_s=0.0199),
            "schedule.ttft_target_s",
            "a prompt of 16 tokens",
            "0.02 s",
        ),
        (ScheduleConfig(tbt_target_s=0.0109), "schedule.tbt_target_s", "a decode", "0.011 s"),
    ],
)
def test_a_target_that_cannot_be_met_is_refused_with_its_name_and_the_remedy(
    schedule: ScheduleConfig, field: str, what: str, alone: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_targets(schedule, COSTS, 128)
    error = caught.value
    assert (error.param, error.code) == (field, "unattainable_target")
    for part in (field, "is 0.01", what, alone, "raise it, leave it unset"):
        assert part in error.message
