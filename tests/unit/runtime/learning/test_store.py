from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cotune.runtime.errors import (
    ConfigError,
    ConflictError,
    DrainingError,
    NotFoundError,
    OverloadedError,
    RequestError,
    StorageError,
)
from cotune.runtime.learning.config import FeedbackConfig
from cotune.runtime.learning.events import Edit, Preference, Rating, Withdrawal
from cotune.runtime.learning.quota import Quota
from cotune.runtime.learning.samples import PreferencePair, RatedCompletion
from cotune.runtime.learning.sqlite_store import SqliteBackend
from cotune.runtime.learning.store import (
    MAX_WITHDRAWAL_DEPTH,
    STATES,
    FeedbackStore,
    NewSample,
)
from feedback_values import ADAPTER, PROMPT, Clock, open_store, pair, rated, response

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from cotune.runtime.learning.events import Acknowledgement


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "feedback.sqlite"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store(path: Path, clock: Clock) -> AsyncIterator[FeedbackStore]:
    async with open_store(path, clock=clock) as store:
        yield store


def rating(event_id: str, value: Any = 1, response_id: str = "r1") -> Rating:
    return Rating(id=event_id, response_id=response_id, rating=value)


async def rate(store: FeedbackStore, source: str, event_id: str, value: Any = 1) -> Acknowledgement:
    return await store.add(rating(event_id, value), source=source, samples=[rated(value > 0)])


async def prefer(store: FeedbackStore, event_id: str, *, held_out: bool = False) -> None:
    event = Preference(id=event_id, prompt=PROMPT, chosen=event_id, rejected="Far.")
    await store.add(event, source="ann", samples=[pair(held_out=held_out)])


async def withdraw(store: FeedbackStore, source: str, event_id: str, target: str) -> None:
    await store.add(Withdrawal(id=event_id, target=target), source=source, samples=())


async def states(store: FeedbackStore) -> dict[str, int]:
    """Those that are not 0."""
    return {name: count for name, count in (await store.states(ADAPTER)).items() if count}


async def keys(store: FeedbackStore, **kwargs: Any) -> list[int]:
    arguments = {"held_out": False, "limit": 100} | kwargs
    return [sample.key for sample in await store.samples(ADAPTER, **arguments)]


class GatedBackend(SqliteBackend):
    """Waits at the start of each transaction while the test holds the gate; fails where it says."""

    fail_add: Callable[[], Exception | None] = staticmethod(lambda: None)
    fail_counts: Callable[[], Exception | None] = staticmethod(lambda: None)

    def __init__(self, path: Path, on_begin: Callable[[], object]) -> None:
        super().__init__(path)
        self._on_begin = on_begin
        self.gate = threading.Event()
        self.gate.set()
        self.groups: list[bool] = []

    @contextlib.contextmanager
    def transaction(self, *, durable: bool) -> Iterator[None]:
        self.groups.append(durable)
        self._on_begin()
        self.gate.wait()
        with super().transaction(durable=durable):
            yield

    def add(self, *args: Any, **kwargs: Any) -> None:
        super().add(*args, **kwargs)
        if error := self.fail_add():
            raise error

    def counts(self) -> Any:
        if error := self.fail_counts():
            raise error
        return super().counts()


class Gated:
    """A store whose writer the test can hold up."""

    def __init__(self, path: Path, config: FeedbackConfig) -> None:
        self.backends: list[GatedBackend] = []
        self._has_begun = asyncio.Event()
        loop = asyncio.get_running_loop()

        def make() -> GatedBackend:
            begin = functools.partial(loop.call_soon_threadsafe, self._has_begun.set)
            self.backends.append(GatedBackend(path, begin))
            return self.backends[0]

        self.store = FeedbackStore(make, config, clock=Clock())

    async def hold(self) -> asyncio.Task[object]:
        """Close the gate and wait until the writer stands before it, with a call of this task."""
        self._has_begun.clear()
        self.backends[0].gate.clear()
        task: asyncio.Task[object] = asyncio.ensure_future(self.store.states("nobody"))
        await self._has_begun.wait()
        return task

    def let_go(self) -> None:
        self.backends[0].gate.set()

    async def let_go_to_the_next(self) -> None:
        """Open the gate and wait until the writer has taken the group after the one it holds.

        What is handed in later is not in it.
        """
        self._has_begun.clear()
        self.let_go()
        await self._has_begun.wait()


