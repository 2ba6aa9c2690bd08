"""The layout of a packed batch: every prompt once, each of its completions after it.

    tokens      prompt ─┬─ completion 0      one group of a preference pair: two completions
                        └─ completion 1

    rows        p0 p1 p2 │ a0 a1 a2 │ b0 b1 │ next group ...
    positions    0  1  2 │  3  4  5 │  3  4 │ 0 ...

A completion's tokens attend the prompt and themselves, never the other completion, so the result is
that of each sequence alone while the prompt is computed once. A token's logits are read from the
row before it; the prompt's last row predicts the first token of every completion of its group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..learning.samples import TokenIds  # noqa: TC001 - dataclass fields are inspected at run time

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A prompt and its completions: chosen and rejected of a pair, or the one that was rated.

    Raises:
        ValueError: the prompt, a completion, or the list of completions is empty.
    """

    prompt_ids: TokenIds
    completions: tuple[TokenIds, ...]

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("prompt_ids is empty; a first token needs one before it")
        if not self.completions or not all(self.completions):
            raise ValueError("completions must be one or more, and none empty")

    @property
    def tokens(self) -> int:
        """Rows that a forward computes: the prompt counts once."""
        return len(self.prompt_ids) + sum(map(len, self.completions))


class Segment(NamedTuple):
    """Rows [start, stop) attend, causally, rows [prefix, prefix_stop) and then themselves.

    The two ranges are empty and equal for a prompt. All are rows of the packed batch.
    """

    prefix: int
    prefix_stop: int
    start: int
    stop: int

    @property
    def keys(self) -> int:
        """How many rows are attended by the last one."""
        return self.prefix_stop - self.prefix + self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedGroups:
    """Groups side by side in one flat batch of T rows, with N completions and R predicted tokens.

    Attributes:
        token_ids: (T,) int64.
        positions: (T,) int64; every completion goes on where its prompt ends.
        segments: who attends whom; together they cover each row once, in order.
        rows: (R,) int64, the row whose logits predict a completion token.
        targets: (R,) int64, that token.
        completion_of: (R,) int64, its completion's number; ascending.
        counts: (N,) int64, tokens of each completion.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    segments: tuple[Segment, ...]
    rows: torch.Tensor
    targets: torch.Tensor
    completion_of: torch.Tensor
    counts: torch.Tensor

    @property
    def tokens(self) -> int:
        """T: rows that a forward computes."""
        return self.token_ids.shape[0]

    @property
    def completions(self) -> int:
        """N."""
        return self.counts.shape[0]


def pack(groups: Sequence[Group], device: torch.device | str = "cpu") -> PackedGroups:
    """Lay groups out side by side.

    Raises:
        ValueError: there is no group.
    """
    if not groups:
        raise ValueError("groups is empty; pack at least one")
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    rows: list[int] = []
    targets: list[int] = []
    counts: list[int] = []
    for group in groups:
        prompt = len(tokens)
        prompt_stop = prompt + len(group.prompt_ids)
        tokens += group.prompt_ids
        positions += range(len(group.prompt_ids))
        segments.append(Segment(prompt, prompt, prompt, prompt_stop))
        for completion in group.completions:
            start = len(tokens)
            stop = start + len(completion)
            tokens += completion
            positions += range(len(group.prompt_ids), len(group.prompt_ids) + len(completion))
            segments.append(Segment(prompt, prompt_stop, start, stop))
            rows += [prompt_stop - 1, *range(start, stop - 1)]
            targets += completion
            counts.append(len(completion))

    def tensor(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return PackedGroups(
        token_ids=tensor(tokens),
        positions=tensor(positions),
        segments=tuple(segments),
        rows=tensor(rows),
        targets=tensor(targets),
        completion_of=torch.repeat_interleave(tensor(counts)),
        counts=tensor(counts),
    )
