"""A runtime without a model: the web layer with nothing behind it.

It satisfies `cotune.web.backend.Backend`. Its tokens are a function of the prompt alone, so that a
test can say beforehand what an answer must be, and they cost next to nothing, so that a benchmark
measures the web layer. Token ids 0 to 255 are bytes.

Time is made of steps. In each, every live completion gets one token. Steps follow one another as
fast as the event loop turns, or, with ``manual=True``, happen when `step` is called; nothing here
sleeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from ..cache.manager import CacheStatistics
from ..runtime.errors import (
    AdapterLoadError,
    ContextLengthError,
    DrainingError,
    LearningOffError,
    NotFoundError,
    OverloadedError,
    RequestError,
)
from ..runtime.learning.status import LearningStatus
from ..runtime.scheduling.statistics import ScheduleStatistics
from ..runtime.scheduling.timeline import IterationRecord, Timeline, TimelineSnapshot
from ..runtime.statistics import Listeners, RuntimeStatistics
from ..runtime.types import (
    BASE,
    AdapterVersion,
    Delta,
    Response,
    Timings,
    TokenLogprob,
    Usage,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator, Mapping, Sequence
    from types import TracebackType

    from ..runtime.learning.events import Acknowledgement, FeedbackEvent
    from ..runtime.learning.versions import VersionRecord
    from ..runtime.statistics import Listener
    from ..runtime.types import FinishReason, Message, RequestClass, SamplingParams
    from .null_learning import NullLearning

PAGE_SIZE: Final = 16
TOTAL_PAGES: Final = 4096
START_OF_MESSAGE: Final = 257
_VOCAB_SIZE: Final = 258


class NullCodec:
    """Bytes as tokens."""

    vocab_size = _VOCAB_SIZE

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """UTF-8. There are no special tokens to add."""
        return list(text.encode())

    def encode_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Each message after a `START_OF_MESSAGE`."""
        tokens: list[int] = []
        for message in messages:
            tokens += [START_OF_MESSAGE, *f"{message['role']}\n{message['content']}".encode()]
        if add_generation_prompt:
            tokens += [START_OF_MESSAGE, *b"assistant\n"]
        return tokens

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """UTF-8. Special tokens have no text."""
        return bytes(token for token in token_ids if token < 256).decode(errors="replace")

    def token_text(self, token_id: int, /) -> str:
        """One byte as text."""
        return self.decode([token_id])

    def token_bytes(self, token_id: int, /) -> bytes:
        """One byte."""
        return bytes([token_id]) if token_id < 256 else b""


def token_at(prompt: Sequence[int], position: int, index: int = 0) -> int:
    """The token that completion `index` of a prompt has at `position`: letters in short words."""
    return 32 if position % 6 == 5 else 97 + (sum(prompt) + 7 * position + index) % 26


def text_of(prompt: Sequence[int], tokens: int, index: int = 0) -> str:
    """The first `tokens` tokens of a completion as text."""
    return "".join(chr(token_at(prompt, i, index)) for i in range(tokens))


def _logprob(token_id: int, top: int) -> TokenLogprob:
    """A chosen token is always the likeliest; its neighbours follow."""
    alternatives = ((token_id + i) % 256 for i in range(top))
    return TokenLogprob(
        token_id, -0.25, 1, tuple((other, -0.25 - i) for i, other in enumerate(alternatives))
    )


