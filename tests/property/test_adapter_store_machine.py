"""Random adds, removals, requests and failed copies against a plain model of the adapter store.

The model knows of each version whether its name leads to it, how often it is pinned and granted,
and what an executor's slots would hold. What must hold whatever happens: a granted slot holds the
weights of its version once they were installed, nobody else's slot is ever taken away, a version
retires exactly when it is neither live nor in use, and no version number comes twice. Of learned
names, a number may come back, with the same weights, and the store must say so.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cotune.runtime.adapters import AdapterStore
from cotune.runtime.errors import NotFoundError
from cotune.runtime.lora import LoraPair, LoraWeights
from cotune.runtime.types import BASE, AdapterVersion

NAMES = st.sampled_from(["a", "b", "c", "d"])
LEARNED = st.sampled_from(["base-model", "tenant"])
NUMBERS = st.integers(1, 4)


def make_weights() -> LoraWeights:
    pair = LoraPair(torch.ones(1, 1), torch.ones(1, 1))
    return LoraWeights(1, MappingProxyType({"q_proj": pair}))


class AdapterStoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.store = AdapterStore(0)
        self.live: dict[str, AdapterVersion] = {}
        self.hidden: set[AdapterVersion] = set()  # of removed names
        self.weights: dict[AdapterVersion, LoraWeights] = {}
        self.pins: dict[AdapterVersion, int] = {}
        self.grants: dict[AdapterVersion, int] = {}
        self.away: set[AdapterVersion] = set()  # retired, and not back
        self.on_disk: dict[AdapterVersion, LoraWeights] = {}  # learned versions
        self.expected_retired: set[AdapterVersion] = set()
        self.slots: dict[int, LoraWeights] = {}  # what an executor would hold
        self.slot_of: dict[AdapterVersion, int] = {}  # of versions with grants
        self.idle_order: list[AdapterVersion] = []  # longest idle first; those that lost their
        # slot are among them

    @initialize(max_slots=st.integers(1, 3))
    def start(self, max_slots: int) -> None:
        self.store = AdapterStore(
            max_slots,
            reserved_names=["base-model"],
            learned_names=["base-model", "tenant"],
            on_retired=self.note_retired,
            on_returned=self.note_returned,
        )

    def note_retired(self, version: AdapterVersion) -> None:
        assert version not in self.away, "a version retired twice"
        self.away.add(version)

    def note_returned(self, version: AdapterVersion) -> None:
        assert version in self.away, "a version returned that had not left"
        self.away.remove(version)

    def settle(self, version: AdapterVersion) -> None:
        """Expect `version` to have retired if nothing keeps it."""
        if (
            self.live.get(version.name) != version
            and not self.pins[version]
            and not self.grants[version]
        ):
            self.expected_retired.add(version)

    def held(self) -> list[AdapterVersion]:
        return sorted(set(self.weights) - self.expected_retired, key=str)

    @rule(name=NAMES)
    def add(self, name: str) -> None:
        weights = make_weights()
        version = self.store.add(name, weights, Path(name))
        assert version not in self.weights, "a version number came back"
        before = self.live.get(name)
        self.live[name] = version
        self.weights[version] = weights
        self.pins[version] = self.grants[version] = 0
        if before is not None:
            self.settle(before)

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        if name not in self.live:
            try:
                self.store.remove(name)
            except NotFoundError:
                return
            raise AssertionError("an absent name was removed")
        self.store.remove(name)
        del self.live[name]
        for version in self.held():
            if version.name == name:
                self.hidden.add(version)
                self.settle(version)

    @rule(name=LEARNED, number=NUMBERS, make_live=st.booleans())
    def learn(self, name: str, number: int, make_live: bool) -> None:
        """A version comes from disk: a candidate, or one to go back to."""
        version = AdapterVersion(name, number)
        weights = self.on_disk.setdefault(version, make_weights())
        assert (
            self.store.add(name, weights, Path(name), number=number, make_live=make_live) == version
        )
        if version not in self.held():
            self.expected_retired.discard(version)
            self.weights[version] = weights
            self.pins[version] = self.grants[version] = 0
            if version in self.idle_order:
                self.idle_order.remove(version)
        if make_live:
            self.make_live(version)
        else:
            self.pins[version] += 1

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def set_live(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(self.held()))
        if version in self.hidden:
            try:
                self.store.set_live(version)
            except NotFoundError:
                return
            raise AssertionError("a version of a removed name went live")
        self.store.set_live(version)
        self.make_live(version)

    @rule(name=LEARNED)
    def clear_live(self, name: str) -> None:
        self.store.clear_live(name)
        before = self.live.pop(name, None)
        if before is not None:
            self.settle(before)

    def make_live(self, version: AdapterVersion) -> None:
        before = self.live.get(version.name)
        self.live[version.name] = version
        if before is not None:
            self.settle(before)

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(self.held()))
        self.store.pin(version)
        self.pins[version] += 1

    @precondition(lambda self: any(self.pins.values()))
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from([v for v, count in self.pins.items() if count]))
        self.store.unpin(version)
        self.pins[version] -= 1
        self.settle(version)

    @precondition(lambda self: self.held())
    @rule(data=st.data(), copy_succeeds=st.booleans())
    def acquire(self, data: st.DataObject, copy_succeeds: bool) -> None:
        version = data.draw(st.sampled_from(self.held()))
        busy = {v for v, count in self.grants.items() if count}
        had_slot = {info.version: info.slot for info in self.store.list() if info.slot}
        grant = self.store.acquire(version)
        if grant is None:
            assert version not in busy
            assert len(busy) == self.store.max_slots, "refused although a slot was free"
            return
        assert 1 <= grant.slot <= self.store.max_slots
        owners = {self.slot_of[v]: v for v in busy}
        assert owners.get(grant.slot, version) == version, "a slot in use was given away"
        if version in had_slot:
            assert grant.slot == had_slot[version]
        elif len(had_slot) == self.store.max_slots:
            idle = [v for v in self.idle_order if v in had_slot and v not in busy]
            assert grant.slot == had_slot[idle[0]], "not the longest idle slot was taken"
        else:
            assert grant.slot not in had_slot.values(), "evicted although a slot was empty"
        if grant.weights is None:
            assert self.slots.get(grant.slot) is self.weights[version], "trusted wrong content"
        else:
            assert grant.weights is self.weights[version]
            self.slots.pop(grant.slot, None)
            if copy_succeeds:
                self.slots[grant.slot] = grant.weights
                self.store.mark_installed(version, grant.slot)
        self.grants[version] += 1
        self.slot_of[version] = grant.slot
        if version in self.idle_order:
            self.idle_order.remove(version)

    @precondition(lambda self: any(self.grants.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from([v for v, count in self.grants.items() if count]))
        self.store.release(version)
        self.grants[version] -= 1
        if not self.grants[version]:
            self.idle_order.append(version)
            self.settle(version)

    @invariant()
    def the_books_agree(self) -> None:
        self.store.check_integrity()
        assert self.away == self.expected_retired
        infos = {info.version: info for info in self.store.list()}
        assert sorted(infos, key=str) == self.held()
        for version, info in infos.items():
            assert info.users == self.pins[version] + self.grants[version]
            assert info.is_live == (self.live.get(version.name) == version)
            if self.grants[version]:
                assert info.slot == self.slot_of[version], "a slot in use has moved"
        statistics = self.store.statistics()
        assert statistics.busy_slots == sum(count > 0 for count in self.grants.values())

    @invariant()
    def names_lead_to_what_is_live_and_only_visible_versions_are_found(self) -> None:
        for name in ("a", "b", "c", "d"):
            assert self.resolve(name) == self.live.get(name)
        for name in ("base-model", "tenant"):
            assert self.resolve(name) == self.live.get(name, BASE)
            assert self.resolve(f"{name}@0") == BASE
        for version in self.weights:
            visible = version not in self.expected_retired and version not in self.hidden
            assert self.resolve(str(version)) == (version if visible else None)

    def resolve(self, name: str) -> AdapterVersion | None:
        try:
            return self.store.resolve(name)
        except NotFoundError:
            return None


TestAdapterStore = AdapterStoreMachine.TestCase
TestAdapterStore.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
