"""`cotune feedback`: bring feedback in, take it out, or remove a person's, in TRL's formats.

Works on a state directory while nothing serves from it, or on a server that runs (--url). What is
imported into a state directory becomes training samples when a model is next served from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import orjson

from ..runtime.errors import ConfigError, RequestError
from ..runtime.learning.config import FeedbackConfig
from ..runtime.learning.durable import replacing
from ..runtime.learning.events import as_body
from ..runtime.learning.formats import FORMATS, ImportedRow, format_of, parse_row
from ..runtime.learning.state_directory import StateDirectory
from .live_server import AsyncServer, ServerError, told_error
from .options import add_api_key_argument, api_key, loop_factory
from .progress_bar import progress_bar

if TYPE_CHECKING:
    import argparse
    from collections.abc import (
        AsyncIterator,
        Awaitable,
        Callable,
        Iterable,
        Iterator,
        Mapping,
        Sequence,
    )
    from contextlib import AbstractAsyncContextManager

    from ..runtime.learning.events import FeedbackEvent

EPILOG = """\
examples:
  cotune feedback import pairs.jsonl --state-dir state
  cotune feedback import ratings.jsonl --url http://127.0.0.1:8000 --source dataset
  cotune feedback export --state-dir state > pairs.jsonl
  cotune feedback export --url http://127.0.0.1:8000 --format unpaired --output ratings.jsonl
  cotune feedback delete --state-dir state --source alice

one JSON object per line:
  preference   {"prompt": ..., "chosen": ..., "rejected": ...}
  unpaired     {"prompt": ..., "completion": ..., "label": true}
prompt is a text or a list of messages, an answer a text or a list of one assistant message. Rows
may have an "id" (without one, the texts name the row) and a "source". Importing a row twice
changes nothing.

`cotune feedback COMMAND --help` lists the flags of one command.
"""

BATCH_EVENTS: Final = 256
BATCH_BYTES: Final = 512 * 1024
"""Events are sent in batches of at most so many, and of about so many bytes."""
SHOWN_ERRORS: Final = 20
"""Lines that could not be imported are named one by one up to here, and then counted."""
TRY_AGAIN: Final = ("quota_exceeded", "feedback_queue_full")
"""Codes of errors that pass."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the commands and flags of ``cotune feedback``."""
    parser.epilog = EPILOG
    commands = parser.add_subparsers(
        title="commands", dest="action", metavar="COMMAND", required=True
    )

    def add(name: str, text: str, description: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=description,
            allow_abbrev=False,
        )
        place = command.add_argument_group("where the feedback is (one of them)")
        place.add_argument(
            "--state-dir",
            type=Path,
            metavar="DIR",
            help="a state directory (stop its server first)",
        )
        place.add_argument("--url", metavar="URL", help="a server that is running")
        add_api_key_argument(place)
        return command

    command = add(
        "import",
        "store the rows of JSON Lines files",
        "Store the rows of files in TRL's formats as feedback. What is there already stays as it "
        "is. Exit status 1 if any row was refused; the others are stored.",
    )
    command.add_argument(
        "files", nargs="+", metavar="FILE", help="JSON Lines; - reads standard input"
    )
    command.add_argument(
        "--source", metavar="NAME", help='whose feedback it is (each row\'s "source", or "import")'
    )
    command.add_argument(
        "--model", metavar="NAME", help="the adapter that learns from it (the served model)"
    )

    command = add(
        "export",
        "write feedback as JSON Lines",
        "Write the feedback that stands: what was withdrawn or replaced is left out.",
    )
    command.add_argument(
        "--format",
        choices=(*FORMATS, "all"),
        default="preference",
        help="which rows: those that TRL's preference or unpaired trainers read, or all "
        "(%(default)s)",
    )
    command.add_argument("--adapter", metavar="NAME", help="only what this adapter learns from")
    command.add_argument(
        "--output", type=Path, metavar="FILE", help="where to write (standard output)"
    )

    command = add(
        "delete",
        "remove a person's feedback and answers",
        "Remove all that a source said, its recorded responses, and what others said about those. "
        "It is gone from the files afterwards. Adapters that have learned from it stay: roll back "
        "or train anew where that matters.",
    )
    command.add_argument("--source", metavar="NAME", required=True, help="whose feedback")
    command.add_argument("--yes", action="store_true", help="do not ask")


def run(args: argparse.Namespace) -> int:
    """Do what was asked; the exit status."""
    if (args.state_dir is None) == (args.url is None):
        raise ConfigError("give one of --state-dir (nothing serves from it) and --url")
    action = {"import": import_files, "export": export, "delete": delete}[args.action]
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_run(action, args))


async def _run(action: Callable[[Door, argparse.Namespace], Any], args: argparse.Namespace) -> int:
    async with _open_door(args) as door:
        status: int = await action(door, args)
        return status


# -- the commands --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Numbered:
    """A row and where it stands, for messages about it."""

    place: str
    row: ImportedRow


