"""The feedback store against kill -9, full disks and damaged files.

What was acknowledged is there, once, whatever happened; what could not be stored was not
acknowledged, and the store goes on when the disk does.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from cotune.runtime.errors import ConfigError, StorageError
from cotune.runtime.learning.config import FeedbackConfig
from cotune.runtime.learning.events import Preference, Rating
from cotune.runtime.learning.sqlite_store import SqliteBackend
from cotune.runtime.learning.store import FeedbackStore
from feedback_values import ADAPTER, PROMPT, Clock, open_store, pair, rated, response

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

WRITER = """
    import asyncio, sys
    from pathlib import Path
    from cotune.runtime.learning.events import Rating
    from feedback_values import open_store, rated, response
    from cotune.runtime.learning.config import FeedbackConfig

    async def add(store, adder, life):
        for i in range(10**6):
            name = f"{life}-{adder}-{i}"
            store.record(response(name))
            event = Rating(id=name, response_id=name, rating=1)
            await store.add(event, source=f"s{adder}", samples=[rated()])
            print(name, flush=True)

    async def main(path, life):
        config = FeedbackConfig(quota_events=10**9)
        async with open_store(Path(path), config) as store, asyncio.TaskGroup() as group:
            for adder in range(8):
                group.create_task(add(store, adder, life))

    asyncio.run(main(*sys.argv[1:]))
"""


def start(script: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, args)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


async def test_nothing_acknowledged_is_lost_or_doubled_by_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "feedback.sqlite"
    acknowledged: list[str] = []
    # The moments are spread over the work of a group: right after an acknowledgement that was read,
    # or some acknowledgements later, while the next groups are under way.
    chosen = random.Random(7)
    for life, reads in enumerate([1, 2, *(chosen.randrange(3, 200) for _ in range(4))]):
        with start(WRITER, path, life) as writer:
            assert writer.stdout is not None
            acknowledged += [name.strip() for name in itertools.islice(writer.stdout, reads)]
            writer.send_signal(signal.SIGKILL)
            # What was printed before the end counts; a line that was cut off does not.
            acknowledged += [line.strip() for line in writer.stdout if line.endswith("\n")]
        assert writer.returncode == -signal.SIGKILL
        config = FeedbackConfig(quota_events=10**9)
        async with open_store(path, config) as store:
            stored = Counter([str(row["id"]) async for row in store.export()])
            assert not set(acknowledged) - set(stored)
            assert set(stored.values()) == {1}
            samples = await store.pending(ADAPTER, 10**6)
            assert len(samples) == len(stored), "an event and its sample are one transaction"
            last = acknowledged[-1]
            event = Rating(id=last, response_id=last, rating=1)
            again = await store.add(event, source=f"s{last.split('-')[1]}", samples=[rated()])
            assert again.duplicate
            assert (await store.response(last)).id == last, "recorded before its rating"
    assert len(acknowledged) > 100


class SmallDisk(SqliteBackend):
    """A disk with room for as many pages as the test says."""

    pages = 2**30

    @contextlib.contextmanager
    def transaction(self, *, durable: bool) -> Iterator[None]:
        self._connection.execute(f"PRAGMA max_page_count = {self.pages}")
        with super().transaction(durable=durable):
            yield


async def add_text(store: FeedbackStore, name: str, size: int) -> bool:
    event = Preference(id=name, prompt=PROMPT, chosen=name + "x" * size, rejected="no")
    return (await store.add(event, source="ann", samples=[pair()])).duplicate


async def test_a_full_disk_acknowledges_nothing_and_the_store_goes_on_with_space(
    tmp_path: Path,
) -> None:
    disks: list[SmallDisk] = []

    def make() -> SmallDisk:
        disks.append(SmallDisk(tmp_path / "feedback.sqlite"))
        return disks[0]

    async with FeedbackStore(make, FeedbackConfig(), clock=Clock()) as store:
        assert not await add_text(store, "before", 10)
        disks[0].pages = 1  # SQLite takes that as: no more than there are
        outcomes = await asyncio.gather(
            *(add_text(store, f"e{i}", 100_000) for i in range(4)), return_exceptions=True
        )
        for outcome in outcomes:
            assert isinstance(outcome, StorageError)
            assert "full" in outcome.message
            assert "free space" in outcome.message
        store.record(response("r1", text="x" * 100_000))
        assert [row["id"] async for row in store.export()] == ["before"], "it can be read"
        assert store.counts().events == {"preference": 1}
        assert store.counts().dropped_responses == 1
        assert store.counts().refused == {"storage_failed": 4}
        assert await add_text(store, "before", 10), "sent again it is still a duplicate"

        disks[0].pages = 2**30
        for i in range(4):
            assert not await add_text(store, f"e{i}", 100_000)
        assert len([row async for row in store.export()]) == 5


async def test_one_text_too_large_for_the_disk_takes_no_other_event_with_it(
    tmp_path: Path,
) -> None:
    disks: list[SmallDisk] = []

    def make() -> SmallDisk:
        disks.append(SmallDisk(tmp_path / "feedback.sqlite"))
        return disks[0]

    async with FeedbackStore(make, FeedbackConfig(), clock=Clock()) as store:
        disks[0].pages = 60
        outcomes = await asyncio.gather(
            add_text(store, "small", 10),
            add_text(store, "large", 1_000_000),
            add_text(store, "small too", 10),
            return_exceptions=True,
        )
        assert [type(outcome) for outcome in outcomes] == [bool, StorageError, bool]
        assert [row["id"] async for row in store.export()] == ["small", "small too"]


LIMITED_WRITER = """
    import asyncio, resource, sys
    from pathlib import Path
    from cotune.runtime.errors import StorageError
    from cotune.runtime.learning.events import Rating
    from feedback_values import open_store, rated

    async def main(path):
        async with open_store(Path(path)) as store:
            unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, unlimited[1]))
            for i in range(500):
                event = Rating(id=str(i), response_id=str(i), rating=1, comment="x" * 4000)
                try:
                    await store.add(event, source="ann", samples=[rated()])
                except StorageError as error:
                    print("refused", i, error.code, flush=True)
                    break
                print("stored", i, flush=True)
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
            await store.add(event, source="ann", samples=[rated()])
            print("stored", i, flush=True)

    asyncio.run(main(sys.argv[1]))
