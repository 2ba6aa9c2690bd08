"""Live memory for the scheduler, and who gives way when it is short.

    a reading ─► τ_mem ─► policy: training shrinks, training stops, nothing new is admitted
                     └──► KV cache: no page is taken into use that never was; kept prefixes go first

A running sequence may take a page more in any case, as far as there are any. The policy decides who
gives pages back where that is not enough.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ...policy.types import MemoryView

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...policy.memory import MemoryThreshold
    from ...streams.memory import MemoryReading

log = logging.getLogger(__name__)

READ_INTERVAL_S = 0.05
"""A reading is used for this long."""


class GrowingCache(Protocol):
    """What the watch needs of the KV cache."""

    @property
    def unused_pages(self) -> int:
        """Of the available pages, those that were never used."""

    @property
    def is_growth_limited(self) -> bool:
        """Whether pages are kept back."""

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
        return self.threshold <= 0 or self._cache.is_growth_limited

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
        )

    def _refresh(self, now_s: float, running: int) -> None:
        self._read_at_s = now_s
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
        if self._needs.page:
            pages = max(0, self.threshold // self._needs.page)
            self._cache.limit_growth(max(pages, running))
