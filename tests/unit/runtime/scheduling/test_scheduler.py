"""The scheduler between a policy that the test writes and a clock that the test moves."""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from cotune.cache.manager import KVCacheManager
from cotune.policy import Budgets, RunningView, WaitingView
from cotune.policy.costs import CostModel, CostReport, Costs, IterationShape
from cotune.policy.memory import MemoryThreshold
from cotune.policy.types import Chunk, IterationPlan, Observation, TrainingPlan
from cotune.runtime.scheduling import scheduler as scheduler_module
from cotune.runtime.scheduling.memory_watch import GIVE_WAY_S, MemoryNeeds, MemoryWatch, Stake
from cotune.runtime.scheduling.scheduler import (
    OVERHEAD_RATE,
    REVIEW_INTERVAL_S,
    Scheduler,
    shape_of,
)
from cotune.runtime.scheduling.timeline import JobRecord, Timeline
from cotune.runtime.step import SequenceStep
from cotune.runtime.training.safepoints import Safepoints
from cotune.streams.memory import MemoryReading
from engine_fakes import FakeClock, GatedLane, settle, supervised
from schedule_fakes import OUTLOOK, FakeTrainer, Scripted

BUDGETS = Budgets(64, 8, 4, ttft_s=2.0, tbt_s=0.5)
COSTS = Costs(
    base_s=1.0,
    per_decode_s=0.25,
    per_context_s=0.0,
    per_token_s=0.5,
    per_attention_s=0.0,
    margin=1.25,
    interference=2.0,
    per_row_s=(0.1, 0.2, 0.3),
    step_s=4.0,
)
DECODE = SequenceStep([7], 9, [0, 1, 2], 0, None)
CHUNK = SequenceStep([1, 2, 3], 4, [3, 4], 0, None)


class FakeCosts:
    """Costs that the test says; keeps what it was told."""

    def __init__(self) -> None:
        self.costs = COSTS
        self.is_known = True
        self.is_stale = False
        self.iterations: list[tuple[IterationShape, float, float]] = []
        self.quanta: list[tuple[str, int, float, float]] = []

    def observe_iteration(
        self, shape: IterationShape, seconds: float, *, beside_training: float
    ) -> None:
        self.iterations.append((shape, seconds, beside_training))

    def observe_quantum(
        self, kind: str, tokens: int, seconds: float, *, beside_serving: float
    ) -> None:
        self.quanta.append((kind, tokens, seconds, beside_serving))

    def report(self) -> CostReport:
        return replace(CostModel().report(), is_stale=self.is_stale, slowdown=2.5)


class Scene:
    """A scheduler whose policy plans what `self.plan` says and takes `thinks_s` for it."""

    def __init__(self, *, memory: bool = False, page: int = 0) -> None:
        self.clock = FakeClock()
        self.costs = FakeCosts()
        self.lane = GatedLane()
        self.safepoints = Safepoints(clock=self.clock)
        self.timeline = Timeline(clock=self.clock)
        self.plan = IterationPlan()
        self.thinks_s = 0.0
        self.observed: list[Observation] = []
        self.wakes = 0
        self.free_bytes = 500
        self.threshold = MemoryThreshold(1000)
        self.watch = MemoryWatch(
            lambda: MemoryReading(1000, self.free_bytes, 0),
            self.threshold,
            MemoryNeeds(page=page, training_token=2.0),
            KVCacheManager(4, 4),
            lambda: self.timeline.mark("near miss"),
        )
        costs: Any = self.costs
        self.scheduler = Scheduler(
            "scripted",
            Scripted(self._decide),
            BUDGETS,
            costs=costs,
            timeline=self.timeline,
            memory=self.watch if memory else None,
            clock=self.clock,
        )
        self.scheduler.wake_with(self._wake)

    def _decide(self, observation: Observation) -> IterationPlan:
        self.observed.append(observation)
        self.clock.now_s += self.thinks_s
        return self.plan

    def _wake(self) -> None:
        self.wakes += 1

    def adopt(
        self, running: tuple[RunningView, ...] = (), waiting: tuple[WaitingView, ...] = ()
    ) -> IterationPlan:
        """What the engine does first."""
        self.scheduler.watch_memory(len(running))
        decision = self.scheduler.decide(
            running,
            waiting,
            available_pages=3,
            adapters_in_use=frozenset({"a"}),
            free_adapter_slots=2,
            began_s=self.clock.now_s,
        )
        return self.scheduler.adopt(decision)

    def iterate(
        self, steps: list[SequenceStep], seconds: float, error: Exception | None = None
    ) -> None:
        """All of an iteration that takes so long."""
        plan = self.adopt()
        self.scheduler.start_training(plan, has_steps=bool(steps))
        self.scheduler.begin_iteration(steps)
        self.clock.now_s += seconds
        self.scheduler.end_iteration(self.clock.now_s, error)


