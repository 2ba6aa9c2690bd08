"""The default policy: decodes guaranteed, prompts by slack, training in what the targets leave.

                         ┌──────────────── time until the first token is due ────────────────┐
    inference lane       ├─ decodes ─┼─ prompts: as many tokens as fit ─┤   kept for the unforeseen
    training lane        ├─ a quantum, unless the iteration beside it would be late ───────────

An iteration is planned in four steps.

1. *What is due.* The decodes are one group with one deadline. Prompts stand in order of rank; each
   has a deadline of its own, and the time that it and those before it take is known. A prompt that
   misses its target whatever is done stands back behind those that can still make it, for a
   bounded time (`late_step`): otherwise one late prompt makes all behind it late.
2. *Whether training runs.* Always, unless it would do harm: beside it a decode would be late, or
   the prompts would take more than `queue_use` of their time. Then training waits (`hold`; nothing
   is started), except where its share of the recent past is under `training_floor`, or where its
   priority, which grows while it waits, is above that of the task that would be late. It also
   waits while prompts are behind whatever is done: the sooner the queue is short again, the fewer
   of those who are still to come are late.
3. *How many prompt tokens.* As many as the decodes' slack holds, at the speed that step 2 gave. A
   prompt near its own deadline takes the share of the slack that is otherwise kept. The first one
   gets `min_chunk_tokens` at least. Without deadlines the token budget is all that counts.
4. *Which quantum.* A batch that has begun goes on before another begins; then by priority. It is
   cut to what memory holds and to a few times the TBT target.

Nobody is promised what cannot be kept: there is no deadline for class "batch" and for background
prompts, and their rank lets interactive requests go first for a bounded time.
"""

from __future__ import annotations

import math
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from .costs import Costs, IterationShape
from .packing import Room
from .priority import in_order, prompt_priority_s, training_priority_s
from .types import RunningView, TrainingPlan, WaitingView

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from .settings import PolicySettings
    from .types import IterationPlan, Observation, TrainingOffer, TrainingView

_View: TypeAlias = RunningView | WaitingView

_FREE = Costs(0.0, 0.0, 0.0, 0.0, 0.0)
"""As long as nothing is known, nothing takes time: the budgets alone count."""
_NOTHING = IterationShape()


