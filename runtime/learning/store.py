"""The feedback store: what was said about which answers, and the training samples made of it.

    event loop thread                        writer thread
    ─────────────────                        ──────────────────────────────────────────────
    await store.add(...)   ── queue ──►      take everything that waits: one group
    store.record(response) ── queue ──►      begin · each operation in order · commit (one fsync)
    ◄───── one call_soon_threadsafe ─────    results, after the commit

`FeedbackStore` is that front: bounded, with group commit, the only one who talks to a `Backend`. A
backend is synchronous, used by one thread at a time, and small enough that a server database can
implement it; `sqlite_store.SqliteBackend` is ours. Rules that every backend keeps:

- An event is named by (source, id). The same frame again is a duplicate and changes nothing.
- Of one source's events about the same subject (`events.subject_of`) that were not withdrawn, the
  newest stands and supersedes the others. Withdrawing it brings the one before back.
- Ratings of one response stand together: the sign of their sum over all sources is what counts.
  Samples of ratings that disagree with it, or of all when it is 0, are "contradictory".
- A sample's state follows from that, the first that applies: "withdrawn" and "superseded" (its
  event), "refused" (`refuse_sample`), "contradictory", "pending" (reference log-probabilities are
  due), "ready".
- Keys of events and samples only grow, also across deletions and restarts.

An event may be stored before its samples are made (imported while no model was loaded): it is
`unprepared` until `prepare` is called with them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections import Counter, deque
from collections.abc import Mapping  # noqa: TC003 - dataclass fields are inspected at run time
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, Protocol, Self, TypeVar

import orjson

from ..errors import (
    ConflictError,
    CotuneError,
    DrainingError,
    NotFoundError,
    OverloadedError,
    RequestError,
)
from ..types import Message  # noqa: TC001
from .events import (
    Acknowledgement,
    FeedbackEvent,
    Withdrawal,
    as_body,
    check_source,
)
from .formats import as_row
from .quota import Quota
from .samples import TokenIds  # noqa: TC001

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from types import TracebackType

    from .config import FeedbackConfig
    from .samples import Sample

log = logging.getLogger(__name__)

T = TypeVar("T")

STATES: Final = (
    "pending",
    "ready",
    "held_out",
    "withdrawn",
    "superseded",
    "contradictory",
    "refused",
)
"""Keys of `FeedbackStore.states`; "held_out" are the ready ones that are never trained on."""
MAX_WITHDRAWAL_DEPTH: Final = 8
"""How often in a row a withdrawal may itself be withdrawn."""
MAX_GROUP: Final = 1024
"""Most operations in one transaction."""
REMOVED_AT_ONCE: Final = 1000
"""Events that one transaction removes; writers in between need not wait for the rest."""
EXPORTED_AT_ONCE: Final = 256
"""Events that are read at once for an export."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedResponse:
    """A finished answer, kept so that feedback can name it by its id.

    Attributes:
        id: as `Response.id`.
        adapter: the adapter that learns from feedback on it.
        version: of that adapter, the one that answered; 0 is the base model.
        model: the name that the request asked for.
        source: whose request it was; forgetting this source removes it.
        prompt_ids, completion_ids: as served; the end-of-turn token included if the model chose it.
        text: the completion as its reader saw it.
        messages: the conversation, or None for a plain completion.
        sampling: the parameters, as JSON has them.
        finish_reason: as `Response.finish_reason`.
        created_s: wall clock, POSIX seconds.
    """

    id: str
    adapter: str
    version: int
    model: str
    source: str
    prompt_ids: TokenIds
    completion_ids: TokenIds
    text: str
    messages: tuple[Message, ...] | None
    sampling: Mapping[str, object]
    finish_reason: str
    created_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSample:
    """A sample as the runtime makes it from an event; the store gives it its key and source.

    A "pair" has `chosen_ids` and `rejected_ids`; a "rated" sample `completion_ids` and
    `is_desirable`. `response_id` is the response it is about, if any. The texts are for exports:
    the prompt as messages, or as text where there are none.
    """

    kind: Literal["pair", "rated"]
    adapter: str
    prompt_ids: TokenIds
    is_held_out: bool
    chosen_ids: TokenIds = ()
    rejected_ids: TokenIds = ()
    completion_ids: TokenIds = ()
    is_desirable: bool | None = None
    response_id: str | None = None
    prompt_messages: tuple[Message, ...] | None = None
    prompt_text: str | None = None
    chosen_text: str | None = None
    rejected_text: str | None = None
    completion_text: str | None = None

    def __post_init__(self) -> None:
        if self.kind == "pair":
            is_whole = bool(self.chosen_ids and self.rejected_ids)
            is_whole &= not self.completion_ids and self.is_desirable is None
        else:
            is_whole = bool(self.completion_ids) and self.is_desirable is not None
            is_whole &= not (self.chosen_ids or self.rejected_ids)
        if not is_whole:
            raise ValueError(
                f"a sample of kind {self.kind!r} has other fields: {len(self.chosen_ids)} chosen, "
                f"{len(self.rejected_ids)} rejected and {len(self.completion_ids)} completion "
                f"tokens, is_desirable={self.is_desirable}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEvent:
    """An event with what the store knows of it. Keys grow in the order of arrival."""

    key: int
    source: str
    event: FeedbackEvent
    created: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFeedback:
    """An event that stands, with the texts of one sample made of it, if one was made.

    `state` is the sample's, or "unprepared", or "none" for an event that no sample was made of.
    """

    stored: StoredEvent
    state: str
    adapter: str | None = None
    response_id: str | None = None
    prompt: tuple[Message, ...] | str | None = None
    chosen: str | None = None
    rejected: str | None = None
    completion: str | None = None
    is_desirable: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendCounts:
    """What is stored, kept in memory: events by type, and responses (expired ones too, until
    `expire` removes them)."""

    events: Mapping[str, int]
    recorded_responses: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreCounts:
    """What is stored, and what came since the store was opened.

    Attributes:
        events: stored events by type, withdrawn ones included.
        recorded_responses: responses that can be rated (expired ones count until `expire`).
        refused: events that were not taken, by error code, since the start.
        duplicates: events that had been stored before, since the start.
        dropped_responses: responses that could not be recorded, since the start.
        pending: operations that wait for the writer now.
    """

    events: Mapping[str, int] = field(default_factory=dict)
    recorded_responses: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)
    duplicates: int = 0
    dropped_responses: int = 0
    pending: int = 0