class Training:
    """A desk of the scene's with one learner, whose quanta run on the scene's lane."""

    def __init__(self, scene: Scene, trainer: FakeTrainer, group: asyncio.TaskGroup) -> None:
        lane: Any = scene.lane
        self._scene, self._trainer, self._group = scene, trainer, group
        self.desk = scene.scheduler.open_training(lane, scene.safepoints)
        self.key = self.desk.enroll("tutor")

    async def offer(self) -> None:
        """Offer the next quantum."""
        self.task = self._group.create_task(
            self.desk.run(self.key, self._trainer, OUTLOOK, is_begun=False)
        )
        await settle()

    def carry_out(self, training: TrainingPlan, *, has_steps: bool = True) -> bool:
        """Have a plan of training carried out; whether the lane is busy."""
        return self._scene.scheduler.start_training(
            IterationPlan(training=training), has_steps=has_steps
        )

    async def finish(self) -> None:
        """The quantum on the lane comes to its end."""
        await self._scene.lane.step()


@pytest.fixture
def scene() -> Scene:
    return Scene()


# -- what a policy sees --------------------------------------------------------------------------


def test_a_policy_sees_all_there_is(scene: Scene) -> None:
    running = (RunningView(1, 8, 9, 3, 3),)
    waiting = (WaitingView(2, 100.0, 5, 0, None),)
    assert scene.adopt(running, waiting) is scene.plan
    assert scene.observed == [
        Observation(100.0, BUDGETS, 3, running, waiting, frozenset({"a"}), 2, None, COSTS, None)
    ]


def test_costs_that_nobody_knows_are_not_shown(scene: Scene) -> None:
    scene.costs.is_known = False
    scene.adopt()
    assert scene.observed[0].costs is None
    scene.scheduler.begin_iteration([DECODE])
    scene.scheduler.end_iteration(101.0)
    assert scene.timeline.snapshot().iterations[0].predicted_s is None


async def test_a_policy_sees_training_from_opening_to_closing(scene: Scene) -> None:
    scheduler = scene.scheduler
    assert not scheduler.has_training
    async with supervised(scene.lane) as group:
        training = Training(scene, FakeTrainer(), group)
        assert not scheduler.has_training
        await training.offer()
        assert scheduler.has_training
        assert scene.wakes == 1
        scene.adopt()
        view = scene.observed[0].training
        assert view is not None
        assert [offer.kind for offer in view.offers] == ["forward"]
        scheduler.close_training()
        assert not scheduler.has_training
        scene.adopt()
        assert scene.observed[1].training is None
        assert not training.carry_out(TrainingPlan(start=training.key))
        training.task.cancel()


def test_memory_is_watched_where_there_is_a_watch() -> None:
    assert not Scene().scheduler.lacks_memory
    scene = Scene(memory=True)
    scene.adopt()
    memory = scene.observed[0].memory
    assert memory is not None
    assert (memory.threshold, memory.training_token) == (460, 2.0)
    assert not scene.scheduler.lacks_memory
    scene.free_bytes = 0
    scene.clock.now_s += 1.0
    scene.adopt()
    assert scene.scheduler.lacks_memory
    statistics = scene.scheduler.statistics()
    assert statistics.memory_threshold is not None
    assert statistics.memory_threshold < 0
    assert statistics.near_misses == 1
    assert [mark.name for mark in scene.timeline.snapshot().marks] == ["near miss"]


# -- iterations ----------------------------------------------------------------------------------


def test_the_shape_of_steps_counts_what_costs_time() -> None:
    # The decode reads 9 entries and its own; the chunk's queries see 5, 6 and 7 keys.
    assert shape_of([DECODE, DECODE, CHUNK]) == IterationShape(2, 20, 3, 5 + 6 + 7, 1)
    assert shape_of([DECODE, CHUNK]) == IterationShape(1, 10).with_chunk(3, 4)


