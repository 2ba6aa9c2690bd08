"""Live memory for the scheduler: a device of 1000 bytes whose margin is 40."""

from __future__ import annotations

import asyncio
import logging
import math
from typing import Any

import pytest

from cotune.cache.manager import KVCacheManager
from cotune.policy.memory import MemoryThreshold
from cotune.policy.types import MemoryView
from cotune.runtime.scheduling.memory_watch import (
    COME_BACK_S,
    GIVE_WAY_S,
    MOST_COME_BACK_S,
    READ_INTERVAL_S,
    STEADY_S,
    MemoryNeeds,
    MemoryWatch,
    Stake,
    TrainerMemory,
)
from cotune.streams.memory import MemoryReading
from engine_fakes import FakeClock, settle

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
    assert look(scene.watch, 0.0, 0) == MemoryView(
        600 - MARGIN, TOTAL, PAGE, 56, 3.0, 2.0, returned_pages=0, kept_back_pages=8
    )
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


def test_a_look_beside_the_iterations_leaves_the_cache_as_it_is(scene: Scene) -> None:
    watch = scene.watch
    scene.device.free = MARGIN + 64 * PAGE
    watch.update(10.0, 2)
    assert scene.cache.kept_back_pages == 0
    scene.device.free = MARGIN - 5
    assert watch.look(10.01) == -5
    assert watch.threshold == -5
    assert scene.cache.kept_back_pages == 0
    assert scene.device.reads == 2
    scene.device.free = 0
    watch.look(10.02)
    assert scene.near_misses == watch.near_misses == 1
    look(watch, 10.0 + READ_INTERVAL_S, 2)  # the iterations' own reading is as often as ever
    assert scene.device.reads == 4
    assert scene.cache.kept_back_pages > 0


# -- what trainers hold --------------------------------------------------------------------------


class FakeHolder:
    """A learner that says what the test tells it, and counts how often it is asked."""

    def __init__(self, stake: Stake | None = Stake.NOTHING) -> None:
        self.stake = stake
        self.asked = 0

    def give_way(self) -> None:
        assert self.stake is not None
        self.asked += 1
        self.stake = None


class Trainers:
    """Some holders and a clock: each `review` is half a second after the one before."""

    def __init__(self, *stakes: Stake | None) -> None:
        self.clock = FakeClock()
        self.marks: list[tuple[str, str]] = []
        self.memory = TrainerMemory(self.clock, lambda *mark: self.marks.append(mark))
        self.holders = [FakeHolder(stake) for stake in stakes]
        for key, holder in enumerate(self.holders):
            self.memory.enroll(key, f"adapter {key}", holder)

    @property
    def asked(self) -> list[int]:
        return [holder.asked for holder in self.holders]

    def review(self, seconds: float = 0.5, **changes: Any) -> None:
        """Look at it for so long."""
        now: dict[str, Any] = {
            "threshold": 1000,
            "is_serving_short": False,
            "needs": {},
            "quiet_s": math.inf,
        }
        until_s = self.clock.now_s + seconds
        while self.clock.now_s < until_s:
            self.clock.now_s += 0.5
            self.memory.review(self.clock.now_s, **{**now, **changes})


SHORT: tuple[dict[str, Any], ...] = (
    {"threshold": 0},
    {"is_serving_short": True},
    {"threshold": 99, "needs": {7: 100.0, 8: 500.0}},  # of others
)


@pytest.mark.parametrize("short", SHORT)
def test_memory_that_stays_short_is_asked_of_the_idle_first_and_of_one_at_a_time(
    short: dict[str, Any],
) -> None:
    trainers = Trainers(None, Stake.EXAMINATION, Stake.BATCH, Stake.NOTHING)
    trainers.review(GIVE_WAY_S, **short)
    assert trainers.asked == [0, 0, 0, 0], "it may pass"
    trainers.review(**short)
    assert trainers.asked == [0, 0, 0, 1]
    trainers.review(GIVE_WAY_S - 0.5, **short)
    assert trainers.asked == [0, 0, 0, 1], "what it frees may be enough"
    trainers.review(**short)
    assert trainers.asked == [0, 0, 1, 1]
    trainers.review(GIVE_WAY_S, **short)
    assert trainers.asked == [0, 1, 1, 1]
    trainers.review(10 * GIVE_WAY_S, **short)
    assert trainers.asked == [0, 1, 1, 1], "who has none cannot give"


