"""Serving and training in virtual time: the engine's own policies, a cost model as the device.

    requests ─► queue ─► plan ─► iteration: costs.iteration_s ─┬─ tokens at its end ─► plan ...
                          │                                    │
    samples ─► batches ───┴────► quantum: costs.quantum_s ─────┘  beside it, each slowing the other

What decides about times is the real thing: the policy object, the page manager with its prefix trie
and the busy clock of the training lane. What takes time is what `Costs` says, and nothing sleeps.
It does what `runtime.engine` does: the order of the waiting and the running, what is looked up in
the cache and when, pages for every known token, who gives way, one iteration at a time.

A page's content is one number here: the path of segments that its last token ends, and its place.
The page manager, told that pages hold one token each, then shares exactly the pages that the
engine's would.

Where nothing waits and nothing can be trained, every policy plans the same iteration again until a
request ends, comes or needs a page that is not there: decodes are never displaced. Such a stretch
is run in one go, with the same sums in the same order; the results are bit for bit those of the
slow way.
"""

from __future__ import annotations

import math
import random
from array import array
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from ..cache.manager import KVCacheManager
from ..policy.costs import IterationShape, chunk_attention
from ..policy.types import (
    Observation,
    RunningQuantum,
    RunningView,
    TrainingOffer,
    TrainingView,
    WaitingView,
    rank_s,
)
from ..runtime.errors import CotuneError
from ..runtime.scheduling.desk import BusyClock
from .coserve_log import LoggedSample, LoggedTraining
from .traces import TraceRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ..cache.manager import SequencePages
    from ..policy.costs import Costs
    from ..policy.types import Budgets, IterationPlan, Policy, QuantumKind

BACKGROUND_PRIORITY: Final = 10
"""As the runtime's own work has."""
PROGRESS_ITERATIONS: Final = 500


class SimulationError(CotuneError):
    """A policy left everything waiting, or planned what cannot be."""


class LearningCosts(Protocol):
    """What a policy believes while it is learned: `cotune.policy.costs.CostModel`."""

    @property
    def costs(self) -> Costs:
        """As of now."""

    def observe_iteration(
        self, shape: IterationShape, seconds: float, *, beside_training: float
    ) -> None:
        """An iteration took so long."""

    def observe_quantum(
        self, kind: str, tokens: int, seconds: float, *, beside_serving: float
    ) -> None:
        """A quantum took so long."""


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


class _Sequence:
    """A request on its way."""

    __slots__ = (
        "cached_pages",
        "computed",
        "due_s",
        "generated",
        "hint_epoch",
        "is_started",
        "keys",
        "known",
        "last_s",
        "number",
        "outcome",
        "output",
        "pages",
        "prompt",
        "rank_s",
        "recorded",
        "request",
        "sample",
    )

    def __init__(
        self,
        number: int,
        request: TraceRequest,
        keys: list[int],
        due_s: float,
        sample: LoggedSample | None,
    ) -> None:
        self.number = number
        self.request = request
        self.outcome = Outcome(request)
        self.prompt = request.prompt_tokens
        self.output = request.output_tokens
        self.known = request.prompt_tokens
        self.computed = 0
        self.generated = 0
        self.keys = keys  # of its pages, those of tokens to come included; empty: nothing is shared
        priority = BACKGROUND_PRIORITY if request.is_background else 0
        self.rank_s = rank_s(priority, request.arrival_s, request.request_class)
        self.due_s = due_s
        self.last_s = request.arrival_s
        self.pages: SequencePages | None = None
        self.cached_pages = 0
        self.recorded = 0  # full pages that the trie was told of
        self.hint_epoch = -1
        self.is_started = False
        self.sample = sample


