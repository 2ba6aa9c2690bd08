"""Paged attention in Triton: what CUDA uses where torch has no paged kernel that fits.

torch 2.11's `varlen_attn` takes no block tables, and no release's caps scores. One program computes
some query rows of one sequence for one key head, the query heads that share it side by side, so
that keys are read once for all of them:

    rows     m = 0 .. M - 1: row m // G of the block, query head m % G     G = H / K
    keys     N at a time, gathered through the block table
    state    running maximum, sum of weights and weighted values (Milakov & Gimelshein 2018)

In a batch of decodes the keys are cut, too, so that one long sequence does not leave the card idle:
each part gives its own state, and `_merge` puts them together. Parts are as long for all contexts
up to PART * MAX_PARTS, so there the result does not depend on which others decode beside it.
"""

# Triton's functions have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch for the CPU bring none
    triton = tl = None

from .plain import HeadShape, LayerAttention, PlainKernels

if TYPE_CHECKING:
    from .batch import PackedBatch, Rows

PART = 512
"""Keys of one part of a decode, at least."""

MAX_PARTS = 64
"""Parts of the longest decode: beyond it they grow."""

_KEYS = 64  # N
_PROMPT_ROWS = 64  # M of prompts
_DOT = 16  # the least that a matrix product takes in any direction


def _jit(**options: Any) -> Any:
    return (lambda function: function) if triton is None else triton.jit(**options)