def test_memory_that_comes_and_goes_is_asked_of_nobody() -> None:
    trainers = Trainers(Stake.NOTHING)
    for _ in range(10):
        trainers.review(GIVE_WAY_S, threshold=-1)
        trainers.review(threshold=1, needs={0: 1.0})
    assert trainers.asked == [0]


def test_a_batch_is_given_up_only_where_no_quantum_runs_and_none_can_go_on() -> None:
    trainers = Trainers(Stake.BATCH, Stake.EXAMINATION)
    trainers.review(10.0, threshold=-1, needs={0: 50.0}, quiet_s=GIVE_WAY_S - 0.1)
    assert trainers.asked == [0, 0]
    # A backward gives memory back; whoever examines holds some as well.
    trainers.review(threshold=-1, needs={0: 0.0}, quiet_s=GIVE_WAY_S)
    assert trainers.asked == [0, 1]
    trainers.review(10.0, threshold=-1, needs={0: 0.0}, quiet_s=GIVE_WAY_S)
    assert trainers.asked == [0, 1]
    trainers.review(threshold=-1, needs={0: 50.0}, quiet_s=GIVE_WAY_S)
    assert trainers.asked == [1, 1]


def test_as_long_as_one_offer_fits_training_does_not_lack_memory() -> None:
    trainers = Trainers(Stake.NOTHING)
    trainers.review(10.0, threshold=100, needs={3: 400.0, 4: 100.0})
    assert trainers.asked == [0]


async def test_a_trainer_comes_back_when_there_has_been_room_for_it_and_a_sample() -> None:
    trainers = Trainers(Stake.BATCH, None)
    trainers.review(GIVE_WAY_S + 0.5, threshold=99, needs={0: 100.0})
    assert trainers.asked == [1, 0]
    trainers.memory.set_down(0, 5 << 20)
    assert trainers.marks == [("trainer set down", "adapter 0, 5 MiB")]
    enough = (5 << 20) + 100
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        back = group.create_task(trainers.memory.wait_room(0))
        await settle()
        trainers.review(60.0, threshold=enough - 1)
        trainers.review(COME_BACK_S, threshold=enough)
        await settle()
        assert not back.done()
        trainers.review(threshold=enough, is_serving_short=True)
        trainers.review(COME_BACK_S, threshold=enough)
        await settle()
        assert not back.done(), "it was short meanwhile"
        trainers.review(threshold=enough)
    trainers.memory.take_up(0)
    assert trainers.marks[1:] == [("trainer taken up", "adapter 0")]


async def test_trainers_come_back_one_at_a_time_in_the_order_of_their_adapters() -> None:
    trainers = Trainers(None, None, None)
    for key, held in enumerate((100, 10, 10)):
        trainers.memory.set_down(key, held)
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        waits = [group.create_task(trainers.memory.wait_room(key)) for key in (2, 1)]
        await settle()
        trainers.review(COME_BACK_S + 0.5, threshold=50)  # the first does not wait
        await settle()
        assert [task.done() for task in waits] == [False, True]
        first = group.create_task(trainers.memory.wait_room(0))
        await settle()
        trainers.review(10.0, threshold=50)  # nobody overtakes one that is too large as yet
        await settle()
        assert not waits[0].done()
        first.cancel()
        await settle()
        trainers.review(COME_BACK_S + 0.5, threshold=50)


async def test_one_that_came_back_too_early_waits_longer_each_time() -> None:
    trainers = Trainers(None)
    clock, memory = trainers.clock, trainers.memory

    async def wait() -> float:
        began_s = clock.now_s
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            back = group.create_task(memory.wait_room(0))
            await settle()
            while not back.done():
                trainers.review(threshold=10)
                await settle()
        memory.take_up(0)
        return clock.now_s - began_s

    memory.set_down(0, 1)
    waited = []
    for _ in range(9):
        waited.append(await wait())
        clock.now_s += STEADY_S - 0.5
        memory.set_down(0, 1)
    longest = [COME_BACK_S * 2**n for n in range(6)] + [MOST_COME_BACK_S] * 3
    assert waited == [seconds + 0.5 for seconds in longest]
    await wait()
    clock.now_s += STEADY_S
    memory.set_down(0, 1)
    assert await wait() == COME_BACK_S + 0.5
