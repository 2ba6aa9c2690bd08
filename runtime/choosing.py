"""Choosing tokens from a batch of logits: the tensor work of sampling, in plain torch.

`TorchChooser` serves CUDA and is what `choosing_cpu.CpuChooser` is tested against.

For a drawn row the tokens are first cut down and then drawn from by inverse CDF:

    p = softmax(logits / temperature)
    min_p   keeps p >= min_p * max(p)
    top_k   keeps the tokens at least as likely as the k-th
    top_p   keeps the tokens before which less than top_p of the mass is strictly more likely

Tokens tied at a threshold are all kept, so what is kept is a function of the row alone.

**top_p without sorting.** Whether *one* token is in the nucleus takes one masked sum. So we draw
from the whole row; a draw outside the nucleus is rejected, and since all tokens that are no more
likely lie outside as well, the next draw is from the strictly more likely ones. Accepted draws
follow the nucleus' distribution exactly (rejection sampling), nearly always after one or two
rounds, and the sort of the vocabulary, many times as expensive, is never needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .randomness import uniforms
from .types import TokenLogprob

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

BLOCK = 64
"""Tokens per partial sum of the inverse CDF."""


@dataclass(frozen=True, slots=True)
class DrawTable:
    """The rows of a batch that are drawn, and how: arrays of shape (n,).

    Attributes:
        rows: int64, ascending row numbers.
        keys: uint64, `randomness.stream_key`.
        inverse_temperature: float32.
        top_k: int64; 0 for all.
        top_p: float64; 2 for all, so that no rounding can reject a row without top_p.
        min_p: float32; 0 for all.
    """

    rows: npt.NDArray[np.int64]
    keys: npt.NDArray[np.uint64]
    inverse_temperature: npt.NDArray[np.float32]
    top_k: npt.NDArray[np.int64]
    top_p: npt.NDArray[np.float64]
    min_p: npt.NDArray[np.float32]


class Chooser(Protocol):
    """What the sampler asks of a device. All logits are (N, V) float32."""

    def edit(
        self, logits: Tensor, index: npt.NDArray[np.int64], values: npt.NDArray[np.float32]
    ) -> Tensor:
        """A copy in which the logits at `index` (m,), counted row-major, are changed.

        `values` is (3, m): bias, repetition, subtract. The bias is added; then a positive logit is
        divided by the repetition penalty and a negative one multiplied; then `subtract` goes off.
        """

    def choose(
        self, logits: Tensor, table: DrawTable | None, positions: npt.NDArray[np.int64] | None
    ) -> tuple[list[int], list[float]]:
        """One token per row, and the row's largest logit.

        Rows in `table` are drawn, by the random numbers of `positions` (n,); the others take the
        first of the largest logits. Where the largest logit is NaN or infinite (NaN counts as the
        largest), the token means nothing.
        """

    def token_logprobs(
        self, logits: Tensor, tokens: Sequence[int], ks: Sequence[int]
    ) -> list[TokenLogprob]:
        """The log-probability of one token per row, its rank, and the row's k best tokens."""