# -- responses -----------------------------------------------------------------------------------


async def test_a_recorded_response_is_found_as_it_was(store: FeedbackStore) -> None:
    store.record(response())
    found = await store.response("r1")
    assert found.prompt_ids == (1, 2, 2**31)
    assert found.sampling == {"temperature": 0.5, "seed": None, "logit_bias": {"3": 1.0}}
    assert replace(found, sampling=response().sampling) == response()
    assert store.counts().recorded_responses == 1


async def test_an_unknown_and_an_expired_response_are_not_found(
    store: FeedbackStore, clock: Clock
) -> None:
    store.record(response())
    clock.pass_s(FeedbackConfig().response_retention_s + 1)
    for response_id in ("r1", "r2"):
        with pytest.raises(NotFoundError, match="response_retention_s") as refused:
            await store.response(response_id)
        assert refused.value.param == "response_id"
        assert refused.value.code == "response_not_found"
    assert store.counts().refused == {"response_not_found": 2}
    assert store.counts().recorded_responses == 1
    assert await store.expire() == 0
    assert store.counts().recorded_responses == 0


async def test_of_too_many_responses_the_oldest_go(path: Path) -> None:
    async with open_store(path, FeedbackConfig(max_responses=2)) as store:
        for i in range(4):
            store.record(response(f"r{i}"))
        store.record(response("r2", text="Nearer."))  # the same id again: now the newest
        store.record(response("r4"))
        assert (await store.response("r2")).text == "Nearer."
        assert (await store.response("r4")).text == "Far."
        with pytest.raises(NotFoundError):
            await store.response("r3")
        assert store.counts().recorded_responses == 2


