"""The A and B matrices that resident adapters have for one fused linear layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..lora import LoraWeights


@dataclass(frozen=True, slots=True)
class Part:
    """One module's share of a slot, laid out for row-wise use.

    Attributes:
        down: A (R, in), float32, contiguous; R is padded with zeros to a multiple of 4.
        up: B transposed, (R, out), float32, contiguous, padded likewise.
        first: the first output column of the fused layer that it adds to.
    """

    down: torch.Tensor
    up: torch.Tensor
    first: int


class AdapterTable:
    """Slots 1, 2, ... of one fused linear layer; slot 0 is the base model and has none.

    Written by the lane between iterations, read by the forward.

    Args:
        parts: (module path, output width) of the layers that are fused, in order.

    Attributes:
        slots: slot to its parts. A slot whose adapter leaves these layers alone is absent.
        down, up: all slots' matrices stacked, (sum of R, in) and (out, sum of R), in the model's
            dtype; None when empty.
        owner: (sum of R,) int64, the slot that each stacked column belongs to.
        spans: slot to its first and last + 1 stacked column.
        lines: one more than the highest slot that was ever installed, with matrices here or not.
        version: changes whenever the content does.
    """

    def __init__(
        self, parts: Sequence[tuple[str, int]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._layout = list(parts)
        self._dtype, self._device = dtype, device
        self.slots: dict[int, list[Part]] = {}
        self.down: torch.Tensor | None = None
        self.up: torch.Tensor | None = None
        self.owner: torch.Tensor | None = None
        self.spans: dict[int, tuple[int, int]] = {}
        self.lines = 1
        self.version = 0

    def install(self, slot: int, weights: LoraWeights) -> None:
        """Put an adapter's matrices for these layers in a slot, replacing what was there."""
        self.slots.pop(slot, None)
        self.lines = max(self.lines, slot + 1)
        parts, first = [], 0
        for path, width in self._layout:
            pair = weights.modules.get(path)
            if pair is not None:
                rank = pair.a.shape[0]
                padded = -(-rank // 4) * 4
                down = torch.zeros(padded, pair.a.shape[1], device=self._device)
                up = torch.zeros(padded, width, device=self._device)
                down[:rank] = pair.a
                up[:rank] = pair.b.t()
                parts.append(Part(down, up, first))
            first += width
        if parts:
            self.slots[slot] = parts
        self._stack()

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        if self.slots.pop(slot, None) is not None:
            self._stack()

    def _stack(self) -> None:
        self.version += 1
        self.spans = {}
        if not self.slots:
            self.down = self.up = self.owner = None
            return
        total = sum(width for _, width in self._layout)
        parts = [(slot, part) for slot in sorted(self.slots) for part in self.slots[slot]]
        self.down = torch.cat([part.down for _, part in parts]).to(self._dtype)
        self.up = torch.zeros(total, self.down.shape[0], dtype=self._dtype, device=self._device)
        owners, at = [], 0
        for slot, part in parts:
            rank, width = part.up.shape
            self.up[part.first : part.first + width, at : at + rank] = part.up.t()
            owners += [slot] * rank
            self.spans[slot] = (self.spans.get(slot, (at, at))[0], at + rank)
            at += rank
        self.owner = torch.tensor(owners, device=self._device)
