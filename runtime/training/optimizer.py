"""AdamW over the adapter's float32 weights: accumulated gradients, clipping, warm-up.

Moments and gradients are allocated once, at construction, and the fused step works in place, so an
optimizer step needs no memory of its own and cannot run out of it half way through.

Sources: AdamW, Loshchilov and Hutter 2019, arXiv 1711.05101; clipping by global norm, Pascanu et
al. 2013, arXiv 1211.5063.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """Owns the gradients and moments of `parameters`, which it alone updates.

    Attributes:
        steps: optimizer steps taken.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        learning_rate: float,
        warmup_steps: int,
        weight_decay: float,
        max_grad_norm: float,
    ) -> None:
        self.steps = 0
        self._parameters = dict(parameters)
        self._learning_rate = learning_rate
        self._warmup_steps = warmup_steps
        self._max_grad_norm = max_grad_norm
        values = list(self._parameters.values())
        self._gradients = [torch.zeros_like(p) for p in values]
        for parameter, gradient in zip(values, self._gradients, strict=True):
            parameter.grad = gradient
        # A step at rate zero and without gradients allocates the moments and changes nothing.
        self._adamw = torch.optim.AdamW(values, lr=0.0, weight_decay=weight_decay, fused=True)
        self._adamw.step()
        self._set_steps(0)

    @property
    def learning_rate(self) -> float:
        """Of the next step: it rises evenly over the warm-up steps, then stays."""
        share = (self.steps + 1) / self._warmup_steps if self._warmup_steps else 1.0
        return self._learning_rate * min(1.0, share)

    def accumulate(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Add the gradients of a part of the batch, in the parameters' order. None: no part."""
        for total, gradient in zip(self._gradients, gradients, strict=True):
            if gradient is not None:
                total.add_(gradient)

    def gradient_norm(self) -> float:
        """The norm of what was accumulated, all parameters together."""
        return float(torch.nn.utils.get_total_norm(self._gradients))

    def step(self, gradient_norm: float) -> None:
        """Clip what was accumulated, whose norm this is, and move the parameters."""
        if gradient_norm > self._max_grad_norm:
            torch._foreach_mul_(self._gradients, self._max_grad_norm / gradient_norm)
        self._adamw.param_groups[0]["lr"] = self.learning_rate
        self._adamw.step()
        self.steps += 1

    def clear(self) -> None:
        """Forget what was accumulated."""
        torch._foreach_zero_(self._gradients)

    def reset(self) -> None:
        """Start anew: no moments, no steps, no gradients."""
        for parameter in self._parameters.values():
            for moment in _MOMENTS:
                self._adamw.state[parameter][moment].zero_()
        self._set_steps(0)
        self.clear()

    def close(self) -> None:
        """Let go of gradients and moments; of no use afterwards."""
        for parameter in self._parameters.values():
            parameter.grad = None
        self._gradients = []
        self._adamw.state.clear()
        self._adamw.param_groups.clear()
        self._parameters = {}

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of the moments on the CPU, by "exp_avg/NAME" and "exp_avg_sq/NAME"."""
        return {
            f"{moment}/{name}": self._adamw.state[parameter][moment].to("cpu", copy=True)
            for moment in _MOMENTS
            for name, parameter in self._parameters.items()
        }

    def load(self, state: Mapping[str, torch.Tensor], steps: int) -> None:
        """Take over what `state` gave, after `steps` steps. Further entries are ignored."""
        for moment in _MOMENTS:
            for name, parameter in self._parameters.items():
                self._adamw.state[parameter][moment].copy_(state[f"{moment}/{name}"])
        self._set_steps(steps)

    def _set_steps(self, steps: int) -> None:
        self.steps = steps
        for parameter in self._parameters.values():
            self._adamw.state[parameter]["step"].fill_(steps)
