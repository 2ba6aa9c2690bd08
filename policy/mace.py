"""The paper's policy, as far as it is known (MACE, arXiv 2510.03283, §4.1, §4.2, Algorithm 1).

    tasks in order of P(t) = seconds waited + δ, for training + gamma · L_DPO
      └─► each into the bin where f = λ1 · |memory fit| + λ2 · |latency fit| is least,
          of those where it stays under τ_mem and the latency target
            bin 0: this iteration · bins 1, 2: those after it, still open
    what is left over comes back in the next plan, with the priority it has then

The paper's constants and its reading of "bins" are not published. What follows is ours:

- A bin is an iteration. It holds τ_mem bytes and the seconds of the target for TBT, or where
  nothing decodes of the shorter target; without a target, a full token budget.
- The fit is what a bin would have left, as a share of what it holds. Least left is the best fit.
- The decodes are one task that is in every bin. They are cheap, and a thousand decisions would not
  tell them apart.
- A prompt is a task as large as what is left of it. One that fits into no bin is cut to what this
  iteration has left. The first prompt and the first of all tasks always run, so that a task that
  fits nowhere does not wait for ever.
- A quantum takes of a bin the memory of its graph, and the time by which it slows the iteration
  beside it. One runs at a time, and nothing holds it.
- Only the `packing_window` prompts of the highest priority are looked at.

gamma weighs the loss as it is; `cotune` bounds it (see `priority`).
"""

from __future__ import annotations

import math
from itertools import islice
from typing import TYPE_CHECKING

from .costs import Costs, IterationShape
from .packing import Room, pages_to_start, rows_per_sample
from .priority import prompt_priority_s, training_priority_s
from .types import TrainingPlan, WaitingView

if TYPE_CHECKING:
    from .settings import PolicySettings
    from .types import IterationPlan, Observation, RunningView, TrainingOffer

_ONE_TOKEN_EACH = Costs(0.0, 1.0, 0.0, 1.0, 0.0)
"""What work costs as long as nothing is known: a token is a token."""


class Mace:
    """Best-fit packing by priority. See the module for the rules."""

    def __init__(self, settings: PolicySettings) -> None:
        self._settings = settings

    def plan(self, observation: Observation) -> IterationPlan:
        """The next iteration: what the packing puts into bin 0."""
        settings, now_s = self._settings, observation.now_s
        room = Room(observation)
        bins = _Bins(observation, room, settings)
        prompts = _prompts(observation, room, settings.packing_window)
        training = observation.training
        offers = list(training.offers) if training is not None and training.running is None else []
        offers.sort(
            key=lambda offer: (
                -training_priority_s(offer, now_s, settings, "raw loss"),
                not offer.is_begun,
                offer.key,
            )
        )
        started = TrainingPlan()
        is_first = True
        for offer in offers:
            priority_s = training_priority_s(offer, now_s, settings, "raw loss")
            while prompts and prompt_priority_s(prompts[-1].rank_s, now_s, settings) >= priority_s:
                bins.place_prompt(prompts.pop())
                is_first = False
            if is_first or bins.place_quantum(offer):
                started = room.start_quantum([offer])
                if started.start is not None:
                    bins.begin_quantum()
                    break
            is_first = False
        while prompts and bins.is_open:
            bins.place_prompt(prompts.pop())
        return room.plan(started)


def _prompts(observation: Observation, room: Room, window: int) -> list[RunningView | WaitingView]:
    """Those of the highest priority, the first last: to be popped in order."""
    prompts: list[RunningView | WaitingView] = [*room.unfinished]
    if not room.is_closed:
        prompts += islice(observation.waiting, window)
    prompts.sort(key=lambda view: view.rank_s)
    return prompts[window - 1 :: -1] if len(prompts) > window else prompts[::-1]


