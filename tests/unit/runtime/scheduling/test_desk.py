"""The desk between learners and plans, on a lane that the test lets go."""

from __future__ import annotations

import math
from typing import Any

import pytest

from cotune.policy.types import TrainingPlan
from cotune.runtime.scheduling.desk import BusyClock, JobOutcome, QuantumOutcome, TrainingDesk
from cotune.runtime.training.safepoints import Safepoints
from engine_fakes import FakeClock, GatedLane, settle, supervised
from schedule_fakes import BATCH, OUTLOOK, FakeTrainer, learn


class Overseer:
    """Keeps what the desk tells."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.outcomes: list[QuantumOutcome] = []
        self.jobs: list[JobOutcome] = []

    def on_training_change(self) -> None:
        self.told.append("change")

    def on_quantum_start(self) -> None:
        self.told.append("start")

    def on_quantum(self, outcome: QuantumOutcome) -> None:
        self.told.append("end")
        self.outcomes.append(outcome)

    def on_job(self, outcome: JobOutcome) -> None:
        self.told.append("job")
        self.jobs.append(outcome)


class Scene:
    """A desk, two learners' keys, and all that it uses."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.lane = GatedLane()
        self.safepoints = Safepoints(clock=self.clock)
        self.overseer = Overseer()
        lane: Any = self.lane
        self.desk = TrainingDesk(lane, self.safepoints, self.overseer, self.clock)
        self.tutor, self.coder = self.desk.enroll("tutor"), self.desk.enroll("coder")

    @property
    def is_held(self) -> bool:
        """Whether the lane's thread would wait."""
        return self.safepoints.statistics().is_held

    def check_free(self) -> None:
        """Nothing is left of any quantum."""
        assert not (self.desk.is_busy)
        assert not (self.desk.is_held)
        assert not (self.desk.has_work)
        assert not self.is_held
        assert self.desk.view(self.clock()).running is None
        assert self.desk.view(self.clock()).offers == ()
        assert self.desk.carry_out(TrainingPlan()) is None


@pytest.fixture
def scene() -> Scene:
    return Scene()


# -- the clock -----------------------------------------------------------------------------------


def test_the_share_of_the_recent_past_fades_within_seconds() -> None:
    clock = BusyClock(10.0)
    assert (clock.total_s(11.0), clock.share(11.0), clock.idle_since_s(11.0)) == (0.0, 0.0, 10.0)
    clock.switch(11.0, is_on=True)
    assert clock.total_s(13.0) == 2.0
    assert clock.share(13.0) == pytest.approx(1.0 - math.exp(-1.0))
    assert clock.idle_since_s(13.0) == 13.0
    clock.switch(13.0, is_on=False)
    assert clock.share(15.0) == pytest.approx((1.0 - math.exp(-1.0)) * math.exp(-1.0))
    assert (clock.total_s(15.0), clock.idle_since_s(15.0)) == (2.0, 13.0)
    clock.switch(15.0, is_on=True)
    assert clock.total_s(16.0) == 3.0
    share = (1.0 - math.exp(-1.0)) * math.exp(-1.0)
    assert clock.share(16.0) == pytest.approx(1.0 - (1.0 - share) * math.exp(-0.5))


def test_it_makes_no_difference_how_often_a_busy_clock_is_told_what_it_knows() -> None:
    often, once = BusyClock(0.0), BusyClock(0.0)
    once.switch(0.0, is_on=True)
    for tenth in range(20):
        often.switch(tenth / 10, is_on=True)
    assert often.share(2.0) == pytest.approx(once.share(2.0))
    assert often.total_s(2.0) == pytest.approx(once.total_s(2.0))


# -- from offer to outcome -----------------------------------------------------------------------


