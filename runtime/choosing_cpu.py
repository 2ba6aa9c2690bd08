"""Choosing tokens on a CPU: the compiled form of `choosing.TorchChooser`.

A row of logits stays in the cache from its first pass to its last, no temporary is allocated, and
other Python threads run meanwhile. The torch form does the same with a dozen operators over the
whole batch, each a pass through memory; it takes ten times as long at 16 x 4096, more at larger
vocabularies, and is what the tests compare with.

A row's choice depends on that row alone, to the last bit.
"""

# numba infers the types of what it compiles.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc"

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit

from .choosing import BLOCK, DrawTable, best_first
from .numba_cache import CACHE
from .types import TokenLogprob

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    from torch import Tensor

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)

# Sums may be reordered (that is what vector lanes do), multiply-adds fused, zeros lose their sign.
# NaN and infinity keep their meaning.
_FAST = {"reassoc", "contract", "nsz"}


@njit(cache=CACHE, inline="always")
def uniform(key, position, attempt):
    """`randomness.uniforms` for one number."""
    x = key + (np.uint64(position) + (np.uint64(attempt) << np.uint64(32))) * _GAMMA
    x = (x ^ (x >> np.uint64(30))) * _MIX1
    x = (x ^ (x >> np.uint64(27))) * _MIX2
    x = x ^ (x >> np.uint64(31))
    return np.float64(x >> np.uint64(16)) * 2.0**-48


@njit(cache=CACHE, inline="always")
def _exp(x):
    """e**x for x <= 0 within 2 ulp of float32; 0 below -87. Cephes' expf, without a branch.

    x = n ln 2 + r; a polynomial in r; n added to the exponent bits. Adding and subtracting
    1.5 * 2**23 rounds to whole numbers and leaves n in the low bits.
    """
    scaled = x if x > np.float32(-87.0) else np.float32(-87.0)
    shifted = scaled * np.float32(1.44269504088896341) + np.float32(12582912.0)
    n = shifted - np.float32(12582912.0)
    r = scaled - n * np.float32(0.693359375)
    r = r + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * (r * r) + r + np.float32(1.0)
    exponent = (np.int32(n) + np.int32(127)) << np.int32(23)
    power = np.int32(exponent).view(np.float32)
    return p * power if x > np.float32(-87.0) else np.float32(0.0)


@njit(cache=CACHE, fastmath={"contract"})
def _exponentials(logits, top, inverse_temperature, weights):
    for i in range(len(logits)):
        weights[i] = _exp((logits[i] - top) * inverse_temperature)


@njit(cache=CACHE, fastmath=_FAST)
def _block_sums(weights, floor, sums):
    """Sum the weights above `floor`, block by block; the total in float64."""
    total = 0.0
    for b in range(len(sums)):
        part = np.float32(0.0)
        for i in range(BLOCK):
            w = weights[b * BLOCK + i]
            part += w if w > floor else np.float32(0.0)
        sums[b] = part
        total += np.float64(part)
    return total


@njit(cache=CACHE)
def _find(weights, floor, sums, target):
    """The token in whose stretch of the cumulative sum of weights above `floor` `target` lies."""
    last = len(sums) - 1
    while last > 0 and sums[last] == 0.0:
        last -= 1
    b = 0
    while b < last and (target >= sums[b]):
        target -= sums[b]
        b += 1
    token = -1
    for i in range(b * BLOCK, b * BLOCK + BLOCK):
        w = weights[i]
        if w > floor:
            token = i
            target -= np.float64(w)
            if target < 0.0:
                break
    return token


@njit(cache=CACHE)
def _any_from(values, least):
    """Whether any value is at least `least`."""
    count = np.int32(0)
    for i in range(len(values)):  # to the end: without a way out these are vector instructions
        count += np.int32(values[i] >= least)
    return count > 0