async def import_files(door: Door, args: argparse.Namespace) -> int:
    """``cotune feedback import``."""
    report = ImportReport()
    with _progress() as advance:
        for name in args.files:
            with _lines(name) as lines:
                rows = _rows(name, lines, args.model, report)
                for source, batch in _batches(rows, args.source):
                    outcomes = await door.send([item.row.event for item in batch], source)
                    for item, outcome in zip(batch, outcomes, strict=True):
                        report.count(item.place, outcome)
                    advance(len(batch), report.summary())
    print(report.summary(), file=sys.stderr)
    return 1 if report.refused else 0


async def export(door: Door, args: argparse.Namespace) -> int:
    """``cotune feedback export``."""
    count = other = 0
    with _output(args.output) as write, _progress() as advance:
        async for row in door.export(args.adapter):
            if args.format not in ("all", format_of(row)):
                other += 1
                continue
            write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
            count += 1
            advance(1, f"{count} rows")
    left_out = f"; {other} of another format left out (--format)" if other else ""
    print(f"{count} rows{left_out}", file=sys.stderr)
    return 0


async def delete(door: Door, args: argparse.Namespace) -> int:
    """``cotune feedback delete``."""
    if not args.yes:
        if not sys.stdin.isatty():
            raise ConfigError("deleting asks first; give --yes where nobody can answer")
        print(f"Delete all feedback and answers of {args.source!r} for ever? [y/N] ", end="")
        answer = await asyncio.to_thread(sys.stdin.readline)
        if answer.strip().lower() not in ("y", "yes"):
            print("nothing was deleted", file=sys.stderr)
            return 1
    print(f"{await door.delete(args.source)} events removed", file=sys.stderr)
    return 0


class ImportReport:
    """What became of the rows."""

    def __init__(self) -> None:
        self.stored = 0
        self.duplicates = 0
        self.refused = 0

    def count(self, place: str, outcome: Outcome) -> None:
        """One row's outcome; refusals are told at once."""
        if outcome.refusal is not None:
            self.refused += 1
            if self.refused <= SHOWN_ERRORS:
                print(f"{place}: {outcome.refusal}", file=sys.stderr)
            elif self.refused == SHOWN_ERRORS + 1:
                print("further refusals are only counted", file=sys.stderr)
        elif outcome.is_duplicate:
            self.duplicates += 1
        else:
            self.stored += 1

    def summary(self) -> str:
        """In words."""
        return f"{self.stored} stored, {self.duplicates} there before, {self.refused} refused"


def _rows(
    name: str, lines: Iterable[bytes], model: str | None, report: ImportReport
) -> Iterator[Numbered]:
    """The rows that can be read; the others are counted as refused."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        try:
            yield Numbered(place, parse_row(line, model=model))
        except RequestError as error:
            report.count(place, Outcome(refusal=error.message))


def _batches(rows: Iterable[Numbered], source: str | None) -> Iterator[tuple[str, list[Numbered]]]:
    """Successive rows of one source, in batches."""
    for name, group in groupby(rows, lambda item: source or item.row.source or "import"):
        batch: list[Numbered] = []
        size = 0
        for item in group:
            item_size = len(orjson.dumps(as_body(item.row.event)))
            if batch and (len(batch) == BATCH_EVENTS or size + item_size > BATCH_BYTES):
                yield name, batch
                batch, size = [], 0
            batch.append(item)
            size += item_size
        if batch:
            yield name, batch


# -- where the feedback is -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one event; `refusal` says why it was not taken."""

    is_duplicate: bool = False
    refusal: str | None = None


class Door(Protocol):
    """A store, opened here or behind a server."""

    async def send(self, events: Sequence[FeedbackEvent], source: str) -> list[Outcome]:
        """Have events stored; an outcome for each, in order."""

    def export(self, adapter: str | None) -> AsyncIterator[Mapping[str, object]]:
        """Rows of the feedback that stands."""

    async def delete(self, source: str) -> int:
        """Remove a person's data; how many events that were."""


@contextlib.asynccontextmanager
async def _open_door(args: argparse.Namespace) -> AsyncIterator[Door]:
    if args.url is not None:
        async with ServerDoor(args.url, api_key(args)).open() as door:
            yield door
        return
    # Imported here, so that help comes without SQLite.
    from ..runtime.learning.sqlite_store import SqliteBackend
    from ..runtime.learning.store import FeedbackStore

    path = StateDirectory(args.state_dir).feedback
    if args.action != "import" and not path.exists():
        raise ConfigError(
            f"--state-dir is {str(args.state_dir)!r}, and no feedback is stored there; "
            "give the one that `cotune serve` was started with"
        )
    # The owner of the directory is not held to the quotas of strangers.
    config = FeedbackConfig(quota_events=sys.maxsize)
    async with FeedbackStore(partial(SqliteBackend, path), config) as store:
        yield StateDoor(store)


