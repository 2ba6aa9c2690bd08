"""The feedback store's database on disk: SQLite in one file, for one process at a time.

    responses   what can be rated
    events      every frame that was acknowledged; `state` says which of them stand
    mentions    whose data an event holds besides its sender's: sources of the responses it is about
    samples     what is trained on; goes with its event

An event's state is "stands", "superseded" or "withdrawn". Of the events with one source and one
subject that are not withdrawn, the newest stands and the others are superseded; an event is
withdrawn while a withdrawal of it stands. A sample's state is kept beside it, so that the learner's
questions are answered by one index.

Write-ahead logging with ``synchronous=FULL``: a commit has reached the disk. Deleted content is
overwritten (``secure_delete``). The file is locked while it is open.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import sys
from array import array
from collections import Counter
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import orjson

from ..errors import ConfigError, StorageError
from .events import (
    FeedbackEvent,
    Preference,
    Rating,
    TextRating,
    Withdrawal,
    event_type,
    parse_event,
    subject_of,
)
from .samples import PreferencePair, RatedCompletion, Sample, TokenIds
from .store import BackendCounts, NewSample, RecordedResponse, StoredEvent, StoredFeedback

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from ..types import Message

log = logging.getLogger(__name__)

_MIGRATIONS: Final = (
    """
    CREATE TABLE responses (
        key INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        adapter TEXT NOT NULL,
        version INTEGER NOT NULL,
        model TEXT NOT NULL,
        source TEXT NOT NULL,
        prompt_ids BLOB NOT NULL,
        completion_ids BLOB NOT NULL,
        text TEXT NOT NULL,
        messages TEXT,
        sampling TEXT NOT NULL,
        finish_reason TEXT NOT NULL,
        created_s REAL NOT NULL
    );
    CREATE INDEX responses_by_source ON responses (source);
    CREATE INDEX responses_by_time ON responses (created_s);

    CREATE TABLE events (
        key INTEGER PRIMARY KEY AUTOINCREMENT,
        source TEXT NOT NULL,
        id TEXT NOT NULL,
        type TEXT NOT NULL,
        subject TEXT NOT NULL,
        body TEXT NOT NULL,
        created_s REAL NOT NULL,
        state TEXT NOT NULL,
        is_prepared INTEGER NOT NULL,
        rating INTEGER,
        target_key INTEGER,
        UNIQUE (source, id)
    );
    CREATE INDEX events_by_subject ON events (subject, source, key);
    CREATE UNIQUE INDEX events_standing ON events (subject, source) WHERE state = 'stands';
    CREATE INDEX events_by_time ON events (created_s);
    CREATE INDEX events_by_target ON events (target_key) WHERE target_key IS NOT NULL;
    CREATE INDEX events_unprepared ON events (key) WHERE NOT is_prepared;

    CREATE TABLE mentions (
        source TEXT NOT NULL,
        event_key INTEGER NOT NULL REFERENCES events (key) ON DELETE CASCADE,
        PRIMARY KEY (source, event_key)
    ) WITHOUT ROWID;
    CREATE INDEX mentions_by_event ON mentions (event_key);

    CREATE TABLE samples (
        key INTEGER PRIMARY KEY AUTOINCREMENT,
        event_key INTEGER NOT NULL REFERENCES events (key) ON DELETE CASCADE,
        kind TEXT NOT NULL,
        adapter TEXT NOT NULL,
        is_held_out INTEGER NOT NULL,
        state TEXT NOT NULL,
        refused_why TEXT,
        reference_first REAL,
        reference_second REAL,
        is_desirable INTEGER,
        prompt_ids BLOB NOT NULL,
        first_ids BLOB NOT NULL,
        second_ids BLOB,
        response_id TEXT,
        prompt_messages TEXT,
        prompt_text TEXT,
        first_text TEXT,
        second_text TEXT
    );
    CREATE INDEX samples_by_event ON samples (event_key);
    CREATE INDEX samples_by_state ON samples (adapter, state, is_held_out, key);
    """,
)
"""What brings a file from version i to i + 1. Only ever appended to."""

_SAMPLE: Final = (
    "samples.key, samples.kind, samples.adapter, events.source, samples.prompt_ids,"
    " samples.first_ids, samples.second_ids, samples.is_desirable,"
    " samples.reference_first, samples.reference_second"
)


class SqliteBackend:
    """A `store.Backend` in one SQLite file, which is created if it is not there.

    Opened and used by one thread. Raises `ConfigError` if the file is damaged, of a newer version,
    held by another process, or cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not path.exists()
            self._connection = sqlite3.connect(path, timeout=0.0, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"the feedback store {path} cannot be opened: {error}; make its folder writable, "
                "or choose another with learning.state_dir"
            ) from error
        try:
            self._set_up()
            if is_new:
                _sync_folder(path.parent)
            self._counts = self._count()
        except sqlite3.Error as error:
            self._connection.close()
            raise self._refusal(error) from error
        except BaseException:
            self._connection.close()
            raise
        self._scrub_is_due = False
        self._is_durable = True

    def _set_up(self) -> None:
        execute = self._connection.execute
        # Exclusive before the first access: no shared memory, and a second process is refused.
        execute("PRAGMA locking_mode = EXCLUSIVE")
        execute("PRAGMA journal_mode = WAL")
        execute("PRAGMA synchronous = FULL")
        execute("PRAGMA fullfsync = ON")  # macOS: past the drive's cache
        execute("PRAGMA secure_delete = ON")
        execute("PRAGMA foreign_keys = ON")
        self._migrate()
        (finding,) = execute("PRAGMA quick_check(1)").fetchone()
        if finding != "ok":
            raise self._damaged(finding)

    def _migrate(self) -> None:
        execute = self._connection.execute
        execute("BEGIN IMMEDIATE")
        try:
            execute("CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value INTEGER)")
            found = execute("SELECT value FROM meta WHERE name = 'version'").fetchone()
            version = 0 if found is None else int(found[0])
            if version > len(_MIGRATIONS):
                raise ConfigError(
                    f"the feedback store {self._path} has version {version}, and this cotune "
                    f"reads up to {len(_MIGRATIONS)}; use the newer cotune that wrote it, "
                    "or another folder with learning.state_dir"
                )
            for migration in _MIGRATIONS[version:]:
                for statement in migration.split(";"):
                    if statement.strip():
                        execute(statement)
            execute("INSERT OR REPLACE INTO meta VALUES ('version', ?)", (len(_MIGRATIONS),))
            execute("COMMIT")
        except BaseException:
            self._roll_back()
            raise

    def _refusal(self, error: sqlite3.Error) -> ConfigError:
        """Why the file cannot be opened."""
        match _primary_code(error):
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                return ConfigError(
                    f"the feedback store {self._path} is in use by another process; stop that "
                    "one, ask it (--url), or choose another folder with learning.state_dir"
                )
            case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
                return self._damaged(error)
            case _:
                return ConfigError(
                    f"the feedback store {self._path} cannot be opened: {error}; see to the disk, "
                    "its space and permissions, or choose another folder with learning.state_dir"
                )

    def _damaged(self, finding: object) -> ConfigError:
        return ConfigError(
            f"the feedback store {self._path} is damaged: {finding}; put back a copy, or save what "
            f"can be read with `sqlite3 {self._path.name} .recover` and move the file away: "
            "a new one is made"
        )

    # -- transactions ----------------------------------------------------------------------------

    @contextmanager
    def transaction(self, *, durable: bool) -> Iterator[None]:
        """See `Backend.transaction`."""
        before = self._counts
        execute = self._connection.execute
        try:
            if durable != self._is_durable:
                execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                self._is_durable = durable
            execute("BEGIN")
            yield
            execute("COMMIT")
        except BaseException as error:
            self._counts = before
            self._roll_back()
            if isinstance(error, sqlite3.Error) and _is_storage_trouble(error):
                raise StorageError(
                    f"the feedback store {self._path} cannot be written: {error}; nothing of this "
                    "was stored; free space on the disk or see to its health, then send it again",
                    code="storage_failed",
                ) from error
            raise
        if self._scrub_is_due:
            self._scrub()

    def _scrub(self) -> None:
        """Move the log into the file and empty it: it holds pages as they were before deletions."""
        try:
            (is_busy, *_) = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.Error as error:
            log.warning("%s: removed feedback is still in the log file: %s", self._path, error)
        else:
            self._scrub_is_due = bool(is_busy)

    def _roll_back(self) -> None:
        # SQLite has rolled back by itself after some errors (a full disk among them).
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    def close(self) -> None:
        """See `Backend.close`."""
        self._connection.close()

    def counts(self) -> BackendCounts:
        """See `Backend.counts`."""
        return self._counts

    def _count(self) -> BackendCounts:
        execute = self._connection.execute
        (responses,) = execute("SELECT count(*) FROM responses").fetchone()
        return BackendCounts(
            events=dict(execute("SELECT type, count(*) FROM events GROUP BY type")),
            recorded_responses=responses,
        )

    def _count_responses(self, by: int) -> None:
        self._counts = BackendCounts(
            events=self._counts.events, recorded_responses=self._counts.recorded_responses + by
        )

    def _count_events(self, by: Mapping[str, int]) -> None:
        events = Counter(self._counts.events)
        events.update(by)
        self._counts = BackendCounts(
            events=dict(+events), recorded_responses=self._counts.recorded_responses
        )

    # -- responses -------------------------------------------------------------------------------

    def record(self, response: RecordedResponse, *, keep: int) -> None:
        """See `Backend.record`."""
        execute = self._connection.execute
        replaced = execute("DELETE FROM responses WHERE id = ?", (response.id,)).rowcount
        execute(
            "INSERT INTO responses (id, adapter, version, model, source, prompt_ids,"
            " completion_ids, text, messages, sampling, finish_reason, created_s)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                response.id,
                response.adapter,
                response.version,
                response.model,
                response.source,
                _packed(response.prompt_ids),
                _packed(response.completion_ids),
                response.text,
                _as_json(response.messages),
                orjson.dumps(dict(response.sampling), option=orjson.OPT_NON_STR_KEYS).decode(),
                response.finish_reason,
                response.created_s,
            ),
        )
        self._count_responses(1 - replaced)
        surplus = self._counts.recorded_responses - keep
        if surplus > 0:
            self._count_responses(
                -execute(
                    "DELETE FROM responses WHERE key IN"
                    " (SELECT key FROM responses ORDER BY key LIMIT ?)",
                    (surplus,),
                ).rowcount
            )

    def response(self, response_id: str, *, since_s: float) -> RecordedResponse | None:
        """See `Backend.response`."""
        row = self._connection.execute(
            "SELECT id, adapter, version, model, source, prompt_ids, completion_ids, text,"
            " messages, sampling, finish_reason, created_s FROM responses"
            " WHERE id = ? AND created_s >= ?",
            (response_id, since_s),
        ).fetchone()
        if row is None:
            return None
        (*names, prompt_ids, completion_ids, text, messages, sampling, reason, created_s) = row
        identifier, adapter, version, model, source = names
        return RecordedResponse(
            id=identifier,
            adapter=adapter,
            version=version,
            model=model,
            source=source,
            prompt_ids=_unpacked(prompt_ids),
            completion_ids=_unpacked(completion_ids),
            text=text,
            messages=_messages(messages),
            sampling=orjson.loads(sampling),
            finish_reason=reason,
            created_s=created_s,
        )

    # -- events ----------------------------------------------------------------------------------

    def find(self, source: str, event_id: str) -> bytes | None:
        """See `Backend.find`."""
        row = self._connection.execute(
            "SELECT body FROM events WHERE source = ? AND id = ?", (source, event_id)
        ).fetchone()
        return None if row is None else str(row[0]).encode()

    def recent(self, since_s: float) -> Sequence[tuple[str, float]]:
        """See `Backend.recent`."""
        return self._connection.execute(
            "SELECT source, created_s FROM events WHERE created_s > ? ORDER BY created_s",
            (since_s,),
        ).fetchall()

    def add(
        self,
        event: FeedbackEvent,
        *,
        source: str,
        body: bytes,
        created_s: float,
        samples: Sequence[NewSample] | None,
    ) -> None:
        """See `Backend.add`."""
        execute = self._connection.execute
        subject, kind = subject_of(event), event_type(event)
        target_key = None
        if isinstance(event, Withdrawal):
            (target_key,) = execute(
                "SELECT key FROM events WHERE source = ? AND id = ?", (source, event.target)
            ).fetchone()
        cursor = execute(
            "INSERT INTO events (source, id, type, subject, body, created_s, state, is_prepared,"
            " rating, target_key) VALUES (?, ?, ?, ?, ?, ?, 'superseded', ?, ?, ?)",
            (
                source,
                event.id,
                kind,
                subject,
                body.decode(),
                created_s,
                samples is not None or isinstance(event, Withdrawal),
                event.rating if isinstance(event, (Rating, TextRating)) else None,
                target_key,
            ),
        )
        key = cursor.lastrowid
        assert key is not None, "an insert has a row"
        execute(
            "INSERT OR IGNORE INTO mentions (source, event_key)"
            " SELECT source, ?1 FROM responses WHERE id IN"
            " (SELECT value FROM json_each(?2)) AND source != ?3",
            (key, _as_json(_response_ids(event)), source),
        )
        self._insert_samples(key, samples or ())
        self._settle_subject(source, subject)
        self._count_events({kind: 1})

    def unprepared(self, *, after_key: int, limit: int) -> tuple[StoredEvent, ...]:
        """See `Backend.unprepared`."""
        rows = self._connection.execute(
            "SELECT key, source, body, created_s FROM events"
            " WHERE NOT is_prepared AND state = 'stands' AND key > ? ORDER BY key LIMIT ?",
            (after_key, limit),
        )
        return tuple(_stored_event(*row) for row in rows)

    def prepare(self, key: int, samples: Sequence[NewSample]) -> None:
        """See `Backend.prepare`."""
        execute = self._connection.execute
        row = execute(
            "SELECT state, subject FROM events WHERE key = ? AND NOT is_prepared", (key,)
        ).fetchone()
        if row is None:
            return
        execute("UPDATE events SET is_prepared = 1 WHERE key = ?", (key,))
        self._insert_samples(key, samples)
        self._settle_samples(key, *row)

    def export(
        self, adapter: str | None, *, after_key: int, limit: int
    ) -> tuple[StoredFeedback, ...]:
        """See `Backend.export`."""
        rows = self._connection.execute(
            "SELECT events.key, events.source, events.body, events.created_s, events.is_prepared,"
            " samples.kind, samples.adapter, samples.state, samples.response_id,"
            " samples.prompt_messages, samples.prompt_text, samples.first_text,"
            " samples.second_text, samples.is_desirable"
            " FROM events LEFT JOIN samples ON samples.event_key = events.key"
            " AND (?1 IS NULL OR samples.adapter = ?1)"
            " WHERE events.key IN (SELECT key FROM events AS e"
            "  WHERE e.state = 'stands' AND e.type != 'withdraw' AND e.key > ?2"
            "  AND (?1 IS NULL"
            "   OR EXISTS (SELECT 1 FROM samples AS s WHERE s.event_key = e.key"
            "    AND s.adapter = ?1)"
            "   OR NOT e.is_prepared AND json_extract(e.body, '$.model') = ?1)"
            "  ORDER BY e.key LIMIT ?3)"
            " ORDER BY events.key, samples.key",
            (adapter, after_key, limit),
        )
        return tuple(_feedback(*row) for row in rows)

    # -- which events stand ----------------------------------------------------------------------

    def _settle_subject(self, source: str, subject: str) -> None:
        """Let the newest event that was not withdrawn stand, and no other."""
        execute = self._connection.execute
        newest = execute(
            "SELECT key, state FROM events WHERE source = ? AND subject = ?"
            " AND state != 'withdrawn' ORDER BY key DESC LIMIT 1",
            (source, subject),
        ).fetchone()
        if newest is None or newest[1] == "stands":
            return
        standing = execute(
            "SELECT key FROM events WHERE source = ? AND subject = ? AND state = 'stands'",
            (source, subject),
        ).fetchone()
        if standing is not None:
            self._set_state(standing[0], "superseded")
        self._set_state(newest[0], "stands")

    def _set_state(self, key: int, state: str) -> None:
        """Change an event's state, and all that follows from it.

        Recursion ends: a withdrawal's target is an older event, and chains of withdrawals are
        bounded (`store.MAX_WITHDRAWAL_DEPTH`).
        """
        execute = self._connection.execute
        execute("UPDATE events SET state = ? WHERE key = ?", (state, key))
        subject, target_key = execute(
            "SELECT subject, target_key FROM events WHERE key = ?", (key,)
        ).fetchone()
        self._settle_samples(key, state, subject)
        if target_key is not None:
            self._settle_target(target_key)

    def _settle_target(self, key: int) -> None:
        """Withdraw the event, or bring it back, as the withdrawals of it say."""
        execute = self._connection.execute
        row = execute("SELECT source, subject, state FROM events WHERE key = ?", (key,)).fetchone()
        if row is None:
            return
        source, subject, state = row
        is_withdrawn = execute(
            "SELECT 1 FROM events WHERE target_key = ? AND state = 'stands'", (key,)
        ).fetchone()
        if (is_withdrawn is not None) == (state == "withdrawn"):
            return
        self._set_state(key, "withdrawn" if is_withdrawn else "superseded")
        self._settle_subject(source, subject)

    def _settle_samples(self, event_key: int, event_state: str, subject: str) -> None:
        """Bring the states of an event's samples up to date, and those of other ratings."""
        self._set_sample_states(event_key, event_state)
        self._settle_ratings(subject)

    def _settle_ratings(self, subject: str) -> None:
        """Ratings of one response by all sources count as one: the sign of their sum."""
        if not subject.startswith("rating"):
            return
        standing = self._connection.execute(
            "SELECT key, rating FROM events WHERE subject = ? AND state = 'stands'", (subject,)
        ).fetchall()
        total = sum(rating for _, rating in standing)
        for key, rating in standing:
            self._set_sample_states(key, "stands" if rating * total > 0 else "contradictory")

    def _set_sample_states(self, event_key: int, state: str) -> None:
        """State of the samples of one event: `state`, or what they are themselves if it stands."""
        self._connection.execute(
            "UPDATE samples SET state = new.state FROM (SELECT key, CASE"
            "  WHEN ?2 IN ('withdrawn', 'superseded') THEN ?2"
            "  WHEN refused_why IS NOT NULL THEN 'refused'"
            "  WHEN ?2 = 'contradictory' THEN ?2"
            "  WHEN reference_first IS NULL THEN 'pending'"
            "  ELSE 'ready' END AS state FROM samples WHERE event_key = ?1) AS new"
            " WHERE samples.key = new.key AND samples.state != new.state",
            (event_key, state),
        )

    # -- samples ---------------------------------------------------------------------------------

    def _insert_samples(self, event_key: int, samples: Sequence[NewSample]) -> None:
        self._connection.executemany(
            "INSERT INTO samples (event_key, kind, adapter, is_held_out, state, is_desirable,"
            " prompt_ids, first_ids, second_ids, response_id, prompt_messages, prompt_text,"
            " first_text, second_text) VALUES (?, ?, ?, ?, 'pending', ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    event_key,
                    sample.kind,
                    sample.adapter,
                    sample.is_held_out,
                    sample.is_desirable,
                    _packed(sample.prompt_ids),
                    _packed(sample.chosen_ids if is_pair else sample.completion_ids),
                    _packed(sample.rejected_ids) if is_pair else None,
                    sample.response_id,
                    _as_json(sample.prompt_messages),
                    sample.prompt_text,
                    sample.chosen_text if is_pair else sample.completion_text,
                    sample.rejected_text,
                )
                for sample in samples
                for is_pair in (sample.kind == "pair",)
            ],
        )

    def pending(self, adapter: str, *, limit: int) -> tuple[Sample, ...]:
        """See `Backend.pending`."""
        rows = self._connection.execute(
            f"SELECT {_SAMPLE} FROM samples JOIN events ON events.key = samples.event_key"
            " WHERE samples.adapter = ? AND samples.state = 'pending'"
            " ORDER BY samples.key LIMIT ?",
            (adapter, limit),
        )
        return tuple(_sample(*row) for row in rows)

    def samples(
        self, adapter: str, *, held_out: bool, limit: int, after_key: int
    ) -> tuple[Sample, ...]:
        """See `Backend.samples`."""
        rows = self._connection.execute(
            f"SELECT {_SAMPLE} FROM samples JOIN events ON events.key = samples.event_key"
            " WHERE samples.adapter = ? AND samples.state = 'ready'"
            " AND samples.is_held_out = ? AND samples.key > ?"
            " ORDER BY samples.key DESC LIMIT ?",
            (adapter, held_out, after_key, limit),
        ).fetchall()
        return tuple(_sample(*row) for row in reversed(rows))

    def set_reference(self, key: int, first: float, second: float | None) -> None:
        """See `Backend.set_reference`."""
        self._connection.execute(
            "UPDATE samples SET reference_first = ?2, reference_second = ?3,"
            " state = CASE state WHEN 'pending' THEN 'ready' ELSE state END WHERE key = ?1",
            (key, first, second),
        )

    def refuse_sample(self, key: int, reason: str) -> None:
        """See `Backend.refuse_sample`."""
        self._connection.execute(
            "UPDATE samples SET refused_why = ?2, state = CASE"
            " WHEN state IN ('withdrawn', 'superseded') THEN state ELSE 'refused' END"
            " WHERE key = ?1",
            (key, reason),
        )

    def states(self, adapter: str) -> Mapping[str, int]:
        """See `Backend.states`."""
        rows = self._connection.execute(
            "SELECT CASE WHEN state = 'ready' AND is_held_out THEN 'held_out' ELSE state END,"
            " count(*) FROM samples WHERE adapter = ? GROUP BY 1",
            (adapter,),
        )
        return dict(rows)

    # -- removal ---------------------------------------------------------------------------------

    def forget(self, source: str, *, limit: int) -> int:
        """See `Backend.forget`."""
        execute = self._connection.execute
        rows = execute(
            "SELECT key FROM events WHERE source = ?1"
            " UNION SELECT event_key FROM mentions WHERE source = ?1 LIMIT ?2",
            (source, limit),
        ).fetchall()
        removed = self._remove([key for (key,) in rows])
        responses = execute("DELETE FROM responses WHERE source = ?", (source,)).rowcount
        self._count_responses(-responses)
        self._scrub_is_due = True
        return removed

    def expire(
        self, *, responses_before_s: float, events_before_s: float | None, limit: int
    ) -> int:
        """See `Backend.expire`."""
        execute = self._connection.execute
        responses = execute(
            "DELETE FROM responses WHERE created_s < ?", (responses_before_s,)
        ).rowcount
        self._count_responses(-responses)
        if events_before_s is None:
            return 0
        rows = execute(
            "SELECT key FROM events WHERE created_s < ? ORDER BY created_s LIMIT ?",
            (events_before_s, limit),
        ).fetchall()
        # What an old event replaced or withdrew goes with it even if a clock that jumped has
        # stamped that later: it must not come back to life.
        return self._remove([key for (key,) in rows], with_replaced=True)

    def _remove(self, keys: Sequence[int], *, with_replaced: bool = False) -> int:
        """Delete these events, withdrawals of them, and their samples; how many events that were.

        With `with_replaced` also the events that they superseded or withdrew.
        """
        execute = self._connection.execute
        rows = execute(
            "WITH RECURSIVE gone (key) AS ("
            " SELECT value FROM json_each(?1)"
            " UNION SELECT event.key FROM gone JOIN events AS event ON event.target_key = gone.key"
            " UNION SELECT event.target_key FROM gone JOIN events AS event ON event.key = gone.key"
            "  WHERE ?2 AND event.target_key IS NOT NULL"
            " UNION SELECT older.key FROM gone JOIN events AS event ON event.key = gone.key"
            "  JOIN events AS older ON older.subject = event.subject"
            "   AND older.source = event.source AND older.key < event.key WHERE ?2)"
            " SELECT key, source, subject, type FROM events WHERE key IN (SELECT key FROM gone)",
            (_as_json(list(keys)), with_replaced),
        ).fetchall()
        execute(
            "DELETE FROM events WHERE key IN (SELECT value FROM json_each(?))",
            (_as_json([row[0] for row in rows]),),
        )
        for source, subject in sorted({(source, subject) for _, source, subject, _ in rows}):
            self._settle_subject(source, subject)
            self._settle_ratings(subject)
        self._count_events({kind: -count for kind, count in Counter(r[3] for r in rows).items()})
        return len(rows)


