"""What a runtime tells about itself: a snapshot when asked, and events to those who listen."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from .scheduling.statistics import ScheduleStatistics

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..cache.manager import CacheStatistics
    from .types import Response

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeStatistics:
    """A runtime at one moment. Counts and seconds are since its start.

    Attributes:
        running: sequences that hold pages now.
        waiting: sequences in the queue now, siblings that wait for their first one included.
        cache: the KV pages.
        preemptions: times a running sequence gave up its pages and went back to the queue.
        iterations: iterations that the device has finished.
        failed_iterations: iterations in which it raised.
        prompt_tokens: tokens of admitted prompts; a prompt with `n` answers counts once.
        generated_tokens: tokens of answers, as callers were or will be given them.
        finished: completions that have ended, for whatever reason.
        rejected: requests that were not admitted.
        device_s: waiting for the lane: forward, sampling and the way there and back.
        forward_s: of that, the forward.
        sample_s: of that, sampling.
        plan_s: observing, planning and preparing iterations: the device waits.
        commit_s: taking results: the device waits.
        deliver_s: text and waking of readers, while the next iteration runs.
        schedule: what the scheduler did.
    """

    running: int
    waiting: int
    cache: CacheStatistics
    preemptions: int
    iterations: int
    failed_iterations: int
    prompt_tokens: int
    generated_tokens: int
    finished: int
    rejected: int
    device_s: float
    forward_s: float
    sample_s: float
    plan_s: float
    commit_s: float
    deliver_s: float
    schedule: ScheduleStatistics = field(default_factory=ScheduleStatistics)


class Listener(Protocol):
    """Is told what happens to requests, on the event loop. Must be quick.

    A method that raises is logged and otherwise ignored.
    """

    def on_finished(self, response: Response, /) -> None:
        """A completion has ended, for whatever reason."""

    def on_first_token(self, ttft_s: float, /) -> None:
        """A completion has its first token, this long after its arrival."""

    def on_token_gap(self, gap_s: float, /) -> None:
        """A completion has another token, this long after the one before."""

    def on_rejected(self, reason: str, /) -> None:
        """A request was not admitted; `reason` is a stable word."""


class Listeners:
    """The listeners of a runtime, as one."""

    def __init__(self) -> None:
        self._listeners: tuple[Listener, ...] = ()

    def add(self, listener: Listener) -> None:
        """Tell `listener` from now on."""
        self._listeners = (*self._listeners, listener)

    def remove(self, listener: Listener) -> None:
        """Stop telling it; nothing happens if it was not told."""
        self._listeners = tuple(known for known in self._listeners if known is not listener)

    def on_finished(self, response: Response) -> None:
        """Pass it on."""
        for listener in self._listeners:
            _tell(listener.on_finished, response)

    def on_first_token(self, ttft_s: float) -> None:
        """Pass it on."""
        for listener in self._listeners:
            _tell(listener.on_first_token, ttft_s)

    def on_token_gap(self, gap_s: float) -> None:
        """Pass it on."""
        for listener in self._listeners:
            _tell(listener.on_token_gap, gap_s)

    def on_rejected(self, reason: str) -> None:
        """Pass it on."""
        for listener in self._listeners:
            _tell(listener.on_rejected, reason)


def _tell(method: Callable[[Any], None], value: object) -> None:
    try:
        method(value)
    except Exception:  # a listener is a guest: its failure must not reach a request
        log.exception("listener %r failed", method)