def test_an_iteration_is_written_down_as_planned_and_as_measured(scene: Scene) -> None:
    scene.plan = IterationPlan((9,), (1,), (), (Chunk(2, 3),))
    scene.thinks_s = 0.125
    scene.adopt(
        (RunningView(1, 8, 9, 3, 3, due_s=107.0), RunningView(9, 3, 4, 1, 1, due_s=104.0)),
        (WaitingView(2, 100.0, 5, 0, None),),
    )
    scene.clock.now_s += 0.375
    scene.scheduler.begin_iteration([DECODE, CHUNK])
    scene.clock.now_s = 103.5
    scene.scheduler.end_iteration(103.0)
    (record,) = scene.timeline.snapshot().iterations
    assert record._asdict() == {
        "index": 1,
        "started_s": 100.5,
        "ended_s": 103.0,
        "plan_s": 0.125,
        "decodes": 1,
        "prefill_tokens": 3,
        "admissions": 1,
        "preemptions": 1,
        "context_tokens": 10,
        "predicted_s": 1.0 + 0.25 + 3 * 0.5,
        "margin": 1.25,
        "slack_s": 3.5,
        "budget_tokens": 64,
        "started_quantum": None,
        "is_holding": False,
        "beside_training": 0.0,
        "memory_threshold": None,
        "running": 2,
        "waiting": 1,
        "planned_s": 100.0,
        "error": None,
    }
    assert scene.costs.iterations == [(IterationShape(1, 10).with_chunk(3, 4), 2.5, 0.0)]


def test_what_planning_and_committing_take_is_part_of_what_a_policy_reckons_with(
    scene: Scene,
) -> None:
    scene.thinks_s = 0.25
    scene.adopt()
    scene.clock.now_s += 0.25
    scene.scheduler.begin_iteration([DECODE])
    scene.clock.now_s += 3.0
    returned_s = scene.clock.now_s
    scene.clock.now_s += 0.5
    scene.scheduler.end_iteration(returned_s)
    scene.adopt()
    costs = scene.observed[1].costs
    assert costs is not None
    assert costs.base_s == pytest.approx(1.0 + OVERHEAD_RATE * 1.0)
    assert costs._replace(base_s=1.0) == COSTS
    scene.clock.now_s += 1000.0  # the loop was stopped for a while
    scene.scheduler.begin_iteration([DECODE])
    scene.scheduler.end_iteration(scene.clock.now_s)
    scene.adopt()
    after = scene.observed[2].costs
    assert after is not None
    assert after.base_s < 1.0 + 1.2 * OVERHEAD_RATE


def test_a_stale_profile_is_said_once_and_so_is_its_end(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        for is_stale in (False, True, True, False):
            scene.costs.is_stale = is_stale
            scene.iterate([DECODE], 0.1)
    said = [record.message for record in caplog.records]
    assert len(said) == 2
    assert said[0].startswith("iterations take 2.5 times what the profile says")
    assert "cotune profile --fresh" in said[0]
    assert said[1] == "iterations take what the profile says again"
    assert [mark.name for mark in scene.timeline.snapshot().marks] == ["stale profile"]


def test_an_iteration_that_failed_teaches_nothing_about_time(scene: Scene) -> None:
    scene.iterate([DECODE], 9.0, RuntimeError("boom"))
    assert scene.costs.iterations == []
    (record,) = scene.timeline.snapshot().iterations
    assert (record.error, record.seconds) == ("RuntimeError: boom", 9.0)
    scene.adopt()
    assert scene.observed[-1].costs == COSTS
    assert scene.timeline.snapshot().marks == ()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), MemoryError()])
def test_an_iteration_that_ran_out_of_memory_makes_the_margin_grow(error: Exception) -> None:
    scene = Scene(memory=True)
    before = scene.threshold.margin_bytes
    scene.iterate([DECODE, CHUNK], 1.0, error)
    assert scene.threshold.margin_bytes == 2 * before
    assert scene.scheduler.statistics().out_of_memories == 1
    (mark,) = scene.timeline.snapshot().marks
    assert (mark.name, mark.detail) == ("out of memory", "iteration, 4 rows")


# -- deciding ahead ------------------------------------------------------------------------------


def decide_ahead(scene: Scene, ahead_s: float) -> Any:
    return scene.scheduler.decide(
        (), (), available_pages=3, adapters_in_use=frozenset(), free_adapter_slots=0,
        began_s=scene.clock.now_s, ahead_s=ahead_s,
    )  # fmt: skip


