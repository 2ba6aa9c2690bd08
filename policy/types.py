"""What a policy sees and what it answers: frozen values between the engine and its decisions.

    engine ── Observation ──► policy.plan ── IterationPlan ──► engine

A sequence has no phase, only a lag: tokens known minus tokens computed. A prompt that has just come
has a lag of its length, one that prefills in chunks less each time, and a decoding sequence a lag
of one: the token sampled last. Keys are the engine's own numbers for sequences.
"""

from __future__ import annotations

from collections.abc import Hashable  # noqa: TC003 - NamedTuple fields are inspected at run time
from dataclasses import dataclass
from typing import NamedTuple, Protocol

PRIORITY_STEP_S = 60.0
"""Seconds of waiting that one level of priority is worth.

A request is overtaken by one of the next better level only if that comes within this time, so no
stream of urgent requests, however long, can keep an ordinary one out for ever.
"""


def rank_s(priority: int, arrival_s: float) -> float:
    """The place of a request among the others; smaller goes first.

    Both that have waited equally long: the lower `priority` first (as in vLLM). Equal priorities:
    first come, first served. The order of two requests never changes while they wait.
    """
    return arrival_s + priority * PRIORITY_STEP_S


class RunningView(NamedTuple):
    """A sequence that holds pages."""

    key: int
    computed: int
    """Tokens whose KV is in its pages."""
    known: int
    """Tokens of prompt and answer so far; more than `computed`."""
    pages: int
    """Pages in its block table; they may cover fewer than `known` tokens."""
    private_pages: int
    """Pages that would become available if it gave way, as far as the engine knows."""
    is_background: bool = False
    """Nobody waits for it: work of the runtime's own, such as scoring feedback."""


class WaitingView(NamedTuple):
    """A sequence that holds nothing yet, or no longer (preempted)."""

    key: int
    rank_s: float
    known: int
    """Tokens of its prompt, and of its answer if it ran before."""
    cached: int
    """Tokens that are likely to be found in the prefix trie."""
    adapter: Hashable | None
    """The adapter version that it needs a slot for; None for the base model."""
    is_background: bool = False
    """See `RunningView`."""


class Budgets(NamedTuple):
    """What no iteration may exceed. Set at start."""

    tokens: int
    """Tokens computed in one iteration."""
    sequences: int
    """Sequences that run at once."""
    page_size: int
    """Token slots per page."""
    background_tokens: int = 64
    """Of `tokens`, most that background prompts may have while anybody waits for an answer."""


class Observation(NamedTuple):
    """The state of the engine between two iterations."""

    now_s: float
    budgets: Budgets
    available_pages: int
    """Pages that are free, or hold prefixes that nobody uses."""
    running: tuple[RunningView, ...]
    """In order of rank."""
    waiting: tuple[WaitingView, ...]
    """In order of rank."""
    adapters_in_use: frozenset[Hashable] = frozenset()
    """Adapter versions whose slots running sequences use."""
    free_adapter_slots: int = 0
    """Adapter slots without a user."""


class Chunk(NamedTuple):
    """So many of a sequence's next tokens."""

    key: int
    tokens: int


@dataclass(frozen=True, slots=True)
class IterationPlan:
    """One iteration. The engine carries out the fields in this order.

    Attributes:
        preemptions: running sequences that give up their pages and wait again.
        decodes: running sequences with a lag of one, which get their next token.
        prefills: running sequences whose prompt goes on.
        admissions: waiting sequences that start, with their first chunk.
        training: a quantum to run beside; none of today's policies plans one.
    """

    preemptions: tuple[int, ...] = ()
    decodes: tuple[int, ...] = ()
    prefills: tuple[Chunk, ...] = ()
    admissions: tuple[Chunk, ...] = ()
    training: None = None

    @property
    def tokens(self) -> int:
        """Tokens that the iteration computes."""
        return (
            len(self.decodes)
            + sum(chunk.tokens for chunk in self.prefills)
            + sum(chunk.tokens for chunk in self.admissions)
        )


class Policy(Protocol):
    """Decides what the next iteration holds."""

    def plan(self, observation: Observation) -> IterationPlan:
        """The next iteration. Pure: the same observation gives the same plan."""
