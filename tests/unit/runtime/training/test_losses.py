from __future__ import annotations

import math

import pytest
import torch

from cotune.runtime.learning.config import LOSSES
from cotune.runtime.training.losses import (
    PairLoss,
    kto_loss,
    kto_reference_point,
    pair_loss,
)

CHOSEN, REJECTED = (-10.0, -31.5, -7.25), (-12.0, -20.0, -7.0)
REF_CHOSEN, REF_REJECTED = (-11.0, -30.0, -9.0), (-11.5, -24.0, -6.5)
CHOSEN_COUNTS, REJECTED_COUNTS = (4, 9, 1), (5, 6, 2)
BETA = 0.3


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def by_hand(kind: str, i: int, smoothing: float) -> float:
    """The formulas of the module's docstring, for one pair, in Python's float64."""
    r_w, r_l = CHOSEN[i] - REF_CHOSEN[i], REJECTED[i] - REF_REJECTED[i]
    z = BETA * (r_w - r_l)
    normed = r_w / CHOSEN_COUNTS[i] - r_l / REJECTED_COUNTS[i]
    clean, flipped = (1 - smoothing) * log_sigmoid(z), smoothing * log_sigmoid(-z)
    formulas = {
        "sigmoid": -clean - flipped,
        "robust": (-clean + flipped) / (1 - 2 * smoothing),
        "ipo": (normed - 1 / (2 * BETA)) ** 2,
        "sigmoid_norm": -log_sigmoid(BETA * normed),
    }
    return formulas[kind]


def run(kind: str, smoothing: float = 0.0, chosen: torch.Tensor | None = None) -> PairLoss:
    return pair_loss(
        kind,
        torch.tensor(CHOSEN) if chosen is None else chosen,
        torch.tensor(REJECTED),
        torch.tensor(REF_CHOSEN),
        torch.tensor(REF_REJECTED),
        torch.tensor(CHOSEN_COUNTS),
        torch.tensor(REJECTED_COUNTS),
        beta=BETA,
        label_smoothing=smoothing,
    )


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_pair_losses_follow_their_formulas(kind: str, smoothing: float) -> None:
    result = run(kind, smoothing)
    expected = torch.tensor([by_hand(kind, i, smoothing) for i in range(3)])
    torch.testing.assert_close(result.loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", LOSSES)
def test_rewards_are_beta_times_the_summed_log_ratio_whatever_the_loss(kind: str) -> None:
    result = run(kind)
    torch.testing.assert_close(
        result.chosen_reward, BETA * (torch.tensor(CHOSEN) - torch.tensor(REF_CHOSEN))
    )
    torch.testing.assert_close(
        result.rejected_reward, BETA * (torch.tensor(REJECTED) - torch.tensor(REF_REJECTED))
    )


@pytest.mark.parametrize("kind", LOSSES)
def test_a_rising_chosen_log_probability_lowers_the_loss_and_rewards_carry_no_gradient(
    kind: str,
) -> None:
    chosen = torch.tensor(CHOSEN, requires_grad=True)
    result = run(kind, 0.1, chosen)
    (gradient,) = torch.autograd.grad(result.loss.sum(), chosen)
    assert (gradient[:2] < 0).all()
    assert (gradient[2] > 0) == (kind == "ipo")  # that pair's margin is beyond IPO's target
    assert not result.chosen_reward.requires_grad


def test_smoothing_turns_around_the_gradient_of_a_pair_that_is_too_sure_for_sigmoid_alone() -> None:
    # Conservative DPO has its minimum where s(z) = 1 - e; the unbiased robust loss has none.
    sure = torch.tensor([100.0] * 3, requires_grad=True)
    (conservative,) = torch.autograd.grad(run("sigmoid", 0.2, sure).loss.sum(), sure)
    (robust,) = torch.autograd.grad(run("robust", 0.2, sure).loss.sum(), sure)
    assert (conservative > 0).all()
    assert (robust < 0).all()


def test_an_extreme_margin_gives_a_finite_loss_and_gradient() -> None:
    chosen = torch.tensor([-1e6, 0.0, 1e6], requires_grad=True)
    for kind in LOSSES:
        result = run(kind, 0.1, chosen)
        (gradient,) = torch.autograd.grad(result.loss.sum(), chosen)
        assert result.loss.isfinite().all()
        assert gradient.isfinite().all()


def test_an_unknown_loss_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="hinge"):
        run("hinge")


def test_kto_follows_its_formula() -> None:
    logps, ref = torch.tensor([-8.0, -9.0, -5.0]), torch.tensor([-9.0, -8.5, -7.0])
    result = kto_loss(
        logps,
        ref,
        torch.tensor([True, False, False]),
        z0=0.4,
        beta=BETA,
        desirable_weight=2.0,
        undesirable_weight=0.5,
    )

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    expected = [
        2.0 * (1 - sigmoid(BETA * (1.0 - 0.4))),
        0.5 * (1 - sigmoid(BETA * (0.4 + 0.5))),
        0.5 * (1 - sigmoid(BETA * (0.4 - 2.0))),
    ]
    torch.testing.assert_close(result.loss, torch.tensor(expected), rtol=1e-6, atol=0)
    torch.testing.assert_close(result.reward, BETA * (logps - ref))


def test_the_reference_point_is_the_mean_log_ratio_and_never_negative() -> None:
    ratios = torch.tensor([2.0, -1.0, 0.5], requires_grad=True)
    point = kto_reference_point(ratios)
    assert float(point) == 0.5
    assert not point.requires_grad
    assert float(kto_reference_point(torch.tensor([-3.0, 1.0]))) == 0.0
