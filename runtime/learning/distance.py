"""How far the weights of two adapter versions are apart, module by module.

An adapter adds D = scaling B A to a linear. Compared is D, not A and B, which may differ where D
does not. D is (out, in) and large, so it is never formed: with two versions stacked,

    D_b - D_a = P Q,   P = [s_b B_b, -s_a B_a] (out, 2R),   Q = [A_b; A_a] (2R, in)
    |P Q|^2   = trace((P' P) (Q Q'))                         Frobenius, two (2R, 2R) products
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..lora import read_pairs

if TYPE_CHECKING:
    from pathlib import Path

    from ..lora import LoraPair


@dataclass(frozen=True, slots=True)
class ModuleDistance:
    """Frobenius norms of one linear's change of weights: by a, by b, and between the two."""

    norm_a: float
    norm_b: float
    distance: float

    @property
    def relative(self) -> float:
        """The distance as a share of the larger norm; 0 where neither changes anything."""
        largest = max(self.norm_a, self.norm_b)
        return self.distance / largest if largest else 0.0


def module_distances(a: Path | None, b: Path | None) -> dict[str, ModuleDistance]:
    """Distances by path of the linear, of two PEFT directories; None is the base model.

    Raises:
        AdapterLoadError: a file is damaged or is more than plain LoRA.
    """
    left, right = ({} if path is None else read_pairs(path) for path in (a, b))
    distances = {}
    for module in sorted({*left, *right}):
        factors = [version[module] for version in (left, right) if module in version]
        signs = [sign for sign, version in ((-1.0, left), (1.0, right)) if module in version]
        distances[module] = ModuleDistance(
            norm_a=_norm([left[module]], [1.0]) if module in left else 0.0,
            norm_b=_norm([right[module]], [1.0]) if module in right else 0.0,
            distance=_norm(factors, signs),
        )
    return distances


def _norm(factors: list[LoraPair], signs: list[float]) -> float:
    """Frobenius norm of the sum of sign * B A, in float64."""
    p = torch.cat([sign * b.double() for sign, (_, b) in zip(signs, factors, strict=True)], dim=1)
    q = torch.cat([a.double() for a, _ in factors], dim=0)
    squared = ((p.T @ p) * (q @ q.T)).sum().item()
    return math.sqrt(max(squared, 0.0))  # cancellation may leave a tiny negative number
