"""Linear layers as the serving forward uses them: fused, prepacked where that pays, with adapters.

    x (T, in) ──┬── base weight (out, in) ──────────────► y (T, out)
                └── A (r, in) ── keep own slot ── B ─────► += (T, out)

Layers that read the same input (queries, keys and values; gate and up) become one product. On a
CPU the weights are copied once into the layout of oneDNN's kernels; measured on two cores, that
makes a product of 16 rows 1.6 to 2.4 times as fast in float32 and 1.3 to 1.5 times in bfloat16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .kernels.adapters import AdapterTable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from .kernels.batch import AdapterRouting
    from .kernels.plain import PlainKernels


def pack(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """x -> F.linear(x, weight, bias), from a prepacked copy of `weight` where that can be had.

    The operators are private to torch: they are tried and held against `F.linear` here, and left
    alone where they are missing, refuse, or differ.
    """

    def plain(x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight, bias)

    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return plain
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 64)
        product = torch.ops.mkldnn._linear_pointwise.default

        def fast(x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = product(x, packed, bias, "none", [], "")
            return y

        probe = torch.randn(3, weight.shape[1]).to(weight.dtype)
        expected, actual = plain(probe).float(), fast(probe).float()
    except (RuntimeError, AttributeError, NotImplementedError):
        return plain
    scale = expected.abs().amax() + 1e-6
    tolerance = 1e-4 if weight.dtype is torch.float32 else 2e-2
    return fast if bool(((actual - expected).abs().amax() / scale) < tolerance) else plain


class FusedLinear:
    """One or more of the model's linear layers over the same input, side by side.

    Args:
        parts: (module path in the model, module); their outputs are concatenated in this order.
        kernels: add the adapters' part.
        prepack: keep a prepacked copy of the weights. Without it a single part uses the model's
            own storage; several parts need a concatenated copy either way.
    """

    def __init__(
        self, parts: Sequence[tuple[str, nn.Linear]], *, kernels: PlainKernels, prepack: bool
    ) -> None:
        modules = [module for _, module in parts]
        weight: torch.Tensor = modules[0].weight
        bias: torch.Tensor | None = modules[0].bias
        if len(modules) > 1:
            weight = torch.cat([module.weight for module in modules])
            if any(module.bias is not None for module in modules):
                bias = torch.cat([_bias(module) for module in modules])
        self._kernels = kernels
        self.adapters = AdapterTable(
            [(path, module.out_features) for path, module in parts], weight.dtype, weight.device
        )
        self._product: Callable[[torch.Tensor], torch.Tensor]
        if prepack:
            self._product = pack(weight, bias)
        else:
            self._product = lambda x: F.linear(x, weight, bias)

    def __call__(self, x: torch.Tensor, routing: AdapterRouting | None) -> torch.Tensor:
        """(T, in) to (T, out), each row with its own adapter."""
        y = self._product(x)
        if routing is not None:
            self._kernels.add_adapters(y, x, routing, self.adapters)
        return y


def _bias(module: nn.Linear) -> torch.Tensor:
    return module.weight.new_zeros(module.out_features) if module.bias is None else module.bias