# -- rows to values ------------------------------------------------------------------------------


def _sample(
    key: int,
    kind: str,
    adapter: str,
    source: str,
    prompt_ids: bytes,
    first_ids: bytes,
    second_ids: bytes,
    is_desirable: int,
    first: float | None,
    second: float | None,
) -> Sample:
    if kind == "pair":
        return PreferencePair(
            key=key,
            adapter=adapter,
            source=source,
            prompt_ids=_unpacked(prompt_ids),
            chosen_ids=_unpacked(first_ids),
            rejected_ids=_unpacked(second_ids),
            ref_chosen_logp=first,
            ref_rejected_logp=second,
        )
    return RatedCompletion(
        key=key,
        adapter=adapter,
        source=source,
        prompt_ids=_unpacked(prompt_ids),
        completion_ids=_unpacked(first_ids),
        is_desirable=bool(is_desirable),
        ref_logp=first,
    )


def _stored_event(key: int, source: str, body: str, created_s: float) -> StoredEvent:
    return StoredEvent(
        key=key,
        source=source,
        event=parse_event(orjson.loads(body)),
        created=datetime.fromtimestamp(created_s, UTC),
    )


def _feedback(
    key: int,
    source: str,
    body: str,
    created_s: float,
    is_prepared: int,
    kind: str | None,
    adapter: str | None,
    state: str | None,
    response_id: str | None,
    prompt_messages: str | None,
    prompt_text: str | None,
    first_text: str | None,
    second_text: str | None,
    is_desirable: int | None,
) -> StoredFeedback:
    stored = _stored_event(key, source, body, created_s)
    if kind is None:
        return StoredFeedback(stored=stored, state="none" if is_prepared else "unprepared")
    is_pair = kind == "pair"
    messages = _messages(prompt_messages)
    return StoredFeedback(
        stored=stored,
        state=str(state),
        adapter=adapter,
        response_id=response_id,
        prompt=prompt_text if messages is None else messages,
        chosen=first_text if is_pair else None,
        rejected=second_text,
        completion=None if is_pair else first_text,
        is_desirable=None if is_desirable is None else bool(is_desirable),
    )


