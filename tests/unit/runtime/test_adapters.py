from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from cotune.runtime.adapters import BASE_SLOT, AdapterStore, SlotGrant
from cotune.runtime.errors import AdapterLoadError, ConflictError, NotFoundError
from cotune.runtime.lora import LoraPair, LoraWeights
from cotune.runtime.types import BASE, AdapterVersion

PATH = Path("somewhere")


def weights(rank: int = 4) -> LoraWeights:
    pair = LoraPair(torch.ones(rank, 8), torch.ones(8, rank))
    return LoraWeights(rank, MappingProxyType({"q_proj": pair}))


class Store(AdapterStore):
    """A store that writes down what retired, and checks itself after each scenario."""

    def __init__(self, max_slots: int = 2) -> None:
        self.retired: list[str] = []
        super().__init__(
            max_slots,
            reserved_names=["base-model"],
            on_retired=lambda version: self.retired.append(str(version)),
        )

    def new(self, name: str) -> AdapterVersion:
        return self.add(name, weights(), PATH)

    def install(self, version: AdapterVersion) -> int:
        """Acquire and copy; the slot."""
        grant = self.granted(version)
        self.mark_installed(version, grant.slot)
        return grant.slot

    def granted(self, version: AdapterVersion) -> SlotGrant:
        grant = self.acquire(version)
        assert grant is not None
        self.check_integrity()
        return grant


# --- names and versions ---------------------------------------------------------------------------


def test_each_add_makes_a_new_version_and_the_newest_is_live() -> None:
    store = Store()
    assert store.new("a") == AdapterVersion("a", 1)
    assert store.new("b") == AdapterVersion("b", 1)
    assert store.new("a") == AdapterVersion("a", 2)
    assert store.resolve("a") == AdapterVersion("a", 2)
    assert store.resolve("a@2") == AdapterVersion("a", 2)
    assert [(str(info.version), info.is_live) for info in store.list()] == [
        ("a@2", True),
        ("b@1", True),
    ]


def test_a_superseded_version_without_users_retires_at_once() -> None:
    store = Store()
    store.new("a")
    store.new("a")
    assert store.retired == ["a@1"]
    with pytest.raises(NotFoundError, match="no adapter 'a@1'; loaded adapters: a"):
        store.resolve("a@1")


def test_a_superseded_version_stays_for_its_users_and_leaves_with_the_last() -> None:
    store = Store()
    old = store.new("a")
    store.pin(old)
    store.pin(old)
    new = store.new("a")
    assert store.retired == []
    assert store.resolve("a@1") == old
    assert store.resolve("a") == new
    store.unpin(old)
    assert store.retired == []
    store.unpin(old)
    assert store.retired == ["a@1"]
    store.check_integrity()


def test_several_versions_of_one_name_hold_slots_at_once() -> None:
    store = Store()
    first, second = store.new("a"), None
    slot = store.install(first)
    second = store.new("a")
    assert store.install(second) != slot
    assert {(str(info.version), info.slot) for info in store.list()} == {("a@1", 1), ("a@2", 2)}


def test_a_removed_name_is_not_found_but_its_requests_finish_on_it() -> None:
    store = Store()
    version = store.new("a")
    store.pin(version)
    slot = store.install(version)
    store.remove("a")
    for name in ("a", "a@1"):
        with pytest.raises(NotFoundError):
            store.resolve(name)
    assert store.acquire(version) == SlotGrant(slot, None)  # a sibling of the running request
    store.release(version)
    store.release(version)
    assert store.retired == []
    store.unpin(version)
    assert store.retired == ["a@1"]
    assert store.list() == ()
    store.check_integrity()


def test_removing_a_name_takes_its_superseded_versions_along() -> None:
    store = Store()
    old = store.new("a")
    store.pin(old)
    store.new("a")
    store.remove("a")
    assert store.retired == ["a@2"]
    with pytest.raises(NotFoundError):
        store.resolve("a@1")
    store.unpin(old)
    assert store.retired == ["a@2", "a@1"]


