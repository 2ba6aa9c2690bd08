"""The values of a simulation: what is simulated, how each request went, what came of the run."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..runtime.errors import CotuneError

if TYPE_CHECKING:
    from ..policy.types import Budgets
    from .coserve_log import LoggedTraining
    from .traces import TraceRequest


class SimulationError(CotuneError):
    """A policy left everything waiting, or planned what cannot be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationSettings:
    """What is simulated, beside the requests and the device.

    Attributes:
        budgets: of an iteration, with the targets.
        pages: KV pages.
        max_queue: most requests that wait for their first iteration; further ones are refused.
        training: how batches are formed; None: nothing learns.
        loss, signal: what a batch says of itself; see `TrainingOffer`.
        references: compute each sample in the background before it is trained on, as the learner
            does for the base model's log-probabilities.
        overhead_s: passes between two iterations.
        noise: standard deviation of the logarithm of an iteration's time.
        seed: of the noise.
        slowdowns: (from when on in seconds, the factor by which the device is slower).
        fast_forward: run stretches of equal iterations in one go; changes nothing but the speed.
    """

    budgets: Budgets
    pages: int
    max_queue: int = 1024
    training: LoggedTraining | None = None
    loss: float = math.log(2.0)
    signal: float = 0.5
    references: bool = False
    overhead_s: float = 0.0
    noise: float = 0.0
    seed: int = 0
    slowdowns: tuple[tuple[float, float], ...] = ()
    fast_forward: bool = True


@dataclass(slots=True, eq=False)
class Outcome:
    """How one request went.

    Attributes:
        request: as it came.
        ttft_s: None where there was no token.
        gaps_s: between its tokens.
        cached_tokens: of its prompt, found in the cache at its first start.
        ended_s: None where it was refused.
        refusal: why, where it was: "queue_full" or "too_long".
    """

    request: TraceRequest
    ttft_s: float | None = None
    gaps_s: array[float] = field(default_factory=lambda: array("d"))
    cached_tokens: int = 0
    ended_s: float | None = None
    refusal: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationResult:
    """A run.

    Attributes:
        outcomes: of all requests but the runtime's own, in order of arrival.
        duration_s: until the last of them ended.
        iterations, plans: how many; the second counts calls of the policy.
        batch_tokens: that iterations computed.
        decode_tokens: of these, one per decoding sequence.
        busy_s: in which the inference lane worked.
        preemptions, evicted_pages: how many.
        steps, trained_tokens, trained_samples: of batches that were finished.
        quanta: that ended.
        training_s: in which the training lane worked and was not held.
        training_alone_s: what the quanta of finished batches would have taken without serving.
        held_s: in which a quantum was told to wait.
        arrived_samples, arrived_tokens: that there were to train on, in all.
        pauses: iterations that a policy made everyone wait for training.
    """

    outcomes: tuple[Outcome, ...]
    duration_s: float
    iterations: int
    plans: int
    batch_tokens: int
    decode_tokens: int
    busy_s: float
    preemptions: int
    evicted_pages: int
    hit_tokens: int
    steps: int
    trained_tokens: int
    trained_samples: int
    quanta: int
    training_s: float
    training_alone_s: float
    held_s: float
    arrived_samples: int
    arrived_tokens: int
    pauses: int
