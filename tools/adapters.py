"""`cotune adapters`: the versions that feedback has made of an adapter, and which of them answers.

Works on a state directory, or on a server that runs (--url). Looking, comparing and exporting work
on a state directory beside its server, too; to change what is live there, ask the server.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import urllib.parse
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..runtime.errors import ConfigError, ConflictError, NotFoundError
from ..runtime.learning.state_directory import StateDirectory
from ..runtime.learning.status import Candidates
from ..runtime.learning.versions import Lineage, VersionRecord, VersionStore
from .live_server import LiveServer
from .options import add_api_key_argument, add_general_arguments, api_key

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping, Sequence

EPILOG = """\
examples:
  cotune adapters list --state-dir state
  cotune adapters show tutor@7 --state-dir state       what it was made of, what the gate said
  cotune adapters diff tutor@5 tutor@7 --state-dir state
  cotune adapters rollback tutor@7 --url http://127.0.0.1:8000
  cotune adapters promote tutor@5 --url http://127.0.0.1:8000
  cotune adapters export tutor@7 my-adapter --state-dir state

A version is named NAME@NUMBER; the number alone does where there is one adapter. Version 0 is the
base model. An exported version is a PEFT directory: transformers and peft load it.

`cotune adapters COMMAND --help` lists the flags of one command.
"""
READING = ("list", "show", "diff", "export")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the commands and flags of ``cotune adapters``."""
    parser.epilog = EPILOG
    commands = parser.add_subparsers(
        title="commands", dest="action", metavar="COMMAND", required=True
    )

    def add(name: str, text: str, description: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=description,
            formatter_class=parser.formatter_class,
            allow_abbrev=False,
        )
        place = command.add_argument_group("where the versions are (one of them)")
        place.add_argument("--state-dir", type=Path, metavar="DIR", help="a state directory")
        if name not in ("diff", "export"):
            place.add_argument("--url", metavar="URL", help="a server that is running")
            add_api_key_argument(place)
        return command

    def add_version(command: argparse.ArgumentParser, *names: str) -> None:
        for name in names:
            command.add_argument(name, metavar=name.upper(), help="NAME@NUMBER, or a number")

    def end(command: argparse.ArgumentParser, *, can_be_json: bool) -> None:
        if can_be_json:
            command.add_argument("--json", action="store_true", help="JSON instead of text")
        add_general_arguments(command, default_log_level="warning")

    command = add(
        "list",
        "all versions, one a line",
        "List versions, published and refused, and how many candidates there were: those that the "
        "gate left undecided were trained further and are no versions. --json: versions alone.",
    )
    command.add_argument("--adapter", metavar="NAME", help="only those of one adapter")
    end(command, can_be_json=True)

    command = add("show", "all there is to know of one", "Show a version's lineage and metrics.")
    add_version(command, "version")
    end(command, can_be_json=True)

    command = add(
        "diff",
        "compare two versions",
        "Compare two versions of one adapter: their metrics, and how far their weights are apart "
        "in each module (Frobenius norms of what they add to the base weights).",
    )
    add_version(command, "a", "b")
    end(command, can_be_json=True)

    command = add(
        "promote",
        "let a version go live",
        "Let a version go live. Requests that run finish on theirs; new ones get it.",
    )
    add_version(command, "version")
    command.add_argument("--force", action="store_true", help="also one that the gate refused")
    end(command, can_be_json=False)

    command = add(
        "rollback",
        "take the live version back",
        "Take the live version back: what was live before it is live again. Naming the version "
        "keeps a rollback that comes twice from going back two steps.",
    )
    add_version(command, "version")
    end(command, can_be_json=False)

    command = add("export", "copy a version out", "Copy a version's PEFT directory.")
    add_version(command, "version")
    command.add_argument("directory", type=Path, metavar="DIR", help="made by this; may not exist")
    end(command, can_be_json=False)


def run(args: argparse.Namespace) -> int:
    """Do what was asked; the exit status."""
    url = getattr(args, "url", None)
    if (args.state_dir is None) == (url is None):
        raise ConfigError("give one of --state-dir and --url")
    if url is not None:
        remedy = "start one with `cotune serve --learning`, or give --state-dir"
        _ACTIONS[args.action](ServerShelf(LiveServer(url, api_key(args), remedy)), args)
        return 0
    with _open_store(args.state_dir, read_only=args.action in READING) as store:
        _ACTIONS[args.action](DirectoryShelf(store, StateDirectory(args.state_dir)), args)
    return 0


@contextlib.contextmanager
def _open_store(state_dir: Path, *, read_only: bool) -> Iterator[VersionStore]:
    root = StateDirectory(state_dir).adapters
    if not root.is_dir():
        raise ConfigError(
            f"--state-dir is {str(state_dir)!r}, and no versions are stored there; give the one "
            "that `cotune serve` was started with"
        )
    with contextlib.closing(VersionStore(root, read_only=read_only)) as store:
        yield store


# -- the commands --------------------------------------------------------------------------------