class Simulation:
    """One run of one policy. Make it, `run` it once.

    Args:
        requests: in order of arrival.
        policy: decides.
        costs: of the device.
        settings: everything else.
        samples: that become ready to train on, in order of arrival.
        beliefs: what the policy is told of costs, learned on the way; None: the truth.
        progress: is told the virtual time now and then.
    """

    def __init__(
        self,
        requests: Sequence[TraceRequest],
        policy: Policy,
        costs: Costs,
        settings: SimulationSettings,
        *,
        samples: Sequence[LoggedSample] = (),
        beliefs: LearningCosts | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        self._requests = requests
        self._policy = policy
        self._costs = costs
        self._settings = settings
        self._budgets = settings.budgets
        self._page_size = settings.budgets.page_size
        self._samples = samples
        self._beliefs = beliefs
        self._progress = progress
        self._random = random.Random(settings.seed)
        self._is_sharing = any(request.segments for request in requests)
        # A page holds one "token" here: the number that stands for its content.
        self._cache = KVCacheManager(settings.pages, 1, self._is_sharing)
        self._paths: dict[tuple[int, int], int] = {}
        self._next_path = 1
        self._longest = settings.pages * self._page_size

        self._now_s = 0.0
        self._next_request = 0
        self._next_sample = 0
        self._next_number = 0
        self._unfinished = sum(not request.is_background for request in requests)
        self._unstarted = 0
        self._sequences: dict[int, _Sequence] = {}
        self._waiting: list[_Sequence] = []
        self._views: list[WaitingView] = []
        self._running: list[_Sequence] = []
        self._hint_epoch = 0
        self._was_corrected = False  # since the plan: what it was made of was not true
        self._lane = (
            None
            if settings.training is None
            else _TrainingLane(settings.training, settings.loss, settings.signal)
        )

        self._outcomes: list[Outcome] = []
        self._iterations = 0
        self._plans = 0
        self._batch_tokens = 0
        self._decode_tokens = 0
        self._busy_s = 0.0
        self._preemptions = 0
        self._pauses = 0
        self._last_end_s = 0.0

    @property
    def now_s(self) -> float:
        """The virtual time."""
        return self._now_s

    # -- the loop --------------------------------------------------------------------------------

    def run(self) -> SimulationResult:
        """Run until every request has ended.

        Raises:
            SimulationError: the policy leaves somebody waiting for ever, or names unknown keys.
        """
        lane = self._lane
        while self._unfinished:
            self._take_arrivals()
            if not self._sequences and (lane is None or not lane.has_work):
                self._wait(None)
                continue
            if self._forward():
                continue
            self._plans += 1
            plan = self._policy.plan(self._observe())
            steps, shape = self._prepare(plan)
            self._carry_out_training(plan, has_steps=bool(steps))
            if steps:
                self._iterate(steps, shape)
            elif not self._sequences:
                self._wait(plan.training.again_s)
            elif plan.is_pause and lane is not None and lane.is_active:
                self._pauses += 1
                self._wait(plan.training.again_s)
            elif not (plan.preemptions or self._was_corrected):
                raise SimulationError(
                    f"at {self._now_s:.3f} s the policy plans nothing for {len(self._running)} "
                    f"running and {len(self._waiting)} waiting sequences; this is a fault of it"
                )
        return self._result()

    def _take_arrivals(self) -> None:
        """Queue what has come by now."""
        now_s = self._now_s
        requests = self._requests
        while (
            self._next_request < len(requests) and requests[self._next_request].arrival_s <= now_s
        ):
            self._submit(requests[self._next_request], None)
            self._next_request += 1
        lane = self._lane
        if lane is None:
            return
        samples = self._samples
        while self._next_sample < len(samples) and samples[self._next_sample].arrival_s <= now_s:
            sample = samples[self._next_sample]
            self._next_sample += 1
            if self._settings.references and sample.tokens <= self._longest:
                self._submit(_reference(sample), sample)
            else:
                lane.add_sample(sample.tokens, max(sample.arrival_s, 0.0))
        lane.refresh(now_s)

    def _submit(self, request: TraceRequest, sample: LoggedSample | None) -> None:
        """Take a request, or refuse it."""
        total = request.prompt_tokens + request.output_tokens
        refusal = None
        if total > self._longest:
            refusal = "too_long"
        elif self._unstarted >= self._settings.max_queue and not request.is_background:
            refusal = "queue_full"
        if refusal is not None:
            outcome = Outcome(request, refusal=refusal)
            if not request.is_background:
                self._outcomes.append(outcome)
                self._unfinished -= 1
            return
        is_awaited = not request.is_background and request.request_class == "interactive"
        due_s = request.arrival_s + self._budgets.ttft_s if is_awaited else math.inf
        keys = self._page_keys(request, total) if self._is_sharing else []
        seq = _Sequence(self._next_number, request, keys, due_s, sample)
        self._next_number += 1
        if not request.is_background:
            self._outcomes.append(seq.outcome)
            self._unstarted += 1
        self._sequences[seq.number] = seq
        self._enqueue(seq)

    def _page_keys(self, request: TraceRequest, tokens: int) -> list[int]:
        """A number for the content of each page: equal where two sequences agree so far."""
        size = self._page_size
        keys: list[int] = []
        path = 0
        for segment in request.segments:
            step = (path, segment.key)
            found = self._paths.get(step)
            if found is None:
                found = self._paths[step] = self._next_path
                self._next_path += 1
            path = found
            keys.extend(
                path << 24 | page for page in range(len(keys), min(segment.end, tokens) // size)
            )
        own = self._next_path
        self._next_path += 1
        keys.extend(own << 24 | page for page in range(len(keys), -(-tokens // size)))
        return keys

    # -- observing -------------------------------------------------------------------------------

    def _observe(self) -> Observation:
        """What the engine would show the policy."""
        self._refresh_hints()
        views = [
            RunningView(
                seq.number,
                seq.computed,
                seq.known,
                len(seq.pages.block_table),  # type: ignore[union-attr]
                len(seq.pages.block_table) - seq.cached_pages,  # type: ignore[union-attr]
                seq.request.is_background,
                seq.due_s,
                seq.rank_s,
            )
            for seq in self._running
        ]
        lane = self._lane
        costs = self._costs if self._beliefs is None else self._beliefs.costs
        if self._settings.overhead_s:
            costs = costs._replace(base_s=costs.base_s + self._settings.overhead_s)
        return Observation(
            self._now_s,
            self._budgets,
            self._cache.available_pages,
            tuple(views),
            tuple(self._views),
            training=None if lane is None else lane.view(self._now_s),
            costs=costs,
        )

    def _refresh_hints(self) -> None:
        """Look up what those next in line would find cached, or would if they waited a little."""
        if not self._is_sharing or not self._waiting:
            return
        budgets = self._budgets
        seats = min(budgets.sequences, budgets.tokens) - len(self._running)
        tokens = budgets.tokens - len(self._running)
        prefilling = [seq for seq in self._running if seq.computed < seq.prompt and seq.keys]
        for index, seq in enumerate(self._waiting):
            if seats <= 0 or tokens <= 0:
                break
            self._look_up(index, seq, prefilling)
            view = self._views[index]
            if not view.coming:
                tokens -= view.known - view.cached
                seats -= 1

    def _look_up(self, index: int, seq: _Sequence, prefilling: Iterable[_Sequence]) -> None:
        """Bring the view of one that waits up to date."""
        if not seq.keys:
            return
        view, size = self._views[index], self._page_size
        cached, idle_pages = view.cached, view.idle_pages
        now = self._hint_epoch + self._cache.turnover
        if seq.hint_epoch != now:
            seq.hint_epoch = now
            found = self._cache.look_up(0, seq.keys[: -(-seq.known // size)])
            cached, idle_pages = size * found.tokens, found.idle_pages
        coming = max((self._common_tokens(seq, other) for other in prefilling), default=0)
        if coming <= cached:
            coming = 0
        if (cached, idle_pages, coming) != (view.cached, view.idle_pages, view.coming):
            self._views[index] = view._replace(cached=cached, idle_pages=idle_pages, coming=coming)

    def _common_tokens(self, seq: _Sequence, other: _Sequence) -> int:
        """Tokens in full pages that `seq` could find once `other` has computed its prompt."""
        pages = min((seq.known - 1) // self._page_size, other.prompt // self._page_size)
        mine, theirs = seq.keys, other.keys
        if not pages or mine[0] != theirs[0]:
            return 0
        # Keys stand for whole prefixes: equal ones come first, so the border can be bisected.
        low, high = 1, pages
        while low < high:
            middle = (low + high + 1) // 2
            if mine[middle - 1] == theirs[middle - 1]:
                low = middle
            else:
                high = middle - 1
        return low * self._page_size

    # -- carrying out ----------------------------------------------------------------------------

    def _prepare(self, plan: IterationPlan) -> tuple[list[tuple[_Sequence, int]], IterationShape]:
        """Pages and places for what was planned; who takes part with how many tokens."""
        sequences = self._sequences
        self._was_corrected = False
        for key in plan.preemptions:
            self._preempt(self._known(key))
        steps: list[tuple[_Sequence, int]] = []
        size = self._page_size
        reserve = self._cache.reserve
        context = 0
        for key in plan.decodes:
            seq = sequences[key]
            pages = seq.pages
            assert pages is not None
            if reserve(pages, -(-seq.known // size)):
                context += seq.known
                steps.append((seq, 1))
        decodes = len(steps)
        for chunk in plan.prefills:
            seq = self._known(chunk.key)
            pages = seq.pages
            assert pages is not None
            if reserve(pages, -(-seq.known // size)):
                steps.append((seq, min(chunk.tokens, seq.known - seq.computed)))
        for chunk in plan.admissions:
            seq = self._known(chunk.key)
            if self._start(seq):
                steps.append((seq, min(chunk.tokens, seq.known - seq.computed)))
        chunks = prefill = attention = 0
        for seq, tokens in steps[decodes:]:
            if tokens == 1:  # to the device it is as a decode is
                decodes += 1
                context += seq.computed + 1
            else:
                chunks += 1
                prefill += tokens
                attention += chunk_attention(tokens, seq.computed)
        return steps, IterationShape(decodes, context, prefill, attention, chunks)

    def _known(self, key: int) -> _Sequence:
        try:
            return self._sequences[key]
        except KeyError:
            raise SimulationError(
                f"the policy planned for sequence {key}, which is not there; this is a fault of it"
            ) from None

    def _start(self, seq: _Sequence) -> bool:
        """Give a waiting sequence pages for all tokens it knows."""
        size = self._page_size
        needed = -(-seq.known // size)
        place = bisect_left(self._views, (seq.rank_s, seq.number), key=_order)
        assert self._waiting[place] is seq
        pages = self._cache.open(0, seq.keys[:needed])
        if not self._cache.reserve(pages, needed):
            self._cache.close(pages)
            before = self._views[place]
            seq.hint_epoch = -1
            self._look_up(place, seq, ())
            self._was_corrected |= self._views[place] != before
            return False
        del self._waiting[place], self._views[place]
        insort(self._running, seq, key=_running_order)
        seq.pages = pages
        given = seq.request.cached_tokens
        if given is None:
            seq.cached_pages = pages.cached_tokens
            seq.computed = pages.cached_tokens * size
        else:  # its pages are its own here, though their content was found
            seq.cached_pages = 0
            seq.computed = min(given, seq.known - 1)
        seq.recorded = seq.cached_pages
        if not seq.is_started:
            seq.is_started = True
            seq.outcome.cached_tokens = seq.computed
            self._unstarted -= not seq.request.is_background
        return True

    def _enqueue(self, seq: _Sequence) -> None:
        cached = 0
        if seq.request.cached_tokens is not None:
            cached = min(seq.request.cached_tokens, seq.known - 1)
        view = WaitingView(
            seq.number,
            seq.rank_s,
            seq.known,
            cached,
            None,
            seq.request.is_background,
            seq.due_s,
            0,
            seq.request.arrival_s,
            cached // self._page_size,  # not read by anybody, for here it gets pages of its own
        )
        seq.hint_epoch = -1
        place = bisect_left(self._views, _order(view), key=_order)
        self._waiting.insert(place, seq)
        self._views.insert(place, view)

    def _preempt(self, seq: _Sequence) -> None:
        self._preemptions += 1
        self._release(seq)
        seq.computed = 0
        self._enqueue(seq)

    def _release(self, seq: _Sequence) -> None:
        assert seq.pages is not None
        self._running.remove(seq)
        self._cache.close(seq.pages)
        seq.pages = None

    def _carry_out_training(self, plan: IterationPlan, *, has_steps: bool) -> None:
        """A quantum is held only beside an iteration, as the engine has it."""
        if self._lane is not None:
            self._lane.carry_out(
                plan.training.start,
                plan.training.max_tokens,
                plan.training.hold and has_steps,
                self._now_s,
                self._costs,
                self._slowdown(),
            )

    # -- time ------------------------------------------------------------------------------------

    def _slowdown(self) -> float:
        """How much slower than `costs` the device is now."""
        factor = 1.0
        for start_s, by in self._settings.slowdowns:
            if self._now_s >= start_s:
                factor = by
        return factor

    def _work_s(self, shape: IterationShape) -> float:
        """What an iteration takes alone."""
        seconds = self._costs.iteration_s(shape)
        if self._settings.noise:
            deviation = self._settings.noise
            seconds *= self._random.lognormvariate(-deviation * deviation / 2.0, deviation)
        return seconds * self._slowdown()

    def _iterate(self, steps: list[tuple[_Sequence, int]], shape: IterationShape) -> None:
        """Run an iteration, with what is on the training lane beside it."""
        started_s = self._now_s
        work_s = self._work_s(shape)
        lane = self._lane
        beside = 0.0
        if lane is None or not lane.is_active:
            self._now_s += work_s
        else:
            alone_s = self._costs.iteration_s(shape)
            slower = 1.0
            if alone_s > 0.0:
                slower = self._costs.iteration_s(shape, beside_training=True) / alone_s
            ends_s = started_s + work_s * slower
            quantum_ends_s = started_s + lane.left_s(self._costs, beside_serving=True)
            if quantum_ends_s > ends_s:
                lane.advance(ends_s - started_s, self._costs, beside_serving=True)
                self._now_s = ends_s
                beside = 1.0
            else:
                # The quantum ends within the iteration, the rest of which is undisturbed. The
                # next one can start with the next plan.
                shared_s = quantum_ends_s - started_s
                self._end_quantum(quantum_ends_s, shared_s)
                self._now_s = quantum_ends_s + (work_s - shared_s / slower)
                beside = shared_s / (self._now_s - started_s) if self._now_s > started_s else 1.0
        if self._beliefs is not None:
            seconds = self._now_s - started_s
            self._beliefs.observe_iteration(shape, seconds, beside_training=beside)
        self._iterations += 1
        self._busy_s += self._now_s - started_s
        self._batch_tokens += shape.decodes + shape.prefill_tokens
        self._decode_tokens += shape.decodes
        self._commit(steps)
        self._pass_overhead()
        if self._progress is not None and not self._iterations % PROGRESS_ITERATIONS:
            self._progress(self._now_s)

    def _pass_overhead(self) -> None:
        """What the event loop does between two iterations; the training lane goes on."""
        overhead_s = self._settings.overhead_s
        if overhead_s:
            self._pass(self._now_s + overhead_s)

    def _pass(self, until_s: float) -> None:
        """Let time pass in which nothing is on the inference lane."""
        lane = self._lane
        if lane is not None and lane.is_active:
            ends_s = self._now_s + lane.left_s(self._costs, beside_serving=False)
            if ends_s <= until_s:
                self._end_quantum(ends_s, 0.0)
            else:
                lane.advance(until_s - self._now_s, self._costs, beside_serving=False)
        self._now_s = until_s

    def _end_quantum(self, now_s: float, shared_s: float) -> None:
        """What is on the training lane ends, after so long beside serving at the last."""
        lane = self._lane
        assert lane is not None
        ended = lane.finish(now_s, shared_s)
        if self._beliefs is not None:
            self._beliefs.observe_quantum(
                ended.kind, ended.tokens, ended.seconds, beside_serving=ended.beside_serving
            )

    def _wait(self, again_s: float | None) -> None:
        """Until there is something to plan for, or so many seconds have passed."""
        lane = self._lane
        until_s = self._next_event_s()
        if lane is not None and lane.is_active:
            until_s = min(until_s, self._now_s + lane.left_s(self._costs, beside_serving=False))
        if again_s is not None:
            until_s = min(until_s, self._now_s + again_s)
        assert until_s < math.inf, "requests are missing, so one will come"
        self._pass(max(until_s, self._now_s))

    def _next_event_s(self) -> float:
        """When the next request or sample comes, or a batch has waited long enough."""
        event_s = math.inf
        if self._next_request < len(self._requests):
            event_s = self._requests[self._next_request].arrival_s
        lane = self._lane
        if lane is not None:
            if self._next_sample < len(self._samples):
                event_s = min(event_s, self._samples[self._next_sample].arrival_s)
            event_s = min(event_s, lane.ready_s)
        return event_s

    def _forward(self) -> bool:
        """Run a stretch of equal iterations in one go. False: there is none, or a short one."""
        settings = self._settings
        running = self._running
        if (
            not settings.fast_forward
            or self._waiting
            or not running
            or self._beliefs is not None
            or (self._lane is not None and self._lane.has_work)
        ):
            return False
        count = 1 << 30
        context = 0
        for seq in running:
            if seq.known - seq.computed != 1 or seq.output == 0:
                return False
            context += seq.known
            left = seq.output - seq.generated
            if left < count:
                count = left
        while count > 1 and not self._can_grow(count):
            count //= 2
        if count < 2:
            return False
        next_event_s = self._next_event_s()
        decodes = len(running)
        overhead_s = settings.overhead_s
        ends_s: list[float] = []
        now_s = self._now_s
        for _ in range(count):
            started_s = now_s
            self._now_s = now_s
            now_s += self._work_s(IterationShape(decodes, context, 0, 0, 0))
            ends_s.append(now_s)
            self._busy_s += now_s - started_s
            context += decodes
            if overhead_s:
                now_s += overhead_s
            if now_s >= next_event_s:
                break
        self._now_s = ends_s[-1]
        count = len(ends_s)
        self._iterations += count
        self._batch_tokens += count * decodes
        self._decode_tokens += count * decodes
        size = self._page_size
        gaps = array("d", [after - before for before, after in zip(ends_s, ends_s[1:])])  # noqa: B905, RUF007 - hot
        for seq in running:
            assert seq.pages is not None
            has_room = self._cache.reserve(seq.pages, -(-(seq.known + count - 1) // size))
            assert has_room
            if count > 1:
                self._take_token(seq, ends_s[0])
                seq.outcome.gaps_s.extend(gaps[:-1])
                seq.generated += count - 2
                seq.known += count - 2
                seq.computed += count - 1
                seq.last_s = ends_s[-2]
        self._commit([(seq, 1) for seq in running])
        self._now_s = now_s
        if self._progress is not None:
            self._progress(now_s)
        return True

    def _can_grow(self, iterations: int) -> bool:
        """Whether there are pages for that many more iterations of everyone.

        Where prefixes are shared, pages that are free: which cached ones would be evicted depends
        on what is recorded meanwhile.
        """
        size = self._page_size
        pages = 0
        for seq in self._running:
            assert seq.pages is not None
            needed = -(-(seq.known + iterations - 1) // size) - len(seq.pages.block_table)
            pages += max(0, needed)
        if self._is_sharing:
            return pages <= self._cache.statistics().free_pages
        return pages <= self._cache.available_pages

    # -- committing ------------------------------------------------------------------------------

    def _take_token(self, seq: _Sequence, now_s: float) -> None:
        """A sampled token of `seq`."""
        outcome = seq.outcome
        if seq.generated:
            outcome.gaps_s.append(now_s - seq.last_s)
        else:
            outcome.ttft_s = now_s - seq.request.arrival_s
        seq.generated += 1
        seq.known += 1
        seq.last_s = now_s

    def _commit(self, steps: list[tuple[_Sequence, int]]) -> None:
        """The iteration has ended: tokens are known, full pages can be shared, some have ended."""
        now_s = self._now_s
        tbt_s = self._budgets.tbt_s
        size = self._page_size
        is_sharing = self._is_sharing
        for seq, tokens in steps:
            before = seq.computed
            computed = seq.computed = before + tokens
            if is_sharing and computed // size > seq.recorded:
                seq.recorded = computed // size
                assert seq.pages is not None
                self._cache.record(seq.pages, seq.keys, seq.recorded)
            if before < seq.prompt <= computed:
                self._hint_epoch += 1
            if computed < seq.known:
                continue
            if seq.output:
                # `_take_token`, written out: this is where the time goes.
                if seq.generated:
                    seq.outcome.gaps_s.append(now_s - seq.last_s)
                else:
                    seq.outcome.ttft_s = now_s - seq.request.arrival_s
                seq.generated += 1
                seq.known += 1
                seq.last_s = now_s
                if seq.due_s != math.inf:
                    seq.due_s = now_s + tbt_s
            if seq.generated >= seq.output:
                self._finish(seq)

    def _finish(self, seq: _Sequence) -> None:
        self._release(seq)
        del self._sequences[seq.number]
        seq.outcome.ended_s = self._now_s
        if seq.sample is not None:
            assert self._lane is not None
            self._lane.add_sample(seq.sample.tokens, self._now_s)
        if not seq.request.is_background:
            self._unfinished -= 1
            self._last_end_s = self._now_s

    def _result(self) -> SimulationResult:
        if not self._sequences:
            self._check_pages()
        cache = self._cache.statistics()
        lane = self._lane
        end_s = max(self._last_end_s, self._now_s)
        return SimulationResult(
            outcomes=tuple(self._outcomes),
            duration_s=self._last_end_s,
            iterations=self._iterations,
            plans=self._plans,
            batch_tokens=self._batch_tokens,
            decode_tokens=self._decode_tokens,
            busy_s=self._busy_s,
            preemptions=self._preemptions,
            evicted_pages=cache.evicted_pages,
            hit_tokens=cache.hit_tokens * self._page_size,
            steps=lane.steps if lane else 0,
            trained_tokens=lane.trained_tokens if lane else 0,
            trained_samples=lane.trained_samples if lane else 0,
            quanta=lane.quanta if lane else 0,
            training_s=lane.active.total_s(end_s) if lane else 0.0,
            training_alone_s=lane.alone_s if lane else 0.0,
            held_s=lane.held_s(end_s) if lane else 0.0,
            arrived_samples=len(self._samples) if lane else 0,
            arrived_tokens=sum(sample.tokens for sample in self._samples) if lane else 0,
            pauses=self._pauses,
        )

    def _check_pages(self) -> None:
        """Every page must have come back."""
        owned = self._cache.statistics().owned_pages
        if owned:
            raise SimulationError(
                f"{owned} KV pages are still owned after the last request; please report this"
            )


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


# -- the training lane ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Ended:
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


class _TrainingLane:
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
        self,
        start: int | None,
        max_tokens: int,
        hold: bool,
        now_s: float,
        costs: Costs,
        slowdown: float,
    ) -> None:
        """Do what a plan says."""
        if start is not None and self._on_lane is None:
            offer = self._offer
            if offer is None or offer.key != start:
                raise SimulationError(
                    f"the policy started offer {start}, which is not there; this is a fault of it"
                )
            samples = self._take(max_tokens or self._training.quantum_tokens, offer.kind)
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

    def finish(self, now_s: float, shared_s: float) -> _Ended:
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
        return _Ended(
            on_lane.kind,
            on_lane.tokens,
            seconds,
            min(1.0, shared_s / seconds) if seconds > 0.0 else 0.0,
        )


# -- helpers -------------------------------------------------------------------------------------


def _reference(sample: LoggedSample) -> TraceRequest:
    """The base model's pass over a sample."""
    return TraceRequest(
        arrival_s=sample.arrival_s,
        prompt_tokens=sample.tokens,
        output_tokens=0,
        request_class="batch",
        is_background=True,
    )


def _order(view: WaitingView) -> tuple[float, int]:
    return (view.rank_s, view.key)


def _running_order(seq: _Sequence) -> tuple[float, int]:
    return (seq.rank_s, seq.number)