def test_a_version_number_never_comes_back() -> None:
    """KV pages are keyed by name and number; a number with other weights would find wrong pages."""
    store = Store()
    store.new("a")
    store.remove("a")
    assert store.new("a") == AdapterVersion("a", 2)


def test_a_draining_version_of_a_removed_name_stays_hidden_when_the_name_returns() -> None:
    store = Store()
    old = store.new("a")
    store.pin(old)
    store.remove("a")
    assert store.resolve(str(store.new("a"))) == AdapterVersion("a", 2)
    with pytest.raises(NotFoundError):
        store.resolve("a@1")


@pytest.mark.parametrize("name", ["", "a", "a@", "@1", "a@0", "a@9", "a@x", "a@-1", "a@²", "b@1"])
def test_what_is_not_there_is_not_found_and_what_is_there_is_listed(name: str) -> None:
    store = Store()
    store.new("c")
    with pytest.raises(NotFoundError) as caught:
        store.resolve(name)
    assert caught.value.message == f"there is no adapter {name!r}; loaded adapters: c"
    assert caught.value.param == "model"
    assert caught.value.code == "model_not_found"


def test_removing_or_using_what_is_not_there_is_not_found() -> None:
    store = Store()
    gone = store.new("a")
    store.new("a")
    with pytest.raises(NotFoundError, match="'b'; loaded adapters: a"):
        store.remove("b")
    for use in (store.pin, store.unpin, store.acquire, store.release):
        with pytest.raises(NotFoundError, match="'a@1'"):
            use(gone)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "1 to 256 printable"),
        (" a", "no space at its ends"),
        ("a\n", "printable"),
        ("x" * 257, "1 to 256"),
        ("a@1", "'@'"),
        ("base-model", "is the base model's; choose another"),
    ],
)
def test_a_name_that_cannot_be_asked_for_is_refused(name: str, reason: str) -> None:
    store = Store()
    with pytest.raises(AdapterLoadError, match=reason) as caught:
        store.new(name)
    assert caught.value.param == "name"
    assert store.list() == ()


def test_without_slots_adapters_are_refused_with_the_flag_to_raise() -> None:
    with pytest.raises(AdapterLoadError, match=r"max_loras is 0.*raise --max-loras"):
        Store(max_slots=0).new("a")


# --- slots ----------------------------------------------------------------------------------------


def test_the_base_model_is_always_in_slot_0_and_needs_no_counting() -> None:
    store = Store(max_slots=0)
    store.pin(BASE)
    assert store.acquire(BASE) == SlotGrant(BASE_SLOT, None)
    store.release(BASE)
    store.unpin(BASE)
    store.check_integrity()


def test_a_first_grant_asks_to_install_and_later_ones_do_not() -> None:
    store = Store()
    version = store.new("a")
    grant = store.granted(version)
    assert grant.slot == 1
    assert grant.weights is not None
    store.mark_installed(version, grant.slot)
    assert store.granted(version) == SlotGrant(1, None)
    assert store.statistics().installs == 1


def test_until_the_copy_is_done_every_grant_asks_for_it() -> None:
    """A copy that failed leaves the slot with unknown content."""
    store = Store()
    version = store.new("a")
    first = store.granted(version)
    store.release(version)  # the copy failed, the request with it
    assert store.granted(version) == first
    assert store.statistics().installs == 0


def test_a_late_word_of_a_copy_into_a_lost_slot_is_ignored() -> None:
    store = Store(max_slots=1)
    a, b = store.new("a"), store.new("b")
    lost = store.granted(a)
    store.release(a)
    store.granted(b)
    store.mark_installed(a, lost.slot)
    store.check_integrity()
    store.release(b)
    assert store.granted(a).weights is not None
    store.release(a)
    store.remove("a")
    store.mark_installed(a, lost.slot)
    store.check_integrity()


def test_an_idle_slot_keeps_its_adapter_for_the_next_request() -> None:
    store = Store()
    version = store.new("a")
    slot = store.install(version)
    store.release(version)
    assert store.granted(version) == SlotGrant(slot, None)


