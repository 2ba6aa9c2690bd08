"""Training in virtual time: samples become batches, batches quanta, and quanta take time.

    samples ─► fresh, by visits ─┐
                                 ├─► batch ─► offer ─► plan ─► on the lane ─► ended ─► offer ...
               earlier ones ─────┘

The learner and its lane are one thing here. A quantum on the lane is told how much time has passed
beside serving and alone; how much it slows serving down is the device's affair.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..policy.types import RunningQuantum, TrainingOffer, TrainingView
from ..runtime.scheduling.desk import BusyClock
from .coserve_log import LoggedSample
from .simulation_types import SimulationError
from .traces import TraceRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..policy.costs import Costs
    from ..policy.types import QuantumKind, TrainingPlan
    from .coserve_log import LoggedTraining


# -- what there is to train on ---------------------------------------------------------------------


def samples_of(
    requests: Sequence[TraceRequest],
    retrain_rate: float,
    *,
    tokens: int | None = None,
    max_tokens: int = 1024,
) -> list[LoggedSample]:
    """Feedback on some of the requests, so that the given share of all tasks is training.

    Evenly spread over the requests, each sample when its request comes.

    Args:
        requests: in order of arrival; the runtime's own are left out.
        retrain_rate: samples / (requests + samples), in [0, 1).
        tokens: rows of each sample; None: the prompt once and the answer twice, chosen and
            rejected, of the request that it rates.
        max_tokens: most of these.
    """
    per_request = retrain_rate / (1.0 - retrain_rate)
    owed = 0.0
    samples = []
    for request in requests:
        if request.is_background:
            continue
        owed += per_request
        rows = tokens or min(request.prompt_tokens + 2 * request.output_tokens, max_tokens)
        while owed >= 1.0 - 1e-9:
            owed -= 1.0
            samples.append(LoggedSample(arrival_s=request.arrival_s, tokens=rows))
    return samples


def reference_request(sample: LoggedSample) -> TraceRequest:
    """The base model's pass over a sample: a request of the runtime's own."""
    return TraceRequest(
        arrival_s=sample.arrival_s,
        prompt_tokens=sample.tokens,
        output_tokens=0,
        request_class="batch",
        is_background=True,
    )


# -- the training lane ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EndedQuantum:
    """A quantum that has left the lane: what it took without the time it was held."""

    kind: QuantumKind
    tokens: int
    seconds: float
    beside_serving: float


@dataclass(slots=True, eq=False)
class _OnLane:
    """The quantum on the lane."""

    kind: QuantumKind
    offered_tokens: int
    tokens: int
    samples: list[int]  # rows of each, of a forward
    work_s: float  # alone
    left_s: float  # alone
    started_s: float
    active_before_s: float
    is_held: bool = False
    shared_s: float = 0.0  # beside serving


@dataclass(slots=True, eq=False)
class _Batch:
    """The batch under way: rows of samples."""

    waiting: deque[int]
    tokens: int
    samples: int
    forward: list[int] | None = None
    is_begun: bool = False
    alone_s: float = 0.0  # of its quanta that have ended, without serving


class TrainingLane:
    """A learner and its lane: samples become batches, batches quanta, quanta take time."""

    def __init__(self, training: LoggedTraining, loss: float, signal: float) -> None:
        self._training = training
        self._loss = loss
        self._signal = signal
        self._fresh: list[deque[int]] = [deque() for _ in range(training.epochs)]  # by visits
        self._owed = 0
        self._earlier: deque[int] = deque()
        self._incomplete_since_s: float | None = None
        self._batch: _Batch | None = None
        self._offer: TrainingOffer | None = None
        self._on_lane: _OnLane | None = None
        self.active = BusyClock(0.0)
        self._held = BusyClock(0.0)
        self.ready_s = math.inf
        """When a batch that is incomplete will have waited long enough."""
        self.steps = 0
        self.trained_tokens = 0
        self.trained_samples = 0
        self.quanta = 0
        self.alone_s = 0.0

    # What there is to train on.

    def add_sample(self, tokens: int, now_s: float) -> None:
        """A sample is ready."""
        self._fresh[0].append(tokens)
        self._owed += 1
        self.refresh(now_s)

    def refresh(self, now_s: float) -> None:
        """Take up a batch if there is enough for one, or the first of it has waited long enough."""
        self.ready_s = math.inf
        if self._batch is not None or not self._owed:
            return
        if self._incomplete_since_s is None:
            self._incomplete_since_s = now_s
        ready_s = self._incomplete_since_s + self._training.batch_wait_s
        if self._owed < self._training.batch_size and now_s < ready_s:
            self.ready_s = ready_s
            return
        self._incomplete_since_s = None
        self._batch = self._next_batch()
        self._make_offer(now_s)

    def _next_batch(self) -> _Batch:
        """New samples, those visited least first, and some earlier ones."""
        training = self._training
        replayed = round(training.batch_size * training.replay_share) if self._earlier else 0
        rows: list[int] = []
        again: list[tuple[int, int]] = []
        for visits, queue in enumerate(self._fresh):
            while queue and len(rows) < training.batch_size - replayed:
                tokens = queue.popleft()
                rows.append(tokens)
                again.append((visits + 1, tokens))
        for _ in range(min(training.batch_size - len(rows), replayed, len(self._earlier))):
            rows.append(self._earlier[0])
            self._earlier.rotate(-1)
        for visits, tokens in again:
            if visits < len(self._fresh):
                self._fresh[visits].append(tokens)
            else:
                self._owed -= 1
                if training.replay_share:
                    self._earlier.append(tokens)
        return _Batch(deque(rows), sum(rows), len(rows))

    # What a policy sees and does.

    @property
    def has_work(self) -> bool:
        """Whether a plan could start something, or something is on the lane."""
        return self._offer is not None or self._on_lane is not None

    @property
    def is_active(self) -> bool:
        """Whether a quantum is on the lane and makes progress."""
        return self._on_lane is not None and not self._on_lane.is_held

    def held_s(self, now_s: float) -> float:
        """Seconds in which quanta were held so far."""
        return self._held.total_s(now_s)

    def view(self, now_s: float) -> TrainingView:
        """As `runtime.scheduling.desk` shows it."""
        on_lane = self._on_lane
        running = None
        if on_lane is not None:
            active_s = self.active.total_s(now_s) - on_lane.active_before_s
            running = RunningQuantum(
                0,
                on_lane.kind,
                on_lane.offered_tokens,
                on_lane.started_s,
                on_lane.is_held,
                max(0.0, now_s - on_lane.started_s - active_s),
                on_lane.kind != "step",
            )
        return TrainingView(
            () if self._offer is None else (self._offer,),
            running,
            self.active.share(now_s),
            self.active.idle_since_s(now_s),
        )

    def carry_out(
        self, plan: TrainingPlan, *, hold: bool, now_s: float, costs: Costs, slowdown: float
    ) -> None:
        """Start what a plan starts, and hold or let go what is on the lane.

        Args:
            plan: of training.
            hold: whether the quantum is to wait; in place of what the plan says.
            now_s: the time.
            costs: of the device.
            slowdown: times as long as `costs` says.

        Raises:
            SimulationError: there is no such offer.
        """
        if plan.start is not None and self._on_lane is None:
            offer = self._offer
            if offer is None or offer.key != plan.start:
                raise SimulationError(
                    f"the policy started offer {plan.start}, which is not there; this is a fault "
                    "of it"
                )
            samples = self._take(plan.max_tokens or self._training.quantum_tokens, offer.kind)
            tokens = sum(samples)
            work_s = costs.quantum_s(offer.kind, tokens) * slowdown
            self._offer = None
            self._on_lane = _OnLane(
                offer.kind,
                offer.tokens,
                tokens,
                samples,
                work_s,
                work_s,
                now_s,
                self.active.total_s(now_s),
            )
            self.active.switch(now_s, is_on=True)
        on_lane = self._on_lane
        if on_lane is not None and on_lane.is_held != hold:
            on_lane.is_held = hold
            self.active.switch(now_s, is_on=not hold)
            self._held.switch(now_s, is_on=hold)

    def _take(self, limit: int, kind: QuantumKind) -> list[int]:
        """Rows of the samples that the next quantum computes; they leave the waiting."""
        batch = self._batch
        assert batch is not None
        batch.is_begun = True
        if kind == "step":
            return []
        if batch.forward is not None:
            return batch.forward
        rows = [batch.waiting.popleft()]
        tokens = rows[0]
        while batch.waiting and tokens + batch.waiting[0] <= limit:
            tokens += batch.waiting[0]
            rows.append(batch.waiting.popleft())
        return rows

    def _make_offer(self, now_s: float) -> None:
        """Offer the next quantum of the batch."""
        batch = self._batch
        assert batch is not None
        kind: QuantumKind = "step"
        tokens, samples = 0, batch.samples
        if batch.forward is not None:
            kind, tokens, samples = "backward", sum(batch.forward), len(batch.forward)
        elif batch.waiting:
            kind, tokens, samples = "forward", batch.waiting[0], 1
            for rows in list(batch.waiting)[1:]:
                if tokens + rows > self._training.quantum_tokens:
                    break
                tokens += rows
                samples += 1
        self._offer = TrainingOffer(
            0, kind, tokens, samples, now_s, self._loss, self._signal, batch.is_begun
        )

    # Time.

    def _slower(self, costs: Costs, *, beside_serving: bool) -> float:
        """How much longer the quantum on the lane takes than alone."""
        on_lane = self._on_lane
        assert on_lane is not None
        if not beside_serving:
            return 1.0
        alone_s = costs.quantum_s(on_lane.kind, on_lane.tokens)
        if alone_s <= 0.0:
            return 1.0
        return costs.quantum_s(on_lane.kind, on_lane.tokens, beside_serving=True) / alone_s

    def left_s(self, costs: Costs, *, beside_serving: bool) -> float:
        """How long the quantum still takes, unless it is held."""
        assert self._on_lane is not None
        return self._on_lane.left_s * self._slower(costs, beside_serving=beside_serving)

    def advance(self, seconds: float, costs: Costs, *, beside_serving: bool) -> None:
        """The quantum goes on for so long; less than it still takes."""
        on_lane = self._on_lane
        assert on_lane is not None
        on_lane.left_s -= seconds / self._slower(costs, beside_serving=beside_serving)
        if beside_serving:
            on_lane.shared_s += seconds

    def finish(self, now_s: float, shared_s: float) -> EndedQuantum:
        """The quantum has ended, after so long beside serving since it last advanced."""
        on_lane, batch = self._on_lane, self._batch
        assert on_lane is not None
        assert batch is not None
        seconds = self.active.total_s(now_s) - on_lane.active_before_s
        self._on_lane = None
        self.active.switch(now_s, is_on=False)
        self.quanta += 1
        batch.alone_s += on_lane.work_s
        if on_lane.kind == "forward":
            batch.forward = on_lane.samples
        elif on_lane.kind == "backward":
            batch.forward = None
        if on_lane.kind == "step":
            self.steps += 1
            self.trained_tokens += batch.tokens
            self.trained_samples += batch.samples
            self.alone_s += batch.alone_s
            self._batch = None
            self.refresh(now_s)
        else:
            self._make_offer(now_s)
        shared_s += on_lane.shared_s
        return EndedQuantum(
            on_lane.kind,
            on_lane.tokens,
            seconds,
            min(1.0, shared_s / seconds) if seconds > 0.0 else 0.0,
        )
