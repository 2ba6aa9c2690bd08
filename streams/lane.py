"""A lane: one worker thread bound to one device stream, awaited from any event loop.

    event loop thread                     lane thread
    ─────────────────                     ───────────────────────────────────────────
    await lane.run(fn, x) ── queue ──►    fn(x), its kernels queued on the lane's stream
         (loop goes on)                   record an event, wait until the device reached it
    ◄───── one call_soon_threadsafe ──    outcome
    value returned or error raised

What crosses, and when it is safe:

- `await lane.run(...)` goes on only after the device has finished, also when `fn` raised. Two lanes
  therefore need no events between them: what one has returned, the other may read.
- The lane holds a job's arguments and its outcome until that moment, so that the caching allocator
  cannot hand their memory to another stream while kernels still use it. A tensor that `fn` reads by
  another path (a closure, an attribute) must be held by its owner for as long.
- Nothing needs `Tensor.record_stream` for the same reason: no block that a job has used can be
  handed out again before the device is done with it.
- The wait is an event made with ``blocking=True``: the lane's thread sleeps in the driver with the
  GIL released. The other choice, spinning, wakes some microseconds sooner and burns a core that the
  event loop, the tokenizer and the other lane need.
- On the CPU there is no stream: `fn` has finished when it returns.

A lane belongs to no event loop: jobs may come from several loops and threads at once, and each is
answered on the loop it came from. Jobs run one at a time, in the order they were handed in.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar, TypeVarTuple, cast

import torch

from .partition import Partition, open_partition

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

log = logging.getLogger(__name__)

MAX_PENDING = 1024
"""Default bound on jobs that a lane has taken and not finished."""


class LaneClosedError(RuntimeError):
    """The lane was closed, or not started yet, when a job was handed in. The job did not run."""


class LaneFullError(RuntimeError):
    """The lane holds as many unfinished jobs as it may. The job did not run."""


@dataclass(frozen=True, slots=True)
class LaneStatistics:
    """What a lane has done so far.

    Attributes:
        jobs: jobs finished, failed ones included.
        busy_s: seconds from taking up a job until the device had finished it, summed.
        pending: jobs handed in and not finished yet, the running one included.
    """

    jobs: int
    busy_s: float
    pending: int


class DeviceStream(Protocol):
    """What a lane needs of a device: a place to queue work and a way to wait for it."""

    def current(self) -> AbstractContextManager[Any]:
        """Within this context, work of the calling thread is queued here."""

    def wait(self) -> None:
        """Block, without the GIL, until the device has finished what was queued here so far."""


class _CpuStream:
    """Work on the CPU is finished when the call returns."""

    def current(self) -> AbstractContextManager[None]:
        return nullcontext()

    def wait(self) -> None:
        return


class _CudaStream:
    """A CUDA stream of our own and the event that says how far it has come."""

    def __init__(
        self, device: torch.device, *, high_priority: bool, sm_share: float | None
    ) -> None:
        cuda: Any = torch.cuda  # its streams and events have no types
        cuda.set_device(device)  # of this thread: what fn makes on "cuda" lands here
        self._partition: Partition | None = None
        if sm_share is not None:
            self._partition = open_partition(device, sm_share)
        if self._partition is not None:
            self._stream = self._partition.stream
        else:
            self._stream = cuda.Stream(device, priority=-1 if high_priority else 0)
        self._event = cuda.Event(blocking=True)

    def current(self) -> AbstractContextManager[None]:
        return torch.cuda.stream(self._stream)

    def wait(self) -> None:
        self._event.record(self._stream)
        self._event.synchronize()


def _open_stream(
    device: torch.device, *, high_priority: bool, sm_share: float | None
) -> DeviceStream:
    """The stream for `device`; called on the lane's thread."""
    if device.type == "cuda":
        return _CudaStream(device, high_priority=high_priority, sm_share=sm_share)
    if device.type == "cpu":
        return _CpuStream()
    raise ValueError(f"device is {str(device)!r}; a lane runs on 'cpu' or 'cuda'")


class _BrokenStream:
    """Stands in for a stream that could not be opened: every job fails with the reason."""

    def __init__(self, lane: str, device: torch.device, cause: Exception) -> None:
        self._message = f"lane {lane!r} could not be set up on {device}: {cause}"
        self._cause = cause

    def current(self) -> AbstractContextManager[None]:
        raise RuntimeError(self._message) from self._cause

    def wait(self) -> None:
        return


