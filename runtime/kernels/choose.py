"""Which kernels this device gets, and the proof that they are right here."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from .batch import PackedBatch, Rows
from .plain import HeadShape, LayerAttention, PlainKernels, RotaryTable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

logger = logging.getLogger(__name__)

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def choose_kernels(
    shape: HeadShape, layers: Sequence[LayerAttention], *, dtype: torch.dtype, device: torch.device
) -> PlainKernels:
    """The fastest kernels that give what the plain form gives, on this device, for this model.

    Args:
        layers: how each layer attends; the check covers every kind that occurs.
    """
    kinds = {(layer.scaling, layer.softcap, layer.window): layer for layer in layers}
    for kernels in _fast(shape, layers, dtype, device):
        candidate = kernels(shape, layers=len(layers), dtype=dtype, device=device)
        try:
            difference = max(compare(candidate, layer) for layer in kinds.values())
        except Exception as error:  # noqa: BLE001 - compilers raise anything; the plain form runs
            reason = f"{type(error).__name__}: {error}"
            logger.warning("%s does not run on this device: %s", candidate.name, reason)
            continue
        if difference < _TOLERANCE[dtype]:
            candidate.allocate(0)
            return candidate
        logger.warning(
            "%s differs from plain torch by %.2g on this device and is not used",
            candidate.name,
            difference,
        )
    return PlainKernels(shape, layers=len(layers), dtype=dtype, device=device)


def _fast(
    shape: HeadShape, layers: Sequence[LayerAttention], dtype: torch.dtype, device: torch.device
) -> Iterator[type[PlainKernels]]:
    """What could be used here, the best first."""
    if device.type == "cpu":
        try:
            from .cpu import CpuKernels
        except (ImportError, RuntimeError) as error:
            logger.warning("the fast kernels do not run on this device: %s", error)
        else:
            if CpuKernels.supports(shape, dtype):
                yield CpuKernels
    elif device.type == "cuda":
        from .cuda import CudaKernels
        from .paged_triton import TritonKernels

        # A layer that caps its scores would run the plain form there, which cannot be recorded.
        if CudaKernels.supports(shape, dtype) and not any(layer.softcap for layer in layers):
            yield CudaKernels
        if TritonKernels.supports(shape, dtype):
            yield TritonKernels


def compare(candidate: PlainKernels, layer: LayerAttention) -> float:
    """The largest difference to the plain form: a prefill, a mixed step, and decodes alone.

    The mixed step has decodes and a chunk, contexts at and around page boundaries, and pages in no
    order; on a card, where long contexts may be cut, a long one as well.
    """
    shape, dtype, device = candidate.shape, candidate.dtype, candidate.device
    plain = PlainKernels(shape, layers=candidate.layers, dtype=dtype, device=device)
    plain.page_size = candidate.page_size
    size = candidate.page_size
    steps = [(size - 1, 1), (size, 1), (2 * size + 3, 1), (size + 5, size + 7)]
    if device.type == "cuda":
        steps.append((1200, 1))
    decodes = [(start + new - 1, 1) for start, new in steps]
    tables, pages = _scatter(steps, size)
    for kernels in (candidate, plain):
        kernels.allocate(pages)
    generator = torch.Generator().manual_seed(1)
    half = shape.head_dim // 2
    angles = torch.rand(max(sum(step) for step in steps), half, generator=generator)
    rotary = RotaryTable(angles.cos().to(device), angles.sin().to(device))
    difference = 0.0
    for lengths in ([(0, start) for start, _ in steps], steps, decodes):
        batch = _batch(lengths, tables, size, device)
        qkv = torch.randn(batch.rows.count, shape.qkv_width, generator=generator)
        results = []
        for kernels in (candidate, plain):
            mine = qkv.to(device, dtype, copy=True)
            kernels.rope_and_store(layer, mine, batch, rotary, None)
            query = mine[:, : shape.heads * shape.head_dim]
            results.append(kernels.attend(layer, query, batch.rows, batch).float())
        worst = (results[0] - results[1]).abs().amax()
        difference = max(difference, float("inf") if worst.isnan() else float(worst))
    return difference


def scattered_batch(
    lengths: list[tuple[int, int]], page_size: int, device: torch.device
) -> tuple[PackedBatch, int]:
    """A batch of (tokens already there, new tokens) per sequence, and how many pages it lies on."""
    tables, pages = _scatter(lengths, page_size)
    return _batch(lengths, tables, page_size, device), pages


def _scatter(lengths: list[tuple[int, int]], size: int) -> tuple[list[list[int]], int]:
    """A block table for each sequence, on pages in no order; and their number."""
    counts = [-(-(start + new) // size) for start, new in lengths]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).tolist()
    return [[order.pop() for _ in range(count)] for count in counts], sum(counts)


def _batch(
    lengths: list[tuple[int, int]], tables: list[list[int]], size: int, device: torch.device
) -> PackedBatch:
    """A batch of (tokens already there, new tokens) per sequence on the given pages."""
    positions, sequence, slots, starts = [], [], [], [0]
    for row, (start, new) in enumerate(lengths):
        for position in range(start, start + new):
            positions.append(position)
            sequence.append(row)
            slots.append(tables[row][position // size] * size + position % size)
        starts.append(len(positions))
    longest = max(len(table) for table in tables)
    blocks = torch.tensor([table + [0] * (longest - len(table)) for table in tables])
    contexts = [start + new for start, new in lengths]
    rows = Rows(
        count=len(positions),
        positions=torch.tensor(positions, device=device),
        sequence=torch.tensor(sequence, device=device, dtype=torch.int32),
        query_starts=torch.tensor(starts, device=device, dtype=torch.int32),
        max_query=max(new for _, new in lengths),
    )
    return PackedBatch(
        token_ids=torch.zeros(len(positions), dtype=torch.int64, device=device),
        slots=torch.tensor(slots, device=device),
        rows=rows,
        block_tables=blocks.to(device, torch.int32),
        context_lens=torch.tensor(contexts, device=device, dtype=torch.int32),
        max_context=max(contexts),
        wanted=None,
        wanted_rows=rows,
        adapters=None,
        wanted_adapters=None,
    )
