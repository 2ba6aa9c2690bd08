"""Attention on CUDA by torch's own paged variable-length attention.

`torch.nn.attention.varlen.varlen_attn` reads keys and values through a block table; torch 2.11's
does not yet, and `paged_triton.py` stands in. Its layout is that of `plain.py`, (P, S, K, D). Flash
Attention 2, which torch brings, wants pages of 256 tokens; 3 takes any size, and is used where the
process has activated it (it is a package of its own, see
`torch.nn.attention.activate_flash_attention_impl`). Neither has soft-capping here: such models go
to Triton as well.

This file was written against the documentation and has been run only where docs/measurements
says so. `choose.py` holds it against the plain form on the card at hand before it is used.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch
import torch.nn.attention

from .plain import HeadShape, LayerAttention, PlainKernels

if TYPE_CHECKING:
    from .batch import PackedBatch, Rows


def page_size_for(implementation: str | None) -> int:
    """Tokens per page that a Flash Attention implementation takes; None is torch's own, 2."""
    return 16 if implementation == "FA3" else 256


class CudaKernels(PlainKernels):
    """The plain operations, with torch's paged attention kernel; float16 and bfloat16."""

    name = "torch varlen_attn (paged)"
    page_size = 256

    def __init__(
        self, shape: HeadShape, *, layers: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(shape, layers=layers, dtype=dtype, device=device)
        self.page_size = page_size_for(torch.nn.attention.current_flash_attention_impl())
        # Other values were reported to give silently wrong results with Flash Attention 2.
        self.num_splits: int | None = 1

    @staticmethod
    def supports(shape: HeadShape, dtype: torch.dtype) -> bool:
        """Whether torch's kernel takes this shape."""
        if dtype not in (torch.float16, torch.bfloat16) or shape.head_dim > 256:
            return False
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            return False
        is_paged = "block_table" in inspect.signature(varlen_attn).parameters
        return is_paged and shape.head_dim % 8 == 0

    def can_record(self, layer: LayerAttention) -> bool:
        """As the plain form."""
        return not layer.softcap

    def attend(
        self, layer: LayerAttention, query: torch.Tensor, rows: Rows, batch: PackedBatch
    ) -> torch.Tensor:
        """As the plain form."""
        if layer.softcap or rows.query_starts is None:
            return super().attend(layer, query, rows, batch)
        from torch.nn.attention.varlen import varlen_attn

        mixed = varlen_attn(
            query.reshape(rows.count, self.shape.heads, self.shape.head_dim),
            self.keys[layer.index],
            self.values[layer.index],
            rows.query_starts,
            None,
            rows.max_query,
            batch.max_context,
            scale=layer.scaling,
            window_size=(layer.window - 1 if layer.window else -1, 0),
            enable_gqa=True,
            seqused_k=batch.context_lens,
            block_table=batch.block_tables,
            num_splits=self.num_splits,
        )
        if not isinstance(mixed, torch.Tensor):
            raise TypeError("varlen_attn returned more than the output")
        return mixed.flatten(1)