class Cotune:
    """See the module for the rules."""

    def __init__(self, settings: PolicySettings) -> None:
        self._settings = settings

    def plan(self, observation: Observation) -> IterationPlan:
        """The next iteration, and what training does beside it."""
        seen, settings = observation, self._settings
        costs = seen.costs or _FREE
        room = Room(seen)
        clock = _Clock(seen, room, costs, settings)
        queue = _queue(room, seen)
        outlook = _look(queue, clock, costs, seen, settings.late_step)
        is_beside = False
        offers: list[TrainingOffer] = []
        training = seen.training
        if training is not None:
            if training.running is None:
                offers = in_order(training.offers, seen.now_s, settings, settings.training_signal)
                is_full = room.is_awaited and training.share >= settings.training_ceiling
                has_quantum = bool(offers) and not is_full
            else:
                has_quantum = True
            has_sequences = bool(room.decodes or queue)
            is_beside = has_quantum and (
                not has_sequences
                or self._goes_on(
                    training, offers, clock, outlook, has_prompts=bool(queue), now_s=seen.now_s
                )
            )
        self._fill(seen, room, clock, costs, outlook, is_beside=is_beside)
        return room.plan(self._train(seen, room, costs, offers, is_beside=is_beside))

    def _goes_on(
        self,
        training: TrainingView,
        offers: Sequence[TrainingOffer],
        clock: _Clock,
        outlook: _Outlook,
        *,
        has_prompts: bool,
        now_s: float,
    ) -> bool:
        """Whether training may run beside this iteration."""
        settings, margin = self._settings, clock.margin
        served_s = -math.inf  # the highest priority among those who would be late because of it
        if clock.is_decode_delayed(has_prompts=has_prompts):
            served_s = settings.delta_decode_s
        needed = clock.pace(beside=True).stretch * margin
        if outlook.is_behind or outlook.ratio * settings.queue_use < needed:
            served_s = max(served_s, prompt_priority_s(outlook.rank_s, now_s, settings))
        if served_s == -math.inf or training.share < settings.training_floor:
            return True
        if offers:
            trained_s = training_priority_s(offers[0], now_s, settings, settings.training_signal)
        else:
            idle_s = max(0.0, now_s - training.idle_since_s)
            trained_s = idle_s + settings.delta_training_s
        return trained_s > served_s

    def _fill(
        self,
        seen: Observation,
        room: Room,
        clock: _Clock,
        costs: Costs,
        outlook: _Outlook,
        *,
        is_beside: bool,
    ) -> None:
        """Put prompts in, in order, as far as the time reaches."""
        now_s = seen.now_s
        pace = clock.pace(beside=is_beside)
        if outlook.ratio < pace.stretch * costs.margin:
            pace = clock.pace(beside=is_beside, urgent=True)
        left_s = pace.work_s
        spent_s = clock.decode_s
        slowed = costs.margin * (costs.interference if is_beside else 1.0)
        least = self._settings.min_chunk_tokens
        running_left = len(room.unfinished)
        for view in outlook.order:
            if room.tokens <= 0:
                break
            if isinstance(view, WaitingView):
                if room.is_closed:
                    if not running_left:
                        break
                    continue
                start = view.cached
            else:
                running_left -= 1
                start = view.computed
            is_background = view.is_background
            if is_background and room.background_tokens <= 0:
                continue
            lag = view.known - start
            if isinstance(view, WaitingView) and (
                (view.coming > start and self._waits_for_prefix(view, seen, costs, pace.stretch))
                or not room.lets_in(view)
            ):
                continue
            tokens = room.most_tokens(
                lag, is_background=is_background, is_new=isinstance(view, WaitingView)
            )
            if tokens <= 0:
                break  # no memory for any
            cost_s = costs.chunk_s(tokens, start)
            if cost_s > left_s:
                fitting = costs.prefill_tokens_within(left_s + costs.base_s, _NOTHING, start)
                if fitting < min(least, tokens):
                    if room.has_prompts:
                        break
                    fitting = least
                tokens = min(tokens, fitting)
                cost_s = costs.chunk_s(tokens, start)
            if isinstance(view, WaitingView):
                room.add_admission(view, tokens)
            else:
                room.add_prefill(view, tokens)
            left_s -= cost_s
            spent_s += cost_s
            if tokens == lag and view.due_s < math.inf:
                # It gets its first token at the end of this iteration.
                until_due_s = (view.due_s - now_s) / slowed - spent_s
                if 0.0 <= until_due_s < left_s:
                    left_s = until_due_s

    def _waits_for_prefix(
        self, view: WaitingView, seen: Observation, costs: Costs, stretch: float
    ) -> bool:
        """Whether to wait until another has computed the prefix that both begin with.

        Only while it would make its target even if all of the prefix were still to be computed.
        """
        if view.due_s == math.inf:
            return seen.now_s - view.arrival_s < self._settings.prefix_patience_s
        work_s = costs.chunk_s(view.known - view.cached, view.cached)
        least_s = seen.budgets.ttft_s / 2 if work_s <= 0.0 else work_s * stretch * costs.margin
        return view.due_s - seen.now_s > least_s

    def _train(
        self,
        seen: Observation,
        room: Room,
        costs: Costs,
        offers: Sequence[TrainingOffer],
        *,
        is_beside: bool,
    ) -> TrainingPlan:
        """What the training lane does: goes on, waits, or starts a quantum."""
        training = seen.training
        if training is None:
            return TrainingPlan()
        if training.running is not None:
            return TrainingPlan(hold=not is_beside and room.has_work)
        if not is_beside:
            return TrainingPlan()
        most_rows = 0
        if room.is_awaited and seen.budgets.tbt_s < math.inf and seen.costs is not None:
            limit_s = self._settings.quantum_slack * seen.budgets.tbt_s
            # A backward has the rows of its forward and takes longer.
            most_rows = max(
                1, costs.quantum_tokens_within(limit_s, "backward", beside_serving=True)
            )
        return room.start_quantum(offers, most_rows)


class _Pace(NamedTuple):
    """How fast prompts are computed."""

    work_s: float
    """What of an iteration is left for them, in seconds that it would take alone."""
    stretch: float
    """Seconds that pass per second of such work: the decodes take theirs, training slows both."""