class Backend(Protocol):
    """What a database does. Synchronous; one thread; every call but `close` in a `transaction`.

    Raises `StorageError` where the disk fails, and then the transaction has left no trace. Times
    are POSIX seconds of the wall clock.
    """

    def transaction(self, *, durable: bool) -> AbstractContextManager[None]:
        """Commit when the block ends, roll back when it raises.

        A durable one has reached the disk when the block has ended. One that is not survives the
        end of the process, but perhaps not that of the machine.
        """

    def close(self) -> None:
        """Let go of the database. The last call."""

    def counts(self) -> BackendCounts:
        """What is stored, as of the calls so far."""

    # -- responses

    def record(self, response: RecordedResponse, *, keep: int) -> None:
        """Store it in place of one with the same id; of more than `keep`, drop the oldest."""

    def response(self, response_id: str, *, since_s: float) -> RecordedResponse | None:
        """The response with this id, if it was created at `since_s` or later."""

    # -- events

    def find(self, source: str, event_id: str) -> bytes | None:
        """The body that is stored under (source, id)."""

    def recent(self, since_s: float) -> Sequence[tuple[str, float]]:
        """Source and time of the events since then, oldest first."""

    def add(
        self,
        event: FeedbackEvent,
        *,
        source: str,
        body: bytes,
        created_s: float,
        samples: Sequence[NewSample] | None,
    ) -> None:
        """Store a new event and its samples (None: they are made later), by the rules above.

        (source, id) is not stored yet, and the target of a `Withdrawal` is.
        """

    def unprepared(self, *, after_key: int, limit: int) -> tuple[StoredEvent, ...]:
        """Events that stand and have no samples yet, oldest first."""

    def prepare(self, key: int, samples: Sequence[NewSample]) -> None:
        """Store the samples of an unprepared event. An event that is gone is passed over."""

    def export(
        self, adapter: str | None, *, after_key: int, limit: int
    ) -> tuple[StoredFeedback, ...]:
        """Feedback that stands, of the next `limit` events that have any; () at the end.

        Events keep their order, and all samples of an event come together. With `adapter`, samples
        of that one, and unprepared events whose `model` it is.
        """

    # -- samples

    def pending(self, adapter: str, *, limit: int) -> tuple[Sample, ...]:
        """See `FeedbackStore.pending`."""

    def samples(
        self, adapter: str, *, held_out: bool, limit: int, after_key: int
    ) -> tuple[Sample, ...]:
        """See `FeedbackStore.samples`."""

    def set_reference(self, key: int, first: float, second: float | None) -> None:
        """See `FeedbackStore.set_reference`. A sample that is gone is passed over."""

    def refuse_sample(self, key: int, reason: str) -> None:
        """See `FeedbackStore.refuse_sample`. A sample that is gone is passed over."""

    def states(self, adapter: str) -> Mapping[str, int]:
        """How many samples are in each of `STATES`; those with none may be missing."""

    # -- removal

    def forget(self, source: str, *, limit: int) -> int:
        """Remove all of a person's responses, and at most `limit` of the events with their data.

        Those are the person's own and those about the person's responses; withdrawals of them go
        along. Returns how many events were removed; fewer than `limit` says that none is left. When
        the transaction has ended no removed text is left in any file.
        """

    def expire(
        self, *, responses_before_s: float, events_before_s: float | None, limit: int
    ) -> int:
        """Remove older responses, and at most `limit` older events with what they replaced.

        Returns how many events were removed; fewer than `limit` says that none is left.
        """