def test_empty_slots_are_taken_before_an_idle_one_is_evicted() -> None:
    store = Store()
    a, b = store.new("a"), store.new("b")
    store.install(a)
    store.release(a)
    assert store.install(b) == 2
    assert store.statistics().evictions == 0


def test_the_slot_idle_longest_is_evicted() -> None:
    store = Store(max_slots=3)
    a, b, c, d = (store.new(name) for name in "abcd")
    slots = {version: store.install(version) for version in (a, b, c)}
    for version in (b, c, a):
        store.release(version)
    store.acquire(b)  # used again: now the youngest
    store.release(b)
    assert store.install(d) == slots[c]
    assert store.granted(a) == SlotGrant(slots[a], None)
    assert store.granted(b) == SlotGrant(slots[b], None)
    assert store.statistics().evictions == 1


def test_no_slot_is_granted_while_all_are_in_use() -> None:
    store = Store()
    a, b, c = (store.new(name) for name in "abc")
    store.install(a)
    store.install(b)
    assert store.acquire(c) is None
    store.release(a)
    grant = store.granted(c)
    assert grant.slot == 1
    assert grant.weights is not None
    assert store.acquire(a) is None


def test_a_slot_is_in_use_until_its_last_grant_is_released() -> None:
    store = Store(max_slots=1)
    a, b = store.new("a"), store.new("b")
    store.install(a)
    store.acquire(a)
    store.release(a)
    assert store.acquire(b) is None
    store.release(a)
    assert store.granted(b).slot == 1


def test_an_evicted_version_stays_loaded_and_comes_back() -> None:
    store = Store(max_slots=1)
    a, b = store.new("a"), store.new("b")
    store.install(a)
    store.release(a)
    store.install(b)
    store.release(b)
    grant = store.granted(a)
    assert grant.weights is not None
    assert store.retired == []


def test_a_grant_alone_keeps_a_superseded_version() -> None:
    store = Store()
    old = store.new("a")
    store.install(old)
    store.new("a")
    assert store.retired == []
    store.release(old)
    assert store.retired == ["a@1"]
    assert store.statistics().idle_slots == 0


def test_giving_back_more_than_was_taken_is_an_error() -> None:
    store = Store()
    version = store.new("a")
    with pytest.raises(ValueError, match="a@1 holds no slot"):
        store.release(version)
    with pytest.raises(ValueError, match="a@1 is not pinned"):
        store.unpin(version)


def test_when_a_version_retires_the_books_are_already_in_order() -> None:
    seen: list[tuple[str, int]] = []
    store: AdapterStore

    def on_retired(version: AdapterVersion) -> None:
        store.check_integrity()
        seen.append((str(version), len(store.list())))

    store = AdapterStore(1, on_retired=on_retired)
    first = store.add("a", weights(), PATH)
    store.acquire(first)
    store.add("a", weights(), PATH)
    store.release(first)
    store.remove("a")
    assert seen == [("a@1", 1), ("a@2", 0)]


def test_lists_and_statistics_tell_what_is_where() -> None:
    store = Store()
    version = store.add("a", weights(rank=7), Path("dir/a"))
    store.new("b")
    store.pin(version)
    store.install(version)
    info = store.list()[0]
    assert (info.version, info.path, info.rank) == (version, Path("dir/a"), 7)
    assert (info.is_live, info.users, info.slot) == (True, 2, 1)
    assert info.created.tzinfo is not None
    statistics = store.statistics()
    assert (statistics.names, statistics.versions, statistics.total_slots) == (2, 2, 2)
    assert (statistics.busy_slots, statistics.idle_slots) == (1, 0)


# --- learned names --------------------------------------------------------------------------------


