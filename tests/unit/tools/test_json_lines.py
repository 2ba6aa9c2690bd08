"""One reader of JSON lines, whatever they are packed in."""

from __future__ import annotations

import gzip
import lzma
from typing import TYPE_CHECKING

import pytest

from cotune.runtime.errors import ConfigError
from cotune.tools.json_lines import read_json_lines

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize(
    ("name", "pack"),
    [("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress), ("a.jsonl.xz", lzma.compress)],
)
def test_each_line_comes_with_its_place(
    tmp_path: Path, name: str, pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / name
    path.write_bytes(pack('{"a": 1}\n{"a": "ä"}\n'.encode()))
    assert list(read_json_lines(path)) == [
        (f"{path}, line 1", {"a": 1}),
        (f"{path}, line 2", {"a": "ä"}),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", None, "cannot be read"),
        ("a.jsonl", b'{"a": "\xff"}', "cannot be read"),
        ("a.jsonl.gz", b"no gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99)[:-9], "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}')[:10] + b"\xff" * 20, "cannot be read"),
        ("a.jsonl.xz", b"no xz", "cannot be read"),
        ("a.jsonl", b'{"a": 1}\n{', "line 2 is not JSON"),
        ("a.jsonl", b'{"a": 1}\n[]', "line 2 is no JSON object"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_remedy(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name}.*{message}.*check --data"):
        list(read_json_lines(path))
