"""Files and directories that are there completely or not at all, also after a power cut.

The order is always the same: write beside the target, fsync what was written, rename, fsync the
directory that holds the name. A rename is atomic within a file system (POSIX, rename); without the
first fsync the new name could come up with old or no bytes, without the second it could be lost
(Pillai et al. 2014, "All File Systems Are Not Created Equal", §4). A crash leaves at most a name
that begins with `.tmp-`, which `remove_leftovers` clears away.

Everything here blocks: call it from a thread of its own. What the disk refuses is `StorageError`,
unless said otherwise.
"""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TEMPORARY = ".tmp-"


def make_directory(path: Path) -> None:
    """Make `path` and its parents, durably; those that are there already are left alone."""
    with storage_errors(path):
        _make_directory(path)


def write_file(path: Path, data: bytes) -> None:
    """Put a file of `data` in the place of `path`, atomically.

    Raises:
        StorageError: the disk is full or failing. What was at `path` before is still there, unless
            the very last step failed, the fsync of the directory: then it is either.
    """
    with storage_errors(path), replacing(path) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the place of `path`, atomically, if the block succeeds.

    What the disk refuses is `OSError` here, so that the block's own errors stay what they are.
    """
    temporary = _beside(path)
    try:
        yield temporary
        _sync(str(temporary))
        os.replace(temporary, path)
    except BaseException:
        if temporary.exists():
            temporary.unlink()
        raise
    _sync_directory(path.parent)


def write_directory(path: Path, fill: Callable[[Path], None]) -> None:
    """Put a new directory at `path`, atomically, with what `fill` writes into the one it is given.

    Raises:
        StorageError: the disk is full or failing; nothing is at `path`.
        FileExistsError: something is at `path` already. Whatever else `fill` raises is raised too.
    """
    if path.exists():
        raise FileExistsError(path)
    temporary = _beside(path)
    with storage_errors(path):
        try:
            temporary.mkdir()
            fill(temporary)
            _sync_tree(temporary)
            os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync_directory(path.parent)


def remove_directory(path: Path) -> None:
    """Take the directory at `path` away: after a crash it is there completely or not at all.

    Raises:
        StorageError: the disk is failing.
    """
    temporary = _beside(path)
    with storage_errors(path):
        os.rename(path, temporary)
        _sync_directory(path.parent)
        shutil.rmtree(temporary)


def remove_leftovers(directory: Path) -> list[str]:
    """Clear away what an interrupted call left in `directory`; the names that were there."""
    with storage_errors(directory):
        leftovers = [entry for entry in directory.iterdir() if entry.name.startswith(TEMPORARY)]
        for entry in leftovers:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    return sorted(entry.name for entry in leftovers)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Raise what the operating system refuses as `StorageError`, naming `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(
            f"cannot write {path}: {reason}; free space on that disk, or mend its permissions",
            code="storage_failed",
        ) from error


def _beside(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(4)}")


def _make_directory(path: Path) -> None:
    if path.is_dir():
        return
    _make_directory(path.parent)
    path.mkdir(exist_ok=True)
    _sync_directory(path.parent)


def _sync_tree(directory: Path) -> None:
    """Every file below, then every directory, innermost first."""
    for root, _directories, files in os.walk(directory, topdown=False):
        for name in files:
            _sync(os.path.join(root, name))
        _sync(root)


def _sync_directory(directory: Path) -> None:
    _sync(str(directory))


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
