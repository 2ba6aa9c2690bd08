"""The compiled kernels behind the operations of `plain.py`.

`cotune bench attention`, one thread of a Zen 4 core: decoding 16 sequences of 200 tokens is 7
(float32) to 19 times (bfloat16) as fast as torch's scaled_dot_product_attention over gathered
pages, and prefill chunks of 16 to 512 tokens are 1.2 to 1.7 times as fast, so there is no second
path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from . import compiled
from .plain import Activation, HeadNorms, HeadShape, LayerAttention, PlainKernels, RotaryTable
from .simd import LANES

if TYPE_CHECKING:
    from .adapters import AdapterTable
    from .batch import AdapterRouting, PackedBatch, Rows

# Below this many elements a second thread costs more than it brings (measured: a launch on two
# threads takes 3 us, on one 0.3 us).
_SMALL = 32_768


# Up to here rows pass their adapters one by one; beyond, two matrix products are faster.
_MANY_ROWS = 128


@dataclass(frozen=True, slots=True)
class _Described:
    """An adapter table as the compiled kernel reads it.

    Attributes:
        table: whose addresses these are; held, so that they stay good.
        cells: (slots, cells) int64, see `compiled.add_adapters`.
        ranks: the largest R of a part.
        is_usable: whether all shapes suit the kernel.
    """

    table: AdapterTable
    version: int
    cells: torch.Tensor
    ranks: int
    is_usable: bool

    @classmethod
    def of(cls, table: AdapterTable) -> _Described:
        most = max((len(parts) for parts in table.slots.values()), default=0)
        # Every slot that a row may name has a line; those without matrices have no parts.
        cells = torch.zeros(table.lines, 1 + 5 * most, dtype=torch.int64)
        ranks, is_usable = 4, True
        for slot, parts in table.slots.items():
            cells[slot, 0] = len(parts)
            for index, part in enumerate(parts):
                rank, width = part.up.shape
                ranks = max(ranks, rank)
                is_usable &= width % LANES == 0 and part.first % LANES == 0
                described = (part.down.data_ptr(), part.up.data_ptr(), rank, part.first, width)
                cells[slot, 1 + 5 * index : 6 + 5 * index] = torch.tensor(described)
        return cls(table, table.version, cells, ranks, is_usable)


class CpuKernels(PlainKernels):
    """Compiled kernels, float32 or bfloat16, head dims that are multiples of 32."""

    name = "compiled CPU kernels"
    page_size = compiled.PAGE_SIZE

    def __init__(
        self, shape: HeadShape, *, layers: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(shape, layers=layers, dtype=dtype, device=device)
        self._kernels = compiled.kernels_for(dtype)
        # One argument table per kernel; they are filled and used by the one lane that runs us.
        self._norm = compiled.Arguments(12)
        self._activation = compiled.Arguments(7)
        self._rope = compiled.Arguments(16)
        self._attention = compiled.Arguments(21)
        self._adapters = compiled.Arguments(13)
        self._scratch = torch.empty(0)
        self._low = torch.empty(0)
        self._described: dict[int, _Described] = {}
        rope, attention = self._rope.cells, self._attention.cells
        rope[13:16] = shape.heads, shape.kv_heads, shape.head_dim
        attention[11:14] = shape.heads, shape.kv_heads, shape.head_dim

    @staticmethod
    def supports(shape: HeadShape, dtype: torch.dtype) -> bool:
        """Whether the compiled kernels can run this shape."""
        return (
            dtype in compiled.DTYPES
            and shape.head_dim % (2 * LANES) == 0
            and shape.heads % shape.kv_heads == 0
        )

    def _page_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        kv_heads, dim = self.shape.kv_heads, self.shape.head_dim
        return (kv_heads, dim, self.page_size), (kv_heads, self.page_size, dim)

    def _rms_norm(
        self,
        mode: int,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        multiplier: float,
    ) -> torch.Tensor | None:
        rows, width = x.shape
        if width % LANES or x.stride(1) != 1:
            return None
        out = x if mode == 2 else torch.empty(rows, width, dtype=x.dtype)
        cells = self._norm.cells
        cells[2] = x.data_ptr()
        cells[3] = x.stride(0)
        cells[4] = 0 if residual is None else residual.data_ptr()
        cells[5] = weight.data_ptr()
        cells[6] = out.data_ptr()
        cells[7], cells[8] = rows, width
        self._norm.reals[9], self._norm.reals[10] = eps, multiplier
        cells[11] = mode
        self._kernels.rms_norm(self._norm, 1 if rows * width < _SMALL else 0)
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """As the plain form; rows may be strided."""
        if x.dim() == 2:
            out = self._rms_norm(0, x, None, weight, eps, 1.0)
            if out is not None:
                return out
        return super().rms_norm(x, weight, eps)

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        multiplier: float = 1.0,
    ) -> torch.Tensor:
        """As the plain form."""
        out = self._rms_norm(1, x, residual, weight, eps, multiplier)
        if out is None:
            return super().add_rms_norm(x, residual, weight, eps, multiplier)
        return out

    def rms_norm_add(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        multiplier: float = 1.0,
    ) -> None:
        """As the plain form."""
        if self._rms_norm(2, x, residual, weight, eps, multiplier) is None:
            super().rms_norm_add(x, residual, weight, eps, multiplier)

    def gated_activation(self, gate_up: torch.Tensor, kind: Activation) -> torch.Tensor:
        """As the plain form."""
        rows, double = gate_up.shape
        width = double // 2
        if width % LANES:
            return super().gated_activation(gate_up, kind)
        out = torch.empty(rows, width, dtype=gate_up.dtype)
        cells = self._activation.cells
        cells[2], cells[3] = gate_up.data_ptr(), out.data_ptr()
        cells[4], cells[5] = rows, width
        cells[6] = 0 if kind == "silu" else 1
        self._kernels.gated_activation(self._activation, 1 if rows * width < _SMALL else 0)
        return out

    def add_adapters(
        self, y: torch.Tensor, x: torch.Tensor, routing: AdapterRouting, table: AdapterTable
    ) -> None:
        """As the plain form. Few rows go one by one, each past its own adapter's matrices."""
        rows = x.shape[0]
        if rows > _MANY_ROWS or x.shape[1] % LANES or x.stride(1) != 1 or y.stride(1) != 1:
            super().add_adapters(y, x, routing, table)
            return
        described = self._described.get(id(table))
        if described is None or described.version != table.version:
            described = self._described[id(table)] = _Described.of(table)
        if not described.is_usable:
            super().add_adapters(y, x, routing, table)
            return
        threads = torch.get_num_threads()
        if self._low.numel() < described.ranks * threads:
            self._low = torch.empty(described.ranks * threads)
        cells = self._adapters.cells
        cells[2], cells[3] = x.data_ptr(), x.stride(0)
        cells[4], cells[5] = y.data_ptr(), y.stride(0)
        cells[6], cells[7] = x.shape
        cells[8] = routing.slots.data_ptr()
        cells[9], cells[10] = described.cells.data_ptr(), described.cells.shape[1]
        cells[11], cells[12] = self._low.data_ptr(), described.ranks
        self._kernels.add_adapters(self._adapters, 1 if rows == 1 else 0)

    def can_record(self, layer: LayerAttention) -> bool:
        """As the plain form; work on the CPU is done when a call returns."""
        return True

    def rope_and_store(
        self,
        layer: LayerAttention,
        qkv: torch.Tensor,
        batch: PackedBatch,
        rotary: RotaryTable,
        norms: HeadNorms | None,
    ) -> None:
        """As the plain form."""
        cells = self._rope.cells
        cells[2] = qkv.data_ptr()
        cells[3] = self.keys[layer.index].data_ptr()
        cells[4] = self.values[layer.index].data_ptr()
        cells[5] = batch.slots.data_ptr()
        cells[6] = batch.rows.positions.data_ptr()
        cells[7], cells[8] = rotary.cos.data_ptr(), rotary.sin.data_ptr()
        if norms is None:
            cells[9] = cells[10] = 0
        else:
            cells[9], cells[10] = norms.query.data_ptr(), norms.key.data_ptr()
            self._rope.reals[11] = norms.eps
        cells[12] = batch.rows.count
        small = batch.rows.count * self.shape.qkv_width < _SMALL
        self._kernels.rope_and_store(self._rope, 1 if small else 0)

    def store(
        self, layer: LayerAttention, key: torch.Tensor, value: torch.Tensor, batch: PackedBatch
    ) -> None:
        """As the plain form."""
        page, within = batch.slots // self.page_size, batch.slots % self.page_size
        self.keys[layer.index][page, :, :, within] = key
        self.values[layer.index][page, :, within] = value

    def attend(
        self, layer: LayerAttention, query: torch.Tensor, rows: Rows, batch: PackedBatch
    ) -> torch.Tensor:
        """As the plain form."""
        shape = self.shape
        if query.stride(1) != 1:
            query = query.contiguous()
        out = torch.empty(rows.count, shape.heads * shape.head_dim, dtype=query.dtype)
        group = shape.heads // shape.kv_heads
        scores = (-(-batch.max_context // self.page_size) + 1) * self.page_size
        per_thread = group * (shape.head_dim + scores)
        threads = torch.get_num_threads()
        if self._scratch.numel() < per_thread * threads:
            self._scratch = torch.empty(2 * per_thread * threads)
        cells = self._attention.cells
        cells[2] = query.data_ptr()
        cells[3] = self.keys[layer.index].data_ptr()
        cells[4] = self.values[layer.index].data_ptr()
        cells[5] = out.data_ptr()
        cells[6], cells[7] = rows.positions.data_ptr(), rows.sequence.data_ptr()
        cells[8], cells[9] = batch.block_tables.data_ptr(), batch.block_tables.shape[1]
        cells[10] = rows.count
        cells[14] = query.stride(0)
        self._attention.reals[15] = layer.scaling
        self._attention.reals[16] = layer.softcap
        cells[17] = layer.window
        cells[18], cells[19], cells[20] = self._scratch.data_ptr(), per_thread, scores
        self._kernels.paged_attention(self._attention, 1 if rows.count == 1 and scores < 256 else 0)
        return out

    def _gather(self, layer: int, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys = self.keys[layer][pages].permute(0, 3, 1, 2)
        values = self.values[layer][pages].permute(0, 2, 1, 3)
        return keys.flatten(0, 1), values.flatten(0, 1)
