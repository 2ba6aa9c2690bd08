"""The policy that only serves: continuous batching with chunked prefill, first come first served.

One token budget per iteration, spent in this order (Yu et al. 2022, "Orca", §4.2; Agrawal et al.
2024, "Sarathi-Serve", §4.2):

    ├─ decodes: one token each ─┼─ running prefills ─┼─ admissions: a first chunk ─┤
                                                                         token budget

There are never more running sequences than the budget has tokens, so every decode is in every
iteration, however long the prompts beside it are.

Background prompts (reference log-probabilities, the gate, prefixes of a new version) take part like
any other, with a low rank. While anybody waits for an answer they get a small share of the budget.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .types import Chunk, IterationPlan

if TYPE_CHECKING:
    from collections.abc import Hashable

    from .types import Observation, RunningView, WaitingView

HEADROOM_TOKENS = 16
"""An admission leaves pages for every running sequence to grow by this many tokens.

Without it a sequence would be let in with the last page and thrown out one iteration later, its
prefill wasted. A sequence that is alone may take every page.
"""


class InferenceOnly:
    """Serves and never trains. See the module for the rules."""

    def plan(self, observation: Observation) -> IterationPlan:
        """The next iteration.

        - When the running sequences need more pages than are available, the last in rank give way
          until the others fit; the first never does, so something always moves on. Nothing is
          admitted in such an iteration.
        - Waiting sequences start in rank order while sequences, tokens and pages for their whole
          prompt are there. Nobody overtakes a sequence that waits for pages.
        - A sequence that waits for an adapter slot is overtaken by those of the base model only:
          the slots drain towards it.
        """
        budgets = observation.budgets
        page_size = budgets.page_size
        running = observation.running
        pages_left = observation.available_pages

        wanted = 0
        for view in running:
            wanted += _pages_to_grow(view, page_size)
        if wanted > pages_left:
            running, preemptions = _preempt(running, wanted, pages_left, page_size)
        else:
            preemptions = ()
            pages_left -= wanted

        decodes: list[int] = []
        unfinished: list[RunningView] = []
        for view in running:
            if view.known - view.computed == 1:
                decodes.append(view.key)
            else:
                unfinished.append(view)
        tokens_left = budgets.tokens - len(decodes)
        background_left = _background_tokens(observation)
        prefills: list[Chunk] = []
        for view in unfinished:
            if tokens_left <= 0:
                break
            tokens = min(view.known - view.computed, tokens_left)
            if view.is_background:
                tokens = min(tokens, background_left)
                background_left -= tokens
            if tokens > 0:
                tokens_left -= tokens
                prefills.append(Chunk(view.key, tokens))

        admissions: tuple[Chunk, ...] = ()
        if observation.waiting and tokens_left > 0 and not preemptions:
            admissions = _admit(observation, tokens_left, pages_left, background_left)
        return IterationPlan(preemptions, tuple(decodes), tuple(prefills), admissions)


def _background_tokens(observation: Observation) -> int:
    """What background prompts may have of this iteration."""
    budgets = observation.budgets
    is_awaited = not all(view.is_background for view in observation.running) or not all(
        view.is_background for view in observation.waiting
    )
    return min(budgets.background_tokens, budgets.tokens) if is_awaited else budgets.tokens


def _pages_to_grow(view: RunningView, page_size: int) -> int:
    """Pages that a running sequence lacks for the tokens it knows."""
    return max(0, -(-view.known // page_size) - view.pages)


def _preempt(
    running: tuple[RunningView, ...], wanted: int, available: int, page_size: int
) -> tuple[tuple[RunningView, ...], tuple[int, ...]]:
    """Who stays and who gives way so that `wanted` pages are there."""
    keep = len(running)
    preemptions: list[int] = []
    while wanted > available and keep > 1:
        keep -= 1
        victim = running[keep]
        wanted -= _pages_to_grow(victim, page_size)
        available += victim.private_pages
        preemptions.append(victim.key)
    return running[:keep], tuple(preemptions)


def _headroom(running: tuple[RunningView, ...], page_size: int) -> int:
    """Pages that the running sequences will ask for within `HEADROOM_TOKENS` tokens."""
    pages = 0
    for view in running:
        grown = -(-(view.known + HEADROOM_TOKENS) // page_size)
        pages += grown - max(view.pages, -(-view.known // page_size))
    return max(0, pages)


def _admit(
    observation: Observation, tokens_left: int, pages_left: int, background_left: int
) -> tuple[Chunk, ...]:
    """The waiting sequences that start now, in rank order."""
    budgets = observation.budgets
    page_size = budgets.page_size
    sequences_left = min(budgets.sequences, budgets.tokens) - len(observation.running)
    pages_left -= _headroom(observation.running, page_size)
    is_alone = not observation.running
    in_use: set[Hashable] = set(observation.adapters_in_use)
    slots_left = observation.free_adapter_slots
    someone_waits_for_a_slot = False
    admissions: list[Chunk] = []
    for view in observation.waiting:
        if sequences_left <= 0 or tokens_left <= 0:
            break
        if view.is_background and background_left <= 0:
            continue
        pages = pages_to_start(view, page_size)
        if pages > pages_left and not is_alone:
            break
        if view.adapter is not None:
            is_new = view.adapter not in in_use
            if someone_waits_for_a_slot or (is_new and slots_left <= 0):
                someone_waits_for_a_slot = True
                continue
            if is_new:
                in_use.add(view.adapter)
                slots_left -= 1
        tokens = min(view.known - view.cached, tokens_left)
        if view.is_background:
            tokens = min(tokens, background_left)
            background_left -= tokens
        tokens_left -= tokens
        pages_left -= pages
        sequences_left -= 1
        is_alone = False
        admissions.append(Chunk(view.key, tokens))
    return tuple(admissions)


def pages_to_start(view: WaitingView, page_size: int) -> int:
    """Pages that a waiting sequence needs beside its cached ones, for all tokens it knows."""
    return -(-view.known // page_size) - view.cached // page_size
