"""The scheduler: what stands between the engine and its policy.

    engine ── views of its sequences ──► observation ──► policy ──► plan ──► engine
                                        ▲  ▲  ▲                     └─► training desk
                    costs, as measured ─┘  │  └─ offers of the learners
                              live memory ─┘

It completes what the policy sees, times each decision, has the training part of the plan carried
out, and learns from what iterations and quanta took. Owned by the engine; event loop only.
"""

from __future__ import annotations

import asyncio
import logging
import math
from typing import TYPE_CHECKING, NamedTuple

from ...policy.costs import IterationShape
from ...policy.packing import pages_to_start
from ...policy.types import IterationPlan, Observation
from ..errors import is_out_of_memory
from .desk import BusyClock, TrainingDesk
from .memory_watch import TrainerMemory
from .statistics import ScheduleStatistics
from .timeline import IterationRecord, JobRecord, QuantumRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from ...policy import Budgets, Policy, RunningView, WaitingView
    from ...policy.costs import CostModel, Costs
    from ...streams.lane import Lane
    from ..step import SequenceStep
    from ..training.safepoints import Safepoints
    from .desk import JobOutcome, QuantumOutcome
    from .memory_watch import MemoryWatch
    from .timeline import Timeline

log = logging.getLogger(__name__)

MEMORY_WAIT_S = 0.1
"""While nothing can run for want of memory, it is read again this often."""
REVIEW_INTERVAL_S = 0.5
"""So often it is asked whether trainers should give their memory up, or may come back."""
STARVED_S = 2.0
"""A decision that left requests waiting for memory stands for this long, unless another follows."""
AHEAD_TOLERANCE = 0.1
"""A decision made ahead is dropped where it comes too late by this share of the TBT target, or
this share of τ_mem has gone meanwhile."""
OVERHEAD_RATE = 0.05
"""How fast the time that planning and committing take is learned: a share per iteration."""
OVERHEAD_MOST = 4.0
"""What took more than so many times the usual was an accident, and counts as that."""
OVERHEAD_LEAST_S = 0.002
"""Less than this never is."""


class Decision(NamedTuple):
    """A plan, and what it was made of."""

    plan: IterationPlan
    observation: Observation
    began_s: float
    """When observing began; earlier than `observation.now_s` where it was decided ahead."""
    seconds: float
    """What observing and deciding took."""
    changes: int
    """The scheduler's count of changes on the training side, then."""
    is_ahead: bool
    """Whether it was made before its time, while the iteration before ran."""

    @property
    def lets_train(self) -> bool:
        """Whether training runs beside the iteration."""
        seen, training = self.observation.training, self.plan.training
        was_running = seen is not None and seen.running is not None
        return not training.hold and (was_running or training.start is not None)


