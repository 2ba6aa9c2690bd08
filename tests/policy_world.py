"""A small engine in virtual time for the tests of the policies, and what must hold of every plan.

`World` carries plans out as the engine does: pages are exact, iterations take what `Costs` say,
quanta run beside them, wait while they are held, and free the lane when they are done.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from cotune.policy import (
    Budgets,
    Costs,
    IterationPlan,
    IterationShape,
    MemoryView,
    Observation,
    RunningQuantum,
    RunningView,
    TrainingOffer,
    TrainingView,
    WaitingView,
    rank_s,
)
from cotune.policy.packing import pages_to_start

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cotune.policy import Policy, RequestClass

SHARE_TIME_S = 2.0
COSTS = Costs(
    base_s=0.002,
    per_decode_s=0.001,
    per_context_s=0.0,
    per_token_s=0.001,
    per_attention_s=1e-7,
    margin=1.1,
    interference=1.5,
    quantum_interference=1.4,
    per_row_s=(0.001, 0.001, 0.002),
    quantum_base_s=0.001,
    step_s=0.005,
)


@dataclass
class Sequence:
    """One request, and how far it is."""

    key: int
    arrival_s: float
    known: int
    end: int
    rank_s: float
    adapter: str | None = None
    is_background: bool = False
    has_targets: bool = True
    prompt_key: int | None = None
    prompt: int = 0
    computed: int = 0
    pages: int = 0
    is_running: bool = False
    last_token_s: float | None = None
    first_token_s: float | None = None
    ended_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)


@dataclass
class Learner:
    """Batches of so many samples to train on, one after the other."""

    key: int
    batches: list[int]
    rows_per_sample: int = 8
    quantum_samples: int = 4
    loss: float = 0.69
    signal: float = 0.5
    since_s: float = 0.0
    left: int = 0  # samples of the batch that no forward has covered
    kind: Literal["forward", "backward", "step"] = "forward"
    rows: int = 0  # of the forward whose backward is next
    is_begun: bool = False
    steps: int = 0

    def __post_init__(self) -> None:
        self.left = self.batches[0] if self.batches else 0

    @property
    def is_done(self) -> bool:
        return not self.batches

    def offer(self) -> TrainingOffer:
        rows, samples = self.rows, 1
        if self.kind == "forward":
            samples = min(self.left, self.quantum_samples)
            rows = samples * self.rows_per_sample
        return TrainingOffer(
            self.key,
            self.kind,
            0 if self.kind == "step" else rows,
            samples,
            self.since_s,
            self.loss,
            self.signal,
            self.is_begun,
        )

    def begin(self, max_tokens: int) -> int:
        """The quantum goes to the lane; its rows."""
        offer = self.offer()
        if self.kind == "forward":
            samples = offer.samples
            if max_tokens:
                samples = max(1, min(samples, max_tokens // self.rows_per_sample))
            self.left -= samples
            self.rows = samples * self.rows_per_sample
        self.is_begun = True
        return 0 if self.kind == "step" else self.rows

    def finish(self, now_s: float) -> None:
        """The quantum is done; what comes next."""
        self.since_s = now_s
        if self.kind == "forward":
            self.kind = "backward"
        elif self.kind == "backward":
            self.kind = "forward" if self.left else "step"
        else:
            self.steps += 1
            self.batches.pop(0)
            self.left = self.batches[0] if self.batches else 0
            self.kind = "forward"
            self.is_begun = False


@dataclass
class Lane:
    """The quantum on the training lane."""

    learner: Learner
    rows: int
    started_s: float
    left_s: float
    is_held: bool = False
    held_s: float = 0.0


class World:
    """An engine under a policy; see the module."""

    def __init__(
        self,
        policy: Policy,
        budgets: Budgets,
        *,
        pages: int,
        slots: int = 2,
        costs: Costs | None = COSTS,
        learners: Iterable[Learner] = (),
        may_pause: bool = False,
    ) -> None:
        self.policy = policy
        self.budgets = budgets
        self.pages = pages
        self.slots = slots
        self.costs = costs
        self.learners = list(learners)
        self.may_pause = may_pause
        self.memory: MemoryView | None = None
        self.now_s = 0.0
        self.sequences: list[Sequence] = []
        self.live: dict[int, Sequence] = {}
        self.lane: Lane | None = None
        self.active_s = 0.0  # of the lane, not held
        self.share = 0.0
        self.idle_since_s = 0.0
        self.plans = 0

    # -- what comes ------------------------------------------------------------------------------

    def arrive(
        self,
        prompt: int,
        answer: int,
        *,
        priority: int = 0,
        request_class: RequestClass = "interactive",
        adapter: str | None = None,
        is_background: bool = False,
        prompt_key: int | None = None,
    ) -> Sequence:
        """A request; `prompt_key` names its prompt, for those that share one."""
        seq = Sequence(
            len(self.sequences),
            self.now_s,
            prompt,
            prompt + answer,
            rank_s(priority, self.now_s, request_class) + (30.0 if is_background else 0.0),
            adapter,
            is_background,
            request_class == "interactive" and not is_background,
            prompt_key,
            prompt,
        )
        self.sequences.append(seq)
        self.live[seq.key] = seq
        return seq

    # -- what the policy sees --------------------------------------------------------------------

    def observe(self) -> Observation:
        order = sorted(self.live.values(), key=lambda seq: (seq.rank_s, seq.key))
        running = tuple(
            RunningView(
                seq.key,
                seq.computed,
                seq.known,
                seq.pages,
                seq.pages,
                seq.is_background,
                self.due_s(seq),
                seq.rank_s,
            )
            for seq in order
            if seq.is_running
        )
        waiting = tuple(
            WaitingView(
                seq.key,
                seq.rank_s,
                seq.known,
                0,
                seq.adapter,
                seq.is_background,
                self.due_s(seq),
                self.coming(seq),
            )
            for seq in order
            if not seq.is_running
        )
        adapters = frozenset(seq.adapter for seq in order if seq.is_running and seq.adapter)
        return Observation(
            self.now_s,
            self.budgets,
            self.pages - sum(view.pages for view in running),
            running,
            waiting,
            adapters,
            self.slots - len(adapters),
            self.training_view() if self.learners else None,
            self.costs,
            self.memory,
        )

    def due_s(self, seq: Sequence) -> float:
        if not seq.has_targets:
            return math.inf
        if seq.last_token_s is None:
            return seq.arrival_s + self.budgets.ttft_s
        return seq.last_token_s + self.budgets.tbt_s

    def coming(self, seq: Sequence) -> int:
        """As much of its prompt as one with the same prompt is computing."""
        if seq.prompt_key is None:
            return 0
        size = self.budgets.page_size
        lengths = [
            min(other.prompt, seq.prompt - 1) // size * size
            for other in self.live.values()
            if other.is_running
            and other.prompt_key == seq.prompt_key
            and other.computed < other.prompt
        ]
        return max(lengths, default=0)

    def training_view(self) -> TrainingView:
        lane = self.lane
        busy = lane.learner if lane is not None else None
        offers = [
            learner.offer()
            for learner in self.learners
            if not learner.is_done and learner is not busy
        ]
        offers.sort(key=lambda offer: (offer.since_s, offer.key))
        running = None
        if lane is not None:
            kind = lane.learner.kind
            running = RunningQuantum(
                lane.learner.key,
                kind,
                lane.rows,
                lane.started_s,
                lane.is_held,
                lane.held_s,
                kind != "step",
            )
        is_on = lane is not None and not lane.is_held
        return TrainingView(
            tuple(offers), running, self.share, self.now_s if is_on else self.idle_since_s
        )

    # -- what happens ----------------------------------------------------------------------------

    @property
    def is_done(self) -> bool:
        return not self.live and all(learner.is_done for learner in self.learners)

    def step(self) -> IterationPlan:
        """Plan once, check the plan and carry it out; time passes."""
        seen = self.observe()
        plan = self.policy.plan(seen)
        self.plans += 1
        check_plan(seen, plan, may_pause=self.may_pause)
        if plan.is_pause:
            self.carry_out_training(plan, has_work=False)
            assert self.lane is not None
            self.pass_time(self.quantum_left_s())
            return plan
        for key in plan.preemptions:
            seq = self.live[key]
            seq.computed = seq.pages = 0
            seq.is_running = False
        has_work = plan.tokens > 0
        self.carry_out_training(plan, has_work=has_work)
        if has_work:
            self.iterate(plan)
        elif self.lane is not None:
            self.pass_time(self.quantum_left_s())
        elif plan.training.again_s is not None:
            self.pass_time(max(plan.training.again_s, 1e-3))
        else:
            assert plan.preemptions or not self.live, "nothing moves although somebody waits"
            self.pass_time(1e-3)
        return plan

    def carry_out_training(self, plan: IterationPlan, *, has_work: bool) -> None:
        start = plan.training.start
        if start is not None:
            assert self.lane is None
            learner = next(one for one in self.learners if one.key == start)
            kind = learner.kind
            rows = learner.begin(plan.training.max_tokens)
            seconds = (self.costs or COSTS).quantum_s(kind, rows)
            self.lane = Lane(learner, rows, self.now_s, seconds)
        if self.lane is not None:
            is_held = plan.training.hold and has_work
            if is_held and not self.lane.is_held:
                self.idle_since_s = self.now_s
            self.lane.is_held = is_held

    def quantum_left_s(self) -> float:
        assert self.lane is not None
        return self.lane.left_s + 1e-9

    def iterate(self, plan: IterationPlan) -> None:
        chunks = [*plan.prefills, *plan.admissions]
        shape = IterationShape(len(plan.decodes), sum(self.live[key].known for key in plan.decodes))
        for chunk in chunks:
            shape = shape.with_chunk(chunk.tokens, self.live[chunk.key].computed)
        is_beside = self.lane is not None and not self.lane.is_held
        self.pass_time((self.costs or COSTS).iteration_s(shape, beside_training=is_beside))
        for key in plan.decodes:
            self.advance(self.live[key], 1)
        for chunk in chunks:
            self.live[chunk.key].is_running = True
            self.advance(self.live[chunk.key], chunk.tokens)
        assert sum(seq.pages for seq in self.live.values()) <= self.pages

    def advance(self, seq: Sequence, tokens: int) -> None:
        seq.pages = -(-seq.known // self.budgets.page_size)
        seq.computed += tokens
        assert seq.computed <= seq.known
        if seq.computed == seq.known:
            if seq.last_token_s is None:
                seq.first_token_s = self.now_s
            else:
                seq.gaps_s.append(self.now_s - seq.last_token_s)
            seq.last_token_s = self.now_s
            seq.known += 1
        if seq.computed >= seq.end:
            seq.ended_s = self.now_s
            del self.live[seq.key]

    def pass_time(self, seconds: float) -> None:
        """So much later; the lane works meanwhile if nothing holds it."""
        lane = self.lane
        on_s = 0.0
        if lane is not None and lane.is_held:
            lane.held_s += seconds
        elif lane is not None:
            on_s = min(seconds, lane.left_s)
            lane.left_s -= seconds
        self.share += (1.0 - self.share) * (1.0 - math.exp(-on_s / SHARE_TIME_S))
        self.share *= math.exp(-(seconds - on_s) / SHARE_TIME_S)
        self.active_s += on_s
        self.now_s += seconds
        if lane is not None and not lane.is_held and lane.left_s <= 0.0:
            lane.learner.finish(self.now_s)
            self.lane = None
            self.idle_since_s = self.now_s


def check_plan(seen: Observation, plan: IterationPlan, *, may_pause: bool = False) -> None:
    """What holds of every plan of every policy."""
    budgets, size = seen.budgets, seen.budgets.page_size
    running = {view.key: view for view in seen.running}
    waiting = {view.key: view for view in seen.waiting}
    training = seen.training
    if plan.is_pause:
        assert may_pause
        assert plan.tokens == 0
        assert training is not None
        assert training.running is not None or plan.training.start is not None
    # Each is named once, chunks end where the prompt ends.
    chunks = [*plan.prefills, *plan.admissions]
    named = [*plan.preemptions, *plan.decodes, *(chunk.key for chunk in chunks)]
    assert len(named) == len(set(named))
    for chunk in plan.prefills:
        assert 1 <= chunk.tokens <= running[chunk.key].known - running[chunk.key].computed
    for chunk in plan.admissions:
        assert 1 <= chunk.tokens <= waiting[chunk.key].known - waiting[chunk.key].cached
    # Decodes are never displaced; only who gives its pages back is not there.
    if not plan.is_pause:
        assert list(plan.decodes) == [
            view.key
            for view in seen.running
            if view.known - view.computed == 1 and view.key not in plan.preemptions
        ]
    # Tokens, sequences, slots, pages.
    assert plan.tokens <= budgets.tokens
    staying = [view for view in seen.running if view.key not in plan.preemptions]
    assert len(staying) + len(plan.admissions) <= max(budgets.sequences, len(staying))
    new = {waiting[chunk.key].adapter for chunk in plan.admissions} - {None}
    assert len(new - seen.adapters_in_use) <= seen.free_adapter_slots
    growth = sum(max(0, -(-view.known // size) - view.pages) for view in staying)
    opened = sum(pages_to_start(waiting[chunk.key], size) for chunk in plan.admissions)
    given_back = sum(running[key].private_pages for key in plan.preemptions)
    if not plan.is_pause and growth + opened > seen.available_pages + given_back:
        assert len(staying) + len(plan.admissions) == 1  # everything is tried for the only one
    # Training: one quantum, on a free lane, of somebody who offered it.
    started = plan.training.start
    rows = 0
    if started is not None:
        assert training is not None
        assert training.running is None
        assert not plan.training.hold
        offer = next(offer for offer in training.offers if offer.key == started)
        if offer.kind in ("kl", "forward"):
            rows = plan.training.max_tokens or offer.tokens
            assert 1 <= rows <= offer.tokens
            assert rows >= offer.tokens // offer.samples  # one sample whole
        else:
            assert plan.training.max_tokens == 0
    if plan.training.hold:
        assert training is not None
        assert training.running is not None
        assert plan.tokens > 0, "it holds although nothing runs beside it"
    # τ_mem, for all that could wait.
    memory = seen.memory
    if memory is not None and not plan.is_pause:
        paid = max(0, seen.available_pages - memory.unused_pages) + given_back
        page = memory.page if memory.unused_pages else 0

        def needed(pages: int, tokens: int) -> float:
            return max(0, pages - paid) * page + tokens * memory.prefill_token

        must = needed(growth, len(plan.decodes))
        taken = needed(growth + opened, plan.tokens) + rows * memory.training_token
        is_alone = not plan.decodes and len(chunks) == 1
        is_last_resort = is_alone and rows * memory.training_token == 0
        assert is_last_resort or taken <= max(memory.threshold, must) + 1e-6
        if growth and must > max(0, memory.threshold) and page:
            assert len(staying) == 1 or growth <= paid + max(0, memory.threshold) // page


def finish(world: World, *, limit: int) -> None:
    """Run until everything has ended; fails if that takes more than `limit` plans."""
    start = world.plans
    while not world.is_done:
        assert world.plans - start < limit, describe(world)
        world.step()


def describe(world: World) -> dict[str, Any]:
    """Who still waits, for the message of a failed test."""
    return {
        "now_s": world.now_s,
        "live": list(world.live.values()),
        "lane": world.lane,
        "learners": [learner for learner in world.learners if not learner.is_done],
    }
