"""The desk between learners and the engine: quanta are offered here, and run when a plan says so.

    learner ── await desk.run(...) ──► offers ──► plan ──► carry_out ──► quantum on the lane
                     ▲                                          │
                     └───────────────── outcome ────────────────┘

The scheduler is told when an offer comes and when a quantum has ended; the engine plans, and the
desk does what the plan says of training. One quantum is on the lane at a time. While it is told to
wait it stops at its next safepoint, a layer's work away.

Everything here runs on the event loop.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ...policy.types import RunningQuantum, TrainingOffer, TrainingView

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ...policy.types import TrainingPlan
    from ...streams.lane import Lane
    from ..training.safepoints import Safepoints
    from ..training.trainer import Quantum, StepReport

SHARE_TIME_S = 2.0
"""The training share is that of the last few seconds: older ones count 1/e after this long."""


class BusyClock:
    """How long something has been on: in all, and as a share of the recent past."""

    __slots__ = ("_is_on", "_share", "_since_s", "_total_s")

    def __init__(self, now_s: float) -> None:
        self._is_on = False
        self._since_s = now_s
        self._total_s = 0.0
        self._share = 0.0

    def switch(self, now_s: float, *, is_on: bool) -> None:
        """It goes on or off now."""
        self._total_s, self._share = self.total_s(now_s), self.share(now_s)
        self._since_s = now_s
        self._is_on = is_on

    def total_s(self, now_s: float) -> float:
        """Seconds that it was on until `now_s`."""
        return self._total_s + (now_s - self._since_s if self._is_on else 0.0)

    def share(self, now_s: float) -> float:
        """Of the recent past, in [0, 1]."""
        fade = math.exp((self._since_s - now_s) / SHARE_TIME_S)
        return self._share * fade + (1.0 - fade if self._is_on else 0.0)

    def idle_since_s(self, now_s: float) -> float:
        """When it went off; `now_s` while it is on."""
        return now_s if self._is_on else self._since_s


class Outlook(NamedTuple):
    """What a batch promises.

    Attributes:
        loss: mean L_DPO of its samples when they were last trained on, in nats; of one that never
            was, the loss before any training.
        signal: mean learnability, in [0, 1]; see `cotune.policy.learnability`.
    """

    loss: float
    signal: float


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantumOutcome:
    """A quantum that has left the lane.

    Attributes:
        adapter: whose it was.
        kind, tokens, samples: what it was; tokens as far as they are known before it runs.
        started_s, ended_s: on the runtime's clock.
        held_s: how long of that it was told to wait.
        out_of_memories: how often it ran out of memory.
        error: what it raised, in words.
    """

    adapter: str
    kind: str
    tokens: int
    samples: int
    started_s: float
    ended_s: float
    held_s: float
    out_of_memories: int
    error: str | None


class QuantumTrainer(Protocol):
    """What runs quanta: `Trainer`."""

    @property
    def out_of_memories(self) -> int:
        """How often a quantum has run out of memory so far."""

    def next_quantum(self, max_tokens: int = 0) -> Quantum | None:
        """What comes next; None when no batch is under way."""

    def run_quantum(self, max_tokens: int = 0) -> StepReport | None:
        """Run it, on the training lane."""


class Overseer(Protocol):
    """Who is told of the desk: the scheduler."""

    def on_training_change(self) -> None:
        """An offer has come or gone, or the lane has become free."""

    def on_quantum_start(self) -> None:
        """A quantum is about to run."""

    def on_quantum(self, outcome: QuantumOutcome) -> None:
        """A quantum has ended."""


@dataclass(slots=True, eq=False)
class _Offer:
    view: TrainingOffer
    quantum: Quantum
    granted: asyncio.Future[int]


@dataclass(slots=True, eq=False)
class _Running:
    offer: _Offer
    started_s: float
    active_before_s: float  # on the desk's busy clock
    is_held: bool = False


class TrainingDesk:
    """Learners offer quanta, plans start them.

    Args:
        lane: the training lane.
        safepoints: where its thread waits while it is held.
        overseer: is told what happens.
        clock: seconds, monotonic.
    """

    def __init__(
        self, lane: Lane, safepoints: Safepoints, overseer: Overseer, clock: Callable[[], float]
    ) -> None:
        self._lane = lane
        self._safepoints = safepoints
        self._overseer = overseer
        self._clock = clock
        self._names: list[str] = []
        self._offers: dict[int, _Offer] = {}  # in the order they came
        self._running: _Running | None = None
        self._active = BusyClock(clock())

    # -- the learners' side ----------------------------------------------------------------------

    def enroll(self, name: str) -> int:
        """The key under which a learner offers."""
        self._names.append(name)
        return len(self._names) - 1

    async def run(
        self, key: int, trainer: QuantumTrainer, outlook: Outlook, *, is_begun: bool
    ) -> StepReport | None:
        """Run the trainer's next quantum as soon as a plan starts it; what `run_quantum` gives.

        Args:
            key: of the learner; it has one offer at a time.
            trainer: has a batch under way.
            outlook: of that batch.
            is_begun: whether a quantum of it has run.

        Raises what the quantum raises. A caller that is cancelled takes its offer back; a quantum
        that is on the lane runs to its end first.
        """
        quantum = trainer.next_quantum()
        assert quantum is not None, "a learner offers while a batch is under way"
        view = TrainingOffer(
            key,
            quantum.kind,
            quantum.tokens,
            quantum.samples,
            self._clock(),
            outlook.loss,
            outlook.signal,
            is_begun,
        )
        offer = _Offer(view, quantum, asyncio.get_running_loop().create_future())
        self._offers[key] = offer
        self._overseer.on_training_change()
        try:
            max_tokens = await offer.granted
        except asyncio.CancelledError:
            if self._offers.get(key) is offer:
                del self._offers[key]
                self._overseer.on_training_change()
            else:  # started in the same breath: it has not reached the lane
                self._leave()
            raise
        return await self._run(trainer, max_tokens)

    async def _run(self, trainer: QuantumTrainer, max_tokens: int) -> StepReport | None:
        running = self._running
        assert running is not None
        quantum = trainer.next_quantum(max_tokens)
        assert quantum is not None
        failures = trainer.out_of_memories
        error: str | None = None
        self._overseer.on_quantum_start()
        try:
            return await self._lane.run(trainer.run_quantum, max_tokens)
        except BaseException as failure:
            error = f"{type(failure).__name__}: {failure}"
            raise
        finally:
            ended_s = self._clock()
            active_s = self._active.total_s(ended_s) - running.active_before_s
            self._leave()
            outcome = QuantumOutcome(
                adapter=self._names[running.offer.view.key],
                kind=quantum.kind,
                tokens=quantum.tokens,
                samples=quantum.samples,
                started_s=running.started_s,
                ended_s=ended_s,
                held_s=max(0.0, ended_s - running.started_s - active_s),
                out_of_memories=trainer.out_of_memories - failures,
                error=error,
            )
            self._overseer.on_quantum(outcome)

    def _leave(self) -> None:
        """The lane is free again."""
        self._running = None
        self._active.switch(self._clock(), is_on=False)
        self._safepoints.release()
        self._overseer.on_training_change()

    def _open_offers(self) -> Iterator[_Offer]:
        """Those that still wait: a caller that was cancelled may not have had its turn since."""
        return (offer for offer in self._offers.values() if not offer.granted.done())

    # -- the engine's side -----------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """Whether a quantum is on the lane."""
        return self._running is not None

    @property
    def is_held(self) -> bool:
        """Whether it is told to wait."""
        return self._running is not None and self._running.is_held

    @property
    def has_work(self) -> bool:
        """Whether a plan could start something, or something runs."""
        return self._running is not None or any(self._open_offers())

    def active_s(self, now_s: float) -> float:
        """Seconds in all in which the lane had a quantum that was not told to wait."""
        return self._active.total_s(now_s)

    def view(self, now_s: float) -> TrainingView:
        """What a policy sees."""
        on_lane = self._running
        running = None
        if on_lane is not None:
            offer = on_lane.offer.view
            active_s = self._active.total_s(now_s) - on_lane.active_before_s
            running = RunningQuantum(
                offer.key,
                offer.kind,
                offer.tokens,
                on_lane.started_s,
                on_lane.is_held,
                max(0.0, now_s - on_lane.started_s - active_s),
                offer.kind != "step",
            )
        return TrainingView(
            tuple(offer.view for offer in self._open_offers()),
            running,
            self._active.share(now_s),
            self._active.idle_since_s(now_s),
        )

    def carry_out(self, plan: TrainingPlan) -> str | None:
        """Do what a plan says of training; the kind of the quantum that it started, if any."""
        now_s = self._clock()
        started: str | None = None
        offer = self._offers.get(plan.start) if plan.start is not None else None
        # A plan may be older than the cancelling of a caller, who has not had a turn since.
        if offer is not None and not offer.granted.done() and self._running is None:
            del self._offers[offer.view.key]
            self._running = _Running(offer, now_s, self._active.total_s(now_s))
            self._active.switch(now_s, is_on=True)
            offer.granted.set_result(plan.max_tokens)
            started = offer.view.kind
        running = self._running
        if running is not None and running.is_held != plan.hold:
            running.is_held = plan.hold
            self._active.switch(now_s, is_on=not plan.hold)
            if plan.hold:
                self._safepoints.hold()
            else:
                self._safepoints.release()
        return started