async def test_an_offer_waits_for_a_plan_and_then_runs(scene: Scene) -> None:
    trainer = FakeTrainer()
    async with supervised(scene.lane) as group:
        task = group.create_task(scene.desk.run(scene.tutor, trainer, OUTLOOK, is_begun=True))
        await settle()
        (offer,) = scene.desk.view(105.0).offers
        assert offer == (scene.tutor, "forward", 40, 1, 100.0, 0.6, 0.25, True)
        assert scene.overseer.told == ["change"]
        assert scene.desk.has_work
        assert not scene.desk.is_busy
        scene.clock.now_s = 105.0
        assert scene.desk.carry_out(TrainingPlan()) is None
        await settle()
        assert not scene.lane.in_flight

        assert scene.desk.carry_out(TrainingPlan(start=scene.tutor)) == "forward"
        gate = await scene.lane.reached()
        view = scene.desk.view(107.0)
        assert view.offers == ()
        assert view.running == (scene.tutor, "forward", 40, 105.0, False, 0.0, True)
        assert view.share == pytest.approx(1.0 - math.exp(-1.0))
        assert view.idle_since_s == 107.0
        scene.clock.now_s = 107.0
        gate.set_result(None)
        assert await task is None
    assert trainer.ran == [("forward", 0)]
    assert scene.overseer.told == ["change", "start", "change", "end"]
    assert scene.overseer.outcomes == [
        QuantumOutcome(
            adapter="tutor",
            kind="forward",
            tokens=40,
            samples=1,
            started_s=105.0,
            ended_s=107.0,
            held_s=0.0,
            out_of_memories=0,
            error=None,
        )
    ]
    scene.check_free()


async def test_a_learner_gets_the_report_of_its_step(scene: Scene) -> None:
    trainer = FakeTrainer()
    scene.lane.open()
    async with supervised(scene.lane) as group:
        task = group.create_task(learn(scene.desk, scene.tutor, trainer))
        begun = []
        while not task.done():
            await settle()
            if offers := scene.desk.view(100.0).offers:
                begun.append(offers[0].is_begun)
                scene.desk.carry_out(TrainingPlan(start=scene.tutor))
                running = scene.desk.view(100.0).running
                assert running is not None
                assert running.is_begun == (running.kind != "step")
    first, second, last = task.result()
    assert first is second is None
    assert last is not None
    assert begun == [False, True, True]
    assert [outcome.kind for outcome in scene.overseer.outcomes] == [kind for kind, _ in BATCH]


async def test_a_plans_limit_reaches_the_trainer(scene: Scene) -> None:
    trainer = FakeTrainer()
    scene.lane.open()
    async with supervised(scene.lane) as group:
        group.create_task(scene.desk.run(scene.tutor, trainer, OUTLOOK, is_begun=False))
        await settle()
        scene.desk.carry_out(TrainingPlan(start=scene.tutor, max_tokens=16))
    assert trainer.ran == [("forward", 16)]
    assert [outcome.tokens for outcome in scene.overseer.outcomes] == [16]


async def test_offers_stand_in_the_order_they_came_and_one_runs_at_a_time(scene: Scene) -> None:
    desk = scene.desk
    async with supervised(scene.lane) as group:
        for key in (scene.coder, scene.tutor):
            group.create_task(desk.run(key, FakeTrainer(), OUTLOOK, is_begun=False))
            await settle()
        assert [offer.key for offer in desk.view(100.0).offers] == [scene.coder, scene.tutor]
        assert desk.carry_out(TrainingPlan(start=scene.tutor)) == "forward"
        gate = await scene.lane.reached()
        assert desk.carry_out(TrainingPlan(start=scene.coder)) is None
        assert [offer.key for offer in desk.view(100.0).offers] == [scene.coder]
        gate.set_result(None)
        await settle()
        assert not desk.is_busy
        assert desk.carry_out(TrainingPlan(start=scene.coder)) == "forward"
        await scene.lane.step()
    assert [outcome.adapter for outcome in scene.overseer.outcomes] == ["tutor", "coder"]
    scene.check_free()


# -- holding -------------------------------------------------------------------------------------


async def test_a_hold_reaches_the_safepoints_and_its_time_is_not_the_quantums(
    scene: Scene,
) -> None:
    desk, clock = scene.desk, scene.clock
    async with supervised(scene.lane) as group:
        group.create_task(desk.run(scene.tutor, FakeTrainer(), OUTLOOK, is_begun=False))
        await settle()
        desk.carry_out(TrainingPlan(start=scene.tutor))
        gate = await scene.lane.reached()
        clock.now_s = 101.0
        for _ in range(2):  # a plan says it again for every iteration
            assert desk.carry_out(TrainingPlan(hold=True)) is None
            assert scene.is_held
            assert desk.is_held
        assert desk.active_s(103.0) == 1.0
        running = desk.view(103.0).running
        assert running is not None
        assert (running.is_held, running.held_s) == (True, 2.0)
        assert desk.view(103.0).idle_since_s == 101.0
        clock.now_s = 104.0
        desk.carry_out(TrainingPlan())
        assert not scene.is_held
        assert not desk.is_held
        clock.now_s = 106.0
        gate.set_result(None)
    (outcome,) = scene.overseer.outcomes
    assert (outcome.started_s, outcome.ended_s, outcome.held_s) == (100.0, 106.0, 3.0)
    assert desk.active_s(200.0) == 3.0
    scene.check_free()