# Each kind of value that Triton tells apart (1, multiples of 16) would be compiled for itself while
# requests wait; these differ from batch to batch.
@_jit(
    do_not_specialize=["table_stride", "parts"],
    do_not_specialize_on_alignment=["tables", "starts", "sequences", "positions"],
)
def _attend(
    query,
    keys,
    values,
    tables,
    starts,
    sequences,
    positions,
    out,
    states,
    partial,
    scaling,
    softcap,
    query_stride,
    table_stride,
    parts,
    PART: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
):
    """Grid: (runs of rows, blocks of rows or parts of keys, key heads). PART 0: blocks of rows."""
    run = tl.program_id(0)
    kv_head = tl.program_id(2)
    first = tl.load(starts + run)
    stop = tl.load(starts + run + 1)
    if PART == 0:
        first += tl.program_id(1) * ROWS
    if first >= stop:
        return
    m = tl.arange(0, M)
    row = first + m // GROUP
    head = kv_head * GROUP + m % GROUP
    is_row = (m // GROUP < ROWS) & (row < stop)
    row = tl.where(is_row, row, first).to(tl.int64)
    at = tl.load(positions + row).to(tl.int32)
    newest = tl.max(tl.where(is_row, at, 0), axis=0)
    end = newest + 1
    begin = 0
    if WINDOW > 0:
        oldest = tl.min(tl.where(is_row, at, newest), axis=0)
        begin = tl.maximum(oldest - WINDOW + 1, 0)
    if PART > 0:
        low = tl.program_id(1) * PART
        begin = tl.maximum(begin, low)
        end = tl.minimum(end, low + PART)
        if begin >= end:
            return
    d = tl.arange(0, D)
    is_dim = d < DIM
    q = tl.load(
        query + row[:, None] * query_stride + (head * DIM)[:, None] + d[None, :],
        mask=is_row[:, None] & is_dim[None, :],
        other=0.0,
    )
    sequence = tl.load(sequences + first).to(tl.int64)
    table = tables + sequence * table_stride
    largest = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    mixed = tl.zeros((M, D), tl.float32)
    for start in range(begin // N * N, end, N):
        n = start + tl.arange(0, N)
        is_key = (n >= begin) & (n < end)
        page = tl.load(table + n // PAGE, mask=is_key, other=0).to(tl.int64)
        slot = ((page * PAGE + n % PAGE) * KV_HEADS + kv_head) * DIM
        k = tl.load(
            keys + slot[None, :] + d[:, None], mask=is_key[None, :] & is_dim[:, None], other=0.0
        )
        scores = tl.dot(q, k, input_precision="ieee") * scaling
        if CAPS:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        seen = is_key[None, :] & (n[None, :] <= at[:, None])
        if WINDOW > 0:
            seen = seen & (n[None, :] > at[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, axis=1))
        # A row that has seen nothing yet: -inf minus -inf would be NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - base[:, None])
        shrink = tl.exp(largest - base)
        total = total * shrink + tl.sum(weights, axis=1)
        v = tl.load(
            values + slot[:, None] + d[None, :], mask=is_key[:, None] & is_dim[None, :], other=0.0
        )
        mixed = mixed * shrink[:, None]
        mixed += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        largest = higher
    heads = KV_HEADS * GROUP
    to = row * heads + head
    is_out = is_row[:, None] & is_dim[None, :]
    if PART == 0:
        mixed = mixed / total[:, None]
        tl.store(out + to[:, None] * DIM + d[None, :], mixed.to(out.dtype.element_ty), mask=is_out)
    else:
        to = to * parts + tl.program_id(1)
        tl.store(states + to * 2, largest, mask=is_row)
        tl.store(states + to * 2 + 1, total, mask=is_row)
        tl.store(partial + to[:, None] * DIM + d[None, :], mixed, mask=is_out)


@_jit(do_not_specialize=["parts"], do_not_specialize_on_alignment=["positions"])
def _merge(
    states,
    partial,
    positions,
    out,
    parts,
    PART: tl.constexpr,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
):
    """Grid: (rows, query heads). The parts of a row's keys, one after the other."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.load(positions + row).to(tl.int32)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(at - WINDOW + 1, 0) // PART
    d = tl.arange(0, D)
    is_dim = d < DIM
    largest = float("-inf")
    total = 0.0
    mixed = tl.zeros((D,), tl.float32)
    to = row * HEADS + tl.program_id(1)
    for part in range(begin, at // PART + 1):
        state = to * parts + part
        high = tl.load(states + state * 2)
        higher = tl.maximum(largest, high)
        shrink = tl.exp(largest - higher)
        grow = tl.exp(high - higher)
        total = total * shrink + tl.load(states + state * 2 + 1) * grow
        add = tl.load(partial + state * DIM + d, mask=is_dim, other=0.0)
        mixed = mixed * shrink + add * grow
        largest = higher
    tl.store(out + to * DIM + d, (mixed / total).to(out.dtype.element_ty), mask=is_dim)


class TritonKernels(PlainKernels):
    """The plain operations, with paged attention in Triton; float16 and bfloat16."""

    name = "Triton attention (paged)"
    page_size = 64

    def __init__(
        self, shape: HeadShape, *, layers: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(shape, layers=layers, dtype=dtype, device=device)
        self._runs = torch.zeros(1, dtype=torch.int32, device=device)

    @staticmethod
    def supports(shape: HeadShape, dtype: torch.dtype) -> bool:
        """Whether there is Triton, and the kernel is made for this shape."""
        # Products of float32 would take minutes to compile for wide heads.
        is_half = dtype in (torch.float16, torch.bfloat16)
        return triton is not None and is_half and shape.head_dim <= 256

    def can_record(self, layer: LayerAttention) -> bool:
        """As the plain form: every layer."""
        return True

    def attend(
        self, layer: LayerAttention, query: torch.Tensor, rows: Rows, batch: PackedBatch
    ) -> torch.Tensor:
        """As the plain form."""
        shape = self.shape
        heads, kv_heads, dim = shape.heads, shape.kv_heads, shape.head_dim
        out = torch.empty(rows.count, heads * dim, dtype=query.dtype, device=query.device)
        if not rows.count:
            return out
        starts, longest = rows.query_starts, rows.max_query
        if starts is None:  # each row by itself
            starts, longest = self._runs_of_one(rows.count), 1
        runs = len(starts) - 1
        group = heads // kv_heads
        width = max(_DOT, triton.next_power_of_2(dim))
        common: dict[str, Any] = {
            "WINDOW": layer.window,
            "CAPS": bool(layer.softcap),
            "KV_HEADS": kv_heads,
            "GROUP": group,
            "DIM": dim,
            "PAGE": self.page_size,
            "N": _KEYS,
            "D": width,
        }
        part = parts = 0
        states = partial = out
        if longest == 1:
            least = max(_DOT, triton.next_power_of_2(group))
            part, parts = parts_of(batch.max_context)
            states = query.new_empty(rows.count * heads * parts * 2, dtype=torch.float32)
            partial = query.new_empty(rows.count * heads * parts * dim, dtype=torch.float32)
            grid, block = (runs, parts, kv_heads), {"ROWS": 1, "M": least}
        else:
            least = max(_PROMPT_ROWS, triton.next_power_of_2(group))
            each = least // group
            grid = (runs, triton.cdiv(longest, each), kv_heads)
            block = {"ROWS": each, "M": least}
        _attend[grid](
            query,
            self.keys[layer.index],
            self.values[layer.index],
            batch.block_tables,
            starts,
            rows.sequence,
            rows.positions,
            out,
            states,
            partial,
            layer.scaling,
            layer.softcap,
            query.stride(0),
            batch.block_tables.stride(0),
            parts,
            PART=part,
            num_warps=4,
            num_stages=2,
            **block,
            **common,
        )
        if parts:
            _merge[rows.count, heads](
                states,
                partial,
                rows.positions,
                out,
                parts,
                PART=part,
                WINDOW=layer.window,
                HEADS=heads,
                DIM=dim,
                D=width,
                num_warps=1,
            )
        return out

    def _runs_of_one(self, count: int) -> torch.Tensor:
        if len(self._runs) <= count:
            self._runs = torch.arange(2 * count, dtype=torch.int32, device=self.device)
        return self._runs[: count + 1]


def parts_of(max_context: int) -> tuple[int, int]:
    """Keys of a part, a power of two, and how many parts the longest context has."""
    part = PART
    while -(-max_context // part) > MAX_PARTS:
        part *= 2
    return part, -(-max_context // part)
