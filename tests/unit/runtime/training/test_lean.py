from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from cotune.runtime.training.attention import ATTENTION, training_attention
from cotune.runtime.training.lean import make_lean
from tiny_models import FAMILIES, tiny_model


def _base(family: str, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, training_attention)
    model = tiny_model(family, dtype)
    model.set_attn_implementation(ATTENTION)
    return model.model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_norm_attention_and_feed_forward_of_the_families_is_made_lean(
    family: str, dtype: torch.dtype
) -> None:
    base = _base(family, dtype)
    expected = {
        path
        for path, module in base.named_modules()
        if path.endswith(("norm", "layernorm", "self_attn", "mlp"))
    }
    assert make_lean(base) == expected


def test_a_module_that_computes_something_else_is_left_alone() -> None:
    base = _base("llama")
    attention, mlp = base.layers[1].self_attn, base.layers[2].mlp
    plain_attention, plain_mlp = type(attention).forward, type(mlp).forward

    def turned(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        mixed, weights = plain_attention(self, hidden_states, **kwargs)
        return mixed.flip(-1), weights

    attention.forward = turned.__get__(attention)
    mlp.forward = (lambda self, x: plain_mlp(self, x) + 0.01 * x).__get__(mlp)
    untouched = copy.copy((attention.forward, mlp.forward))
    lean = make_lean(base)
    assert "layers.1.self_attn" not in lean
    assert "layers.2.mlp" not in lean
    assert (attention.forward, mlp.forward) == untouched
    assert "layers.0.self_attn" in lean
    assert "layers.1.mlp" in lean
