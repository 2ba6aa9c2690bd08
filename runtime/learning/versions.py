"""Adapter versions on disk: immutable, numbered, and which of them is live.

    adapters/                       the root
      .lock                         held by the process that may write
      tutor/                        one folder per adapter name
        live.json                   which version is live, how it came to be, the last number
        versions/0000007/           a PEFT directory: adapter_config.json, adapter_model.safetensors
          version.json              its metrics, its lineage, why it passed
        refused/0000008/            the same for what the gate refused, kept for inspection

*Numbers* count up per adapter and are never used twice, whatever happens to a candidate: handing
one out is written down before it is used. So (name, number) names the same weights for ever.
Version 0 is the base model, which is always there and has no directory.

*Crashes.* A version's directory and `live.json` appear at once and completely (`durable`). Killed
between the two, a process leaves a version that is published and not live, which is harmless.

*Going back.* `previous` is what was live before the live version. Setting that live takes the live
one back, so that going back twice leads two versions back and not to and fro:

    published 3, 5, 7     live 7    previous 5
    set_live(5)           live 5    previous 3
    published 8           live 8    previous 5

Everything here blocks and belongs to one thread at a time; the runtime calls it on threads of
their own, one after the other. Torch is imported only to write versions and to compare them.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import threading
import weakref
from collections.abc import Mapping  # noqa: TC003 - dataclass fields are inspected at run time
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ..errors import ConfigError, ConflictError, NotFoundError, StorageError
from .durable import (
    make_directory,
    remove_directory,
    remove_leftovers,
    storage_errors,
    write_directory,
    write_file,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from .distance import ModuleDistance

log = logging.getLogger(__name__)

FORMAT = 1
LIVE_FILE = "live.json"
VERSION_FILE = "version.json"
LOCK_FILE = ".lock"
HISTORY = 1000
"""Changes of the live version that are kept in `live.json`."""

State: TypeAlias = Literal["published", "refused"]
_FOLDERS: dict[State, str] = {"published": "versions", "refused": "refused"}
_NUMBER = re.compile(r"\d{7,}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """What a version was made of.

    Attributes:
        steps: optimizer steps since the adapter began.
        samples: samples that were at hand for training.
        tokens: tokens of forwards that were trained on.
        last_sample_key: the newest sample that may have been trained on.
        base_model: name of the base model.
        base_fingerprint: tells that base model from others of the same name.
    """

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    last_sample_key: int = 0
    base_model: str = ""
    base_fingerprint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What is written beside a version's weights.

    Attributes:
        parent: the version that it was compared with; 0 is the base model.
        lineage: what it was made of.
        metrics: what the gate measured.
        reasons: why the gate refused it; empty if it passed.
        explanation: the verdict in words.
        created: when it was made.
    """

    parent: int
    lineage: Lineage
    metrics: Mapping[str, float] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    explanation: str = ""
    created: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionRecord:
    """One version on disk. See `Manifest` for what is not said here.

    Attributes:
        adapter: its name.
        number: its number.
        state: whether the gate let it pass. A refused version may be live nevertheless, by force.
        is_live: whether it is what the name means.
        path: its PEFT directory.
        nbytes: what that takes on disk.
    """

    adapter: str
    number: int
    state: State
    is_live: bool
    parent: int
    created: datetime
    lineage: Lineage
    metrics: Mapping[str, float]
    reasons: tuple[str, ...]
    explanation: str
    path: Path
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveChange:
    """One entry of an adapter's history: from `at` on, `number` was live."""

    number: int
    at: datetime
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Diff:
    """How two versions differ.

    Attributes:
        a, b: the versions; 0 is the base model.
        metrics: by name, the values of both; None where one has none.
        modules: by path of the linear, how far its weights are apart.
    """

    adapter: str
    a: int
    b: int
    metrics: Mapping[str, tuple[float | None, float | None]]
    modules: Mapping[str, ModuleDistance]


@dataclass(frozen=True, slots=True)
class _Live:
    """The content of `live.json`. `stack` ends with the live version; 0 is below all."""

    adapter: str
    last_number: int = 0
    stack: tuple[int, ...] = ()
    history: tuple[LiveChange, ...] = ()


