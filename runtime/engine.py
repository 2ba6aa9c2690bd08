"""The engine: continuous batching, one iteration after the other.

    iteration   ──── observe, plan, prepare ─┬─ device: forward + sampling ─┬─ commit ── observe ...
    k                                        │                              │
    event loop                               ├─ deliver what k - 1 gave     │
                                             │  (text, stop strings, readers)
                                             └─ decide on k + 1 ────────────┘

The device waits only while the loop commits and prepares. What was decided meanwhile holds if the
iteration came as expected; where a sequence ended, a request came or training moved on, the policy
is asked again. Text is made and readers are woken after the next iteration was handed to the lane,
so a stop string is found one token late: that token is dropped, it is neither in the answer nor
counted.

Rules:

- Everything here runs on the event loop's thread and never blocks it; device work runs on the lane.
- `commit` and `prepare` are synchronous. Between two awaits of the lane, nothing is in flight.
- A prefix is recorded after it was computed. A step that raised is undone by not committing it: all
  requests in it fail with `IterationError`, their pages go back, and the next iteration serves the
  others. A single sequence that fails (its logits are not finite) fails its own request.
- Whoever leaves is marked at once; pages that are in flight are given back at the next commit.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from bisect import insort
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar, TypeVarTuple

from ..policy import RunningView
from .errors import (
    ContextLengthError,
    DrainingError,
    IterationError,
    OverloadedError,
    RequestError,
)
from .sampling import SamplingState
from .scheduling.scheduler import MEMORY_WAIT_S
from .sequence import Request, SequenceState, Status
from .statistics import Listeners, RuntimeStatistics
from .step import SequenceStep
from .waiting import MAX_PLANS, WaitingLine

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..cache.manager import KVCacheManager
    from ..policy import IterationPlan
    from .adapters import AdapterStore, SlotGrant
    from .answer_text import AnswerText
    from .errors import CotuneError
    from .lora import LoraWeights
    from .scheduling.scheduler import Decision, Scheduler
    from .step import SequenceResult, StepResult
    from .types import AdapterVersion, Response, SamplingParams

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

log = logging.getLogger(__name__)

MAX_RETRY_AFTER_S = 60.0
STOP_LIMIT_S = 60.0
"""How long a shutdown waits for the iteration in flight, once every request has been ended."""


class StepExecutor(Protocol):
    """What the engine needs of the executor. Its methods run on the lane's thread."""

    @property
    def num_pages(self) -> int:
        """KV pages there are."""

    @property
    def page_size(self) -> int:
        """Tokens per page."""

    def execute(self, steps: Sequence[SequenceStep], /) -> StepResult:
        """Run one iteration; results in the order of `steps`."""

    def install_adapter(self, slot: int, weights: LoraWeights, /) -> None:
        """Put an adapter's weights into a slot."""

    def clear_adapter(self, slot: int, /) -> None:
        """Make a slot act like the base model."""

    def describe(self) -> dict[str, str]:
        """What was chosen at start."""


class DeviceLane(Protocol):
    """Where device work runs; see `cotune.streams.lane.Lane`."""

    async def run(self, fn: Callable[[*Ts], T], /, *args: *Ts) -> T:
        """Run `fn` on the lane's thread; resolves when the device has finished."""


@dataclass(frozen=True, slots=True)
class _Iteration:
    """What is handed to the lane.

    Attributes:
        steps: the parts of the sequences.
        sequences: whose they are, in the same order.
        installs: slots that must be given these weights of this adapter version before.
    """

    steps: list[SequenceStep]
    sequences: list[SequenceState]
    installs: dict[int, tuple[AdapterVersion, LoraWeights]]