# A tenth of the TBT target of half a second is allowed.
@pytest.mark.parametrize(
    ("passed_s", "holds"), [(0.0, True), (4.0, True), (4.04, True), (4.06, False)]
)
def test_a_decision_made_ahead_holds_until_it_is_late(
    scene: Scene, passed_s: float, holds: bool
) -> None:
    decision = decide_ahead(scene, 4.0)
    assert decision.is_ahead
    assert scene.observed[0].now_s == 104.0
    scene.clock.now_s += passed_s
    assert scene.scheduler.still_holds(decision) is holds


async def test_a_decision_made_ahead_falls_when_training_changes(scene: Scene) -> None:
    async with supervised(scene.lane) as group:
        training = Training(scene, FakeTrainer(), group)
        decision = decide_ahead(scene, 4.0)
        scene.clock.now_s += 4.0
        assert scene.scheduler.still_holds(decision)
        await training.offer()
        assert not scene.scheduler.still_holds(decision)
        training.task.cancel()


@pytest.mark.parametrize(
    ("free_bytes", "holds"), [(500, True), (460, True), (440, False), (0, False)]
)
def test_a_decision_made_ahead_falls_when_memory_has_gone(free_bytes: int, holds: bool) -> None:
    scene = Scene(memory=True)
    scene.scheduler.watch_memory(0)
    decision = decide_ahead(scene, 4.0)  # on 460 bytes, of which a tenth may go
    scene.clock.now_s += 4.0
    scene.free_bytes = free_bytes
    scene.scheduler.watch_memory(0)
    assert scene.scheduler.still_holds(decision) is holds


@pytest.mark.parametrize("under_way", ["nothing", "to train beside", "to hold"])
async def test_a_quantum_starts_early_beside_an_iteration_that_training_may_run_beside(
    scene: Scene, under_way: str
) -> None:
    async with supervised(scene.lane) as group:
        training = Training(scene, FakeTrainer([("forward", 4), ("backward", 4)]), group)
        if under_way != "nothing":
            await training.offer()
            scene.plan = IterationPlan((), (1,), training=TrainingPlan(start=training.key))
            scene.iterate([DECODE], 2.0)
            scene.plan = IterationPlan((), (1,), training=TrainingPlan(hold=under_way == "to hold"))
        plan = scene.adopt()
        scene.scheduler.start_training(plan, has_steps=True)
        scene.scheduler.begin_iteration([DECODE])
        if under_way != "nothing":
            await training.finish()  # while the iteration runs
        await training.offer()
        scene.plan = IterationPlan((), (1,), training=TrainingPlan(start=training.key))
        decision = decide_ahead(scene, 1.0)
        scene.scheduler.start_early(decision)
        assert training.desk.is_busy == (under_way == "to train beside")
        # A decision that has been carried out in part is not to be carried out again.
        assert scene.scheduler.still_holds(decision) == (not training.desk.is_busy)
        if training.desk.is_busy:
            await training.finish()
        else:
            training.task.cancel()


def test_what_remains_of_an_iteration_is_what_was_predicted_less_what_has_passed(
    scene: Scene,
) -> None:
    scene.adopt()
    scene.scheduler.begin_iteration([DECODE])
    scene.clock.now_s += 0.25
    assert scene.scheduler.remaining_s == 1.0
    scene.clock.now_s += 5.0
    assert scene.scheduler.remaining_s == 0.0


# -- training beside them ------------------------------------------------------------------------


async def test_beside_a_quantum_an_iteration_is_expected_to_take_longer(scene: Scene) -> None:
    async with supervised(scene.lane) as group:
        training = Training(scene, FakeTrainer(), group)
        await training.offer()
        scene.plan = IterationPlan((), (1,), training=TrainingPlan(start=training.key))
        scene.iterate([DECODE], 2.0)
        scene.plan = IterationPlan((), (1,), training=TrainingPlan(hold=True))
        scene.iterate([DECODE], 2.0)
        await training.finish()
        scene.plan = IterationPlan((), (1,))
        scene.iterate([DECODE], 2.0)
    beside, held, alone = scene.timeline.snapshot().iterations
    assert (beside.predicted_s, beside.beside_training) == (2.5, 1.0)
    assert (held.predicted_s, held.beside_training) == (1.25, 0.0)
    assert (alone.predicted_s, alone.beside_training) == (1.25, 0.0)
    assert [r.started_quantum for r in (beside, held, alone)] == ["forward", None, None]
    assert [r.is_holding for r in (beside, held, alone)] == [False, True, False]
    assert [share for _, _, share in scene.costs.iterations] == [1.0, 0.0, 0.0]


