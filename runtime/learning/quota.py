"""How many events each source sent within a sliding window."""

from __future__ import annotations

from collections import deque

from ..errors import OverloadedError


class Quota:
    """At most `limit` events per source within `window_s` seconds.

    What is taken counts at once and for good only after `keep`; `undo` gives back what was taken
    since the last of the two, for a transaction that failed. Times are POSIX seconds and should not
    fall; of a clock that was set back, what lies in the future no longer counts.

    Memory: a number per event of the last window.
    """

    def __init__(self, limit: int, window_s: float) -> None:
        self._limit = limit
        self._window_s = window_s
        self._times: dict[str, deque[float]] = {}
        self._taken: list[str] = []

    def take(self, source: str, now_s: float) -> None:
        """Count one event. Raises `OverloadedError` if the quota is used up; then none is."""
        times = self._times.setdefault(source, deque())
        self._drop_old(times, now_s)
        if len(times) >= self._limit:
            wait_s = times[0] + self._window_s - now_s
            raise OverloadedError(
                f"source {source!r} has sent {len(times)} events in the last "
                f"{self._window_s:g} s, as many as learning.feedback.quota_events allows; "
                f"send this one again in {wait_s:.1f} s",
                retry_after_s=wait_s,
                code="quota_exceeded",
            )
        times.append(now_s)
        self._taken.append(source)

    def seed(self, source: str, created_s: float) -> None:
        """Count an event of before; the oldest come first."""
        self._times.setdefault(source, deque()).append(created_s)

    def keep(self) -> None:
        """What was taken so far is stored."""
        self._taken.clear()

    def undo(self) -> None:
        """What was taken since `keep` was not stored."""
        for source in self._taken:
            if times := self._times.get(source):
                times.pop()
        self._taken.clear()

    def forget(self, source: str) -> None:
        """Know nothing of this source any more."""
        self._times.pop(source, None)
        self._taken = [taken for taken in self._taken if taken != source]

    def sweep(self, now_s: float) -> None:
        """Let go of sources that sent nothing within the window."""
        for source, times in list(self._times.items()):
            self._drop_old(times, now_s)
            if not times:
                del self._times[source]

    def _drop_old(self, times: deque[float], now_s: float) -> None:
        while times and times[0] <= now_s - self._window_s:
            times.popleft()
        while times and times[-1] > now_s:
            times.pop()
