"""Random numbers as a function, not a state.

A draw's number depends on (seed, sibling, position, attempt) alone. A request therefore gets the
same numbers whatever else is in the batch, after a preemption, and on any device.

The generator is splitmix64 (Steele, Lea, Flood 2014), addressed instead of iterated: every sibling
of every request starts its sequence elsewhere (`stream_key`), and a draw takes element
``position + attempt * 2**32`` of it.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from .types import SamplingParams

_MASK64 = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15  # 2**64 / golden ratio
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def mix64(x: int) -> int:
    """The finalizer of splitmix64: a bijection of 64-bit integers that scatters their bits."""
    x &= _MASK64
    x = ((x ^ (x >> 30)) * _MIX1) & _MASK64
    x = ((x ^ (x >> 27)) * _MIX2) & _MASK64
    return x ^ (x >> 31)


def stream_key(seed: int, stream: int) -> int:
    """Where the sequence of sibling `stream` of a request with this seed starts (64 bits)."""
    return mix64(mix64(seed) + _GAMMA * (stream + 1))


def uniforms(
    keys: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64], attempt: int
) -> npt.NDArray[np.float64]:
    """One number from [0, 1) for each sequence.

    It has 48 bits, so that ``number * total < total`` holds in float64 for any total.

    Args:
        keys: (n,) from `stream_key`.
        positions: (n,) tokens generated so far.
        attempt: 0 for the first draw at a position, 1 for the draw after a rejection, ...
    """
    x = keys + (positions.astype(np.uint64) + np.uint64(attempt << 32)) * np.uint64(_GAMMA)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX2)
    x = x ^ (x >> np.uint64(31))
    numbers: npt.NDArray[Any] = (x >> np.uint64(16)) * 2.0**-48
    return numbers


class SeedSource:
    """Seeds for the requests that bring none.

    With a `seed` the whole runtime is reproducible (the same requests in the same order); without
    one the seeds come from the operating system's entropy.
    """

    __slots__ = ("_count", "_start")

    def __init__(self, seed: int | None = None) -> None:
        self._start = secrets.randbits(64) if seed is None else mix64(seed)
        self._count = 0

    def resolve(self, params: SamplingParams) -> int:
        """The seed of a new request: its own, or the next one of this source."""
        if params.seed is not None:
            return params.seed
        self._count += 1
        return mix64(self._start + _GAMMA * self._count)
