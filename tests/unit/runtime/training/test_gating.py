from __future__ import annotations

import pytest
import torch
from torch import nn

from cotune.runtime.training import gating
from cotune.runtime.training.gating import Activation, find_activation, gated

PLAIN: dict[Activation, nn.Module] = {
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
}


@pytest.mark.parametrize("block", [1 << 17, 4])
@pytest.mark.parametrize("activation", PLAIN)
def test_it_equals_the_plain_formula_in_both_directions(
    monkeypatch: pytest.MonkeyPatch, activation: Activation, block: int
) -> None:
    monkeypatch.setattr(gating, "_BLOCK_ELEMENTS", block)
    generator = torch.Generator().manual_seed(0)
    gate, up = (
        torch.randn(3, 7, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(2)
    )
    y = gated(gate, up, activation)
    torch.testing.assert_close(y, PLAIN[activation](gate) * up)
    assert torch.autograd.gradcheck(lambda g, u: gated(g, u, activation), (gate, up))


@pytest.mark.parametrize("activation", PLAIN)
def test_activations_are_recognised_by_what_they_compute(activation: Activation) -> None:
    assert find_activation(PLAIN[activation]) == activation


@pytest.mark.parametrize("other", [nn.ReLU(), nn.Tanh(), lambda x: x * torch.sigmoid(1.702 * x)])
def test_another_activation_is_not_taken_for_one_of_ours(other: object) -> None:
    assert find_activation(other) is None
