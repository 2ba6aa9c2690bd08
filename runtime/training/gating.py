"""The gated activation of a feed-forward block, act(gate) * up, keeping gate and up alone."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F

Activation: TypeAlias = Literal["silu", "gelu_tanh", "gelu"]

_ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh", "gelu")
_BLOCK_ELEMENTS = 1 << 17
_ON_A_CARD = 1 << 8  # times as many: it has no cache to stay in, and pays for launches


def gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """``act(gate) * up``, element by element."""
    y: torch.Tensor = _Gated.apply(gate, up, activation)  # type: ignore[no-untyped-call]
    return y


@torch.no_grad()
def find_activation(module: Any) -> Activation | None:
    """Which of the activations a module or function is, tried in float32; None if none of them."""
    x = torch.linspace(-12.0, 12.0, 4001)
    theirs = module(x)
    for activation in _ACTIVATIONS:
        if torch.allclose(_activate(x, activation), theirs, rtol=1e-6, atol=1e-6):
            return activation
    return None


def _activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _activate_backward(dy: torch.Tensor, x: torch.Tensor, activation: Activation) -> torch.Tensor:
    if activation == "silu":
        dx: torch.Tensor = torch.ops.aten.silu_backward(dy, x)
        return dx
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    dx = torch.ops.aten.gelu_backward(dy, x, approximate=approximate)
    return dx


def _block(like: torch.Tensor) -> int:
    return _BLOCK_ELEMENTS * (_ON_A_CARD if like.is_cuda else 1)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: Activation
    ) -> torch.Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate)
        size = _block(gate)
        parts = zip(
            gate.view(-1).split(size), up.view(-1).split(size), y.view(-1).split(size), strict=True
        )
        for g, u, part in parts:
            torch.mul(_activate(g, activation), u, out=part)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        size = _block(gate)
        parts = zip(
            *(x.reshape(-1).split(size) for x in (gradients[0], gate, up)),
            *(x.view(-1).split(size) for x in (dgate, dup)),
            strict=True,
        )
        for dy, g, u, dg, du in parts:
            torch.mul(dy, _activate(g, ctx.activation), out=du)
            dg.copy_(_activate_backward(dy * u, g, ctx.activation))
        return dgate, dup, None
