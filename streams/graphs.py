"""Recording device work once and queuing it again as a whole: CUDA graphs.

    first time      work()                    every kernel launched from Python, some 10 us each
    recorded        again = recorder.record(work)
    afterwards      fill the tensors that work reads; again()       one launch for all of them

What replays is launched by the driver, so another thread's Python cannot come between two of its
kernels: with a training thread alive, that is what keeps the time between tokens steady.

A recording holds addresses, not tensors. Whatever `work` reads and writes must stay where it is for
as long as the recording is used, and it may not ask the device for anything (`.item()`,
`.tolist()`, a copy to the host). All recordings of one `GraphRecorder` share one memory pool:
what they compute on the way may be overwritten by the next replay, so results are copied out to a
tensor from outside within `work`.
"""

from __future__ import annotations

from bisect import bisect_left
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Replay: TypeAlias = "Callable[[], None]"

BATCH_SIZES: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""The batch sizes that decodes are recorded for; a batch is filled up to the next of them."""


def sizes_up_to(most: int, sizes: Sequence[int] = BATCH_SIZES) -> tuple[int, ...]:
    """The `sizes` that batches of 1 to `most` rows need: the last may be a little larger."""
    return tuple(sizes[: bisect_left(sizes, most) + 1])


def size_for(count: int, sizes: Sequence[int]) -> int | None:
    """The smallest of the ascending `sizes` that holds `count` rows; None where none does."""
    index = bisect_left(sizes, count)
    return sizes[index] if index < len(sizes) else None


class Recorder(Protocol):
    """Turns work for the device into something that can be queued again."""

    name: str
    """For reports."""

    def record(self, work: Callable[[], None]) -> Replay:
        """Record what `work` queues, without running it on the device.

        `work` ran before in the same way, on the same thread: kernels are loaded and workspaces
        allocated by then.

        Raises:
            RuntimeError: it does something that cannot be recorded.
            torch.OutOfMemoryError: (a RuntimeError) its intermediate results find no room.
        """


class GraphRecorder:
    """Records CUDA graphs on the calling thread's stream.

    The capture's errors are those of this thread alone ("thread_local"): the training thread goes
    on allocating memory meanwhile. While a capture is under way the caching allocator returns
    nothing to the device for any thread, so a quantum that runs out of memory just then is
    halved, as ever.

    `torch.cuda.graph` is not used: it synchronises the device and gives back the allocator's
    memory, which the training thread would have to allocate anew.

    The allocator lets nobody record into a pool again once its last recording is gone. So the pool
    is kept by a recording of next to nothing: one that found no memory, or was dropped, may have
    been the only other.
    """

    name = "CUDA graphs"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda: Any = torch.cuda  # its graphs and streams have no types
        self._pool: Any = None
        self._keeper: Any = None  # the recording that keeps the pool
        self._beside: Any = None  # the stream for recording what runs on the default one

    def record(self, work: Callable[[], None]) -> Replay:
        """See `Recorder.record`."""
        current = self._cuda.current_stream(self._device)
        stream = current
        if current == self._cuda.default_stream(self._device):  # it cannot be captured
            # One for all recordings: cuBLAS keeps a workspace for each stream it has seen.
            if self._beside is None:
                self._beside = self._cuda.Stream(self._device)
            stream = self._beside
        stream.wait_stream(current)
        with self._cuda.stream(stream):
            if self._keeper is None:
                self._pool = self._cuda.graph_pool_handle()
                self._keeper = self._capture(lambda: torch.zeros(1, device=self._device))
            graph = self._capture(work)
        current.wait_stream(stream)
        replay: Replay = graph.replay
        return replay

    def _capture(self, work: Callable[[], object]) -> Any:
        """A graph of what `work` queues on the current stream."""
        graph = self._cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            work()
        except BaseException as cause:
            try:
                self._end(graph)
            except RuntimeError as ended:  # the capture was invalidated by what went wrong
                cause.add_note(f"the capture ended with: {ended}")
            raise
        self._end(graph)
        return graph

    def _end(self, graph: Any) -> None:
        try:
            graph.capture_end()
        except BaseException:
            # The allocator was not told: it would take the capture for one that is under way, and
            # give no memory back to the device for the rest of the process.
            pool, self._pool, self._keeper = self._pool, None, None
            index = self._device.index or 0
            with suppress(RuntimeError):  # it was told, and what failed came later
                self._cuda.memory._cuda_endAllocateToPool(index, pool)
                self._cuda.memory._cuda_releasePool(index, pool)
            raise


class CallAgain:
    """Replays by calling the work itself: what a recording must equal, on any device."""

    name = "called again"

    def record(self, work: Callable[[], None]) -> Replay:
        """See `Recorder.record`."""
        return work
