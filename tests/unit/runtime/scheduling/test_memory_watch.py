"""Live memory for the scheduler: a device of 1000 bytes whose margin is 40."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from cotune.cache.manager import KVCacheManager
from cotune.policy.memory import MemoryThreshold
from cotune.policy.types import MemoryView
from cotune.runtime.scheduling.memory_watch import READ_INTERVAL_S, MemoryNeeds, MemoryWatch
from cotune.streams.memory import MemoryReading

TOTAL = 1000
MARGIN = 40
PAGE = 10


def look(watch: MemoryWatch, now_s: float, running: int) -> MemoryView:
    """What a policy sees then."""
    watch.update(now_s, running)
    return watch.view()


class Device:
    """Memory as the test says, and how often it was read."""

    def __init__(self) -> None:
        self.free = 500
        self.unused = 0
        self.reads = 0
        self.error: Exception | None = None

    def read(self) -> MemoryReading:
        self.reads += 1
        if self.error is not None:
            raise self.error
        return MemoryReading(TOTAL, self.free, self.unused)


class Scene:
    """A watch over a device, and over a cache of 64 pages of 4 tokens."""

    def __init__(self, **needs: Any) -> None:
        self.device = Device()
        self.cache = KVCacheManager(64, 4)
        self.near_misses = 0
        self.watch = MemoryWatch(
            self.device.read,
            MemoryThreshold(TOTAL),
            MemoryNeeds(**{"page": PAGE, **needs}),
            self.cache,
            self._on_near_miss,
        )

    def _on_near_miss(self) -> None:
        self.near_misses += 1

    def take(self, pages: int) -> bool:
        """Whether a sequence of so many pages finds room; it keeps them."""
        return self.cache.reserve(self.cache.open(None, []), 4 * pages)


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_a_policy_sees_what_is_free_less_the_margin(scene: Scene) -> None:
    scene = Scene(training_token=3.0, prefill_token=2.0)
    scene.device.free, scene.device.unused = 500, 100
    assert look(scene.watch, 0.0, 0) == MemoryView(600 - MARGIN, TOTAL, PAGE, 56, 3.0, 2.0)
    assert scene.watch.threshold == 560


def test_a_reading_is_used_for_a_while(scene: Scene) -> None:
    watch, device = scene.watch, scene.device
    assert look(watch, 10.0, 0).threshold == 460
    device.free = 100
    assert look(watch, 10.0 + 0.9 * READ_INTERVAL_S, 0).threshold == 460
    assert device.reads == 1
    assert look(watch, 10.0 + READ_INTERVAL_S, 0).threshold == 60
    assert device.reads == 2


def test_after_an_out_of_memory_it_is_read_at_once_and_the_margin_has_grown(scene: Scene) -> None:
    watch = scene.watch
    assert look(watch, 10.0, 0).threshold == 500 - MARGIN
    watch.out_of_memory(10.0)
    assert look(watch, 10.0, 0).threshold == 500 - 2 * MARGIN
    assert (watch.out_of_memories, scene.device.reads) == (1, 2)


# -- the cache -----------------------------------------------------------------------------------


def test_the_cache_grows_as_far_as_memory_allows(scene: Scene) -> None:
    scene.device.free = MARGIN + 3 * PAGE + 9
    assert look(scene.watch, 0.0, 0).unused_pages == 3
    assert scene.watch.is_short
    assert not scene.take(4)
    assert scene.take(3)
    assert not scene.take(1)
    scene.device.free = 900
    assert look(scene.watch, 1.0, 0).unused_pages == 61
    assert not scene.watch.is_short
    assert scene.take(61)


def test_those_that_run_may_take_a_page_each_whatever_is_left(scene: Scene) -> None:
    scene.device.free = 0
    look(scene.watch, 0.0, 2)
    assert scene.watch.threshold < 0
    assert scene.take(2)
    assert not scene.take(1)


def test_pages_that_were_used_before_cost_nothing(scene: Scene) -> None:
    first = scene.cache.open(None, [])
    assert scene.cache.reserve(first, 4 * 5)
    scene.cache.close(first)
    scene.device.free = 0
    view = look(scene.watch, 0.0, 0)
    assert (view.unused_pages, scene.cache.available_pages) == (0, 5)
    assert scene.take(5)
    assert not scene.take(1)


def test_where_pages_were_paid_for_at_start_the_cache_is_left_alone() -> None:
    scene = Scene(page=0)
    scene.device.free = 0
    view = look(scene.watch, 0.0, 0)
    assert (view.threshold, view.page, view.unused_pages) == (-2 * MARGIN, 0, 0)
    assert scene.watch.is_short
    assert scene.take(64)


# -- what goes wrong -----------------------------------------------------------------------------


def test_a_near_miss_is_told_once_while_it_lasts(scene: Scene) -> None:
    watch, device = scene.watch, scene.device
    look(watch, 0.0, 0)
    assert scene.near_misses == 0
    device.free = MARGIN // 4
    for second in (1.0, 2.0, 3.0):
        look(watch, second, 0)
    assert scene.near_misses == watch.near_misses == 1
    device.free = 500
    look(watch, 4.0, 0)
    device.free = MARGIN // 4
    look(watch, 5.0, 0)
    assert scene.near_misses == watch.near_misses == 2


@pytest.mark.parametrize("error", [OSError("the file is gone"), Exception("driver not loaded")])
def test_a_reading_that_fails_is_said_once_and_the_last_one_is_used(
    scene: Scene, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    watch, device = scene.watch, scene.device
    with caplog.at_level(logging.WARNING):
        assert look(watch, 0.0, 0).threshold == 460
        device.error = error
        for second in (1.0, 2.0, 3.0):
            assert look(watch, second, 0).threshold == 460
        assert device.reads == 4
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert f"cannot be read ({type(error).__name__}: {error})" in caplog.text
        device.error = None
        device.free = 300
        assert look(watch, 4.0, 0).threshold == 260
        device.error = error
        look(watch, 5.0, 0)
        assert len(caplog.records) == 2


def test_a_device_that_was_never_read_is_taken_for_empty(scene: Scene) -> None:
    scene.device.error = OSError("no")
    assert look(scene.watch, 0.0, 0).threshold == TOTAL - MARGIN
    assert not scene.watch.is_short
