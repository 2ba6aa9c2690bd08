from __future__ import annotations

import torch

from cotune.runtime.training.rotary import rotate


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 8, generator=generator, dtype=torch.float64).requires_grad_()
    angles = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    return x, angles.cos(), angles.sin()


def test_it_turns_each_pair_of_a_head_by_its_angle() -> None:
    x, cos, sin = _inputs()
    y = rotate(x, cos, sin)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos, sin).unsqueeze(1)
    torch.testing.assert_close(y, torch.cat((turned.real, turned.imag), dim=2))


def test_gradients_are_those_that_finite_differences_give() -> None:
    x, cos, sin = _inputs()
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (x,))
