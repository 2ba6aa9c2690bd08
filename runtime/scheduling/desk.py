"""The desk between learners and the engine: quanta are offered here, and run when a plan says so.

    learner ── await desk.run(...) ──► offers ──► plan ──► carry_out ──► quantum on the lane
                     ▲                                          │
                     └───────────────── outcome ────────────────┘

The scheduler is told when an offer comes and when a quantum has ended; the engine plans, and the
desk does what the plan says of training. One quantum is on the lane at a time. While it is told to
wait it stops at its next safepoint, a layer's work away.

What else a learner has to do on the lane (a checkpoint, a version's files) is a job. It needs no
plan: it runs as soon as the lane is free, before any quantum, and no offer is shown meanwhile.

Everything here runs on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar, TypeVarTuple

from ...policy.packing import rows_per_sample
from ...policy.types import RunningQuantum, TrainingOffer, TrainingView
from ..errors import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ...policy.types import TrainingPlan
    from ...streams.lane import Lane
    from ..training.safepoints import Safepoints
    from ..training.trainer import Quantum, StepReport

log = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

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

    @property
    def is_on(self) -> bool:
        """Whether it is on now."""
        return self._is_on

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


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOutcome:
    """Other work that has left the lane.

    Attributes:
        adapter: whose it was.
        kind: what it was, in a word.
        started_s, ended_s: on the runtime's clock.
        error: what it raised, in words.
        is_out_of_memory: whether that was for want of memory.
    """

    adapter: str
    kind: str
    started_s: float
    ended_s: float
    error: str | None
    is_out_of_memory: bool


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

    def on_job(self, outcome: JobOutcome) -> None:
        """A job has ended."""


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
        self._has_job = False  # on the lane
        self._jobs: deque[asyncio.Future[None]] = deque()  # that wait for it
        self._active = BusyClock(clock())
        self._quiet_since_s = clock()  # when the last quantum ended

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

    async def job(self, key: int, kind: str, fn: Callable[[*Ts], T], /, *args: *Ts) -> T:
        """Run ``fn(*args)`` on the lane as soon as it is free; what that gives.

        Args:
            key: of the learner.
            kind: what it is, in a word, for the timeline.
            fn, args: as `Lane.run` takes them.

        Raises what `fn` raises. Cancellation is that of `Lane.run`: a job always runs to its end,
        and the caller waits for that, also where others go first.
        """
        name = self._names[key]
        cancelled = await self._wait_turn()
        started_s = self._clock()
        error: BaseException | None = None
        try:
            result = await self._lane.run(fn, *args)
        except BaseException as failure:
            error = failure
            if cancelled is not None and isinstance(failure, Exception):
                log.exception("job %r of %s failed, and its caller was cancelled", kind, name)
                raise cancelled from None
            raise
        finally:
            ended_s = self._clock()
            self._has_job = False
            self._active.switch(ended_s, is_on=False)
            self._pass_on()
            self._overseer.on_job(
                JobOutcome(
                    adapter=name,
                    kind=kind,
                    started_s=started_s,
                    ended_s=ended_s,
                    error=None if error is None else f"{type(error).__name__}: {error}",
                    is_out_of_memory=error is not None and is_out_of_memory(error),
                )
            )
            del error  # or the traceback and this frame would keep each other alive
        if cancelled is not None:
            raise cancelled
        return result

    async def _wait_turn(self) -> asyncio.CancelledError | None:
        """Take the lane for a job when it is free; whether the caller was cancelled meanwhile."""
        if self._running is None and not self._has_job:
            self._take_lane()
            return None
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._jobs.append(turn)
        cancelled: asyncio.CancelledError | None = None
        while not turn.done():
            try:
                await asyncio.shield(turn)
            except asyncio.CancelledError as error:
                cancelled = cancelled or error
        return cancelled

    def _take_lane(self) -> None:
        self._has_job = True
        self._active.switch(self._clock(), is_on=True)
        if any(self._open_offers()):  # they are not to be had now
            self._overseer.on_training_change()

    def _pass_on(self) -> None:
        """The lane is free: the next job has it, or whoever a plan starts."""
        if self._jobs:
            self._take_lane()
            self._jobs.popleft().set_result(None)
        else:
            self._overseer.on_training_change()

    def _leave(self) -> None:
        """The quantum's place on the lane is free again."""
        now_s = self._quiet_since_s = self._clock()
        self._running = None
        self._active.switch(now_s, is_on=False)
        self._safepoints.release()
        self._pass_on()

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
        """Whether a plan could start something, or a quantum runs."""
        return self._running is not None or (not self._has_job and any(self._open_offers()))

    @property
    def is_active(self) -> bool:
        """Whether the lane works: on a job, or on a quantum that is not told to wait."""
        return self._active.is_on

    def active_s(self, now_s: float) -> float:
        """Seconds in all in which the lane worked: waiting at a safepoint is no work."""
        return self._active.total_s(now_s)

    def quiet_s(self, now_s: float) -> float:
        """For how long no quantum has run; 0 while one does, held or not."""
        return 0.0 if self._running is not None else now_s - self._quiet_since_s

    def memory_needs(self, row_bytes: float) -> dict[int, float]:
        """The least that the quantum which each learner offers takes, in bytes: one sample's rows.

        A backward and a step take nothing: they give back what the forward took.
        """
        views = [offer.view for offer in self._open_offers()]
        return {
            view.key: 0.0
            if view.kind in ("backward", "step")
            else rows_per_sample(view) * row_bytes
            for view in views
        }

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
            () if self._has_job else tuple(offer.view for offer in self._open_offers()),
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
        if (
            offer is not None
            and not offer.granted.done()
            and self._running is None
            and not self._has_job
        ):
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