def _response_ids(event: FeedbackEvent) -> list[str]:
    match event:
        case Preference():
            return [name for name in (event.chosen_id, event.rejected_id) if name is not None]
        case TextRating() | Withdrawal():
            return []
        case _:
            return [event.response_id]


def _packed(ids: TokenIds) -> bytes:
    """Token ids as they are stored: 4 bytes each, little-endian."""
    packed = array("I", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _unpacked(packed: bytes) -> TokenIds:
    ids = array("I", packed)
    if sys.byteorder == "big":
        ids.byteswap()
    return tuple(ids)


def _as_json(value: object) -> str | None:
    return None if value is None else orjson.dumps(value).decode()


def _messages(text: str | None) -> tuple[Message, ...] | None:
    return None if text is None else tuple(orjson.loads(text))


# -- the disk ------------------------------------------------------------------------------------


def _primary_code(error: sqlite3.Error) -> int | None:
    """SQLite's result code without its details; None if the error is not SQLite's own."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


_STORAGE_TROUBLE: Final = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_READONLY,
    }
)


def _is_storage_trouble(error: sqlite3.Error) -> bool:
    return _primary_code(error) in _STORAGE_TROUBLE


def _sync_folder(folder: Path) -> None:
    """Make a new file's name in `folder` durable."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