class LearningStore(AdapterStore):
    """A store in which the served model learns; writes down what left and what came back."""

    def __init__(self, max_slots: int = 2) -> None:
        self.changes: list[str] = []
        super().__init__(
            max_slots,
            reserved_names=["base-model"],
            learned_names=["base-model", "tenant"],
            on_retired=lambda version: self.changes.append(f"left {version}"),
            on_returned=lambda version: self.changes.append(f"back {version}"),
        )

    def learn(self, number: int, *, make_live: bool = True) -> AdapterVersion:
        version = self.add("base-model", weights(), PATH, number=number, make_live=make_live)
        self.check_integrity()
        return version


def test_a_learned_name_without_a_live_version_is_the_base_model() -> None:
    store = LearningStore()
    assert store.resolve("base-model") == BASE
    assert store.resolve("tenant") == BASE
    version = store.learn(7)
    assert store.resolve("base-model") == AdapterVersion("base-model", 7) == version
    assert store.resolve("base-model@0") == BASE
    store.clear_live("base-model")
    store.clear_live("base-model")
    assert store.resolve("base-model") == BASE
    assert store.changes == ["left base-model@7"]


def test_a_candidate_is_held_and_named_before_it_is_live() -> None:
    store = LearningStore()
    first = store.learn(1)
    candidate = store.learn(2, make_live=False)
    assert store.resolve("base-model") == first
    assert store.resolve("base-model@2") == candidate
    store.set_live(candidate)
    assert store.resolve("base-model") == candidate
    assert store.changes == ["left base-model@1"]
    store.unpin(candidate)
    assert store.resolve("base-model") == candidate
    store.check_integrity()


def test_a_refused_candidate_leaves_with_its_pin() -> None:
    store = LearningStore()
    candidate = store.learn(2, make_live=False)
    store.unpin(candidate)
    assert store.changes == ["left base-model@2"]
    with pytest.raises(NotFoundError):
        store.set_live(candidate)


def test_an_older_version_goes_live_again_while_somebody_still_uses_it() -> None:
    store = LearningStore()
    old = store.learn(1)
    store.pin(old)
    new = store.learn(2)
    store.set_live(old)
    assert store.resolve("base-model") == old
    store.unpin(old)
    assert store.changes == [f"left {new}"]


def test_a_version_that_left_comes_back_under_its_number_and_that_is_said() -> None:
    store = LearningStore()
    store.learn(1)
    store.learn(2)
    back = store.learn(1)
    assert store.changes == ["left base-model@1", "back base-model@1", "left base-model@2"]
    assert store.resolve("base-model") == back


def test_a_version_that_is_still_held_is_not_added_twice() -> None:
    store = LearningStore()
    version = store.learn(3)
    slot = store.acquire(version)
    assert store.learn(3) == version
    assert store.learn(3, make_live=False) == version
    assert [info.users for info in store.list()] == [2]  # a slot and a pin
    assert store.acquire(version) == slot
    assert store.changes == []


def test_versions_of_a_learned_name_come_from_training_alone() -> None:
    store = LearningStore()
    with pytest.raises(AdapterLoadError, match="learns from feedback"):
        store.add("tenant", weights(), PATH)
    with pytest.raises(ConflictError, match="cannot be removed"):
        store.remove("tenant")
    with pytest.raises(ValueError, match="numbered from 1"):
        store.add("tenant", weights(), PATH, number=0)


def test_other_names_take_no_numbers_and_are_not_cleared() -> None:
    store = LearningStore()
    with pytest.raises(ValueError, match="count up by themselves"):
        store.add("other", weights(), PATH, number=3)
    store.add("other", weights(), PATH)
    with pytest.raises(ValueError, match="does not learn"):
        store.clear_live("other")


def test_a_removed_version_that_is_still_used_cannot_go_live() -> None:
    store = LearningStore()
    version = store.add("other", weights(), PATH)
    store.pin(version)
    store.remove("other")
    with pytest.raises(NotFoundError):
        store.set_live(version)


def test_without_slots_nothing_is_learned_either() -> None:
    with pytest.raises(AdapterLoadError, match="raise --max-loras"):
        LearningStore(0).learn(1)
