"""Who may be answered by which adapter: names, versions, slots.

A *name* is what a request asks for. Each `add` under a name makes a new immutable *version*, which
goes live at once; earlier versions stay while anyone uses them. A *slot* is a row of the executor's
stacked A and B tables; slot 0 is the base model, slots 1 to `max_slots` hold one version each.

    name "tutor"    @1 superseded, 2 users     @2 live             versions: in host memory
                     │                          │
    slots     0 base │ 1: tutor@1 (2 users)     │ 2: tutor@2 (idle)    3: empty

The store keeps books and copies nothing. Its owner, the engine, does the copying:

    store.pin(version)                      at admission: the version outlives its name's changes
    grant = store.acquire(version)          when scheduled; None while every slot is in use
    if grant.weights is not None:
        await lane.run(executor.install_adapter, grant.slot, grant.weights)
        store.mark_installed(version, grant.slot)    only now do later grants trust the slot
    ...                                     steps with adapter_slot=grant.slot
    store.release(version)                  when preempted or finished
    store.unpin(version)                    when finished

A slot is given to another version only when nobody holds it. Installs and steps run on one FIFO
lane, so an install never overtakes a step that still reads what the slot held before.

*Learned* names get their versions from training. Their numbers come from the version store on
disk, where a number names the same weights for ever; so a version that has left may come back
under its number, and `on_returned` says so before anyone can use it. A learned name may be the
served model's own. Without a live version it means the base model, which is also its version 0:

    candidate = store.add(name, weights, path, number=7, make_live=False)    held by a pin
    ...                                     warm its prefixes, judge it
    store.set_live(candidate)               or not; new requests follow at once
    store.unpin(candidate)                  a candidate that is not live leaves here

All methods belong to the event-loop thread and none blocks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from .errors import AdapterLoadError, ConflictError, NotFoundError
from .types import BASE, AdapterVersion

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from .lora import LoraWeights

BASE_SLOT = 0
MAX_NAME_CHARS = 256


@dataclass(frozen=True, slots=True)
class SlotGrant:
    """The right to use a slot until `release`.

    Attributes:
        slot: what goes into `SequenceStep.adapter_slot`.
        weights: to be installed in the slot before the first step that uses it, overwriting all of
            it; None if the slot holds them already.
    """

    slot: int
    weights: LoraWeights | None


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """One version, as lists and metrics show it."""

    version: AdapterVersion
    path: Path
    rank: int
    is_live: bool
    created: datetime
    users: int
    slot: int | None


@dataclass(frozen=True, slots=True)
class AdapterStatistics:
    """Counts over the whole store; `installs` and `evictions` since it was made."""

    names: int
    versions: int
    total_slots: int
    busy_slots: int
    idle_slots: int
    installs: int
    evictions: int


@dataclass(slots=True, eq=False)
class _Entry:
    """A version that the store still holds. `grants` count for its slot, `pins` for its life."""

    version: AdapterVersion
    weights: LoraWeights
    path: Path
    created: datetime
    is_removed: bool = False
    pins: int = 0
    grants: int = 0
    slot: int | None = None
    is_installed: bool = False
    idle_since: int = field(default=0)


class AdapterStore:
    """Owns adapter names, versions and slots; see the module docstring for the protocol.

    Invariant (`check_integrity`): a slot belongs to at most one version, a version has at most one
    slot, and what is held is exactly what is live or in use.

    Args:
        max_slots: adapters that can be in use at once; 0 turns adapters off.
        reserved_names: names that no adapter may take (those of the base model), unless they learn.
        learned_names: names whose versions come from training, with numbers of their own.
        on_retired: called with each version that has left, after the books are in order.
        on_returned: called with each learned version that had left and is held again.
    """

    def __init__(
        self,
        max_slots: int,
        *,
        reserved_names: Iterable[str] = (),
        learned_names: Iterable[str] = (),
        on_retired: Callable[[AdapterVersion], None] | None = None,
        on_returned: Callable[[AdapterVersion], None] | None = None,
    ) -> None:
        self.max_slots = max_slots
        self._learned = frozenset(learned_names)
        self._reserved = frozenset(reserved_names) - self._learned
        self._on_retired = on_retired
        self._on_returned = on_returned
        self._entries: dict[AdapterVersion, _Entry] = {}
        self._live: dict[str, AdapterVersion] = {}
        # Versions count up for ever, also past a removal: KV pages are keyed by (name, version), so
        # a number that came back with other weights would find the old ones' pages.
        self._last_number: Counter[str] = Counter()
        self._left: set[AdapterVersion] = set()  # learned versions that retired and may return
        self._slots: list[_Entry | None] = [None] * max_slots  # index 0 is slot 1
        self._tick = 0
        self._installs = 0
        self._evictions = 0

    # --- names and versions

    def add(
        self,
        name: str,
        weights: LoraWeights,
        path: Path,
        *,
        number: int | None = None,
        make_live: bool = True,
    ) -> AdapterVersion:
        """Hold `weights` as a version of `name`; the one that was live leaves with its last user.

        Args:
            name: what requests ask for.
            weights: the adapter.
            path: where it was read from; shown in lists.
            number: of a learned name's version, from 1. It names the same weights for ever, so if
                that version is still held, it is used and `weights` are not needed. Other names
                count up by themselves and take none.
            make_live: False pins it once instead, so that it stays until the caller's `unpin`.

        Raises:
            AdapterLoadError: if the name cannot be used, or adapters are turned off.
        """
        self._check_name(name)
        if self.max_slots == 0:
            raise AdapterLoadError(
                f"adapter {name!r}: max_loras is 0, so no adapter can be served; raise --max-loras",
                param="name",
            )
        version = AdapterVersion(name, self._number(name, number))
        entry = self._entries.get(version)
        if entry is None:
            entry = _Entry(version, weights, path, datetime.now(UTC))
            self._entries[version] = entry
            self._last_number[name] = max(self._last_number[name], version.version)
        entry.pins += 1
        if version in self._left:
            self._left.remove(version)
            if self._on_returned is not None:
                self._on_returned(version)
        if make_live:
            self.set_live(version)
            self.unpin(version)
        return version

    def set_live(self, version: AdapterVersion) -> None:
        """From now on its name means `version`; the one before leaves with its last user.

        Raises:
            NotFoundError: if it has left, or its name was removed.
        """
        entry = self._entry(version)
        if entry.is_removed:
            raise self._not_found(str(version))
        before = self._live.get(version.name)
        self._live[version.name] = version
        if before is not None:
            self._retire_if_unused(self._entries[before])

    def clear_live(self, name: str) -> None:
        """From now on the learned `name` means the base model. Nothing happens if it does already.

        Raises:
            ValueError: if the name does not learn; see `remove`.
        """
        if name not in self._learned:
            raise ValueError(f"{name!r} does not learn; remove it instead")
        before = self._live.pop(name, None)
        if before is not None:
            self._retire_if_unused(self._entries[before])

    def remove(self, name: str) -> None:
        """No new request finds any version of `name`; those that use one finish on it.

        Raises:
            NotFoundError: if there is no such name.
            ConflictError: if the name learns.
        """
        if name in self._learned:
            raise ConflictError(
                f"adapter {name!r} learns from feedback and cannot be removed; roll it back to "
                "version 0 to serve the base model under its name",
                param="name",
                code="adapter_learns",
            )
        if name not in self._live:
            raise self._not_found(name)
        del self._live[name]
        for entry in [e for e in self._entries.values() if e.version.name == name]:
            entry.is_removed = True
            self._retire_if_unused(entry)

    def resolve(self, model_name: str) -> AdapterVersion:
        """The version that `model_name` asks for: ``name`` (the live one) or ``name@3``.

        A learned name without a live version, and its version 0, are the base model: `BASE`.

        Raises:
            NotFoundError: if there is none, or it has left.
        """
        live = self._live.get(model_name)
        if live is not None:
            return live
        if model_name in self._learned:
            return BASE
        name, _, number = model_name.rpartition("@")
        if number.isascii() and number.isdigit():
            if name in self._learned and int(number) == 0:
                return BASE
            version = AdapterVersion(name, int(number))
            entry = self._entries.get(version)
            if entry is not None and not entry.is_removed:
                return version
        raise self._not_found(model_name)

    def pin(self, version: AdapterVersion) -> None:
        """Keep `version` until `unpin`, whatever happens to its name. Counts; BASE needs none.

        Raises:
            NotFoundError: if it has already left.
        """
        if version != BASE:
            self._entry(version).pins += 1

    def unpin(self, version: AdapterVersion) -> None:
        """Take one `pin` back."""
        if version == BASE:
            return
        entry = self._entry(version)
        if entry.pins == 0:
            raise ValueError(f"{version} is not pinned")
        entry.pins -= 1
        self._retire_if_unused(entry)

    # --- slots

    def acquire(self, version: AdapterVersion) -> SlotGrant | None:
        """A slot for one sequence, or None while every slot is in use. Counts; see `release`.

        A version that has a slot gets that one; otherwise an empty slot, otherwise the one that has
        been idle longest.

        Raises:
            NotFoundError: if the version has left (it was neither live nor pinned).
        """
        if version == BASE:
            return SlotGrant(BASE_SLOT, None)
        entry = self._entry(version)
        if entry.slot is None:
            slot = self._free_slot()
            if slot is None:
                return None
            self._slots[slot - 1] = entry
            entry.slot = slot
            entry.is_installed = False
        entry.grants += 1
        return SlotGrant(entry.slot, None if entry.is_installed else entry.weights)

    def mark_installed(self, version: AdapterVersion, slot: int) -> None:
        """`slot` now holds the weights of `version`.

        Until this is called, every grant asks to install them, so that a copy that failed is not
        mistaken for one that did not. Nothing happens if the version has lost the slot meanwhile.
        """
        entry = self._entries.get(version)
        if entry is not None and entry.slot == slot and not entry.is_installed:
            entry.is_installed = True
            self._installs += 1

    def release(self, version: AdapterVersion) -> None:
        """Give one grant back. The slot keeps the weights until another version needs it."""
        if version == BASE:
            return
        entry = self._entry(version)
        if entry.grants == 0:
            raise ValueError(f"{version} holds no slot")
        entry.grants -= 1
        if entry.grants == 0:
            self._tick += 1
            entry.idle_since = self._tick
            self._retire_if_unused(entry)

    # --- views

    def list(self) -> tuple[AdapterInfo, ...]:
        """Every version that is held, by name, then number."""
        return tuple(
            AdapterInfo(
                version=version,
                path=entry.path,
                rank=entry.weights.rank,
                is_live=self._live.get(version.name) == version,
                created=entry.created,
                users=entry.pins + entry.grants,
                slot=entry.slot,
            )
            for version, entry in sorted(
                self._entries.items(), key=lambda item: (item[0].name, item[0].version)
            )
        )

    def statistics(self) -> AdapterStatistics:
        """A snapshot of the counts."""
        held = [entry for entry in self._slots if entry is not None]
        busy = sum(entry.grants > 0 for entry in held)
        return AdapterStatistics(
            names=len(self._live),
            versions=len(self._entries),
            total_slots=self.max_slots,
            busy_slots=busy,
            idle_slots=len(held) - busy,
            installs=self._installs,
            evictions=self._evictions,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError if the books contradict each other."""
        for i, entry in enumerate(self._slots):
            if entry is not None:
                assert entry.slot == i + 1, f"slot {i + 1} holds {entry.version}, which disagrees"
                assert self._entries.get(entry.version) is entry, (
                    f"slot {i + 1} holds a lost version"
                )
        for version, entry in self._entries.items():
            assert entry.version == version
            is_live = self._live.get(version.name) == version
            in_use = entry.pins > 0 or entry.grants > 0
            assert is_live or in_use, f"{version} is neither live nor in use"
            assert not (is_live and entry.is_removed), f"{version} is live and removed"
            assert entry.pins >= 0
            assert entry.grants >= 0
            assert version.version <= self._last_number[version.name]
            assert version not in self._left, f"{version} is held and has left"
            if entry.slot is None:
                assert entry.grants == 0, f"{version} is granted without a slot"
                assert not entry.is_installed, f"{version} is installed nowhere"
            else:
                assert self._slots[entry.slot - 1] is entry, f"{version}'s slot has another owner"
        for name, version in self._live.items():
            assert version.name == name
            assert version in self._entries, f"{version} is live and lost"
        assert all(version.name in self._learned for version in self._left)

    # --- inside

    def _entry(self, version: AdapterVersion) -> _Entry:
        entry = self._entries.get(version)
        if entry is None:
            raise self._not_found(str(version))
        return entry

    def _free_slot(self) -> int | None:
        """An empty slot, or the one idle longest after taking it from its version; or None."""
        idle: list[_Entry] = []
        for i, entry in enumerate(self._slots):
            if entry is None:
                return i + 1
            if entry.grants == 0:
                idle.append(entry)
        if not idle:
            return None
        self._evictions += 1
        return self._take_slot(min(idle, key=lambda entry: entry.idle_since))

    def _take_slot(self, entry: _Entry) -> int:
        slot = entry.slot
        assert slot is not None
        self._slots[slot - 1] = None
        entry.slot = None
        entry.is_installed = False
        return slot

    def _retire_if_unused(self, entry: _Entry) -> None:
        version = entry.version
        if entry.pins or entry.grants or self._live.get(version.name) == version:
            return
        if entry.slot is not None:
            self._take_slot(entry)
        del self._entries[version]
        if version.name in self._learned:
            self._left.add(version)
        if self._on_retired is not None:
            self._on_retired(version)

    def _number(self, name: str, number: int | None) -> int:
        """The number of a version that is to be added."""
        if name in self._learned:
            if number is None:
                raise AdapterLoadError(
                    f"adapter {name!r} learns from feedback, and its versions come from training; "
                    "load this one under another name",
                    param="name",
                )
            if number < 1:
                raise ValueError(f"{name!r} @{number}: learned versions are numbered from 1")
            return number
        if number is not None:
            raise ValueError(f"{name!r} does not learn; its versions count up by themselves")
        return self._last_number[name] + 1

    def _check_name(self, name: str) -> None:
        if not name or len(name) > MAX_NAME_CHARS or not name.isprintable() or name != name.strip():
            raise AdapterLoadError(
                f"adapter name {name!r} must have 1 to {MAX_NAME_CHARS} printable characters and "
                "no space at its ends",
                param="name",
            )
        if "@" in name:
            raise AdapterLoadError(
                f"adapter name {name!r} must not contain '@', which separates the version",
                param="name",
            )
        if name in self._reserved:
            raise AdapterLoadError(
                f"adapter name {name!r} is the base model's; choose another", param="name"
            )

    def _not_found(self, model_name: str) -> NotFoundError:
        names = ", ".join(sorted({*self._live, *self._learned})) or "none"
        return NotFoundError(
            f"there is no adapter {model_name!r}; loaded adapters: {names}",
            param="model",
            code="model_not_found",
        )
