"""The learning half of a runtime: opened after the engine, closed before it.

    state directory ─► feedback store ─► versions that were live ─► one learner per adapter

It composes the parts of this package and is what `Runtime` talks to. Everything here runs on the
event loop; training runs on a lane of its own, disk writes on threads.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Self

from ...streams.lane import Lane
from ..errors import ConfigError, DrainingError, NotFoundError, RequestError, StorageError
from ..fingerprint import model_fingerprint
from ..lora import read_lora
from ..training.safepoints import Safepoints
from .examiner import Examiner
from .intake import Intake
from .learner import Learner
from .probe import read_probe
from .publisher import Publisher
from .sqlite_store import SqliteBackend
from .state_directory import StateDirectory
from .status import LearningStatus
from .store import FeedbackStore, RecordedResponse
from .versions import VersionStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    import torch

    from ...cache.manager import KVCacheManager
    from ..adapters import AdapterStore
    from ..background import Background
    from ..engine import Engine
    from ..loading import LoadedModel
    from ..lora import LoraWeights
    from ..scheduling.desk import TrainingDesk
    from ..scheduling.scheduler import Scheduler
    from ..tokenization import TextCodec
    from ..training.trainer import Trainer
    from ..types import AdapterVersion, Message, Response, SamplingParams
    from .config import LearningConfig
    from .events import Acknowledgement, FeedbackEvent
    from .store import NewSample
    from .versions import VersionRecord

log = logging.getLogger(__name__)

EXPIRY_INTERVAL_S = 300.0
"""How often retention is enforced."""
MAX_DIGITS = 15
"""Of a version's number."""


class RecordTicket:
    """What is to be recorded with the answers to one request; travels with it."""

    __slots__ = ("adapter", "messages", "source")

    def __init__(self, adapter: str, source: str, messages: tuple[Message, ...] | None) -> None:
        self.adapter = adapter
        self.source = source
        self.messages = messages


