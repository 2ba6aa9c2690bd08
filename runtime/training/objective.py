"""What a batch of samples minimises, and its value and gradient on a part of the batch.

Of a batch of P pairs and R rated completions, N = P + R, the objective is

    sum of the samples' losses / N                                  see losses.py
    + sft_weight (P / N)   mean over chosen tokens of -log p        of the pairs
    + kl_weight            mean over completion tokens of KL(anchor || trained)

that is, the pairs' mean and the rated completions' mean, each weighted by its share of the samples
(the SFT term belongs to the pairs). The divisors are the whole batch's, so the parts' values and
gradients add up to the batch's, however it was cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch

from ..learning.samples import PreferencePair, Sample, TokenIds
from .losses import kto_loss, pair_loss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..learning.config import TrainingConfig
    from .tree import CompletionLogps


def completions_of(sample: Sample) -> tuple[TokenIds, ...]:
    """The completions whose log-probabilities a sample needs, in the order of a packed batch."""
    if isinstance(sample, PreferencePair):
        return sample.chosen_ids, sample.rejected_ids
    return (sample.completion_ids,)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchCounts:
    """The divisors: how much of everything a whole batch has."""

    samples: int
    pairs: int
    tokens: int
    chosen_tokens: int
    completion_tokens: int

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> BatchCounts:
        """Count a batch."""
        pairs = [sample for sample in samples if isinstance(sample, PreferencePair)]
        return cls(
            samples=len(samples),
            pairs=len(pairs),
            tokens=sum(sample.tokens for sample in samples),
            chosen_tokens=sum(len(pair.chosen_ids) for pair in pairs),
            completion_tokens=sum(len(ids) for s in samples for ids in completions_of(s)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What is reported of a part or, summed, of a batch.

    Attributes:
        loss, kl: this part's share of the objective, and of the mean KL(anchor || trained).
        correct: samples on the right side: chosen reward above rejected; liked above 0, disliked
            below.
        chosen, rejected, liked, disliked: sums of implicit rewards.
        pairs, n_liked, n_disliked: how many are in those sums.
        losses: each sample's key and loss, without weights and further terms; pairs first.
        logps: each sample's key and the summed log-probability of each completion; likewise.
    """

    loss: float = 0.0
    kl: float = 0.0
    correct: int = 0
    chosen: float = 0.0
    rejected: float = 0.0
    liked: float = 0.0
    disliked: float = 0.0
    pairs: int = 0
    n_liked: int = 0
    n_disliked: int = 0
    losses: tuple[tuple[int, float], ...] = ()
    logps: tuple[tuple[int, tuple[float, ...]], ...] = ()

    def __add__(self, other: Tally) -> Tally:
        names = [f.name for f in fields(self)]
        return Tally(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def chosen_reward(self) -> float | None:
        """Mean over the pairs; in a batch without pairs, over the liked completions; or None."""
        if self.pairs:
            return self.chosen / self.pairs
        return self.liked / self.n_liked if self.n_liked else None

    @property
    def rejected_reward(self) -> float | None:
        """Mean over the pairs; in a batch without pairs, over the disliked; or None."""
        if self.pairs:
            return self.rejected / self.pairs
        return self.disliked / self.n_disliked if self.n_disliked else None

    @property
    def margin(self) -> float | None:
        """Chosen minus rejected reward; None if either is."""
        if self.chosen_reward is None or self.rejected_reward is None:
            return None
        return self.chosen_reward - self.rejected_reward

    @property
    def accuracy(self) -> float | None:
        """Share of samples on the right side; None without samples."""
        samples = self.pairs + self.n_liked + self.n_disliked
        return self.correct / samples if samples else None


@dataclass(frozen=True, slots=True, eq=False)
class PartLoss:
    """The objective's value on a part of a batch.

    Attributes:
        loss: scalar, with gradient.
        tally: of this part.
        not_finite: keys of the samples whose loss is not finite.
    """

    loss: torch.Tensor
    tally: Tally
    not_finite: tuple[int, ...]


def part_loss(
    samples: Sequence[Sample],
    completions: CompletionLogps,
    counts: BatchCounts,
    config: TrainingConfig,
    *,
    z0: float | None,
) -> PartLoss:
    """The objective on a part of a batch.

    Args:
        samples: the part, with their reference log-probabilities.
        completions: of the part's completions, in the order of `completions_of` each.
        counts: of the whole batch.
        config: the loss and its weights.
        z0: KTO's reference point of the whole batch; needed for rated completions.
    """
    logps = completions.logps
    rows = _first_rows(samples)
    parts = []
    tally = Tally()
    not_finite: list[int] = []
    pairs = [(i, s) for i, s in zip(rows, samples, strict=True) if isinstance(s, PreferencePair)]
    if pairs:
        chosen = torch.tensor([i for i, _ in pairs], device=logps.device)
        rejected = chosen + 1
        result = pair_loss(
            config.loss,
            logps[chosen],
            logps[rejected],
            logps.new_tensor([s.ref_chosen_logp for _, s in pairs]),
            logps.new_tensor([s.ref_rejected_logp for _, s in pairs]),
            completions.counts[chosen],
            completions.counts[rejected],
            beta=config.beta,
            label_smoothing=config.label_smoothing,
        )
        parts.append(result.loss.sum() / counts.samples)
        if config.sft_weight > 0:
            share = counts.pairs / (counts.samples * counts.chosen_tokens)
            parts.append(-config.sft_weight * share * logps[chosen].sum())
        losses, high, low, won, lost = torch.stack(
            [
                result.loss.detach(),
                result.chosen_reward,
                result.rejected_reward,
                logps[chosen].detach(),
                logps[rejected].detach(),
            ]
        ).tolist()
        not_finite += [s.key for (_, s), x in zip(pairs, losses, strict=True) if not _finite(x)]
        tally += Tally(
            correct=sum(c > r for c, r in zip(high, low, strict=True)),
            chosen=sum(high),
            rejected=sum(low),
            pairs=len(pairs),
            losses=tuple((s.key, x) for (_, s), x in zip(pairs, losses, strict=True)),
            logps=tuple((s.key, (x, y)) for (_, s), x, y in zip(pairs, won, lost, strict=True)),
        )
    rated = [
        (i, s) for i, s in zip(rows, samples, strict=True) if not isinstance(s, PreferencePair)
    ]
    if rated:
        if z0 is None:
            raise ValueError("rated completions need z0; compute it over the whole batch first")
        is_liked = [s.is_desirable for _, s in rated]
        theirs = logps[torch.tensor([i for i, _ in rated], device=logps.device)]
        kto = kto_loss(
            theirs,
            logps.new_tensor([s.ref_logp for _, s in rated]),
            torch.tensor(is_liked, device=logps.device),
            z0=z0,
            beta=config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )
        parts.append(kto.loss.sum() / counts.samples)
        losses, rewards, sums = torch.stack([kto.unweighted, kto.reward, theirs.detach()]).tolist()
        not_finite += [s.key for (_, s), x in zip(rated, losses, strict=True) if not _finite(x)]
        liked = [r for r, is_up in zip(rewards, is_liked, strict=True) if is_up]
        disliked = [r for r, is_up in zip(rewards, is_liked, strict=True) if not is_up]
        tally += Tally(
            correct=sum(r > 0 for r in liked) + sum(r < 0 for r in disliked),
            liked=sum(liked),
            disliked=sum(disliked),
            n_liked=len(liked),
            n_disliked=len(disliked),
            losses=tuple((s.key, x) for (_, s), x in zip(rated, losses, strict=True)),
            logps=tuple((s.key, (x,)) for (_, s), x in zip(rated, sums, strict=True)),
        )
    if completions.kl is not None:
        kl = completions.kl.sum() / counts.completion_tokens
        parts.append(config.kl_weight * kl)
        tally += Tally(kl=float(kl.detach()))
    loss = torch.stack(parts).sum()
    tally += Tally(loss=float(loss.detach()))
    if not not_finite and not _finite(tally.loss):  # the SFT or KL term's doing
        not_finite = [sample.key for sample in samples]
    return PartLoss(loss, tally, tuple(not_finite))


def _first_rows(samples: Sequence[Sample]) -> list[int]:
    """The number of each sample's first completion."""
    rows, n = [], 0
    for sample in samples:
        rows.append(n)
        n += len(completions_of(sample))
    return rows


def _finite(value: float) -> bool:
    return math.isfinite(value)