class Engine:
    """Owns the requests and the iteration.

    Args:
        executor: runs iterations.
        lane: the thread that `executor` belongs to.
        cache: the KV pages of `executor`.
        adapters: versions and slots.
        scheduler: decides what an iteration holds, and what trains beside it.
        max_model_len: most tokens of prompt plus answer; fewer where the pages do not hold as many,
            so that no sequence is taken that could never run.
        max_queue: most requests that wait; further ones are refused.
        make_text: makes the text side of an answer.
        eos_token_ids: the model's end-of-sequence tokens.
        listeners: are told what happens.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        executor: StepExecutor,
        lane: DeviceLane,
        cache: KVCacheManager,
        adapters: AdapterStore,
        scheduler: Scheduler,
        max_model_len: int,
        max_queue: int,
        make_text: Callable[[Sequence[int], SamplingParams], AnswerText],
        eos_token_ids: frozenset[int],
        listeners: Listeners,
        clock: Callable[[], float],
    ) -> None:
        self._executor = executor
        self._lane = lane
        self._cache = cache
        self._adapters = adapters
        self._scheduler = scheduler
        self._budgets = scheduler.budgets
        self.max_model_len = min(max_model_len, cache.num_pages * self._budgets.page_size)
        self._max_queue = max_queue
        self._make_text = make_text
        self._eos_token_ids = eos_token_ids
        self._listeners = listeners
        self._clock = clock

        self._keys = itertools.count()
        self._requests: dict[str, Request] = {}
        self._recorder: Callable[[object, Response, SamplingParams], None] | None = None
        self._sequences: dict[int, SequenceState] = {}  # waiting or running
        self._waiting = WaitingLine(cache, self._budgets)
        self._running: list[SequenceState] = []  # in order of rank
        self._held = 0
        self._fresh: list[SequenceState] = []  # have tokens or an end to deliver
        self._slot_users: Counter[AdapterVersion] = (
            Counter()
        )  # running sequences per adapter version
        self._unstarted = 0  # requests that were never scheduled

        self._wake = asyncio.Event()
        scheduler.wake_with(self._on_training_change)
        self._was_corrected = False  # since the plan: what it was made of was not true
        self._under_way: _Iteration | None = None
        self._ahead: Decision | None = None  # on the iteration after the one under way
        self._changes = 0  # of what a decision is made of, but for what an iteration does
        self._decided_at_change = 0
        self._patience_s: float | None = None  # how long to wait for news where there may be none
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_draining = False
        self._is_stopping = False
        self._finish_gaps: deque[float] = deque(maxlen=32)  # between answers, while it is busy
        self._paced_from_s = 0.0  # the last answer, or when it became busy

        self._preemptions = 0
        self._iterations = 0
        self._failed_iterations = 0
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._finished = 0
        self._rejected = 0
        self._device_s = 0.0
        self._forward_s = 0.0
        self._sample_s = 0.0
        self._plan_s = 0.0
        self._commit_s = 0.0
        self._deliver_s = 0.0

    # -- the front door --------------------------------------------------------------------------

    @property
    def is_accepting(self) -> bool:
        """Whether new requests are taken."""
        return not (self._is_draining or self._is_stopping)

    def limit_tokens(self, prompt_tokens: int, params: SamplingParams) -> int:
        """Most tokens that an answer to this prompt may have.

        Raises:
            ContextLengthError: the prompt, or it and `max_tokens`, exceed the context.
        """
        limit = self.max_model_len
        room = limit - prompt_tokens
        wanted = params.max_tokens
        if room < (1 if wanted is None else min(wanted, 1)):
            raise ContextLengthError(
                f"the prompt has {prompt_tokens} tokens, and the context length is {limit}; "
                "shorten the prompt or serve with a larger max_model_len",
                param="prompt",
                code="context_length_exceeded",
            )
        if wanted is None:
            return room
        if wanted > room:
            raise ContextLengthError(
                f"prompt {prompt_tokens} tokens + max_tokens {wanted} exceeds the context length "
                f"{limit}; shorten the prompt, lower max_tokens to {room} or serve with a larger "
                "max_model_len",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return wanted

    def record_with(
        self, recorder: Callable[[object, Response, SamplingParams], None] | None
    ) -> None:
        """From now on tell `recorder` of each finished answer whose request has a `record`.

        It is called on the event loop with that record, the answer and its parameters, and must be
        quick.
        """
        self._recorder = recorder

    def check_room(self, *, is_background: bool = False) -> None:
        """Raise `DrainingError` or `OverloadedError` where a request would be refused now."""
        if not self.is_accepting:
            raise DrainingError(
                "the runtime is shutting down and takes no new requests; use another one, or try "
                "again when it is back",
                retry_after_s=5.0,
                code="draining",
            )
        if self._unstarted >= self._max_queue and not is_background:
            raise OverloadedError(
                f"{self._unstarted} requests are waiting, as many as schedule.max_queue allows; "
                "try again later, or serve with a larger max_queue",
                retry_after_s=self._retry_after_s(),
                code="overloaded",
            )

    def submit(self, request: Request) -> None:
        """Take a request: from now on it is the engine's until it ends or is aborted.

        Raises:
            DrainingError, OverloadedError: see `check_room`.
            RequestError: a live request has this id.
        """
        self.check_room(is_background=request.is_background)
        if request.id in self._requests:
            raise RequestError(
                f"request_id {request.id!r} belongs to a request that is not finished; "
                "give each its own",
                param="request_id",
                code="duplicate_request_id",
            )
        params = request.params
        sequences = []
        for index in range(params.n):
            output: list[int] = []
            text = self._make_text(request.prompt, params)
            seq = SequenceState(next(self._keys), request, index, text, output)
            if request.max_tokens > 0:
                seq.sampling = SamplingState(
                    params, request.prompt, output, self._eos_token_ids, index, seed=request.seed
                )
            sequences.append(seq)
        self._adapters.pin(request.version)
        request.sequences = tuple(sequences)
        request.unfinished = len(sequences)
        if params.prompt_logprobs is not None:
            request.prompt_logprobs = [None] * len(request.prompt)
        self._requests[request.id] = request
        if self._idle.is_set():
            self._idle.clear()
            self._paced_from_s = self._clock()
        if not request.is_background:
            self._unstarted += 1
            self._prompt_tokens += len(request.prompt)
        self._held += len(sequences) - 1
        self._enqueue(sequences[0])
        self._wake.set()

    def abort(self, request: Request) -> None:
        """Nobody wants the rest of this request. Nothing happens if it has ended.

        Pages that are in flight are given back at the next commit, all others now.
        """
        if not request.is_done:
            for seq in request.sequences:
                if seq.status is not Status.FINISHED or not seq.is_published:
                    seq.abandon("abort")
                    self._end(seq)
            request.wake()
            self._note_idle()
            self._wake.set()

    async def drain(self, timeout_s: float) -> None:
        """Take no new requests, let those that are here finish, and fail the rest after a while.

        Those that are cut off end with `DrainingError`. Returns when no page is in use, or when the
        iteration in flight has not ended within `STOP_LIMIT_S`.
        """
        self._is_draining = True
        stopped = DrainingError("the runtime is shutting down", code="draining")
        for request in [known for known in self._requests.values() if known.is_background]:
            self._fail(request, stopped)
        self._note_idle()
        self._wake.set()
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            if self._requests:
                log.warning("%d requests did not finish in %.1f s", len(self._requests), timeout_s)
        finally:
            self.fail_all(
                DrainingError(
                    "the runtime shut down before the answer was complete; send the request again",
                    retry_after_s=5.0,
                    code="draining",
                )
            )
        try:
            async with asyncio.timeout(STOP_LIMIT_S):
                await self._idle.wait()
        except TimeoutError:
            log.error(
                "%d sequences did not let go within %.0f s: the device hangs, or the books are "
                "wrong; going on without them",
                len(self._sequences),
                STOP_LIMIT_S,
            )

    def fail_all(self, error: CotuneError) -> None:
        """End every request with `error`."""
        for request in list(self._requests.values()):
            self._fail(request, error)
        self._note_idle()
        self._wake.set()

    def stop(self) -> None:
        """Let `run` return after the iteration that is under way."""
        self._is_stopping = True
        self._wake.set()

    # -- the loop --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run iterations until `stop`. Cancelling it waits for the iteration in flight."""
        loop = asyncio.get_running_loop()
        clock = self._clock
        try:
            while not self._is_stopping:
                self._wake.clear()
                started_s = clock()
                iteration = self._next_iteration()
                if iteration is None:
                    self._deliver()
                    self._note_idle()
                    if not self._is_stopping:
                        await self._wait_for_news()
                    continue
                if self._fresh:
                    loop.call_soon(self._deliver)
                is_delayed = bool(iteration.installs)
                if is_delayed and not (iteration := await self._install(iteration)).steps:
                    continue
                handed_s = clock()
                self._scheduler.begin_iteration(iteration.steps, is_delayed=is_delayed)
                loop.call_soon(self._decide_ahead, iteration)
                self._under_way = iteration
                try:
                    result = await self._lane.run(self._executor.execute, iteration.steps)
                except Exception as error:  # noqa: BLE001 - boundary: a step fails its own requests
                    self._scheduler.end_iteration(clock(), error)
                    self._fail_iteration(iteration, error)
                    continue
                finally:
                    self._under_way = None
                returned_s = clock()
                self._commit(iteration, result, returned_s)
                self._scheduler.end_iteration(returned_s)
                self._plan_s += handed_s - started_s
                self._device_s += returned_s - handed_s
                self._commit_s += clock() - returned_s
        finally:
            self._is_stopping = True
            for seq in list(self._sequences.values()):
                seq.in_flight = False  # the lane has ended what it was doing
            self.fail_all(
                IterationError("the engine has stopped; start the runtime again", code="stopped")
            )
            for seq in list(self._running):
                self._retire(seq)
            self._note_idle()

    async def _wait_for_news(self) -> None:
        """Until there is something to plan for."""
        try:
            async with asyncio.timeout(self._patience_s):
                await self._wake.wait()
        except TimeoutError:
            return

    def _next_iteration(self) -> _Iteration | None:
        """Plan until there is something to run here; None when there is not.

        What the plan says of training is carried out in any case.
        """
        scheduler = self._scheduler
        self._patience_s = None
        while self._sequences or scheduler.has_training:
            decision = self._decide()
            plan = scheduler.adopt(decision)
            iteration = self._prepare(plan)
            is_training = scheduler.start_training(plan, has_steps=bool(iteration.steps))
            if iteration.steps:
                return iteration
            if plan.preemptions or decision.is_ahead or self._was_corrected:
                continue  # what it was made of is not so, or no longer
            if not self._sequences or is_training:  # a quantum that ends is news
                self._patience_s = plan.training.again_s
                return None
            if scheduler.lacks_memory:
                self._patience_s = MEMORY_WAIT_S
                return None
            log.error("a plan led to nothing: %s of %s", plan, decision.observation)
            self._give_up_on_one()
        return None

    def _decide(self) -> Decision:
        """What to do next: as was decided ahead, if all came as expected."""
        ahead, self._ahead = self._ahead, None
        self._scheduler.watch_memory(len(self._running))
        if (
            ahead is not None
            and self._decided_at_change == self._changes
            and self._scheduler.still_holds(ahead)
        ):
            return ahead
        return self._ask_scheduler({}, None)

    def _decide_ahead(self, iteration: _Iteration) -> None:
        """While an iteration runs, decide on the next; a quantum that it begins with starts now.

        If a sequence ends, or anything else happens meanwhile, the decision is dropped.
        """
        ahead_s = self._scheduler.remaining_s
        if ahead_s is None or self._under_way is not iteration:
            return
        steps: dict[int, SequenceStep] = {}
        for seq, step in zip(iteration.sequences, iteration.steps, strict=True):
            steps[seq.key] = step
            if _is_last(seq, step) and not self._scheduler.could_train:
                return
        self._ahead = self._ask_scheduler(steps, ahead_s)
        self._decided_at_change = self._changes
        self._scheduler.start_early(self._ahead)

    def _on_training_change(self) -> None:
        """A quantum is offered, or has ended: plan again, or ahead; the lane must not be idle."""
        self._wake.set()
        if self._under_way is not None and self._scheduler.could_train:
            asyncio.get_running_loop().call_soon(self._decide_ahead, self._under_way)

    def _ask_scheduler(self, steps: Mapping[int, SequenceStep], ahead_s: float | None) -> Decision:
        """Show the scheduler what there is, or will be when these steps are done, in `ahead_s`."""
        began_s = self._clock()
        self._scheduler.watch_memory(len(self._running))
        self._waiting.refresh(self._running)
        running = self._running_views(steps, began_s + (ahead_s or 0.0) + self._budgets.tbt_s)
        plans = 0
        while True:
            decision = self._scheduler.decide(
                running,
                self._waiting.views,
                available_pages=self._cache.available_pages,
                adapters_in_use=frozenset(self._slot_users),
                free_adapter_slots=self._adapters.max_slots - len(self._slot_users),
                began_s=began_s,
                ahead_s=ahead_s,
            )
            plans += 1
            chosen = [self._sequences[chunk.key] for chunk in decision.plan.admissions]
            if not self._waiting.check(chosen, self._running) or plans == MAX_PLANS:
                return decision

    def _running_views(
        self, steps: Mapping[int, SequenceStep], next_due_s: float
    ) -> tuple[RunningView, ...]:
        """What the policy sees of who runs, once these steps are done.

        Who gets a token by them has the next one due then; who gets the last one is not shown.
        """
        # Each lacks one page at most. Where there are fewer it matters exactly what one that leaves
        # would give back; to count that takes a look at each of its pages. Else a guess will do.
        is_tight = self._cache.available_pages < len(self._running)
        running = []
        for seq in self._running:
            pages = seq.pages
            assert pages is not None
            count = len(pages.block_table)
            request = seq.request
            computed, known = seq.computed, len(seq.tokens)
            due_s = seq.due_s(self._budgets)
            if (step := steps.get(seq.key)) is not None:
                if _is_last(seq, step):
                    continue
                computed += len(step.token_ids)
                if step.sampling is not None:
                    known += 1
                    due_s = next_due_s if request.has_targets else due_s
            running.append(
                RunningView(
                    seq.key,
                    computed,
                    known,
                    count,
                    self._cache.private_pages(pages)
                    if is_tight
                    else count - pages.cached_tokens // self._budgets.page_size,
                    request.is_background,
                    due_s,
                    request.rank_s,
                )
            )
        return tuple(running)

    def _prepare(self, plan: IterationPlan) -> _Iteration:
        """Carry out a plan up to the point where the lane takes over.

        A planned sequence for which there turn out to be no pages is left out this time.
        """
        self._was_corrected = False
        for key in plan.preemptions:
            self._preempt(self._sequences[key])
        sequences: list[SequenceState] = []
        steps: list[SequenceStep] = []
        chunked: list[SequenceState] = []
        chunks: list[SequenceStep] = []
        installs: dict[int, tuple[AdapterVersion, LoraWeights]] = {}

        def add(seq: SequenceState, tokens: int) -> None:
            step = self._step(seq, min(tokens, len(seq.tokens) - seq.computed))
            is_single = len(step.token_ids) == 1  # the executor wants these first
            (sequences if is_single else chunked).append(seq)
            (steps if is_single else chunks).append(step)
            seq.in_flight = True

        for key in plan.decodes:
            seq = self._sequences[key]
            if self._reserve(seq):
                add(seq, 1)
        for chunk in plan.prefills:
            seq = self._sequences[chunk.key]
            if self._reserve(seq):
                add(seq, chunk.tokens)
        for chunk in plan.admissions:
            seq = self._sequences[chunk.key]
            grant = self._start(seq)
            if grant is not None:
                add(seq, chunk.tokens)
                if grant.weights is not None:
                    installs[grant.slot] = (seq.request.version, grant.weights)
        return _Iteration(steps + chunks, sequences + chunked, installs)

    async def _install(self, iteration: _Iteration) -> _Iteration:
        """Bring adapters to the device; what is left to run of the iteration after that.

        An adapter that cannot be installed fails its own requests.
        """
        for slot, (version, weights) in iteration.installs.items():
            try:
                await self._lane.run(self._executor.install_adapter, slot, weights)
            except Exception as error:  # the boundary: others do not depend on this adapter
                log.exception("adapter %s could not be installed in slot %d", version, slot)
                failure = IterationError(
                    f"adapter {version} could not be put on the device "
                    f"({type(error).__name__}: {error}); lower max_loras or free device memory",
                    code="adapter_install_failed",
                )
                failure.__cause__ = error
                for seq in iteration.sequences:
                    if seq.request.version == version:
                        self._fail(seq.request, failure)
            else:
                self._adapters.mark_installed(version, slot)
        rest = _Iteration([], [], {})
        for seq, step in zip(iteration.sequences, iteration.steps, strict=True):
            if seq.status is Status.FINISHED:  # it failed here, or was left meanwhile
                seq.in_flight = False
                self._retire(seq)
            else:
                rest.steps.append(step)
                rest.sequences.append(seq)
        self._note_idle()
        return rest

    def _reserve(self, seq: SequenceState) -> bool:
        """Make room for every token known."""
        assert seq.pages is not None
        return self._cache.reserve(seq.pages, len(seq.tokens))

    def _step(self, seq: SequenceState, tokens: int) -> SequenceStep:
        """The part of `seq` in the iteration: its next so many tokens."""
        assert seq.pages is not None
        start = seq.computed
        end = start + tokens
        sampling = seq.sampling if end == len(seq.tokens) else None
        token_ids = seq.tokens[start:end]
        table = seq.pages.block_table
        request = seq.request
        if (
            seq.index == 0
            and start < len(request.prompt)
            and request.lacks_prompt_logprobs
            and end >= request.logprobs_start
            and (targets := request.prompt[start + 1 : end + 1])
        ):
            wanted = request.params.prompt_logprobs
            return SequenceStep(token_ids, start, table, seq.slot, sampling, wanted, targets)
        return SequenceStep(token_ids, start, table, seq.slot, sampling)

    def _commit(self, iteration: _Iteration, result: StepResult, now_s: float) -> None:
        """Take the results of an iteration: the only place where sequences move on."""
        results = result.results
        if len(results) != len(iteration.steps):
            self._fail_iteration(
                iteration,
                RuntimeError(f"{len(results)} results for {len(iteration.steps)} sequences"),
            )
            return
        self._iterations += 1
        self._forward_s += result.forward_s
        self._sample_s += result.sample_s
        fresh = self._fresh
        has_ended = False
        for seq, step, outcome in zip(iteration.sequences, iteration.steps, results, strict=True):
            seq.in_flight = False
            if seq.status is Status.FINISHED:  # it ended, or was left, while in flight
                has_ended = True
                continue
            if outcome.error is not None:
                self._fail(
                    seq.request,
                    IterationError(f"the answer was given up: {outcome.error}", code="step_failed"),
                )
                continue
            before = seq.computed
            computed = seq.computed = before + len(step.token_ids)
            assert seq.pages is not None
            self._cache.record(seq.pages, seq.tokens, computed)
            prompt_tokens = len(seq.request.prompt)
            if before < prompt_tokens:
                self._take_prompt(seq, step, outcome, is_complete=computed >= prompt_tokens)
            if step.sampling is not None:
                assert outcome.token_id is not None
                seq.append(outcome.token_id, now_s)
                if outcome.logprob is not None:
                    seq.logprobs.append(outcome.logprob)
                fresh.append(seq)
            elif seq.sampling is None and computed == len(seq.tokens):
                seq.finish("length", None)  # the prompt was all that was asked for
                fresh.append(seq)
            if seq.finish_reason is not None:
                seq.status = Status.FINISHED
                has_ended = True
        if has_ended:
            for seq in [seq for seq in self._running if seq.status is Status.FINISHED]:
                self._retire(seq)

    def _take_prompt(
        self, seq: SequenceState, step: SequenceStep, outcome: SequenceResult, *, is_complete: bool
    ) -> None:
        """Some of a prompt was computed: keep its log-probabilities, let siblings follow."""
        request = seq.request
        if outcome.prompt_logprobs:
            start = step.start + 1
            end = start + len(outcome.prompt_logprobs)
            request.prompt_logprobs[start:end] = outcome.prompt_logprobs
            request.prompt_logprobs_known = max(request.prompt_logprobs_known, end)
        if is_complete:
            self._waiting.note_recorded_prompt()
            self._changes += 1
            self._release_siblings(request)

    def _release_siblings(self, request: Request) -> None:
        """Queue the sequences that waited for the first one to compute the prompt."""
        if self._held:
            for seq in request.sequences:
                if seq.status is Status.HELD:
                    self._held -= 1
                    self._enqueue(seq)

    def _fail_iteration(self, iteration: _Iteration, error: Exception) -> None:
        """An iteration raised: all requests in it fail, everyone else goes on."""
        self._failed_iterations += 1
        log.error("an iteration of %d sequences failed", len(iteration.steps), exc_info=error)
        for seq in iteration.sequences:
            seq.in_flight = False
            if seq.status is Status.FINISHED:
                self._retire(seq)
        for seq in iteration.sequences:
            failure = IterationError(
                f"an iteration on the device failed ({type(error).__name__}: {error}); the "
                "request was given up, send it again, and see the log if that fails as well",
                code="iteration_failed",
            )
            failure.__cause__ = error
            self._fail(seq.request, failure)

    # -- delivery --------------------------------------------------------------------------------

    def _deliver(self) -> None:
        """Make text of what was committed, end what a stop string ends, wake the readers."""
        fresh = self._fresh
        if not fresh:
            return
        started_s = self._clock()
        self._fresh = []
        for seq in fresh:
            if seq.is_published:  # it was left, or failed, since
                continue
            try:
                self._publish(seq)
            except Exception as error:  # the boundary: one answer's text fails its request alone
                log.exception("the text of request %s could not be made", seq.request.id)
                failure = IterationError(
                    f"the answer could not be turned into text ({type(error).__name__}: {error})",
                    code="text_failed",
                )
                failure.__cause__ = error
                self._fail(seq.request, failure)
        self._note_idle()
        self._deliver_s += self._clock() - started_s

    def _publish(self, seq: SequenceState) -> None:
        """Let the reader of `seq` have what is new."""
        before = seq.published
        seq.publish()
        listeners = self._listeners
        times = seq.token_times
        for index in range(before, seq.published):
            if seq.request.is_background:
                break
            if index == 0:
                listeners.on_first_token(times[0] - seq.request.arrival_s)
            else:
                listeners.on_token_gap(times[index] - times[index - 1])
        if not seq.request.is_background:
            self._generated_tokens += seq.published - before
        if seq.is_published:
            self._end(seq)
        seq.request.announce(seq.index)

    # -- transitions -----------------------------------------------------------------------------

    def _enqueue(self, seq: SequenceState) -> None:
        """Put a sequence that holds nothing among the waiting, by rank."""
        self._changes += 1
        seq.status = Status.WAITING
        if not seq.tokens:
            seq.tokens = [*seq.request.prompt]
        self._waiting.add(seq)
        self._sequences[seq.key] = seq

    def _leave_queue(self, seq: SequenceState) -> None:
        """Take a sequence out of the waiting."""
        self._changes += 1
        self._waiting.remove(seq)

    def _start(self, seq: SequenceState) -> SlotGrant | None:
        """Give a waiting sequence its slot and pages for all tokens it knows. None: not now."""
        request = seq.request
        pages = self._cache.open(request.version, seq.cacheable)
        if not self._cache.reserve(pages, len(seq.tokens)):
            self._cache.close(pages)
            self._was_corrected |= self._waiting.correct(seq)
            return None
        grant = self._adapters.acquire(request.version)
        if grant is None:
            self._cache.close(pages)
            return None
        self._leave_queue(seq)
        seq.status = Status.RUNNING
        insort(self._running, seq, key=_running_order)
        seq.pages = pages
        seq.slot = grant.slot
        if request.version.name:
            self._slot_users[request.version] += 1
        seq.computed = pages.cached_tokens
        if seq.scheduled_s is None:
            seq.scheduled_s = self._clock()
            seq.cached_tokens = pages.cached_tokens
            self._note_started(request)
        return grant

    def _release(self, seq: SequenceState) -> None:
        """Take pages and slot from a running sequence."""
        self._changes += 1
        assert seq.pages is not None
        assert not seq.in_flight
        self._running.remove(seq)
        self._cache.close(seq.pages)
        seq.pages = None
        version = seq.request.version
        self._adapters.release(version)
        if version.name:
            self._slot_users[version] -= 1
            if not self._slot_users[version]:
                del self._slot_users[version]

    def _preempt(self, seq: SequenceState) -> None:
        """Take back everything from a running sequence but its tokens; it waits in its old rank."""
        self._preemptions += 1
        self._release(seq)
        seq.computed = 0
        self._enqueue(seq)

    def _retire(self, seq: SequenceState) -> None:
        """A running sequence is finished, and not in flight."""
        self._release(seq)
        del self._sequences[seq.key]

    def _end(self, seq: SequenceState) -> None:
        """Nothing more will be published of `seq`. Its pages go as soon as no step uses them."""
        self._changes += 1
        request = seq.request
        was, seq.status = seq.status, Status.FINISHED
        if was is Status.HELD:
            self._held -= 1
        elif was is Status.WAITING:
            self._leave_queue(seq)
            del self._sequences[seq.key]
        elif was is Status.RUNNING and not seq.in_flight:
            self._retire(seq)
        now_s = self._clock()
        seq.response = seq.respond(now_s)
        request.unfinished -= 1
        if not request.unfinished:
            self._note_started(request)
            del self._requests[request.id]
            self._adapters.unpin(request.version)
        if request.is_background:
            return
        self._finished += 1
        self._finish_gaps.append(now_s - self._paced_from_s)
        self._paced_from_s = now_s
        self._listeners.on_finished(seq.response)
        if self._recorder is not None and request.record is not None:
            self._recorder(request.record, seq.response, request.params)

    def _note_started(self, request: Request) -> None:
        """`request` waits no longer in the queue that callers fill."""
        if not request.is_started:
            request.is_started = True
            self._unstarted -= not request.is_background

    def _fail(self, request: Request, error: CotuneError) -> None:
        """End a request with an error, all its sequences."""
        if request.is_done:
            return
        request.error = error
        for seq in request.sequences:
            if not seq.is_published:
                seq.abandon("error")
                self._end(seq)
        request.wake()

    def _give_up_on_one(self) -> None:
        """Nothing can run although something wants to: keep the promise that nobody waits for ever.

        Admission makes sure that every sequence fits alone, so this is a fault in the bookkeeping.
        """
        seq = self._running[0] if self._running else self._waiting.first
        statistics = self._cache.statistics()
        log.error("no sequence can be scheduled; cache: %s", statistics)
        self._fail(
            seq.request,
            IterationError(
                f"the request could not be scheduled although {statistics.free_pages} of "
                f"{statistics.total_pages} pages are free; please report this",
                code="unschedulable",
            ),
        )

    def _note_idle(self) -> None:
        """Let `drain` go on when nothing is left."""
        if not self._requests and not self._sequences:
            self._idle.set()

    def _retry_after_s(self) -> float:
        """When half of the queue should be gone, at the recent pace."""
        gaps = self._finish_gaps
        if not gaps:
            return 1.0
        gap_s = sum(gaps) / len(gaps)
        return min(max(1.0, gap_s * self._unstarted / 2), MAX_RETRY_AFTER_S)

    # -- evidence --------------------------------------------------------------------------------

    def count_rejection(self, reason: str) -> None:
        """A request was not admitted, for this reason."""
        self._rejected += 1
        self._listeners.on_rejected(reason)

    def statistics(self) -> RuntimeStatistics:
        """A snapshot."""
        return RuntimeStatistics(
            running=len(self._running),
            waiting=len(self._waiting) + self._held,
            cache=self._cache.statistics(),
            preemptions=self._preemptions,
            iterations=self._iterations,
            failed_iterations=self._failed_iterations,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            finished=self._finished,
            rejected=self._rejected,
            device_s=self._device_s,
            forward_s=self._forward_s,
            sample_s=self._sample_s,
            plan_s=self._plan_s,
            commit_s=self._commit_s,
            deliver_s=self._deliver_s,
            schedule=self._scheduler.statistics(),
        )

    def check_integrity(self) -> None:
        """Raise `AssertionError` where the books disagree. Between iterations only."""
        self._cache.check_integrity()
        self._adapters.check_integrity()
        self._waiting.check_integrity()
        _check(self._running == sorted(self._running, key=_running_order), "order of the running")
        by_status = {Status.WAITING: [*self._waiting], Status.RUNNING: self._running}
        listed = {seq.key for seqs in by_status.values() for seq in seqs}
        _check(listed == set(self._sequences), "sequences in the lists and by key")
        for status, seqs in by_status.items():
            for seq in seqs:
                is_leaving = seq.status is Status.FINISHED and seq.in_flight
                _check(seq.status is status or is_leaving, f"status of sequence {seq.key}")
                _check((seq.pages is None) == (status is Status.WAITING), f"pages of {seq.key}")
        held = 0
        for request in self._requests.values():
            held += sum(seq.status is Status.HELD for seq in request.sequences)
            unfinished = sum(seq.response is None for seq in request.sequences)
            _check(unfinished == request.unfinished, f"unfinished of {request.id}")
        _check(held == self._held, "held siblings")
        unstarted = sum(
            not (request.is_started or request.is_background) for request in self._requests.values()
        )
        _check(unstarted == self._unstarted, "requests that were not started")
        statistics = self._cache.statistics()
        owned = {page for seq in self._running if seq.pages for page in seq.pages.block_table}
        _check(len(owned) == statistics.owned_pages, "pages in block tables")
        counted = Counter(seq.request.version for seq in self._running if seq.request.version.name)
        _check(counted == self._slot_users, "users of adapter slots")


def _running_order(seq: SequenceState) -> tuple[float, int]:
    return (seq.request.rank_s, seq.key)


def _is_last(seq: SequenceState, step: SequenceStep) -> bool:
    """Whether a step gives a sequence the last token that it may have, or all of its prompt."""
    if seq.sampling is None:
        return step.start + len(step.token_ids) == len(seq.tokens)
    return step.sampling is not None and len(seq.output) + 1 >= seq.request.max_tokens


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(f"the engine's books disagree on: {what}")
