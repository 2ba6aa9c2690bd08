"""One run of one policy: a runtime of its own, its requests, its feedback, and what came of them.

    load begins                 window                           drained
    ├─── warm-up ───────────────├────────────────────────────────┤╌╌╌╌╌╌╌╌┤
      requests, feedback          requests and feedback, measured   what is left ends

Before the load begins the learner has been given a first burst of feedback and has trained on it,
so that nothing is built or imported while anything is measured. A request counts from when it was
due, not from when the loop came to send it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import math
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from ..runtime.errors import CotuneError, OverloadedError
from ..runtime.scheduling.statistics import ScheduleStatistics
from .coserve_log import LoggedRequest, LoggedSample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from ..runtime.config import RuntimeConfig
    from ..runtime.runtime import Runtime
    from ..runtime.scheduling.timeline import IterationRecord, Mark, QuantumRecord
    from ..runtime.statistics import RuntimeStatistics
    from .coserve_load import Arrival, Feedback, Pair

Ending: TypeAlias = Literal["done", "refused", "failed", "unfinished"]

OBSERVE_S: Final = 0.02
"""How often a learner is looked at while something is awaited of it."""
QUIET: Final = 10
"""Looks in a row at which an engine must have had nothing to do."""
TAP_S: Final = 1.0
"""How often the timeline is read: it forgets."""
SETUP_S: Final = 60.0
"""Longest wait for the first training of a run."""
DRAIN_S: Final = 10.0
"""What has not ended so long after the window is given up."""
DECODES: Final = 32
"""Requests of the decode iteration that a calibration measures."""
NEVER_TRAINS: Final = ("inference-only",)


class CoserveError(CotuneError):
    """The benchmark cannot go on: the runtime does not do what it should."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What a run is to be.

    Attributes:
        label: what is varied, for people: "50 %", "inflow".
        policy: as ``--policy`` takes it.
        rate: share of tasks that are to be training.
        round: which one; the load is that of the round.
        arrivals: in order of time.
        bursts_s: when feedback is given; each time `burst` pairs.
        feedback: a primer and `burst` pairs for each burst, those before the load included.
        burst: pairs of a burst; the batch size of training.
        epochs: visits of each pair.
        warmup_s, seconds: when the window begins, and how long it is.
        models: whom a burst is for, one after the other; None: the served model.
        backlog: bursts that are given at once when the load begins, on top.
    """

    label: str
    policy: str
    rate: float
    round: int
    arrivals: tuple[Arrival, ...]
    bursts_s: tuple[float, ...]
    feedback: Feedback
    burst: int
    epochs: int
    warmup_s: float
    seconds: float
    models: tuple[str | None, ...] = (None,)
    backlog: int = 0

    @property
    def total_s(self) -> float:
        """From the beginning of the load to the end of the window."""
        return self.warmup_s + self.seconds

    @property
    def bursts(self) -> int:
        """All, those before the load included."""
        return len(self.models) + self.backlog + len(self.bursts_s)

    def model_of(self, burst: int) -> str | None:
        """Whom a burst is for: those before the load and those of it go round the models."""
        before = len(self.models)
        return self.models[burst if burst < before else (burst - before) % before]

    def pairs_of(self, burst: int) -> tuple[Pair, ...]:
        """The pairs of a burst; the first ones are those before the load, one per model."""
        return self.feedback.pairs[burst * self.burst : (burst + 1) * self.burst]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request, as it went. Times count from the beginning of the load, in seconds."""

    request: LoggedRequest
    ending: Ending
    is_extra: bool
    ended_s: float

    @property
    def first_s(self) -> float:
        """Time to first token; where there was none, for how long it was waited for."""
        if self.request.ttft_s is None:
            return self.ended_s - self.request.arrival_s
        return self.request.ttft_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What the runtime did within a span of time; seconds and counts.

    Attributes:
        wall_s: the span.
        device_s, plan_s, commit_s: of the iterations; see `RuntimeStatistics`.
        decision_s: observing and deciding alone.
        iterations, preemptions, prompt_tokens, generated_tokens: counts.
        steps, trained_tokens: of training, by adapter summed.
        quanta: that ended, by kind.
        held_s: for how long quanta waited at safepoints.
    """

    wall_s: float
    device_s: float
    plan_s: float
    commit_s: float
    decision_s: float
    iterations: int
    preemptions: int
    prompt_tokens: int
    generated_tokens: int
    steps: int
    trained_tokens: int
    quanta: dict[str, int]
    held_s: float

    @property
    def busy(self) -> float:
        """Share of the span in which the inference lane had an iteration."""
        return self.device_s / self.wall_s

    @property
    def planning(self) -> float | None:
        """Share of the iterations that was planning and preparing; None without iterations."""
        whole_s = self.plan_s + self.device_s + self.commit_s
        return self.plan_s / whole_s if whole_s else None

    @property
    def deciding(self) -> float | None:
        """Share of the iterations that was the decision itself."""
        whole_s = self.plan_s + self.device_s + self.commit_s
        return self.decision_s / whole_s if whole_s else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What came of a run.

    Attributes:
        plan: what it was to be.
        outcomes: of all requests, in order of arrival.
        usage: of the window.
        samples: feedback that could be trained on, with the time it was given.
        asked_tokens, asked_visits: what training would do if it kept up, of the bursts in the
            window.
        trained_tokens: of the whole load, until its last request had ended.
        costs: what the cost model had learned at the end.
        iterations, quanta, marks: the timeline; times count from the beginning of the load.
        steps_by_adapter: times at which optimizer steps were seen to have ended, by adapter.
        chosen: what the runtime chose at start.
        schedule: its statistics of scheduling at the end of the window.
        settings: of its policy.
        setup_s: what starting and the first training took.
    """

    plan: RunPlan
    outcomes: tuple[Outcome, ...]
    usage: Usage
    samples: tuple[LoggedSample, ...]
    asked_tokens: int
    asked_visits: int
    trained_tokens: int = 0
    costs: dict[str, Any] = field(default_factory=dict)
    iterations: tuple[IterationRecord, ...] = ()
    quanta: tuple[QuantumRecord, ...] = ()
    marks: tuple[Mark, ...] = ()
    steps_by_adapter: dict[str, list[float]] = field(default_factory=dict)
    chosen: dict[str, Any] = field(default_factory=dict)
    schedule: ScheduleStatistics = field(default_factory=ScheduleStatistics)
    settings: dict[str, Any] = field(default_factory=dict)
    setup_s: float = 0.0

    @property
    def measured(self) -> tuple[Outcome, ...]:
        """The ordinary requests that came within the window."""
        start_s, end_s = self.plan.warmup_s, self.plan.total_s
        return tuple(
            outcome
            for outcome in self.outcomes
            if not outcome.is_extra and start_s <= outcome.request.arrival_s < end_s
        )


