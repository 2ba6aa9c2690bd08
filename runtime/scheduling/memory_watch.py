"""Live memory for the scheduler, and who gives way when it is short.

    a reading ─► τ_mem ─► policy: training shrinks, training stops, nothing new is admitted
                     ├──► KV cache: no page is taken into use that never was; kept prefixes go first
                     └──► trainers: what they hold beside their quanta is set down on disk

A running sequence may take a page more in any case, as far as there are any. The policy decides who
gives pages back where that is not enough. It answers at once; a trainer is asked only when memory
has been short for a while, since to set its state down and to take it up again costs work.
"""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final, Protocol

from ...policy.types import MemoryView

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ...policy.memory import MemoryThreshold
    from ...streams.memory import MemoryReading

log = logging.getLogger(__name__)

READ_INTERVAL_S = 0.05
"""A reading is used for this long."""
GIVE_WAY_S = 3.0
"""Memory that has been short for this long is asked of a trainer, and of the next after as long."""
COME_BACK_S = 2.0
"""Memory for a trainer must have been there for this long until its state is taken up again. Twice
as long each time that this was too early, `MOST_COME_BACK_S` at most."""
MOST_COME_BACK_S = 120.0
STEADY_S = 60.0
"""A trainer that is set down again within this time had been taken up too early."""

_MIB: Final = 1 << 20


class GrowingCache(Protocol):
    """What the watch needs of the KV cache."""

    @property
    def unused_pages(self) -> int:
        """Of the available pages, those that were never used."""

    @property
    def returned_pages(self) -> int:
        """Of the available pages, those that were used before and are free."""

    @property
    def kept_back_pages(self) -> int:
        """Free pages that may not be taken now."""

    def limit_growth(self, pages: int | None) -> None:
        """Take at most so many pages into use that never were (None: all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeeds:
    """What work takes, in bytes, as measured.

    Attributes:
        page: a KV page that is used for the first time; 0 where all were paid for at start.
        training_token: a row of a training quantum.
        prefill_token: a token of an iteration.
    """

    page: int = 0
    training_token: float = 0.0
    prefill_token: float = 0.0


class MemoryWatch:
    """Reads memory now and then, keeps τ_mem, and limits the growth of the KV cache.

    Args:
        read: gives a reading. Where it raises, that is logged once, and what was read last is
            used.
        threshold: keeps τ_mem.
        needs: of the work here.
        cache: whose growth is limited.
        on_near_miss: is told when memory was nearly used up.
    """

    def __init__(
        self,
        read: Callable[[], MemoryReading],
        threshold: MemoryThreshold,
        needs: MemoryNeeds,
        cache: GrowingCache,
        on_near_miss: Callable[[], None],
    ) -> None:
        self._read = read
        self._threshold = threshold
        self._needs = needs
        self._cache = cache
        self._on_near_miss = on_near_miss
        self._read_at_s: float | None = None
        self._available: tuple[int, int] = (threshold.total_bytes, 0)
        self._is_blind = False
        self.threshold = threshold.total_bytes

    @property
    def is_short(self) -> bool:
        """Whether sequences may have to wait for memory."""
        return self.threshold <= 0 or self._cache.kept_back_pages > 0

    @property
    def training_token(self) -> float:
        """What a row of a training quantum takes, in bytes."""
        return self._needs.training_token

    @property
    def near_misses(self) -> int:
        """Times that memory was nearly used up."""
        return self._threshold.near_misses

    @property
    def out_of_memories(self) -> int:
        """Times that it was."""
        return self._threshold.out_of_memories

    def out_of_memory(self, now_s: float) -> None:
        """An allocation has failed: keep more distance from now on."""
        self._threshold.out_of_memory(now_s)
        self._read_at_s = None

    def update(self, now_s: float, running: int) -> None:
        """Read it again if it is time; so many sequences run, which may take a page each."""
        if self._read_at_s is None or now_s - self._read_at_s >= READ_INTERVAL_S:
            self._refresh(now_s, running)

    def look(self, now_s: float) -> int:
        """τ_mem as it is now, for whoever asks beside the iterations: no page hangs on it."""
        self._refresh_threshold(now_s)
        return self.threshold

    def view(self) -> MemoryView:
        """What a policy sees, as of the last update."""
        needs = self._needs
        return MemoryView(
            self.threshold,
            self._threshold.total_bytes,
            needs.page,
            self._cache.unused_pages if needs.page else 0,
            needs.training_token,
            needs.prefill_token,
            self._cache.returned_pages if needs.page else 0,
            self._cache.kept_back_pages,
        )

    def _refresh(self, now_s: float, running: int) -> None:
        self._read_at_s = now_s
        self._refresh_threshold(now_s)
        if self._needs.page:
            pages = max(0, self.threshold // self._needs.page)
            self._cache.limit_growth(max(pages, running))

    def _refresh_threshold(self, now_s: float) -> None:
        try:
            reading = self._read()
        except Exception as error:  # noqa: BLE001 - boundary: drivers raise what they like
            if not self._is_blind:
                log.warning(
                    "live memory cannot be read (%s: %s); the last reading is used",
                    type(error).__name__,
                    error,
                )
            self._is_blind = True
        else:
            self._is_blind = False
            self._available = (reading.free_bytes, reading.allocator_unused_bytes)
        before = self._threshold.near_misses
        self.threshold = self._threshold.update(now_s, *self._available)
        if self._threshold.near_misses > before:
            self._on_near_miss()


# -- what trainers hold --------------------------------------------------------------------------


class Stake(IntEnum):
    """What a learner would lose if it gave its trainer's memory up now; the least goes first."""

    NOTHING = 0
    """It waits for feedback."""
    BATCH = 1
    """It waits for a quantum: the batch under way begins again."""
    EXAMINATION = 2
    """It examines a candidate, which is examined again."""


