"""RMS normalisation with little memory: kept for the backward are the input and one number per row.

    y = g * n        n = x / rms(x)        rms(x) = sqrt(mean(x^2) + eps)

    dx = (g dy - n * mean(g dy * n)) / rms(x)

The model's own modules keep up to four float32 copies of their input. Rows are done in blocks that
stay in the processor's cache. Gains are frozen and get no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

_BLOCK_ELEMENTS = 1 << 16
# A card has no such cache, and each block costs it a dozen launches.
_ON_A_CARD = 1 << 8


@dataclass(frozen=True, slots=True, eq=False)
class RmsNorm:
    """Over the last dimension.

    Attributes:
        gain: (W,) float32 (float64 for such models), offset included.
        eps: added to the mean square.
        rounds_first: n is rounded to the dtype of x before it is multiplied, as Llama does.
    """

    gain: torch.Tensor
    eps: float
    rounds_first: bool

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(..., W) to the same."""
        y: torch.Tensor = _RmsNorm.apply(x, self)  # type: ignore[no-untyped-call]
        return y


@torch.no_grad()
def find_norm(module: nn.Module, x: torch.Tensor) -> RmsNorm | None:
    """The formula that the module computes, proved on its input `x`; None if it is another."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if (
        not isinstance(weight, nn.Parameter)
        or not isinstance(eps, float)
        or weight.shape != x.shape[-1:]
        or len(list(module.parameters())) != 1
    ):
        return None
    # Small inputs, too, for which the place of eps matters.
    inputs = torch.cat((x.flatten(0, -2), x.flatten(0, -2) * 1e-3))
    expected = module(inputs)
    gain = weight.detach().to(_wide(x.dtype))
    for candidate in (
        RmsNorm(gain + offset, eps, rounds_first)
        for offset in (0.0, 1.0)
        for rounds_first in (True, False)
    ):
        if _is_close(candidate(inputs), expected):
            return candidate
    return None


def _is_close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal, but for the last bits of float32 and float64, where sums round in their own order."""
    if ours.dtype in (torch.float32, torch.float64):
        gap = (ours - theirs).abs().amax() / theirs.abs().amax()
        return bool(gap < (1e-6 if ours.dtype is torch.float32 else 1e-12))
    return bool((ours != theirs).float().mean() < 0.01) and torch.allclose(
        ours, theirs, rtol=2 * torch.finfo(ours.dtype).eps, atol=0.0
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _blocks(flat: torch.Tensor) -> Iterator[slice]:
    rows, width = flat.shape
    elements = _BLOCK_ELEMENTS * (_ON_A_CARD if flat.is_cuda else 1)
    size = max(1, elements // width)
    for start in range(0, rows, size):
        yield slice(start, start + size)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm: RmsNorm) -> torch.Tensor:
        width = x.shape[-1]
        flat = x.reshape(-1, width)
        y = torch.empty_like(flat)
        scale = flat.new_empty(flat.shape[0], 1, dtype=norm.gain.dtype)
        first = norm.gain.to(x.dtype) if norm.rounds_first else norm.gain
        for rows in _blocks(flat):
            n = flat[rows].to(norm.gain.dtype, copy=True)
            square = torch.linalg.vector_norm(n, dim=1, keepdim=True).square_()
            scale[rows] = square.div_(width).add_(norm.eps).rsqrt_()
            n *= scale[rows]
            torch.mul(n.to(x.dtype) if norm.rounds_first else n, first, out=y[rows])
        ctx.norm = norm
        ctx.save_for_backward(x, scale)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, scale = ctx.saved_tensors
        width = x.shape[-1]
        flat, dy = x.reshape(-1, width), gradients[0].reshape(-1, width)
        dx = torch.empty_like(flat)
        for rows in _blocks(flat):
            n = flat[rows] * scale[rows]
            dn = dy[rows] * ctx.norm.gain
            along = torch.linalg.vecdot(dn, n).unsqueeze_(1).div_(-width)
            dx[rows] = dn.addcmul_(n, along).mul_(scale[rows])
        return dx.view(x.shape), None
