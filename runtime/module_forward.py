"""The packed forward through a model's own modules: slower than `decoder.py`, right for any family.

A second module tree is made over the same parameters (nothing is copied), so that what is changed
here, attention and linear layers, changes for serving alone. Attention goes through transformers'
attention interface to the kernels; the batch travels as a keyword argument.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .kernels.plain import LayerAttention
from .linear import FusedLinear

if TYPE_CHECKING:
    from .kernels.batch import AdapterRouting, PackedBatch
    from .kernels.plain import PlainKernels
    from .loading import LoadedModel
    from .lora import LoraWeights

ATTENTION = "cotune_paged"


def paged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    cotune_batch: PackedBatch,
    cotune_kernels: PlainKernels,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_ignored: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers' modules call.

    Args:
        query: (1, H, T, D), rotated. key, value: (1, K, T, D).

    Returns: ((1, T, H, D), None).
    """
    layer = LayerAttention(
        index=module.layer_idx,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap or 0.0,
        window=sliding_window or 0,
    )
    cotune_kernels.store(layer, key[0].transpose(0, 1), value[0].transpose(0, 1), cotune_batch)
    flat = query[0].transpose(0, 1).flatten(1)
    mixed = cotune_kernels.attend(layer, flat, cotune_batch.rows, cotune_batch)
    return mixed.unflatten(1, (query.shape[1], query.shape[3])).unsqueeze(0), None


class _Routing:
    """Which adapters the rows of the forward under way use: set by its one caller, on its lane.

    transformers passes no keyword arguments on to linear layers.
    """

    def __init__(self) -> None:
        self.rows: AdapterRouting | None = None


class _SlotLinear(nn.Module):
    """A `FusedLinear` of one part, in place of the model's linear layer."""

    def __init__(self, module: nn.Linear, fused: FusedLinear, routing: _Routing) -> None:
        super().__init__()
        self.weight, self.bias = module.weight, module.bias
        self._fused = fused
        self._routing = routing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._fused(x.flatten(0, -2), self._routing.rows)
        return y.view((*x.shape[:-1], y.shape[-1]))


class ModuleForward:
    """The packed forward through transformers' modules."""

    def __init__(self, loaded: LoadedModel, kernels: PlainKernels, *, prepack: bool) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION, paged_attention)
        self.kernels = kernels
        self._routing = _Routing()
        model = loaded.model
        self._model = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        self._model.set_attn_implementation(ATTENTION)
        self._linears: list[FusedLinear] = []
        for path, module in list(self._model.named_modules()):
            if isinstance(module, nn.Linear):
                owner, _, name = path.rpartition(".")
                fused = FusedLinear([(path, module)], kernels=kernels, prepack=prepack)
                slot_linear = _SlotLinear(module, fused, self._routing)
                setattr(self._model.get_submodule(owner), name, slot_linear)
                self._linears.append(fused)

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        """The logits (N, V) of the wanted rows; writes the KV of all rows."""
        # With adapters all rows go through the head: it has one route, that of all rows.
        keep: Any = 0 if batch.wanted is None or batch.adapters is not None else batch.wanted
        self._routing.rows = batch.adapters
        try:
            output = self._model(
                input_ids=batch.token_ids.unsqueeze(0),
                position_ids=batch.rows.positions.unsqueeze(0),
                use_cache=False,
                logits_to_keep=keep,
                cotune_batch=batch,
                cotune_kernels=self.kernels,
            )
        finally:
            self._routing.rows = None
        logits: torch.Tensor = output.logits[0]
        if isinstance(keep, int) and batch.wanted is not None:
            return logits[batch.wanted]
        return logits

    def install_adapter(self, slot: int, weights: LoraWeights) -> None:
        """Copy an adapter's matrices into a slot (1 and up)."""
        for linear in self._linears:
            linear.adapters.install(slot, weights)

    def clear_adapter(self, slot: int) -> None:
        """Empty a slot."""
        for linear in self._linears:
            linear.adapters.clear(slot)
