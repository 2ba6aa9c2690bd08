"""Files of one JSON object per line, plain or compressed: corpora, sessions, preferences."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from typing import TYPE_CHECKING, Any

from ..runtime.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each object is, for error messages ("FILE, line 3"), and the object.

    Args:
        path: compressed if the name ends in ``.gz`` or ``.xz``.

    Raises:
        ConfigError: the file cannot be read, or a line is no JSON object.
    """
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                place = f"{path}, line {number}"
                yield place, _parse(line, place)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, lzma.LZMAError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); check --data", param="data") from error


def _parse(line: str, place: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place} is not JSON ({error}); check --data", param="data") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{place} is no JSON object; check --data", param="data")
    return fields