def _longest_start(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` are the start of a stop string."""
    return max(
        (k for stop in stops for k in range(len(stop)) if text.endswith(stop[:k])), default=0
    )


@dataclass(frozen=True, slots=True)
class NullModel:
    """One name that requests may ask for."""

    id: str
    parent: str | None
    root: str
    created: datetime
    max_model_len: int


@dataclass(slots=True)
class _Completion:
    index: int
    token_ids: list[int] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)  # text that is certain
    held: str = ""  # text that may be the start of a stop string
    logprobs: list[TokenLogprob] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    response: Response | None = None
    taken_parts: int = 0
    taken_tokens: int = 0


class NullStream:
    """One request. See `cotune.web.backend.Stream`."""

    def __init__(
        self,
        runtime: NullRuntime,
        prompt: tuple[int, ...],
        params: SamplingParams,
        model: str | None,
        request_id: str | None,
        record: bool | None = None,
        source: str | None = None,
        request_class: RequestClass = "interactive",
    ) -> None:
        self._runtime = runtime
        self.request_class = request_class
        self.is_recorded = record is not False
        self.source = source or "local"
        self.prompt_token_ids = prompt
        self.params = params
        self.request_id = request_id or f"null-{uuid.uuid4().hex}"
        self.model = runtime.served_name if model is None else model
        self.adapter_version = BASE
        self._requested = model
        self._completions = [_Completion(i) for i in range(params.n)]
        self._ready: dict[int, None] = {}
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._cached_tokens = 0
        self._is_live = False
        self._arrival_s = time.monotonic()

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(
            len(self.prompt_token_ids),
            sum(len(completion.token_ids) for completion in self._completions),
            self._cached_tokens,
        )

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        """The same made-up number for each token but the first."""
        wanted = self.params.prompt_logprobs
        if wanted is None:
            return None
        return (None, *(_logprob(token, wanted) for token in self.prompt_token_ids[1:]))

    @property
    def responses(self) -> tuple[Response, ...]:
        """The completions that have ended."""
        return tuple(c.response for c in self._completions if c.response is not None)

    async def __aenter__(self) -> Self:
        self.adapter_version, self._cached_tokens = self._runtime.admit(self, self._requested)
        self._is_live = True
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None:
        self._is_live = False
        self._runtime.release(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        while not self._ready:
            if self._is_done:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            await self._wait()
        return self._take()

    def take_nowait(self) -> list[Delta]:
        """What is ready, joined per completion."""
        return [self._take() for _ in range(len(self._ready))]

    def __await__(self) -> Generator[object, None, Response]:
        return self._collect().__await__()

    async def _collect(self) -> Response:
        if not self._is_live:
            async with self:
                return await self._collect()
        while not self._is_done:
            await self._wait()
        if self._error is not None:
            raise self._error
        return self.responses[0]

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def _is_done(self) -> bool:
        return self._error is not None or all(
            completion.finish_reason is not None for completion in self._completions
        )

    def _take(self) -> Delta:
        index = next(iter(self._ready))
        del self._ready[index]
        completion = self._completions[index]
        start, completion.taken_tokens = completion.taken_tokens, len(completion.token_ids)
        parts, completion.taken_parts = completion.taken_parts, len(completion.parts)
        return Delta(
            index,
            "".join(completion.parts[parts:]),
            tuple(completion.token_ids[start:]),
            None if self.params.logprobs is None else tuple(completion.logprobs[start:]),
            completion.finish_reason,
            completion.stop_reason,
        )

    def advance(self) -> int:
        """One step: each unfinished completion gets a token. Returns how many did."""
        generated = 0
        for completion in self._completions:
            if completion.finish_reason is None:
                generated += self._grow(completion)
                self._ready[completion.index] = None
        self._wake()
        return generated

    def fail(self, error: Exception) -> None:
        """End the request with an error."""
        self._error = error
        self._wake()

    def abort(self) -> None:
        """End what is unfinished; nobody reads on."""
        for completion in self._completions:
            if completion.finish_reason is None:
                self._end(completion, "abort", None)

    def _grow(self, completion: _Completion) -> int:
        params, listeners = self.params, self._runtime.listeners
        limit = self._runtime.max_tokens(self)
        if limit == 0:
            self._end(completion, "length", None)
            return 0
        token = token_at(self.prompt_token_ids, len(completion.token_ids), completion.index)
        now_s = time.monotonic()
        if completion.times_s:
            listeners.on_token_gap(now_s - completion.times_s[-1])
        else:
            listeners.on_first_token(now_s - self._arrival_s)
        completion.times_s.append(now_s)
        completion.token_ids.append(token)
        completion.held += chr(token)
        if params.logprobs is not None:
            completion.logprobs.append(_logprob(token, params.logprobs))
        for stop in params.stop:
            if completion.held.endswith(stop):
                if not params.include_stop_str_in_output:
                    completion.held = completion.held.removesuffix(stop)
                self._end(completion, "stop", stop)
                return 1
        if token in params.stop_token_ids:
            completion.held = completion.held[:-1]
            self._end(completion, "stop", token)
        elif len(completion.token_ids) >= limit:
            self._end(completion, "length", None)
        elif not params.ignore_eos and len(completion.token_ids) >= self._runtime.natural_tokens:
            self._end(completion, "stop", None)
        else:
            held = _longest_start(completion.held, params.stop)
            certain = len(completion.held) - held
            if certain:
                completion.parts.append(completion.held[:certain])
                completion.held = completion.held[certain:]
        return 1

    def _end(
        self, completion: _Completion, reason: FinishReason, stop_reason: str | int | None
    ) -> None:
        completion.parts.append(completion.held)
        completion.finish_reason, completion.stop_reason = reason, stop_reason
        times = completion.times_s
        now_s = time.monotonic()
        completion.response = Response(
            id=(self.request_id if self.params.n == 1 else f"{self.request_id}:{completion.index}"),
            index=completion.index,
            text="".join(completion.parts),
            token_ids=tuple(completion.token_ids),
            finish_reason=reason,
            stop_reason=stop_reason,
            usage=Usage(len(self.prompt_token_ids), len(completion.token_ids), self._cached_tokens),
            model=self.model,
            adapter_version=self.adapter_version,
            timings=Timings(
                queue_s=0.0,
                ttft_s=times[0] - self._arrival_s if times else None,
                tbt_s=tuple(b - a for a, b in itertools.pairwise(times)),
                e2e_s=now_s - self._arrival_s,
            ),
            prompt_token_ids=self.prompt_token_ids,
            logprobs=None if self.params.logprobs is None else tuple(completion.logprobs),
            prompt_logprobs=self.prompt_logprobs,
        )
        self._runtime.record(self, completion.response)
        self._runtime.listeners.on_finished(completion.response)


class NullRuntime:
    """Answers requests without a model. Enter it with ``async with``.

    Args:
        served_name: the base model's name.
        max_model_len: most tokens of prompt and answer together.
        max_requests: requests beyond this many live ones are refused with `OverloadedError`.
        natural_tokens: an answer ends by itself after this many tokens.
        manual: steps happen only when `step` is called.
        learning: takes feedback (None: this runtime does not learn).

    Attributes:
        draining: set when `drain` is called.
        schedule: what is told of the scheduler beside what its `records` have added up.
        records: has an iteration per step.
    """

    def __init__(
        self,
        *,
        served_name: str = "null",
        max_model_len: int = 4096,
        max_requests: int = 1024,
        natural_tokens: int = 32,
        manual: bool = False,
        learning: NullLearning | None = None,
    ) -> None:
        self.codec = NullCodec()
        self.served_name = served_name
        self.max_model_len = max_model_len
        self.natural_tokens = natural_tokens
        self.listeners = Listeners()
        self.is_ready = False
        self.draining = asyncio.Event()
        self._max_requests = max_requests
        self._is_manual = manual
        self._learning = learning
        self._created = datetime.now(UTC)
        self._adapters: dict[str, tuple[AdapterVersion, str]] = {}
        self._versions: Counter[str] = Counter()
        self._live: dict[NullStream, None] = {}
        self._changed = asyncio.Event()
        self._work = asyncio.Event()
        self._tasks = contextlib.AsyncExitStack()
        self._loop_task: asyncio.Task[None] | None = None
        self._seen: set[tuple[AdapterVersion, tuple[int, ...]]] = set()
        self._counts: Counter[str] = Counter()
        self.schedule = ScheduleStatistics(policy="null")
        self.records = Timeline()

    async def __aenter__(self) -> Self:
        group = await self._tasks.enter_async_context(asyncio.TaskGroup())
        if not self._is_manual:
            self._loop_task = group.create_task(self._run())
        self.is_ready = True
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.is_ready = False
        if self._loop_task is not None:
            self._loop_task.cancel()
        await self._tasks.aclose()

    # What a Backend has.

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams,
        *,
        model: str | None = None,
        priority: int = 0,
        request_class: RequestClass = "interactive",
        request_id: str | None = None,
        record: bool | None = None,
        source: str | None = None,
    ) -> NullStream:
        """Answer a conversation."""
        tokens = tuple(self.codec.encode_chat(messages))
        return NullStream(self, tokens, params, model, request_id, record, source, request_class)

    def complete(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        model: str | None = None,
        priority: int = 0,
        request_class: RequestClass = "interactive",
        request_id: str | None = None,
        record: bool | None = None,
        source: str | None = None,
    ) -> NullStream:
        """Continue a text, or token ids."""
        tokens = self.codec.encode(prompt) if isinstance(prompt, str) else prompt
        return NullStream(
            self, tuple(tokens), params, model, request_id, record, source, request_class
        )

    def model_names(self) -> tuple[NullModel, ...]:
        """The base and the live adapters."""
        base = NullModel(
            self.served_name, None, self.served_name, self._created, self.max_model_len
        )
        return (
            base,
            *(
                NullModel(name, self.served_name, path, self._created, self.max_model_len)
                for name, (_, path) in self._adapters.items()
            ),
        )

    async def load_adapter(self, name: str, path: str | Path) -> AdapterVersion:
        """Any directory will do."""
        if not await asyncio.to_thread(Path(path).is_dir):
            raise AdapterLoadError(
                f"lora_path is {str(path)!r}, which is not a directory; name one",
                param="lora_path",
            )
        self._versions[name] += 1
        version = AdapterVersion(name, self._versions[name])
        self._adapters[name] = (version, str(path))
        return version

    async def unload_adapter(self, name: str) -> None:
        """Forget a name."""
        if name not in self._adapters:
            raise NotFoundError(f"no adapter {name!r} is loaded", param="lora_name")
        del self._adapters[name]

    async def feedback(
        self, event: FeedbackEvent | Mapping[str, object], *, source: str = "local"
    ) -> Acknowledgement:
        """Store an event in memory."""
        return await self._learner().feedback(event, source)

    def export_feedback(self, adapter: str | None = None) -> AsyncIterator[Mapping[str, object]]:
        """The events that stand."""
        return self._learner().export(adapter)

    async def forget(self, source: str) -> int:
        """Remove a person's events and answers."""
        return self._learner().forget(source)

    def learning(self) -> LearningStatus:
        """What came in."""
        learning = self._learning
        return LearningStatus(enabled=False) if learning is None else learning.status()

    async def adapters(self) -> tuple[VersionRecord, ...]:
        """The versions that a test has made."""
        return self._learner().records()

    async def promote(self, model: str, *, force: bool = False) -> VersionRecord | None:
        """Make a version live."""
        return self._learner().promote(model, force)

    async def rollback(self, model: str) -> VersionRecord | None:
        """Take it back."""
        return self._learner().rollback(model)

    def statistics(self) -> RuntimeStatistics:
        """A snapshot. Live completions hold the pages they would need."""
        owned = sum(
            -(-(len(stream.prompt_token_ids) + self.max_tokens(stream)) // PAGE_SIZE)
            for stream in self._live
        )
        return RuntimeStatistics(
            running=sum(stream.params.n for stream in self._live),
            waiting=0,
            cache=CacheStatistics(
                total_pages=TOTAL_PAGES,
                free_pages=TOTAL_PAGES - owned,
                cached_pages=0,
                owned_pages=owned,
                hit_tokens=self._counts["hit"],
                queried_tokens=self._counts["prompt"],
                evicted_pages=0,
            ),
            preemptions=0,
            iterations=self._counts["steps"],
            failed_iterations=0,
            prompt_tokens=self._counts["prompt"],
            generated_tokens=self._counts["generated"],
            finished=0,
            rejected=self._counts["rejected"],
            device_s=0.0,
            forward_s=0.0,
            sample_s=0.0,
            plan_s=0.0,
            commit_s=0.0,
            deliver_s=0.0,
            schedule=self.records.statistics(self.schedule),
        )

    def timeline(self, last_s: float | None = None) -> TimelineSnapshot:
        """The steps, and whatever a test has added to `records`."""
        return self.records.snapshot(last_s)

    def describe(self) -> Mapping[str, object]:
        """Nothing was chosen."""
        return {"model": "none"}

    def add_listener(self, listener: Listener, /) -> None:
        """Tell `listener` from now on."""
        self.listeners.add(listener)

    def remove_listener(self, listener: Listener, /) -> None:
        """Stop telling it."""
        self.listeners.remove(listener)

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests; wait for the live ones, then fail what is left."""
        self.is_ready = False
        self.draining.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.wait_live(0)
        for stream in list(self._live):
            stream.fail(DrainingError("the runtime shut down before the answer was complete"))

    # What tests and the benchmark use.

    @property
    def live(self) -> int:
        """Requests between admission and release."""
        return len(self._live)

    @property
    def streams(self) -> tuple[NullStream, ...]:
        """Their streams, in order of admission."""
        return tuple(self._live)

    async def wait_live(self, count: int) -> None:
        """Wait until exactly `count` requests are live."""
        while len(self._live) != count:
            await self._changed.wait()

    def step(self, times: int = 1) -> None:
        """Give each live completion a token, `times` over."""
        for _ in range(times):
            self._counts["steps"] += 1
            started_s = time.monotonic()
            tokens = sum(stream.advance() for stream in self._live)
            self._counts["generated"] += tokens
            self.records.add_iteration(self._record_of_step(started_s, tokens))

    def _record_of_step(self, started_s: float, tokens: int) -> IterationRecord:
        return IterationRecord(
            index=self._counts["steps"],
            started_s=started_s,
            ended_s=time.monotonic(),
            plan_s=0.0,
            decodes=tokens,
            prefill_tokens=0,
            admissions=0,
            preemptions=0,
            context_tokens=0,
            predicted_s=None,
            margin=1.0,
            slack_s=math.inf,
            budget_tokens=self._max_requests,
            started_quantum=None,
            is_holding=False,
            beside_training=0.0,
            memory_threshold=None,
            running=len(self._live),
        )

    def fail_all(self, error: Exception) -> None:
        """End all live requests with an error."""
        for stream in self._live:
            stream.fail(error)

    # What streams use.

    def admit(self, stream: NullStream, model: str | None) -> tuple[AdapterVersion, int]:
        """Take a request or raise. Returns the weights that answer and the tokens cached."""
        try:
            version = self._check(stream, model)
        except Exception as error:
            self._counts["rejected"] += 1
            self.listeners.on_rejected(type(error).__name__)
            raise
        key = (version, stream.prompt_token_ids)
        cached = (len(key[1]) - 1) // PAGE_SIZE * PAGE_SIZE if key in self._seen else 0
        self._seen.add(key)
        self._counts["prompt"] += len(stream.prompt_token_ids)
        self._counts["hit"] += cached
        self._live[stream] = None
        self._work.set()
        self._tell_live()
        return version, cached

    def release(self, stream: NullStream) -> None:
        """A stream's block was left: what is unfinished is aborted."""
        if stream in self._live:
            del self._live[stream]
            stream.abort()
        if not self._live:
            self._work.clear()
        self._tell_live()

    def record(self, stream: NullStream, response: Response) -> None:
        """A completion has ended; keep it for feedback."""
        if self._learning is not None and stream.is_recorded:
            self._learning.record(response, stream.source)

    def max_tokens(self, stream: NullStream) -> int:
        """Most tokens of each answer."""
        wanted = stream.params.max_tokens
        room = self.max_model_len - len(stream.prompt_token_ids)
        return room if wanted is None else wanted

    def _check(self, stream: NullStream, model: str | None) -> AdapterVersion:
        if not self.is_ready:
            raise DrainingError("the server is shutting down; ask another one", retry_after_s=5)
        version = self._resolve(model)
        if len(self._live) >= self._max_requests:
            raise OverloadedError(
                f"{len(self._live)} requests are being answered, which is all this server takes; "
                "try again",
                retry_after_s=1.5,
            )
        prompt = len(stream.prompt_token_ids)
        if prompt == 0:
            raise RequestError("the prompt is empty; give at least one token", param="prompt")
        stream.params.validate(vocab_size=_VOCAB_SIZE)
        if max(stream.prompt_token_ids) >= _VOCAB_SIZE:
            raise RequestError("the prompt has an unknown token id", param="prompt")
        wanted = stream.params.max_tokens
        if prompt + (1 if wanted is None else wanted) > self.max_model_len:
            raise ContextLengthError(
                f"prompt {prompt} tokens + max_tokens {wanted} exceeds max_model_len "
                f"{self.max_model_len}; shorten the prompt or lower max_tokens",
                param="prompt" if prompt >= self.max_model_len else "max_tokens",
            )
        return version

    def _resolve(self, model: str | None) -> AdapterVersion:
        if model is None or model == self.served_name:
            live = 0 if self._learning is None else self._learning.live
            return AdapterVersion(self.served_name, live) if live else BASE
        if model in self._adapters:
            return self._adapters[model][0]
        raise NotFoundError(f"the model {model!r} does not exist", param="model")

    def _learner(self) -> NullLearning:
        if self._learning is None:
            raise LearningOffError(
                "this runtime does not learn; make it with learning", code="learning_off"
            )
        return self._learning

    def _tell_live(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _run(self) -> None:
        while True:
            await self._work.wait()
            self.step()
            await asyncio.sleep(0)  # the readers' turn