"""


async def test_a_write_that_the_system_refuses_is_not_acknowledged(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    path = tmp_path / "feedback.sqlite"
    with start(LIMITED_WRITER, path) as writer:
        output, _ = writer.communicate()
    assert writer.returncode == 0
    lines = [line.split() for line in output.splitlines()]
    assert [line for line in lines if line[0] == "refused"] == [
        ["refused", lines[-1][1], "storage_failed"]
    ]
    stored = [line[1] for line in lines if line[0] == "stored"]
    async with open_store(path) as store:
        rows = [row async for row in store.export()]
    assert [row["id"] for row in rows] == stored
    assert len(stored) > 10


async def fill(path: Path) -> None:
    async with open_store(path) as store:
        for i in range(100):
            await add_text(store, f"e{i}", 2000)


def overwrite_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"not a database, " * 8)


def overwrite_pages(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        for offset in range(4096, size, 4096):
            file.seek(offset)
            file.write(b"\xff" * 512)


def cut_off(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [overwrite_header, overwrite_pages, cut_off])
async def test_a_damaged_file_is_refused_with_the_remedy_and_left_as_it_is(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    path = tmp_path / "feedback.sqlite"
    await fill(path)
    damage(path)
    content = path.read_bytes()
    with pytest.raises(ConfigError, match=r"feedback\.sqlite is damaged: .*put back a copy"):
        await open_store(path).__aenter__()
    assert path.read_bytes() == content


async def test_a_file_of_a_newer_version_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "feedback.sqlite"
    await fill(path)
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE meta SET value = 1000 WHERE name = 'version'")
    connection.close()
    with pytest.raises(ConfigError, match=r"version 1000.*use the newer cotune"):
        await open_store(path).__aenter__()
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT value FROM meta").fetchall() == [(1000,)]
    assert connection.execute("SELECT count(*) FROM events").fetchall() == [(100,)]
    connection.close()


async def test_a_file_that_another_process_has_open_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "feedback.sqlite"
    with start(WRITER, path, 0) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        try:
            with pytest.raises(ConfigError, match="in use by another process; stop that"):
                await open_store(path).__aenter__()
        finally:
            writer.kill()
    async with open_store(path) as store:
        assert store.counts().events["rating"] >= 1


async def test_an_empty_file_becomes_a_store(tmp_path: Path) -> None:
    (tmp_path / "feedback.sqlite").touch()
    await fill(tmp_path / "feedback.sqlite")


async def test_a_rating_and_its_sample_are_stored_together_or_not_at_all(tmp_path: Path) -> None:
    broken = rated()
    object.__setattr__(broken, "prompt_ids", (-1,))  # no token id: the insert of it fails
    async with open_store(tmp_path / "feedback.sqlite") as store:
        event = Rating(id="e1", response_id="r1", rating=1)
        with pytest.raises(OverflowError):
            await store.add(event, source="ann", samples=[rated(), broken])
        assert store.counts().events == {}
        assert not any((await store.states(ADAPTER)).values())
        assert not (await store.add(event, source="ann", samples=[rated()])).duplicate