async def test_a_quantum_that_ends_midway_counts_for_the_part_that_it_ran(scene: Scene) -> None:
    async with supervised(scene.lane) as group:
        training = Training(scene, FakeTrainer(), group)
        await training.offer()
        scene.adopt()
        training.carry_out(TrainingPlan(start=training.key))
        await settle()
        scene.clock.now_s = 101.0
        scene.scheduler.begin_iteration([DECODE])
        scene.clock.now_s = 102.0
        await training.finish()
        scene.clock.now_s = 105.0
        scene.scheduler.end_iteration(105.0)
    assert scene.costs.iterations == [(IterationShape(1, 10), 4.0, 0.25)]
    # It ran from 100 to 102, and the iteration was beside it from 101 on.
    assert scene.costs.quanta == [("forward", 40, 2.0, 0.5)]


async def test_a_quantums_time_is_that_in_which_it_was_not_held(scene: Scene) -> None:
    async with supervised(scene.lane) as group:
        training = Training(scene, FakeTrainer(), group)
        await training.offer()
        assert training.carry_out(TrainingPlan(start=training.key, max_tokens=8))
        scene.clock.now_s = 101.0
        assert training.carry_out(TrainingPlan(hold=True))
        scene.clock.now_s = 104.0
        assert training.carry_out(TrainingPlan())
        scene.clock.now_s = 106.0
        await training.finish()
    assert scene.costs.quanta == [("forward", 8, 3.0, 0.0)]
    (record,) = scene.timeline.snapshot().quanta
    assert record == ("tutor", "forward", 8, 1, 100.0, 106.0, 3.0, 8 * 0.2, 0, None)
    statistics = scene.scheduler.statistics()
    assert (statistics.held_s, statistics.rows, statistics.quanta) == (3.0, 8, {"forward": 1})


async def test_a_quantum_that_is_held_does_not_run_beside_an_iteration(scene: Scene) -> None:
    async with supervised(scene.lane) as group:
        training = Training(scene, FakeTrainer(), group)
        await training.offer()
        training.carry_out(TrainingPlan(start=training.key))
        await settle()
        scene.clock.now_s = 101.0
        scene.adopt()
        assert training.carry_out(TrainingPlan(hold=True))
        scene.scheduler.begin_iteration([DECODE])
        scene.clock.now_s = 110.0
        scene.scheduler.end_iteration(110.0)
        await training.finish()
    assert scene.costs.quanta == [("forward", 40, 1.0, 0.0)]


async def test_without_an_iteration_nothing_is_held(scene: Scene) -> None:
    async with supervised(scene.lane) as group:
        training = Training(scene, FakeTrainer(), group)
        await training.offer()
        training.carry_out(TrainingPlan(start=training.key, hold=True))
        assert scene.safepoints.statistics().is_held
        training.carry_out(TrainingPlan(hold=True), has_steps=False)
        assert not scene.safepoints.statistics().is_held
        await training.finish()


async def test_only_a_pause_that_has_a_quantum_is_counted_as_one(scene: Scene) -> None:
    pause = IterationPlan(is_pause=True)
    assert not scene.scheduler.start_training(pause, has_steps=False)
    async with supervised(scene.lane) as group:
        training = Training(scene, FakeTrainer(), group)
        assert not scene.scheduler.start_training(pause, has_steps=False)
        assert scene.scheduler.statistics().pauses == 0
        await training.offer()
        begins = IterationPlan(training=TrainingPlan(start=training.key), is_pause=True)
        assert scene.scheduler.start_training(begins, has_steps=False)
        assert scene.scheduler.start_training(pause, has_steps=False)
        assert scene.scheduler.statistics().pauses == 1, "it is the same one, decided again"
        await training.finish()