class VersionStore:
    """Owns the directories of all adapters' versions, and which of them are live.

    Opening clears away what an interrupted process left, and takes the lock: one process at a time
    may write. The kernel gives the lock back when the process ends, however it ends.

    Args:
        root: the directory; made if absent.
        read_only: take no lock, clear nothing away and refuse to write; works beside a process
            that writes.

    Raises:
        ConfigError: another process writes there.
        StorageError: the disk is full or failing.
    """

    def __init__(self, root: Path, *, read_only: bool = False) -> None:
        self._root = root
        self._read_only = read_only
        self._turn = threading.RLock()  # calls may come from several threads of a pool
        self._unlock: Callable[[], object] = lambda: None
        if read_only:
            return
        make_directory(root)
        with storage_errors(root):
            self._unlock = weakref.finalize(self, os.close, _lock(root / LOCK_FILE))
        for folder in (root, *self._folders()):
            for place in (folder, *(folder / name for name in _FOLDERS.values())):
                if place.is_dir() and (names := remove_leftovers(place)):
                    log.info("cleared away in %s: %s", place, ", ".join(names))

    def close(self) -> None:
        """Give the lock back; nothing else is held. Idempotent."""
        self._unlock()

    # --- numbers and live versions ----------------------------------------------------------------

    def next_number(self, adapter: str) -> int:
        """A number for a new version, which nobody gets again. Written down before it is returned.

        Raises:
            StorageError: the disk is full or failing.
        """
        with self._turn:
            live = self._read_live(adapter)
            number = max(live.last_number, *self._numbers(adapter), 0) + 1
            self._write_live(replace(live, last_number=number))
            return number

    def live(self, adapter: str) -> int:
        """The live version; 0 is the base model.

        Raises:
            ConfigError: the file that says so is damaged.
        """
        stack = self._read_live(adapter).stack
        return stack[-1] if stack else 0

    def previous(self, adapter: str) -> int:
        """What was live before the live version and is still there; 0 is the base model."""
        stack = self._read_live(adapter).stack
        there = self._numbers(adapter) - set(stack[-1:])
        return next((number for number in reversed(stack[:-1]) if number in there or not number), 0)

    def set_live(self, adapter: str, number: int, why: str) -> None:
        """From now on, also after a restart, `adapter` means version `number`.

        Raises:
            NotFoundError: there is no such version.
            StorageError: the disk is full or failing; another version may be live than before only
                if the very last step failed.
        """
        with self._turn:
            if number:
                self.path(adapter, number)
            live = self._read_live(adapter)
            stack = live.stack
            if number == self.previous(adapter) and stack:
                # Taken back: what was pruned in between goes too, down to where `number` was.
                below = stack[:-1]
                while below and below[-1] != number:
                    below = below[:-1]
                stack = below
            elif not stack or stack[-1] != number:
                stack = (*stack, number)
            change = LiveChange(number=number, at=datetime.now(UTC), why=why)
            self._write_live(
                replace(
                    live,
                    last_number=max(live.last_number, number),
                    stack=stack[-HISTORY:],
                    history=(*live.history, change)[-HISTORY:],
                )
            )

    def history(self, adapter: str) -> tuple[LiveChange, ...]:
        """Which version was live from when on, and why; oldest first."""
        return self._read_live(adapter).history

    # --- versions ---------------------------------------------------------------------------------

    def adapters(self) -> tuple[str, ...]:
        """Every name that has numbers, sorted.

        Raises:
            ConfigError: the file that says so is damaged.
        """
        files = [folder / LIVE_FILE for folder in self._folders()]
        return tuple(sorted(_parse_live(file).adapter for file in files if file.exists()))

    def directory(self, adapter: str, number: int, *, refused: bool = False) -> Path:
        """Where a version is, or would be; says nothing about whether it is there."""
        folder = _FOLDERS["refused" if refused else "published"]
        return self._folder(adapter) / folder / f"{number:07d}"

    def path(self, adapter: str, number: int) -> Path:
        """The PEFT directory of a version.

        Raises:
            NotFoundError: there is none, or it was pruned.
        """
        found = self._find(adapter, number)
        if found is None:
            known = ", ".join(map(str, sorted(self._numbers(adapter)))) or "none yet"
            raise NotFoundError(
                f"{adapter} has no version {number}; versions: {known}",
                param="version",
                code="version_not_found",
            )
        return found[1]

    def write(
        self,
        adapter: str,
        number: int,
        save: Callable[[Path], None],
        manifest: Manifest,
        *,
        refused: bool,
    ) -> Path:
        """Put a new version on disk, completely or not at all. It is not live by that.

        Args:
            adapter: its name.
            number: from `next_number`.
            save: writes a PEFT directory into the empty one it is given.
            manifest: goes beside it.
            refused: whether the gate refused it.

        Returns:
            Its directory.

        Raises:
            ConflictError: the number is taken.
            StorageError: the disk is full or failing.
            ValueError: it is to be published and has weights that are not finite.
        """
        from safetensors import SafetensorError

        if number < 1:
            raise ValueError(f"{adapter}@{number}: versions are numbered from 1")

        def fill(directory: Path) -> None:
            try:
                save(directory)
            except SafetensorError as error:  # how it reports a full disk
                raise StorageError(
                    f"cannot write {adapter}@{number}: {error}; free space on that disk",
                    code="storage_failed",
                ) from error
            if not refused:
                _require_finite(directory)
            (directory / VERSION_FILE).write_bytes(_manifest_bytes(adapter, number, manifest))

        with self._turn:
            self._require_writable()
            path = self.directory(adapter, number, refused=refused)
            if self._find(adapter, number) is not None:
                raise ConflictError(
                    f"{adapter} has a version {number} already, and versions never change; take "
                    "the number from next_number",
                    param="version",
                    code="version_exists",
                )
            live = self._read_live(adapter)
            if number > live.last_number:
                self._write_live(replace(live, last_number=number))
            make_directory(path.parent)
            write_directory(path, fill)
            return path

    def records(self, adapter: str | None = None) -> tuple[VersionRecord, ...]:
        """Every version on disk, or those of one adapter, by name, then number.

        One whose description is damaged is left out, with a warning in the log.
        """
        names = self.adapters() if adapter is None else (adapter,)
        found = []
        for name in names:
            live = self.live(name)
            for number in sorted(self._numbers(name)):
                located = self._find(name, number)
                if located is None:  # pruned a moment ago
                    continue
                try:
                    found.append(_read_record(name, number, *located, is_live=number == live))
                except (OSError, ValueError, KeyError, TypeError) as error:
                    log.warning("%s@%d cannot be described: %r", name, number, error)
        return tuple(found)

    def record(self, adapter: str, number: int) -> VersionRecord:
        """One version.

        Raises:
            NotFoundError: there is none.
            ConfigError: its description is damaged.
        """
        path = self.path(adapter, number)
        for record in self.records(adapter):
            if record.number == number:
                return record
        raise ConfigError(
            f"{path / VERSION_FILE} is damaged; get it from a backup, or remove {path}",
            param="version",
        )

    def diff(self, adapter: str, a: int, b: int) -> Diff:
        """Metrics and weights of two versions, side by side; either may be 0, the base model.

        Raises:
            NotFoundError: there is no such version.
            ConfigError: their files are damaged.
        """
        from .distance import module_distances

        records = [self.record(adapter, number) if number else None for number in (a, b)]
        left, right = [record.metrics if record else {} for record in records]
        paths = [record.path if record else None for record in records]
        return Diff(
            adapter=adapter,
            a=a,
            b=b,
            metrics={name: (left.get(name), right.get(name)) for name in sorted({*left, *right})},
            modules=module_distances(*paths),
        )

    def prune(self, adapter: str, keep: int, pinned: Collection[int]) -> tuple[int, ...]:
        """Remove the oldest versions, published and refused ones counted apart.

        What stays: the last `keep` of each kind, the live version, the one before it, and `pinned`.

        Returns:
            The numbers that are gone.
        """
        with self._turn:
            self._require_writable()
            stays = {*pinned, self.live(adapter), self.previous(adapter)}
            gone = []
            for folder in _FOLDERS.values():
                others = sorted(_numbers_in(self._folder(adapter) / folder) - stays)
                for number in others[: max(len(others) - keep, 0)]:
                    remove_directory(self._folder(adapter) / folder / f"{number:07d}")
                    gone.append(number)
            return tuple(sorted(gone))

    # --- inside -----------------------------------------------------------------------------------

    def _require_writable(self) -> None:
        if self._read_only:
            raise ConfigError(f"{self._root} was opened for reading only; open it for writing")

    def _folder(self, adapter: str) -> Path:
        return self._root / _folder_name(adapter)

    def _folders(self) -> list[Path]:
        if not self._root.is_dir():
            return []
        return sorted(entry for entry in self._root.iterdir() if entry.is_dir())

    def _find(self, adapter: str, number: int) -> tuple[State, Path] | None:
        for state in _FOLDERS:
            path = self.directory(adapter, number, refused=state == "refused")
            if path.is_dir():
                return state, path
        return None

    def _numbers(self, adapter: str) -> set[int]:
        folder = self._folder(adapter)
        return set().union(*(_numbers_in(folder / name) for name in _FOLDERS.values()))

    def _read_live(self, adapter: str) -> _Live:
        file = self._folder(adapter) / LIVE_FILE
        if not file.exists():
            return _Live(adapter)
        live = _parse_live(file)
        if live.adapter != adapter:
            raise ConfigError(
                f"{file} is of the adapter {live.adapter!r}, not {adapter!r}; move that folder away"
            )
        return live

    def _write_live(self, live: _Live) -> None:
        self._require_writable()
        folder = self._folder(live.adapter)
        make_directory(folder)
        content = {
            "format": FORMAT,
            "adapter": live.adapter,
            "live": live.stack[-1] if live.stack else 0,  # for people; `stack` is what counts
            "last_number": live.last_number,
            "stack": live.stack,
            "history": [
                {"number": change.number, "at": change.at.isoformat(), "why": change.why}
                for change in live.history
            ],
        }
        write_file(folder / LIVE_FILE, json.dumps(content, indent=1).encode())