class Scheduler:
    """Asks the policy, and knows what everything costs.

    Args:
        name: the policy's, for reports.
        policy: decides.
        budgets: what an iteration may hold.
        costs: learned from each iteration and quantum.
        timeline: where they are written down.
        memory: live memory; None where it is not watched.
        clock: seconds, monotonic.

    Attributes:
        trainer_memory: asks trainers for what they hold while memory is short.
    """

    def __init__(
        self,
        name: str,
        policy: Policy,
        budgets: Budgets,
        *,
        costs: CostModel,
        timeline: Timeline,
        memory: MemoryWatch | None,
        clock: Callable[[], float],
    ) -> None:
        self.budgets = budgets
        self.timeline = timeline
        self._name = name
        self._policy = policy
        self._costs = costs
        self._memory = memory
        self._clock = clock
        self.trainer_memory = TrainerMemory(clock, timeline.mark)
        self._starved_s = -math.inf  # when a decision left requests waiting for memory
        self._desk: TrainingDesk | None = None
        self._wake: Callable[[], None] = lambda: None
        self._serving = BusyClock(clock())
        self._serving_before_s = 0.0  # when the quantum on the lane began
        self._training_before_s = 0.0  # when the iteration under way began
        self._changes = 0  # of what the desk offers
        self._decision: Decision | None = None  # on the iteration under way
        self._adopted_s = 0.0
        self._shape = IterationShape()
        self._predicted_s: float | None = None
        self._started: str | None = None
        self._is_paused = False  # serving, for training; it may be decided again and again
        self._handed_s = 0.0
        self._overhead_s = 0.0
        self._is_stale = False
        self._is_delayed = False
        self._iterations = 0

    # -- composition -----------------------------------------------------------------------------

    def wake_with(self, wake: Callable[[], None]) -> None:
        """From now on call `wake` when there is something new to plan for."""
        self._wake = wake

    def open_training(self, lane: Lane, safepoints: Safepoints) -> TrainingDesk:
        """The desk at which learners offer quanta from now on."""
        self._desk = TrainingDesk(lane, safepoints, self, self._clock)
        return self._desk

    def close_training(self) -> None:
        """No quantum is started any more."""
        self._desk = None

    @property
    def policy(self) -> Policy:
        """What decides."""
        return self._policy

    @property
    def costs(self) -> Costs:
        """What work costs, as learned so far."""
        return self._costs.costs

    # -- decisions -------------------------------------------------------------------------------

    @property
    def has_training(self) -> bool:
        """Whether there is anything to decide although no sequence is there."""
        return self._desk is not None and self._desk.has_work

    @property
    def could_train(self) -> bool:
        """Whether a quantum is offered, and the lane is free."""
        return self._desk is not None and self._desk.has_work and not self._desk.is_busy

    @property
    def lacks_memory(self) -> bool:
        """Whether sequences may have to wait for memory that others hold."""
        return self._memory is not None and self._memory.is_short

    def watch_memory(self, running: int) -> None:
        """Read live memory if it is time, while so many sequences run.

        To be called before the pages that are available are counted: it changes their number.
        """
        if self._memory is not None:
            self._memory.update(self._clock(), running)

    async def look_after_trainers(self) -> None:
        """Until cancelled: let trainers give way while memory is short, and come back after."""
        while True:
            await asyncio.sleep(REVIEW_INTERVAL_S)
            self.review_memory()

    def review_memory(self) -> None:
        """One look at whether memory is short, for as long as the trainers are concerned."""
        watch, desk = self._memory, self._desk
        if watch is None or desk is None:
            return
        now_s = self._clock()
        self.trainer_memory.review(
            now_s,
            threshold=watch.look(now_s),
            is_serving_short=now_s - self._starved_s <= STARVED_S,
            needs=desk.memory_needs(watch.training_token),
            quiet_s=desk.quiet_s(now_s),
        )

    def decide(
        self,
        running: tuple[RunningView, ...],
        waiting: tuple[WaitingView, ...],
        *,
        available_pages: int,
        adapters_in_use: frozenset[Hashable],
        free_adapter_slots: int,
        began_s: float,
        ahead_s: float | None = None,
    ) -> Decision:
        """What the policy decides on this. Nothing is carried out yet.

        Args:
            running, waiting: in order of rank.
            available_pages, adapters_in_use, free_adapter_slots: see `Observation`.
            began_s: when looking at all this began.
            ahead_s: how far in the future this is expected to be so, in seconds (None: it is so).
        """
        now_s = began_s + (ahead_s or 0.0)
        desk = self._desk
        costs = self._costs.costs if self._costs.is_known else None
        observation = Observation(
            now_s,
            self.budgets,
            available_pages,
            running,
            waiting,
            adapters_in_use,
            free_adapter_slots,
            desk.view(began_s) if desk is not None else None,
            costs and costs._replace(base_s=costs.base_s + self._overhead_s),
            self._memory.view() if self._memory is not None else None,
        )
        plan = self._policy.plan(observation)
        seconds = self._clock() - began_s
        return Decision(plan, observation, began_s, seconds, self._changes, ahead_s is not None)

    def still_holds(self, decision: Decision) -> bool:
        """Whether a decision made ahead is of now: not much later, training is as it was, and there
        is not much less memory; see `watch_memory`.

        Earlier is fine: there is more time than it was made for.
        """
        seen = decision.observation
        late_s = self._clock() - seen.now_s
        tbt_s = self.budgets.tbt_s
        allowed_s = AHEAD_TOLERANCE * tbt_s if tbt_s < math.inf else math.inf
        is_shorter = False
        if self._memory is not None and seen.memory is not None:
            before = seen.memory.threshold
            is_shorter = before - self._memory.threshold > AHEAD_TOLERANCE * max(0, before)
        return decision.changes == self._changes and late_s <= allowed_s and not is_shorter

    def adopt(self, decision: Decision) -> IterationPlan:
        """This is what happens next."""
        self._decision = decision
        self._adopted_s = self._clock() if decision.is_ahead else decision.began_s
        # Memory is why only where it keeps pages back.
        is_starved = self.lacks_memory and _is_starving(decision)
        self._starved_s = self._adopted_s if is_starved else -math.inf
        return decision.plan

    @property
    def remaining_s(self) -> float | None:
        """How long the iteration under way is expected to take from now; None: not known."""
        if self._predicted_s is None:
            return None
        return max(0.0, self._handed_s + self._predicted_s + self._overhead_s - self._clock())

    def start_training(self, plan: IterationPlan, *, has_steps: bool) -> bool:
        """Carry out the training part of a plan; whether a quantum is on the lane now.

        A quantum is held only beside an iteration: for `has_steps` False it goes on.
        """
        self._started = None
        desk = self._desk
        if desk is None:
            return False
        training = plan.training
        if training.hold and not has_steps:
            training = training._replace(hold=False)
        self._started = desk.carry_out(training)
        is_pause = plan.is_pause and desk.is_busy
        if is_pause and not self._is_paused:
            self.timeline.pause()
        self._is_paused = is_pause
        return desk.is_busy

    def start_early(self, decision: Decision) -> None:
        """Start the quantum that a decision ahead begins with, if the lane is free already.

        Not beside an iteration that was to run without training.
        """
        desk, under_way = self._desk, self._decision
        if (
            desk is not None
            and not desk.is_busy
            and under_way is not None
            and under_way.lets_train
            and not decision.plan.training.hold
            and (started := desk.carry_out(decision.plan.training)) is not None
        ):
            self._started = started
            self._changes += 1

    # -- iterations ------------------------------------------------------------------------------

    def begin_iteration(self, steps: Sequence[SequenceStep], *, is_delayed: bool = False) -> None:
        """These steps are handed to the lane now.

        Args:
            steps: of the iteration.
            is_delayed: whether it had to wait for something rare, such as an adapter's weights.
        """
        now_s = self._handed_s = self._clock()
        self._is_delayed = is_delayed
        self._serving.switch(now_s, is_on=True)
        self._shape = shape_of(steps)
        desk = self._desk
        self._predicted_s = None
        if self._costs.is_known:
            self._predicted_s = self._costs.costs.iteration_s(
                self._shape, beside_training=desk is not None and desk.is_active
            )
        self._training_before_s = desk.active_s(now_s) if desk is not None else 0.0

    def end_iteration(self, returned_s: float, error: Exception | None = None) -> None:
        """The iteration came back at `returned_s`, and was committed or has failed since."""
        now_s = self._clock()
        self._serving.switch(returned_s, is_on=False)
        seconds = returned_s - self._handed_s
        desk, decision, shape = self._desk, self._decision, self._shape
        assert decision is not None
        observed, plan = decision.observation, decision.plan
        active_s = desk.active_s(returned_s) - self._training_before_s if desk is not None else 0.0
        beside = min(1.0, max(0.0, active_s / seconds)) if seconds > 0.0 else 0.0
        margin = self._costs.costs.margin
        if error is not None:
            if is_out_of_memory(error):
                self._note_out_of_memory(
                    returned_s, f"iteration, {shape.decodes + shape.prefill_tokens} rows"
                )
        else:
            self._costs.observe_iteration(shape, seconds, beside_training=beside)
            overhead_s = (self._handed_s - self._adopted_s) + (now_s - returned_s)
            if not self._is_delayed:
                if self._overhead_s:
                    most_s = max(OVERHEAD_LEAST_S, OVERHEAD_MOST * self._overhead_s)
                    overhead_s = min(overhead_s, most_s)
                self._overhead_s += OVERHEAD_RATE * (overhead_s - self._overhead_s)
            if self._costs.is_stale != self._is_stale:
                self._note_staleness()
        self._iterations += 1
        due_s = min((view.due_s for view in observed.running), default=math.inf)
        self.timeline.add_iteration(
            IterationRecord(
                index=self._iterations,
                started_s=self._handed_s,
                ended_s=returned_s,
                plan_s=decision.seconds,
                decodes=shape.decodes,
                prefill_tokens=shape.prefill_tokens,
                admissions=len(plan.admissions),
                preemptions=len(plan.preemptions),
                context_tokens=shape.decode_context,
                predicted_s=self._predicted_s,
                margin=margin,
                slack_s=due_s - self._handed_s,
                budget_tokens=self.budgets.tokens,
                started_quantum=self._started,
                is_holding=desk is not None and desk.is_held,
                beside_training=beside,
                memory_threshold=observed.memory.threshold if observed.memory else None,
                running=len(observed.running),
                waiting=len(observed.waiting),
                planned_s=decision.began_s,
                error=None if error is None else f"{type(error).__name__}: {error}",
            )
        )

    def _note_staleness(self) -> None:
        """Say that the profile does not hold here, or does again."""
        self._is_stale = self._costs.is_stale
        if self._is_stale:
            log.warning(
                "iterations take %.2g times what the profile says: the device is shared, throttled "
                "or another one; predictions follow what is measured (`cotune profile --fresh` "
                "measures anew)",
                self._costs.report().slowdown,
            )
            self.timeline.mark("stale profile")
        else:
            log.info("iterations take what the profile says again")

    # -- training, told by the desk --------------------------------------------------------------

    def on_training_change(self) -> None:
        """There is something new to plan for."""
        self._changes += 1
        self._wake()

    def on_quantum_start(self) -> None:
        """A quantum is about to run: from here on is what runs beside it."""
        self._serving_before_s = self._serving.total_s(self._clock())

    def on_quantum(self, outcome: QuantumOutcome) -> None:
        """Learn from a quantum that has ended, and write it down."""
        now_s = self._clock()
        span_s = outcome.ended_s - outcome.started_s
        costs = self._costs.costs
        predicted_s = costs.quantum_s(outcome.kind, outcome.tokens)
        if span_s > 0.0:
            serving_s = self._serving.total_s(now_s) - self._serving_before_s
            # While it is held, an iteration runs beside it; then it does not run.
            ran_s = span_s - outcome.held_s
            beside_s = min(max(0.0, serving_s - outcome.held_s), ran_s)
            beside = beside_s / ran_s if ran_s > 0.0 else 0.0
            predicted_s *= 1.0 + beside * (costs.quantum_interference - 1.0)
            if outcome.error is None and not outcome.out_of_memories:
                self._costs.observe_quantum(
                    outcome.kind, outcome.tokens, span_s - outcome.held_s, beside_serving=beside
                )
        if outcome.out_of_memories:
            self._note_out_of_memory(now_s, f"{outcome.kind}, {outcome.tokens} rows")
        self.timeline.add_quantum(
            QuantumRecord(
                adapter=outcome.adapter,
                kind=outcome.kind,
                tokens=outcome.tokens,
                samples=outcome.samples,
                started_s=outcome.started_s,
                ended_s=outcome.ended_s,
                held_s=outcome.held_s,
                predicted_s=predicted_s,
                halvings=outcome.out_of_memories,
                error=outcome.error,
            )
        )

    def on_job(self, outcome: JobOutcome) -> None:
        """Write down other work on the training lane; nothing is learned from it."""
        if outcome.is_out_of_memory:
            self._note_out_of_memory(outcome.ended_s, f"training: {outcome.kind}")
        self.timeline.add_job(
            JobRecord(
                adapter=outcome.adapter,
                kind=outcome.kind,
                started_s=outcome.started_s,
                ended_s=outcome.ended_s,
                error=outcome.error,
            )
        )

    def _note_out_of_memory(self, now_s: float, what: str) -> None:
        self.timeline.mark("out of memory", what)
        if self._memory is not None:
            self._memory.out_of_memory(now_s)

    # -- evidence --------------------------------------------------------------------------------

    def statistics(self) -> ScheduleStatistics:
        """A snapshot."""
        report, memory, desk = self._costs.report(), self._memory, self._desk
        return self.timeline.statistics(
            ScheduleStatistics(
                policy=self._name,
                training_share=desk.view(self._clock()).share if desk is not None else 0.0,
                memory_threshold=memory.threshold if memory is not None else None,
                near_misses=memory.near_misses if memory is not None else 0,
                out_of_memories=memory.out_of_memories if memory is not None else 0,
                interference=report.interference,
                is_profile_stale=report.is_stale,
            )
        )


def _is_starving(decision: Decision) -> bool:
    """Whether there were too few pages: a request gave way, or the first that waits stays out."""
    seen, plan = decision.observation, decision.plan
    if plan.preemptions:
        return True
    if plan.admissions or len(seen.running) >= seen.budgets.sequences:
        return False
    first = next((view for view in seen.waiting if not view.is_background), None)
    return first is not None and (
        pages_to_start(first, seen.budgets.page_size) > seen.available_pages
    )


def shape_of(steps: Sequence[SequenceStep]) -> IterationShape:
    """What decides how long these steps take."""
    decodes = decode_context = tokens = attention = chunks = 0
    for step in steps:
        count, context = len(step.token_ids), step.start
        if count == 1:
            decodes += 1
            decode_context += context + 1
        else:
            chunks += 1
            tokens += count
            attention += count * context + count * (count + 1) // 2
    return IterationShape(decodes, decode_context, tokens, attention, chunks)