class _Clock:
    """How long things take, and how long they may take.

    Attributes:
        decode_s: what the decodes take, with all that an iteration takes anyway.
        margin: of the predictions.
    """

    __slots__ = (
        "_budget_s",
        "_interference",
        "_least_s",
        "_paces",
        "_slack_s",
        "_steady_s",
        "_use",
        "decode_s",
        "margin",
    )

    def __init__(
        self, seen: Observation, room: Room, costs: Costs, settings: PolicySettings
    ) -> None:
        budgets = seen.budgets
        self.decode_s = costs.iteration_s(IterationShape(len(room.decodes), room.context))
        self.margin = costs.margin
        self._interference = costs.interference
        longest_s = settings.iteration_ttft_share * budgets.ttft_s
        self._slack_s = min(room.due_s - seen.now_s, longest_s)
        # What later iterations will have: their decodes' tokens are due a target after the last.
        self._steady_s = min(budgets.tbt_s, longest_s) if room.due_s < math.inf else longest_s
        self._use = settings.slack_use
        self._least_s = max(
            settings.prefill_floor * self.decode_s, settings.min_chunk_tokens * costs.per_token_s
        )
        self._budget_s = max(self._least_s, room.tokens * costs.per_token_s)
        self._paces: dict[tuple[bool, bool], _Pace] = {}

    def is_decode_delayed(self, *, has_prompts: bool) -> bool:
        """Whether a decode would be late beside training."""
        seconds = self.decode_s + (self._least_s if has_prompts else 0.0)
        return seconds * self.margin * self._interference > self._slack_s

    def pace(self, *, beside: bool, urgent: bool = False) -> _Pace:
        """With or without training beside; `urgent` keeps nothing of the slack."""
        pace = self._paces.get((beside, urgent))
        if pace is None:
            factor = self._interference if beside else 1.0
            usable = (1.0 if urgent else self._use) / (self.margin * factor)
            work_s = max(self._slack_s * usable - self.decode_s, self._least_s)
            steady_s = max(self._steady_s * usable - self.decode_s, self._least_s)
            steady_s = min(steady_s, self._budget_s)
            stretch = factor * (self.decode_s + steady_s) / steady_s if steady_s > 0.0 else factor
            pace = self._paces[beside, urgent] = _Pace(work_s, stretch)
        return pace


class _Outlook(NamedTuple):
    """What becomes of the prompts."""

    order: Iterable[_View]
    """Who goes first; to be read once."""
    ratio: float
    """Of those that can make their targets, the least time left per second of work that is to be
    done until then; infinite where nobody has one."""
    rank_s: float
    """Of the first whose target is near or out of reach."""
    is_behind: bool = False
    """Whether any cannot: what is late makes those behind it late as well."""


_rank_s = attrgetter("rank_s")


def _queue(room: Room, seen: Observation) -> Sequence[_View]:
    """Prompts that run or wait, in order of rank."""
    unfinished = room.unfinished
    if room.is_closed:
        return unfinished
    waiting = seen.waiting
    if not unfinished:
        return waiting
    queue: list[_View] = [*unfinished, *waiting]
    if waiting and waiting[0].rank_s < unfinished[-1].rank_s:
        queue.sort(key=_rank_s)
    return queue


def _look(
    queue: Sequence[_View], clock: _Clock, costs: Costs, seen: Observation, late_step: float
) -> _Outlook:
    """Who can make the target, how near the nearest of them is, and who stands back.

    Looked at as far as the target reaches: who cannot be computed within it, those before them
    first, has no say in what happens now.
    """
    now_s, ttft_s = seen.now_s, seen.budgets.ttft_s
    if not queue or ttft_s == math.inf:
        return _Outlook(queue, math.inf, math.inf)
    stretch = clock.pace(beside=False, urgent=True).stretch
    horizon_s = ttft_s / stretch
    late: list[_View] = []
    in_time: list[_View] = []
    is_behind = False
    least, rank_s, work_s = math.inf, math.inf, 0.0
    for index, view in enumerate(queue):
        start = view.cached if isinstance(view, WaitingView) else view.computed
        own_s = costs.chunk_s(view.known - start, start)
        left_s = view.due_s - now_s
        if left_s < own_s * stretch:
            late.append(view)
            continue
        in_time.append(view)
        work_s += own_s
        if left_s < work_s * stretch:
            is_behind = True
            rank_s = min(rank_s, view.rank_s)
        elif left_s < least * work_s:
            least = left_s / work_s
            rank_s = min(rank_s, view.rank_s)
        if work_s > horizon_s:
            if late:
                in_time += queue[index + 1 :]
            break
    if late:
        order = _interleave(in_time, late, late_step * ttft_s)
        return _Outlook(order, least, min(rank_s, late[0].rank_s), is_behind=True)
    return _Outlook(queue, least, rank_s, is_behind)


def _interleave(in_time: Sequence[_View], late: Sequence[_View], later_s: float) -> Iterator[_View]:
    """Both in order of rank, the late ones as if they had come so many seconds later."""
    index = 0
    for view in in_time:
        while index < len(late) and late[index].rank_s + later_s < view.rank_s:
            yield late[index]
            index += 1
        yield view
    yield from late[index:]