def _parse_live(file: Path) -> _Live:
    try:
        found = json.loads(file.read_bytes())
        if found["format"] > FORMAT:
            raise ConfigError(
                f"{file} has format {found['format']}, and this cotune knows {FORMAT}; use the "
                "version of cotune that wrote it"
            )
        return _Live(
            adapter=str(found["adapter"]),
            last_number=int(found["last_number"]),
            stack=tuple(int(number) for number in found["stack"]),
            history=tuple(
                LiveChange(
                    number=int(change["number"]),
                    at=datetime.fromisoformat(change["at"]),
                    why=str(change["why"]),
                )
                for change in found["history"]
            ),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file} is damaged ({error!r}); get it from a backup, or remove it: the base "
            "model is live then, and versions on disk can be promoted"
        ) from error


def _folder_name(adapter: str) -> str:
    """A name for any file system: the adapter's own where that is one, told apart by a hash."""
    if re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", adapter):
        return adapter
    readable = re.sub(r"[^a-z0-9_-]+", "_", adapter.lower())[:64].strip("_")
    return f"{readable}.{blake2b(adapter.encode(), digest_size=6).hexdigest()}"


def _numbers_in(folder: Path) -> set[int]:
    if not folder.is_dir():
        return set()
    return {int(entry.name) for entry in folder.iterdir() if _NUMBER.fullmatch(entry.name)}


