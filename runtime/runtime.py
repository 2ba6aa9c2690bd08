"""The runtime: a model, ready to answer, as an async context manager.

    async with Runtime("path/or/hub-id") as rt:
        response = await rt.chat([{"role": "user", "content": "Hello"}])

Start-up, in order, and undone in reverse if a step fails or the block is left:

    lane (thread, device stream) ─► model and executor, loaded there ─► adapters ─► engine task
                                 ─► learning: state directory, training lane, learners

Several runtimes may live in one process, each with a lane, pages and weights of its own. A runtime
belongs to the event loop that entered it.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack, get_args

import torch

from ..cache.manager import KVCacheManager
from ..policy import Budgets, RequestClass, make_policy
from ..policy.costs import CostModel
from ..policy.memory import MemoryThreshold
from ..streams.device import DeviceError, describe_device, resolve_device
from ..streams.lane import Lane
from ..streams.memory import MemoryProbe
from .adapters import AdapterStore
from .answer_text import AnswerText
from .background import Background
from .config import RuntimeConfig
from .engine import Engine
from .errors import (
    ConfigError,
    ContextLengthError,
    CotuneError,
    DrainingError,
    LearningOffError,
    ModelLoadError,
    NotFoundError,
    OverloadedError,
    RequestError,
)
from .learning.status import LearningStatus
from .lora import read_lora
from .randomness import SeedSource
from .scheduling import profiles
from .scheduling.memory_watch import MemoryNeeds, MemoryWatch
from .scheduling.profiler import guess_memory
from .scheduling.scheduler import Scheduler
from .scheduling.targets import choose_targets
from .scheduling.timeline import Timeline
from .sequence import Request
from .statistics import Listener, Listeners, RuntimeStatistics
from .stream import ResponseStream
from .types import BASE, SamplingParams

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from types import TracebackType

    from ..policy.costs import Costs
    from .config import Shorthands
    from .engine import StepExecutor
    from .learning.events import Acknowledgement, FeedbackEvent
    from .learning.service import LearningService
    from .learning.versions import VersionRecord
    from .loading import LoadedModel
    from .scheduling.timeline import TimelineSnapshot
    from .tokenization import TextCodec
    from .types import AdapterVersion, Message

__all__ = ["ModelInfo", "ResponseStream", "Runtime"]

LARGE_TEXT_CHARS = 8192
"""Texts longer than this are tokenized on a thread of their own: it takes about a millisecond."""

MAX_REQUEST_ID_CHARS = 256

_REASONS: tuple[tuple[type[CotuneError], str], ...] = (
    (OverloadedError, "overloaded"),
    (DrainingError, "draining"),
    (NotFoundError, "not_found"),
    (ContextLengthError, "context_length"),
    (RequestError, "invalid_request"),
)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A name that requests may ask for.

    Attributes:
        id: the name.
        parent: the base model's name, for an adapter.
        root: where its weights come from.
        created: when it was loaded.
        max_model_len: most tokens of prompt plus answer.
    """

    id: str
    parent: str | None
    root: str
    created: datetime
    max_model_len: int


@dataclass(frozen=True, slots=True)
class _Served:
    """Everything that exists while the runtime is up."""

    loaded: LoadedModel
    executor: StepExecutor
    codec: TextCodec
    adapters: AdapterStore
    engine: Engine
    cache: KVCacheManager
    background: Background
    scheduler: Scheduler
    device: torch.device
    token_budget: int
    max_model_len: int
    served_name: str
    created: datetime
    learning: LearningService | None = None


