"""Ordinary text, and the measure of repetition."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cotune.runtime.errors import ConfigError
from cotune.runtime.learning.probe import read_probe, repetition

if TYPE_CHECKING:
    from pathlib import Path


def test_the_text_that_comes_with_cotune_is_varied_and_short() -> None:
    paragraphs = read_probe()
    assert len(paragraphs) >= 40
    assert len(set(paragraphs)) == len(paragraphs)
    assert all(60 <= len(paragraph) <= 400 for paragraph in paragraphs)
    words = [word.strip('.,;:"?!').lower() for p in paragraphs for word in p.split()]
    assert len(set(words)) > 500
    assert sum("Assistant:" in paragraph for paragraph in paragraphs) >= 8


def test_paragraphs_are_separated_by_empty_lines_and_lines_within_are_joined(
    tmp_path: Path,
) -> None:
    file = tmp_path / "probe.txt"
    file.write_text("\n\n one\n two \n \t\nthree\n\n\n\nfour é\n", encoding="utf-8")
    assert read_probe(file) == ("one two", "three", "four é")


def test_a_long_file_is_read_up_to_a_bound(tmp_path: Path) -> None:
    file = tmp_path / "probe.txt"
    file.write_text("\n\n".join(f"paragraph {i}" for i in range(1000)))
    assert len(read_probe(file)) == 256


@pytest.mark.parametrize("content", [None, b"", b" \n\n \n", b"\xff\xfe\xff"])
def test_a_file_that_cannot_be_used_is_named_with_the_setting(
    tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "mine.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"learning.gate.probe_file: .*mine\.txt") as raised:
        read_probe(file)
    assert raised.value.param == "learning.gate.probe_file"


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([], 0.0),
        ([1, 2, 3], 0.0),
        ([1, 2, 3, 4], 0.0),
        (list(range(100)), 0.0),
        ([7] * 5, 0.5),  # two 4-grams, one of them repeated
        ([7] * 103, 0.99),
        ([1, 2, 3, 4, 1, 2, 3, 4], 0.2),  # five 4-grams, one repeated
    ],
)
def test_repetition_is_the_share_of_4_grams_that_were_there_before(
    tokens: list[int], share: float
) -> None:
    assert repetition(tokens) == pytest.approx(share)
