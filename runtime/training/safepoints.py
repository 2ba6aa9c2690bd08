"""Where training gives way: the points between layers at which its thread waits while it is held.

The engine's thread calls `hold` when a deadline is near and `release` when it has passed; the
training thread calls `wait` at every layer boundary, forward and backward. A hold therefore takes
effect within one layer's work, and no kernel that was queued before it is taken back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable  # noqa: TC003 - annotations are inspected at run time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SafepointStatistics:
    """A snapshot.

    Attributes:
        is_held: whether a thread that comes to a safepoint waits.
        waiting: threads that wait now.
        waits: times that a thread waited, the present ones included.
        waited_s: seconds that were spent waiting, by waits that have ended.
    """

    is_held: bool
    waiting: int
    waits: int
    waited_s: float


class Safepoints:
    """A gate for the training thread. All methods may be called from any thread.

    Holding twice is holding once: whoever holds is the one scheduler. `hold` and `release` take a
    lock for a few instructions only, so the event loop may call them.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """An open gate; `clock` gives seconds and is read by threads that wait."""
        self._clock = clock
        self._changed = threading.Condition()
        self._is_held = False
        self._is_closed = False
        self._waiting = 0
        self._waits = 0
        self._waited_s = 0.0

    def hold(self) -> None:
        """Let the training thread wait at its next safepoint. No effect after `close`."""
        with self._changed:
            self._is_held = not self._is_closed

    def release(self) -> None:
        """Let it go on."""
        with self._changed:
            self._is_held = False
            self._changed.notify_all()

    def close(self) -> None:
        """Release for ever, so that what is under way can end."""
        with self._changed:
            self._is_closed = True
        self.release()

    def wait(self) -> None:
        """A safepoint: return at once unless held, else when released."""
        if not self._is_held:  # a stale read only moves the wait to the next safepoint
            return
        with self._changed:
            if not self._is_held:
                return
            self._waits += 1
            self._waiting += 1
            start_s = self._clock()
            try:
                self._changed.wait_for(lambda: not self._is_held)
            finally:
                self._waiting -= 1
                self._waited_s += self._clock() - start_s

    def statistics(self) -> SafepointStatistics:
        """What it did so far."""
        with self._changed:
            return SafepointStatistics(
                is_held=self._is_held,
                waiting=self._waiting,
                waits=self._waits,
                waited_s=self._waited_s,
            )
