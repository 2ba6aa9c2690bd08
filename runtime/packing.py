"""From the engine's sequences to the flat batch that the forward computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from .kernels.batch import AdapterRouting, PackedBatch, Rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .step import SequenceStep


def pack_steps(
    steps: Sequence[SequenceStep], *, page_size: int, device: torch.device
) -> PackedBatch:
    """Lay the steps of an iteration side by side, in the order given, without padding.

    The wanted rows are, step by step: every row of one with prompt log-probabilities, the last row
    of one that samples, none otherwise.
    """
    lengths = [len(step.token_ids) for step in steps]
    total = sum(lengths)
    count = len(steps)
    longest = max(len(step.block_table) for step in steps)
    tables = np.zeros((count, longest), np.int32)
    starts = np.zeros(count + 1, np.int32)
    np.cumsum(lengths, out=starts[1:])
    firsts = np.fromiter((step.start for step in steps), np.int64, count)
    for row, step in enumerate(steps):
        tables[row, : len(step.block_table)] = step.block_table
    if total == count:  # decodes alone
        token_ids = np.fromiter((step.token_ids[0] for step in steps), np.int64, count)
        sequence = np.arange(count, dtype=np.int32)
        positions = firsts
    else:
        token_ids = np.fromiter((t for step in steps for t in step.token_ids), np.int64, total)
        sequence = np.repeat(np.arange(count, dtype=np.int32), lengths)
        positions = np.arange(total, dtype=np.int64) + (firsts - starts[:-1])[sequence]
    slots = tables[sequence, positions // page_size].astype(np.int64) * page_size
    slots += positions % page_size
    contexts = (firsts + lengths).astype(np.int32)

    wanted: list[int] = []
    for row, step in enumerate(steps):
        end = int(starts[row + 1])
        if step.prompt_logprobs is not None:
            wanted.extend(range(int(starts[row]), end))
        elif step.sampling is not None:
            wanted.append(end - 1)

    def put(array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(device, non_blocking=True)

    rows = Rows(
        count=total,
        positions=put(positions),
        sequence=put(sequence),
        query_starts=put(starts),
        max_query=max(lengths),
    )
    slots_of_rows = np.fromiter((step.adapter_slot for step in steps), np.int64, count)[sequence]
    routing = _route(slots_of_rows, put)
    wanted_tensor, wanted_rows, wanted_routing = None, rows, routing
    if len(wanted) < total:
        chosen = np.asarray(wanted, np.int64)
        wanted_tensor = put(chosen)
        per_sequence = [step.sampling is not None for step in steps]
        whole = all(step.prompt_logprobs is None for step in steps)
        picked = sequence[chosen]
        query_starts = None
        if whole:
            # At most one row per sequence: still a run (of 0 or 1) for each.
            ends = np.zeros(count + 1, np.int32)
            np.cumsum(per_sequence, out=ends[1:])
            query_starts = put(ends)
        wanted_rows = Rows(
            count=len(wanted),
            positions=put(positions[chosen]),
            sequence=put(picked),
            query_starts=query_starts,
            max_query=1,
        )
        wanted_routing = _route(slots_of_rows[chosen], put)
    return PackedBatch(
        token_ids=put(token_ids),
        slots=put(slots),
        rows=rows,
        block_tables=put(tables),
        context_lens=put(contexts),
        max_context=int(contexts.max()),
        wanted=wanted_tensor,
        wanted_rows=wanted_rows,
        adapters=routing,
        wanted_adapters=wanted_routing,
    )


def _route(slots: np.ndarray, put: Callable[[np.ndarray], torch.Tensor]) -> AdapterRouting | None:
    """How rows find their adapters; None where all use the base model."""
    if slots.size == 0 or not slots.any():
        return None
    return AdapterRouting(put(slots), int(slots[0]) if (slots == slots[0]).all() else 0)