async def test_a_quantum_that_failed_teaches_nothing_about_time(scene: Scene) -> None:
    trainer = FakeTrainer()
    trainer.failures.append(ValueError("boom"))
    with pytest.RaisesGroup(pytest.RaisesExc(ValueError, match="boom")):
        async with supervised(scene.lane) as group:
            training = Training(scene, trainer, group)
            await training.offer()
            training.carry_out(TrainingPlan(start=training.key))
            scene.clock.now_s += 1.0
            await training.finish()
    assert scene.costs.quanta == []
    (record,) = scene.timeline.snapshot().quanta
    assert (record.error, record.seconds) == ("ValueError: boom", 1.0)
    assert scene.scheduler.statistics().failed_quanta == 1


async def test_a_quantum_that_ran_out_of_memory_makes_the_margin_grow() -> None:
    scene = Scene(memory=True)
    before = scene.threshold.margin_bytes
    trainer = FakeTrainer()
    trainer.failures.append(MemoryError())
    async with supervised(scene.lane) as group:
        training = Training(scene, trainer, group)
        for _ in range(2):
            await training.offer()
            training.carry_out(TrainingPlan(start=training.key))
            scene.clock.now_s += 1.0
            await training.finish()
    # Growing is for memory, and what failed says nothing about time; the second try does.
    assert scene.threshold.margin_bytes == 2 * before
    assert scene.costs.quanta == [("forward", 40, 1.0, 0.0)]
    (mark,) = scene.timeline.snapshot().marks
    assert (mark.name, mark.detail) == ("out of memory", "forward, 40 rows")
    assert [record.halvings for record in scene.timeline.snapshot().quanta] == [1, 0]
    statistics = scene.scheduler.statistics()
    assert (statistics.halvings, statistics.out_of_memories, statistics.failed_quanta) == (1, 1, 0)


async def test_statistics_say_who_decides_and_how_much_training_there_was(scene: Scene) -> None:
    assert scene.scheduler.statistics().policy == "scripted"
    assert scene.scheduler.statistics().memory_threshold is None
    assert scene.scheduler.statistics().training_share == 0.0
    async with supervised(scene.lane) as group:
        training = Training(scene, FakeTrainer(), group)
        await training.offer()
        training.carry_out(TrainingPlan(start=training.key))
        scene.clock.now_s += 2.0
        share = scene.scheduler.statistics().training_share
        assert share == pytest.approx(1.0 - math.exp(-1.0))
        await training.finish()
    for _ in range(3):
        scene.iterate([DECODE], 1.25)
    statistics = scene.scheduler.statistics()
    assert (statistics.decisions, statistics.tokens, statistics.fill) == (3, 3, 1 / 64)
    assert statistics.prediction_error_p50 == 0.0
    assert statistics.slack_p5_s == math.inf


# -- jobs, and the memory of trainers ------------------------------------------------------------


async def test_an_iteration_beside_a_job_is_no_undisturbed_one(scene: Scene) -> None:
    async with supervised(scene.lane) as group:
        training = Training(scene, FakeTrainer(), group)
        group.create_task(training.desk.job(training.key, "checkpoint", int))
        gate = await scene.lane.reached()
        scene.adopt()
        scene.scheduler.begin_iteration([DECODE])
        scene.clock.now_s += 1.0
        gate.set_result(None)  # it ends in the middle
        await settle()
        scene.clock.now_s += 3.0
        scene.scheduler.end_iteration(scene.clock.now_s)
        scene.iterate([DECODE], 2.0)
    assert scene.costs.iterations == [
        (IterationShape(1, 10), 4.0, 0.25),
        (IterationShape(1, 10), 2.0, 0.0),
    ]
    beside, alone = scene.timeline.snapshot().iterations
    assert (beside.beside_training, beside.predicted_s) == (0.25, 2.0 * 1.25)
    assert (alone.beside_training, alone.predicted_s) == (0.0, 1.25)
    assert scene.costs.quanta == []
    assert scene.timeline.snapshot().quanta == ()
    assert scene.timeline.snapshot().jobs == (JobRecord("tutor", "checkpoint", 100.0, 101.0),)
    assert scene.scheduler.statistics().job_s == {"checkpoint": 1.0}


async def test_a_job_that_runs_out_of_memory_makes_the_margin_grow() -> None:
    def make() -> None:
        raise torch.OutOfMemoryError("no room for moments")

    async def ask(training: Training) -> None:
        with pytest.raises(torch.OutOfMemoryError):
            await training.desk.job(training.key, "make", make)

    scene = Scene(memory=True)
    before = scene.threshold.margin_bytes
    async with supervised(scene.lane) as group:
        group.create_task(ask(Training(scene, FakeTrainer(), group)))
        await scene.lane.step()
    assert scene.threshold.margin_bytes == 2 * before
    (mark,) = scene.timeline.snapshot().marks
    assert (mark.name, mark.detail) == ("out of memory", "training: make")