@njit(cache=CACHE)
def _kth_largest(values, k, heap):
    """The k-th largest value, by a heap of the k largest so far with the least on top."""
    for i in range(k):
        heap[i] = values[i]
    for start in range(k // 2 - 1, -1, -1):
        _sift_down(heap, start, k)
    least = heap[0]
    start = k
    while start < len(values):
        block = values[start : start + BLOCK]
        if _any_from(block, least):  # few are, and passing over one takes a few instructions
            for i in range(len(block)):
                if block[i] > least:
                    heap[0] = block[i]
                    _sift_down(heap, 0, k)
                    least = heap[0]
        start += BLOCK
    return least


@njit(cache=CACHE)
def _sift_down(heap, at, size):
    value = heap[at]
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= value:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = value


@njit(cache=CACHE, fastmath=_FAST)
def _keep_from(measure, least, weights):
    """Zero the weights where `measure` is below `least`."""
    for i in range(len(measure)):
        weights[i] = weights[i] if measure[i] >= least else np.float32(0.0)


@njit(cache=CACHE, fastmath=_FAST)
def _count_above(values, limit):
    count = np.int32(0)
    for i in range(len(values)):
        count += np.int32(values[i] > limit)
    return count


@njit(cache=CACHE, nogil=True)
def _edit(flat, index, values):
    """See `Chooser.edit`; in place."""
    for i in range(len(index)):
        now = flat[index[i]] + values[0, i]
        now = now / values[1, i] if now > 0.0 else now * values[1, i]
        flat[index[i]] = now - values[2, i]


@njit(cache=CACHE, nogil=True)
def _draw(
    logits,
    rows,
    keys,
    inverse_temperature,
    top_k,
    top_p,
    min_p,
    positions,
    tops,
    weights,
    sums,
    heap,
    tokens,
):
    """Draw tokens[row] for each of n rows.

    Args:
        logits: (N, V) float32.
        rows to min_p: the `DrawTable`.
        positions: (n,) int64.
        tops: (N,) float32, the largest logit of each row; a row where it is not finite is skipped.
        weights: scratch, V rounded up to a multiple of BLOCK, float32, 0 beyond V.
        sums: scratch (len(weights) / BLOCK,) float32.
        heap: scratch (V,) float32.
        tokens: (N,) int64, the result.
    """
    for n in range(len(rows)):
        row = logits[rows[n]]
        top = tops[rows[n]]
        if not np.isfinite(top):
            continue
        _exponentials(row, top, inverse_temperature[n], weights)
        if min_p[n] > 0.0:
            _keep_from(weights, min_p[n], weights)  # the largest weight is 1
        k = top_k[n]
        if k > 0:
            _keep_from(row, _kth_largest(row, k, heap), weights)
        floor = np.float32(0.0)
        total = _block_sums(weights, floor, sums)
        limit = top_p[n] * total
        attempt = 0
        while True:
            number = uniform(keys[n], positions[n], attempt)
            token = _find(weights, floor, sums, number * total)
            if top_p[n] >= 1.0:
                break
            # What is strictly more likely: the test, and where the next draw is from if it fails.
            floor = weights[token]
            total = _block_sums(weights, floor, sums)
            if total < limit:
                break
            attempt += 1
        tokens[rows[n]] = token


@njit(cache=CACHE, nogil=True)
def _token_logprobs(
    logits, tops, tokens, ks, weights, sums, heap, values, ranks, top_values, top_tokens
):
    """Fill values (m,), ranks (m,) and, up to ks[i] in row i, the top tables (m, most)."""
    for n in range(len(tokens)):
        row = logits[n]
        top = tops[n]
        if not np.isfinite(top):
            values[n] = np.nan
            ranks[n] = 0
            top_values[n, :] = np.nan
            top_tokens[n, :] = 0
            continue
        _exponentials(row, top, np.float32(1.0), weights)
        total = _block_sums(weights, np.float32(0.0), sums)
        normaliser = np.float64(top) + np.log(total)
        chosen = row[tokens[n]]
        values[n] = np.float64(chosen) - normaliser
        ranks[n] = 1 + _count_above(row, chosen)
        k = ks[n]
        if k == 0:
            continue
        least = _kth_largest(row, k, heap)
        ties = k - _count_above(row, least)  # of the tokens equal to the k-th, the first ones
        found = 0
        start = 0
        while found < k:
            block = row[start : start + BLOCK]
            if _any_from(block, least):
                for i in range(len(block)):
                    if block[i] > least or (block[i] == least and ties > 0):
                        ties -= block[i] == least
                        top_values[n, found] = np.float64(block[i]) - normaliser
                        top_tokens[n, found] = start + i
                        found += 1
            start += BLOCK


class CpuChooser:
    """Compiled code for float32 logits in main memory. Used by one thread at a time.

    The first one in a process loads the machine code; the first one ever compiles it (seconds).
    """

    def __init__(self, vocab_size: int) -> None:
        width = -(-vocab_size // BLOCK) * BLOCK
        self._weights = np.zeros(width, np.float32)
        self._sums = np.empty(width // BLOCK, np.float32)
        self._heap = np.empty(vocab_size, np.float32)
        self._warm_up(vocab_size)

    def edit(
        self, logits: Tensor, index: npt.NDArray[np.int64], values: npt.NDArray[np.float32]
    ) -> Tensor:
        """See `Chooser.edit`."""
        edited = logits.clone(memory_format=torch.contiguous_format)
        _edit(edited.numpy().reshape(-1), index, values)
        return edited

    def choose(
        self, logits: Tensor, table: DrawTable | None, positions: npt.NDArray[np.int64] | None
    ) -> tuple[list[int], list[float]]:
        """See `Chooser.choose`."""
        # numpy's argmax is vectorised and torch's is not: 13 times as fast at 16 x 4096.
        array = logits.contiguous().numpy()
        tokens = array.argmax(axis=1)
        tops = array[np.arange(len(tokens)), tokens]
        if table is not None and positions is not None:
            _draw(
                array,
                table.rows,
                table.keys,
                table.inverse_temperature,
                table.top_k,
                table.top_p,
                table.min_p,
                positions,
                tops,
                self._weights,
                self._sums,
                self._heap,
                tokens,
            )
        return tokens.tolist(), tops.tolist()

    def token_logprobs(
        self, logits: Tensor, tokens: Sequence[int], ks: Sequence[int]
    ) -> list[TokenLogprob]:
        """See `Chooser.token_logprobs`."""
        count, most = len(tokens), min(max(ks), logits.shape[1])
        values, ranks = np.empty(count), np.empty(count, np.int64)
        top_values, top_tokens = np.empty((count, most)), np.empty((count, most), np.int64)
        array = logits.contiguous().numpy()
        _token_logprobs(
            array,
            array[np.arange(count), array.argmax(axis=1)],
            np.array(tokens, np.int64),
            np.minimum(ks, most),
            self._weights,
            self._sums,
            self._heap,
            values,
            ranks,
            top_values,
            top_tokens,
        )
        return [
            TokenLogprob(token, value, rank, best_first(best[:k], alternatives[:k]))
            for token, value, rank, best, alternatives, k in zip(
                tokens,
                values.tolist(),
                ranks.tolist(),
                top_values.tolist(),
                top_tokens.tolist(),
                ks,
                strict=True,
            )
        ]

    def _warm_up(self, vocab_size: int) -> None:
        logits = torch.zeros(1, vocab_size)
        one = np.zeros(1, np.int64)
        table = DrawTable(
            rows=one,
            keys=np.zeros(1, np.uint64),
            inverse_temperature=np.ones(1, np.float32),
            top_k=np.ones(1, np.int64),
            top_p=np.full(1, 0.5),
            min_p=np.zeros(1, np.float32),
        )
        self.choose(self.edit(logits, one, np.ones((3, 1), np.float32)), table, one)
        self.token_logprobs(logits, [0], [1])
