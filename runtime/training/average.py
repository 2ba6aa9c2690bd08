"""An average of the adapter's weights over optimizer steps: what candidates are made of.

One step follows the noise of its batch; an average over the last steps generalises better and dips
less (Polyak & Juditsky 1992; Izmailov et al. 2018, "Averaging weights leads to wider optima"). With
w_i the weights after step i of n and d the decay,

    average = sum d^(n-i) w_i / sum d^(n-i)         i = 1 .. n

that is, exponentially forgetting and corrected for its short start, as Adam's moments are: after
one step it is that step's weights. It is kept as average += (w_n - average) (1 - d) / (1 - d^n).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping


class WeightAverage:
    """Owns the average. Allocated at once, so that a step needs no memory for it.

    Args:
        parameters: whose values are averaged, by name.
        decay: d, in (0, 1).

    Attributes:
        steps: how many were averaged; 0: there is no average yet.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], decay: float) -> None:
        self.steps = 0
        self._decay = decay
        self._parameters = {name: p.detach() for name, p in parameters.items()}  # shares storage
        self._values = {name: torch.zeros_like(p) for name, p in self._parameters.items()}

    @property
    def values(self) -> Mapping[str, torch.Tensor]:
        """The average, by name; the present weights before the first step. Not to be changed."""
        return self._values if self.steps else self._parameters

    def update(self) -> None:
        """Take in the weights after a step."""
        self.steps += 1
        share = (1.0 - self._decay) / (1.0 - self._decay**self.steps)
        torch._foreach_lerp_(list(self._values.values()), list(self._parameters.values()), share)

    def reset(self) -> None:
        """Forget all steps."""
        self.steps = 0

    def load(self, values: Mapping[str, torch.Tensor], steps: int) -> None:
        """Go on from these values, by name, which `steps` steps were averaged into."""
        self.steps = steps
        if steps:
            for name, value in self._values.items():
                value.copy_(values[name])
