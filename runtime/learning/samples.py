"""What is trained on: feedback, as token ids. Frozen; the store numbers them.

A *pair* is a prompt with a chosen and a rejected completion; a *rated* sample is a prompt with one
completion that was liked or disliked. Completions hold the end-of-turn token where the answer came
to its own end. Reference log-probabilities are summed over completion tokens, under the base model.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence  # noqa: TC003 - dataclass fields are inspected at run time
from dataclasses import dataclass
from typing import TypeAlias

TokenIds: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """`chosen_ids` was preferred to `rejected_ids` as the continuation of `prompt_ids`."""

    key: int
    adapter: str
    source: str
    prompt_ids: TokenIds
    chosen_ids: TokenIds
    rejected_ids: TokenIds
    ref_chosen_logp: float | None = None
    ref_rejected_logp: float | None = None

    @property
    def tokens(self) -> int:
        """Tokens that a forward computes: the prompt counts once."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)

    @property
    def is_ready(self) -> bool:
        """Whether its reference log-probabilities are known."""
        return self.ref_chosen_logp is not None and self.ref_rejected_logp is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class RatedCompletion:
    """`completion_ids` was liked (`is_desirable`) or disliked as the continuation of a prompt."""

    key: int
    adapter: str
    source: str
    prompt_ids: TokenIds
    completion_ids: TokenIds
    is_desirable: bool
    ref_logp: float | None = None

    @property
    def tokens(self) -> int:
        """Tokens that a forward computes."""
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def is_ready(self) -> bool:
        """Whether its reference log-probability is known."""
        return self.ref_logp is not None


Sample: TypeAlias = PreferencePair | RatedCompletion


def is_held_out(adapter: str, prompt_ids: Sequence[int], share: float) -> bool:
    """Whether feedback on this prompt is for the gate and never trained on.

    A stable hash of the prompt decides, so that all samples of one prompt are on one side, for ever
    and on every machine.
    """
    digest = hashlib.blake2b(adapter.encode(), digest_size=8)
    digest.update(array("q", prompt_ids).tobytes())
    return int.from_bytes(digest.digest(), "little") < share * 2**64
