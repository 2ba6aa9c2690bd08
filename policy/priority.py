"""Priorities: who goes first, in seconds of waiting.

    P(t) = seconds waited + δ of the kind of task            decode ≥ prompt ≥ training
    P_training(t) = P(t) + gamma · signal of the batch

A priority grows by one each second, whatever the task is, so no stream of others keeps anyone out
for ever. The signal is raw L_DPO where the paper's rule is asked for. It rewards noise: a batch of
contradictions keeps its high loss and its place. The bounded ones cannot: learnability falls when a
loss does not, and neither is ever worth more than gamma seconds.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .settings import PolicySettings
    from .types import TrainingOffer

Signal: TypeAlias = Literal["learnability", "loss", "raw loss"]


def signal_of(offer: TrainingOffer, signal: Signal) -> float:
    """What gamma weighs: in [0, 1], or nats for "raw loss". What is not finite counts 0."""
    value = offer.signal if signal == "learnability" else offer.loss
    if not math.isfinite(value):
        return 0.0
    if signal == "raw loss":
        return value
    value = max(0.0, value)
    return min(value, 1.0) if signal == "learnability" else 1.0 - math.exp(-value)


def prompt_priority_s(rank_s: float, now_s: float, settings: PolicySettings) -> float:
    """P(t) of a prompt; `rank_s` is when it came, moved by its priority and class."""
    return now_s - rank_s + settings.delta_prefill_s


def training_priority_s(
    offer: TrainingOffer, now_s: float, settings: PolicySettings, signal: Signal
) -> float:
    """P_training(t) of an offer."""
    waited_s = max(0.0, now_s - offer.since_s)
    return waited_s + settings.delta_training_s + settings.gamma * signal_of(offer, signal)


def in_order(
    offers: Sequence[TrainingOffer], now_s: float, settings: PolicySettings, signal: Signal
) -> list[TrainingOffer]:
    """Batches that have begun first, since they hold memory until their step; then by priority."""
    return sorted(
        offers,
        key=lambda offer: (
            not offer.is_begun,
            -training_priority_s(offer, now_s, settings, signal),
            offer.key,
        ),
    )


def first_come(offers: Sequence[TrainingOffer]) -> list[TrainingOffer]:
    """Batches that have begun first, then by how long they have waited."""
    return sorted(offers, key=lambda offer: (not offer.is_begun, offer.since_s, offer.key))