class Runtime:
    """A model that answers requests; see the module docstring.

    Args:
        model: a directory or hub id; None for the demo model (or what `config` names).
        device: "auto", "cpu", "cuda" or "cuda:N" (None: what `config` says, else "auto").
        config: all settings; what is given beside it takes its place.
        settings: single settings by name, see `Shorthands`: ``Runtime("m", max_model_len=4096)``.

    Entering raises `ConfigError`, or one of its subclasses, with the field, its value and the
    remedy; then nothing is left behind. Leaving lets running requests finish for
    ``schedule.stop_grace_s`` (not at all when an exception leaves the block), then aborts them.

    Raises:
        ConfigError: a setting has no such name.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        device: str | None = None,
        *,
        config: RuntimeConfig | None = None,
        **settings: Unpack[Shorthands],
    ) -> None:
        config = (config or RuntimeConfig()).with_shorthands(settings)
        changes: dict[str, Any] = {}
        if model is not None:
            changes["source"] = model
        if device is not None:
            changes["device"] = device
        if changes:
            config = replace(config, model=replace(config.model, **changes))
        self.config = config
        self._listeners = Listeners()
        self._seeds = SeedSource(config.seed)
        self._clock = time.monotonic
        self._was_entered = False
        self._stack: AsyncExitStack | None = None
        self._parts: _Served | None = None

    # -- life ------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._was_entered:
            raise RuntimeError("a Runtime is entered once; make another one")
        self._was_entered = True
        self.config.validate()
        try:
            device = resolve_device(self.config.model.device)
        except DeviceError as error:
            raise ConfigError(str(error), param="model.device", code="invalid_config") from error
        refusal: CotuneError | None = None
        async with AsyncExitStack() as stack:
            lane = Lane(
                "inference",
                device=device,
                threads=inference_threads(self.config, device),
                high_priority=True,
            )
            stack.enter_context(lane)
            stack.push_async_callback(self._free_memory, lane)
            self._parts = await self._load(lane, device)
            group = await stack.enter_async_context(asyncio.TaskGroup())
            group.create_task(self._parts.engine.run(), name="cotune-engine")
            stack.callback(self._parts.engine.stop)
            if self.config.learning.enabled:
                try:
                    service = await stack.enter_async_context(self._learning_service(self._parts))
                except CotuneError as error:  # the task group would wrap it in a group
                    refusal = error
                else:
                    self._parts = replace(self._parts, learning=service)
            if refusal is None:
                self._stack = stack.pop_all()
        if refusal is not None:
            raise refusal
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stack, self._stack = self._stack, None
        assert stack is not None
        engine = self._served.engine
        try:
            await engine.drain(self.config.schedule.stop_grace_s if error is None else 0.0)
        finally:
            engine.stop()
            # The task group would wrap any error of the block in a group. It needs to see only a
            # cancellation, which is how it interrupts the block when the engine itself has failed.
            is_cancelled = isinstance(error, asyncio.CancelledError)
            try:
                await stack.__aexit__(*((kind, error, trace) if is_cancelled else (None,) * 3))
            finally:
                self._parts = None
        engine.check_integrity()

    async def _load(self, lane: Lane, device: torch.device) -> _Served:
        """Everything that takes time or memory. Reading and preparing happen on the lane."""
        config = self.config
        token_budget = config.schedule.token_budget(device.type)
        loaded, executor, codec = await lane.run(_load_model, config, device, token_budget)
        served_name = config.model.served_name or loaded.name
        cache = KVCacheManager(
            executor.num_pages, executor.page_size, config.cache.enable_prefix_sharing
        )
        learned = (served_name, *config.learning.adapters) if config.learning.enabled else ()
        adapters = AdapterStore(
            config.adapters.max_loras,
            reserved_names=(served_name,),
            learned_names=learned,
            on_retired=cache.drop_namespace,
            on_returned=cache.revive_namespace,
        )
        for name, path in config.adapters.modules:
            weights = await lane.run(_read_adapter, path, loaded, config.adapters.max_lora_rank)
            adapters.add(name, weights, path)
        scheduler = await self._make_scheduler(lane, loaded, executor, cache, token_budget)
        engine = Engine(
            executor=executor,
            lane=lane,
            cache=cache,
            adapters=adapters,
            scheduler=scheduler,
            max_model_len=loaded.max_model_len,
            max_queue=config.schedule.max_queue,
            make_text=_text_maker(codec),
            eos_token_ids=loaded.eos_token_ids,
            listeners=self._listeners,
            clock=self._clock,
        )
        return _Served(
            loaded=loaded,
            executor=executor,
            codec=codec,
            adapters=adapters,
            engine=engine,
            cache=cache,
            background=Background(engine, self._clock),
            scheduler=scheduler,
            device=device,
            token_budget=token_budget,
            max_model_len=engine.max_model_len,
            served_name=served_name,
            created=datetime.now(UTC),
        )

    async def _make_scheduler(
        self,
        lane: Lane,
        loaded: LoadedModel,
        executor: StepExecutor,
        cache: KVCacheManager,
        token_budget: int,
    ) -> Scheduler:
        """The policy, with what it needs to know: costs, targets, memory."""
        schedule = self.config.schedule
        device = lane.device
        profile = None
        if schedule.profile != "off":
            profile = await profiles.load_or_measure(
                loaded,
                executor,
                lane,
                device=device,
                threads=lane.threads,
                mode=schedule.profile,
            )
        costs = CostModel(profile)
        ttft_s, tbt_s = choose_targets(schedule, profile.costs if profile else None, token_budget)
        timeline = Timeline(clock=self._clock)
        probe = MemoryProbe(device)
        memory = profile.memory if profile is not None else guess_memory(loaded, executor)
        needs = MemoryNeeds(
            # A CPU's pages take memory when they are first written to, a card's at start.
            page=memory.page_bytes if device.type == "cpu" else 0,
            training_token=memory.training_row_bytes,
            prefill_token=memory.prefill_token_bytes,
        )
        watch = MemoryWatch(
            probe.read,
            MemoryThreshold(probe.read().total_bytes),
            needs,
            cache,
            on_near_miss=lambda: timeline.mark("near miss"),
        )
        return Scheduler(
            schedule.policy,
            make_policy(schedule.policy, schedule.settings),
            Budgets(
                token_budget,
                schedule.max_num_seqs,
                executor.page_size,
                ttft_s=ttft_s,
                tbt_s=tbt_s,
            ),
            costs=costs,
            timeline=timeline,
            memory=watch,
            clock=self._clock,
        )

    def _learning_service(self, served: _Served) -> LearningService:
        from .learning.service import LearningService

        return LearningService(
            self.config.learning,
            served_name=served.served_name,
            loaded=served.loaded,
            codec=served.codec,
            adapters=served.adapters,
            cache=served.cache,
            engine=served.engine,
            background=served.background,
            scheduler=served.scheduler,
            device=served.device,
            max_lora_rank=self.config.adapters.max_lora_rank,
            sm_share=self.config.lanes.sm_share,
            clock=self._clock,
        )

    async def _free_memory(self, lane: Lane) -> None:
        """Drop the model; on a GPU give what the allocator holds back to the device."""
        self._parts = None
        if lane.device.type == "cuda":
            await lane.run(torch.cuda.empty_cache)

    # -- requests --------------------------------------------------------------------------------

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        model: str | None = None,
        priority: int = 0,
        request_id: str | None = None,
        record: bool | None = None,
        source: str | None = None,
        request_class: RequestClass = "interactive",
    ) -> ResponseStream:
        """Answer a conversation.

        Args:
            messages: roles and texts, oldest first.
            params: how to choose tokens (the model's own defaults).
            model: the served model's name, an adapter's, or ``adapter@version`` (the served model).
            priority: lower goes first; one level is worth a minute of waiting.
            request_id: unique among the live ones (made up).
            record: keep the answers so that feedback by their ids works (as configured).
            source: whose they are, for `forget` ("local").
            request_class: "interactive" answers have latency targets; "batch" ones stand behind
                those that came within half a minute, and come when they can.

        Returns at once; what is wrong is raised when the stream is entered or awaited.
        """

        def encode(codec: TextCodec) -> Sequence[int]:
            return codec.encode_chat(messages)

        return self._request(
            "chatcmpl",
            encode,
            _chars(messages),
            params,
            model,
            priority,
            request_id,
            lambda learning: learning.ticket(model, source, tuple(messages), record),
            request_class,
        )

    def complete(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        model: str | None = None,
        priority: int = 0,
        request_id: str | None = None,
        record: bool | None = None,
        source: str | None = None,
        request_class: RequestClass = "interactive",
    ) -> ResponseStream:
        """Continue a text, or token ids. Otherwise like `chat`."""

        def encode(codec: TextCodec) -> Sequence[int]:
            if isinstance(prompt, str):
                return codec.encode(prompt)
            return _check_token_ids(prompt, self._served.loaded.vocab_size)

        size = len(prompt) if isinstance(prompt, str) else 0
        return self._request(
            "cmpl",
            encode,
            size,
            params,
            model,
            priority,
            request_id,
            lambda learning: learning.ticket(model, source, None, record),
            request_class,
        )

    def _request(
        self,
        prefix: str,
        encode: Callable[[TextCodec], Sequence[int]],
        size: int,
        params: SamplingParams | None,
        model: str | None,
        priority: int,
        request_id: str | None,
        ticket: Callable[[LearningService], object],
        request_class: RequestClass,
    ) -> ResponseStream:
        async def admit(request_id: str) -> tuple[Engine, Request]:
            engine = self._served.engine
            try:
                return engine, await self._admit(
                    request_id,
                    encode,
                    size,
                    params or SamplingParams(),
                    model,
                    priority,
                    ticket,
                    request_class,
                )
            except CotuneError as error:
                for kind, reason in _REASONS:
                    if isinstance(error, kind):
                        engine.count_rejection(reason)
                        break
                raise

        if request_id is None:
            request_id = f"{prefix}-{uuid.uuid4().hex}"
        return ResponseStream(request_id, admit)

    async def _admit(
        self,
        request_id: str,
        encode: Callable[[TextCodec], Sequence[int]],
        size: int,
        params: SamplingParams,
        model: str | None,
        priority: int,
        ticket: Callable[[LearningService], object],
        request_class: RequestClass,
    ) -> Request:
        """Check everything, tokenize, and hand the request to the engine."""
        served = self._served
        arrival_s = self._clock()
        _check_request_id(request_id)
        _check_priority(priority)
        _check_class(request_class)
        params.validate(vocab_size=served.loaded.vocab_size)
        served.engine.check_room()
        async with AsyncExitStack() as holds:
            # A wrong name is refused before any work. An old version comes from disk.
            is_here = self._is_resident(model)
            if not is_here:
                assert model is not None
                assert served.learning is not None
                await holds.enter_async_context(served.learning.held(model))
            if size > LARGE_TEXT_CHARS:
                prompt = tuple(await asyncio.to_thread(encode, served.codec))
            else:
                prompt = tuple(encode(served.codec))
            if not prompt:
                raise RequestError(
                    "the prompt is empty; give at least one token",
                    param="prompt",
                    code="empty_prompt",
                )
            params = params.resolve(served.loaded.generation_defaults)
            request = Request(
                request_id=request_id,
                prompt=prompt,
                params=params,
                max_tokens=served.engine.limit_tokens(len(prompt), params),
                seed=self._seeds.resolve(params),
                version=self._resolve(model),  # the live one of now, nothing awaited since
                model=model or served.served_name,
                priority=priority,
                arrival_s=arrival_s,
                record=None if served.learning is None else ticket(served.learning),
                request_class=request_class,
            )
            served.engine.submit(request)
        return request

    def _is_resident(self, model: str | None) -> bool:
        """Whether `_resolve` finds the version now; False if it may be on disk.

        Raises:
            NotFoundError: there is no such model.
        """
        try:
            self._resolve(model)
        except NotFoundError:
            learning = self._served.learning
            if learning is None or model is None or not learning.is_version(model):
                raise
            return False
        return True

    def _resolve(self, model: str | None) -> AdapterVersion:
        """The weights that a request for `model` is answered by."""
        served = self._served
        name = model or served.served_name
        if name == served.served_name and served.learning is None:
            return BASE
        try:
            return served.adapters.resolve(name)
        except NotFoundError as error:
            names = ", ".join(info.id for info in self.model_names())
            raise NotFoundError(
                f"the model {model!r} does not exist; served here: {names}",
                param="model",
                code="model_not_found",
            ) from error

    # -- adapters --------------------------------------------------------------------------------

    async def load_adapter(self, name: str, path: str | Path) -> AdapterVersion:
        """Make a LoRA directory the live version of `name`.

        Requests that run under an earlier version finish on it.

        Raises:
            AdapterLoadError: the directory is unreadable or does not fit, or the name is taken.
        """
        served = self._served
        path = Path(path)
        weights = await asyncio.to_thread(
            _read_adapter, path, served.loaded, self.config.adapters.max_lora_rank
        )
        return served.adapters.add(name, weights, path)

    async def unload_adapter(self, name: str) -> None:
        """Let no new request find `name`. Those that run under it finish.

        Raises:
            NotFoundError: there is no such adapter.
        """
        self._served.adapters.remove(name)

    def model_names(self) -> tuple[ModelInfo, ...]:
        """The served model, then the adapters by name: live ones, and those that learn."""
        served = self._served
        root = str(self.config.model.source or served.loaded.name)
        tenants = self.config.learning.adapters if served.learning is not None else ()
        # Name to where the weights come from; a tenant has the base model's at first.
        names = {served.served_name: (root, served.created)}
        names |= dict.fromkeys(tenants, (root, served.created))
        names |= {
            info.version.name: (str(info.path), info.created)
            for info in served.adapters.list()
            if info.is_live and info.version.name != served.served_name
        }
        return tuple(
            ModelInfo(
                id=name,
                parent=None if name == served.served_name else served.served_name,
                root=path,
                created=created,
                max_model_len=served.max_model_len,
            )
            for name, (path, created) in names.items()
        )

    # -- learning --------------------------------------------------------------------------------

    async def feedback(
        self, event: FeedbackEvent | Mapping[str, object], *, source: str = "local"
    ) -> Acknowledgement:
        """Take what somebody says about an answer; returns when it is stored for good.

        Args:
            event: a value of `cotune.runtime.learning.events`, or the same as a mapping with the
                fields of the WebSocket's frames. Its `id`, unique per source, makes it safe to send
                again.
            source: who says it; quotas and `forget` go by it.

        Raises:
            LearningOffError: this runtime does not learn.
            RequestError, NotFoundError, ConflictError, ContextLengthError: the event is refused.
            OverloadedError: the source's quota is used up, or the queue is full.
            StorageError: the disk is full or failing.
        """
        return await self._learning.feedback(event, source=source)

    def export_feedback(self, adapter: str | None = None) -> AsyncIterator[Mapping[str, object]]:
        """All feedback that stands (of one adapter), as rows that TRL reads."""
        return self._learning.export(adapter)

    async def forget(self, source: str) -> int:
        """Remove what `source` said and was answered; how many events that was.

        Versions that were trained on it stay as they are.
        """
        return await self._learning.forget(source)

    def learning(self) -> LearningStatus:
        """Evidence of learning: what came in, what was trained, what is live and how good it is."""
        learning = self._served.learning
        return LearningStatus(enabled=False) if learning is None else learning.status()

    async def adapters(self) -> tuple[VersionRecord, ...]:
        """Every version that was learned, published or refused, by adapter and number."""
        return await self._learning.records()

    async def promote(self, model: str, *, force: bool = False) -> VersionRecord | None:
        """Let a version go live at once: ``name@7``, or ``7`` of the served model, 0 for the base.

        New requests get it from the next iteration on, running ones finish on theirs, and training
        goes on from it. A version that the gate refused needs `force`. The result is None where
        the base model is live now.

        Raises:
            NotFoundError: there is no such version.
            ConflictError: the gate refused it.
        """
        return await self._learning.promote(model, force=force)

    async def rollback(self, model: str) -> VersionRecord | None:
        """Take a live version back: what was live before it is live again (None: the base model).

        Raises:
            NotFoundError: there is no such version.
            ConflictError: it is not live.
        """
        return await self._learning.rollback(model)

    async def score(
        self,
        prompt: Sequence[int],
        completion: Sequence[int],
        *,
        model: str | None = None,
    ) -> tuple[float, ...]:
        """The log-probability of each token of `completion` after `prompt`, in the background.

        Args:
            prompt, completion: token ids, at least one each.
            model: as in `chat`.
        """
        served = self._served
        for tokens in (prompt, completion):
            if not _check_token_ids(tokens, served.loaded.vocab_size):
                raise RequestError("prompt and completion need at least one token each")
        async with AsyncExitStack() as holds:
            if not self._is_resident(model):
                await holds.enter_async_context(self._learning.held(str(model)))
            found = await served.background.score(self._resolve(model), prompt, completion)
        return tuple(token.logprob for token in found)

    @property
    def _learning(self) -> LearningService:
        learning = self._served.learning
        if learning is None:
            raise LearningOffError(
                "this runtime does not learn; start it with learning=True, or state_dir, for that",
                code="learning_off",
            )
        return learning

    # -- what there is to know -------------------------------------------------------------------

    @property
    def codec(self) -> TextCodec:
        """The model's tokenizer and chat template."""
        return self._served.codec

    @property
    def served_name(self) -> str:
        """The name that answers go under unless an adapter was asked for."""
        return self._served.served_name

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt plus answer: what the model and the KV pages allow."""
        return self._served.max_model_len

    @property
    def costs(self) -> Costs:
        """What work costs on this device, as learned by now."""
        return self._served.scheduler.costs

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken now."""
        return self._parts is not None and self._parts.engine.is_accepting

    def statistics(self) -> RuntimeStatistics:
        """A snapshot."""
        return self._served.engine.statistics()

    def timeline(self, last_s: float | None = None) -> TimelineSnapshot:
        """What each iteration and each quantum was meant to be, and what it was.

        Args:
            last_s: only of the last so many seconds (None: all that is remembered).

        Raises:
            ValueError: `last_s` is not a number of 0 or more.
        """
        return self._served.scheduler.timeline.snapshot(last_s)

    def describe(self) -> dict[str, object]:
        """What was chosen at start, for people and reports."""
        served = self._served
        device = describe_device(served.device)
        return {
            "model": served.served_name,
            "path": str(served.loaded.path),
            "device": device.device,
            "device_name": device.name,
            **served.executor.describe(),
            "page_size": served.executor.page_size,
            "num_pages": served.executor.num_pages,
            "prefix_sharing": self.config.cache.enable_prefix_sharing,
            "max_model_len": served.max_model_len,
            "max_num_seqs": self.config.schedule.max_num_seqs,
            "max_num_batched_tokens": served.token_budget,
            "policy": self.config.schedule.policy,
            "max_loras": self.config.adapters.max_loras,
            "state_dir": None if served.learning is None else str(served.learning.state.path),
        }

    def add_listener(self, listener: Listener) -> None:
        """Tell `listener` about requests from now on."""
        self._listeners.add(listener)

    def remove_listener(self, listener: Listener) -> None:
        """Stop telling it."""
        self._listeners.remove(listener)

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests and let those that are here finish.

        Those that have not after `timeout_s` end with `DrainingError`. Returns when no page is in
        use; the runtime takes no request after that.
        """
        await self._served.engine.drain(timeout_s)

    @property
    def _served(self) -> _Served:
        if self._parts is None:
            raise RuntimeError("the runtime is not running; use it in 'async with Runtime(...)'")
        return self._parts


# -- on the lane's thread --------------------------------------------------------------------------


def _load_model(
    config: RuntimeConfig, device: torch.device, token_budget: int
) -> tuple[LoadedModel, StepExecutor, TextCodec]:
    """Read the model and make what runs it. Blocks for as long as that takes."""
    # These bring transformers, which takes two seconds to import.
    from .executor import Executor
    from .loading import load_model
    from .tokenization import TextCodec

    model = config.model
    try:
        loaded = load_model(
            model.source,
            device=device,
            dtype=model.dtype,
            max_model_len=model.max_model_len,
            trust_remote_code=model.trust_remote_code,
            revision=model.revision,
        )
        executor = Executor.create(
            loaded,
            device=device,
            cache=config.cache,
            max_num_batched_tokens=token_budget,
            max_num_seqs=config.schedule.max_num_seqs,
            record_decodes=config.lanes.cuda_graphs,
        )
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ModelLoadError(
            f"the model does not fit into the memory of {device} ({error}); choose a smaller model "
            "or dtype, lower cache.memory_fraction, or free memory",
            param="model",
            code="out_of_memory",
        ) from error
    return loaded, executor, TextCodec(loaded.tokenizer)


def inference_threads(config: RuntimeConfig, device: torch.device) -> int | None:
    """Intra-op threads of the inference lane: the training lane's come from the same cores."""
    threads = config.lanes.inference_threads
    if threads is None and device.type == "cpu" and config.learning.enabled:
        return max(1, torch.get_num_threads() - config.learning.training.threads)
    return threads


def _text_maker(codec: TextCodec) -> Callable[[Sequence[int], SamplingParams], AnswerText]:
    def make(prompt: Sequence[int], params: SamplingParams) -> AnswerText:
        detokenizer = codec.detokenizer(prompt, skip_special_tokens=params.skip_special_tokens)
        return AnswerText(detokenizer, params)

    return make


def _read_adapter(path: Path, loaded: LoadedModel, max_rank: int) -> Any:
    return read_lora(path, loaded.model, max_rank=max_rank)


# -- checks ----------------------------------------------------------------------------------------


def _chars(messages: object) -> int:
    """About how much text the messages hold; what is malformed is for the codec to refuse."""
    total = 0
    for message in messages if isinstance(messages, (list, tuple)) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, str):
            total += len(content)
        elif isinstance(content, (list, tuple)):
            texts = (part.get("text") for part in content if isinstance(part, Mapping))
            total += sum(len(text) for text in texts if isinstance(text, str))
    return total