class StateDoor:
    """A state directory that nobody serves from."""

    def __init__(self, store: Any) -> None:
        self._store = store

    async def send(self, events: Sequence[FeedbackEvent], source: str) -> list[Outcome]:
        """See `Door.send`. Samples are made when a model is next served from here."""

        async def add(event: FeedbackEvent) -> Outcome:
            try:
                done = await self._store.add(event, source=source, samples=None)
            except RequestError as error:
                return Outcome(refusal=error.message)
            return Outcome(is_duplicate=done.duplicate)

        return await asyncio.gather(*(add(event) for event in events))

    def export(self, adapter: str | None) -> AsyncIterator[Mapping[str, object]]:
        """See `Door.export`."""
        rows: AsyncIterator[Mapping[str, object]] = self._store.export(adapter)
        return rows

    async def delete(self, source: str) -> int:
        """See `Door.delete`."""
        removed: int = await self._store.forget(source)
        return removed


class ServerDoor:
    """The feedback routes of a server that runs.

    Args:
        url: with or without ``/v1``.
        key: sent as a bearer token, if there is one.
        sleep: how to wait some seconds.
    """

    def __init__(
        self,
        url: str,
        key: str | None,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._sleep = sleep
        self._server = AsyncServer(
            url,
            key,
            remedy="start one with `cotune serve --learning`, or give --state-dir",
            broken="run the command again, what was stored stays as it is",
        )

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[ServerDoor]:
        """Connections are made when they are needed."""
        async with self._server.open():
            yield self

    async def send(self, events: Sequence[FeedbackEvent], source: str) -> list[Outcome]:
        """See `Door.send`. What the server cannot take now is sent again when it says."""
        outcomes: list[Outcome | None] = [None] * len(events)
        waiting = list(range(len(events)))
        while waiting:
            body = orjson.dumps([as_body(events[i]) for i in waiting])
            async with self._request("POST", "", {"source": source}, body) as reply:
                data = await reply.read()
            answers = self._answers(reply.status, data, len(waiting))
            wait_s = 0
            again: list[int] = []
            for i, answer in zip(waiting, answers, strict=True):
                error = answer.get("error")
                if error is None:
                    outcomes[i] = Outcome(is_duplicate=bool(answer.get("duplicate")))
                elif error.get("code") in TRY_AGAIN:
                    again.append(i)
                    wait_s = max(wait_s, int(answer.get("retry_after", 1)))
                else:
                    outcomes[i] = Outcome(refusal=str(error.get("message")))
            waiting = again
            if waiting:
                await self._sleep(wait_s)
        return [outcome for outcome in outcomes if outcome is not None]

    async def export(self, adapter: str | None) -> AsyncIterator[Mapping[str, object]]:
        """See `Door.export`."""
        query = {} if adapter is None else {"adapter": adapter}
        async with self._request("GET", "/export", query) as reply:
            if reply.status != 200:
                raise self._error(reply.status, await reply.read())
            # Lines have no bound of their own: a row may hold a long conversation.
            rest = b""
            async for piece in reply.content.iter_any():
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    yield self._load(line)
            if rest:
                raise ServerError(f"{self._server.url} ended the export in the middle of a row")

    async def delete(self, source: str) -> int:
        """See `Door.delete`."""
        async with self._request("DELETE", "", {"source": source}) as reply:
            data = await reply.read()
        if reply.status != 200:
            raise self._error(reply.status, data)
        return int(self._load(data)["deleted"])

    def _request(
        self, method: str, path: str, query: Mapping[str, str], body: bytes | None = None
    ) -> AbstractAsyncContextManager[Any]:
        headers = {} if body is None else {"Content-Type": "application/json"}
        return self._server.request(
            method, f"/feedback{path}", params=query, data=body, headers=headers
        )

    def _answers(self, status: int, data: bytes, count: int) -> list[dict[str, Any]]:
        """One answer per event, whatever the status; an error for the whole request is raised."""
        answers = self._load(data, status)
        if isinstance(answers, list) and len(answers) == count:
            return answers
        raise self._error(status, data)

    def _load(self, data: bytes, status: int = 200) -> Any:
        try:
            return orjson.loads(data)
        except orjson.JSONDecodeError:
            raise self._error(status, data) from None

    def _error(self, status: int, data: bytes) -> ServerError:
        message = told_error(data, f"it does not speak cotune's feedback: {data[:200]!r}")
        return ServerError(f"{self._server.url}: {message} (status {status})")


# -- files and progress --------------------------------------------------------------------------


@contextlib.contextmanager
def _lines(name: str) -> Iterator[Iterable[bytes]]:
    if name == "-":
        yield sys.stdin.buffer
        return
    try:
        file = Path(name).open("rb")  # noqa: SIM115 - so that only opening is guarded
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from error
    with file:
        yield file


@contextlib.contextmanager
def _output(path: Path | None) -> Iterator[Callable[[bytes], object]]:
    """Where rows go. A file gets its name when it is whole."""
    if path is None:
        yield sys.stdout.buffer.write
        sys.stdout.buffer.flush()
        return
    with replacing(path) as temporary:
        try:
            file = temporary.open("wb")
        except OSError as error:
            raise ConfigError(f"--output {path} cannot be written: {error.strerror}") from error
        with file:
            yield file.write


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, str], None]]:
    """A line that says how far it is: nobody knows how much there is to come."""
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with progress_bar(*columns) as bar:
        task = bar.add_task("", total=None)
        yield lambda count, text: bar.update(task, advance=count, description=text)
