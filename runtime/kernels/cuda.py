"""Attention on CUDA by torch's own paged variable-length attention.

`torch.nn.attention.varlen.varlen_attn` reads keys and values through a block table. Its layout is
that of `plain.py`, (P, S, K, D). Flash Attention 2 wants pages of 256 tokens; 3 takes any size.
It has no soft-capping; layers that cap their scores run the plain form.

This file was written against the documentation and has been run only where docs/measurements
says so. `choose.py` holds it against the plain form on the card at hand before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .plain import HeadShape, LayerAttention, PlainKernels

if TYPE_CHECKING:
    from .batch import PackedBatch, Rows


class CudaKernels(PlainKernels):
    """The plain operations, with torch's paged attention kernel; float16 and bfloat16."""

    name = "torch varlen_attn (paged)"
    page_size = 256

    def __init__(
        self, shape: HeadShape, *, layers: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(shape, layers=layers, dtype=dtype, device=device)
        major, _minor = torch.cuda.get_device_capability(device)
        # Hopper runs Flash Attention 3 where torch has it; its pages may be small.
        self.page_size = 16 if major == 9 else 256

    @staticmethod
    def supports(shape: HeadShape, dtype: torch.dtype) -> bool:
        """Whether torch's kernel takes this shape."""
        if dtype not in (torch.float16, torch.bfloat16) or shape.head_dim > 256:
            return False
        try:
            from torch.nn.attention import varlen  # noqa: F401
        except ImportError:
            return False
        return shape.head_dim % 8 == 0

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
            num_splits=1,  # other values gave silently wrong results with Flash Attention 2
        )
        if not isinstance(mixed, torch.Tensor):
            raise TypeError("varlen_attn returned more than the output")
        return mixed.flatten(1)
