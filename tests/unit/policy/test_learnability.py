"""How much is still to be learned from a sample."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.policy.learnability import UNSEEN, SampleHistory

LN_2 = math.log(2.0)


def seen(*losses: float, untrained: float = LN_2) -> SampleHistory:
    history = UNSEEN
    for loss in losses:
        history = history.after(loss, untrained)
    return history


def test_a_sample_that_was_never_trained_on_comes_first_of_all() -> None:
    assert UNSEEN.signal == 1.0
    assert UNSEEN.signal >= max(seen(LN_2, 0.5).signal, seen(2.0).signal, seen(0.1, 0.05).signal)


def test_the_first_visit_is_no_evidence_because_its_loss_comes_before_the_step() -> None:
    assert seen(LN_2).belief == 1.0
    assert seen(LN_2).signal == 1.0


def test_what_is_learned_sinks_to_nothing() -> None:
    signals = [seen(*(LN_2 * 0.5**i for i in range(n))).signal for n in range(1, 9)]
    assert signals == sorted(signals, reverse=True)
    assert signals[-1] < 0.01


def test_what_looks_like_noise_sinks_below_what_falls_at_the_same_loss() -> None:
    falling = seen(2.0, 1.6, 1.3, 1.0)
    noise = seen(1.0, 1.1, 0.9, 1.1, 1.0)
    assert falling.signal > 0.9
    assert noise.signal < falling.signal - 0.3
    stuck = seen(*[1.5] * 6)
    assert stuck.signal < 0.1


def test_what_looked_like_noise_is_believed_again_once_it_falls() -> None:
    stuck = seen(*[1.5] * 5)
    again = stuck.after(1.0, LN_2).after(0.7, LN_2)
    assert again.signal > 3 * stuck.signal


def test_a_wrong_label_sinks_below_a_right_one_although_its_loss_is_higher() -> None:
    # What others teach raises the loss of a wrong label while it lowers that of a right one.
    right, wrong = seen(0.65, 0.6, 0.55, 0.5), seen(0.78, 0.81, 0.84, 0.87)
    assert wrong.left > right.left
    assert wrong.signal < 0.5 * right.signal


def test_what_contradicts_the_past_is_not_noise_while_it_is_learned() -> None:
    assert seen(3.0).signal == 1.0
    assert seen(3.0, 2.0, 1.2).signal > 0.9


def test_what_rose_again_after_it_was_learned_sinks() -> None:
    assert seen(LN_2, 0.4, 0.3, 1.0, 1.0, 1.0).signal < 0.1


def test_the_signal_does_not_depend_on_the_scale_of_the_loss() -> None:
    dpo = seen(LN_2, 0.8 * LN_2, 0.75 * LN_2)
    ipo = seen(25.0, 20.0, 18.75, untrained=25.0)
    assert dpo.signal == pytest.approx(ipo.signal)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=12))
def test_the_signal_is_bounded_whatever_the_losses_are(losses: list[float]) -> None:
    history = seen(*losses)
    assert 0.0 <= history.signal <= 1.0
    assert 0.0 <= history.belief <= 1.0
    assert math.isfinite(history.left)
    assert history.visits == len(losses)


def test_a_loss_that_is_not_finite_counts_as_not_fallen() -> None:
    assert seen(LN_2, math.nan).signal == seen(LN_2, LN_2).signal < 1.0
    assert seen(LN_2, math.inf).signal == seen(LN_2, LN_2).signal


def test_an_untrained_loss_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="untrained_loss is 0"):
        UNSEEN.after(1.0, 0.0)
