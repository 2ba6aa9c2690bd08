"""What the engine hands to the executor for one iteration, and what comes back.

The engine speaks of sequences; the executor packs them into one flat batch of T tokens without
padding, decodes first:

    sequences      s0      s1      s2 (a prefill chunk of 4)    s3 (a chunk of 3)
    token_ids     [a]     [b]     [c  d  e  f]                 [g  h  i]
    positions      17      5       0  1  2  3                   64 65 66
    samples        yes     yes     no (prompt goes on)          yes (prompt ends here)
"""

from __future__ import annotations

from collections.abc import Sequence  # noqa: TC003 - dataclass fields are inspected at run time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .sampling import SamplingState
    from .types import TokenLogprob


@dataclass(frozen=True, slots=True)
class SequenceStep:
    """One sequence's part in an iteration.

    Attributes:
        token_ids: the tokens to compute now, at positions start, start + 1, ... (at least one).
        start: tokens whose KV is already in pages.
        block_table: page ids in order; covers at least start + len(token_ids) tokens.
        adapter_slot: row of the stacked adapter tables; 0 is the base model.
        sampling: how to choose the next token after the last of `token_ids`; None where the
            prompt goes on in a later iteration.
        prompt_logprobs: alternatives wanted for each prompt token that `token_ids` predicts (the
            log-probability of position p + 1 comes from computing position p); None for none.
        prompt_targets: with `prompt_logprobs`, the tokens at positions start + 1, start + 2, ...;
            as many as there are within the prompt.
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    adapter_slot: int = 0
    sampling: SamplingState | None = None
    prompt_logprobs: int | None = None
    prompt_targets: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class SequenceResult:
    """What came of one `SequenceStep`, in the same order.

    `token_id` is the sampled token, or None where none was asked for. `error` is set instead where
    this sequence alone failed (its logits are not finite).
    """

    token_id: int | None = None
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """The results of an iteration and where its time went (seconds on the lane's thread)."""

    results: Sequence[SequenceResult]
    forward_s: float
    sample_s: float