async def test_a_quantum_may_begin_held(scene: Scene) -> None:
    async with supervised(scene.lane) as group:
        group.create_task(scene.desk.run(scene.tutor, FakeTrainer(), OUTLOOK, is_begun=False))
        await settle()
        assert scene.desk.carry_out(TrainingPlan(start=scene.tutor, hold=True)) == "forward"
        assert scene.is_held
        gate = await scene.lane.reached()
        scene.clock.now_s = 102.0
        gate.set_result(None)  # it came to its end before its first safepoint
    (outcome,) = scene.overseer.outcomes
    assert outcome.held_s == 2.0
    assert scene.desk.active_s(103.0) == 0.0
    scene.check_free()


async def test_nothing_is_held_where_nothing_runs(scene: Scene) -> None:
    assert scene.desk.carry_out(TrainingPlan(hold=True)) is None
    assert not scene.is_held
    assert not scene.desk.is_held


# -- what goes wrong -----------------------------------------------------------------------------


async def test_who_is_cancelled_before_a_plan_takes_the_offer_back(scene: Scene) -> None:
    trainer = FakeTrainer()
    async with supervised(scene.lane) as group:
        task = group.create_task(scene.desk.run(scene.tutor, trainer, OUTLOOK, is_begun=False))
        await settle()
        task.cancel()
        # The task has not had its turn yet: a plan that is made now must not start it, nor may one
        # that was made ahead.
        scene.check_free()
        assert scene.desk.carry_out(TrainingPlan(start=scene.tutor)) is None
        assert not scene.desk.is_busy
        await settle()
        assert task.cancelled()
    assert scene.overseer.told == ["change", "change"]
    assert trainer.ran == []
    scene.check_free()


async def test_who_is_cancelled_between_plan_and_lane_frees_it(scene: Scene) -> None:
    trainer = FakeTrainer()
    async with supervised(scene.lane) as group:
        task = group.create_task(scene.desk.run(scene.tutor, trainer, OUTLOOK, is_begun=False))
        await settle()
        scene.desk.carry_out(TrainingPlan(start=scene.tutor, hold=True))
        task.cancel()
        await settle()
        assert task.cancelled()
        scene.check_free()
        assert trainer.ran == []
        assert scene.overseer.outcomes == []
        assert scene.overseer.told[-1] == "change"

        scene.lane.open()
        group.create_task(scene.desk.run(scene.tutor, trainer, OUTLOOK, is_begun=False))
        await settle()
        scene.desk.carry_out(TrainingPlan(start=scene.tutor))
    assert trainer.ran == [("forward", 0)]


async def test_who_is_cancelled_on_the_lane_waits_for_its_end(scene: Scene) -> None:
    trainer = FakeTrainer()
    async with supervised(scene.lane) as group:
        task = group.create_task(scene.desk.run(scene.tutor, trainer, OUTLOOK, is_begun=False))
        await settle()
        scene.desk.carry_out(TrainingPlan(start=scene.tutor))
        gate = await scene.lane.reached()
        scene.desk.carry_out(TrainingPlan(hold=True))
        task.cancel()
        await settle()
        assert not task.done()
        assert scene.desk.is_busy
        gate.set_result(None)
        await settle()
        assert task.cancelled()
    assert trainer.ran == [("forward", 0)]
    (outcome,) = scene.overseer.outcomes
    assert outcome.error is not None
    assert outcome.error.startswith("CancelledError")
    scene.check_free()


async def test_what_a_quantum_raises_reaches_its_learner_and_frees_the_lane(scene: Scene) -> None:
    broken = FakeTrainer()
    broken.failures.append(ValueError("the gradient is a banana"))
    async with supervised(scene.lane) as group:
        task = group.create_task(_outcome_of(scene.desk, scene.tutor, broken))
        other = group.create_task(
            scene.desk.run(scene.coder, FakeTrainer(), OUTLOOK, is_begun=False)
        )
        await settle()
        scene.desk.carry_out(TrainingPlan(start=scene.tutor, hold=True))
        await scene.lane.step()
        assert str(task.result()) == "the gradient is a banana"
        assert not scene.is_held
        scene.desk.carry_out(TrainingPlan(start=scene.coder))
        await scene.lane.step()
        assert other.done()
    first, second = scene.overseer.outcomes
    assert (first.adapter, first.error) == ("tutor", "ValueError: the gradient is a banana")
    assert (second.adapter, second.error) == ("coder", None)
    scene.check_free()


