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
    """What the recorder asks of `torch.cuda`, noted."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.default = FakeStream("default", self.log)
        self.current: FakeStream = FakeStream("lane", self.log)
        self.end_fails = False
        cuda = self

        class Graph:
            def capture_begin(self, *, pool: object, capture_error_mode: str) -> None:
                cuda.log.append(f"begin {pool} {capture_error_mode} on {cuda.current.name}")

            def capture_end(self) -> None:
                cuda.log.append("end")
                if cuda.end_fails:
                    raise RuntimeError("capture invalidated")

            def replay(self) -> None:
                cuda.log.append("replay")

        self.CUDAGraph = Graph

    def graph_pool_handle(self) -> str:
        return "pool"

    def current_stream(self, device: torch.device) -> FakeStream:
        return self.current

    def default_stream(self, device: torch.device) -> FakeStream:
        return self.default

    def Stream(self, device: torch.device) -> FakeStream:
        return FakeStream("side", self.log)

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    return fake


def test_a_capture_is_made_on_the_lanes_stream_and_watches_its_own_thread_alone(
    cuda: FakeCuda,
) -> None:
    recorder = GraphRecorder(torch.device("cuda", 0))
    replay = recorder.record(lambda: cuda.log.append("work"))
    recorder.record(lambda: cuda.log.append("other work"))
    replay()
    assert [line for line in cuda.log if "waits" not in line] == [
        "begin pool thread_local on lane",
        "work",
        "end",
        "begin pool thread_local on lane",
        "other work",
        "end",
        "replay",
    ]


def test_the_default_stream_cannot_be_captured_so_one_beside_it_is(cuda: FakeCuda) -> None:
    cuda.current = cuda.default
    GraphRecorder(torch.device("cuda", 0)).record(lambda: cuda.log.append("work"))
    assert cuda.log == [
        "side waits for default",
        "begin pool thread_local on side",
        "work",
        "end",
        "default waits for side",
    ]


@pytest.mark.parametrize("end_fails", [False, True])
def test_work_that_fails_ends_the_capture_and_is_raised(cuda: FakeCuda, end_fails: bool) -> None:
    cuda.end_fails = end_fails

    def work() -> None:
        raise RuntimeError("a value was asked of the device")

    with pytest.raises(RuntimeError, match="a value was asked of the device") as caught:
        GraphRecorder(torch.device("cuda", 0)).record(work)
    assert cuda.log[-1] == "end"
    notes: list[str] = getattr(caught.value, "__notes__", [])
    assert notes == (["the capture ended with: capture invalidated"] if end_fails else [])


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
