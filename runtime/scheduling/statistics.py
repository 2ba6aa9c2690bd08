"""What the scheduler did, as numbers: for `Runtime.statistics()`, metrics and people."""

from __future__ import annotations

import math
from collections.abc import Mapping  # noqa: TC003 - dataclass fields are inspected at run time
from dataclasses import dataclass, field
from typing import Final

DECISION_BUCKETS_S: Final = (
    0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05,
)  # fmt: skip
"""Upper bounds of the classes that decision times are counted in, in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleStatistics:
    """The scheduler at one moment. Counts and seconds are since its start; "recent" is the last
    `cotune.runtime.scheduling.timeline.RECENT` iterations.

    Attributes:
        policy: the name of the policy that decides.
        decisions: iterations that it planned.
        decision_s: what it took to observe and to decide, in sum.
        decision_counts: decisions by time: one count per bound of `DECISION_BUCKETS_S`, of those
            above the bound before and not above this one, and at the end those above them all.
        iteration_s: seconds that the planned iterations took on the device.
        tokens: what those iterations held.
        budget_tokens: what they could have held.
        fill: share of the token budget that recent iterations used (packing fill); None before
            the first.
        predicted: iterations whose time was predicted.
        prediction_error_p50, prediction_error_p95: of recent ones, how far the prediction was from
            the time measured, as a share of that time: the median, and what 95 of 100 stay below.
            None while nothing was predicted.
        prediction_bias: predicted over measured time of the same, less 1: above 0 where
            predictions are too long.
        slack_p5_s: recent iterations began with so much time until the next token was due, but for
            5 of 100 that had less; infinite where no token had a target, None before the first.
        late_iterations: iterations that began after a token was due.
        pauses: iterations given up so that training could go on (the policy `synchronous`).
        training_share: share of the recent past in which the training lane worked unheld.
        quanta: training quanta that ended, by kind.
        quantum_s: what they took without the time held, by kind.
        rows: rows that they computed.
        failed_quanta: those of them that raised.
        halvings: times that a quantum was cut in two for lack of memory.
        held_s: how long quanta waited at their safepoints.
        holds: iterations during which the training lane was told to wait.
        jobs: other work that the training lane has done, by kind: checkpoints, versions' files.
        job_s: what it took, by kind.
        memory_threshold: τ_mem, what may be taken beyond what is held now, in bytes; None where
            memory is not watched.
        near_misses: times that memory was nearly used up.
        out_of_memories: times that it was.
        interference: what an iteration takes more while a quantum runs beside it, as a factor.
        is_profile_stale: whether the profile of this device is far from what is measured now.
    """

    policy: str = ""
    decisions: int = 0
    decision_s: float = 0.0
    decision_counts: tuple[int, ...] = (0,) * (len(DECISION_BUCKETS_S) + 1)
    iteration_s: float = 0.0
    tokens: int = 0
    budget_tokens: int = 0
    fill: float | None = None
    predicted: int = 0
    prediction_error_p50: float | None = None
    prediction_error_p95: float | None = None
    prediction_bias: float | None = None
    slack_p5_s: float | None = None
    late_iterations: int = 0
    pauses: int = 0
    training_share: float = 0.0
    quanta: Mapping[str, int] = field(default_factory=dict)
    quantum_s: Mapping[str, float] = field(default_factory=dict)
    rows: int = 0
    failed_quanta: int = 0
    halvings: int = 0
    held_s: float = 0.0
    holds: int = 0
    jobs: Mapping[str, int] = field(default_factory=dict)
    job_s: Mapping[str, float] = field(default_factory=dict)
    memory_threshold: int | None = None
    near_misses: int = 0
    out_of_memories: int = 0
    interference: float = 1.0
    is_profile_stale: bool = False

    @property
    def decision_mean_s(self) -> float:
        """Mean time of a decision; 0 before the first."""
        return self.decision_s / self.decisions if self.decisions else 0.0

    def decision_quantile_s(self, share: float) -> float:
        """A bound that this share of the decisions did not exceed.

        It is a bound of `DECISION_BUCKETS_S`, infinite for what lies above them; 0 before the
        first decision.

        Raises:
            ValueError: `share` is not above 0 and at most 1.
        """
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share is {share}; use one above 0 and at most 1")
        needed = share * self.decisions
        seen = 0
        for bound, count in zip((*DECISION_BUCKETS_S, math.inf), self.decision_counts, strict=True):
            seen += count
            if seen >= needed:
                return bound if self.decisions else 0.0
        return math.inf