class _Bins:
    """This iteration and the next few, while they are packed."""

    def __init__(self, observation: Observation, room: Room, settings: PolicySettings) -> None:
        budgets, memory, training = observation.budgets, observation.memory, observation.training
        self._room = room
        self._settings = settings
        costs = observation.costs
        target_s = budgets.tbt_s if room.decodes else min(budgets.ttft_s, budgets.tbt_s)
        if costs is None or not costs.per_token_s > 0.0:
            costs, target_s = _ONE_TOKEN_EACH, math.inf
        if math.isinf(target_s):
            target_s = costs.base_s + budgets.tokens * (costs.per_token_s + costs.per_decode_s)
            target_s *= costs.margin
        self._costs = costs
        is_beside = training is not None and training.running is not None
        held_s = target_s / costs.margin
        if is_beside:
            held_s /= costs.interference
        self._slowed_s = held_s * (1.0 - 1.0 / costs.interference)
        decode_s = costs.iteration_s(IterationShape(len(room.decodes), room.context))
        count = settings.packing_bins
        self._seconds = [held_s - decode_s] * count
        self._bytes = [room.free_bytes] * count
        self._tokens = [room.tokens] * count
        self._has_quantum = [is_beside] * count
        held_bytes = float(memory.threshold) if memory is not None and memory.threshold > 0 else 0.0
        self._memory_weight = settings.lambda_memory / held_bytes if held_bytes else 0.0
        self._latency_weight = settings.lambda_latency / held_s
        self._has_prompt = False
        self.is_open = room.tokens > 0
        """Whether a prompt may still go into this iteration."""

    def place_prompt(self, view: RunningView | WaitingView) -> None:
        """Into the bin that it fits best; into this iteration as far as it fits if into none."""
        if not self.is_open:
            return
        room, costs = self._room, self._costs
        if isinstance(view, WaitingView):
            if room.is_closed:
                return
            start, pages = view.cached, pages_to_start(view, room.page_size)
        else:
            start, pages = view.computed, 0
        if view.is_background and room.background_tokens <= 0:
            return
        lag = view.known - start
        seconds = costs.chunk_s(lag, start)
        taken = room.prompt_bytes(lag, pages)
        best = self._best(seconds, taken, lag)
        if best > 0 and self._has_prompt:
            self._take(best, seconds, taken, lag)
            return
        if isinstance(view, WaitingView) and not room.lets_in(view):
            return
        tokens = room.most_tokens(
            lag, is_background=view.is_background, is_new=isinstance(view, WaitingView)
        )
        if best < 0 or tokens < lag:
            shape = IterationShape()
            fitting = costs.prefill_tokens_within(self._seconds[0] + costs.base_s, shape, start)
            least = min(self._settings.min_chunk_tokens, lag)
            if fitting < least:
                fitting = 0 if self._has_prompt else least
            if fitting <= tokens:  # it is time that cuts it, not memory or the background's share
                tokens = fitting
                self.is_open = False
        if tokens <= 0:
            self.is_open = False
            return
        self._has_prompt = True
        seconds = costs.chunk_s(tokens, start)
        self._take(0, seconds, room.prompt_bytes(tokens, pages), tokens)
        if isinstance(view, WaitingView):
            room.add_admission(view, tokens)
        else:
            room.add_prefill(view, tokens)
        if room.tokens <= 0:
            self.is_open = False

    def place_quantum(self, offer: TrainingOffer) -> bool:
        """Into the bin that it fits best, cut to its memory; whether that is this iteration."""
        room = self._room
        taken = room.quantum_bytes(offer)
        if taken > self._bytes[0] and (rows := room.rows_for(offer)):
            taken = min(taken, taken * max(rows, rows_per_sample(offer)) / offer.tokens)
        best = self._best(self._slowed_s, taken, 0, is_quantum=True)
        if best > 0:
            self._take(best, self._slowed_s, taken, 0)
            self._has_quantum[best] = True
        return best == 0

    def begin_quantum(self) -> None:
        """One was started beside this iteration."""
        self._seconds[0] -= self._slowed_s
        self._bytes[0] = self._room.free_bytes
        self._has_quantum[0] = True

    def _best(self, seconds: float, taken: float, tokens: int, *, is_quantum: bool = False) -> int:
        """The bin with the least f that a task fits into; -1 for none."""
        best, least = -1, math.inf
        for index, left_s in enumerate(self._seconds):
            left_bytes = self._bytes[index]
            if seconds > left_s or taken > left_bytes or tokens > self._tokens[index]:
                continue
            if is_quantum and self._has_quantum[index]:
                continue
            fit = self._latency_weight * (left_s - seconds)
            if self._memory_weight:
                fit += self._memory_weight * (left_bytes - taken)
            if fit < least:
                best, least = index, fit
        return best

    def _take(self, index: int, seconds: float, taken: float, tokens: int) -> None:
        self._seconds[index] -= seconds
        self._bytes[index] -= taken
        self._tokens[index] -= tokens
