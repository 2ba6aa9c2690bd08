"""What every policy shares: the room that an iteration has, and what may go into it.

    Room(observation)          running sequences grow, or the last of them give their pages back;
      │                        the decodes are in
      ├─ most_tokens, add_prefill      a running prompt goes on
      ├─ lets_in, add_admission        a waiting one starts
      ├─ start_quantum                 training takes what memory is left
      └─ plan                          the iteration

However a policy chooses, a `Room` keeps these:

- Tokens, sequences, pages, adapter slots and τ_mem are not exceeded. Only a sequence that is alone
  may take what the last two leave, for something must move on.
- Every decode is in the iteration.
- When the running sequences need more pages than there are, the last in rank give way until the
  others fit; the first never does. Nothing is admitted in such an iteration.
- Nobody overtakes a sequence that waits for pages. One that waits for an adapter slot is overtaken
  by the base model's only: the slots drain towards it.
- Memory is given up in this order: training shrinks (it gets what serving leaves), training stops
  (once a prompt lacks memory), nothing is admitted, prompts stop, and at last running sequences
  give pages back.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from .types import Chunk, IterationPlan, TrainingPlan

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from .types import (
        Budgets,
        MemoryView,
        Observation,
        RunningView,
        TrainingOffer,
        WaitingView,
    )

HEADROOM_TOKENS = 16
"""An admission leaves pages for every running sequence to grow by this many tokens.

