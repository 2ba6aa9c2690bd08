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


@dataclass(frozen=True, slots=True)
class Stack:
    """Matrices of several slots, side by side. C columns, each of one slot.

    Attributes:
        down: A (C, in), in the model's dtype.
        up: B (out, C).
        owner: (C,) int64, the slot that each column belongs to; `NOBODY` for a spare one, which is
            zero in both matrices.
    """

    down: torch.Tensor
    up: torch.Tensor
    owner: torch.Tensor


NOBODY = -1
"""The owner of spare columns: no row names this slot."""


class AdapterTable:
    """Slots 1, 2, ... of one fused linear layer; slot 0 is the base model and has none.

    Written by the lane between iterations, read by the forward. The stacked matrices lie in
    storage that is written in place for as long as it suffices: a recorded forward
    (`static_decode.py`) reads the whole of it by its address, whoever is installed.

    Args:
        parts: (module path, output width) of the layers that are fused, in order.

    Attributes:
        slots: slot to its parts. A slot whose adapter leaves these layers alone is absent.
        used: the columns of the slots that are installed; None when there are none.
        storage: those and the spare ones; None until the first adapter came.
        spans: slot to its first and last + 1 stacked column.
        lines: one more than the highest slot that was ever installed, with matrices here or not.
        version: changes whenever the content does.
        generation: changes whenever `storage` is another one.
    """

    def __init__(
        self, parts: Sequence[tuple[str, int]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._layout = list(parts)
        self._dtype, self._device = dtype, device
        self.slots: dict[int, list[Part]] = {}
        self.used: Stack | None = None
        self.storage: Stack | None = None
        self.spans: dict[int, tuple[int, int]] = {}
        self.lines = 1
        self.version = 0
        self.generation = 0

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
        self.used = None
        parts = [(slot, part) for slot in sorted(self.slots) for part in self.slots[slot]]
        columns = sum(part.up.shape[0] for _, part in parts)
        if parts:
            self._make_room(parts[0][1].down.shape[1], columns)
        if self.storage is None:
            return
        down, up, owner = self.storage.down, self.storage.up, self.storage.owner
        for tensor in (down, up):
            tensor.zero_()
        owners, at = [], 0
        for slot, part in parts:
            rank, width = part.up.shape
            down[at : at + rank] = part.down
            up[part.first : part.first + width, at : at + rank] = part.up.t()
            owners += [slot] * rank
            self.spans[slot] = (self.spans.get(slot, (at, at))[0], at + rank)
            at += rank
        owners += [NOBODY] * (len(owner) - len(owners))
        owner.copy_(torch.tensor(owners))
        if parts:
            self.used = Stack(down[:columns], up[:, :columns], owner[:columns])

    def _make_room(self, width: int, columns: int) -> None:
        """Storage for so many columns of inputs of `width`; twice the last where that is short."""
        room = 0 if self.storage is None else len(self.storage.owner)
        if room >= columns:
            return
        room = max(columns, 2 * room)
        out = sum(width for _, width in self._layout)
        self.storage = Stack(
            torch.zeros(room, width, dtype=self._dtype, device=self._device),
            torch.zeros(out, room, dtype=self._dtype, device=self._device),
            torch.full((room,), NOBODY, dtype=torch.int64, device=self._device),
        )
        self.generation += 1