class TorchChooser:
    """Torch operators on any device. The host waits once, and once per round of rejections."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._table: DrawTable | None = None
        self._constants: _Constants | None = None

    def edit(
        self, logits: Tensor, index: npt.NDArray[np.int64], values: npt.NDArray[np.float32]
    ) -> Tensor:
        """See `Chooser.edit`."""
        edited = logits.clone(memory_format=torch.contiguous_format)
        flat = edited.view(-1)
        at = torch.from_numpy(index).to(self._device)
        bias, repetition, subtract = torch.from_numpy(values).to(self._device)
        now = flat[at] + bias
        now = torch.where(now > 0, now / repetition, now * repetition)
        flat[at] = now - subtract
        return edited

    def choose(
        self, logits: Tensor, table: DrawTable | None, positions: npt.NDArray[np.int64] | None
    ) -> tuple[list[int], list[float]]:
        """See `Chooser.choose`."""
        values, best = logits.max(dim=-1)
        if table is None or positions is None:
            tokens, tops = torch.stack((best.double(), values.double())).tolist()
            return [int(token) for token in tokens], tops
        return self._draw(logits, table, positions, best, values)

    def _draw(
        self,
        logits: Tensor,
        table: DrawTable,
        positions: npt.NDArray[np.int64],
        best: Tensor,
        values: Tensor,
    ) -> tuple[list[int], list[float]]:
        constants = self._constants_of(table)
        kept = self._kept(logits[constants.rows], constants)
        token, weight, total = draw_by_blocks(kept, self._numbers(table.keys, positions, 0))
        room = torch.ones_like(total)
        limit = room
        if constants.top_p is not None:
            limit = constants.top_p * total
            room = limit - _mass(kept * (kept > weight))
        best = best.index_copy(0, constants.rows, token[:, 0])
        # One copy to the host for all: choices, largest logits, and what is left below top_p.
        found = torch.cat((best.double(), values.double(), room[:, 0])).tolist()
        count = len(values)
        tokens, tops = [int(t) for t in found[:count]], found[count : 2 * count]

        # NaN (a broken row) compares false and is not drawn again.
        again = [i for i, left in enumerate(found[2 * count :]) if left <= 0.0]
        outer = again
        attempt = 0
        while again:
            attempt += 1
            select = torch.tensor(again, device=self._device)
            kept, weight, limit = kept[select], weight[select], limit[select]
            kept = kept * (kept > weight)
            numbers = self._numbers(table.keys[outer], positions[outer], attempt)
            token, weight, _ = draw_by_blocks(kept, numbers)
            room = limit - _mass(kept * (kept > weight))
            again = []
            for i, (choice, left) in enumerate(torch.cat((token.double(), room), dim=1).tolist()):
                if left > 0.0:
                    tokens[table.rows[outer[i]]] = int(choice)
                else:
                    again.append(i)
            outer = [outer[i] for i in again]
        return tokens, tops

    def _kept(self, logits: Tensor, constants: _Constants) -> Tensor:
        """Probabilities (n, V up to a multiple of BLOCK), 0 for what min_p and top_k exclude."""
        probs = torch.softmax(logits * constants.inverse_temperature, dim=-1)
        if constants.min_p is not None:
            probs = probs * (probs >= probs.amax(dim=-1, keepdim=True) * constants.min_p)
        if constants.top_k is not None:
            ordered = logits.topk(constants.largest_top_k, dim=-1).values
            kth = ordered.gather(1, constants.top_k.clamp(min=1) - 1)
            probs = probs * ((logits >= kth) | (constants.top_k == 0))
        if probs.shape[1] % BLOCK:
            probs = torch.nn.functional.pad(probs, (0, -probs.shape[1] % BLOCK))
        return probs

    def token_logprobs(
        self, logits: Tensor, tokens: Sequence[int], ks: Sequence[int]
    ) -> list[TokenLogprob]:
        """See `Chooser.token_logprobs`."""
        logprobs = torch.log_softmax(logits, dim=-1)
        chosen = torch.tensor(tokens, device=self._device).unsqueeze(1)
        ranks = (logits > logits.gather(1, chosen)).sum(dim=-1, keepdim=True) + 1
        columns = [logprobs.gather(1, chosen).double(), ranks.double()]
        most = min(max(ks), logits.shape[1])
        if most:
            top = logprobs.topk(most, dim=-1)
            columns += [top.values.double(), top.indices.double()]
        found = torch.cat(columns, dim=1).tolist()
        return [
            TokenLogprob(
                token, value, int(rank), best_first(best[:k], map(int, best[most : most + k]))
            )
            for token, k, (value, rank, *best) in zip(tokens, ks, found, strict=True)
        ]

    def _numbers(
        self, keys: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64], attempt: int
    ) -> Tensor:
        return torch.from_numpy(uniforms(keys, positions, attempt)).unsqueeze(1).to(self._device)

    def _constants_of(self, table: DrawTable) -> _Constants:
        """The table on the device. In steady decoding it is the one of the step before."""
        if self._table is not table or self._constants is None:
            self._constants = _Constants(table, self._device)
            self._table = table
        return self._constants


class _Constants:
    """A `DrawTable` as (n, 1) tensors on the device; None for a cut that no row asks for."""

    def __init__(self, table: DrawTable, device: torch.device) -> None:
        def column(values: npt.NDArray[Any]) -> Tensor:
            return torch.from_numpy(values).unsqueeze(1).to(device)

        self.rows = torch.from_numpy(table.rows).to(device)
        self.inverse_temperature = column(table.inverse_temperature)
        self.min_p = column(table.min_p) if table.min_p.any() else None
        self.top_k = column(table.top_k) if table.top_k.any() else None
        self.largest_top_k = int(table.top_k.max())
        self.top_p = column(table.top_p) if (table.top_p < 1.0).any() else None


def draw_by_blocks(weights: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse CDF in two levels: find the block of 64 tokens, then the token in it.

    What ``weights.double().cumsum(1)`` and a search in it would do at an eighth of the cost, as the
    sums run over V / 64 and 64 elements. A token of weight 0 is never drawn: each search finds the
    first sum *above* its target, which is one that a positive weight has raised.

    Args:
        weights: (n, V) float32, not normalised; V a multiple of BLOCK.
        numbers: (n, 1) float64 from [0, 1).

    Returns:
        The token (n, 1) int64, its weight (n, 1) and the rows' sums (n, 1) float64. Whatever is in
        a row, the token is below V.
    """
    count, width = weights.shape
    blocks = weights.view(count, width // BLOCK, BLOCK)
    sums = blocks.sum(dim=-1).double()
    ends = sums.cumsum(dim=-1)
    total = ends[:, -1:]
    target = numbers * total
    block = torch.searchsorted(ends, target, right=True).clamp_(max=width // BLOCK - 1)
    rest = target - (ends.gather(1, block) - sums.gather(1, block))
    inside = blocks[torch.arange(count, device=weights.device), block[:, 0]]
    inside_ends = inside.cumsum(dim=-1, dtype=torch.float64)
    # The two levels round differently: keep the target within the block.
    rest = torch.minimum(rest.clamp_(min=0.0), inside_ends[:, -1:] * (1.0 - 2.0**-48))
    offset = torch.searchsorted(inside_ends, rest, right=True).clamp_(max=BLOCK - 1)
    return block * BLOCK + offset, inside.gather(1, offset), total


def best_first(logprobs: Iterable[float], tokens: Iterable[int]) -> tuple[tuple[int, float], ...]:
    """Alternatives as (token, log-probability), best first; of equals the lower token first."""
    return tuple(sorted(zip(tokens, logprobs, strict=True), key=lambda pair: (-pair[1], pair[0])))


def _mass(weights: Tensor) -> Tensor:
    """Sums of the rows (n, 1) in float64, added in the same order however many rows there are."""
    count, width = weights.shape
    partial = weights.view(count, width // BLOCK, BLOCK).sum(dim=-1)
    return partial.sum(dim=-1, keepdim=True, dtype=torch.float64)