class LearningService:
    """Takes feedback, learns from it and publishes what is better. An async context manager.

    Args:
        config: validated.
        served_name: the adapter that requests get unless they name another.
        loaded: the model.
        codec: its tokenizer.
        adapters: in which `served_name` and `config.adapters` are learned names.
        cache, engine, background, scheduler: of the runtime.
        device: of the training lane.
        max_lora_rank: highest rank that a slot takes.
        sm_share: of a card's multiprocessors that the training lane may use.
        clock: seconds, monotonic.

    Entering raises `ConfigError` where the state directory cannot be used.
    """

    def __init__(
        self,
        config: LearningConfig,
        *,
        served_name: str,
        loaded: LoadedModel,
        codec: TextCodec,
        adapters: AdapterStore,
        cache: KVCacheManager,
        engine: Engine,
        background: Background,
        scheduler: Scheduler,
        device: torch.device,
        max_lora_rank: int,
        sm_share: float | None,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._served_name = served_name
        self._loaded = loaded
        self._codec = codec
        self._adapters = adapters
        self._cache = cache
        self._engine = engine
        self._device = device
        self._max_lora_rank = max_lora_rank
        self._sm_share = sm_share
        self._clock = clock
        self.state = (
            StateDirectory(config.state_dir)
            if config.state_dir is not None
            else StateDirectory.default(served_name)
        )
        self.background = background
        self._scheduler = scheduler
        self.safepoints = Safepoints()
        self._max_length = min(
            config.training.max_length or engine.max_model_len, engine.max_model_len
        )
        self._stack: AsyncExitStack | None = None
        self._store: FeedbackStore
        self._versions: VersionStore
        self._intake: Intake
        self._learners: dict[str, Learner] = {}

    # -- life ------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        config, state = self._config, self.state
        self._check_names()
        async with AsyncExitStack() as stack:
            probe = await asyncio.to_thread(self._read_probe)
            self._versions = await asyncio.to_thread(VersionStore, state.adapters)
            stack.callback(self._versions.close)
            fingerprint = await asyncio.to_thread(model_fingerprint, self._loaded.path)
            base = (self._loaded.name, fingerprint)
            await asyncio.to_thread(state.claim, *base)
            self._store = await stack.enter_async_context(
                FeedbackStore(partial(SqliteBackend, state.feedback), config.feedback)
            )
            lane = Lane(
                "training",
                device=self._device,
                threads=config.training.threads,
                sm_share=self._sm_share,
            )
            stack.enter_context(lane)
            desk = self._scheduler.open_training(lane, self.safepoints)
            stack.callback(self._scheduler.close_training)
            stack.callback(self.safepoints.close)
            for name in (self._served_name, *config.adapters):
                self._learners[name] = await self._make_learner(name, desk, probe, base)
            self._intake = Intake(
                self._store,
                self._codec,
                eos_token_ids=_end_tokens(self._loaded),
                max_length=self._max_length,
                held_out_share=config.gate.held_out_share,
                learner_of=self.learner_of,
                learning=self._learners.keys(),
            )
            group = await stack.enter_async_context(asyncio.TaskGroup())
            tasks = [
                group.create_task(learner.run(), name=f"cotune-learner-{name}")
                for name, learner in self._learners.items()
            ]
            tasks.append(group.create_task(self._keep_house(), name="cotune-retention"))
            tasks.append(group.create_task(self._prepare_imported(), name="cotune-imports"))
            review = self._scheduler.look_after_trainers()
            tasks.append(group.create_task(review, name="cotune-trainer-memory"))
            stack.callback(_cancel, tasks)
            if config.feedback.record_responses:
                self._engine.record_with(self._record)
                stack.callback(self._engine.record_with, None)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop learning; what was learned since the last version is in the checkpoint."""
        stack, self._stack = self._stack, None
        assert stack is not None
        self.safepoints.close()  # a quantum that waits goes on, and ends
        await stack.aclose()

    def _check_names(self) -> None:
        for name in (self._served_name, *self._config.adapters):
            if "@" in name:
                raise ConfigError(
                    f"{name!r} cannot learn: '@' separates a name from its version; serve it under "
                    "another name",
                    param="learning.adapters" if name != self._served_name else "model.served_name",
                    code="invalid_config",
                )
        if self._served_name in self._config.adapters:
            raise ConfigError(
                f"learning.adapters names {self._served_name!r}, the served model, which learns "
                "without being named; leave it out",
                param="learning.adapters",
                code="invalid_config",
            )

    async def _make_learner(
        self,
        name: str,
        desk: TrainingDesk,
        probe: tuple[tuple[int, ...], ...],
        base: tuple[str, str],
    ) -> Learner:
        examiner = Examiner(self.background, probe, max_length=self._engine.max_model_len)
        publisher = Publisher(
            name,
            versions=self._versions,
            adapters=self._adapters,
            cache=self._cache,
            background=self.background,
            read=self._read_adapter,
            warm=self._config.warm_prefixes,
            on_live=lambda what: self._scheduler.timeline.mark("publication", what),
        )
        await publisher.start()
        return Learner(
            name,
            config=self._config,
            store=self._store,
            examiner=examiner,
            publisher=publisher,
            versions=self._versions,
            adapters=self._adapters,
            desk=desk,
            memory=self._scheduler.trainer_memory,
            make_trainer=self._make_trainer,
            directory=self.state.training(name),
            base=base,
            clock=self._clock,
        )

    def _make_trainer(self) -> Trainer:
        """On the training lane."""
        from ..training.trainer import Trainer  # brings peft, which takes seconds to import

        return Trainer(
            self._loaded.model,
            self._config.training,
            safepoints=self.safepoints,
            base_name=str(self._loaded.path),
            max_length=self._max_length,
            stop_token_ids=self._loaded.eos_token_ids,
        )

    def _read_adapter(self, path: Path) -> LoraWeights:
        return read_lora(path, self._loaded.model, max_rank=self._max_lora_rank)

    def _read_probe(self) -> tuple[tuple[int, ...], ...]:
        texts = read_probe(self._config.gate.probe_file)
        return tuple(tuple(self._codec.encode(text)) for text in texts)

    async def _keep_house(self) -> None:
        """Enforce retention, for ever."""
        while True:
            try:
                await self._store.expire(datetime.now(UTC))
            except StorageError as error:
                log.error("what is past its retention is still there: %s", error)
            await asyncio.sleep(EXPIRY_INTERVAL_S)

    async def _prepare_imported(self) -> None:
        """Make samples of events that were stored without a model at hand, for ever."""
        seen, after_key = -1, 0
        with suppress(DrainingError):
            while True:
                seen = await self._store.wait_change(seen)
                try:
                    while events := await self._store.unprepared(after_key=after_key):
                        for stored in events:
                            samples = await self._samples_of(stored.event)
                            await self._store.prepare(stored.key, samples)
                        after_key = events[-1].key
                except StorageError as error:
                    log.error("imported feedback waits for the disk: %s", error)

    async def _samples_of(self, event: FeedbackEvent) -> Sequence[NewSample]:
        try:
            return await self._intake.prepare(event)
        except RequestError as error:
            log.warning("imported feedback %s cannot be learned from: %s", event.id, error)
            return ()

    # -- answers ---------------------------------------------------------------------------------

    def ticket(
        self,
        model: str | None,
        source: str | None,
        messages: tuple[Message, ...] | None,
        record: bool | None,
    ) -> RecordTicket | None:
        """What travels with a request whose answers are to be recorded; None if they are not."""
        if record is False or not self._config.feedback.record_responses:
            return None
        name = (model or self._served_name).partition("@")[0]
        if name not in self._learners:
            return None
        return RecordTicket(name, source or "local", messages)

    def _record(self, ticket: object, response: Response, params: SamplingParams) -> None:
        """An answer has ended: keep it, so that feedback on it finds it."""
        assert isinstance(ticket, RecordTicket)
        if response.finish_reason == "error" or not response.token_ids:
            return
        self._store.record(
            RecordedResponse(
                id=response.id,
                adapter=ticket.adapter,
                version=response.adapter_version.version,
                model=response.model,
                source=ticket.source,
                prompt_ids=response.prompt_token_ids,
                completion_ids=response.token_ids,
                text=response.text,
                messages=ticket.messages,
                sampling=_sampling(params),
                finish_reason=response.finish_reason,
                created_s=datetime.now(UTC).timestamp(),
            )
        )

    @asynccontextmanager
    async def held(self, model: str) -> AsyncIterator[AdapterVersion]:
        """A version named ``name@7``, in memory for as long as the block lasts.

        Raises:
            NotFoundError: there is no such version.
        """
        name, number = self._parse(model)
        async with self._learner(name).publisher.held(number) as version:
            yield version

    def is_version(self, model: str) -> bool:
        """Whether `model` is written as a numbered version of an adapter that learns."""
        name, separator, number = model.rpartition("@")
        return bool(separator) and name in self._learners and _is_number(number)

    def publisher(self, adapter: str) -> Publisher:
        """Who changes which version of `adapter` is live.

        Raises:
            NotFoundError: it does not learn.
        """
        return self._learner(adapter).publisher

    @property
    def versions(self) -> VersionStore:
        """The versions on disk."""
        return self._versions

    # -- feedback --------------------------------------------------------------------------------

    async def feedback(
        self, event: FeedbackEvent | Mapping[str, object], *, source: str
    ) -> Acknowledgement:
        """See `Intake.take`."""
        return await self._intake.take(event, source=source)

    def export(self, adapter: str | None) -> AsyncIterator[Mapping[str, object]]:
        """Every event that stands, as rows that TRL reads."""
        if adapter is not None:
            self._learner(adapter)
        return self._store.export(adapter)

    async def forget(self, source: str) -> int:
        """Remove all that a person said and was answered."""
        return await self._store.forget(source)

    def learner_of(self, model: str | None) -> str:
        """The adapter that learns from feedback on `model`.

        Raises:
            NotFoundError: it does not learn.
        """
        name = (model or self._served_name).partition("@")[0]
        self._learner(name)
        return name

    # -- versions --------------------------------------------------------------------------------

    async def records(self) -> tuple[VersionRecord, ...]:
        """Every version on disk, of all adapters."""
        return await asyncio.to_thread(self._versions.records)

    async def promote(self, model: str, *, force: bool = False) -> VersionRecord | None:
        """Let ``name@7``, or ``7`` of the served model, go live. None: that is the base model."""
        name, number = self._parse(model)
        return await self._learner(name).publisher.promote(number, force=force)

    async def rollback(self, model: str) -> VersionRecord | None:
        """Take the live version ``name@7`` back; what is live then, None for the base model."""
        name, number = self._parse(model)
        return await self._learner(name).publisher.rollback(number)

    def _parse(self, model: str) -> tuple[str, int]:
        name, separator, number = model.rpartition("@")
        if not separator:
            name = self._served_name
        if not _is_number(number):
            raise RequestError(
                f"version is {model!r}; name one as in {self._served_name}@7, or 7",
                param="version",
                code="invalid_version",
            )
        return name, int(number)

    def _learner(self, name: str) -> Learner:
        learner = self._learners.get(name)
        if learner is None:
            raise NotFoundError(
                f"{name!r} does not learn; these do: {', '.join(self._learners)}",
                param="model",
                code="model_not_found",
            )
        return learner

    # -- evidence --------------------------------------------------------------------------------

    def status(self) -> LearningStatus:
        """How it stands; no I/O."""
        counts = self._store.counts()
        refused = dict(self._intake.refused)
        return LearningStatus(
            enabled=True,
            events=counts.events,
            refused_events=refused,
            duplicates=counts.duplicates,
            recorded_responses=counts.recorded_responses,
            adapters=tuple(learner.status() for learner in self._learners.values()),
        )


def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()


def _end_tokens(loaded: LoadedModel) -> tuple[int, ...]:
    """The tokens that end a turn, the tokenizer's own choice first."""
    own = loaded.tokenizer.eos_token_id
    return tuple(sorted(loaded.eos_token_ids, key=lambda token: (token != own, token)))


def _sampling(params: SamplingParams) -> dict[str, object]:
    """The parameters that chose the tokens of an answer."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
    return {name: getattr(params, name) for name in names}


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS
