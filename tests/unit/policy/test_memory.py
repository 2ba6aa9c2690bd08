"""τ_mem follows what is live and remembers what nearly went wrong."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.policy.memory import MemoryThreshold

GIB = 1 << 30


def threshold(**settings: Any) -> MemoryThreshold:
    """Of a device of 10 GiB with a floor of 0.4 GiB and a ceiling of 2.5 GiB."""
    return MemoryThreshold(10 * GIB, **settings)


def test_it_is_what_is_free_and_unused_less_the_margin() -> None:
    live = threshold()
    assert live.margin_bytes == round(0.4 * GIB)
    assert live.update(0.0, 5 * GIB, 2 * GIB) == 7 * GIB - live.margin_bytes
    assert live.update(1.0, 5 * GIB) == 5 * GIB - live.margin_bytes


def test_where_another_process_takes_the_memory_nothing_more_may_be_taken() -> None:
    live = threshold()
    assert live.update(0.0, GIB // 10) < 0


def test_a_large_device_leaves_a_gibibyte_alone_and_a_small_one_its_share() -> None:
    assert MemoryThreshold(140 * GIB).margin_bytes == GIB
    assert MemoryThreshold(2 * GIB).margin_bytes == round(0.08 * GIB)


@pytest.mark.parametrize("event", ["near_miss", "out_of_memory"])
def test_the_margin_doubles_after_an_event_and_half_of_that_is_gone_after_a_half_life(
    event: str,
) -> None:
    live = threshold(half_life_s=60.0)
    floor = live.margin_bytes
    live.update(0.0, 5 * GIB)
    getattr(live, event)(10.0)
    assert live.margin_bytes == pytest.approx(2 * floor, abs=1)
    live.update(70.0, 5 * GIB)
    assert live.margin_bytes == pytest.approx(1.5 * floor, abs=1)
    live.update(10_000.0, 5 * GIB)
    assert live.margin_bytes == floor


def test_the_decay_does_not_depend_on_how_often_one_looks() -> None:
    often, once = threshold(), threshold()
    for live in (often, once):
        live.out_of_memory(0.0)
    for tick in range(1, 301):
        often.update(tick / 10, 5 * GIB)
    once.update(30.0, 5 * GIB)
    assert often.margin_bytes == pytest.approx(once.margin_bytes, rel=1e-9)


def test_the_margin_never_grows_beyond_its_ceiling() -> None:
    live = threshold()
    for second in range(100):
        live.out_of_memory(float(second))
    assert live.margin_bytes <= round(2.5 * GIB)
    assert live.margin_bytes > 2 * GIB
    assert live.out_of_memories == 100


def test_one_event_seen_twice_grows_the_margin_once_and_counts_twice() -> None:
    live = threshold(quiet_s=0.5)
    floor = live.margin_bytes
    live.near_miss(1.0)
    live.out_of_memory(1.1)
    assert live.margin_bytes == pytest.approx(2 * floor, rel=0.01)
    assert (live.near_misses, live.out_of_memories) == (1, 1)
    live.out_of_memory(1.6)
    assert live.margin_bytes > 3.9 * floor


def test_a_reading_that_leaves_next_to_nothing_is_a_near_miss_once_until_it_is_over() -> None:
    live = threshold()
    floor = live.margin_bytes
    live.update(0.0, floor)
    assert live.near_misses == 0
    for second in range(1, 5):
        live.update(float(second), floor // 3)
    assert live.near_misses == 1
    assert live.margin_bytes > 1.9 * floor
    live.update(5.0, floor // 2 + floor // 3)  # better, but not over
    live.update(6.0, floor // 3)
    assert live.near_misses == 1
    live.update(7.0, floor + 1)
    live.update(8.0, floor // 3)
    assert live.near_misses == 2


def test_a_clock_that_goes_back_changes_nothing() -> None:
    live = threshold()
    live.out_of_memory(100.0)
    margin = live.margin_bytes
    live.update(50.0, 5 * GIB)
    assert live.margin_bytes == margin


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["update", "near_miss", "out_of_memory"]),
            st.floats(0.0, 100.0),
            st.integers(-GIB, 12 * GIB),
            st.integers(-GIB, 12 * GIB),
        ),
        max_size=50,
    )
)
def test_the_margin_stays_between_its_floor_and_its_ceiling(
    steps: list[tuple[str, float, int, int]],
) -> None:
    live = threshold()
    now_s = 0.0
    for what, passed_s, free, unused in steps:
        now_s += passed_s
        if what == "update":
            tau = live.update(now_s, free, unused)
            assert tau == max(free, 0) + max(unused, 0) - live.margin_bytes
        else:
            getattr(live, what)(now_s)
        assert round(0.4 * GIB) <= live.margin_bytes <= round(2.5 * GIB)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_bytes": 0}, r"total_bytes is 0; give the device's memory"),
        ({"floor_share": 0.0}, r"floor_share is 0.0; use a share above 0"),
        ({"floor_limit_bytes": 0}, r"floor_limit_bytes is 0; use 1 or more"),
        ({"ceiling_share": 0.01}, r"ceiling_share is 0.01; use a share from floor_share, 0.04"),
        ({"growth": 0.5}, r"growth is 0.5; use 1 or more"),
        ({"half_life_s": float("nan")}, r"half_life_s is nan; use more than 0 s"),
        ({"near_miss_share": 2.0}, r"near_miss_share is 2.0; use 0 to 1"),
        ({"quiet_s": -1.0}, r"quiet_s is -1.0; use 0 s or more"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryThreshold(**({"total_bytes": 10 * GIB} | settings))
