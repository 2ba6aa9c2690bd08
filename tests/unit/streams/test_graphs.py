"""Batch sizes, and how a CUDA graph is captured; the capture itself needs a card."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cotune.streams.graphs import BATCH_SIZES, CallAgain, GraphRecorder, size_for, sizes_up_to

if TYPE_CHECKING:
    from collections.abc import Iterator


def test_a_batch_goes_into_the_next_size() -> None:
    assert [size_for(n, BATCH_SIZES) for n in (1, 2, 3, 5, 17, 33, 200, 256)] == [
        1, 2, 4, 8, 24, 48, 256, 256,
    ]  # fmt: skip
    assert size_for(257, BATCH_SIZES) is None


def test_sizes_reach_up_to_what_holds_the_most_sequences() -> None:
    assert sizes_up_to(1) == (1,)
    assert sizes_up_to(6) == (1, 2, 4, 8)
    assert sizes_up_to(8) == (1, 2, 4, 8)
    assert sizes_up_to(256) == BATCH_SIZES
    assert sizes_up_to(1000) == BATCH_SIZES
    assert all(size_for(n, sizes_up_to(n)) for n in range(1, 257))


def test_calling_again_is_calling_again() -> None:
    calls: list[int] = []
    again = CallAgain().record(lambda: calls.append(1))
    assert calls == []
    again()
    again()
    assert calls == [1, 1]


class FakeStream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log

    def wait_stream(self, other: FakeStream) -> None:
        self._log.append(f"{self.name} waits for {other.name}")


class FakeCuda:
    """What the recorder asks of `torch.cuda`, noted; pools count their users as the allocator does.

    Attributes:
        log: what was asked.
        users: of each pool: captures, and recordings that are held.
        capturing: the pools that the allocator takes to be captured into.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.users: dict[str, int] = {}
        self.capturing: list[str] = []
        self.memory = self
        self.default = FakeStream("default", self.log)
        self.current: FakeStream = FakeStream("lane", self.log)
        self.end_fails = False
        self.streams = 0
        cuda = self

        class Graph:
            def __init__(self) -> None:
                self.pool = ""
                self.is_captured = False

            def capture_begin(self, *, pool: str, capture_error_mode: str) -> None:
                assert cuda.users.get(pool) != 0, "a pool that was given back takes nothing more"
                assert pool not in cuda.capturing, "the pool is being captured into"
                cuda.users[pool] = cuda.users.get(pool, 0) + 1
                cuda.capturing.append(pool)
                self.pool = pool
                cuda.log.append(f"begin {pool} {capture_error_mode} on {cuda.current.name}")

            def capture_end(self) -> None:
                cuda.log.append("end")
                if cuda.end_fails:
                    raise RuntimeError("capture invalidated")
                cuda.capturing.remove(self.pool)
                self.is_captured = True

            def replay(self) -> None:
                cuda.log.append("replay")

            def __del__(self) -> None:
                if self.is_captured:
                    cuda.users[self.pool] -= 1

        self.CUDAGraph = Graph

    def graph_pool_handle(self) -> str:
        return f"pool{len(self.users)}"

    def _cuda_endAllocateToPool(self, index: int, pool: str) -> None:
        if pool not in self.capturing:
            raise RuntimeError("not recording to this pool")
        self.capturing.remove(pool)

    def _cuda_releasePool(self, index: int, pool: str) -> None:
        self.users[pool] -= 1

    def current_stream(self, device: torch.device) -> FakeStream:
        return self.current

    def default_stream(self, device: torch.device) -> FakeStream:
        return self.default

    def Stream(self, device: torch.device) -> FakeStream:
        self.streams += 1
        return FakeStream(f"side {self.streams - 1}", self.log)

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: fake.log.append("next to nothing"))
    return fake


DEVICE = torch.device("cuda", 0)
KEEPER = ["begin pool0 thread_local on {}", "next to nothing", "end"]
"""The recording that keeps the pool, made before the first."""


def kept_on(stream: str) -> list[str]:
    return [line.format(stream) for line in KEEPER]