def _lock(file: Path) -> int:
    """A descriptor that holds the lock; closing it gives the lock back."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        import fcntl
    except ImportError:  # Windows: nothing keeps two processes apart there
        return descriptor
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(
            f"{file.parent} is used by another process; stop it, or ask the running server over "
            "HTTP (--url)",
            param="learning.state_dir",
        ) from None
    return descriptor


def _manifest_bytes(adapter: str, number: int, manifest: Manifest) -> bytes:
    content = {
        "format": FORMAT,
        "adapter": adapter,
        "number": number,
        "parent": manifest.parent,
        "created": manifest.created.isoformat(),
        "explanation": manifest.explanation,
        "reasons": manifest.reasons,
        # JSON has no infinities, and a refused version may well have some.
        "metrics": {
            name: value if math.isfinite(value) else str(value)
            for name, value in manifest.metrics.items()
        },
        "lineage": asdict(manifest.lineage),
    }
    return json.dumps(content, indent=1, allow_nan=False).encode()


def _read_record(
    adapter: str, number: int, state: State, path: Path, *, is_live: bool
) -> VersionRecord:
    content: dict[str, Any] = json.loads((path / VERSION_FILE).read_bytes())
    return VersionRecord(
        adapter=adapter,
        number=number,
        state=state,
        is_live=is_live,
        parent=int(content["parent"]),
        created=datetime.fromisoformat(content["created"]),
        lineage=Lineage(**content["lineage"]),
        metrics={name: float(value) for name, value in content["metrics"].items()},
        reasons=tuple(content["reasons"]),
        explanation=str(content["explanation"]),
        path=path,
        nbytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
    )


def _require_finite(directory: Path) -> None:
    """The last line of defence: no NaN is ever published, whoever computed it."""
    from safetensors import safe_open

    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                if not tensors.get_tensor(name).isfinite().all():
                    raise ValueError(f"{name} has values that are not finite; nothing is published")