async def _outcome_of(desk: TrainingDesk, key: int, trainer: FakeTrainer) -> Exception:
    with pytest.raises(ValueError, match="banana") as caught:
        await desk.run(key, trainer, OUTLOOK, is_begun=False)
    return caught.value


async def test_running_out_of_memory_is_told_and_is_no_error(scene: Scene) -> None:
    trainer = FakeTrainer()
    trainer.out_of_memories = 7
    trainer.failures.append(MemoryError())
    scene.lane.open()
    async with supervised(scene.lane) as group:
        for _ in range(2):
            task = group.create_task(scene.desk.run(scene.tutor, trainer, OUTLOOK, is_begun=False))
            await settle()
            scene.desk.carry_out(TrainingPlan(start=scene.tutor))
            await task
    assert [outcome.out_of_memories for outcome in scene.overseer.outcomes] == [1, 0]
    assert [outcome.error for outcome in scene.overseer.outcomes] == [None, None]


# -- jobs ----------------------------------------------------------------------------------------


async def test_a_job_has_the_free_lane_at_once_and_no_offer_is_shown_meanwhile(
    scene: Scene,
) -> None:
    desk, clock, overseer = scene.desk, scene.clock, scene.overseer
    async with supervised(scene.lane) as group:
        job = group.create_task(desk.job(scene.tutor, "checkpoint", divmod, 7, 2))
        gate = await scene.lane.reached()
        assert overseer.told == []
        group.create_task(desk.run(scene.coder, FakeTrainer(), OUTLOOK, is_begun=False))
        await settle()
        clock.now_s = 103.0
        assert desk.is_active
        assert not desk.is_busy
        assert not desk.has_work
        view = desk.view(clock())
        assert (view.offers, view.running) == ((), None)
        assert view.share == pytest.approx(1.0 - math.exp(-1.5))
        for hold in (False, True):  # a plan of before does nothing
            assert desk.carry_out(TrainingPlan(start=scene.coder, hold=hold)) is None
        assert not scene.is_held
        overseer.told.clear()
        gate.set_result(None)
        await settle()
        assert job.result() == (3, 1)
        assert overseer.told == ["change", "job"]
        assert overseer.jobs == [
            JobOutcome(
                adapter="tutor",
                kind="checkpoint",
                started_s=100.0,
                ended_s=103.0,
                error=None,
                is_out_of_memory=False,
            )
        ]
        assert not desk.is_active
        assert desk.active_s(200.0) == 3.0
        assert [offer.key for offer in desk.view(clock()).offers] == [scene.coder]
        assert desk.carry_out(TrainingPlan(start=scene.coder)) == "forward"
    scene.check_free()


async def test_offers_that_a_job_hides_are_told_to_whoever_plans(scene: Scene) -> None:
    async with supervised(scene.lane) as group:
        offer = group.create_task(
            scene.desk.run(scene.coder, FakeTrainer(), OUTLOOK, is_begun=False)
        )
        await settle()
        scene.overseer.told.clear()
        group.create_task(scene.desk.job(scene.tutor, "version", int))
        gate = await scene.lane.reached()
        assert scene.overseer.told == ["change"]
        assert not scene.desk.has_work
        gate.set_result(None)
        await settle()
        assert scene.overseer.told == ["change", "change", "job"]
        assert scene.desk.has_work
        offer.cancel()


async def test_jobs_wait_for_the_quantum_and_go_before_the_next_in_their_order(
    scene: Scene,
) -> None:
    desk, clock = scene.desk, scene.clock
    ran: list[str] = []
    async with supervised(scene.lane) as group:
        group.create_task(desk.run(scene.tutor, FakeTrainer(), OUTLOOK, is_begun=False))
        await settle()
        desk.carry_out(TrainingPlan(start=scene.tutor))
        gate = await scene.lane.reached()
        for name in ("first", "second"):
            group.create_task(desk.job(scene.coder, name, ran.append, name))
            await settle()
        group.create_task(desk.run(scene.coder, FakeTrainer(), OUTLOOK, is_begun=False))
        await settle()
        assert desk.view(clock()).running is not None
        clock.now_s = 101.0
        gate.set_result(None)
        gate = await scene.lane.reached()
        assert not desk.is_busy
        assert desk.carry_out(TrainingPlan(start=scene.coder)) is None
        clock.now_s = 104.0
        gate.set_result(None)
        gate = await scene.lane.reached()
        assert desk.carry_out(TrainingPlan(start=scene.coder)) is None
        clock.now_s = 106.0
        gate.set_result(None)
        await settle()
        assert desk.carry_out(TrainingPlan(start=scene.coder)) == "forward"
        await scene.lane.step()
    assert ran == ["first", "second"]
    # The time that a job has waited is not its own, nor is a job's time a quantum's.
    spans = [(job.kind, job.started_s, job.ended_s) for job in scene.overseer.jobs]
    assert spans == [("first", 101.0, 104.0), ("second", 104.0, 106.0)]
    spans = [(q.adapter, q.started_s, q.ended_s) for q in scene.overseer.outcomes]
    assert spans == [("tutor", 100.0, 101.0), ("coder", 106.0, 106.0)]
    assert all(outcome.held_s == 0.0 for outcome in scene.overseer.outcomes)
    assert desk.active_s(200.0) == 6.0
    scene.check_free()


