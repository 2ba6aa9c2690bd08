"""τ_mem: how much memory may be taken now, from what is live.

    free + what the allocator holds unused
    ├──────────── τ_mem ────────────┼──── margin ────┤
                                     grows after a near miss or an out-of-memory, and decays

The margin is for what no reading sees: other processes, fragmentation, libraries' workspaces, and
what changes between the reading and the use.
"""

from __future__ import annotations

import math

MEBIBYTE = 1 << 20


class MemoryThreshold:
    """Follows live memory. Pure: the clock is the caller's.

    Args:
        total_bytes: memory of the device, or what a container may use of it.
        floor_share: the margin when nothing has happened for long, as a share of `total_bytes`.
        floor_limit_bytes: that margin is never more than this.
        ceiling_share: the largest margin, as a share of `total_bytes`.
        growth: what the margin is multiplied with after a near miss or an out-of-memory.
        half_life_s: the time in which half of what it has grown by is given back, in seconds.
        near_miss_share: less left than this share of the floor is a near miss.
        quiet_s: events closer to each other than this grow the margin once: it is the same event,
            seen twice. In seconds.

    Attributes:
        total_bytes: as given.
        near_misses, out_of_memories: counts so far.

    Raises:
        ValueError: a value is out of range; names it and the remedy.
    """

    __slots__ = (
        "_above",
        "_ceiling",
        "_floor",
        "_grown_at",
        "_growth",
        "_half_life_s",
        "_is_near",
        "_near_bytes",
        "_quiet_s",
        "_read_at",
        "near_misses",
        "out_of_memories",
        "total_bytes",
    )

    def __init__(
        self,
        total_bytes: int,
        *,
        floor_share: float = 0.04,
        floor_limit_bytes: int = 1024 * MEBIBYTE,
        ceiling_share: float = 0.25,
        growth: float = 2.0,
        half_life_s: float = 60.0,
        near_miss_share: float = 0.5,
        quiet_s: float = 0.5,
    ) -> None:
        _check("total_bytes", total_bytes, total_bytes > 0, "give the device's memory, above 0")
        _check("floor_share", floor_share, 0.0 < floor_share < 1.0, "use a share above 0, below 1")
        _check("floor_limit_bytes", floor_limit_bytes, floor_limit_bytes > 0, "use 1 or more")
        _check(
            "ceiling_share",
            ceiling_share,
            floor_share <= ceiling_share < 1.0,
            f"use a share from floor_share, {floor_share}, to below 1",
        )
        _check("growth", growth, 1.0 <= growth < math.inf, "use 1 or more")
        _check("half_life_s", half_life_s, half_life_s > 0.0, "use more than 0 s")
        _check("near_miss_share", near_miss_share, 0.0 <= near_miss_share <= 1.0, "use 0 to 1")
        _check("quiet_s", quiet_s, 0.0 <= quiet_s < math.inf, "use 0 s or more")
        self.total_bytes = total_bytes
        self._floor = min(floor_share * total_bytes, float(floor_limit_bytes))
        self._ceiling = max(self._floor, ceiling_share * total_bytes)
        self._growth = growth
        self._half_life_s = half_life_s
        self._near_bytes = near_miss_share * self._floor
        self._quiet_s = quiet_s
        self._above = 0.0  # the margin beyond the floor, when it was read last
        self._read_at = -math.inf
        self._grown_at = -math.inf
        self._is_near = False
        self.near_misses = 0
        self.out_of_memories = 0

    @property
    def margin_bytes(self) -> int:
        """What is left alone, as of the last call."""
        return round(self._floor + self._above)

    def update(self, now_s: float, free_bytes: int, unused_bytes: int = 0) -> int:
        """τ_mem in bytes; zero or less: nothing more may be taken.

        A reading that leaves less than `near_miss_share` of the floor counts as a near miss, once
        until the floor was free again.

        Args:
            now_s: the time, in seconds of one clock.
            free_bytes: what the device has free.
            unused_bytes: what this process's caching allocator holds without using it.
        """
        self._decay(now_s)
        available = max(free_bytes, 0) + max(unused_bytes, 0)
        if available < self._near_bytes:
            if not self._is_near:
                self._is_near = True
                self.near_miss(now_s)
        elif available >= self._floor:
            self._is_near = False
        return available - self.margin_bytes

    def near_miss(self, now_s: float) -> None:
        """Memory nearly ran out: an allocation had to be retried, say."""
        self.near_misses += 1
        self._grow(now_s)

    def out_of_memory(self, now_s: float) -> None:
        """An allocation failed."""
        self.out_of_memories += 1
        self._grow(now_s)

    def _grow(self, now_s: float) -> None:
        self._decay(now_s)
        if now_s - self._grown_at >= self._quiet_s:
            self._grown_at = now_s
            margin = min((self._floor + self._above) * self._growth, self._ceiling)
            self._above = margin - self._floor

    def _decay(self, now_s: float) -> None:
        """Give back what the time since the last call is worth; a clock that went back: nothing."""
        passed_s = now_s - self._read_at
        if passed_s > 0.0:
            self._above *= 0.5 ** (passed_s / self._half_life_s)
            self._read_at = now_s


def _check(name: str, value: float, is_right: bool, remedy: str) -> None:
    if not is_right:
        raise ValueError(f"{name} is {value!r}; {remedy}")