def test_a_capture_is_made_on_the_lanes_stream_and_watches_its_own_thread_alone(
    cuda: FakeCuda,
) -> None:
    recorder = GraphRecorder(DEVICE)
    replay = recorder.record(lambda: cuda.log.append("work"))
    recorder.record(lambda: cuda.log.append("other work"))
    replay()
    assert [line for line in cuda.log if "waits" not in line] == [
        *kept_on("lane"),
        "begin pool0 thread_local on lane",
        "work",
        "end",
        "begin pool0 thread_local on lane",
        "other work",
        "end",
        "replay",
    ]


def test_the_default_stream_cannot_be_captured_so_one_beside_it_is(cuda: FakeCuda) -> None:
    cuda.current = cuda.default
    recorder = GraphRecorder(DEVICE)
    for _ in range(2):  # the same one: each has a workspace of its own
        recorder.record(lambda: cuda.log.append("work"))
    assert [line for line in cuda.log if line not in kept_on("side 0")] == [
        "side 0 waits for default",
        "work",
        "default waits for side 0",
    ] * 2


def test_a_pool_whose_recordings_are_all_gone_takes_new_ones(cuda: FakeCuda) -> None:
    recorder = GraphRecorder(DEVICE)

    def short_of_memory() -> None:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):  # the largest size, say, which is the first
        recorder.record(short_of_memory)
    replay = recorder.record(lambda: None)
    del replay  # for other adapters, say
    recorder.record(lambda: None)
    assert list(cuda.users) == ["pool0"]
    del recorder
    assert cuda.users == {"pool0": 0}


@pytest.mark.parametrize("end_fails", [False, True])
def test_work_that_fails_ends_the_capture_and_is_raised(cuda: FakeCuda, end_fails: bool) -> None:
    recorder = GraphRecorder(DEVICE)
    recorder.record(lambda: None)
    cuda.end_fails = end_fails

    def work() -> None:
        raise RuntimeError("a value was asked of the device")

    with pytest.raises(RuntimeError, match="a value was asked of the device") as caught:
        recorder.record(work)
    assert cuda.log[-1] == "end"
    notes: list[str] = getattr(caught.value, "__notes__", [])
    assert notes == (["the capture ended with: capture invalidated"] if end_fails else [])


def test_a_capture_that_cannot_be_ended_leaves_the_allocator_in_order(cuda: FakeCuda) -> None:
    recorder = GraphRecorder(DEVICE)
    replay = recorder.record(lambda: None)
    cuda.end_fails = True
    with pytest.raises(RuntimeError, match="capture invalidated"):
        recorder.record(lambda: None)
    cuda.end_fails = False
    assert cuda.capturing == []
    assert cuda.users == {"pool0": 1}  # by `replay`, which goes on
    replay()
    other = recorder.record(lambda: None)
    other()
    assert cuda.users == {"pool0": 1, "pool1": 2}


@pytest.mark.gpu
def test_on_cuda_a_replay_computes_from_what_the_tensors_hold_now() -> None:
    device = torch.device("cuda", 0)
    x, y = torch.zeros(64, device=device), torch.zeros(64, device=device)

    def work() -> None:
        y.copy_(x * 2 + 1)

    any_cuda: Any = torch.cuda
    with any_cuda.stream(any_cuda.Stream(device)):
        work()
        replay = GraphRecorder(device).record(work)
        x.fill_(20)
        replay()
        assert y.tolist() == [41.0] * 64


@pytest.mark.gpu
def test_on_cuda_a_recorder_goes_on_after_a_recording_that_failed() -> None:
    device = torch.device("cuda", 0)
    x, y = torch.zeros(64, device=device), torch.zeros(64, device=device)
    recorder = GraphRecorder(device)

    def fails() -> None:
        y.copy_(x * 2)
        raise torch.OutOfMemoryError("injected")

    def asks() -> None:
        y.copy_(x + float(x.sum()))

    def work() -> None:
        y.copy_(x * 2 + 1)

    any_cuda: Any = torch.cuda
    with any_cuda.stream(any_cuda.Stream(device)):
        for broken in (fails, asks):
            with pytest.raises(RuntimeError):
                recorder.record(broken)
            work()
            replay = recorder.record(work)
            x.fill_(20)
            replay()
            assert y.tolist() == [41.0] * 64
            del replay