def _never(_: object) -> bool:
    return False


def _always(_: object) -> bool:
    return True


class FeedbackStore:
    """The store as the event loop sees it: every method is quick or awaits the writer thread.

    Args:
        open_backend: opens the database; called on the writer thread.
        config: retention, quotas and bounds.
        clock: the time of day, with a time zone.

    Use as an async context manager on one event loop. Entering raises what `open_backend` raises.
    Leaving writes everything that was handed in, then closes the database; later calls raise
    `DrainingError`.

    All methods that await raise `StorageError` when the disk is full or failing: then nothing of
    that call was stored. The writer goes on, and calls succeed again when the disk does.
    A cancelled call may still be carried out; sending its event again tells.
    """

    def __init__(
        self,
        open_backend: Callable[[], Backend],
        config: FeedbackConfig,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._open_backend = open_backend
        self._config = config
        self._clock = clock
        self._quota = Quota(config.quota_events, config.quota_window_s)  # of the writer thread
        self._queue: deque[_Operation[Any]] = deque()
        self._wake = threading.Condition()  # guards _queue and _is_open
        self._is_open = False
        # What follows belongs to the event loop's thread.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Future[None] | None = None
        self._stored = BackendCounts(events={}, recorded_responses=0)
        self._refused: Counter[str] = Counter()
        self._duplicates = 0
        self._dropped = 0
        self._changes = 0
        self._changed = asyncio.Event()

    # -- life ------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._loop is not None:
            raise RuntimeError("a feedback store is opened once; make a new one")
        self._loop = asyncio.get_running_loop()
        opened: asyncio.Future[None] = self._loop.create_future()
        self._ended = self._loop.create_future()
        self._is_open = True
        threading.Thread(
            target=self._write, args=(opened,), name="cotune-feedback-store", daemon=True
        ).start()
        try:
            await asyncio.shield(opened)
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        """Let the writer finish its queue and end. Cancellation waits until it has."""
        with self._wake:
            self._is_open = False
            self._wake.notify()
        self._changed.set()
        assert self._ended is not None, "set before the thread starts"
        cancelled: asyncio.CancelledError | None = None
        while not self._ended.done():
            try:
                await asyncio.shield(self._ended)
            except asyncio.CancelledError as error:
                cancelled = cancelled or error
        if cancelled is not None:
            try:
                raise cancelled
            finally:
                del cancelled

    # -- responses -------------------------------------------------------------------------------

    def record(self, response: RecordedResponse) -> None:
        """Have a response stored. Never waits and never raises: if the queue is full, or the disk,
        it is dropped and counted."""
        keep = self._config.max_responses

        def record(backend: Backend) -> None:
            backend.record(response, keep=keep)

        operation = _Operation(record, is_durable=False)
        with self._wake:
            is_taken = self._is_open and len(self._queue) < self._config.max_pending
            if is_taken:
                self._queue.append(operation)
                self._wake.notify()
        if not is_taken:
            self._dropped += 1

    async def response(self, response_id: str) -> RecordedResponse:
        """The recorded response of this id; one handed to `record` before is seen.

        Raises:
            NotFoundError: of code "response_not_found": never recorded, expired, or removed.
            OverloadedError: of code "feedback_queue_full".
        """
        since_s = self._now_s() - self._config.response_retention_s

        def look_up(backend: Backend) -> RecordedResponse:
            found = backend.response(response_id, since_s=since_s)
            if found is None:
                raise NotFoundError(
                    f"response_id is {response_id!r}, and no response of this id is recorded; "
                    f"responses can be rated for {self._config.response_retention_s:g} s "
                    "(learning.feedback.response_retention_s) unless recording is off",
                    param="response_id",
                    code="response_not_found",
                )
            return found

        with self._counting_refusals():
            return await self._call(look_up, is_bounded=True)

    # -- events ----------------------------------------------------------------------------------

    async def add(
        self,
        event: FeedbackEvent,
        *,
        source: str,
        samples: Sequence[NewSample] | None,
    ) -> Acknowledgement:
        """Store an event and what is trained on because of it, in one transaction.

        Args:
            event: checked by `parse_event` or `check_event`.
            source: whose word it is; 1 to 256 printable characters.
            samples: made of it; () if it yields none, None if they are made later (`unprepared`).

        Returns: after the event has reached the disk. A duplicate changed nothing.

        Raises:
            OverloadedError: of code "feedback_queue_full" or "quota_exceeded" (no duplicate is).
            ConflictError: of code "id_reused" if this source has sent another event under the id;
                of code "withdrawn_too_often" for a chain of withdrawals of withdrawals.
            NotFoundError: of param "target" if this source has sent no event of that id.
            StorageError, RequestError (for the source).
        """
        with self._counting_refusals():
            check_source(source)
            body = orjson.dumps(as_body(event), option=orjson.OPT_SORT_KEYS)

            def add(backend: Backend) -> Acknowledgement:
                return self._add(backend, event, source, body, samples)

            acknowledgement = await self._call(
                add, is_bounded=True, has_changed=lambda outcome: not outcome.duplicate
            )
        self._duplicates += acknowledgement.duplicate
        return acknowledgement

    def _add(
        self,
        backend: Backend,
        event: FeedbackEvent,
        source: str,
        body: bytes,
        samples: Sequence[NewSample] | None,
    ) -> Acknowledgement:
        """On the writer thread. Refuses before anything is written."""
        stored = backend.find(source, event.id)
        if stored == body:
            return Acknowledgement(id=event.id, duplicate=True)
        if stored is not None:
            raise ConflictError(
                f"id is {event.id!r}, under which this source has sent another "
                f"{orjson.loads(stored)['type']} event; give every event an id of its own",
                param="id",
                code="id_reused",
            )
        if isinstance(event, Withdrawal):
            _check_target(backend, source, event)
        now_s = self._now_s()
        self._quota.take(source, now_s)
        backend.add(event, source=source, body=body, created_s=now_s, samples=samples)
        return Acknowledgement(id=event.id, duplicate=False)

    async def has(self, event: FeedbackEvent, *, source: str) -> bool:
        """Whether this source has sent this very event before."""
        body = orjson.dumps(as_body(event), option=orjson.OPT_SORT_KEYS)
        return await self._call(lambda b: b.find(source, event.id) == body)

    async def unprepared(self, *, after_key: int = 0, limit: int = 256) -> tuple[StoredEvent, ...]:
        """Events that stand and whose samples are still to be made, oldest first."""
        return await self._call(lambda b: b.unprepared(after_key=after_key, limit=limit))

    async def prepare(self, key: int, samples: Sequence[NewSample]) -> None:
        """Store the samples, perhaps none, of an unprepared event; does nothing if it is gone."""
        await self._call(lambda b: b.prepare(key, samples), has_changed=_always)

    async def export(self, adapter: str | None = None) -> AsyncIterator[Mapping[str, object]]:
        """The feedback that stands (of one adapter), oldest first, as rows that TRL reads.

        See `formats.as_row`. Events that are stored meanwhile may be among them.
        """
        after_key = 0
        while page := await self._export_page(adapter, after_key):
            for feedback in page:
                yield as_row(feedback)
            after_key = page[-1].stored.key

    async def _export_page(self, adapter: str | None, after_key: int) -> tuple[StoredFeedback, ...]:
        return await self._call(
            lambda b: b.export(adapter, after_key=after_key, limit=EXPORTED_AT_ONCE)
        )

    # -- samples ---------------------------------------------------------------------------------

    async def pending(self, adapter: str, limit: int) -> tuple[Sample, ...]:
        """Samples that await their reference log-probabilities, oldest first."""
        return await self._call(lambda b: b.pending(adapter, limit=limit))

    async def set_reference(self, values: Sequence[tuple[int, float, float | None]]) -> None:
        """Store reference log-probs: (key, chosen, rejected) or, if rated, (key, logp, None).

        Samples that are gone are passed over. Raises `ValueError` for what is not finite.
        """
        for key, first, second in values:
            if not math.isfinite(first) or (second is not None and not math.isfinite(second)):
                raise ValueError(
                    f"reference log-probabilities of sample {key} are {first} and {second}; "
                    "refuse the sample instead"
                )

        def set_all(backend: Backend) -> None:
            for key, first, second in values:
                backend.set_reference(key, first, second)

        await self._call(set_all, has_changed=_always)

    async def samples(
        self, adapter: str, *, held_out: bool, limit: int, after_key: int = 0
    ) -> tuple[Sample, ...]:
        """Ready samples with keys above `after_key`: the latest `limit` of them, oldest first."""
        return await self._call(
            lambda b: b.samples(adapter, held_out=held_out, limit=limit, after_key=after_key)
        )

    async def refuse_sample(self, key: int, reason: str) -> None:
        """Never offer this sample again; it cannot be trained on."""
        await self._call(lambda b: b.refuse_sample(key, reason), has_changed=_always)

    async def states(self, adapter: str) -> Mapping[str, int]:
        """How many samples of this adapter are in each of `STATES`."""
        found = await self._call(lambda b: b.states(adapter))
        return {state: found.get(state, 0) for state in STATES}

    async def wait_change(self, seen: int) -> int:
        """Wait until samples have come, gone or changed since an earlier call returned `seen`.

        Begin with 0, or with `changes`. Raises `DrainingError` once the store is closed.
        """
        while self._changes == seen:
            if not self._is_open:
                raise _closed()
            await self._changed.wait()
        return self._changes

    @property
    def changes(self) -> int:
        """How often samples have come, gone or changed; for `wait_change`."""
        return self._changes

    # -- removal ---------------------------------------------------------------------------------

    async def forget(self, source: str) -> int:
        """Remove all of a person's data: events, samples and responses, and what others said about
        those responses. Returns the number of events removed.

        Nothing of it is left in the store's files afterwards.
        """
        check_source(source)

        def forget(backend: Backend) -> int:
            self._quota.forget(source)
            return backend.forget(source, limit=REMOVED_AT_ONCE)

        return await self._remove(forget)

    async def expire(self, now: datetime | None = None) -> int:
        """Remove what is older than its retention. Returns the number of events removed."""
        now_s = self._now_s() if now is None else now.timestamp()
        config = self._config
        events_before_s = (
            None if config.event_retention_s is None else now_s - config.event_retention_s
        )

        def expire(backend: Backend) -> int:
            self._quota.sweep(now_s)
            return backend.expire(
                responses_before_s=now_s - config.response_retention_s,
                events_before_s=events_before_s,
                limit=REMOVED_AT_ONCE,
            )

        return await self._remove(expire)

    async def _remove(self, remove: Callable[[Backend], int]) -> int:
        """Call `remove` until it finds less than it may remove at once; the sum."""
        total = 0
        while True:
            removed = await self._call(remove, has_changed=bool)
            total += removed
            if removed < REMOVED_AT_ONCE:
                return total

    # -- evidence --------------------------------------------------------------------------------

    def counts(self) -> StoreCounts:
        """What is stored and what came, from memory."""
        return StoreCounts(
            events=self._stored.events,
            recorded_responses=self._stored.recorded_responses,
            refused=dict(self._refused),
            duplicates=self._duplicates,
            dropped_responses=self._dropped,
            pending=len(self._queue),
        )

    def count_refusal(self, error: CotuneError) -> None:
        """Count an event that was refused before it came here (a malformed frame, a text that is
        too long). What `add` and `response` raise is counted by them."""
        self._refused[error.code or type(error).__name__] += 1

    @contextmanager
    def _counting_refusals(self) -> Iterator[None]:
        try:
            yield
        except CotuneError as error:
            self.count_refusal(error)
            raise

    # -- between the threads ---------------------------------------------------------------------

    def _now_s(self) -> float:
        return self._clock().timestamp()

    async def _call(
        self,
        run: Callable[[Backend], T],
        *,
        is_bounded: bool = False,
        has_changed: Callable[[T], bool] = _never,
    ) -> T:
        """Have `run` carried out in a transaction; its outcome, after the commit.

        Args:
            is_bounded: refuse it while the queue is full. The runtime's own calls wait for their
                outcomes one by one and are always taken.
            has_changed: whether, by its outcome, samples have changed.
        """
        if self._loop is None:
            raise RuntimeError("the feedback store is not open; use it as `async with store:`")
        operation = _Operation(run, future=self._loop.create_future(), has_changed=has_changed)
        with self._wake:
            if not self._is_open:
                raise _closed()
            if is_bounded and len(self._queue) >= self._config.max_pending:
                raise OverloadedError(
                    f"{len(self._queue)} events wait to be written, as many as "
                    "learning.feedback.max_pending allows; send this one again",
                    code="feedback_queue_full",
                )
            self._queue.append(operation)
            self._wake.notify()
        assert operation.future is not None, "made above"
        outcome: T = await operation.future
        return outcome

    def _deliver(self, group: Sequence[_Operation[Any]], stored: BackendCounts) -> None:
        """On the loop's thread: hand the outcomes of one group to their callers."""
        self._stored = stored
        has_changed = False
        for operation in group:
            has_changed |= operation.error is None and operation.has_changed(operation.value)
            if operation.future is None:
                self._dropped += operation.error is not None
            elif operation.future.done():  # its caller was cancelled
                continue
            elif operation.error is not None:
                operation.future.set_exception(operation.error)
            else:
                operation.future.set_result(operation.value)
        if has_changed:
            self._changes += 1
            self._changed.set()
            self._changed = asyncio.Event()

    # -- the writer thread -----------------------------------------------------------------------

    def _write(self, opened: asyncio.Future[None]) -> None:
        """Open the database, write group after group until closed and drained, close it."""
        is_opened = False
        group: list[_Operation[Any]] = []
        try:
            backend = self._open_backend()
            try:
                stored = self._load(backend)
                self._post(self._deliver, (), stored)
                self._post(_settle, opened, None)
                is_opened = True
                while group := self._next_group():
                    self._carry_out(backend, group)
                    self._post(self._deliver, group, backend.counts())
            finally:
                backend.close()
        except Exception as error:
            if is_opened:
                log.exception("the feedback store has failed; nothing is stored any more")
            self._post(_settle, opened, error)
            self._fail_all(group, error)
        finally:
            assert self._ended is not None, "set before the thread starts"
            self._post(_settle, self._ended, None)

    def _load(self, backend: Backend) -> BackendCounts:
        """What has to be known of the time before the start."""
        with backend.transaction(durable=False):
            for source, created_s in backend.recent(self._now_s() - self._config.quota_window_s):
                self._quota.seed(source, created_s)
            return backend.counts()

    def _fail_all(self, group: Sequence[_Operation[Any]], error: Exception) -> None:
        """Take nothing more, and leave nobody waiting: neither the group under way nor the rest."""
        with self._wake:
            self._is_open = False
            operations = [*group, *self._queue]
            self._queue.clear()
        for operation in operations:
            operation.fail(error)
        self._post(self._deliver, operations, self._stored)

    def _next_group(self) -> list[_Operation[Any]]:
        """Everything that waits, up to `MAX_GROUP`; blocks while nothing does. Empty: closed."""
        with self._wake:
            while self._is_open and not self._queue:
                self._wake.wait()
            return [self._queue.popleft() for _ in range(min(MAX_GROUP, len(self._queue)))]

    def _carry_out(self, backend: Backend, group: Sequence[_Operation[Any]]) -> None:
        """Run a group in one transaction. If that fails, each in one of its own.

        So one operation that fails (a text that no longer fits the disk) takes no other with it.
        """
        try:
            with backend.transaction(durable=any(op.is_durable for op in group)):
                for operation in group:
                    operation.run_on(backend)
            self._quota.keep()
        except Exception as error:  # noqa: BLE001 - raised to the caller of the operation
            self._quota.undo()
            if len(group) == 1:
                group[0].fail(error)
                if group[0].future is None:
                    log.warning("a response could not be recorded: %s", error)
            else:
                for operation in group:
                    self._carry_out(backend, [operation])

    def _post(self, callback: Callable[..., None], *args: object) -> None:
        """Call on the loop's thread."""
        assert self._loop is not None, "set before the thread starts"
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError as closed:
            # What was committed stays committed; there is nobody left to tell.
            log.warning("the feedback store outlived its event loop: %s", closed)


class _Operation(Generic[T]):
    """A call on its way to the writer and its outcome on the way back.

    Without a future nobody waits for the outcome.
    """

    __slots__ = ("_run", "error", "future", "has_changed", "is_durable", "value")

    def __init__(
        self,
        run: Callable[[Backend], T],
        *,
        future: asyncio.Future[T] | None = None,
        is_durable: bool = True,
        has_changed: Callable[[T], bool] = _never,
    ) -> None:
        self._run = run
        self.future = future
        self.is_durable = is_durable
        self.has_changed = has_changed
        self.value: T | None = None
        self.error: Exception | None = None

    def run_on(self, backend: Backend) -> None:
        """Run within a transaction. A refusal is an outcome and leaves the transaction alone."""
        self.value, self.error = None, None
        try:
            self.value = self._run(backend)
        except (RequestError, OverloadedError) as refusal:
            self.error = refusal

    def fail(self, error: Exception) -> None:
        self.value, self.error = None, error


def _check_target(backend: Backend, source: str, withdrawal: Withdrawal) -> None:
    """Refuse to withdraw what is not there, or one link too many in a chain of withdrawals."""
    target = withdrawal.target
    for _ in range(MAX_WITHDRAWAL_DEPTH):
        body = backend.find(source, target)
        if body is None:
            break
        frame = orjson.loads(body)
        if frame["type"] != "withdraw":
            return
        target = frame["target"]
    else:
        raise ConflictError(
            f"target {withdrawal.target!r} ends a chain of {MAX_WITHDRAWAL_DEPTH} withdrawals; "
            "send the event itself again under another id",
            param="target",
            code="withdrawn_too_often",
        )
    if target == withdrawal.target:
        raise NotFoundError(
            f"target is {target!r}, and this source has sent no event of that id",
            param="target",
            code="target_not_found",
        )


def _settle(future: asyncio.Future[None], error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def _closed() -> DrainingError:
    return DrainingError("the feedback store is closed; the runtime is shutting down")