async def test_a_response_that_cannot_be_stored_is_dropped_alone(
    store: FeedbackStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.record(response("r1"))
    store.record(response("r2", text="\ud800"))
    store.record(response("r3"))
    assert (await store.response("r1")).id == "r1"
    assert (await store.response("r3")).id == "r3"
    assert store.counts().dropped_responses == 1
    assert "a response could not be recorded" in caplog.text


# -- events --------------------------------------------------------------------------------------


async def test_the_same_frame_again_is_a_duplicate_that_changes_nothing(
    store: FeedbackStore,
) -> None:
    assert not (await rate(store, "ann", "e1")).duplicate
    seen = store.changes
    assert (await rate(store, "ann", "e1")).duplicate
    assert not (await rate(store, "bob", "e1")).duplicate, "ids are a source's own"
    assert await states(store) == {"pending": 2}
    assert store.counts().events == {"rating": 2}
    assert store.counts().duplicates == 1
    assert store.changes == seen + 1


async def test_another_frame_under_the_same_id_is_refused(store: FeedbackStore) -> None:
    await rate(store, "ann", "e1")
    with pytest.raises(ConflictError, match=r"id is 'e1'.*another rating event") as refused:
        await rate(store, "ann", "e1", -1)
    assert (refused.value.param, refused.value.code) == ("id", "id_reused")
    assert await states(store) == {"pending": 1}
    assert store.counts().refused == {"id_reused": 1}


async def test_a_source_without_a_name_is_refused(store: FeedbackStore) -> None:
    with pytest.raises(RequestError, match="source is empty"):
        await rate(store, "", "e1")
    assert store.counts().events == {}


async def test_a_later_event_about_the_same_replaces_the_earlier_one(
    store: FeedbackStore,
) -> None:
    await rate(store, "ann", "e1", 1)
    await rate(store, "ann", "e2", -1)
    await store.add(
        Edit(id="e3", response_id="r1", text="Very far."), source="ann", samples=[pair()]
    )
    assert await states(store) == {"superseded": 1, "pending": 2}
    assert [sample.key for sample in await store.pending(ADAPTER, 9)] == [2, 3]


async def test_withdrawing_brings_back_what_was_replaced(store: FeedbackStore) -> None:
    for i, value in enumerate((1, -1, 1)):
        await rate(store, "ann", f"e{i}", value)
    await withdraw(store, "ann", "w1", "e1")
    assert await states(store) == {"withdrawn": 1, "superseded": 1, "pending": 1}
    await withdraw(store, "ann", "w2", "e2")
    assert await states(store) == {"withdrawn": 2, "pending": 1}
    assert [sample.key for sample in await store.pending(ADAPTER, 9)] == [1]
    await rate(store, "ann", "e3", -1)
    assert await states(store) == {"withdrawn": 2, "superseded": 1, "pending": 1}


async def test_a_withdrawal_can_be_withdrawn_but_not_for_ever(store: FeedbackStore) -> None:
    await rate(store, "ann", "e")
    target = "e"
    for i in range(MAX_WITHDRAWAL_DEPTH):
        await withdraw(store, "ann", f"w{i}", target)
        assert await states(store) == ({"pending": 1} if i % 2 else {"withdrawn": 1})
        target = f"w{i}"
    with pytest.raises(ConflictError, match="chain of 8") as refused:
        await withdraw(store, "ann", "w", target)
    assert refused.value.code == "withdrawn_too_often"
    assert await states(store) == {"pending": 1}


async def test_only_ones_own_events_can_be_withdrawn(store: FeedbackStore) -> None:
    await rate(store, "ann", "e1")
    with pytest.raises(NotFoundError, match="target is 'e1'") as refused:
        await withdraw(store, "bob", "w1", "e1")
    assert refused.value.param == "target"
    assert store.counts().events == {"rating": 1}


async def test_ratings_of_one_response_count_by_the_sign_of_their_sum(
    store: FeedbackStore,
) -> None:
    await rate(store, "ann", "e", 1)
    await rate(store, "bob", "e", -1)
    assert await states(store) == {"contradictory": 2}
    await rate(store, "eve", "e", 1)
    assert await states(store) == {"pending": 2, "contradictory": 1}
    assert [s.source for s in await store.pending(ADAPTER, 9)] == ["ann", "eve"]
    await withdraw(store, "ann", "w", "e")
    assert await states(store) == {"contradictory": 2, "withdrawn": 1}
    await rate(store, "bob", "e2", 1)
    assert await states(store) == {"pending": 2, "superseded": 1, "withdrawn": 1}


async def test_more_events_than_the_quota_are_refused_until_the_window_has_passed(
    path: Path, clock: Clock
) -> None:
    config = FeedbackConfig(quota_events=2, quota_window_s=60.0)
    async with open_store(path, config, clock) as store:
        await rate(store, "ann", "e1")
        clock.pass_s(20)
        await rate(store, "ann", "e2")
        with pytest.raises(OverloadedError, match="quota_events") as refused:
            await rate(store, "ann", "e3")
        assert refused.value.code == "quota_exceeded"
        assert refused.value.retry_after_s == pytest.approx(40.0)
        await rate(store, "bob", "e1")
        assert (await rate(store, "ann", "e1")).duplicate, "sending again is free"
    async with open_store(path, config, clock) as store:  # a restart forgets nobody
        with pytest.raises(OverloadedError):
            await rate(store, "ann", "e3")
        clock.pass_s(40)
        await rate(store, "ann", "e3")
        with pytest.raises(OverloadedError) as refused:
            await rate(store, "ann", "e4")
        assert refused.value.retry_after_s == pytest.approx(20.0)


def test_a_quota_gives_back_what_was_not_stored() -> None:
    quota = Quota(2, 60.0)
    quota.take("ann", 0.0)
    quota.keep()
    quota.take("ann", 1.0)
    quota.undo()
    quota.take("ann", 2.0)
    with pytest.raises(OverloadedError):
        quota.take("ann", 3.0)
    quota.sweep(70.0)
    quota.undo()  # of what has been let go in the meantime
    quota.take("ann", 70.0)


def test_a_quota_survives_a_clock_that_is_set_back() -> None:
    quota = Quota(1, 60.0)
    quota.take("ann", 1000.0)
    quota.take("ann", 10.0)
    with pytest.raises(OverloadedError):
        quota.take("ann", 11.0)


# -- samples -------------------------------------------------------------------------------------


async def test_a_sample_is_pending_until_its_reference_is_known(store: FeedbackStore) -> None:
    await prefer(store, "e1")
    await rate(store, "bob", "e2", -1)
    expected_pair = PreferencePair(
        key=1,
        adapter=ADAPTER,
        source="ann",
        prompt_ids=(1, 2),
        chosen_ids=(3, 4),
        rejected_ids=(5,),
    )
    expected_rated = RatedCompletion(
        key=2,
        adapter=ADAPTER,
        source="bob",
        prompt_ids=(1, 2),
        completion_ids=(3,),
        is_desirable=False,
    )
    assert await store.pending(ADAPTER, 9) == (expected_pair, expected_rated)
    assert await store.pending(ADAPTER, 1) == (expected_pair,)
    assert await store.pending("other", 9) == ()
    assert await keys(store) == []
    await store.set_reference([(1, -2.5, -3.0), (2, -1.0, None), (99, -1.0, None)])
    assert await store.pending(ADAPTER, 9) == ()
    ready_pair, ready_rated = await store.samples(ADAPTER, held_out=False, limit=9)
    assert isinstance(ready_pair, PreferencePair)
    assert isinstance(ready_rated, RatedCompletion)
    assert (ready_pair.ref_chosen_logp, ready_pair.ref_rejected_logp) == (-2.5, -3.0)
    assert ready_rated.ref_logp == -1.0


async def test_a_reference_that_is_not_finite_is_refused(store: FeedbackStore) -> None:
    await prefer(store, "e1")
    with pytest.raises(ValueError, match="sample 1 are nan"):
        await store.set_reference([(1, float("nan"), 0.0)])
    assert await states(store) == {"pending": 1}


async def test_the_latest_ready_samples_come_oldest_first_and_held_out_ones_apart(
    store: FeedbackStore,
) -> None:
    for i in range(6):
        await prefer(store, f"e{i}", held_out=i % 3 == 2)
    await store.set_reference([(key, -1.0, -1.0) for key in range(1, 7)])
    assert await keys(store) == [1, 2, 4, 5]
    assert await keys(store, limit=2) == [4, 5]
    assert await keys(store, limit=2, after_key=1) == [4, 5]
    assert await keys(store, after_key=2) == [4, 5]
    assert await keys(store, held_out=True) == [3, 6]
    assert await store.states(ADAPTER) == dict.fromkeys(STATES, 0) | {"ready": 4, "held_out": 2}


async def test_a_refused_sample_is_never_offered_again(store: FeedbackStore) -> None:
    await prefer(store, "e1")
    await store.refuse_sample(1, "too large for memory")
    await store.set_reference([(1, -1.0, -1.0)])
    assert await states(store) == {"refused": 1}
    await withdraw(store, "ann", "w1", "e1")
    assert await states(store) == {"withdrawn": 1}
    await withdraw(store, "ann", "w2", "w1")
    assert await states(store) == {"refused": 1}


async def test_a_withdrawn_sample_keeps_its_reference_for_when_it_comes_back(
    store: FeedbackStore,
) -> None:
    await prefer(store, "e1")
    await withdraw(store, "ann", "w1", "e1")
    await store.set_reference([(1, -1.0, -2.0)])  # it was on its way
    await store.refuse_sample(99, "nobody")
    assert await states(store) == {"withdrawn": 1}
    await withdraw(store, "ann", "w2", "w1")
    assert await keys(store) == [1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "pair", "chosen_ids": (1,)},
        {"kind": "pair", "chosen_ids": (1,), "rejected_ids": (2,), "is_desirable": True},
        {"kind": "rated", "completion_ids": (1,)},
        {"kind": "rated", "is_desirable": True},
        {"kind": "rated", "completion_ids": (1,), "is_desirable": True, "chosen_ids": (1,)},
    ],
)
def test_a_sample_of_one_kind_has_no_fields_of_the_other(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="has other fields"):
        NewSample(adapter="a", prompt_ids=(1,), is_held_out=False, **wrong)


