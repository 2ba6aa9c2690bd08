"""Every operation of a packed forward in plain torch: the reference on any device.

Shapes: T rows, W width, H query heads, K key/value heads, D head dim, P pages, S slots per page.
Rounding points are those of transformers: float32 inside a norm, then back to the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from .adapters import AdapterTable
    from .batch import AdapterRouting, PackedBatch, Rows

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """How many heads, and how wide."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def qkv_width(self) -> int:
        """Width of queries, keys and values side by side."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerAttention:
    """What distinguishes one layer's attention. `window` counts the token itself; 0 is none."""

    index: int
    scaling: float
    softcap: float = 0.0
    window: int = 0


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """cos and sin for every position, (positions, D / 2) float32, scaling included."""

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Per-head RMS norms of queries and keys: weights (D,) float32."""

    query: torch.Tensor
    key: torch.Tensor
    eps: float


class PlainKernels:
    """The reference. Owns the KV pages' tensors; subclasses override what they do faster.

    KV pages are laid out (P, S, K, D) here; a subclass may choose its own layout, which nothing
    outside the kernels sees.
    """

    name = "plain torch"
    page_size = 16

    def __init__(
        self, shape: HeadShape, *, layers: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shape = shape
        self.layers = layers
        self.dtype = dtype
        self.device = device
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, keys and values, over all layers."""
        slot = self.shape.kv_heads * self.shape.head_dim * self.dtype.itemsize
        return 2 * self.layers * self.page_size * slot

    def allocate(self, num_pages: int) -> None:
        """Make the KV pages, replacing any there were. Their content is undefined."""
        key_shape, value_shape = self._page_shapes()
        self.keys = [self._pages(num_pages, key_shape) for _ in range(self.layers)]
        self.values = [self._pages(num_pages, value_shape) for _ in range(self.layers)]

    def _pages(self, num_pages: int, page: tuple[int, ...]) -> torch.Tensor:
        return torch.zeros((num_pages, *page), dtype=self.dtype, device=self.device)

    def _page_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        page = (self.page_size, self.shape.kv_heads, self.shape.head_dim)
        return page, page

    # --- norms, activation -----------------------------------------------------------------

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / rms(x) * weight over the last dimension; `weight` (W,) is float32."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return (normed.to(x.dtype).float() * weight).to(x.dtype)

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        multiplier: float = 1.0,
    ) -> torch.Tensor:
        """residual += multiplier * x, in place; then its norm."""
        residual += x * multiplier if multiplier != 1.0 else x
        return self.rms_norm(residual, weight, eps)

    def rms_norm_add(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        multiplier: float = 1.0,
    ) -> None:
        """residual += multiplier * norm(x), in place."""
        normed = self.rms_norm(x, weight, eps)
        residual += normed * multiplier if multiplier != 1.0 else normed

    def gated_activation(self, gate_up: torch.Tensor, kind: Activation) -> torch.Tensor:
        """act(gate) * up, for gate and up side by side: (T, 2F) to (T, F)."""
        gate, up = gate_up.chunk(2, dim=-1)
        if kind == "silu":
            return F.silu(gate) * up
        return F.gelu(gate, approximate="tanh") * up

    def add_adapters(
        self, y: torch.Tensor, x: torch.Tensor, routing: AdapterRouting, table: AdapterTable
    ) -> None:
        """Y += B A x for each row's own adapter, in place: (T, in) to (T, out)."""
        stack = table.storage if routing.is_static else table.used
        if stack is None:
            return
        if routing.single:
            span = table.spans.get(routing.single)
            if span is not None:
                low, high = span
                y.addmm_(F.linear(x, stack.down[low:high]), stack.up[:, low:high].t())
            return
        small = F.linear(x, stack.down)
        small *= routing.slots.unsqueeze(1) == stack.owner
        y.addmm_(small, stack.up.t())

    # --- attention -------------------------------------------------------------------------

    def can_record(self, layer: LayerAttention) -> bool:
        """Whether `attend` only queues work for the device, so that a graph can hold it."""
        return False

    def rope_and_store(
        self,
        layer: LayerAttention,
        qkv: torch.Tensor,
        batch: PackedBatch,
        rotary: RotaryTable,
        norms: HeadNorms | None,
    ) -> None:
        """Rotate queries and keys of `qkv` (T, (H + 2K) D) in place; store keys and values."""
        heads, kv_heads, dim = self.shape.heads, self.shape.kv_heads, self.shape.head_dim
        by_head = qkv.view(-1, heads + 2 * kv_heads, dim)
        query, key, value = by_head.split([heads, kv_heads, kv_heads], dim=1)
        if norms is not None:
            query.copy_(self.rms_norm(query, norms.query, norms.eps))
            key.copy_(self.rms_norm(key, norms.key, norms.eps))
        rotated = by_head[:, : heads + kv_heads]
        cos = rotary.cos[batch.rows.positions].unsqueeze(1)
        sin = rotary.sin[batch.rows.positions].unsqueeze(1)
        low, high = rotated.float().chunk(2, dim=-1)
        rotated.copy_(torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1))
        self.store(layer, key, value, batch)

    def store(
        self, layer: LayerAttention, key: torch.Tensor, value: torch.Tensor, batch: PackedBatch
    ) -> None:
        """Put keys and values (T, K, D) into their slots."""
        self.keys[layer.index].flatten(0, 1)[batch.slots] = key
        self.values[layer.index].flatten(0, 1)[batch.slots] = value

    def attend(
        self, layer: LayerAttention, query: torch.Tensor, rows: Rows, batch: PackedBatch
    ) -> torch.Tensor:
        """Attention of some rows over their sequences' pages, each up to its own position.

        Args:
            query: (T, H D), rows may be strided.
            rows: which rows of the batch these are.

        Returns: (T, H D).
        """
        heads, kv_heads, dim = self.shape.heads, self.shape.kv_heads, self.shape.head_dim
        out = torch.empty(rows.count, heads * dim, dtype=query.dtype, device=query.device)
        by_head = query.unflatten(1, (heads, dim)).float()
        for sequence in rows.sequence.unique().tolist():
            mine = (rows.sequence == sequence).nonzero().squeeze(1)
            context = int(batch.context_lens[sequence])
            pages = batch.block_tables[sequence, : -(-context // self.page_size)].long()
            key, value = self._gather(layer.index, pages)
            key, value = key[:context].float(), value[:context].float()
            group = heads // kv_heads
            q = by_head[mine].unflatten(1, (kv_heads, group))
            scores = torch.einsum("tkgd,ckd->tkgc", q, key) * layer.scaling
            if layer.softcap:
                scores = layer.softcap * torch.tanh(scores / layer.softcap)
            at = rows.positions[mine].unsqueeze(1)
            to = torch.arange(context, device=query.device).unsqueeze(0)
            hidden = to > at
            if layer.window:
                hidden |= to <= at - layer.window
            scores.masked_fill_(hidden[:, None, None, :], float("-inf"))
            mixed = torch.einsum("tkgc,ckd->tkgd", scores.softmax(-1), value)
            out[mine] = mixed.flatten(1).to(out.dtype)
        return out

    def _gather(self, layer: int, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of some pages, (slots, K, D)."""
        return self.keys[layer][pages].flatten(0, 1), self.values[layer][pages].flatten(0, 1)
