"""What is live: on disk and in memory together, whatever happens in between."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest

from cotune.cache.manager import KVCacheManager
from cotune.runtime.adapters import AdapterStore
from cotune.runtime.errors import (
    AdapterLoadError,
    ConfigError,
    ConflictError,
    IterationError,
    NotFoundError,
    StorageError,
)
from cotune.runtime.learning.publisher import STAYS_HOT, WARM_TOKENS, Publisher
from cotune.runtime.learning.versions import VersionStore
from cotune.runtime.lora import LoraWeights
from cotune.runtime.types import BASE, AdapterVersion
from publications import manifest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from cotune.runtime.background import Background

NAME = "tutor"


class FakeBackground:
    """Notes what is prefilled. It can be held, and it can fail."""

    def __init__(self) -> None:
        self.prefilled: list[tuple[AdapterVersion, tuple[int, ...]]] = []
        self.failure: Exception | None = None
        self.begun = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def prefill(self, version: AdapterVersion, token_ids: Sequence[int]) -> None:
        self.begun.set()
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        self.prefilled.append((version, tuple(token_ids)))


class Stage:
    """A publisher with everything real but the engine and the weights."""

    def __init__(self, root: Path, *, warm: bool = True) -> None:
        self.versions = VersionStore(root)
        self.cache = KVCacheManager(64, 4)
        self.adapters = AdapterStore(
            4,
            learned_names=(NAME,),
            on_retired=self.cache.drop_namespace,
            on_returned=self.cache.revive_namespace,
        )
        self.background = FakeBackground()
        self.read_paths: list[Path] = []
        self.publisher = self.make(warm=warm)

    def make(self, *, warm: bool = True) -> Publisher:
        background: Background = self.background  # type: ignore[assignment]
        return Publisher(
            NAME,
            versions=self.versions,
            adapters=self.adapters,
            cache=self.cache,
            background=background,
            read=self.read,
            warm=warm,
        )

    def read(self, path: Path) -> LoraWeights:
        self.read_paths.append(path)
        if not (path / "weights").exists():
            raise AdapterLoadError(f"{path} is damaged")
        return LoraWeights(1, {})

    def write(self, *, refused: bool = False) -> int:
        number = self.versions.next_number(NAME)

        def save(directory: Path) -> None:
            (directory / "weights").touch()

        reasons = ("entropy",) if refused else ()
        self.versions.write(NAME, number, save, manifest(reasons=reasons), refused=refused)
        return number

    async def publish(self) -> int:
        number = self.write()
        async with self.publisher.held(number) as version:
            changes = self.publisher.changes
            assert await self.publisher.publish(version, "better", changes=changes)
        self.check(number)
        return number

    def use(self, version: AdapterVersion, tokens: Sequence[int], times: int = 1) -> None:
        """Have requests of `version` with this prompt come and go."""
        for _ in range(times):
            pages = self.cache.open(version, tokens)
            assert self.cache.reserve(pages, len(tokens))
            self.cache.record(pages, tokens, len(tokens))
            self.cache.close(pages)

    @property
    def held(self) -> set[int]:
        return {info.version.version for info in self.adapters.list()}

    def check(self, live: int) -> None:
        """Disk, store and publisher agree on what is live."""
        assert self.versions.live(NAME) == live
        expected = AdapterVersion(NAME, live) if live else BASE
        assert self.publisher.live == expected
        assert self.adapters.resolve(NAME) == expected
        self.adapters.check_integrity()
        self.cache.check_integrity()


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path / "adapters")
    yield stage
    stage.versions.close()


async def test_versions_go_live_one_after_the_other_and_the_one_before_stays_in_memory(
    stage: Stage,
) -> None:
    await stage.publisher.start()
    stage.check(0)
    for number in range(1, 5):
        assert await stage.publish() == number
        assert stage.held == {number, number - 1} - {0}
    assert stage.publisher.changes == 4
    assert [change.why for change in stage.versions.history(NAME)] == ["better"] * 4


async def test_hot_prefixes_of_the_live_version_are_prefilled_before_the_new_one_is_live(
    stage: Stage,
) -> None:
    hot, cold = tuple(range(10, 22)), tuple(range(30, 42))
    stage.use(BASE, [*hot, 1], times=2)
    stage.use(BASE, [*cold, 1])
    number = stage.write()
    stage.background.gate.clear()
    async with asyncio.TaskGroup() as group, stage.publisher.held(number) as version:
        changes = stage.publisher.changes
        task = group.create_task(stage.publisher.publish(version, "better", changes=changes))
        await stage.background.begun.wait()
        stage.check(0)  # not before its prefixes are there
        stage.background.gate.set()
        assert await task
    stage.check(number)
    assert stage.background.prefilled == [(version, hot)]
    # The next one takes over what is hot under this one, and first.
    stage.use(version, [*cold, 1], times=2)
    await stage.publish()
    second = AdapterVersion(NAME, 2)
    assert stage.background.prefilled[1:] == [(second, cold), (second, hot)]


async def test_what_is_not_asked_for_any_more_is_prefilled_for_a_while_and_then_no_longer(
    stage: Stage,
) -> None:
    hot = tuple(range(10, 22))
    stage.use(BASE, [*hot, 1], times=2)
    numbers = [await stage.publish() for _ in range(STAYS_HOT + 3)]
    prefilled = [version.version for version, _ in stage.background.prefilled]
    assert prefilled == numbers[: STAYS_HOT + 1]


async def test_a_beginning_that_prefixes_share_counts_once_towards_the_limit(
    tmp_path: Path,
) -> None:
    stage = Stage(tmp_path)
    stage.cache = KVCacheManager(WARM_TOKENS, 4)
    stage.publisher = stage.make()
    shared = range(WARM_TOKENS // 2)
    for ending in range(20):
        stage.use(BASE, [*shared, *[ending] * 4, 1], times=2)
    await stage.publish()
    assert len(stage.background.prefilled) == 20
    stage.versions.close()


async def test_no_more_is_prefilled_than_the_limit(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.cache = KVCacheManager(2 * WARM_TOKENS // 4, 4)
    stage.publisher = stage.make()
    for start in range(20):
        stage.use(BASE, [start, *range(512)], times=2)
    await stage.publish()
    total = sum(len(tokens) for _, tokens in stage.background.prefilled)
    assert WARM_TOKENS - 512 <= total <= WARM_TOKENS
    stage.versions.close()


async def test_without_warming_nothing_is_prefilled(tmp_path: Path) -> None:
    stage = Stage(tmp_path, warm=False)
    stage.use(BASE, range(9), times=3)
    await stage.publish()
    assert stage.background.prefilled == []
    stage.versions.close()


async def test_a_warm_up_that_fails_costs_only_the_warmth(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    stage.use(BASE, range(9), times=2)
    stage.background.failure = IterationError("the device failed")
    number = await stage.publish()
    stage.check(number)
    assert "prefixes could not be prefilled under tutor@1" in caplog.text


async def test_a_mistake_in_the_warm_up_is_not_hidden(stage: Stage) -> None:
    stage.use(BASE, range(9), times=2)
    stage.background.failure = ZeroDivisionError("a bug")
    with pytest.RaisesGroup(ZeroDivisionError):
        await stage.publish()
    stage.check(0)


async def test_a_promotion_during_the_warm_up_wins(stage: Stage) -> None:
    first = await stage.publish()
    other = stage.write()
    candidate = stage.write()
    stage.use(stage.publisher.live, range(9), times=2)
    stage.background.begun.clear()
    stage.background.gate.clear()
    async with asyncio.TaskGroup() as group, stage.publisher.held(candidate) as version:
        changes = stage.publisher.changes
        task = group.create_task(stage.publisher.publish(version, "better", changes=changes))
        await stage.background.begun.wait()
        record = await stage.publisher.promote(other, force=False)
        assert record is not None
        assert record.is_live
        stage.background.gate.set()
        assert await task is False
    stage.check(other)
    assert stage.held == {first, other}
    assert [change.number for change in stage.versions.history(NAME)] == [first, other]


async def test_going_back_leads_to_what_was_live_before_and_in_the_end_to_the_base_model(
    stage: Stage,
) -> None:
    one, two, three = [await stage.publish() for _ in range(3)]
    read = len(stage.read_paths)
    record = await stage.publisher.rollback(three)
    assert record is not None
    assert (record.number, record.is_live) == (two, True)
    stage.check(two)
    assert len(stage.read_paths) == read, "it was in memory"
    record = await stage.publisher.rollback(two)
    assert record is not None
    assert record.number == one
    stage.check(one)
    assert await stage.publisher.rollback(one) is None
    stage.check(0)
    assert stage.publisher.changes == 6


async def test_only_what_is_live_can_be_taken_back(stage: Stage) -> None:
    one, two = [await stage.publish() for _ in range(2)]
    with pytest.raises(ConflictError, match="tutor@1 is not live, tutor@2 is") as conflict:
        await stage.publisher.rollback(one)
    assert conflict.value.code == "version_not_live"
    with pytest.raises(NotFoundError, match="no version 9; versions: 1, 2"):
        await stage.publisher.rollback(9)
    stage.check(two)
    await stage.publisher.promote(0, force=False)
    with pytest.raises(ConflictError, match="tutor@0 is not live, the base model is"):
        await stage.publisher.rollback(0)


async def test_the_base_model_can_be_promoted_and_taken_over_again(stage: Stage) -> None:
    number = await stage.publish()
    assert await stage.publisher.promote(0, force=False) is None
    stage.check(0)
    assert stage.held == {number}, "the way back is kept warm"
    record = await stage.publisher.promote(number, force=False)
    assert record is not None
    stage.check(number)


async def test_promoting_what_is_live_changes_nothing(stage: Stage) -> None:
    one, two = [await stage.publish() for _ in range(2)]
    record = await stage.publisher.promote(two, force=False)
    assert record is not None
    assert record.is_live
    assert stage.publisher.changes == 2
    assert stage.held == {one, two}
    record = await stage.publisher.rollback(two)
    assert record is not None
    assert record.number == one


async def test_what_the_gate_refused_needs_force(stage: Stage) -> None:
    number = stage.write(refused=True)
    with pytest.raises(ConflictError, match=r"tutor@1 was refused by the gate \(entropy\)") as no:
        await stage.publisher.promote(number, force=False)
    assert no.value.code == "version_refused"
    stage.check(0)
    record = await stage.publisher.promote(number, force=True)
    assert record is not None
    assert record.state == "refused"
    stage.check(number)


async def test_an_unknown_version_is_refused_and_leaves_no_trace(stage: Stage) -> None:
    live = await stage.publish()
    with pytest.raises(NotFoundError) as error:
        await stage.publisher.promote(7, force=True)
    assert error.value.param == "version"
    with pytest.raises(NotFoundError):
        async with stage.publisher.held(7):
            pytest.fail("it was found")
    stage.check(live)


async def test_damaged_files_are_refused_and_leave_no_trace(stage: Stage) -> None:
    live = await stage.publish()
    broken = stage.write()
    (stage.versions.path(NAME, broken) / "weights").unlink()
    with pytest.raises(AdapterLoadError, match="is damaged"):
        await stage.publisher.promote(broken, force=False)
    stage.check(live)
    assert stage.held == {live}


async def test_a_version_is_held_as_long_as_anybody_holds_it_and_read_once(stage: Stage) -> None:
    number = stage.write()
    async with stage.publisher.held(0) as base:
        assert base == BASE
    async with stage.publisher.held(number), stage.publisher.held(number):
        assert stage.held == {number}
    assert stage.held == set()
    assert len(stage.read_paths) == 1


async def test_two_that_want_a_version_from_disk_at_once_both_get_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = stage.write()
    both_read = threading.Barrier(2, timeout=60.0)
    read = stage.read

    def slow_read(path: Path) -> LoraWeights:
        both_read.wait()
        return read(path)

    monkeypatch.setattr(stage.publisher, "_read", slow_read)

    async def hold() -> AdapterVersion:
        async with stage.publisher.held(number) as version:
            stage.adapters.check_integrity()
            return version

    versions = await asyncio.gather(hold(), hold())
    assert set(versions) == {AdapterVersion(NAME, number)}
    assert stage.held == set()


async def test_a_full_disk_leaves_what_was_live(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = await stage.publish()
    number = stage.write()
    with monkeypatch.context() as patch:
        patch.setattr(stage.versions, "set_live", _fails)
        with pytest.raises(StorageError):
            await stage.publisher.promote(number, force=False)
    stage.check(live)
    await stage.publisher.promote(number, force=False)
    stage.check(number)


def _fails(_adapter: str, _number: int, _why: str) -> None:
    raise StorageError("the disk is full")


async def test_a_caller_who_is_cancelled_does_not_set_memory_and_disk_at_odds(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stage.publish()
    number = stage.write()
    is_writing, may_write = threading.Event(), threading.Event()
    set_live = stage.versions.set_live

    def slow(adapter: str, number: int, why: str) -> None:
        is_writing.set()
        assert may_write.wait(60.0)
        set_live(adapter, number, why)

    monkeypatch.setattr(stage.versions, "set_live", slow)
    task = asyncio.ensure_future(stage.publisher.promote(number, force=False))
    assert await asyncio.to_thread(is_writing.wait, 60.0)
    task.cancel()
    may_write.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    stage.check(number)


async def test_a_restart_finds_what_was_live(stage: Stage) -> None:
    await stage.publish()
    live = await stage.publish()
    stage.versions.close()
    again = Stage(stage.versions._root)
    await again.publisher.start()
    again.check(live)
    assert again.held == {live}
    assert again.publisher.changes == 0
    again.versions.close()


async def test_a_start_without_the_live_versions_files_says_what_to_do(stage: Stage) -> None:
    live = await stage.publish()
    path = stage.versions.path(NAME, live)
    stage.versions.close()
    path.rename(path.with_name("moved"))
    again = Stage(stage.versions._root)
    with pytest.raises(ConfigError, match=r"tutor@1 is live, but not in .* promote another"):
        await again.publisher.start()
    again.versions.close()