async def test_waiting_for_a_change_ends_with_the_change(store: FeedbackStore) -> None:
    assert store.changes == 0
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        waits = [group.create_task(store.wait_change(0)) for _ in range(2)]
        await asyncio.sleep(0)
        await store.states(ADAPTER)  # a question is no change
        assert not any(wait.done() for wait in waits)
        await prefer(store, "e1")
    assert [wait.result() for wait in waits] == [1, 1]
    assert await store.wait_change(0) == 1
    for change in (
        store.set_reference([(1, -1.0, -1.0)]),
        store.refuse_sample(1, "no"),
        store.forget("ann"),
    ):
        seen = store.changes
        await change
        assert await store.wait_change(seen) == seen + 1


async def test_waiting_for_a_change_ends_when_the_store_is_closed(path: Path) -> None:
    store = open_store(path)
    async with asyncio.TaskGroup() as group:
        async with store:
            wait = group.create_task(expect_draining(store.wait_change(0)))
            await asyncio.sleep(0)
            assert not wait.done()
        await wait


async def expect_draining(call: Any) -> None:
    with pytest.raises(DrainingError, match="store is closed"):
        await call


# -- events whose samples come later -------------------------------------------------------------


async def test_samples_may_be_made_later_once(store: FeedbackStore) -> None:
    for i in range(3):
        await store.add(rating(f"e{i}", 1, f"r{i}"), source="ann", samples=None)
    await withdraw(store, "ann", "w", "e1")
    first, second = await store.unprepared()
    assert (first.event, second.event) == (rating("e0", 1, "r0"), rating("e2", 1, "r2"))
    assert (first.source, first.created) == ("ann", Clock().now)
    assert await store.unprepared(after_key=first.key) == (second,)
    assert await store.unprepared(limit=1) == (first,)
    await store.prepare(first.key, [rated()])
    await store.prepare(first.key, [rated()])
    await store.prepare(second.key, [])
    await store.prepare(99, [rated()])
    assert await store.unprepared() == ()
    assert await states(store) == {"pending": 1}