@contextlib.contextmanager
def state_in(config: RuntimeConfig) -> Iterator[RuntimeConfig]:
    """`config` with learning on, its state in a directory that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="cotune-bench-") as directory:
        learning = replace(config.learning, enabled=True, state_dir=Path(directory))
        yield replace(config, learning=learning)


async def perform(
    config: RuntimeConfig, plan: RunPlan, clock: Callable[[], float] = time.monotonic
) -> RunResult:
    """Start a runtime, put the load on it, and tell what came of it."""
    from ..runtime.runtime import Runtime

    gc.collect()  # the runtime before
    began_s = clock()
    with state_in(config) as config:
        async with Runtime(config=config) as runtime:
            run = _Run(runtime, plan, clock)
            await run.set_up()
            setup_s = clock() - began_s
            await run.load()
            return run.result(setup_s)


async def train_alone(
    config: RuntimeConfig, plan: RunPlan, clock: Callable[[], float] = time.monotonic
) -> float:
    """Training with nothing beside it and more to train on than it can, in rows per second.

    Args:
        config: of the runtime.
        plan: without arrivals; its backlog is what there is.
        clock: seconds, monotonic.
    """
    from ..runtime.runtime import Runtime

    gc.collect()
    with state_in(config) as config:
        async with Runtime(config=config) as runtime:
            run = _Run(runtime, plan, clock)
            await run.set_up()
            return await run.train_backlog()


class _Run:
    """One run on one runtime."""

    def __init__(self, runtime: Runtime, plan: RunPlan, clock: Callable[[], float]) -> None:
        self._runtime = runtime
        self._plan = plan
        self._clock = clock
        self._began_s = clock()
        self._outcomes: list[Outcome] = []
        self._samples: list[LoggedSample] = []
        self._bursts = 0
        self._quiet = 0
        self._tokens_before = 0
        self._tokens = 0
        self._usage: Usage | None = None
        self._schedule = ScheduleStatistics()
        self._tap = _TimelineTap(runtime)
        self._steps: dict[str, list[float]] = {}

    # -- before the load -------------------------------------------------------------------------

    async def set_up(self) -> None:
        """A first request, a first burst of feedback, and the training on it."""
        from ..runtime.types import SamplingParams

        params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        await self._runtime.complete([1, 2, 3], params, record=False)
        for _ in self._plan.models:
            await self._give_burst()
        if self._plan.policy not in NEVER_TRAINS:
            wanted = self._plan.epochs * len(self._plan.models)
            await self._wait_for(lambda: self._trained()[0] >= wanted, "trained for the first time")

    async def _wait_for(self, is_done: Callable[[], bool], what: str) -> None:
        until_s = self._clock() + SETUP_S
        while not is_done():
            if self._clock() > until_s:
                learning = self._runtime.learning()
                raise CoserveError(
                    f"with the policy {self._plan.policy} the learner had not {what} after "
                    f"{SETUP_S:g} s: {learning}"
                )
            await asyncio.sleep(OBSERVE_S)

    # -- the load --------------------------------------------------------------------------------

    async def load(self) -> None:
        """Requests and feedback, until all is answered or given up."""
        plan = self._plan
        self._began_s = self._clock()
        self._samples.clear()
        _, self._tokens_before = self._trained()
        async with asyncio.TaskGroup() as observers:
            tapping = observers.create_task(self._observe())
            # What is under way at the end of the time is noted as unfinished.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(plan.total_s + DRAIN_S), asyncio.TaskGroup() as group:
                    group.create_task(self._measure())
                    group.create_task(self._give_feedback())
                    for arrival in plan.arrivals:
                        await self._until(arrival.at_s)
                        group.create_task(self._ask(arrival))
            tapping.cancel()
        self._tap.take()
        self._tokens = self._trained()[1] - self._tokens_before

    async def _until(self, at_s: float) -> None:
        """Until so many seconds after the beginning of the load."""
        await asyncio.sleep(max(0.0, self._began_s + at_s - self._clock()))

    async def _ask(self, arrival: Arrival) -> None:
        """One request, and the time of each of its tokens."""
        from ..runtime.types import SamplingParams

        params = SamplingParams(max_tokens=arrival.answer_tokens, temperature=0.0, ignore_eos=True)
        times_s: list[float] = []
        ending: Ending = "unfinished"
        stream = self._runtime.complete(arrival.prompt, params, record=False)
        cached_tokens = 0
        try:
            async with stream:
                async for delta in stream:
                    now_s = self._clock() - self._began_s
                    times_s += [now_s] * len(delta.token_ids)
                cached_tokens = stream.usage.cached_tokens
            ending = "done"
        except OverloadedError:
            ending = "refused"
        except CotuneError:
            ending = "failed"
        finally:
            self._outcomes.append(
                Outcome(
                    logged_request(arrival, times_s, cached_tokens),
                    ending,
                    arrival.is_extra,
                    self._clock() - self._began_s,
                )
            )

    async def _measure(self) -> None:
        """What the runtime does within the window."""
        await self._until(self._plan.warmup_s)
        before = self._count()
        await self._until(self._plan.total_s)
        after = self._count()
        self._usage = usage_between(before, after)
        self._schedule = after.statistics.schedule

    async def _observe(self) -> None:
        """Read the timeline, and see optimizer steps end; until cancelled."""
        next_s = 0.0
        counts: Counter[str] = Counter()
        while True:
            now_s = self._clock()
            for adapter in self._runtime.learning().adapters:
                seen = self._steps.setdefault(adapter.adapter, [])
                new = adapter.steps - counts[adapter.adapter]
                if adapter.adapter in counts:
                    seen += [now_s - self._began_s] * new
                counts[adapter.adapter] = adapter.steps
            if now_s >= next_s:
                next_s = now_s + TAP_S
                self._tap.take()
            await asyncio.sleep(OBSERVE_S)

    # -- feedback --------------------------------------------------------------------------------

    async def _give_feedback(self) -> None:
        for _ in range(self._plan.backlog):
            await self._give_burst()
        for at_s in self._plan.bursts_s:
            await self._until(at_s)
            await self._give_burst(at_s)

    async def _give_burst(self, at_s: float = 0.0) -> None:
        """The next burst, due at `at_s`: a primer, behind which the pairs are stored together."""
        number, self._bursts = self._bursts, self._bursts + 1
        model, pairs = self._plan.model_of(number), self._plan.pairs_of(number)
        self._samples += [LoggedSample(arrival_s=at_s, tokens=pair.tokens) for pair in pairs]
        primer = self._plan.feedback.primers[number]
        async with asyncio.TaskGroup() as group:
            for place, pair in enumerate((primer, *pairs)):
                event = pair.event(f"burst {number}, {place}", model)
                group.create_task(self._give(event))

    async def _give(self, event: dict[str, Any]) -> None:
        await self._runtime.feedback(event, source="bench")

    async def train_backlog(self) -> float:
        """Give all feedback at once, and see how fast it is trained on once it can be: rows/s."""
        plan = self._plan
        last_step = self._trained()[0] + plan.epochs * plan.backlog
        await self._give_feedback()
        await self._wait_for(self._is_quiet, "computed what it compares with")
        began_s = self._clock()
        await self._wait_for(
            lambda: self._trained()[0] >= last_step or self._clock() >= began_s + plan.seconds,
            "trained on its backlog",
        )
        ended_s = self._clock()
        self._tap.take()
        return trained_rows(self._tap.quanta, began_s, ended_s) / (ended_s - began_s)

    def _is_quiet(self) -> bool:
        """Whether the engine had nothing to do when it was looked at, several times in a row."""
        statistics = self._runtime.statistics()
        self._quiet = 0 if statistics.running or statistics.waiting else self._quiet + 1
        return self._quiet >= QUIET

    # -- counting --------------------------------------------------------------------------------

    def _trained(self) -> tuple[int, int]:
        """Optimizer steps and tokens so far, of all adapters."""
        adapters = self._runtime.learning().adapters
        return sum(a.steps for a in adapters), sum(a.tokens_trained for a in adapters)

    def _count(self) -> _Count:
        return _Count(self._clock(), self._runtime.statistics(), *self._trained())

    def result(self, setup_s: float) -> RunResult:
        """What came of it."""
        plan = self._plan
        assert self._usage is not None, "the window is over"
        in_window = [s for s in self._samples if plan.warmup_s <= s.arrival_s < plan.total_s]
        offset_s = self._began_s
        return RunResult(
            plan=plan,
            outcomes=tuple(sorted(self._outcomes, key=lambda o: o.request.arrival_s)),
            usage=self._usage,
            samples=tuple(self._samples),
            asked_tokens=plan.epochs * sum(sample.tokens for sample in in_window),
            asked_visits=plan.epochs * len(in_window),
            trained_tokens=self._tokens,
            iterations=tuple(counted_from(record, offset_s) for record in self._tap.iterations),
            quanta=tuple(
                record._replace(
                    started_s=record.started_s - offset_s, ended_s=record.ended_s - offset_s
                )
                for record in self._tap.quanta
            ),
            marks=tuple(mark._replace(at_s=mark.at_s - offset_s) for mark in self._tap.marks),
            steps_by_adapter={name: times for name, times in self._steps.items() if times},
            costs=self._runtime.costs._asdict(),
            chosen=self._runtime.describe(),
            schedule=self._schedule,
            settings=asdict(self._runtime.config.schedule.settings),
            setup_s=setup_s,
        )


@dataclass(frozen=True, slots=True)
class _Count:
    """What a runtime has done by a moment."""

    at_s: float
    statistics: RuntimeStatistics
    steps: int
    trained_tokens: int


def counted_from(record: IterationRecord, moment_s: float) -> IterationRecord:
    """The same, its times counted from another moment."""
    planned_s = record.planned_s
    return record._replace(
        started_s=record.started_s - moment_s,
        ended_s=record.ended_s - moment_s,
        planned_s=None if planned_s is None else planned_s - moment_s,
    )


def usage_between(before: _Count, after: _Count) -> Usage:
    """What was done from one moment to the other."""
    old, new = before.statistics, after.statistics
    return Usage(
        wall_s=after.at_s - before.at_s,
        device_s=new.device_s - old.device_s,
        plan_s=new.plan_s - old.plan_s,
        commit_s=new.commit_s - old.commit_s,
        decision_s=new.schedule.decision_s - old.schedule.decision_s,
        iterations=new.iterations - old.iterations,
        preemptions=new.preemptions - old.preemptions,
        prompt_tokens=new.prompt_tokens - old.prompt_tokens,
        generated_tokens=new.generated_tokens - old.generated_tokens,
        steps=after.steps - before.steps,
        trained_tokens=after.trained_tokens - before.trained_tokens,
        quanta={
            kind: count - old.schedule.quanta.get(kind, 0)
            for kind, count in new.schedule.quanta.items()
        },
        held_s=new.schedule.held_s - old.schedule.held_s,
    )


def logged_request(arrival: Arrival, times_s: Sequence[float], cached_tokens: int) -> LoggedRequest:
    """A request, given when its tokens came, in seconds since the beginning of the load."""
    return LoggedRequest(
        arrival_s=arrival.at_s,
        prompt_tokens=len(arrival.prompt),
        cached_tokens=cached_tokens,
        output_tokens=len(times_s),
        ttft_s=times_s[0] - arrival.at_s if times_s else None,
        gaps_s=tuple(later - earlier for earlier, later in itertools.pairwise(times_s)),
    )


def trained_rows(quanta: Iterable[QuantumRecord], start_s: float, end_s: float) -> float:
    """Rows that were trained on between two moments.

    Each row is in a forward and in a backward quantum: it counts half in either. Of a quantum that
    was under way at one of the moments the part within counts, as if its rows were evenly spread.
    """
    rows = 0.0
    for record in quanta:
        if record.kind not in ("forward", "backward") or record.error is not None:
            continue
        within_s = min(record.ended_s, end_s) - max(record.started_s, start_s)
        if within_s > 0.0:
            rows += record.tokens / 2 * within_s / (record.ended_s - record.started_s)
    return rows


class _TimelineTap:
    """Everything that the timeline held while it was read; it forgets, this does not."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.iterations: list[IterationRecord] = []
        self.quanta: list[QuantumRecord] = []
        self.marks: list[Mark] = []

    def take(self) -> None:
        """Read what is new."""
        snapshot = self._runtime.timeline()
        last = self.iterations[-1].index if self.iterations else -1
        self.iterations += [record for record in snapshot.iterations if record.index > last]
        quantum_s = self.quanta[-1].ended_s if self.quanta else -math.inf
        self.quanta += [record for record in snapshot.quanta if record.ended_s > quantum_s]
        mark_s = self.marks[-1].at_s if self.marks else -math.inf
        self.marks += [mark for mark in snapshot.marks if mark.at_s > mark_s]


