"""The flat batch of one iteration, as tensors on the device.

B sequences, T tokens, S slots per page, M pages in the longest block table

row              0     1     2  3  4  5     6  7  8         decodes first, then chunks
sequence         0     1     2  2  2  2     3  3  3
positions       17     5     0  1  2  3    64 65 66
slots           page id * S + position % S                  where the token's KV goes
block_tables    (B, M) page ids, padded with 0
"""

from __future__ import annotations

from dataclasses import dataclass

import torch  # noqa: TC002 - dataclass fields are inspected at run time


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a batch, for the operations that look back at their sequence's pages.

    Attributes:
        count: how many rows.
        positions: (count,) int64.
        sequence: (count,) int32, the row of `block_tables`.
        query_starts: (B + 1,) int32, first row of each sequence; None where the rows are a
            selection that is not a contiguous run per sequence.
        max_query: the longest run of rows of one sequence.
    """

    count: int
    positions: torch.Tensor
    sequence: torch.Tensor
    query_starts: torch.Tensor | None
    max_query: int


@dataclass(frozen=True, slots=True)
class AdapterRouting:
    """Which adapter slot each row uses.

    Attributes:
        slots: (T,) int64; 0 is the base model.
        single: the slot where all rows share one, else 0.
        is_static: the forward is being recorded to run again for other rows and other adapters, so
            it must go by what `slots` and `AdapterTable.storage` hold when it runs.
    """

    slots: torch.Tensor
    single: int
    is_static: bool = False


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One iteration's tokens. All tensors live on the device.

    Attributes:
        token_ids: (T,) int64.
        slots: (T,) int64.
        rows: all T rows.
        block_tables: (B, M) int32.
        context_lens: (B,) int32, tokens of each sequence once this batch is computed.
        max_context: the largest of them.
        wanted: (N,) int64, the rows whose logits are wanted, in order; None for all of them.
        wanted_rows: those rows for attention in the last layer (`rows` itself for None).
        adapters: which adapter each row uses; None when all use the base model.
        wanted_adapters: the same for the wanted rows.
    """

    token_ids: torch.Tensor
    slots: torch.Tensor
    rows: Rows
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    max_context: int
    wanted: torch.Tensor | None
    wanted_rows: Rows
    adapters: AdapterRouting | None
    wanted_adapters: AdapterRouting | None