def list_versions(shelf: Shelf, args: argparse.Namespace) -> None:
    """``cotune adapters list``."""
    records = [r for r in shelf.records() if args.adapter in (None, r.adapter)]
    if args.json:
        print(json.dumps([_body(record) for record in records], indent=2))
        return
    print("\n".join(_table(records)) if records else "no versions yet")
    for adapter, candidates in shelf.candidates().items():
        if args.adapter in (None, adapter):
            print(_tally(adapter, candidates))


def show(shelf: Shelf, args: argparse.Namespace) -> None:
    """``cotune adapters show``."""
    record = _record(shelf, args.version)
    if args.json:
        print(json.dumps(_body(record), indent=2))
        return
    lineage = record.lineage
    lines = [
        (f"{record.adapter}@{record.number}", f"{record.state}{', live' * record.is_live}"),
        ("made", record.created.isoformat(sep=" ", timespec="seconds")),
        ("from", f"{record.adapter}@{record.parent}" if record.parent else "the base model"),
        ("base model", f"{lineage.base_model} {lineage.base_fingerprint}".strip()),
        ("steps", f"{lineage.steps}"),
        ("samples", f"{lineage.samples}, up to number {lineage.last_sample_key}"),
        ("tokens", f"{lineage.tokens}"),
        ("verdict", record.explanation),
        ("reasons", ", ".join(record.reasons) or "none"),
        ("files", f"{record.path} ({record.nbytes / 2**20:.1f} MiB)"),
    ]
    print("\n".join(f"{name:<24}{value}" for name, value in lines))
    for name, value in sorted(record.metrics.items()):
        print(f"{name:<24}{value:.6g}")


def diff(shelf: Shelf, args: argparse.Namespace) -> None:
    """``cotune adapters diff``."""
    assert isinstance(shelf, DirectoryShelf)
    (adapter, a), (other, b) = (_parse(shelf, given) for given in (args.a, args.b))
    if adapter != other:
        raise ConfigError(f"{args.a} and {args.b} are versions of different adapters")
    found = shelf.store.diff(adapter, a, b)
    if args.json:
        print(json.dumps(asdict(found), indent=2))
        return
    print(f"{'metric':<28}{f'{adapter}@{a}':>16}{f'{adapter}@{b}':>16}")
    for name, values in found.metrics.items():
        left, right = ("-" if value is None else f"{value:.4g}" for value in values)
        print(f"{name:<28}{left:>16}{right:>16}")
    width = max((len(module) for module in found.modules), default=6) + 2
    print(f"\n{'module':<{width}}{f'|{a}|':>10}{f'|{b}|':>10}{'distance':>10}{'relative':>10}")
    for module, item in found.modules.items():
        print(
            f"{module:<{width}}{item.norm_a:>10.4g}{item.norm_b:>10.4g}{item.distance:>10.4g}"
            f"{item.relative:>10.0%}"
        )


def promote(shelf: Shelf, args: argparse.Namespace) -> None:
    """``cotune adapters promote``."""
    adapter, number = _parse(shelf, args.version)
    shelf.promote(adapter, number, force=args.force)
    print(f"{_name(adapter, number)} is live")


def rollback(shelf: Shelf, args: argparse.Namespace) -> None:
    """``cotune adapters rollback``."""
    adapter, number = _parse(shelf, args.version)
    print(f"{_name(adapter, shelf.rollback(adapter, number))} is live")


def export(shelf: Shelf, args: argparse.Namespace) -> None:
    """``cotune adapters export``."""
    record = _record(shelf, args.version)
    try:
        shutil.copytree(record.path, args.directory)
    except FileExistsError as error:
        raise ConfigError(f"{args.directory} is there already; name a new directory") from error
    except (OSError, shutil.Error) as error:
        raise ConfigError(f"{args.directory} cannot be written: {error}") from error
    print(f"{record.adapter}@{record.number} is in {args.directory}")


_ACTIONS = {
    "list": list_versions,
    "show": show,
    "diff": diff,
    "promote": promote,
    "rollback": rollback,
    "export": export,
}


# -- where the versions are ----------------------------------------------------------------------


class Shelf(Protocol):
    """A directory of versions, opened here or behind a server."""

    def records(self) -> Sequence[VersionRecord]:
        """Every version."""

    def candidates(self) -> Mapping[str, Candidates]:
        """How many candidates each adapter had."""

    def promote(self, adapter: str, number: int, *, force: bool) -> None:
        """Let a version go live; 0 is the base model."""

    def rollback(self, adapter: str, number: int) -> int:
        """Take the live version `number` back; what is live now."""


class DirectoryShelf:
    """A state directory."""

    def __init__(self, store: VersionStore, state: StateDirectory) -> None:
        self.store = store
        self._state = state

    def records(self) -> Sequence[VersionRecord]:
        """See `Shelf.records`."""
        return self.store.records()

    def candidates(self) -> Mapping[str, Candidates]:
        """See `Shelf.candidates`; up to the last checkpoint."""
        return self._state.candidates()

    def promote(self, adapter: str, number: int, *, force: bool) -> None:
        """See `Shelf.promote`."""
        if number:
            record = self.store.record(adapter, number)
            if record.state == "refused" and not force:
                raise ConflictError(
                    f"{adapter}@{number} was refused by the gate ({', '.join(record.reasons)}); "
                    "say --force to promote it nevertheless"
                )
        self.store.set_live(adapter, number, "promoted")

    def rollback(self, adapter: str, number: int) -> int:
        """See `Shelf.rollback`."""
        live = self.store.live(adapter)
        if number == 0 or number != live:
            raise ConflictError(
                f"{_name(adapter, number)} is not a live version, {_name(adapter, live)} is live; "
                "roll that back, or promote the version that you want"
            )
        before = self.store.previous(adapter)
        self.store.set_live(adapter, before, f"rolled back from {number}")
        return before