async def test_samples_that_come_late_take_the_state_that_their_event_has_by_then(
    store: FeedbackStore,
) -> None:
    await store.add(rating("e1", 1), source="ann", samples=None)
    (event,) = await store.unprepared()
    await rate(store, "bob", "e1", -1)
    await store.prepare(event.key, [rated()])
    assert await states(store) == {"contradictory": 2}


# -- export --------------------------------------------------------------------------------------


async def test_an_export_has_what_stands_in_the_order_of_arrival(
    store: FeedbackStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cotune.runtime.learning.store.EXPORTED_AT_ONCE", 2)
    await rate(store, "ann", "e1", 1)
    await rate(store, "ann", "e2", -1)
    for i in range(3, 6):
        await prefer(store, f"e{i}")
    await withdraw(store, "ann", "w", "e4")
    other = Preference(id="e6", prompt=PROMPT, chosen="x", rejected="y", model="other")
    await store.add(other, source="bob", samples=None)
    await store.add(
        Edit(id="e7", response_id="r1", text="z"), source="bob", samples=[pair(adapter="other")]
    )
    rows = [row async for row in store.export()]
    assert [row["id"] for row in rows] == ["e2", "e3", "e5", "e6", "e7"]
    assert [row["state"] for row in rows] == [*["pending"] * 3, "unprepared", "pending"]
    assert rows[0]["label"] is False
    assert rows[1]["rejected"] == [{"role": "assistant", "content": "Far."}]
    assert [row["id"] async for row in store.export("other")] == ["e6", "e7"]
    assert [row["id"] async for row in store.export(ADAPTER)] == ["e2", "e3", "e5"]
    assert [row async for row in store.export("nobody")] == []


# -- removal -------------------------------------------------------------------------------------


async def test_forgetting_removes_all_of_a_person_and_leaves_the_others(
    store: FeedbackStore,
) -> None:
    store.record(response("r1", source="ann"))
    store.record(response("r2", source="bob"))
    await rate(store, "ann", "e1")
    await store.add(rating("e2", 1, "r2"), source="ann", samples=[rated()])
    await store.add(rating("e1", -1, "r2"), source="bob", samples=[rated(False)])
    await rate(store, "eve", "e1")  # about ann's answer
    await withdraw(store, "eve", "w1", "e1")
    assert await states(store) == {"pending": 1, "contradictory": 2, "withdrawn": 1}
    assert await store.forget("ann") == 4
    assert await states(store) == {"pending": 1}
    assert store.counts().events == {"rating": 1}
    assert store.counts().recorded_responses == 1
    with pytest.raises(NotFoundError):
        await store.response("r1")
    assert (await store.response("r2")).source == "bob"
    assert [row["source"] async for row in store.export()] == ["bob"]
    assert not (await rate(store, "ann", "e1")).duplicate, "nothing is known of the id"
    assert await store.forget("nobody") == 0


async def test_what_is_forgotten_is_in_no_file(path: Path) -> None:
    secret, kept = "XYZZY-secret-", "PLUGH-kept-"
    async with open_store(path) as store:
        store.record(response("r1", source="ann", text=secret + "answer"))
        for i in range(50):
            for name, word in (("ann", secret), ("bob", kept)):
                event = Preference(id=f"e{i}", prompt=PROMPT, chosen=f"{word}{i}", rejected="no")
                await store.add(event, source=name, samples=[pair(f"{word}{i}")])
        assert any(secret.encode() in file.read_bytes() for file in path.parent.iterdir())
        assert await store.forget("ann") == 50
        content = b"".join(file.read_bytes() for file in path.parent.iterdir())
        assert secret.encode() not in content
        assert kept.encode() in content


async def test_forgetting_takes_as_many_transactions_as_it_needs(
    store: FeedbackStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cotune.runtime.learning.store.REMOVED_AT_ONCE", 2)
    for i in range(5):
        await prefer(store, f"e{i}")
    assert await store.forget("ann") == 5
    assert await states(store) == {}


async def test_old_events_expire_with_what_was_made_of_them(path: Path, clock: Clock) -> None:
    config = FeedbackConfig(event_retention_s=100.0)
    async with open_store(path, config, clock) as store:
        await rate(store, "ann", "e1", 1)
        clock.pass_s(60)
        await rate(store, "bob", "e1", -1)
        assert await states(store) == {"contradictory": 2}
        clock.pass_s(60)
        assert await store.expire() == 1
        assert await states(store) == {"pending": 1}
        assert await store.expire(clock.now) == 0
        assert store.counts().events == {"rating": 1}


async def test_what_was_withdrawn_stays_gone_when_its_withdrawal_expires(
    path: Path, clock: Clock
) -> None:
    config = FeedbackConfig(event_retention_s=100.0)
    async with open_store(path, config, clock) as store:
        await rate(store, "ann", "e1")
        await rate(store, "ann", "e2")
        clock.pass_s(-500)  # the clock was set back: the withdrawals seem older
        await withdraw(store, "ann", "w1", "e2")
        await withdraw(store, "ann", "w2", "e1")
        clock.pass_s(500)
        assert await store.expire() == 4
        assert await states(store) == {}


async def test_events_are_kept_for_ever_unless_told_otherwise(
    store: FeedbackStore, clock: Clock
) -> None:
    await prefer(store, "e1")
    clock.pass_s(1e9)
    assert await store.expire() == 0
    assert await states(store) == {"pending": 1}


# -- the writer ----------------------------------------------------------------------------------


async def test_all_that_waits_is_written_in_one_transaction(path: Path) -> None:
    gated = Gated(path, FeedbackConfig())
    async with gated.store as store:
        held = await gated.hold()
        async with asyncio.TaskGroup() as group:
            for i in range(20):
                group.create_task(rate(store, f"s{i}", "e1"))
            conflict = group.create_task(expect_conflict(rate(store, "s0", "e1", -1)))
            await asyncio.sleep(0)
            before = len(gated.backends[0].groups)
            assert store.counts().pending == 21
            gated.let_go()
        await held
        await conflict
        assert gated.backends[0].groups[before:] == [True]
        assert store.counts().events == {"rating": 20}


async def expect_conflict(call: Any) -> None:
    with pytest.raises(ConflictError):
        await call


async def test_records_alone_do_not_wait_for_the_disk(path: Path) -> None:
    gated = Gated(path, FeedbackConfig())
    async with gated.store as store:
        held = await gated.hold()
        before = len(gated.backends[0].groups)
        store.record(response())
        await gated.let_go_to_the_next()
        await held
        await store.response("r1")
        assert gated.backends[0].groups[before:] == [False, True]


async def test_a_full_queue_refuses_events_and_drops_records_but_not_the_learner(
    path: Path,
) -> None:
    gated = Gated(path, FeedbackConfig(max_pending=2))
    async with gated.store as store:
        held = await gated.hold()
        async with asyncio.TaskGroup() as group:
            for i in range(2):
                group.create_task(rate(store, f"s{i}", "e1"))
            await asyncio.sleep(0)
            with pytest.raises(OverloadedError, match="max_pending") as refused:
                await rate(store, "bob", "e1")
            assert refused.value.code == "feedback_queue_full"
            store.record(response())
            learner = group.create_task(store.pending(ADAPTER, 9))
            await asyncio.sleep(0)
            gated.let_go()
        await held
        assert len(learner.result()) == 2
        assert store.counts().dropped_responses == 1
        assert store.counts().refused == {"feedback_queue_full": 1}
        with pytest.raises(NotFoundError):
            await store.response("r1")


async def test_closing_writes_all_that_was_handed_in(path: Path) -> None:
    gated = Gated(path, FeedbackConfig())
    async with asyncio.TaskGroup() as group:
        async with gated.store as store:
            held = await gated.hold()
            tasks = [group.create_task(rate(store, "ann", f"e{i}")) for i in range(10)]
            store.record(response())
            await asyncio.sleep(0)
            gated.let_go()
        assert all(task.done() for task in (held, *tasks)), "answered before it is closed"
    await expect_draining(rate(store, "ann", "late"))
    store.record(response("late"))
    assert store.counts().dropped_responses == 1
    async with open_store(path) as reopened:
        assert reopened.counts().events == {"rating": 10}
        assert (await reopened.response("r1")).id == "r1"


async def test_closing_is_not_cut_short_by_cancellation(path: Path) -> None:
    gated = Gated(path, FeedbackConfig())
    is_open = asyncio.Event()
    tasks: list[asyncio.Task[object]] = []

    async def use() -> None:
        async with gated.store as store:
            tasks.append(await gated.hold())
            tasks.append(asyncio.ensure_future(rate(store, "ann", "e1")))
            await asyncio.sleep(0)
            is_open.set()

    user = asyncio.ensure_future(use())
    await is_open.wait()
    for _ in range(3):
        user.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert not user.done()
    gated.let_go()
    with pytest.raises(asyncio.CancelledError):
        await user
    assert all(task.done() and task.exception() is None for task in tasks)
    async with open_store(path) as reopened:
        assert reopened.counts().events == {"rating": 1}


async def test_a_call_that_was_cancelled_is_carried_out_all_the_same(path: Path) -> None:
    gated = Gated(path, FeedbackConfig())
    async with gated.store as store:
        held = await gated.hold()
        task = asyncio.ensure_future(rate(store, "ann", "e1"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gated.let_go()
        await held
        assert (await rate(store, "ann", "e1")).duplicate


async def test_an_operation_that_fails_takes_no_other_with_it(path: Path) -> None:
    gated = Gated(path, FeedbackConfig(quota_events=2))
    async with gated.store as store:
        calls = iter([None, StorageError("no"), None, KeyError("bug")])
        gated.backends[0].fail_add = lambda: next(calls, None)
        # The group fails with its second event; alone, the second of those that come again fails.
        held = await gated.hold()
        both = asyncio.gather(
            *(rate(store, "ann", f"e{i}") for i in range(2)), return_exceptions=True
        )
        await asyncio.sleep(0)
        assert store.counts().pending == 2, "one group"
        gated.let_go()
        await held
        done = await both
        assert [type(outcome).__name__ for outcome in done] == ["Acknowledgement", "KeyError"]
        assert store.counts().events == {"rating": 1}
        assert not (await rate(store, "ann", "e1")).duplicate, "the quota was given back"
        with pytest.raises(OverloadedError):
            await rate(store, "ann", "e2")


async def test_a_writer_that_breaks_leaves_nobody_waiting(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gated = Gated(path, FeedbackConfig())
    async with asyncio.timeout(30), gated.store as store:
        gated.backends[0].fail_counts = lambda: RuntimeError("broken")
        with pytest.raises(RuntimeError, match="broken"):
            await rate(store, "ann", "e1")
        await expect_draining(rate(store, "ann", "e2"))
    assert "the feedback store has failed" in caplog.text


async def test_a_store_that_cannot_be_opened_says_why_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    store = open_store(tmp_path / "file" / "feedback.sqlite")
    with pytest.raises(ConfigError, match=r"cannot be opened.*state_dir"):
        await store.__aenter__()
    with pytest.raises(RuntimeError, match="opened once"):
        await store.__aenter__()
    with pytest.raises(RuntimeError, match="is not open"):
        await open_store(tmp_path / "feedback.sqlite").states(ADAPTER)


async def test_all_is_there_after_the_store_was_closed_and_opened(path: Path) -> None:
    async with open_store(path) as store:
        store.record(response())
        await prefer(store, "e1")
        await store.set_reference([(1, -1.0, -2.0)])
        await rate(store, "bob", "e1")
        await withdraw(store, "bob", "w1", "e1")
        await store.forget("bob")
    async with open_store(path) as store:
        assert store.counts().events == {"preference": 1}
        assert store.counts().recorded_responses == 1
        assert await keys(store) == [1]
        await prefer(store, "e2")
        assert [s.key for s in await store.pending(ADAPTER, 9)] == [3], "keys are never reused"
