"""The timeline: what each iteration and each quantum was meant to be, and what it was.

    add_iteration, add_quantum, add_job, mark ──► ring buffers ──► snapshot ─► chrome_trace, to_dict
                                           └────► sums since the start ─► statistics

Times are those of the engine's clock, in seconds. For one thread: the event loop's. To add costs a
few microseconds; whatever takes longer happens when somebody asks.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import Counter, deque
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from .statistics import DECISION_BUCKETS_S, ScheduleStatistics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

RECENT: Final = 256
"""Iterations that the recent numbers of `Timeline.statistics` are about."""


class IterationRecord(NamedTuple):
    """One iteration, as planned and as measured."""

    index: int  # type: ignore[assignment]  # nobody looks for a value in a record
    """Counts up by one; a gap shows that some were lost."""
    started_s: float
    """When it was handed to the inference lane."""
    ended_s: float
    """When its result was there."""
    plan_s: float
    """What observing and deciding took."""
    decodes: int
    """Sequences that got one token."""
    prefill_tokens: int
    """Prompt tokens that were computed."""
    admissions: int
    """Sequences that began."""
    preemptions: int
    """Sequences that gave their pages up."""
    context_tokens: int
    """KV entries that the decodes read."""
    predicted_s: float | None
    """What it was expected to take; None where nothing was known."""
    margin: float
    """`predicted_s` times this was to hold nearly always."""
    slack_s: float
    """When it started: the time until the next token was due. Below 0: too late; infinite: none."""
    budget_tokens: int
    """Most tokens that it could have held."""
    started_quantum: str | None
    """The kind of quantum that began with it, if one did."""
    is_holding: bool
    """Whether the training lane was told to wait meanwhile."""
    beside_training: float
    """Share of it during which a quantum ran unheld, in [0, 1]."""
    memory_threshold: int | None
    """τ_mem in bytes when it was planned; None where memory is not watched."""
    running: int = 0
    """Sequences that held pages."""
    waiting: int = 0
    """Sequences in the queue."""
    planned_s: float | None = None
    """When planning began; None: `plan_s` before it started."""
    error: str | None = None
    """Why it failed, if it did."""

    @property
    def seconds(self) -> float:
        """What it took."""
        return self.ended_s - self.started_s

    @property
    def tokens(self) -> int:
        """What it held."""
        return self.decodes + self.prefill_tokens


class QuantumRecord(NamedTuple):
    """One quantum of training, as expected and as measured."""

    adapter: str
    """Whose it is."""
    kind: str
    """A `cotune.policy.QuantumKind`."""
    tokens: int
    """Rows that it computed."""
    samples: int
    """Samples that they belong to."""
    started_s: float
    """When it was handed to the training lane."""
    ended_s: float
    """When it was over."""
    held_s: float
    """For how long it waited at safepoints."""
    predicted_s: float | None
    """What it was expected to take, unheld; None where nothing was known."""
    halvings: int
    """Times that it was cut in two for lack of memory."""
    error: str | None
    """Why it failed, if it did."""

    @property
    def seconds(self) -> float:
        """What it took without the time held."""
        return max(self.ended_s - self.started_s - self.held_s, 0.0)


class JobRecord(NamedTuple):
    """Work of a learner on the training lane that is no quantum: a checkpoint, a version's files.

    Nothing is predicted of it, it cannot be told to wait, and no plan starts it.
    """

    adapter: str
    """Whose it is."""
    kind: str
    """A stable word: "begin", "checkpoint", "snapshot", "version"."""
    started_s: float
    """When it was handed to the training lane."""
    ended_s: float
    """When it was over."""
    error: str | None = None
    """Why it failed, if it did."""

    @property
    def seconds(self) -> float:
        """What it took."""
        return self.ended_s - self.started_s


class Mark(NamedTuple):
    """Something that happened at one moment: a publication, out of memory, a near miss, a pause, a
    trainer set down or taken up."""

    at_s: float
    name: str
    """A stable word."""
    detail: str
    """The same for people; may be empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineSnapshot:
    """What the timeline remembers, oldest first.

    Attributes:
        now_s: when it was taken, on the same clock.
        iterations: in order of their end, as are `quanta`.
        quanta: those that have ended.
        jobs: the same, of the training lane's other work.
        marks: in order.
    """

    now_s: float
    iterations: tuple[IterationRecord, ...] = ()
    quanta: tuple[QuantumRecord, ...] = ()
    jobs: tuple[JobRecord, ...] = ()
    marks: tuple[Mark, ...] = ()

    @property
    def starts_s(self) -> float:
        """The first moment that anything in it tells of; `now_s` where it is empty."""
        moments = [_planning_began_s(it) for it in self.iterations[:1]]
        moments += [quantum.started_s for quantum in self.quanta]
        moments += [job.started_s for job in self.jobs[:1]]
        moments += [mark.at_s for mark in self.marks[:1]]
        return min(moments, default=self.now_s)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: records are objects, and an infinite slack is null."""
        return {
            "now_s": self.now_s,
            "iterations": [_plain(record) for record in self.iterations],
            "quanta": [_plain(record) for record in self.quanta],
            "jobs": [_plain(record) for record in self.jobs],
            "marks": [_plain(record) for record in self.marks],
        }

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> TimelineSnapshot:
        """The inverse of `to_dict`; fields that are not known here are left out.

        One of before there were jobs has none.

        Raises:
            ValueError: `body` is no such thing; says what is wrong.
        """
        try:
            return cls(
                now_s=float(body["now_s"]),
                iterations=tuple(
                    _record(IterationRecord, {**row, "slack_s": _slack(row["slack_s"])})
                    for row in body["iterations"]
                ),
                quanta=tuple(_record(QuantumRecord, row) for row in body["quanta"]),
                jobs=tuple(_record(JobRecord, row) for row in body.get("jobs", ())),
                marks=tuple(_record(Mark, row) for row in body["marks"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"these are no records of a timeline ({type(error).__name__}: {error}); "
                "ask for them with format=records"
            ) from error


class Timeline:
    """The ring buffers and the sums.

    Args:
        capacity: most iterations, quanta, jobs and marks that are remembered, each.
        clock: seconds, monotonic: the one that the records' times are of.
    """

    def __init__(
        self, capacity: int = 4096, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}; use 1 or more")
        self._clock = clock
        self._iterations: deque[IterationRecord] = deque(maxlen=capacity)
        self._quanta: deque[QuantumRecord] = deque(maxlen=capacity)
        self._jobs: deque[JobRecord] = deque(maxlen=capacity)
        self._marks: deque[Mark] = deque(maxlen=capacity)
        self._decisions = 0
        self._decision_s = 0.0
        self._decision_counts = [0] * (len(DECISION_BUCKETS_S) + 1)
        self._iteration_s = 0.0
        self._tokens = 0
        self._budget_tokens = 0
        self._predicted = 0
        self._late = 0
        self._holds = 0
        self._pauses = 0
        self._ended: Counter[str] = Counter()
        self._quantum_s: dict[str, float] = {}
        self._rows = 0
        self._failed_quanta = 0
        self._halvings = 0
        self._held_s = 0.0
        self._done: Counter[str] = Counter()
        self._job_s: dict[str, float] = {}

    def add_iteration(self, record: IterationRecord) -> None:
        """An iteration has ended."""
        self._iterations.append(record)
        self._decisions += 1
        self._decision_s += record.plan_s
        self._decision_counts[bisect_left(DECISION_BUCKETS_S, record.plan_s)] += 1
        self._iteration_s += record.ended_s - record.started_s
        self._tokens += record.decodes + record.prefill_tokens
        self._budget_tokens += record.budget_tokens
        self._predicted += record.predicted_s is not None
        self._late += record.slack_s < 0.0
        self._holds += record.is_holding

    def add_quantum(self, record: QuantumRecord) -> None:
        """A quantum has ended, for whatever reason."""
        self._quanta.append(record)
        kind = record.kind
        self._ended[kind] += 1
        self._quantum_s[kind] = self._quantum_s.get(kind, 0.0) + record.seconds
        self._rows += record.tokens
        self._halvings += record.halvings
        self._held_s += record.held_s
        self._failed_quanta += record.error is not None

    def add_job(self, record: JobRecord) -> None:
        """Other work on the training lane has ended, for whatever reason."""
        self._jobs.append(record)
        self._done[record.kind] += 1
        self._job_s[record.kind] = self._job_s.get(record.kind, 0.0) + record.seconds

    def mark(self, name: str, detail: str = "") -> None:
        """Something happened now; `name` is a stable word such as "publication"."""
        self._marks.append(Mark(self._clock(), name, detail))

    def pause(self) -> None:
        """The iterations wait for training: a plan with `is_pause`."""
        self._pauses += 1
        self.mark("pause")

    def snapshot(self, last_s: float | None = None) -> TimelineSnapshot:
        """What is remembered, or of that what ended in the last seconds.

        Raises:
            ValueError: `last_s` is not a number of 0 or more.
        """
        now_s = self._clock()
        if last_s is None:
            since_s = -math.inf
        elif last_s >= 0.0:
            since_s = now_s - last_s
        else:
            raise ValueError(f"last_s is {last_s}; use 0 or more")
        return TimelineSnapshot(
            now_s=now_s,
            iterations=_tail(self._iterations, lambda record: record.ended_s >= since_s),
            quanta=_tail(self._quanta, lambda record: record.ended_s >= since_s),
            jobs=_tail(self._jobs, lambda record: record.ended_s >= since_s),
            marks=_tail(self._marks, lambda record: record.at_s >= since_s),
        )

    def statistics(self, known: ScheduleStatistics | None = None) -> ScheduleStatistics:
        """What was added up, put into `known`: what others know stays as it is given there.

        Those are `policy`, `training_share`, `memory_threshold`, `near_misses`, `out_of_memories`,
        `interference` and `is_profile_stale`.
        """
        recent = list(islice(reversed(self._iterations), RECENT))
        budget = sum(record.budget_tokens for record in recent)
        slacks = sorted(record.slack_s for record in recent)
        timed = [
            (record.predicted_s, record.seconds)
            for record in recent
            if record.predicted_s is not None and record.seconds > 0.0 and record.error is None
        ]
        errors = sorted(abs(expected_s - seconds) / seconds for expected_s, seconds in timed)
        measured_s = sum(seconds for _, seconds in timed)
        return replace(
            ScheduleStatistics() if known is None else known,
            decisions=self._decisions,
            decision_s=self._decision_s,
            decision_counts=tuple(self._decision_counts),
            iteration_s=self._iteration_s,
            tokens=self._tokens,
            budget_tokens=self._budget_tokens,
            fill=sum(record.tokens for record in recent) / budget if budget else None,
            predicted=self._predicted,
            prediction_error_p50=_quantile(errors, 0.5),
            prediction_error_p95=_quantile(errors, 0.95),
            prediction_bias=(
                sum(expected_s for expected_s, _ in timed) / measured_s - 1.0 if timed else None
            ),
            slack_p5_s=_quantile(slacks, 0.05),
            late_iterations=self._late,
            pauses=self._pauses,
            quanta=dict(self._ended),
            quantum_s=dict(self._quantum_s),
            rows=self._rows,
            failed_quanta=self._failed_quanta,
            halvings=self._halvings,
            held_s=self._held_s,
            holds=self._holds,
            jobs=dict(self._done),
            job_s=dict(self._job_s),
        )


# -- as a trace ----------------------------------------------------------------------------------

_PROCESS: Final = 1
_SCHEDULER: Final = 1
_INFERENCE: Final = 2
_TRAINING: Final = 3
_ROWS: Final = {
    _SCHEDULER: "scheduler",
    _INFERENCE: "lane: inference",
    _TRAINING: "lane: training",
}


def chrome_trace(snapshot: TimelineSnapshot, epoch: float) -> dict[str, Any]:
    """The snapshot in the Chrome trace event format, which Perfetto opens (https://ui.perfetto.dev).

    A row each for the scheduler's decisions and marks, the inference lane and the training lane,
    whose quanta and jobs are slices of two categories; where a quantum was told to wait, a slice
    says so below it. Counters: tokens, sequences, slack,
    memory threshold and the share of training in each iteration. Times are in microseconds since
    the snapshot's first moment.

    Args:
        snapshot: what to show.
        epoch: the clock's zero, in seconds since 1970.
    """
    origin_s = snapshot.starts_s

    def at(seconds: float) -> float:
        return round((seconds - origin_s) * 1e6, 3)

    events: list[dict[str, Any]] = [_meta("process_name", 0, {"name": "cotune"})]
    for row, name in _ROWS.items():
        events += [
            _meta("thread_name", row, {"name": name}),
            _meta("thread_sort_index", row, {"sort_index": row}),
        ]
    for record in snapshot.iterations:
        events += _iteration_events(record, at)
    for quantum in snapshot.quanta:
        events.append(_quantum_event(quantum, at))
    for job in snapshot.jobs:
        events.append(_job_event(job, at))
    for begin_s, end_s in _waits(snapshot.iterations, snapshot.quanta):
        events.append(_slice("told to wait", "hold", _TRAINING, at(begin_s), at(end_s), {}))
    events += [_mark_event(mark, at(mark.at_s)) for mark in snapshot.marks]
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "producer": "cotune",
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(epoch + origin_s)),
            "began_unix_s": epoch + origin_s,
        },
    }


def _iteration_events(
    record: IterationRecord, at: Callable[[float], float]
) -> list[dict[str, Any]]:
    began_s = _planning_began_s(record)
    ts = at(record.started_s)
    name = ("failed " if record.error else "") + (
        "mixed"
        if record.decodes and record.prefill_tokens
        else "prefill"
        if record.prefill_tokens
        else "decode"
    )
    told: dict[str, Any] = {
        "iteration": record.index,
        "decodes": record.decodes,
        "prefill_tokens": record.prefill_tokens,
        "context_tokens": record.context_tokens,
        "measured_ms": _ms(record.seconds),
        "predicted_ms": _ms(record.predicted_s),
        "predicted_with_margin_ms": _ms(
            None if record.predicted_s is None else record.predicted_s * record.margin
        ),
        "beside_training": record.beside_training,
    }
    if record.error:
        told["error"] = record.error
    decided = {
        "iteration": record.index,
        "admissions": record.admissions,
        "preemptions": record.preemptions,
        "fill": record.tokens / record.budget_tokens if record.budget_tokens else None,
        "slack_ms": _ms(record.slack_s),
        "starts_quantum": record.started_quantum,
        "holds_training": record.is_holding,
    }
    events = [
        _slice("decide", "plan", _SCHEDULER, at(began_s), at(began_s + record.plan_s), decided),
        _slice(name, "iteration", _INFERENCE, ts, at(record.ended_s), told),
        _count("tokens", ts, decode=record.decodes, prefill=record.prefill_tokens),
        _count("sequences", ts, running=record.running, waiting=record.waiting),
        _count("share of training", ts, share=record.beside_training),
    ]
    if math.isfinite(record.slack_s):
        events.append(_count("slack (ms)", ts, slack=record.slack_s * 1e3))
    if record.memory_threshold is not None:
        events.append(
            _count("memory threshold (MiB)", ts, threshold=record.memory_threshold / 2**20)
        )
    return events


def _quantum_event(record: QuantumRecord, at: Callable[[float], float]) -> dict[str, Any]:
    told: dict[str, Any] = {
        "adapter": record.adapter,
        "rows": record.tokens,
        "samples": record.samples,
        "measured_ms": _ms(record.seconds),
        "predicted_ms": _ms(record.predicted_s),
        "held_ms": _ms(record.held_s),
        "halvings": record.halvings,
    }
    if record.error:
        told["error"] = record.error
    name = f"failed {record.kind}" if record.error else record.kind
    return _slice(name, "quantum", _TRAINING, at(record.started_s), at(record.ended_s), told)


def _job_event(record: JobRecord, at: Callable[[float], float]) -> dict[str, Any]:
    told: dict[str, Any] = {"adapter": record.adapter, "measured_ms": _ms(record.seconds)}
    if record.error:
        told["error"] = record.error
    name = f"failed {record.kind}" if record.error else record.kind
    return _slice(name, "job", _TRAINING, at(record.started_s), at(record.ended_s), told)


def _mark_event(mark: Mark, ts: float) -> dict[str, Any]:
    return {
        "name": mark.name, "cat": "mark", "ph": "i", "s": "p", "ts": ts,
        "pid": _PROCESS, "tid": _SCHEDULER, "args": {"detail": mark.detail},
    }  # fmt: skip


def _waits(
    iterations: Sequence[IterationRecord], quanta: Sequence[QuantumRecord]
) -> list[tuple[float, float]]:
    """When quanta were told to wait: from an iteration that holds to the next that does not."""
    spans: list[tuple[float, float]] = []
    began_s: float | None = None
    for record in iterations:
        if record.is_holding and began_s is None:
            began_s = record.started_s
        elif not record.is_holding and began_s is not None:
            spans.append((began_s, record.started_s))
            began_s = None
    if began_s is not None:
        spans.append((began_s, iterations[-1].ended_s))
    waits = []
    ahead = deque(spans)
    for quantum in quanta:  # the lane has one at a time, so they are in order
        while ahead and ahead[0][1] <= quantum.started_s:
            ahead.popleft()
        for begin_s, end_s in ahead:
            if begin_s >= quantum.ended_s:
                break
            waits.append((max(begin_s, quantum.started_s), min(end_s, quantum.ended_s)))
    return waits


def _planning_began_s(record: IterationRecord) -> float:
    return record.started_s - record.plan_s if record.planned_s is None else record.planned_s


def _slice(
    name: str, kind: str, row: int, begin_us: float, end_us: float, told: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": name, "cat": kind, "ph": "X", "ts": begin_us, "dur": max(end_us - begin_us, 0.0),
        "pid": _PROCESS, "tid": row, "args": told,
    }  # fmt: skip


def _count(name: str, ts: float, **values: float) -> dict[str, Any]:
    return {"name": name, "ph": "C", "ts": ts, "pid": _PROCESS, "args": values}


def _meta(name: str, row: int, told: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": _PROCESS, "tid": row, "args": told}


# -- small things --------------------------------------------------------------------------------

_T = TypeVar("_T")
_R = TypeVar("_R", IterationRecord, QuantumRecord, JobRecord, Mark)


def _tail(records: deque[_T], is_wanted: Callable[[_T], bool]) -> tuple[_T, ...]:
    """The last ones up to the first that is not wanted, in their order."""
    tail = list(takewhile(is_wanted, reversed(records)))
    tail.reverse()
    return tuple(tail)


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    """The value that this share of the ordered ones does not exceed; None where there are none."""
    if not ordered:
        return None
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None or not math.isfinite(seconds) else round(seconds * 1e3, 4)


def _slack(seconds: float | None) -> float:
    return math.inf if seconds is None else seconds


def _plain(record: IterationRecord | QuantumRecord | JobRecord | Mark) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record._asdict().items()
    }


def _record(kind: type[_R], row: Mapping[str, Any]) -> _R:
    names: Iterable[str] = kind._fields
    return kind(**{name: row[name] for name in names if name in row})
