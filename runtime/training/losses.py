"""The losses of preference optimisation, per sample, on summed log-probabilities.

Every function takes and gives float32 vectors with one entry per sample and leaves the mean over a
batch to its caller, so that a batch may come in pieces. With `r` the log-ratio of a completion,
its summed log-probability under the trained weights minus that under the base model, and |y| its
number of tokens, the loss of a pair (chosen w, rejected l) is

    sigmoid       -(1-e) log s(b (r_w - r_l)) - e log s(-b (r_w - r_l))
    robust        [-(1-e) log s(b (r_w - r_l)) + e log s(-b (r_w - r_l))] / (1 - 2e)
    ipo           (r_w/|w| - r_l/|l| - 1/(2b))^2
    sigmoid_norm  -log s(b (r_w/|w| - r_l/|l|))

where s is the logistic function, b `beta` and e `label_smoothing`; and of a rated completion

    kto           v (1 - s(b (r - z0)))  if it was liked,  v (1 - s(b (z0 - r)))  if not.

Conventions (which log-ratios are averaged over tokens, what counts as a reward) are those of TRL,
so that numbers can be compared. One is not: TRL's sigmoid ignores label smoothing. Here it gives
conservative DPO, because a setting that is silently without effect misleads; at 0, the default,
the two agree.

Sources: DPO, Rafailov et al. 2023, arXiv 2305.18290, Eq. 7; conservative DPO, Mitchell 2023, "A
note on DPO with noisy preferences"; robust DPO, Chowdhury et al. 2024, arXiv 2403.00409; IPO, Azar
et al. 2023, arXiv 2310.12036, Eq. 17, averaged over tokens as TRL found its authors to do;
length-normalised DPO, Lambert et al. 2024 (Tulu 3), arXiv 2411.15124; KTO, Ethayarajh et al. 2024,
arXiv 2402.01306, Eq. 7.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True, slots=True, eq=False)
class PairLoss:
    """Of each pair, (B,): its loss, with gradient; its implicit rewards (beta r), without."""

    loss: torch.Tensor
    chosen_reward: torch.Tensor
    rejected_reward: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RatedLoss:
    """Of each rated completion, (B,): its loss, with gradient; without, its implicit reward, and
    the loss as it is without the weight."""

    loss: torch.Tensor
    reward: torch.Tensor
    unweighted: torch.Tensor


def pair_loss(
    kind: str,
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    ref_chosen_logps: torch.Tensor,
    ref_rejected_logps: torch.Tensor,
    chosen_counts: torch.Tensor,
    rejected_counts: torch.Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> PairLoss:
    """The loss of preference pairs.

    Args:
        kind: one of `config.LOSSES`; the module docstring has the formulas.
        chosen_logps, rejected_logps: (B,), summed over completion tokens, with gradient.
        ref_chosen_logps, ref_rejected_logps: (B,), the same under the base model.
        chosen_counts, rejected_counts: (B,), completion tokens.
        beta: the temperature, above 0.
        label_smoothing: the share of labels believed to be wrong, [0, 0.5).

    Raises:
        ValueError: for an unknown kind.
    """
    chosen = chosen_logps - ref_chosen_logps
    rejected = rejected_logps - ref_rejected_logps
    if kind == "sigmoid":
        z = beta * (chosen - rejected)
        loss = -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)
    elif kind == "robust":
        z = beta * (chosen - rejected)
        clean = (1 - label_smoothing) * F.logsigmoid(z)
        loss = (label_smoothing * F.logsigmoid(-z) - clean) / (1 - 2 * label_smoothing)
    elif kind == "ipo":
        loss = (chosen / chosen_counts - rejected / rejected_counts - 1 / (2 * beta)) ** 2
    elif kind == "sigmoid_norm":
        loss = -F.logsigmoid(beta * (chosen / chosen_counts - rejected / rejected_counts))
    else:
        raise ValueError(f"there is no pair loss {kind!r}; use one of config.LOSSES")
    return PairLoss(loss, beta * chosen.detach(), beta * rejected.detach())


def kto_reference_point(log_ratios: torch.Tensor) -> torch.Tensor:
    """KTO's z0, a scalar: how far the trained weights are from the base model, at least 0.

    An estimate of KL(trained || base), without gradient, from the batch's own completions put to
    other prompts than their own.

    Args:
        log_ratios: (B,), of the mismatched completions of the whole batch.
    """
    return log_ratios.detach().mean().clamp(min=0.0)


def kto_loss(
    logps: torch.Tensor,
    ref_logps: torch.Tensor,
    is_desirable: torch.Tensor,
    *,
    z0: torch.Tensor | float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> RatedLoss:
    """The loss of rated completions.

    Args:
        logps: (B,), summed over completion tokens, with gradient.
        ref_logps: (B,), the same under the base model.
        is_desirable: (B,) bool.
        z0: `kto_reference_point` of the whole batch.
        beta: the temperature, above 0.
        desirable_weight, undesirable_weight: of liked and of disliked completions.
    """
    ratio = logps - ref_logps
    side = torch.where(is_desirable, 1.0, -1.0).to(ratio)
    weight = torch.where(is_desirable, desirable_weight, undesirable_weight).to(ratio)
    unweighted = 1 - torch.sigmoid(beta * side * (ratio - z0))
    return RatedLoss(weight * unweighted, beta * ratio.detach(), unweighted.detach())
