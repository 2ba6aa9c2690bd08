"""Fused CPU kernels for what a packed forward does between its matrix products.

Each kernel is a numba ``cfunc`` of one argument: the address of an int64 table that holds the
addresses and sizes it needs. That makes a launch one ctypes call (3 us on two threads, GIL
released), and lets the very OpenMP pool that torch's own operators use run it (`Kernel`), so that
the two never spin against each other. Work inside a launch is handed out by an atomic counter.

bfloat16 is stored as 16 bits and computed in float32; every sum is float32. Rounding points are
those of transformers: after each norm, each activation and each addition to the residual.

Pages hold 16 tokens. Keys lie transposed, so that one register holds a page's 16 scores:

    key pages    (P, K, D, S)      value pages    (P, K, S, D)

Every kernel has a plain torch form in `plain.py`; the tests hold one against the other.
"""

# numba infers the types of what it compiles.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc"

from __future__ import annotations

import ctypes
import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from ..numba_cache import CACHE
from . import simd
from .simd import LANES

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE_SIZE = 16
"""Token slots of a KV page: one AVX-512 register of float32 scores."""

THREADS, ITEMS = 0, 1
"""Cells 0 and 1 of every argument table: threads entered, work items taken."""


@intrinsic
def _pointer(typing, address):
    """An integer address as a pointer."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), codegen


@intrinsic
def _take(typing, table, cell):
    """Atomically add one to a cell of an int64 array; the value before."""

    def codegen(context, builder, signature, args):
        array = context.make_array(signature.args[0])(context, builder, args[0])
        one = ir.Constant(ir.IntType(64), 1)
        return builder.atomic_rmw("add", builder.gep(array.data, [args[1]]), one, "monotonic")

    return types.int64(table, types.int64), codegen


@njit(inline="always")
def _round_float32(x):
    return x


def _build(itemsize: int, element: Any, load: Any, store: Any, rounded: Any) -> dict[str, Any]:
    """The kernels for one storage type, given its size in bytes and its vector loads and stores."""
    signature = types.void(types.voidptr)
    options = {"nopython": True, "cache": CACHE}
    step = LANES * itemsize

    @cfunc(signature, **options)
    def rms_norm(p):
        """Normalise rows, with or without a residual stream.

        [2] x (T, W)  [3] row stride of x  [4] residual (T, W)  [5] weight (W,) float32
        [6] out (T, W)  [7] T  [8] W  [9] eps  [10] residual multiplier  [11] mode

        mode 0: out = norm(x).  mode 1: residual += m x, out = norm(residual).
        mode 2: residual += m norm(x).
        """
        table = carray(p, (16,), dtype=np.int64)
        reals = carray(p, (16,), dtype=np.float64)
        rows, width, mode = table[7], table[8], table[11]
        multiplier = simd.splat(np.float32(reals[10]))
        _take(table, THREADS)
        while True:
            row = _take(table, ITEMS)
            if row >= rows:
                break
            x = table[2] + row * table[3] * itemsize
            residual = table[4] + row * width * itemsize
            total = simd.splat(np.float32(0.0))
            if mode == 1:
                for i in range(width // LANES):
                    value = rounded(
                        simd.fma(multiplier, load(x + i * step), load(residual + i * step))
                    )
                    store(residual + i * step, value)
                    total = simd.fma(value, value, total)
                x = residual
            else:
                for i in range(width // LANES):
                    value = load(x + i * step)
                    total = simd.fma(value, value, total)
            mean = simd.reduce_add(total) / np.float32(width)
            scale = simd.splat(np.float32(1.0 / math.sqrt(np.float64(mean) + reals[9])))
            if mode == 2:
                for i in range(width // LANES):
                    normed = simd.multiply(
                        rounded(simd.multiply(load(x + i * step), scale)),
                        simd.load_float32(table[5] + i * LANES * 4),
                    )
                    value = simd.fma(multiplier, rounded(normed), load(residual + i * step))
                    store(residual + i * step, value)
            else:
                out = table[6] + row * width * itemsize
                for i in range(width // LANES):
                    normed = simd.multiply(
                        rounded(simd.multiply(load(x + i * step), scale)),
                        simd.load_float32(table[5] + i * LANES * 4),
                    )
                    store(out + i * step, normed)

    @cfunc(signature, **options)
    def gated_activation(p):
        """act(gate) * up.

        [2] gate and up side by side (T, 2F)  [3] out (T, F)  [4] T  [5] F
        [6] 0 for silu, 1 for gelu in its tanh form
        """
        table = carray(p, (8,), dtype=np.int64)
        rows, width = table[4], table[5]
        cubic = simd.splat(np.float32(0.044715))
        twice = simd.splat(np.float32(1.5957691216057308))  # 2 sqrt(2 / pi)
        _take(table, THREADS)
        while True:
            row = _take(table, ITEMS)
            if row >= rows:
                break
            gate = table[2] + row * 2 * width * itemsize
            up = gate + width * itemsize
            out = table[3] + row * width * itemsize
            for i in range(width // LANES):
                x = load(gate + i * step)
                inner = x
                if table[6] == 1:
                    # 0.5 x (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
                    cube = simd.multiply(simd.multiply(x, x), x)
                    inner = simd.multiply(twice, simd.fma(cubic, cube, x))
                value = rounded(simd.multiply(x, simd.sigmoid(inner)))
                store(out + i * step, simd.multiply(value, load(up + i * step)))

    @cfunc(signature, **options)
    def rope_and_store(p):
        """Rotate queries and keys in place and write keys and values to their pages.

        [2] qkv (T, (H + 2K) D)  [3] key pages  [4] value pages  [5] slots (T,) int64
        [6] positions (T,) int64  [7] cos and [8] sin (positions, D / 2) float32
        [9] query norm and [10] key norm weights (D,) float32, or 0  [11] norm eps
        [12] T  [13] H  [14] K  [15] D
        """
        table = carray(p, (16,), dtype=np.int64)
        reals = carray(p, (16,), dtype=np.float64)
        tokens, heads, kv_heads, dim = table[12], table[13], table[14], table[15]
        half = dim // 2
        lanes_of_half = half // LANES
        slots = carray(_pointer(table[5]), (tokens,), dtype=np.int64)
        positions = carray(_pointer(table[6]), (tokens,), dtype=np.int64)
        _take(table, THREADS)
        while True:
            t = _take(table, ITEMS)
            if t >= tokens:
                break
            cos = table[7] + positions[t] * half * 4
            sin = table[8] + positions[t] * half * 4
            page, within = slots[t] // PAGE_SIZE, slots[t] % PAGE_SIZE
            token = table[2] + t * (heads + 2 * kv_heads) * dim * itemsize
            for h in range(heads + kv_heads):
                x = token + h * dim * itemsize
                norm = table[9] if h < heads else table[10]
                if norm != 0:
                    total = simd.splat(np.float32(0.0))
                    for i in range(dim // LANES):
                        value = load(x + i * step)
                        total = simd.fma(value, value, total)
                    mean = simd.reduce_add(total) / np.float32(dim)
                    scale = simd.splat(np.float32(1.0 / math.sqrt(np.float64(mean) + reals[11])))
                    for i in range(dim // LANES):
                        normed = simd.multiply(
                            rounded(simd.multiply(load(x + i * step), scale)),
                            simd.load_float32(norm + i * LANES * 4),
                        )
                        store(x + i * step, normed)
                low, high = x, x + half * itemsize
                minus = simd.splat(np.float32(-1.0))
                for i in range(lanes_of_half):
                    a, b = load(low + i * step), load(high + i * step)
                    c = simd.load_float32(cos + i * LANES * 4)
                    s = simd.load_float32(sin + i * LANES * 4)
                    store(
                        low + i * step,
                        simd.fma(a, c, simd.multiply(simd.multiply(minus, b), s)),
                    )
                    store(high + i * step, simd.fma(b, c, simd.multiply(a, s)))
            for k in range(kv_heads):
                key = carray(_pointer(token + (heads + k) * dim * itemsize), (dim,), dtype=element)
                value = carray(
                    _pointer(token + (heads + kv_heads + k) * dim * itemsize),
                    (dim,),
                    dtype=element,
                )
                at = (page * kv_heads + k) * dim * PAGE_SIZE
                keys = carray(_pointer(table[3] + at * itemsize), (dim * PAGE_SIZE,), dtype=element)
                values = carray(
                    _pointer(table[4] + (at + within * dim) * itemsize), (dim,), dtype=element
                )
                for i in range(dim):
                    keys[i * PAGE_SIZE + within] = key[i]
                    values[i] = value[i]

    @cfunc(signature, **options)
    def paged_attention(p):
        """Attention of each token over the pages of its sequence, up to its own position.

        [2] queries  [3] key pages  [4] value pages  [5] out (T, H D)  [6] positions (T,) int64
        [7] sequence of each token (T,) int32  [8] block tables (B, M) int32  [9] M
        [10] T  [11] H  [12] K  [13] D  [14] row stride of the queries
        [15] scaling  [16] softcap or 0  [17] window in tokens or 0
        [18] scratch  [19] floats of scratch per thread  [20] floats of scores per head
        """
        table = carray(p, (24,), dtype=np.int64)
        reals = carray(p, (24,), dtype=np.float64)
        pages_max, tokens = table[9], table[10]
        heads, kv_heads, dim = table[11], table[12], table[13]
        group = heads // kv_heads
        window, row = table[17], table[20]
        softcap = np.float32(reals[16])
        positions = carray(_pointer(table[6]), (tokens,), dtype=np.int64)
        sequence = carray(_pointer(table[7]), (tokens,), dtype=np.int32)
        zero = simd.splat(np.float32(0.0))
        scaling = simd.splat(np.float32(reals[15]))
        thread = _take(table, THREADS)
        scratch = table[18] + thread * table[19] * 4
        query = carray(_pointer(scratch), (group * dim,), dtype=np.float32)
        scores_at = scratch + group * dim * 4
        while True:
            item = _take(table, ITEMS)
            if item >= tokens * kv_heads:
                break
            # Prefill chunks come last in the batch and cost most: starting there balances.
            t = tokens - 1 - item // kv_heads
            k = item % kv_heads
            context = positions[t] + 1
            start = np.int64(0)
            if window > 0 and context > window:
                start = context - window
            first, last = start // PAGE_SIZE, (context - 1) // PAGE_SIZE
            pages = last - first + 1
            span = pages * PAGE_SIZE
            blocks = carray(
                _pointer(table[8] + (sequence[t] * pages_max + first) * 4), (pages,), dtype=np.int32
            )
            head_bytes = dim * PAGE_SIZE * itemsize
            q = table[2] + (t * table[14] + k * group * dim) * itemsize
            for i in range(group * dim // LANES):
                simd.store_float32(
                    scratch + i * LANES * 4, simd.multiply(load(q + i * step), scaling)
                )

            for page in range(pages):
                keys = table[3] + (np.int64(blocks[page]) * kv_heads + k) * head_bytes
                for g in range(group):
                    s0, s1, s2, s3 = zero, zero, zero, zero
                    for d in range(0, dim, 4):
                        at = keys + d * step
                        i = g * dim + d
                        s0 = simd.fma(simd.splat(query[i]), load(at), s0)
                        s1 = simd.fma(simd.splat(query[i + 1]), load(at + step), s1)
                        s2 = simd.fma(simd.splat(query[i + 2]), load(at + 2 * step), s2)
                        s3 = simd.fma(simd.splat(query[i + 3]), load(at + 3 * step), s3)
                    simd.store_float32(
                        scores_at + (g * row + page * PAGE_SIZE) * 4,
                        simd.add(simd.add(s0, s1), simd.add(s2, s3)),
                    )

            # Slots before the window and past the context hold whatever was there before.
            below = start - first * PAGE_SIZE
            filled = context - first * PAGE_SIZE
            for g in range(group):
                at = scores_at + g * row * 4
                scores = carray(_pointer(at), (span,), dtype=np.float32)
                if softcap > 0:
                    for i in range(pages):
                        x = simd.load_float32(at + i * LANES * 4)
                        x = simd.tanh(simd.divide(x, simd.splat(softcap)))
                        simd.store_float32(
                            at + i * LANES * 4, simd.multiply(simd.splat(softcap), x)
                        )
                for s in range(below):
                    scores[s] = np.float32(-np.inf)
                for s in range(filled, span):
                    scores[s] = np.float32(-np.inf)
                top = simd.load_float32(at)
                for i in range(1, pages):
                    top = simd.maximum(top, simd.load_float32(at + i * LANES * 4))
                minus_top = simd.splat(-simd.reduce_max(top))
                total = zero
                for i in range(pages):
                    e = simd.exp(simd.add(simd.load_float32(at + i * LANES * 4), minus_top))
                    simd.store_float32(at + i * LANES * 4, e)
                for s in range(below):
                    scores[s] = np.float32(0.0)
                for s in range(filled, span):
                    scores[s] = np.float32(0.0)
                for i in range(pages):
                    total = simd.add(total, simd.load_float32(at + i * LANES * 4))
                inverse = simd.splat(np.float32(1.0) / simd.reduce_add(total))
                for i in range(pages):
                    at_i = at + i * LANES * 4
                    simd.store_float32(at_i, simd.multiply(simd.load_float32(at_i), inverse))

            for g in range(group):
                scores = carray(_pointer(scores_at + g * row * 4), (span,), dtype=np.float32)
                out = table[5] + (t * heads + k * group + g) * dim * itemsize
                for c in range(dim // LANES):
                    o0, o1, o2, o3 = zero, zero, zero, zero
                    for page in range(filled // PAGE_SIZE):
                        values = table[4] + (
                            (np.int64(blocks[page]) * kv_heads + k) * head_bytes + c * step
                        )
                        for s in range(0, PAGE_SIZE, 4):
                            i = page * PAGE_SIZE + s
                            at = values + s * dim * itemsize
                            o0 = simd.fma(simd.splat(scores[i]), load(at), o0)
                            at += dim * itemsize
                            o1 = simd.fma(simd.splat(scores[i + 1]), load(at), o1)
                            at += dim * itemsize
                            o2 = simd.fma(simd.splat(scores[i + 2]), load(at), o2)
                            at += dim * itemsize
                            o3 = simd.fma(simd.splat(scores[i + 3]), load(at), o3)
                    # The last page, up to the context: 0 x NaN would be NaN.
                    whole = filled // PAGE_SIZE
                    if whole < pages:
                        at = table[4] + (
                            (np.int64(blocks[whole]) * kv_heads + k) * head_bytes + c * step
                        )
                        for i in range(whole * PAGE_SIZE, filled):
                            o0 = simd.fma(simd.splat(scores[i]), load(at), o0)
                            at += dim * itemsize
                    store(out + c * step, simd.add(simd.add(o0, o1), simd.add(o2, o3)))

    @cfunc(signature, **options)
    def add_adapters(p):
        """y += B A x, each row with the matrices of its own slot; slot 0 has none.

        [2] x (T, W)  [3] row stride of x  [4] y  [5] row stride of y  [6] T  [7] W
        [8] slots (T,) int64  [9] descriptors (slots, [10]) int64
        [11] scratch  [12] floats of scratch per thread, at least the sum of a slot's ranks

        A descriptor is the number of parts, then for each: address of A (R, W), address of B
        transposed (R, O), both float32, R, first output column, O. R is a multiple of 4.
        """
        table = carray(p, (16,), dtype=np.int64)
        rows, width, cells = table[6], table[7], table[10]
        slots = carray(_pointer(table[8]), (rows,), dtype=np.int64)
        zero = simd.splat(np.float32(0.0))
        thread = _take(table, THREADS)
        low = carray(_pointer(table[11] + thread * table[12] * 4), (table[12],), dtype=np.float32)
        while True:
            row = _take(table, ITEMS)
            if row >= rows:
                break
            described = carray(
                _pointer(table[9] + slots[row] * cells * 8), (cells,), dtype=np.int64
            )
            x = table[2] + row * table[3] * itemsize
            for part in range(described[0]):
                down, up = described[1 + 5 * part], described[2 + 5 * part]
                rank, first, outputs = (
                    described[3 + 5 * part],
                    described[4 + 5 * part],
                    described[5 + 5 * part],
                )
                line = width * 4
                for r in range(0, rank, 4):
                    s0, s1, s2, s3 = zero, zero, zero, zero
                    a = down + r * line
                    for i in range(width // LANES):
                        v = load(x + i * step)
                        s0 = simd.fma(simd.load_float32(a + i * LANES * 4), v, s0)
                        s1 = simd.fma(simd.load_float32(a + line + i * LANES * 4), v, s1)
                        s2 = simd.fma(simd.load_float32(a + 2 * line + i * LANES * 4), v, s2)
                        s3 = simd.fma(simd.load_float32(a + 3 * line + i * LANES * 4), v, s3)
                    low[r] = simd.reduce_add(s0)
                    low[r + 1] = simd.reduce_add(s1)
                    low[r + 2] = simd.reduce_add(s2)
                    low[r + 3] = simd.reduce_add(s3)
                y = table[4] + (row * table[5] + first) * itemsize
                line = outputs * 4
                for i in range(outputs // LANES):
                    total, other = load(y + i * step), zero
                    b = up + i * LANES * 4
                    for r in range(0, rank, 2):
                        total = simd.fma(simd.splat(low[r]), simd.load_float32(b + r * line), total)
                        other = simd.fma(
                            simd.splat(low[r + 1]), simd.load_float32(b + (r + 1) * line), other
                        )
                    store(y + i * step, simd.add(total, other))

    return {
        "add_adapters": add_adapters,
        "rms_norm": rms_norm,
        "gated_activation": gated_activation,
        "rope_and_store": rope_and_store,
        "paged_attention": paged_attention,
    }


class Arguments:
    """A kernel's argument table: `cells` as int64, `reals` the same memory as float64."""

    def __init__(self, size: int) -> None:
        self.cells = np.zeros(size + 8, np.int64)
        self.reals = self.cells.view(np.float64)
        self.address = self.cells.ctypes.data


