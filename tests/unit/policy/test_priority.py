"""Priorities of prompts and batches."""

from __future__ import annotations

import math

import pytest

from cotune.policy import PolicySettings, TrainingOffer
from cotune.policy.priority import (
    Signal,
    first_come,
    in_order,
    prompt_priority_s,
    signal_of,
    training_priority_s,
)

SETTINGS = PolicySettings(gamma=4.0, delta_prefill_s=10.0, delta_training_s=1.0)


def offer(key: int = 0, **changes: object) -> TrainingOffer:
    base = TrainingOffer(key, "forward", 64, 4, 0.0, loss=2.0, signal=0.25, is_begun=False)
    return base._replace(**changes)  # type: ignore[arg-type]  # any field


def test_a_priority_grows_by_one_each_second() -> None:
    assert prompt_priority_s(90.0, 100.0, SETTINGS) == 20.0
    assert prompt_priority_s(90.0, 103.0, SETTINGS) == 23.0
    first = training_priority_s(offer(), 5.0, SETTINGS, "learnability")
    assert first == 5.0 + 1.0 + 4.0 * 0.25
    assert training_priority_s(offer(), 7.0, SETTINGS, "learnability") == first + 2.0


@pytest.mark.parametrize(
    ("signal", "expected"),
    [("learnability", 0.25), ("loss", 1.0 - math.exp(-2.0)), ("raw loss", 2.0)],
)
def test_the_signal_is_bounded_unless_the_raw_loss_is_asked_for(
    signal: Signal, expected: float
) -> None:
    assert signal_of(offer(), signal) == pytest.approx(expected)
    huge = signal_of(offer(loss=1e6, signal=7.0), signal)
    assert huge == (1e6 if signal == "raw loss" else 1.0)


@pytest.mark.parametrize("signal", ["learnability", "loss", "raw loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_says_nothing(signal: Signal, value: float) -> None:
    assert signal_of(offer(loss=value, signal=value), signal) == 0.0


def test_batches_that_have_begun_go_first_then_the_higher_priority_then_the_key() -> None:
    offers = [
        offer(3, since_s=5.0),
        offer(2, since_s=5.0),
        offer(1, since_s=1.0),
        offer(0, since_s=9.0, is_begun=True),
    ]
    ordered = in_order(offers, 10.0, SETTINGS, "learnability")
    assert [found.key for found in ordered] == [0, 1, 2, 3]
    assert [found.key for found in first_come(offers)] == [0, 1, 2, 3]


def test_a_better_signal_is_worth_gamma_seconds_and_no_more() -> None:
    better = offer(1, since_s=5.0, signal=1.0)
    worse = offer(2, since_s=1.5, signal=0.0)
    old = offer(3, since_s=0.5, signal=0.0)
    ordered = in_order([better, worse, old], 10.0, SETTINGS, "learnability")
    assert [found.key for found in ordered] == [3, 1, 2]
