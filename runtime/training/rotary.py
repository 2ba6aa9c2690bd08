"""Rotary position embedding of whole heads, half against half; its backward turns the other way.

y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin        (x1, x2: the halves of a head)
"""

from __future__ import annotations

from typing import Any

import torch


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(T, H, D) turned by cos and sin, (T, D / 2) each, without gradient."""
    y: torch.Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _turn(gradients[0], cos, sin, -1), None, None


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, way: int) -> torch.Tensor:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = x.chunk(2, dim=2)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    into_first, into_second = y.chunk(2, dim=2)
    torch.mul(first, cos, out=into_first).addcmul_(second, sin, value=-way)
    torch.mul(second, cos, out=into_second).addcmul_(first, sin, value=way)
    return y
