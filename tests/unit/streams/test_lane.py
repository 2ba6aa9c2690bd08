from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
import traceback
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
import uvloop

from cotune.streams import lane as lane_module
from cotune.streams.lane import Lane, LaneClosedError, LaneFullError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

CPU = torch.device("cpu")


@pytest.fixture
def lane() -> Iterator[Lane]:
    with Lane("test", device=CPU, threads=1) as lane:
        yield lane


class Gate:
    """A job that says when it has started and ends when it is let go."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.release = threading.Event()

    def __call__(self) -> str:
        self.started.set()
        assert self.release.wait(30)
        return "done"

    async def wait_started(self) -> None:
        assert await asyncio.to_thread(self.started.wait, 30)


class FakeStream:
    """A device that finishes its work when the test says so, and notes what it was asked."""

    def __init__(self) -> None:
        self.finished = threading.Event()
        self.waiting = threading.Event()
        self.calls: list[str] = []

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        self.calls.append("enter")
        yield
        self.calls.append("leave")

    def wait(self) -> None:
        self.calls.append("wait")
        self.waiting.set()
        assert self.finished.wait(30)


@pytest.fixture
def fake_stream(monkeypatch: pytest.MonkeyPatch) -> FakeStream:
    stream = FakeStream()
    monkeypatch.setattr(lane_module, "_open_stream", lambda device, **_: stream)
    return stream


async def test_a_job_runs_on_the_lanes_thread_and_its_value_comes_back(lane: Lane) -> None:
    def job(a: int, b: int) -> tuple[int, str]:
        return a + b, threading.current_thread().name

    assert await lane.run(job, 2, 3) == (5, "cotune-lane-test")


async def test_the_event_loop_goes_on_while_a_job_runs(lane: Lane) -> None:
    gate = Gate()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(lane.run(gate))
        await gate.wait_started()
        assert not task.done()
        gate.release.set()
    assert task.result() == "done"


async def test_jobs_run_one_at_a_time_in_the_order_they_came(lane: Lane) -> None:
    order: list[int] = []
    inside = 0

    def job(i: int) -> None:
        nonlocal inside
        inside += 1
        assert inside == 1
        order.append(i)
        inside -= 1

    async with asyncio.TaskGroup() as group:
        for i in range(50):
            group.create_task(lane.run(job, i))
    assert order == list(range(50))


async def test_an_error_is_raised_to_the_caller_with_the_line_that_raised_it(lane: Lane) -> None:
    def broken() -> None:
        raise KeyError("here")

    with pytest.raises(KeyError, match="here") as caught:
        await lane.run(broken)
    assert "broken" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert await lane.run(len, "next") == 4


async def test_an_exit_raised_by_a_job_reaches_the_caller_and_spares_the_lane(lane: Lane) -> None:
    def leave() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        lane.run_sync(leave)
    assert await lane.run(len, "next") == 4


async def test_a_cancelled_caller_waits_for_the_job_and_then_is_cancelled(lane: Lane) -> None:
    gate = Gate()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(lane.run(gate))
        await gate.wait_started()
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not task.done()
        gate.release.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert lane.statistics().jobs == 1


async def test_a_job_whose_caller_was_cancelled_before_it_began_still_runs(lane: Lane) -> None:
    gate = Gate()
    ran: list[bool] = []
    async with asyncio.TaskGroup() as group:
        first = group.create_task(lane.run(gate))
        await gate.wait_started()
        second = group.create_task(lane.run(ran.append, True))
        await asyncio.sleep(0)
        second.cancel()
        gate.release.set()
        with pytest.raises(asyncio.CancelledError):
            await second
    assert first.result() == "done"
    assert ran == [True]


async def test_a_timeout_around_a_job_is_a_timeout_once_the_job_has_ended(lane: Lane) -> None:
    gate = Gate()

    async def release_after(limit: asyncio.Timeout) -> None:
        while not limit.expired():  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0)
        gate.release.set()

    async def run_in_time(group: asyncio.TaskGroup) -> None:
        async with asyncio.timeout(0.01) as limit:
            group.create_task(release_after(limit))
            await lane.run(gate)

    async with asyncio.TaskGroup() as group:
        with pytest.raises(TimeoutError):
            await run_in_time(group)
    assert lane.statistics().jobs == 1
    assert lane.statistics().pending == 0


async def test_the_error_of_a_job_whose_caller_was_cancelled_is_logged(
    lane: Lane, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()

    def broken() -> None:
        gate()
        raise ValueError("nobody listens")

    async with asyncio.TaskGroup() as group:
        task = group.create_task(lane.run(broken))
        await gate.wait_started()
        task.cancel()
        gate.release.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert "caller was cancelled" in caplog.text
    assert "nobody listens" in caplog.text


def test_a_job_outlives_the_loop_that_asked_for_it(
    lane: Lane, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()

    def broken() -> None:
        gate()
        raise ValueError("too late")

    loop = asyncio.new_event_loop()
    coroutine = lane.run(broken)
    task = loop.create_task(coroutine)
    loop.call_soon(loop.stop)
    loop.run_forever()
    assert gate.started.wait(30)
    loop.close()
    gate.release.set()
    assert lane.run_sync(len, "next") == 4
    assert "too late" in caplog.text
    # Nobody can finish this task any more; end it here so that it does not complain elsewhere.
    with contextlib.suppress(RuntimeError):
        coroutine.close()
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # the only way to say so


async def test_closing_finishes_the_jobs_that_were_handed_in() -> None:
    lane = Lane("test", device=CPU)
    lane.start()
    gate = Gate()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(lane.run(gate))]
        await gate.wait_started()
        tasks += [group.create_task(lane.run(str, i)) for i in range(5)]
        await asyncio.sleep(0)
        closing = group.create_task(asyncio.to_thread(lane.close))
        gate.release.set()
    assert closing.done()
    assert [task.result() for task in tasks] == ["done", "0", "1", "2", "3", "4"]
    assert not [t for t in threading.enumerate() if t.name == "cotune-lane-test"]


async def test_a_lane_that_is_closed_or_not_started_says_so() -> None:
    lane = Lane("early", device=CPU)
    with pytest.raises(LaneClosedError, match="'early' is not started"):
        await lane.run(len, "")
    lane.start()
    lane.close()
    lane.close()
    with pytest.raises(LaneClosedError, match="'early' is closed"):
        await lane.run(len, "")
    with pytest.raises(LaneClosedError):
        lane.run_sync(len, "")
    with pytest.raises(RuntimeError, match="started before"):
        lane.start()


async def test_a_full_lane_refuses_and_has_room_again_after_a_job() -> None:
    gate = Gate()
    with Lane("small", device=CPU, max_pending=2) as lane:
        async with asyncio.TaskGroup() as group:
            group.create_task(lane.run(gate))
            await gate.wait_started()
            group.create_task(lane.run(len, ""))
            await asyncio.sleep(0)
            with pytest.raises(LaneFullError, match="2 unfinished jobs"):
                await lane.run(len, "")
            assert lane.statistics().pending == 2
            gate.release.set()
        assert await lane.run(len, "next") == 4


def test_a_job_can_neither_wait_for_its_own_lane_nor_close_it(lane: Lane) -> None:
    with pytest.raises(RuntimeError, match="from one of its own jobs"):
        lane.run_sync(lambda: lane.run_sync(len, ""))
    with pytest.raises(RuntimeError, match="by one of its own jobs"):
        lane.run_sync(lane.close)
    assert lane.run_sync(len, "next") == 4


def test_run_sync_raises_what_the_job_raises(lane: Lane) -> None:
    with pytest.raises(ZeroDivisionError):
        lane.run_sync(lambda: 1 // 0)


async def test_statistics_count_jobs_and_the_time_they_took(lane: Lane) -> None:
    await lane.run(time.sleep, 0.02)
    with pytest.raises(ZeroDivisionError):
        await lane.run(lambda: 1 // 0)
    statistics = lane.statistics()
    assert statistics.jobs == 2
    assert 0.02 <= statistics.busy_s < 60
    assert statistics.pending == 0


async def test_an_idle_lane_holds_neither_arguments_nor_results_nor_errors(lane: Lane) -> None:
    class Big:
        pass

    def fail(big: Big) -> None:
        raise ValueError(big)

    given, gone = Big(), []
    gone.append(weakref.ref(given))
    result = await lane.run(lambda big: [big, Big()], given)
    gone.append(weakref.ref(result[1]))
    with pytest.raises(ValueError, match="Big"):
        await lane.run(fail, given)
    gc.disable()  # no cycle may be needed to let go
    try:
        del given, result
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


async def test_each_lane_has_its_own_thread_count_and_nobody_elses_changes() -> None:
    def count() -> int:
        return torch.get_num_threads()

    def count_in_a_new_thread() -> int:
        counts: list[int] = []
        thread = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return counts[0]

    before, before_new = count(), count_in_a_new_thread()
    with (
        Lane("one", device=CPU, threads=1) as one,
        Lane("three", device=CPU, threads=3) as three,
        Lane("same", device=CPU) as same,
    ):
        assert await one.run(count) == 1
        assert await three.run(count) == 3
        assert await same.run(count) == before
        assert await one.run(count) == 1
        assert count() == before
        assert count_in_a_new_thread() == before_new == before


async def test_several_lanes_run_at_the_same_time() -> None:
    both = threading.Barrier(2)
    with Lane("a", device=CPU) as a, Lane("b", device=CPU) as b:
        async with asyncio.TaskGroup() as group:
            group.create_task(a.run(both.wait, 30))
            group.create_task(b.run(both.wait, 30))


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_a_lane_serves_any_loop_and_several_one_after_the_other(
    lane: Lane, run: Callable[[Coroutine[Any, Any, int]], int]
) -> None:
    async def main() -> int:
        return await lane.run(len, "four")

    assert run(main()) == 4
    assert run(main()) == 4


async def test_the_caller_goes_on_only_when_the_device_has_finished(
    fake_stream: FakeStream,
) -> None:
    with Lane("device", device=CPU) as lane:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(lane.run(fake_stream.calls.append, "job"))
            assert await asyncio.to_thread(fake_stream.waiting.wait, 30)
            assert not task.done()
            fake_stream.finished.set()
    assert fake_stream.calls == ["enter", "job", "wait", "leave"]


async def test_arguments_live_until_the_device_has_finished(fake_stream: FakeStream) -> None:
    class Tensor:
        pass

    tensor = Tensor()
    gone = weakref.ref(tensor)
    with Lane("device", device=CPU) as lane:
        async with asyncio.TaskGroup() as group:
            group.create_task(lane.run(lambda _: None, tensor))
            del tensor
            assert await asyncio.to_thread(fake_stream.waiting.wait, 30)
            assert gone() is not None
            fake_stream.finished.set()
        assert gone() is None


async def test_a_failed_job_is_reported_after_its_kernels_have_ended(
    fake_stream: FakeStream,
) -> None:
    with Lane("device", device=CPU) as lane:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(_outcome(lane.run(lambda: 1 // 0)))
            assert await asyncio.to_thread(fake_stream.waiting.wait, 30)
            assert not task.done()
            fake_stream.finished.set()
    assert isinstance(task.result(), ZeroDivisionError)


async def _outcome(call: Coroutine[Any, Any, Any]) -> Exception | None:
    try:
        await call
    except Exception as error:  # noqa: BLE001 - returned to the test
        return error
    return None


async def test_a_device_that_cannot_be_opened_fails_every_job_with_the_reason() -> None:
    with Lane("lost", device=torch.device("meta")) as lane:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="lane 'lost' could not be set up on meta") as e:
                await lane.run(len, "")
            assert "runs on 'cpu' or 'cuda'" in str(e.value)


def test_a_wrong_setting_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="threads of lane 'x' is 0; it must be at least 1"):
        Lane("x", device=CPU, threads=0)
    with pytest.raises(ValueError, match="max_pending of lane 'x' is 0; it must be at least 1"):
        Lane("x", device=CPU, max_pending=0)


@pytest.mark.gpu
async def test_on_cuda_a_job_has_finished_on_its_own_stream_when_the_caller_goes_on() -> None:
    device = torch.device("cuda", 0)

    def job() -> tuple[Any, Any]:
        cuda: Any = torch.cuda  # without types
        cuda._sleep(50_000_000)
        event = cuda.Event()
        event.record()
        return event, cuda.current_stream()

    with (
        Lane("high", device=device, high_priority=True) as high,
        Lane("low", device=device) as low,
    ):
        event, stream = await high.run(job)
        assert event.query()
        _, other = await low.run(job)
        assert stream.cuda_stream != other.cuda_stream != torch.cuda.default_stream().cuda_stream
        assert stream.priority < other.priority
