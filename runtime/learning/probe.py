"""Ordinary text, and how repetitive what a version writes is: the gate's view of general ability.

The text is short paragraphs and turns of dialogue on many subjects, in `probe.txt` or in a file of
the user's. It is never trained on. What counts is the change against the base model on the same
text, so a few dozen paragraphs do.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

PROBE_FILE = Path(__file__).with_name("probe.txt")
MAX_PARAGRAPHS = 256


def read_probe(file: Path | None = None) -> tuple[str, ...]:
    """The paragraphs of `file` (None: of the one that comes with cotune), at most 256.

    Empty lines separate them; line breaks within one are spaces.

    Raises:
        ConfigError: the file cannot be read, or holds no text.
    """
    path = PROBE_FILE if file is None else file.expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _wrong(f"{path} cannot be read ({error}); name a text file in UTF-8") from error
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n[ \t]*\n", text)]
    paragraphs = [paragraph for paragraph in paragraphs if paragraph]
    if not paragraphs:
        raise _wrong(f"{path} holds no text; fill it with paragraphs, separated by empty lines")
    return tuple(paragraphs[:MAX_PARAGRAPHS])


def repetition(token_ids: Sequence[int], n: int = 4) -> float:
    """The share of n-grams that were there before; [0, 1). 0 for fewer than n tokens.

    One minus distinct over all n-grams: "rep-n" of Welleck et al. 2020, §6.1. Text that goes round
    in a circle comes close to 1, prose of a few hundred tokens stays close to 0.
    """
    count = len(token_ids) - n + 1
    if count < 1:
        return 0.0
    distinct = {tuple(token_ids[start : start + n]) for start in range(count)}
    return 1.0 - len(distinct) / count


def _wrong(message: str) -> ConfigError:
    return ConfigError(
        f"learning.gate.probe_file: {message}",
        param="learning.gate.probe_file",
        code="invalid_config",
    )