class ServerShelf:
    """The adapter routes of a server that runs."""

    def __init__(self, server: LiveServer) -> None:
        self._server = server

    def records(self) -> Sequence[VersionRecord]:
        """See `Shelf.records`."""
        return [_from_body(body) for body in self._server.ask("GET", "/adapters")["data"]]

    def candidates(self) -> Mapping[str, Candidates]:
        """See `Shelf.candidates`."""
        return {
            body["adapter"]: Candidates(
                body["candidates"]["passed"],
                body["candidates"]["refused_by_reason"],
                body["candidates"].get("undecided_by_reason", {}),  # older servers count none
            )
            for body in self._server.ask("GET", "/learning")["adapters"]
        }

    def promote(self, adapter: str, number: int, *, force: bool) -> None:
        """See `Shelf.promote`."""
        path = f"/adapters/{_quoted(adapter, number)}/promote"
        self._server.ask("POST", path, {"force": force})

    def rollback(self, adapter: str, number: int) -> int:
        """See `Shelf.rollback`."""
        path = f"/adapters/{_quoted(adapter, number)}/rollback"
        live = self._server.ask("POST", path, {})["live"]
        return 0 if live is None else int(live["version"])


def _quoted(adapter: str, number: int) -> str:
    return urllib.parse.quote(f"{adapter}@{number}", safe="@/")


# -- names and tables ----------------------------------------------------------------------------


def _name(adapter: str, number: int) -> str:
    return f"{adapter}@{number}" if number else f"the base model, {adapter}@0,"


def _parse(shelf: Shelf, given: str) -> tuple[str, int]:
    """``name@7``, or ``7`` where all versions are of one adapter."""
    name, at, number = given.rpartition("@")
    if not (number.isascii() and number.isdigit()) or bool(at) != bool(name):
        raise ConfigError(f"{given!r} names no version; use NAME@NUMBER")
    if not name:
        names = sorted({record.adapter for record in shelf.records()})
        if len(names) != 1:
            known = ", ".join(names) or "none"
            raise ConfigError(f"{given!r} could be of several adapters ({known}); use NAME@NUMBER")
        name = names[0]
    return name, int(number)


def _record(shelf: Shelf, given: str) -> VersionRecord:
    adapter, number = _parse(shelf, given)
    records = shelf.records()
    for record in records:
        if (record.adapter, record.number) == (adapter, number):
            return record
    known = ", ".join(f"{record.adapter}@{record.number}" for record in records) or "none yet"
    raise NotFoundError(f"there is no version {given}; versions: {known}")


def _table(records: Sequence[VersionRecord]) -> Iterator[str]:
    head = ("version", "state", "live", "made", "wins", "before", "margin", "gain", "reasons")
    rows = [head, *(_row(record) for record in records)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _tally(adapter: str, candidates: Candidates) -> str:
    def counted(outcome: str, reasons: Mapping[str, int]) -> str:
        words = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
        return f"{sum(reasons.values())} {outcome}" + (f" ({words})" if words else "")

    return (
        f"{adapter}: of its candidates {candidates.passed} passed, "
        f"{counted('refused', candidates.refused)}, {counted('undecided', candidates.undecided)}"
    )


def _row(record: VersionRecord) -> tuple[str, ...]:
    def metric(name: str, form: str) -> str:
        value = record.metrics.get(name)
        return "-" if value is None else format(value, form)

    return (
        f"{record.adapter}@{record.number}",
        record.state,
        "*" if record.is_live else "",
        record.created.isoformat(sep=" ", timespec="minutes")[:16],
        metric("win_rate", ".0%"),
        metric("live_win_rate", ".0%"),
        metric("margin", "+.2f"),
        metric("gain", "+.3f"),
        ", ".join(record.reasons),
    )


def _body(record: VersionRecord) -> dict[str, Any]:
    body = asdict(record)
    body["created"] = record.created.isoformat()
    body["path"] = str(record.path)
    return body


def _from_body(body: dict[str, Any]) -> VersionRecord:
    """A version as the server tells it."""
    return VersionRecord(
        adapter=body["adapter"],
        number=body["version"],
        state=body["state"],
        is_live=body["is_live"],
        parent=body["parent"],
        created=datetime.fromtimestamp(body["created"], UTC),
        lineage=Lineage(**body["lineage"]),
        metrics=body["metrics"],
        reasons=tuple(body["reasons"]),
        explanation=body["explanation"],
        path=Path(body["path"]),
        nbytes=body["bytes"],
    )
