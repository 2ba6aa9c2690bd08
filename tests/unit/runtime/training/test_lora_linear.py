from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cotune.runtime.training.lora_linear import lora_linear


def _plain(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(x, a), b)


def _inputs(dtype: torch.dtype, *, has_bias: bool) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    bias = draw(7) if has_bias else torch.empty(0)
    return draw(2, 5, 6), draw(7, 6), bias, draw(3, 6), draw(7, 3)


@pytest.mark.parametrize("has_bias", [True, False])
def test_gradients_are_those_that_finite_differences_give(has_bias: bool) -> None:
    x, weight, bias, a, b = _inputs(torch.float64, has_bias=has_bias)

    def function(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return lora_linear(x, weight, bias if has_bias else None, a, b, 0.7)

    free = tuple(t.requires_grad_() for t in (x, a, b))
    assert torch.autograd.gradcheck(function, free)


@pytest.mark.parametrize("has_bias", [True, False])
def test_it_equals_the_plain_formula_in_both_directions(has_bias: bool) -> None:
    x, weight, bias, a, b = _inputs(torch.float32, has_bias=has_bias)
    used = bias if has_bias else None
    ours = [t.clone().requires_grad_() for t in (x, a, b)]
    plain = [t.clone().requires_grad_() for t in (x, a, b)]
    y = lora_linear(ours[0], weight, used, ours[1], ours[2], 2.0)
    expected = _plain(plain[0], weight, used, plain[1], plain[2], 2.0)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-5)
    dy = torch.linspace(-1.0, 1.0, y.numel()).view(y.shape)
    y.backward(dy)
    expected.backward(dy)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def test_float32_masters_over_bfloat16_get_float32_gradients() -> None:
    x, weight, _, a, b = _inputs(torch.bfloat16, has_bias=False)
    masters = [t.float().requires_grad_() for t in (a, b)]
    y = lora_linear(x.requires_grad_(), weight, None, masters[0], masters[1], 1.0)
    assert y.dtype is torch.bfloat16
    y.sum().backward()
    exact = [t.detach().double().requires_grad_() for t in (x, a, b)]
    _plain(exact[0], weight.double(), None, exact[1], exact[2], 1.0).sum().backward()
    for master, truth in zip(masters, exact[1:], strict=True):
        assert master.grad is not None
        assert truth.grad is not None
        assert master.grad.dtype is torch.float32
        # Products are rounded to bfloat16 (8 bits), two or three in a row.
        gap = (master.grad.double() - truth.grad).norm() / truth.grad.norm()
        assert gap < 2e-2


def test_an_input_without_gradient_costs_none() -> None:
    x, weight, _, a, b = _inputs(torch.float32, has_bias=False)
    y = lora_linear(x, weight, None, a.requires_grad_(), b.requires_grad_(), 1.0)
    y.sum().backward()
    assert x.grad is None
    assert weight.grad is None
    assert a.grad is not None


def test_the_input_is_kept_for_the_backward_and_not_copied() -> None:
    x, weight, _, a, b = _inputs(torch.float32, has_bias=False)
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora_linear(x.requires_grad_(), weight, None, a.requires_grad_(), b, 1.0)
    assert x.data_ptr() in kept
    assert weight.data_ptr() in kept
