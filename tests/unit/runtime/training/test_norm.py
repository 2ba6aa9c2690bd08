from __future__ import annotations

import pytest
import torch
from torch import nn

from cotune.runtime.training import norm as norm_module
from cotune.runtime.training.norm import RmsNorm, find_norm
from tiny_models import tiny_model


def _plain(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    return gain * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


@pytest.mark.parametrize("block", [1 << 16, 1])
def test_gradients_are_those_that_finite_differences_give(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(norm_module, "_BLOCK_ELEMENTS", block)  # 1: row by row
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64).requires_grad_()
    gain = torch.randn(5, generator=generator, dtype=torch.float64)
    norm = RmsNorm(gain, 1e-3, rounds_first=False)
    assert torch.autograd.gradcheck(norm.__call__, (x,))
    torch.testing.assert_close(norm(x), _plain(x, gain, 1e-3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "rounds_first", "offset"),
    [("llama", True, 0.0), ("gemma2", False, 1.0), ("olmo2", False, 0.0)],
)
def test_every_family_has_its_own_formula_found(
    family: str, rounds_first: bool, offset: float, dtype: torch.dtype
) -> None:
    module = tiny_model(family, dtype).model.norm
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    norm = find_norm(module, x)
    assert norm is not None
    torch.testing.assert_close(norm.gain, module.weight.float() + offset)
    if dtype is torch.bfloat16:  # in float32 the two orders of rounding are one
        assert norm.rounds_first == rounds_first
        assert (norm(x) == module(x)).float().mean() > 0.99


def test_a_norm_of_another_formula_is_left_alone() -> None:
    class MeanRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            centred: torch.Tensor = x - 0.01 * x.mean(-1, keepdim=True)
            return centred / x.norm(dim=-1, keepdim=True) * self.weight  # type: ignore[no-any-return]

    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    assert find_norm(MeanRMSNorm(), x) is None
    assert find_norm(nn.LayerNorm(8), x) is None
