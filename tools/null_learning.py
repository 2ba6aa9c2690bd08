"""Learning without a model or a disk: the part of the runtime without a model that takes feedback.

Events are kept in memory and checked as the store checks them; nothing is ever trained. Versions
appear when a test says `publish` or `refuse`. With ``manual=True`` events wait, as for a slow disk,
until `commit` is called.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..runtime.errors import (
    ConflictError,
    CotuneError,
    NotFoundError,
    OverloadedError,
    RequestError,
)
from ..runtime.learning.events import (
    Acknowledgement,
    Edit,
    FeedbackEvent,
    Preference,
    Rating,
    Withdrawal,
    as_body,
    event_type,
    parse_event,
)
from ..runtime.learning.status import AdapterLearning, LearningStatus, one_reason
from ..runtime.learning.versions import Lineage, State, VersionRecord

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from ..runtime.types import Response

RETRY_AFTER_S: Final = 7.0


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """One event, as it was acknowledged."""

    source: str
    event: FeedbackEvent
    is_withdrawn: bool = False


class NullLearning:
    """Feedback and versions of one adapter, in memory. For one event loop.

    Args:
        adapter: its name.
        quota_events: most events that one source may send, ever.
        manual: events are stored only when `commit` is called.

    Attributes:
        events: what was acknowledged, in that order, by (source, id).
        responses: what can be rated, by id, and whose it is.
        failure: raised instead of storing, while set (a full disk).
        fixed: told by `status` instead of what is so, while set.
    """

    def __init__(self, adapter: str, *, quota_events: int = 10_000, manual: bool = False) -> None:
        self.adapter = adapter
        self.events: dict[tuple[str, str], StoredEvent] = {}
        self.responses: dict[str, tuple[str, Response]] = {}
        self.failure: Exception | None = None
        self.fixed: AdapterLearning | None = None
        self._quota_events = quota_events
        self._is_manual = manual
        self._waiting: list[asyncio.Future[None]] = []
        self._changed = asyncio.Event()
        self._refused: Counter[str] = Counter()
        self._sent: Counter[str] = Counter()
        self._duplicates = 0
        self._undecided: Counter[str] = Counter()
        self._versions: list[VersionRecord] = []
        self._history = [0]

    # What the runtime passes on.

    def record(self, response: Response, source: str) -> None:
        """An answer that can be rated."""
        self.responses[response.id] = (source, response)

    async def feedback(
        self, event: FeedbackEvent | Mapping[str, object], source: str
    ) -> Acknowledgement:
        """Store an event, or raise what the store would."""
        try:
            event = parse_event(event) if isinstance(event, Mapping) else event
            await self._wait_commit()
            return self._store(event, source)
        except CotuneError as error:
            self._refused[error.code or type(error).__name__] += 1
            raise

    async def export(self, adapter: str | None) -> AsyncGenerator[Mapping[str, object], None]:
        """The frames, and whose they are."""
        for stored in list(self.events.values()):
            if not stored.is_withdrawn and adapter in (None, self.adapter):
                yield {**as_body(stored.event), "source": stored.source}

    def forget(self, source: str) -> int:
        """Remove a person's events and answers."""
        gone = [key for key in self.events if key[0] == source]
        for key in gone:
            del self.events[key]
        self.responses = {
            id: (owner, response)
            for id, (owner, response) in self.responses.items()
            if owner != source
        }
        return len(gone)

    def status(self) -> LearningStatus:
        """As many pairs as there are preferences and edits."""
        pairs = Counter(
            "withdrawn" if stored.is_withdrawn else "queued"
            for stored in self.events.values()
            if isinstance(stored.event, (Preference, Edit))
        )
        refused = Counter(one_reason(r.reasons) for r in self._versions if r.state == "refused")
        return LearningStatus(
            enabled=True,
            events=Counter(event_type(stored.event) for stored in self.events.values()),
            refused_events=dict(self._refused),
            duplicates=self._duplicates,
            recorded_responses=len(self.responses),
            adapters=(
                self.fixed
                or AdapterLearning(
                    adapter=self.adapter,
                    live_version=self.live,
                    pairs=dict(pairs),
                    candidates_passed=sum(r.state == "published" for r in self._versions),
                    candidates_refused=dict(refused),
                    candidates_undecided=dict(self._undecided),
                ),
            ),
        )

    def records(self) -> tuple[VersionRecord, ...]:
        """All versions."""
        return tuple(replace(r, is_live=r.number == self.live) for r in self._versions)

    def promote(self, model: str, force: bool) -> VersionRecord | None:
        """Make a version live; 0 is the base model."""
        number = self._number(model)
        record = self._find(number)
        if record is not None and record.state == "refused" and not force:
            raise ConflictError(
                f"{model} was refused by the gate; say force to let it go live all the same",
                param="version",
                code="version_refused",
            )
        self._history.append(number)
        return self._find(number)

    def rollback(self, model: str) -> VersionRecord | None:
        """Take the live version back."""
        number = self._number(model)
        self._find(number)
        if number != self.live or number == 0:
            raise ConflictError(
                f"{model} is not live; {self.adapter}@{self.live} is",
                param="version",
                code="version_not_live",
            )
        self._history.pop()
        return self._find(self.live)

    # What tests use.

    @property
    def live(self) -> int:
        """The version that answers; 0 is the base model."""
        return self._history[-1]

    @property
    def waiting(self) -> int:
        """Events that wait for `commit`."""
        return len(self._waiting)

    async def wait_waiting(self, count: int) -> None:
        """Wait until `count` events wait for `commit`."""
        while len(self._waiting) != count:
            await self._changed.wait()

    def commit(self) -> None:
        """Let all events that wait be stored."""
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)
        self._tell()

    def publish(self, **metrics: float) -> VersionRecord:
        """A candidate has passed and goes live."""
        record = self._add("published", (), metrics)
        self._history.append(record.number)
        return record

    def refuse(self, *reasons: str) -> VersionRecord:
        """A candidate has not."""
        return self._add("refused", reasons, {})

    def leave_undecided(self, *reasons: str) -> None:
        """A candidate is trained further, and becomes no version."""
        self._undecided[one_reason(reasons)] += 1

    # Inside.

    async def _wait_commit(self) -> None:
        if not self._is_manual:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._tell()
        try:
            await future
        finally:
            if future in self._waiting:
                self._waiting.remove(future)
                self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _store(self, event: FeedbackEvent, source: str) -> Acknowledgement:
        if self.failure is not None:
            raise self.failure
        key = (source, event.id)
        if (known := self.events.get(key)) is not None:
            if known.event != event:
                raise ConflictError(
                    f"id {event.id!r} names another event already; choose a new id",
                    param="id",
                    code="id_reused",
                )
            self._duplicates += 1
            return Acknowledgement(id=event.id, duplicate=True)
        if self._sent[source] >= self._quota_events:
            raise OverloadedError(
                f"{source} has sent {self._quota_events} events, which is its quota; wait",
                retry_after_s=RETRY_AFTER_S,
                code="quota_exceeded",
            )
        self._check(event, source)
        if isinstance(event, Withdrawal):
            target = (source, event.target)
            self.events[target] = replace(self.events[target], is_withdrawn=True)
        self._sent[source] += 1
        self.events[key] = StoredEvent(source, event)
        return Acknowledgement(id=event.id, duplicate=False)

    def _check(self, event: FeedbackEvent, source: str) -> None:
        match event:
            case Rating() | Edit():
                wanted = {"response_id": event.response_id}
            case Preference(chosen_id=str() as chosen, rejected_id=str() as rejected):
                wanted = {"chosen_id": chosen, "rejected_id": rejected}
            case Withdrawal():
                wanted = {}
                if (source, event.target) not in self.events:
                    raise NotFoundError(
                        f"there is no event {event.target!r} of yours to withdraw",
                        param="target",
                        code="event_not_found",
                    )
            case _:
                wanted = {}
        for name, id in wanted.items():
            if id not in self.responses:
                raise NotFoundError(
                    f"{name} is {id!r}; no such response is recorded",
                    param=name,
                    code="response_not_found",
                )

    def _add(
        self, state: State, reasons: tuple[str, ...], metrics: Mapping[str, float]
    ) -> VersionRecord:
        record = VersionRecord(
            adapter=self.adapter,
            number=len(self._versions) + 1,
            state=state,
            is_live=False,
            parent=self.live,
            created=datetime.now(UTC),
            lineage=Lineage(base_model="null"),
            metrics=metrics,
            reasons=reasons,
            explanation="",
            path=Path(f"{self.adapter}/{len(self._versions) + 1}"),
            nbytes=0,
        )
        self._versions.append(record)
        return record

    def _number(self, model: str) -> int:
        name, at, number = model.rpartition("@")
        if not number.isdecimal():
            raise RequestError(
                f"version is {model!r}; name one as in {self.adapter}@7, or 7",
                param="version",
                code="invalid_version",
            )
        if at and name != self.adapter:
            raise NotFoundError(f"{name!r} does not learn", param="model")
        return int(number)

    def _find(self, number: int) -> VersionRecord | None:
        if number == 0:
            return None
        for record in self.records():
            if record.number == number:
                return record
        raise NotFoundError(
            f"there is no {self.adapter}@{number}", param="version", code="version_not_found"
        )
