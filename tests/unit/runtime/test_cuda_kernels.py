"""Paged attention on a card equals plain torch, wherever contexts begin, end and are cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cotune.runtime.kernels.choose import choose_kernels, compare, scattered_batch
from cotune.runtime.kernels.paged_triton import TritonKernels
from cotune.runtime.kernels.plain import HeadShape, LayerAttention, PlainKernels
from cotune.streams.graphs import GraphRecorder

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
SHAPES = [
    HeadShape(heads=4, kv_heads=2, head_dim=64),
    HeadShape(heads=6, kv_heads=2, head_dim=24),
    HeadShape(heads=32, kv_heads=8, head_dim=128),
    HeadShape(heads=40, kv_heads=2, head_dim=64),
    HeadShape(heads=4, kv_heads=4, head_dim=256),
]
LAYERS = [
    LayerAttention(index=0, scaling=0.1),
    LayerAttention(index=0, scaling=0.1, window=1),
    LayerAttention(index=0, scaling=0.1, window=70),
    LayerAttention(index=0, scaling=0.1, window=1000),
    LayerAttention(index=0, scaling=0.1, softcap=5.0),
]
TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}


def triton_kernels(shape: HeadShape, dtype: torch.dtype) -> PlainKernels:
    if not TritonKernels.supports(shape, dtype):
        pytest.skip("there is no Triton")
    return TritonKernels(shape, layers=1, dtype=dtype, device=CUDA)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_triton_attention_equals_plain_torch(
    shape: HeadShape, dtype: torch.dtype, layer: LayerAttention
) -> None:
    assert compare(triton_kernels(shape, dtype), layer) < TOLERANCE[dtype]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_rows_may_be_a_selection(layer: LayerAttention) -> None:
    shape = SHAPES[0]
    kernels = triton_kernels(shape, torch.bfloat16)
    lengths = [(0, 5), (7, 33), (130, 1), (1500, 2)]
    batch, pages = scattered_batch(lengths, kernels.page_size, CUDA)
    plain = PlainKernels(shape, layers=1, dtype=torch.bfloat16, device=CUDA)
    plain.page_size = kernels.page_size
    kernels.allocate(pages)
    kernels.keys[0].normal_()
    kernels.values[0].normal_()
    plain.keys, plain.values = kernels.keys, kernels.values
    query = torch.randn(batch.rows.count, shape.heads * shape.head_dim, device=CUDA).bfloat16()
    by_run = kernels.attend(layer, query, batch.rows, batch)
    one_by_one = kernels.attend(layer, query, replace(batch.rows, query_starts=None), batch)
    expected = plain.attend(layer, query, batch.rows, batch)
    for found in (by_run, one_by_one):
        torch.testing.assert_close(found, expected, atol=5e-2, rtol=0.0)


@torch.inference_mode()
def test_what_is_chosen_can_be_recorded_and_goes_by_the_tensors() -> None:
    shape, layer = SHAPES[0], LAYERS[0]
    kernels = choose_kernels(shape, [layer], dtype=torch.bfloat16, device=CUDA)
    assert kernels.can_record(layer)
    batch, pages = scattered_batch([(600, 1), (20, 1)], kernels.page_size, CUDA)
    kernels.allocate(pages)
    kernels.keys[0].normal_()
    kernels.values[0].normal_()
    query = torch.randn(2, shape.heads * shape.head_dim, device=CUDA).bfloat16()
    out = torch.zeros_like(query)

    def work() -> None:
        out.copy_(kernels.attend(layer, query, batch.rows, batch))

    work()
    replay = GraphRecorder(CUDA).record(work)
    batch.rows.positions.copy_(torch.tensor([30, 5]))
    batch.context_lens.copy_(torch.tensor([31, 6]))
    replay()
    expected = kernels.attend(layer, query, batch.rows, batch)
    torch.testing.assert_close(out, expected, atol=0.0, rtol=0.0)