class Kernel:
    """A compiled kernel, launched on one thread or on torch's own pool."""

    def __init__(self, function: Any) -> None:
        self._function = function  # keeps the machine code alive
        self._address = function.address
        self._direct = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function.address)

    def __call__(self, arguments: Arguments, threads: int = 0) -> None:
        """Run to the end on `threads` threads; 0 takes torch's setting for this thread."""
        arguments.cells[:2] = 0
        threads = threads or torch.get_num_threads()
        if threads > 1 and _parallel is not None:
            _parallel(self._address, arguments.address, threads, 0)
        else:
            self._direct(arguments.address)


class Kernels:
    """The compiled kernels for one dtype."""

    def __init__(self, built: dict[str, Any]) -> None:
        self.add_adapters = Kernel(built["add_adapters"])
        self.rms_norm = Kernel(built["rms_norm"])
        self.gated_activation = Kernel(built["gated_activation"])
        self.rope_and_store = Kernel(built["rope_and_store"])
        self.paged_attention = Kernel(built["paged_attention"])


def _find_parallel() -> Callable[[int, int, int, int], None] | None:
    """`GOMP_parallel` of the OpenMP library that torch has loaded, or None.

    ``GOMP_parallel(fn, data, num_threads, flags)`` is what gcc compiles ``#pragma omp parallel``
    to; calling it from the thread that runs torch's operators reuses the same team of threads.
    """
    try:
        library = ctypes.CDLL("libgomp.so.1")
        function = library.GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


_parallel = _find_parallel()

DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def kernels_for(dtype: torch.dtype) -> Kernels:
    """The kernels for float32 or bfloat16; compiled once (about 3 s) and cached on disk."""
    if dtype is torch.float32:
        return Kernels(_build(4, np.float32, simd.load_float32, simd.store_float32, _round_float32))
    if dtype is torch.bfloat16:
        return Kernels(
            _build(2, np.uint16, simd.load_bfloat16, simd.store_bfloat16, simd.round_bfloat16)
        )
    raise ValueError(f"no compiled kernels for {dtype}")