class FakeHolder:
    """A learner with a trainer."""

    def __init__(self) -> None:
        self.stake: Stake | None = Stake.NOTHING
        self.asked = 0

    def give_way(self) -> None:
        self.asked += 1
        self.stake = None


def review(scene: Scene, seconds: float) -> None:
    """Look at it as often as the scheduler does."""
    for _ in range(round(seconds / REVIEW_INTERVAL_S)):
        scene.clock.now_s += REVIEW_INTERVAL_S
        scene.scheduler.review_memory()


async def test_a_quantum_that_never_fits_makes_trainers_give_way() -> None:
    scene, holder = Scene(memory=True), FakeHolder()
    async with supervised(scene.lane) as group:
        training = Training(scene, FakeTrainer(), group)
        scene.scheduler.trainer_memory.enroll(training.key, "tutor", holder)
        scene.free_bytes = 40 + 79  # a sample of 40 rows takes 80
        review(scene, 10.0)
        assert holder.asked == 0, "nobody wants any"
        await training.offer()
        review(scene, GIVE_WAY_S)
        assert holder.asked == 0
        review(scene, REVIEW_INTERVAL_S)
        assert holder.asked == 1
        training.task.cancel()


WAITS = WaitingView(2, 100.0, 13, 0, None)
"""A request of four pages."""


@pytest.mark.parametrize("is_limited", [False, True])
@pytest.mark.parametrize(
    ("waiting", "plan", "is_starving"),
    [
        ((WAITS,), IterationPlan(), True),
        ((WAITS._replace(known=12),), IterationPlan(), False),
        ((WAITS._replace(is_background=True),), IterationPlan(), False),
        ((WAITS,), IterationPlan(admissions=(Chunk(7, 1),)), False),
        ((), IterationPlan(preemptions=(7,)), True),
        ((), IterationPlan(), False),
    ],
)
async def test_requests_that_memory_keeps_out_make_trainers_give_way(
    waiting: tuple[WaitingView, ...], plan: IterationPlan, is_starving: bool, is_limited: bool
) -> None:
    scene, holder = Scene(memory=True, page=100 if is_limited else 1), FakeHolder()
    async with supervised(scene.lane) as group:
        training = Training(scene, FakeTrainer(), group)
        scene.scheduler.trainer_memory.enroll(training.key, "tutor", holder)
        scene.free_bytes = 340
        scene.plan = plan
        for _ in range(8):
            scene.adopt(waiting=waiting)
            review(scene, REVIEW_INTERVAL_S)
        assert holder.asked == (is_starving and is_limited)


async def test_a_decision_that_nothing_followed_is_not_believed_for_ever() -> None:
    scene, holder = Scene(memory=True, page=100), FakeHolder()
    async with supervised(scene.lane) as group:
        training = Training(scene, FakeTrainer(), group)
        scene.scheduler.trainer_memory.enroll(training.key, "tutor", holder)
        scene.free_bytes = 340
        scene.adopt(waiting=(WAITS,))  # its caller left, and with it the engine's reason to plan
        review(scene, 20.0)
        assert holder.asked == 0


async def test_nobody_is_asked_without_a_watch_and_after_training_has_closed() -> None:
    for memory in (False, True):
        scene, holder = Scene(memory=memory), FakeHolder()
        scene.scheduler.trainer_memory.enroll(0, "tutor", holder)
        scene.free_bytes = 0
        if memory:
            async with supervised(scene.lane) as group:
                Training(scene, FakeTrainer(), group)
            scene.scheduler.close_training()
        review(scene, 20.0)
        assert holder.asked == 0


async def test_memory_is_looked_at_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    scene, looked = Scene(memory=True), asyncio.Semaphore(0)
    monkeypatch.setattr(scheduler_module, "REVIEW_INTERVAL_S", 0.0)
    monkeypatch.setattr(scene.scheduler, "review_memory", looked.release)
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        task = group.create_task(scene.scheduler.look_after_trainers())
        for _ in range(3):
            await looked.acquire()
        task.cancel()