class Holder(Protocol):
    """Who holds a trainer's memory: a learner."""

    @property
    def stake(self) -> Stake | None:
        """What it would lose; None: it has no memory to give, or must not be disturbed now."""

    def give_way(self) -> None:
        """It is to set its trainer down as soon as it can. Only while it has a stake."""


@dataclass(slots=True, eq=False)
class _Member:
    name: str
    holder: Holder
    sample_bytes: float = 0.0  # what a sample of its last offer takes
    held_bytes: int | None = None  # what it gave up; None: it is not set down
    room: asyncio.Future[None] | None = None  # it waits to come back


class TrainerMemory:
    """Asks trainers for their memory while it is short, and lets them come back, one at a time.

        short for GIVE_WAY_S ─► give_way ─► (checkpoint, memory freed) ─► set_down
        take_up ◄─ (trainer made, checkpoint read) ◄─ wait_room ◄─ there for COME_BACK_S ◄─┘

    A trainer comes back when there is room for what it gave up and for a sample beside it, so one
    that has just left never finds its own room. Event loop only.

    Args:
        clock: seconds, monotonic.
        mark: writes down that something happened: a stable word, and the same for people.
    """

    def __init__(self, clock: Callable[[], float], mark: Callable[[str, str], None]) -> None:
        self._clock = clock
        self._mark = mark
        self._members: dict[int, _Member] = {}
        self._short_since_s: float | None = None
        self._room_since_s: float | None = None
        self._patience_s = COME_BACK_S
        self._taken_up_s = -math.inf

    # -- the learners' side ----------------------------------------------------------------------

    def enroll(self, key: int, name: str, holder: Holder) -> None:
        """A learner that may hold a trainer; its key is the one at the desk."""
        self._members[key] = _Member(name, holder)

    def set_down(self, key: int, held_bytes: int) -> None:
        """A trainer's state is on disk, and the memory that it held is free."""
        now_s = self._clock()
        member = self._members[key]
        member.held_bytes = held_bytes
        was_early = now_s - self._taken_up_s < STEADY_S
        self._patience_s = (
            min(2.0 * self._patience_s, MOST_COME_BACK_S) if was_early else COME_BACK_S
        )
        self._mark("trainer set down", f"{member.name}, {held_bytes // _MIB} MiB")
        log.warning(
            "memory stays short: the training state of %s (%d MiB) is on disk until there is room "
            "for it again; answers go on, and feedback is taken",
            member.name,
            held_bytes // _MIB,
        )

    async def wait_room(self, key: int) -> None:
        """Return when a trainer that was set down may come back. Cancelling takes that back."""
        member = self._members[key]
        member.room = asyncio.get_running_loop().create_future()
        try:
            await member.room
        finally:
            member.room = None

    def take_up(self, key: int) -> None:
        """A trainer that was set down is there again."""
        member = self._members[key]
        member.held_bytes = None
        self._taken_up_s = self._clock()
        self._mark("trainer taken up", member.name)
        log.info("there is memory again: training of %s goes on", member.name)

    # -- the scheduler's side --------------------------------------------------------------------

    def review(
        self,
        now_s: float,
        *,
        threshold: int,
        is_serving_short: bool,
        needs: Mapping[int, float],
        quiet_s: float,
    ) -> None:
        """Ask one for its memory, or let one come back, if it is time. To be called regularly.

        Args:
            now_s: on the clock.
            threshold: τ_mem, in bytes.
            is_serving_short: whether a request waits for memory.
            needs: by learner, the least that the quantum it offers would take, in bytes.
            quiet_s: for how long no quantum has run.
        """
        for key, needed in needs.items():
            if needed > 0.0 and key in self._members:
                self._members[key].sample_bytes = needed
        is_training_short = bool(needs) and min(needs.values()) > threshold
        if not (is_serving_short or threshold <= 0 or is_training_short):
            self._short_since_s = None
            self._let_one_back(now_s, threshold)
            return
        self._room_since_s = None
        if self._short_since_s is None:
            self._short_since_s = now_s
        if now_s - self._short_since_s >= GIVE_WAY_S and self._ask_one(needs, quiet_s):
            self._short_since_s = now_s

    def _ask_one(self, needs: Mapping[int, float], quiet_s: float) -> bool:
        """Whether there was anyone to ask: first who loses least."""
        stakes = [
            (stake, key)
            for key, member in self._members.items()
            if (stake := member.holder.stake) is not None
        ]
        for stake, key in sorted(stakes):
            if stake is not Stake.NOTHING and quiet_s < GIVE_WAY_S:
                return False  # training goes on as it is
            if needs.get(key) != 0.0:  # else it ends a backward first, which frees what it took
                self._members[key].holder.give_way()
                return True
        return False

    def _let_one_back(self, now_s: float, threshold: int) -> None:
        """Who was enrolled first goes first."""
        for member in self._members.values():
            room = member.room
            if room is None or room.done() or member.held_bytes is None:
                continue
            if threshold < member.held_bytes + member.sample_bytes:
                break
            if self._room_since_s is None:
                self._room_since_s = now_s
            if now_s - self._room_since_s >= self._patience_s:
                self._room_since_s = None
                room.set_result(None)
            return
        self._room_since_s = None