class _Job(Generic[T]):
    """A call on its way through the lane, and its outcome once `execute` has returned.

    The lane's thread executes it and calls `deliver`; from then on it belongs to the caller.
    """

    __slots__ = ("_value", "args", "deliver", "done", "error", "fn", "waiter")

    def __init__(
        self,
        fn: Callable[..., T],
        args: tuple[Any, ...],
        deliver: Callable[[_Job[T]], None],
    ) -> None:
        self.fn: Callable[..., T] | None = fn
        self.args = args
        self.deliver = deliver
        self.done = False
        self._value: T | None = None
        self.error: BaseException | None = None
        self.waiter: asyncio.Future[None] | None = None

    def execute(self, stream: DeviceStream) -> None:
        """Run to the end on `stream`, device included, and keep the outcome."""
        assert self.fn is not None, "a job runs once"
        try:
            with stream.current():
                try:
                    self._value = self.fn(*self.args)
                finally:
                    stream.wait()  # after a failure as well: its kernels may still be running
        except BaseException as error:  # noqa: BLE001 - raised to the caller by take()
            self._value = None
            self.error = error
        self.fn = None
        self.args = ()

    def settle(self) -> None:
        """Wake the coroutine in `Lane.run`; called on that coroutine's loop."""
        self.done = True
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def take(self) -> T:
        """Return the value or raise the error."""
        error, self.error = self.error, None
        if error is None:
            return cast("T", self._value)
        try:
            raise error
        finally:
            del error  # or the traceback and this frame would keep each other alive


