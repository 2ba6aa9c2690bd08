from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cotune.runtime.training.safepoints import Safepoints


class SignallingClock:
    """Seconds that tests set. A waiting thread reads it first when it begins to wait."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.was_read = threading.Semaphore(0)

    def __call__(self) -> float:
        self.was_read.release()
        return self.now_s


def test_an_open_gate_lets_pass_without_counting() -> None:
    safepoints = Safepoints()
    safepoints.wait()
    statistics = safepoints.statistics()
    assert (statistics.waits, statistics.waiting, statistics.is_held) == (0, 0, False)


def test_a_held_thread_waits_until_released_and_the_wait_is_measured() -> None:
    clock = SignallingClock()
    safepoints = Safepoints(clock=clock)
    safepoints.hold()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(safepoints.wait)
        assert clock.was_read.acquire(timeout=60)
        held = safepoints.statistics()
        assert not waiting.done()
        clock.now_s = 2.5
        safepoints.release()
        waiting.result(timeout=60)
    assert (held.is_held, held.waits, held.waiting, held.waited_s) == (True, 1, 1, 0.0)
    after = safepoints.statistics()
    assert (after.is_held, after.waits, after.waiting, after.waited_s) == (False, 1, 0, 2.5)


def test_holding_twice_is_undone_by_one_release() -> None:
    safepoints = Safepoints()
    safepoints.hold()
    safepoints.hold()
    safepoints.release()
    safepoints.wait()
    assert safepoints.statistics().waits == 0


def test_closing_releases_who_waits_and_no_later_hold_has_effect() -> None:
    clock = SignallingClock()
    safepoints = Safepoints(clock=clock)
    safepoints.hold()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(safepoints.wait)
        assert clock.was_read.acquire(timeout=60)
        safepoints.close()
        waiting.result(timeout=60)
    safepoints.hold()
    assert not safepoints.statistics().is_held
    safepoints.wait()
    assert safepoints.statistics().waits == 1


@pytest.mark.parametrize("threads", [3])
def test_one_release_frees_every_thread(threads: int) -> None:
    clock = SignallingClock()
    safepoints = Safepoints(clock=clock)
    safepoints.hold()
    with ThreadPoolExecutor(threads) as pool:
        waiting = [pool.submit(safepoints.wait) for _ in range(threads)]
        for _ in waiting:
            assert clock.was_read.acquire(timeout=60)
        assert safepoints.statistics().waiting == threads
        safepoints.release()
        for future in waiting:
            future.result(timeout=60)
    assert safepoints.statistics().waiting == 0