def _check_token_ids(prompt: object, vocab_size: int) -> Sequence[int]:
    if isinstance(prompt, (bytes, bytearray)) or not isinstance(prompt, Sequence):
        raise RequestError(
            f"the prompt must be a text or a list of token ids, not {type(prompt).__name__}",
            param="prompt",
        )
    for index, token in enumerate(prompt):
        if isinstance(token, bool) or not isinstance(token, int):
            raise RequestError(
                f"prompt.{index}: a token id must be an integer, not {token!r}",
                param=f"prompt.{index}",
            )
        if not 0 <= token < vocab_size:
            raise RequestError(
                f"prompt.{index}: token id {token} is not from 0 to {vocab_size - 1}",
                param=f"prompt.{index}",
            )
    return prompt


def _check_request_id(request_id: object) -> None:
    if not isinstance(request_id, str) or not 0 < len(request_id) <= MAX_REQUEST_ID_CHARS:
        raise RequestError(
            f"request_id must be a string of 1 to {MAX_REQUEST_ID_CHARS} characters",
            param="request_id",
        )


def _check_class(request_class: object) -> None:
    if request_class not in get_args(RequestClass):
        raise RequestError(
            f"request_class is {request_class!r}; use one of {', '.join(get_args(RequestClass))}",
            param="request_class",
        )


def _check_priority(priority: object) -> None:
    if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > 2**31:
        raise RequestError(
            f"priority is {priority!r}; it must be an integer (lower goes first)", param="priority"
        )
