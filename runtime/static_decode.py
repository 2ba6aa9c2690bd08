"""Decoding from static slots: a batch is copied into tensors that stay where they are.

A step in which every sequence computes one token has the same shape for the same number of
sequences. Its inputs are written into slots that never move, filled up to the next batch size, and
the forward over that size is recorded once and replayed from then on (`streams/graphs.py`).

    5 sequences, size 8       row  0   1   2   3   4   5   6   7
    token_ids, positions           s0  s1  s2  s3  s4  0   0   0
    slots (where KV goes)          own pages ........  the scratch page, a page that no
    block_tables, context_lens     own ..............  sequence owns; one token of context
    adapter_slots                  own ..............  0
    logits                         wanted ...........  dropped

A row beyond the batch computes token 0 at position 0, writes its KV to the scratch page and reads
it back from there: finite numbers, and nobody's pages.

Rows that use adapters go through recordings of their own, which read each layer's stacked matrices
by address. Installing another adapter writes them in place; where they had to move
(`AdapterTable.generation`), the recordings made before are dropped and made again when next needed.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from ..streams.graphs import size_for
from .kernels.batch import AdapterRouting, PackedBatch, Rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from ..streams.graphs import Recorder, Replay
    from .step import SequenceStep

log = logging.getLogger(__name__)

RECORD_EVERY = 8
"""Batches between two recordings made while serving: one takes about as long as an iteration."""


class StaticForward(Protocol):
    """What is recorded: `LeanDecoder`."""

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        """The logits (N, V) of all rows; writes their KV."""

    @property
    def adapter_generation(self) -> int:
        """Changes whenever stacked adapter matrices have moved."""


@dataclass(frozen=True, slots=True)
class StaticDecodeStatistics:
    """What was recorded and replayed so far.

    Attributes:
        sizes: batch sizes that can be recorded.
        recorded: recordings made, those that were dropped since included.
        ready: recordings at hand.
        failed: recordings that could not be made, or gave something else; those sizes run eagerly.
        record_s: seconds spent on recording.
        replays: batches replayed.
        eager: batches from static slots that were launched kernel by kernel.
        rows: rows of all those batches, padding included.
        padding: rows that belonged to nobody.
    """

    sizes: tuple[int, ...]
    recorded: int
    ready: int
    failed: int
    record_s: float
    replays: int
    eager: int
    rows: int
    padding: int


@dataclass(frozen=True, slots=True)
class _Key:
    size: int
    has_adapters: bool


@dataclass(frozen=True, slots=True)
class _Recording:
    """None as `replay`: it failed, and is not tried again for this generation."""

    generation: int
    replay: Replay | None


class StaticDecode:
    """Owns the static slots and the recordings. One thread uses it: the inference lane's.

    Args:
        forward: the packed forward.
        recorder: makes recordings.
        sizes: batch sizes, ascending.
        vocab_size, dtype: of the logits.
        page_size: tokens per page.
        longest_table: pages of the longest sequence there can be.
        scratch_page: a page that no sequence owns.
        tolerance: largest root mean square difference of a replay from the eager forward, as a
            share of the logits' spread.
        device: where the forward runs.
    """

    def __init__(
        self,
        forward: StaticForward,
        recorder: Recorder,
        *,
        sizes: Sequence[int],
        vocab_size: int,
        dtype: torch.dtype,
        page_size: int,
        longest_table: int,
        scratch_page: int,
        tolerance: float,
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._recorder = recorder
        self._sizes = tuple(sizes)
        self._page_size = page_size
        self._longest_table = longest_table
        self._scratch_page = scratch_page
        self._tolerance = tolerance
        most = self._sizes[-1]
        is_pinned = device.type == "cuda"
        # On the host: what the next batch is. A job of the lane ends when the device has finished,
        # so no copy of the last batch can still be reading it.
        self._host_longs = torch.zeros(4, most, dtype=torch.int64, pin_memory=is_pinned)
        self._host_contexts = torch.ones(most, dtype=torch.int32, pin_memory=is_pinned)
        self._host_tables = torch.zeros(
            most * longest_table, dtype=torch.int32, pin_memory=is_pinned
        )
        self._longs: npt.NDArray[np.int64] = self._host_longs.numpy()
        self._contexts: npt.NDArray[np.int32] = self._host_contexts.numpy()
        self._tables: npt.NDArray[np.int32] = self._host_tables.numpy()
        # On the device: the static slots. token ids, positions, KV slots, adapter slots.
        self._inputs = torch.zeros(4, most, dtype=torch.int64, device=device)
        self._context_lens = torch.ones(most, dtype=torch.int32, device=device)
        self._block_tables = torch.full(
            (most, longest_table), scratch_page, dtype=torch.int32, device=device
        )
        self._sequence = torch.arange(most, dtype=torch.int32, device=device)
        self._query_starts = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._logits = torch.zeros(most, vocab_size, dtype=dtype, device=device)
        self._inputs[2] = scratch_page * page_size
        self._recordings: dict[_Key, _Recording] = {}
        self._since_recording = RECORD_EVERY
        self._recorded = self._failed = self._replays = self._eager = 0
        self._rows = self._padding = 0
        self._record_s = 0.0

    # -- use -------------------------------------------------------------------------------------

    def takes(self, steps: Sequence[SequenceStep]) -> bool:
        """Whether a batch can go through static slots: one token and one sample of each sequence,
        no log-probabilities of the prompt, and no more sequences than the largest size."""
        return len(steps) <= self._sizes[-1] and all(
            len(step.token_ids) == 1 and step.sampling is not None and step.prompt_logprobs is None
            for step in steps
        )

    @torch.inference_mode()
    def __call__(self, steps: Sequence[SequenceStep]) -> torch.Tensor:
        """The logits (B, V) of a batch that it `takes`; they hold until the next call."""
        count = len(steps)
        key = self._fill(steps)
        self._rows += key.size
        self._padding += key.size - count
        self._since_recording += 1
        recording = self._recordings.get(key)
        if recording is None or recording.generation != self._generation(key):
            return self._run_and_record(key, count)
        if recording.replay is None:
            self._run(key)
        else:
            recording.replay()
            self._replays += 1
        return self._logits[:count]

    def _run_and_record(self, key: _Key, count: int) -> torch.Tensor:
        """Eagerly, and then recorded, if it is not too soon after another recording."""
        self._run(key)
        if self._since_recording < RECORD_EVERY:
            return self._logits[:count]
        eager = self._logits[: key.size].clone()
        self._record(key, eager)
        return eager[:count]

    @torch.inference_mode()
    def record_all(self, steps: Sequence[SequenceStep], expected: torch.Tensor) -> str:
        """Record every size without adapters, the largest first, before anything is served.

        Args:
            steps: decodes on free pages; as many as fit go into each size.
            expected: their logits (B, V) by the ordinary packed forward.

        Returns: "" if they give what the packed forward gives; else what does not, or why nothing
            can be recorded. Sizes that memory was short for run eagerly.
        """
        for size in reversed(self._sizes):
            some = steps[:size]
            key = self._fill(some, size)
            self._run(key)
            difference = relative_difference(self._logits[: len(some)], expected[: len(some)])
            if not difference <= self._tolerance:
                return f"static slots differ from the packed forward by {difference:.2g}"
            eager = self._logits[:size].clone()
            reason = self._record(key, eager)
            if reason:
                return reason
        return ""

    def statistics(self) -> StaticDecodeStatistics:
        """A snapshot; may be taken on any thread."""
        recordings = list(self._recordings.values())
        return StaticDecodeStatistics(
            sizes=self._sizes,
            recorded=self._recorded,
            ready=sum(recording.replay is not None for recording in recordings),
            failed=self._failed,
            record_s=self._record_s,
            replays=self._replays,
            eager=self._eager,
            rows=self._rows,
            padding=self._padding,
        )

    # -- inside ----------------------------------------------------------------------------------

    def _fill(self, steps: Sequence[SequenceStep], size: int | None = None) -> _Key:
        """Write a batch into the static slots, and nothing into the rows beyond it."""
        count = len(steps)
        size = size_for(count, self._sizes) if size is None else size
        assert size is not None, "takes() refuses larger batches"
        page_size = self._page_size
        width = max(len(step.block_table) for step in steps)
        tables = self._tables[: size * width].reshape(size, width)
        tables[count:] = self._scratch_page
        longs, contexts = self._longs, self._contexts
        for row, step in enumerate(steps):
            table = step.block_table
            tables[row, : len(table)] = table
            tables[row, len(table) :] = self._scratch_page
            longs[0, row] = step.token_ids[0]
            longs[1, row] = step.start
            longs[2, row] = table[step.start // page_size] * page_size + step.start % page_size
            longs[3, row] = step.adapter_slot
        longs[:, count:size] = 0
        longs[2, count:size] = self._scratch_page * page_size
        contexts[:count] = longs[1, :count] + 1
        contexts[count:size] = 1
        self._inputs.copy_(self._host_longs, non_blocking=True)
        self._context_lens.copy_(self._host_contexts, non_blocking=True)
        # A contiguous copy to the device, and there one into the wider rows of the static tables.
        # What stands further right is of earlier batches: pages that exist, beyond all contexts.
        packed = self._host_tables[: size * width].view(size, width)
        self._block_tables[:size, :width].copy_(
            packed.to(self._block_tables.device, non_blocking=True)
        )
        return _Key(size, bool(longs[3, :count].any()))

    def _batch(self, key: _Key) -> PackedBatch:
        """The static slots of one size, as the forward reads them."""
        size = key.size
        token_ids, positions, slots, adapter_slots = self._inputs[:, :size]
        rows = Rows(
            count=size,
            positions=positions,
            sequence=self._sequence[:size],
            query_starts=self._query_starts[: size + 1],
            max_query=1,
        )
        routing = AdapterRouting(adapter_slots, 0, is_static=True) if key.has_adapters else None
        return PackedBatch(
            token_ids=token_ids,
            slots=slots,
            rows=rows,
            block_tables=self._block_tables[:size],
            context_lens=self._context_lens[:size],
            max_context=self._longest_table * self._page_size,
            wanted=None,
            wanted_rows=rows,
            adapters=routing,
            wanted_adapters=routing,
        )

    def _compute(self, key: _Key) -> None:
        """What is recorded: from static slots to static logits."""
        self._logits[: key.size].copy_(self._forward(self._batch(key)))

    def _run(self, key: _Key) -> None:
        self._compute(key)
        self._eager += 1

    def _generation(self, key: _Key) -> int:
        return self._forward.adapter_generation if key.has_adapters else 0

    def _record(self, key: _Key, eager: torch.Tensor) -> str:
        """Record one size, whose slots are filled and which has just run, and hold the replay
        against what that run gave. The replay writes the same KV once more.

        Returns: why nothing here can be recorded; "" if it was, or if memory alone was short.
        """
        began_s = time.perf_counter()
        self._since_recording = 0
        generation = self._generation(key)
        self._recordings.pop(key, None)  # its memory is free for the new one
        reason = ""
        is_fatal = True
        replay: Replay | None = None
        try:
            replay = self._recorder.record(lambda: self._compute(key))
            self._logits[: key.size].zero_()
            replay()
            difference = relative_difference(self._logits[: key.size], eager)
            if not difference <= self._tolerance:
                reason = f"a replay for {key.size} rows differs from the eager forward by "
                reason += f"{difference:.2g}"
        except torch.OutOfMemoryError as error:
            reason, is_fatal = f"no memory to record a forward over {key.size} rows: {error}", False
        except RuntimeError as error:
            reason = f"a forward over {key.size} rows cannot be recorded: {error}"
        if reason:
            replay = None
            self._failed += 1
            log.warning("decodes of up to %d sequences run without recording: %s", key.size, reason)
        else:
            self._recorded += 1
        self._recordings[key] = _Recording(generation, replay)
        self._record_s += time.perf_counter() - began_s
        return reason if is_fatal else ""


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The root mean square difference of logits, as a share of their spread.

    Where both are not finite they agree: a broken adapter is not the recording's fault.
    """
    one, other = (x.float().nan_to_num(posinf=0.0, neginf=0.0) for x in (actual, expected))
    difference = (one - other).square().mean().sqrt()
    return float(difference / (other.std(unbiased=False) + 1e-6))
