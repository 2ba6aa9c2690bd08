"""Evidence of learning: what `Runtime.learning()` tells, for `/v1/learning`, metrics and people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping  # noqa: TC003 - dataclass fields are inspected
from dataclasses import dataclass, field
from datetime import datetime  # noqa: TC003
from typing import Literal, NamedTuple, TypeAlias

Phase: TypeAlias = Literal["idle", "training", "evaluating", "publishing", "set_down", "stopped"]


class Candidates(NamedTuple):
    """How many candidates there were: `refused` and `undecided` by reason.

    One with several reasons counts once, under all of them; see `one_reason`.
    """

    passed: int
    refused: Mapping[str, int]
    undecided: Mapping[str, int]


def one_reason(reasons: Iterable[str]) -> str:
    """What a candidate is counted under, so that each counts once: "entropy+probe_loss"."""
    return "+".join(sorted(reasons))


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLearning:
    """One adapter's learning. Numbers of the last optimizer step are None before the first.

    Attributes:
        adapter: its name.
        live_version: what requests get; 0 is the base model.
        live_since: when it went live; None for the base model.
        live_age_s: for how long it has been (freshness).
        phase: what its learner does now; "set_down": memory is short, and the training state is on
            disk until there is room for it again.
        pairs: samples by state: "pending" (reference log-probabilities are due), "queued" (not
            trained on yet), "trained", "held_out", "withdrawn", "superseded", "contradictory",
            "refused".
        steps: optimizer steps.
        tokens_trained: tokens of forwards that were trained on.
        loss, margin, reward_accuracy, gradient_norm, learning_rate: of the last step; the margin is
            chosen minus rejected implicit reward (beta included).
        candidates_passed: how many were published.
        candidates_refused: how many were not, by reason as in `Candidates`.
        candidates_undecided: how many were neither, and were trained further, likewise.
        win_rate: share of held-out pairs whose chosen answer the live version finds likelier per
            token than the rejected, when it was judged; None for the base model.
        base_win_rate: the base model's share of the same.
        last_verdict: what the gate said last, in words.
        set_downs: how often training gave up its memory, since the start.
    """

    adapter: str
    live_version: int = 0
    live_since: datetime | None = None
    live_age_s: float = 0.0
    phase: Phase = "idle"
    pairs: Mapping[str, int] = field(default_factory=dict)
    steps: int = 0
    tokens_trained: int = 0
    loss: float | None = None
    margin: float | None = None
    reward_accuracy: float | None = None
    gradient_norm: float | None = None
    learning_rate: float | None = None
    candidates_passed: int = 0
    candidates_refused: Mapping[str, int] = field(default_factory=dict)
    candidates_undecided: Mapping[str, int] = field(default_factory=dict)
    win_rate: float | None = None
    base_win_rate: float | None = None
    last_verdict: str | None = None
    set_downs: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningStatus:
    """All of learning at one moment.

    Attributes:
        enabled: whether feedback is taken.
        events: stored events by type.
        refused_events: events that were not taken, by error code, since the start.
        duplicates: events that had been stored before, since the start.
        recorded_responses: responses that are kept to be rated; some may have just expired.
        adapters: the served model's name first, then the tenants.
    """

    enabled: bool
    events: Mapping[str, int] = field(default_factory=dict)
    refused_events: Mapping[str, int] = field(default_factory=dict)
    duplicates: int = 0
    recorded_responses: int = 0
    adapters: tuple[AdapterLearning, ...] = ()