Without it a sequence would be let in with the last page and thrown out one iteration later, its
prefill wasted. A sequence that is alone may take every page.
"""
ALONE_TOKENS = 16
"""Without memory left, a prompt that nothing runs beside still gets so many tokens."""
MEMORY_AGAIN_S = 0.1
"""After this long the memory that a quantum waits for is looked at again."""


class Room:
    """What is left of an iteration while its plan is made. Lives as long as `plan` does.

    Attributes:
        decodes: keys of those that get their next token.
        unfinished: running sequences whose prompt goes on, in order of rank.
        context: KV entries that the decodes read.
        due_s: when the first of the decodes' tokens is due.
        preemptions: keys of those that gave way.
        tokens: left of the budget.
        background_tokens: of them, left for background prompts.
        is_awaited: whether anybody waits for an answer.
        is_closed: whether nobody else may start.
        is_short: whether serving lacks memory.
        page_size: tokens per page.
    """

    __slots__ = (
        "_adapters",
        "_admissions",
        "_asked",
        "_asked_bytes",
        "_available",
        "_bytes",
        "_has_started",
        "_headroom",
        "_is_alone",
        "_is_lane_busy",
        "_is_slot_wanted",
        "_keeps_back",
        "_paid",
        "_prefill_token",
        "_prefills",
        "_seats",
        "_slots",
        "_training_token",
        "_unit",
        "_unused",
        "background_tokens",
        "context",
        "decodes",
        "due_s",
        "is_awaited",
        "is_closed",
        "is_short",
        "page_size",
        "preemptions",
        "tokens",
        "unfinished",
    )

    def __init__(self, seen: Observation) -> None:
        budgets, memory = seen.budgets, seen.memory
        size = budgets.page_size
        found = _survey(seen.running, size)
        self.page_size = size
        self._available = seen.available_pages
        self._unit, self._bytes = _means(memory)
        self._paid = memory.returned_pages if memory is not None else 0
        self._unused = memory.unused_pages if memory is not None else 0
        self._keeps_back = memory is not None and memory.kept_back_pages > 0
        self.preemptions: tuple[int, ...] = ()
        if found.wanted > (free := self._free_pages()):
            keep, self.preemptions, given_back = _preempt(seen.running, found.wanted, free, size)
            self._available += given_back
            self._paid += given_back
            if self.preemptions:
                found = _survey(keep, size)
        self._take_pages(found.wanted)

        self.decodes = tuple(found.decodes)
        self.unfinished = found.unfinished
        self.context = found.context
        self.due_s = found.due_s
        self.tokens = budgets.tokens - len(self.decodes)
        self.is_awaited = found.is_awaited or not all(view.is_background for view in seen.waiting)
        self.background_tokens = _background_tokens(budgets, is_awaited=self.is_awaited)
        self._headroom = max(0, found.headroom)
        self._seats = min(budgets.sequences, budgets.tokens) - len(seen.running)
        self._is_alone = not seen.running
        quantum = seen.training.running if seen.training is not None else None
        self._is_lane_busy = quantum is not None
        self._adapters: set[Hashable] = set(seen.adapters_in_use)
        self._slots = seen.free_adapter_slots
        self._is_slot_wanted = False
        self.is_closed = bool(self.preemptions) or self._seats <= 0 or self.tokens <= 0
        self.is_short = False
        self._prefill_token = memory.prefill_token if memory is not None else 0.0
        self._training_token = memory.training_token if memory is not None else 0.0
        if quantum is not None and quantum.kind in ("kl", "forward"):
            self._bytes -= quantum.tokens * self._training_token  # its graph is still growing
        if self._prefill_token:
            self._bytes -= len(self.decodes) * self._prefill_token
        self._has_started = False  # a quantum that takes memory
        self._asked = 0  # pages of the one that was let in last
        self._asked_bytes = 0  # and the memory that they take
        self._prefills: list[Chunk] = []
        self._admissions: list[Chunk] = []

    # -- prompts ---------------------------------------------------------------------------------

    def most_tokens(self, lag: int, *, is_background: bool = False, is_new: bool = False) -> int:
        """How many of a prompt's `lag` tokens may be computed; 0 where it has to wait.

        Those that wait for memory do so only while something else runs. `is_new`: it is the one
        that was let in last.
        """
        tokens = min(lag, self.tokens)
        if is_background:
            tokens = min(tokens, self.background_tokens)
        if self._prefill_token:
            left = self._bytes
            if is_new:
                left -= self._asked_bytes
            if tokens * self._prefill_token > left:
                self.is_short = True
                fitting = int(max(0.0, left) // self._prefill_token)
                if fitting == 0 and not self.has_work and not self._has_started:
                    fitting = ALONE_TOKENS
                tokens = min(tokens, fitting)
        return tokens

    def add_prefill(self, view: RunningView, tokens: int) -> None:
        """The prompt goes on with as many tokens."""
        self._prefills.append(Chunk(view.key, tokens))
        self.tokens -= tokens
        if view.is_background:
            self.background_tokens -= tokens
        if self._prefill_token:
            self._bytes -= tokens * self._prefill_token

    def lets_in(self, view: WaitingView) -> bool:
        """Whether a waiting sequence may start now; else notes whom it must not be overtaken by.

        To be asked in the order in which they should start, each at most once.
        """
        pages = self._asked = pages_to_start(view, self.page_size)
        taken = self._asked_bytes = self._new_pages(pages) * self._unit if self._unit else 0
        has_pages = pages <= self._available - self._headroom
        if (not has_pages or 0 < taken > self._bytes) and not self._is_last_resort(pages):
            self.is_closed = True
            self.is_short |= has_pages or self._keeps_back
            return False
        adapter = view.adapter
        if adapter is not None and (
            self._is_slot_wanted or (adapter not in self._adapters and self._slots <= 0)
        ):
            self._is_slot_wanted = True
            return False
        return True

    def add_admission(self, view: WaitingView, tokens: int) -> None:
        """The sequence that was let in last starts with as many tokens."""
        adapter = view.adapter
        if adapter is not None and adapter not in self._adapters:
            self._adapters.add(adapter)
            self._slots -= 1
        self._admissions.append(Chunk(view.key, tokens))
        self._take_pages(self._asked)
        self.tokens -= tokens
        if view.is_background:
            self.background_tokens -= tokens
        if self._prefill_token:
            self._bytes -= tokens * self._prefill_token
        self._is_alone = False
        self._seats -= 1
        if self._seats <= 0 or self.tokens <= 0:
            self.is_closed = True

    # -- training --------------------------------------------------------------------------------

    @property
    def training_bytes(self) -> float:
        """What a quantum may take of the memory: what serving leaves; 0 while that lacks some."""
        return 0.0 if self.is_short else max(0.0, self._bytes)

    def quantum_bytes(self, offer: TrainingOffer) -> float:
        """What an offer takes. A backward and a step give back what the forward took."""
        return 0.0 if offer.kind in ("backward", "step") else offer.tokens * self._training_token

    def rows_for(self, offer: TrainingOffer) -> int | None:
        """Most rows of an offer that memory allows; 0: all of them, None: not one sample's."""
        needed, left = self.quantum_bytes(offer), self.training_bytes
        if needed <= left:
            return 0  # also where nothing is known of what rows take
        rows = int(left // self._training_token)
        return rows if rows >= rows_per_sample(offer) else None

    def start_quantum(self, offers: Iterable[TrainingOffer], most_rows: int = 0) -> TrainingPlan:
        """Start the first of `offers` that memory allows, cut to it and to `most_rows`.

        One sample is always computed whole. `most_rows` 0: as offered. What it takes is no longer
        there for prompts that are added later.
        """
        is_refused = False
        for offer in offers:
            allowed = self.rows_for(offer)
            if allowed is None:
                is_refused = True
                continue
            rows = offer.tokens
            if offer.kind not in ("backward", "step"):
                if most_rows:
                    rows = min(rows, max(most_rows, rows_per_sample(offer)))
                if allowed:
                    rows = min(rows, allowed)
                self._bytes -= rows * self._training_token
                self._has_started = True
            return TrainingPlan(offer.key, rows if rows < offer.tokens else 0)
        return TrainingPlan(again_s=MEMORY_AGAIN_S) if is_refused else TrainingPlan()

    # -- the whole -------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether the iteration computes anything so far."""
        return bool(self.decodes or self._prefills or self._admissions)

    @property
    def has_prompts(self) -> bool:
        """Whether a prompt is in it so far."""
        return bool(self._prefills or self._admissions)

    @property
    def free_bytes(self) -> float:
        """Of τ_mem, what nothing in the iteration takes so far; infinite where not watched."""
        return max(0.0, self._bytes)

    def prompt_bytes(self, tokens: int, pages: int) -> float:
        """What a prompt's next `tokens` and so many new pages take of τ_mem."""
        return tokens * self._prefill_token + self._new_pages(pages) * self._unit

    def plan(self, training: TrainingPlan | None = None) -> IterationPlan:
        """What was put into it."""
        return IterationPlan(
            self.preemptions,
            self.decodes,
            tuple(self._prefills),
            tuple(self._admissions),
            training if training is not None else TrainingPlan(),
        )

    # -- the books -------------------------------------------------------------------------------

    def _free_pages(self) -> int:
        """Pages that may be used: those paid for, and those that τ_mem pays for."""
        if not self._unit:
            return self._available
        affordable = int(max(0.0, self._bytes) // self._unit)
        if affordable >= self._unused:
            return self._available  # also those of prefixes, which are taken last
        return min(self._available, self._paid + affordable)

    def _new_pages(self, pages: int) -> int:
        """Of the next so many pages, those that take memory."""
        new = pages - self._paid
        if new <= 0:
            return 0
        return new if new < self._unused else self._unused

    def _is_last_resort(self, pages: int) -> bool:
        """Whether a sequence starts although it does not fit: nothing else can move on."""
        if not self._is_alone or self._has_started:
            return False
        return pages > self._available or not self._is_lane_busy

    def _take_pages(self, pages: int) -> None:
        self._available -= pages
        if pages <= self._paid:
            self._paid -= pages
            return
        new = self._new_pages(pages)
        self._paid = 0
        self._unused -= new
        self._bytes -= new * self._unit


class _Survey(NamedTuple):
    """What the running sequences are and want."""

    decodes: list[int]
    unfinished: list[RunningView]
    context: int
    due_s: float
    wanted: int
    """Pages that they lack for the tokens they know."""
    headroom: int
    """Pages that they will ask for within `HEADROOM_TOKENS` tokens."""
    is_awaited: bool


def _survey(running: Iterable[RunningView], size: int) -> _Survey:
    """One pass over the running sequences; the part of a plan that grows with them."""
    decodes: list[int] = []
    unfinished: list[RunningView] = []
    context = wanted = headroom = 0
    due_s = math.inf
    is_awaited = False
    for view in running:
        key, computed, known, pages, _, is_background, token_due_s, _ = view
        needed = -(-known // size)
        if needed > pages:
            wanted += needed - pages
            pages = needed
        headroom += -(-(known + HEADROOM_TOKENS) // size) - pages
        if not is_background:
            is_awaited = True
        if known - computed == 1:
            decodes.append(key)
            context += known
            if token_due_s < due_s:
                due_s = token_due_s
        else:
            unfinished.append(view)
    return _Survey(decodes, unfinished, context, due_s, wanted, headroom, is_awaited)


def _means(memory: MemoryView | None) -> tuple[int, float]:
    """Bytes per new page (0: they cost nothing), and bytes that may be taken."""
    if memory is None:
        return 0, math.inf
    page = memory.page if memory.unused_pages > 0 else 0
    return page, float(max(0, memory.threshold))


def _preempt(
    running: tuple[RunningView, ...], wanted: int, available: int, size: int
) -> tuple[tuple[RunningView, ...], tuple[int, ...], int]:
    """Who stays, who gives way so that `wanted` pages are there, and the pages they give back."""
    keep = len(running)
    preemptions: list[int] = []
    given_back = 0
    while wanted > available + given_back and keep > 1:
        keep -= 1
        victim = running[keep]
        wanted -= max(0, -(-victim.known // size) - victim.pages)
        given_back += victim.private_pages
        preemptions.append(victim.key)
    return running[:keep], tuple(preemptions), given_back


def _background_tokens(budgets: Budgets, *, is_awaited: bool) -> int:
    """What background prompts may have of this iteration."""
    return min(budgets.background_tokens, budgets.tokens) if is_awaited else budgets.tokens


def pages_to_start(view: WaitingView, page_size: int) -> int:
    """What of the available pages a waiting sequence takes, for all tokens it knows.

    Those beside its cached ones, and of these the ones that nobody else reads.
    """
    return -(-view.known // page_size) - view.cached // page_size + view.idle_pages


def rows_per_sample(offer: TrainingOffer) -> int:
    """Rows of one of an offer's samples, on average."""
    return -(-offer.tokens // max(1, offer.samples))


def pack_in_order(seen: Observation) -> Room:
    """Continuous batching with chunked prefill, first come first served.

    One token budget per iteration, spent in this order (Yu et al. 2022, "Orca", §4.2; Agrawal et
    al. 2024, "Sarathi-Serve", §4.2):

        ├─ decodes: one token each ─┼─ running prefills ─┼─ admissions: a first chunk ─┤
                                                                             token budget

    Background prompts (reference log-probabilities, the gate, prefixes of a new version) take part
    like any other, with a low rank. While anybody waits for an answer they get a small share of the
    budget.
    """
    room = Room(seen)
    for running in room.unfinished:
        if room.tokens <= 0:
            break
        lag = running.known - running.computed
        tokens = room.most_tokens(lag, is_background=running.is_background)
        if tokens > 0:
            room.add_prefill(running, tokens)
    for view in seen.waiting:
        if room.is_closed or room.tokens <= 0:
            break
        if view.is_background and room.background_tokens <= 0:
            continue
        if room.lets_in(view):
            tokens = room.most_tokens(
                view.known - view.cached, is_background=view.is_background, is_new=True
            )
            if tokens <= 0:
                break
            room.add_admission(view, tokens)
    return room
