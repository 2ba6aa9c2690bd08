"""A linear layer with LoRA as one step of autograd.

    y = x W^T + bias + s (x A^T) B^T        W (out, in) frozen; A (R, in), B (out, R); s = alpha / R

    dB = s dy^T h        dh = s dy B        dA = dh^T x        dx = dy W + dh A        (h = x A^T)

Kept for the backward are x and h, and x is the tensor itself: layers that read the same input keep
it once. The products run in the dtype of W; A and B are float32 masters, rounded to it on the way
in, and their gradients come back in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import nn

WeightsName: TypeAlias = Literal["trained", "anchor", "base"]


class WeightsChoice:
    """Which adapter weights the forward under way uses: set by its one caller, on its thread.

    transformers passes no keyword arguments on to linear layers.
    """

    def __init__(self) -> None:
        self.name: WeightsName = "trained"


class LoraLinear:
    """The forward of one adapted linear, over peft's module, which keeps names and parameters.

    Args:
        module: peft's `lora.Linear` with the adapter "default", without dropout.
        choice: says at each call which weights to use.
    """

    def __init__(self, module: Any, choice: WeightsChoice) -> None:
        base: nn.Linear = module.get_base_layer()
        self._weight: torch.Tensor = base.weight
        self._bias: torch.Tensor | None = base.bias
        self.a: nn.Parameter = module.lora_A["default"].weight
        self.b: nn.Parameter = module.lora_B["default"].weight
        self.scaling = float(module.scaling["default"])
        self._choice = choice
        self._anchor: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def chosen(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A and B of the weights that the forward under way uses; None for the base model's."""
        if self._choice.name == "trained":
            return self.a, self.b
        return self._anchor if self._choice.name == "anchor" else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        adapter = self.chosen
        if adapter is None:
            return F.linear(x, self._weight, self._bias)
        return lora_linear(x, self._weight, self._bias, *adapter, self.scaling)

    def set_anchor(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Keep copies of A and B, in the dtype of the products, as the anchor's."""
        device, dtype = self._weight.device, self._weight.dtype
        self._anchor = (
            a.detach().to(device, dtype, copy=True),
            b.detach().to(device, dtype, copy=True),
        )

    @property
    def anchor_bytes(self) -> int:
        """What the anchor's weights take; 0 where there is none."""
        return sum(matrix.nbytes for matrix in self._anchor or ())

    def clear_anchor(self) -> None:
        """Forget the anchor's weights: the anchor is the base model again."""
        self._anchor = None


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """``F.linear(x, weight, bias) + scaling * F.linear(F.linear(x, a), b)``; see the module."""
    y: torch.Tensor = _LoraLinear.apply(x, weight, bias, a, b, scaling)  # type: ignore[no-untyped-call]
    return y


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        # Products of R columns are done transposed, as R rows: up to 2.5 times as fast on a CPU.
        flat = x.flatten(0, -2)
        ht = a.to(x.dtype) @ flat.t()
        y = F.linear(flat, weight, bias)
        y.addmm_(ht.t(), b.to(x.dtype).t(), alpha=scaling)
        ctx.save_for_backward(x, ht, weight, a, b)
        ctx.scaling = scaling
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, ht, weight, a, b = ctx.saved_tensors
        dy = gradients[0].flatten(0, -2)
        dx = da = db = None
        dht = (b.to(dy.dtype).t() @ dy.t()).mul_(ctx.scaling)
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
            dx.addmm_(dht.t(), a.to(dy.dtype))
            dx = dx.view(x.shape)
        if ctx.needs_input_grad[3]:
            da = (dht @ x.flatten(0, -2)).to(a.dtype)
        if ctx.needs_input_grad[4]:
            db = (ht @ dy).t().to(b.dtype, memory_format=torch.contiguous_format)
            db = db.mul_(ctx.scaling)
        return dx, None, None, da, db, None