class Lane:
    """A thread and a device stream that run one job at a time, in order.

    Args:
        name: for thread names, logs and errors; "inference", "training".
        device: a CPU or CUDA device.
        threads: intra-op threads of torch in this lane; None for as many as the thread that makes
            the lane has. The count is this lane's alone: other threads keep theirs.
        high_priority: on CUDA, the stream's kernels go before those of other streams when both are
            waiting for the device. No effect on the CPU.
        sm_share: on CUDA, the share of the multiprocessors that the stream's kernels may use, above
            0 and below 1; None for all (`partition.py`). No effect on the CPU.
        max_pending: most unfinished jobs; one more is refused with `LaneFullError`. A caller that
            awaits each job before the next never meets it.

    Use as a context manager, or call `start` and `close`.
    """

    def __init__(
        self,
        name: str,
        *,
        device: torch.device,
        threads: int | None = None,
        high_priority: bool = False,
        sm_share: float | None = None,
        max_pending: int = MAX_PENDING,
    ) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads of lane {name!r} is {threads}; it must be at least 1")
        if sm_share is not None and not 0.0 < sm_share < 1.0:
            raise ValueError(
                f"sm_share of lane {name!r} is {sm_share}; it must be above 0 and below 1, or None"
            )
        if max_pending < 1:
            raise ValueError(
                f"max_pending of lane {name!r} is {max_pending}; it must be at least 1"
            )
        self.name = name
        self.device = device
        self._high_priority = high_priority
        self._sm_share = sm_share
        self._threads = threads
        self._default_threads = torch.get_num_threads()
        self._max_pending = max_pending
        self._jobs: SimpleQueue[_Job[Any] | None] = SimpleQueue()
        self._lock = threading.Lock()  # guards _is_open, _pending and the order of _jobs
        self._is_open = False
        self._pending = 0
        self._finished = (0, 0.0)  # jobs, busy_s; replaced as one by the lane's thread
        self._thread: threading.Thread | None = None

    @property
    def threads(self) -> int:
        """Intra-op threads of torch in this lane."""
        return self._threads or self._default_threads

    # -- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread. Does not wait for the device: a failure there is raised by each job.

        A lane starts once; `RuntimeError` on a second call.
        """
        with self._lock:
            if self._thread is not None:
                raise RuntimeError(f"lane {self.name!r} was started before; make a new one")
            self._thread = threading.Thread(
                target=self._work, name=f"cotune-lane-{self.name}", daemon=True
            )
            self._is_open = True
        self._thread.start()

    def close(self) -> None:
        """Take no more jobs, finish those handed in, and end the thread. Safe to call twice.

        Blocks until the thread has ended. Outcomes are still delivered to the loops that wait for
        them.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError(f"lane {self.name!r} cannot be closed by one of its own jobs")
        with self._lock:
            if self._is_open:
                self._is_open = False
                self._jobs.put(None)
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- work ------------------------------------------------------------------------------------

    async def run(self, fn: Callable[[*Ts], T], /, *args: *Ts) -> T:
        """Run ``fn(*args)`` on the lane and return its value once the device has finished.

        Raises what `fn` raises, with its traceback; `LaneClosedError` and `LaneFullError` when the
        job was not taken.

        Cancellation: a job that was handed in always runs to its end, for a kernel in flight cannot
        be called back. When the awaiting task is cancelled meanwhile, this waits for the job and
        then raises `CancelledError`; the value is dropped, and an error of `fn` is logged.
        """
        loop = asyncio.get_running_loop()

        def deliver(job: _Job[T]) -> None:
            try:
                loop.call_soon_threadsafe(job.settle)
            except RuntimeError as closed:
                _report_orphan(self.name, job, f"nobody waits for it any more ({closed})")

        job = _Job(fn, args, deliver)
        waiter = job.waiter = loop.create_future()
        self._submit(job)
        cancelled: asyncio.CancelledError | None = None
        while not job.done:
            try:
                await waiter
            except asyncio.CancelledError as error:
                cancelled = cancelled or error
                waiter = job.waiter = loop.create_future()
        if cancelled is not None:
            _report_orphan(self.name, job, "its caller was cancelled")
            try:
                raise cancelled
            finally:
                del cancelled
        return job.take()

    def run_sync(self, fn: Callable[[*Ts], T], /, *args: *Ts) -> T:
        """The same for callers without an event loop: blocks until the device has finished.

        Meant for start-up and tests; on an event loop's thread it would block the loop. An
        interrupt (Ctrl-C) leaves the job to run to its end unseen.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError(f"lane {self.name!r} cannot wait for a job from one of its own jobs")
        finished = threading.Lock()
        finished.acquire()
        job = _Job(fn, args, lambda _: finished.release())
        self._submit(job)
        finished.acquire()
        return job.take()

    def statistics(self) -> LaneStatistics:
        """A snapshot; may be called from any thread."""
        with self._lock:
            jobs, busy_s = self._finished
            return LaneStatistics(jobs=jobs, busy_s=busy_s, pending=self._pending)

    def _submit(self, job: _Job[Any]) -> None:
        with self._lock:
            if not self._is_open:
                state = "not started" if self._thread is None else "closed"
                raise LaneClosedError(f"lane {self.name!r} is {state}; it takes no job")
            if self._pending >= self._max_pending:
                raise LaneFullError(
                    f"lane {self.name!r} has {self._pending} unfinished jobs, as many as "
                    "max_pending allows; await some before handing in more"
                )
            self._pending += 1
            self._jobs.put(job)

    # -- the lane's thread -----------------------------------------------------------------------

    def _work(self) -> None:
        stream: DeviceStream
        try:
            self._set_threads()
            stream = _open_stream(
                self.device, high_priority=self._high_priority, sm_share=self._sm_share
            )
        except Exception as error:  # noqa: BLE001 - raised by every job, where a caller can see it
            stream = _BrokenStream(self.name, self.device, error)
        while (job := self._jobs.get()) is not None:
            started_s = time.monotonic()
            job.execute(stream)
            busy_s = time.monotonic() - started_s
            with self._lock:
                self._pending -= 1
                self._finished = (self._finished[0] + 1, self._finished[1] + busy_s)
            job.deliver(job)
            del job  # or its value would live until the next job comes

    def _set_threads(self) -> None:
        # torch keeps two counts: one per thread, and one that a thread takes over when it first
        # uses torch. So: use it first, then set our own, which sets the other as well; put that
        # back from a thread that ends at once.
        torch.get_num_threads()
        torch.set_num_threads(self._threads or self._default_threads)
        restore = threading.Thread(target=torch.set_num_threads, args=(self._default_threads,))
        restore.start()
        restore.join()


def _report_orphan(lane: str, job: _Job[Any], reason: str) -> None:
    """Log the error of a job that has no caller left to raise it to."""
    if job.error is not None:
        log.error("lane %r: a job failed, and %s", lane, reason, exc_info=job.error)
        job.error = None