async def test_a_job_whose_caller_is_cancelled_runs_all_the_same(scene: Scene) -> None:
    ran: list[str] = []
    async with supervised(scene.lane) as group:
        group.create_task(scene.desk.run(scene.tutor, FakeTrainer(), OUTLOOK, is_begun=False))
        await settle()
        scene.desk.carry_out(TrainingPlan(start=scene.tutor))
        gate = await scene.lane.reached()
        job = group.create_task(scene.desk.job(scene.coder, "abandon", ran.append, "it"))
        await settle()
        for _ in range(2):
            job.cancel()
            await settle()
            assert not job.done()
        gate.set_result(None)
        await scene.lane.step()
        assert job.cancelled()
    assert ran == ["it"]
    assert [outcome.error for outcome in scene.overseer.jobs] == [None]
    scene.check_free()


@pytest.mark.parametrize(
    ("error", "is_out_of_memory"), [(ValueError("no"), False), (MemoryError("all gone"), True)]
)
async def test_what_a_job_raises_reaches_its_learner_and_frees_the_lane(
    scene: Scene, error: Exception, is_out_of_memory: bool
) -> None:
    def fail() -> None:
        raise error

    async def ask() -> None:
        with pytest.raises(type(error), match=str(error)):
            await scene.desk.job(scene.tutor, "make", fail)

    async with supervised(scene.lane) as group:
        group.create_task(ask())
        await scene.lane.step()
        scene.check_free()
        group.create_task(scene.desk.job(scene.tutor, "make", int))
        await scene.lane.step()
    first, second = scene.overseer.jobs
    assert first.error == f"{type(error).__name__}: {error}"
    assert first.is_out_of_memory == is_out_of_memory
    assert second.error is None


async def test_a_job_that_fails_unseen_is_in_the_log(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ValueError("the disk is gone")

    async with supervised(scene.lane) as group:
        group.create_task(scene.desk.job(scene.tutor, "version", int))
        gate = await scene.lane.reached()
        job = group.create_task(scene.desk.job(scene.coder, "checkpoint", fail))
        await settle()
        job.cancel()
        await settle()
        gate.set_result(None)
        await scene.lane.step()
        assert job.cancelled()
    assert "job 'checkpoint' of coder failed, and its caller was cancelled" in caplog.text
    assert "the disk is gone" in caplog.text
    scene.check_free()


# -- memory --------------------------------------------------------------------------------------


async def test_what_offers_need_at_least_is_one_sample_and_nothing_for_what_frees_memory(
    scene: Scene,
) -> None:
    desk, clock = scene.desk, scene.clock
    clock.now_s = 104.0
    assert (desk.memory_needs(3.0), desk.quiet_s(105.0)) == ({}, 5.0)
    async with supervised(scene.lane) as group:
        group.create_task(desk.run(scene.tutor, FakeTrainer(), OUTLOOK, is_begun=False))
        last = FakeTrainer([("backward", 40)])
        other = group.create_task(desk.run(scene.coder, last, OUTLOOK, is_begun=True))
        await settle()
        assert desk.memory_needs(3.0) == {scene.tutor: 120.0, scene.coder: 0.0}
        desk.carry_out(TrainingPlan(start=scene.tutor, hold=True))
        gate = await scene.lane.reached()
        assert desk.memory_needs(3.0) == {scene.coder: 0.0}
        assert desk.quiet_s(105.0) == 0.0
        clock.now_s = 106.0
        gate.set_result(None)
        await settle()
        assert desk.quiet_s(107.5) == 1.5
        group.create_task(desk.job(scene.tutor, "checkpoint", int))
        await scene.lane.step()
        assert desk.quiet_s(107.5) == 1.5, "a job is no quantum"
        other.cancel()