# -- calibration -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a runtime that only serves can do here.

    Attributes:
        ttft_s, tbt_s: medians of requests that are alone.
        decode_s: an iteration of `DECODES` requests without any prompt beside.
        iteration_s: one that is full of prompt tokens, at its quickest.
        requests_per_s: when all requests are there at once.
        context: of the model, in tokens.
        served_name: under which the model answers.
    """

    ttft_s: float
    tbt_s: float
    decode_s: float
    iteration_s: float
    requests_per_s: float
    context: int
    served_name: str

    @property
    def words(self) -> str:
        """For people."""
        return (
            f"alone TTFT {1e3 * self.ttft_s:.1f} ms and TBT {1e3 * self.tbt_s:.2f} ms; "
            f"{DECODES} at once {1e3 * self.decode_s:.1f} ms; an iteration full of prompts "
            f"{1e3 * self.iteration_s:.1f} ms; at most {self.requests_per_s:.1f} "
            "requests/s"
        )


async def calibrate(
    runtime: Runtime,
    requests: Sequence[Arrival],
    full_prompts: Sequence[Sequence[int]],
    clock: Callable[[], float] = time.monotonic,
) -> Calibration:
    """Ask one after the other, then at once.

    Args:
        runtime: that only serves.
        requests: one in five is asked alone, the others together.
        full_prompts: as long as an iteration can be, with nothing in common; the quickest counts.
        clock: seconds, monotonic.
    """

    async def ask(prompt: Sequence[int], tokens: int) -> tuple[float, tuple[float, ...]]:
        from ..runtime.types import SamplingParams

        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        began_s = clock()
        times_s: list[float] = []
        async with runtime.complete(prompt, params, record=False) as stream:
            async for delta in stream:
                times_s += [clock()] * len(delta.token_ids)
        gaps = tuple(later - earlier for earlier, later in itertools.pairwise(times_s))
        return times_s[0] - began_s, gaps

    await ask(requests[0].prompt, requests[0].answer_tokens)
    budget = max(len(prompt) for prompt in full_prompts)
    full_s = [(await ask(prompt, 1))[0] for prompt in full_prompts]
    async with asyncio.TaskGroup() as group:
        together = [
            group.create_task(ask(each.prompt[: budget // DECODES], 3 * DECODES))
            for each in requests[:DECODES]
        ]
    alone = [await ask(each.prompt, each.answer_tokens) for each in requests[1::5]]
    rest = [each for place, each in enumerate(requests) if place % 5 != 1]
    began_s = clock()
    async with asyncio.TaskGroup() as group:
        for each in rest:
            group.create_task(ask(each.prompt, each.answer_tokens))
    return Calibration(
        ttft_s=statistics.median(first_s for first_s, _ in alone),
        tbt_s=statistics.median(gap_s for _, gaps in alone for gap_s in gaps),
        decode_s=statistics.median(gap for task in together for gap in task.result()[1]),
        iteration_s=min(full_s),
        requests_per_s=len(rest) / (clock() - began_s),
        context=runtime.max_model_len,
        served_name=runtime.served_name,
    )
