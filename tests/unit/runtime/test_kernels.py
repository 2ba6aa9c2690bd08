"""The compiled kernels against their plain torch forms, and those against transformers' modules."""

from __future__ import annotations

import pytest
import torch

from cotune.runtime.kernels.batch import PackedBatch, Rows
from cotune.runtime.kernels.cpu import CpuKernels
from cotune.runtime.kernels.plain import (
    HeadNorms,
    HeadShape,
    LayerAttention,
    PlainKernels,
    RotaryTable,
)

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
SHAPE = HeadShape(heads=6, kv_heads=2, head_dim=64)


def make_batch(lengths: list[tuple[int, int]], page_size: int, seed: int = 0) -> PackedBatch:
    """A batch of (tokens already there, new tokens) per sequence on randomly scattered pages."""
    generator = torch.Generator().manual_seed(seed)
    pages = [-(-(start + new) // page_size) for start, new in lengths]
    ids = torch.randperm(sum(pages), generator=generator)
    table = torch.zeros(len(lengths), max(pages) + 1, dtype=torch.int32)
    positions, sequence, slots, starts, at = [], [], [], [0], 0
    for row, ((start, new), count) in enumerate(zip(lengths, pages, strict=True)):
        table[row, :count] = ids[at : at + count]
        at += count
        for position in range(start, start + new):
            positions.append(position)
            sequence.append(row)
            page = int(table[row, position // page_size])
            slots.append(page * page_size + position % page_size)
        starts.append(len(positions))
    rows = Rows(
        len(positions),
        torch.tensor(positions),
        torch.tensor(sequence, dtype=torch.int32),
        torch.tensor(starts, dtype=torch.int32),
        max(new for _, new in lengths),
    )
    contexts = [start + new for start, new in lengths]
    return PackedBatch(
        token_ids=torch.zeros(len(positions), dtype=torch.int64),
        slots=torch.tensor(slots),
        rows=rows,
        block_tables=table,
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        max_context=max(contexts),
        wanted=None,
        wanted_rows=rows,
        adapters=None,
        wanted_adapters=None,
    )


def rotary(positions: int, dim: int) -> RotaryTable:
    inverse = 1.0 / 10000.0 ** (torch.arange(0, dim, 2) / dim)
    angles = torch.arange(positions)[:, None] * inverse
    return RotaryTable(angles.cos(), angles.sin())


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    value: torch.dtype = request.param
    return value


def pair(dtype: torch.dtype, num_pages: int = 64) -> tuple[PlainKernels, CpuKernels]:
    cpu = torch.device("cpu")
    plain = PlainKernels(SHAPE, layers=2, dtype=dtype, device=cpu)
    compiled = CpuKernels(SHAPE, layers=2, dtype=dtype, device=cpu)
    plain.allocate(num_pages)
    compiled.allocate(num_pages)
    return plain, compiled


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("width", [64, 256, 20])
@pytest.mark.parametrize("rows", [1, 33])
def test_norms_equal_the_plain_form(dtype: torch.dtype, width: int, rows: int) -> None:
    plain, compiled = pair(dtype)
    torch.manual_seed(0)
    x, residual = torch.randn(2, rows, width).to(dtype)
    weight = torch.rand(width) + 0.5
    close(compiled.rms_norm(x, weight, 1e-6), plain.rms_norm(x, weight, 1e-6), dtype)
    a, b = residual.clone(), residual.clone()
    close(
        compiled.add_rms_norm(x, a, weight, 1e-6, 0.5),
        plain.add_rms_norm(x, b, weight, 1e-6, 0.5),
        dtype,
    )
    close(a, b, dtype)
    compiled.rms_norm_add(x, a, weight, 1e-6)
    plain.rms_norm_add(x, b, weight, 1e-6)
    close(a, b, dtype)


def test_a_norm_reads_strided_rows(dtype: torch.dtype) -> None:
    plain, compiled = pair(dtype)
    x = torch.randn(5, 256).to(dtype)[:, 64:192]
    weight = torch.rand(128)
    close(compiled.rms_norm(x, weight, 1e-6), plain.rms_norm(x, weight, 1e-6), dtype)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gated_activation_equals_the_plain_form(dtype: torch.dtype, kind: str) -> None:
    plain, compiled = pair(dtype)
    x = (torch.randn(7, 2 * 96) * 6).to(dtype)
    close(compiled.gated_activation(x, kind), plain.gated_activation(x, kind), dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    ("softcap", "window"), [(0.0, 0), (20.0, 0), (0.0, 1), (0.0, 16), (5.0, 23), (0.0, 40)]
)
def test_rotary_store_and_attention_equal_the_plain_form(
    dtype: torch.dtype, norms: bool, softcap: float, window: int
) -> None:
    plain, compiled = pair(dtype)
    table = rotary(256, SHAPE.head_dim)
    head_norms = (
        HeadNorms(torch.rand(SHAPE.head_dim) + 0.5, torch.rand(SHAPE.head_dim) + 0.5, 1e-6)
        if norms
        else None
    )
    layer = LayerAttention(index=1, scaling=0.11, softcap=softcap, window=window)
    torch.manual_seed(1)
    # First the whole prompts (of lengths around page boundaries), then a mixed step on top.
    prompts = [(0, 16), (0, 1), (0, 47), (0, 64), (0, 33)]
    steps = [(16, 1), (1, 1), (47, 1), (64, 13), (33, 16)]
    full = [(0, start + new) for start, new in steps]
    layout = make_batch(full, 16)
    for lengths in (prompts, steps):
        batch = make_batch(lengths, 16)
        batch = place(batch, lengths, layout)
        qkv = torch.randn(batch.rows.count, SHAPE.qkv_width).to(dtype)
        outputs = []
        for kernels in (plain, compiled):
            mine = qkv.clone()
            kernels.rope_and_store(layer, mine, batch, table, head_norms)
            query = mine[:, : SHAPE.heads * SHAPE.head_dim]
            outputs.append((mine, kernels.attend(layer, query, batch.rows, batch)))
        close(outputs[1][0], outputs[0][0], dtype)
        close(outputs[1][1], outputs[0][1], dtype)


def place(batch: PackedBatch, lengths: list[tuple[int, int]], layout: PackedBatch) -> PackedBatch:
    """The same rows, on the pages that `layout` gives the sequences."""
    slots = []
    for row, (start, new) in enumerate(lengths):
        for position in range(start, start + new):
            page = int(layout.block_tables[row, position // 16])
            slots.append(page * 16 + position % 16)
    return PackedBatch(
        token_ids=batch.token_ids,
        slots=torch.tensor(slots),
        rows=batch.rows,
        block_tables=layout.block_tables,
        context_lens=batch.context_lens,
        max_context=batch.max_context,
        wanted=None,
        wanted_rows=batch.rows,
        adapters=None,
        wanted_adapters=None,
    )


def test_what_lies_past_the_context_is_never_read(dtype: torch.dtype) -> None:
    _, compiled = pair(dtype)
    batch = make_batch([(0, 5), (0, 20)], 16)
    qkv = torch.randn(batch.rows.count, SHAPE.qkv_width).to(dtype)
    table = rotary(64, SHAPE.head_dim)
    layer = LayerAttention(index=0, scaling=0.125)
    outputs = []
    for filling in (0.0, float("nan")):
        for pages in (*compiled.keys, *compiled.values):
            pages.fill_(filling)
        mine = qkv.clone()
        compiled.rope_and_store(layer, mine, batch, table, None)
        query = mine[:, : SHAPE.heads * SHAPE.head_dim]
        outputs.append(compiled.attend(layer, query, batch.rows, batch))
    assert torch.equal(outputs[0], outputs[1])


def test_store_puts_keys_and_values_where_attention_looks_for_them(dtype: torch.dtype) -> None:
    plain, compiled = pair(dtype)
    batch = make_batch([(0, 18), (0, 3)], 16)
    layer = LayerAttention(index=0, scaling=0.125)
    kv = torch.randn(2, batch.rows.count, SHAPE.kv_heads, SHAPE.head_dim).to(dtype)
    query = torch.randn(batch.rows.count, SHAPE.heads * SHAPE.head_dim).to(dtype)
    outputs = []
    for kernels in (plain, compiled):
        kernels.store(layer, kv[0], kv[1], batch)
        outputs.append(kernels.attend(layer, query, batch.rows, batch))
    close(outputs[1], outputs[0], dtype)


def test_two_threads_give_what_one_gives(dtype: torch.dtype) -> None:
    _, compiled = pair(dtype)
    batch = make_batch([(0, 300), (0, 40)], 16)
    qkv = torch.randn(batch.rows.count, SHAPE.qkv_width).to(dtype)
    table = rotary(512, SHAPE.head_dim)
    layer = LayerAttention(index=0, scaling=0.125)
    before = torch.get_num_threads()
    outputs = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            mine = qkv.clone()
            compiled.rope_and_store(layer, mine, batch, table, None)
            query = mine[:, : SHAPE.heads * SHAPE.head_dim]
            outputs.append(compiled.attend(layer, query, batch.rows, batch))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outputs[0], outputs[1])
