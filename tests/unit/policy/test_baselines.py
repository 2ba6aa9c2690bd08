"""Periodic, synchronous and continuous training: when a quantum starts."""

from __future__ import annotations

import pytest

from cotune.policy import (
    Budgets,
    Chunk,
    InferenceOnly,
    IterationPlan,
    MemoryView,
    Observation,
    PolicySettings,
    RunningQuantum,
    RunningView,
    TrainingOffer,
    TrainingPlan,
    TrainingView,
    WaitingView,
    make_policy,
)
from cotune.policy.packing import MEMORY_AGAIN_S

DECODE = RunningView(1, 7, 8, 2, 2)
PROMPT = WaitingView(5, 0.0, 30, 0, None)


def offer(key: int = 0, *, since_s: float = 0.0, is_begun: bool = False) -> TrainingOffer:
    return TrainingOffer(key, "forward", 100, 4, since_s, 0.7, 0.5, is_begun)


def seen(
    *offers: TrainingOffer,
    now_s: float = 0.0,
    is_busy: bool = False,
    is_idle: bool = False,
    memory: MemoryView | None = None,
) -> Observation:
    quantum = RunningQuantum(9, "forward", 64, 0.0, is_held=False) if is_busy else None
    return Observation(
        now_s,
        Budgets(64, 8, 4),
        1000,
        () if is_idle else (DECODE,),
        () if is_idle else (PROMPT,),
        training=TrainingView(offers, quantum),
        memory=memory,
    )


SERVED = IterationPlan(decodes=(1,), admissions=(Chunk(5, 30),))


@pytest.mark.parametrize("name", ["inference-only", "periodic", "synchronous", "continuous"])
def test_without_training_all_serve_alike(name: str) -> None:
    for state in (seen(), seen()._replace(training=None), seen(is_idle=True)):
        assert make_policy(name).plan(state) == InferenceOnly().plan(state)


def test_inference_only_never_trains() -> None:
    plan = make_policy("inference-only").plan(seen(offer()))
    assert plan == SERVED
    assert plan.training == TrainingPlan()


def test_continuous_starts_what_is_offered_beside_the_iteration_uncut() -> None:
    policy = make_policy("continuous")
    assert policy.plan(seen(offer(3))) == IterationPlan(
        decodes=(1,), admissions=(Chunk(5, 30),), training=TrainingPlan(start=3)
    )
    assert policy.plan(seen(offer(3), is_busy=True)) == SERVED
    both = seen(offer(3), offer(4, since_s=1.0, is_begun=True))
    assert policy.plan(both).training.start == 4


@pytest.mark.parametrize("name", ["continuous", "periodic", "synchronous"])
def test_memory_cuts_a_quantum_or_lets_it_wait(name: str) -> None:
    policy = make_policy(name)

    def start(threshold: int) -> TrainingPlan:
        memory = MemoryView(threshold, 10**6, 0, 0, training_token=10.0)
        return policy.plan(seen(offer(), memory=memory, is_idle=True)).training

    assert start(1000) == TrainingPlan(start=0)
    assert start(400) == TrainingPlan(start=0, max_tokens=40)
    assert start(100) == TrainingPlan(again_s=MEMORY_AGAIN_S)


def test_periodic_begins_batches_in_the_first_part_of_a_window_only() -> None:
    policy = make_policy("periodic", PolicySettings(periodic_window_s=10.0, periodic_share=0.3))
    for now_s, starts in ((0.0, True), (2.9, True), (3.1, False), (9.9, False), (10.0, True)):
        plan = policy.plan(seen(offer(), now_s=now_s))
        assert (plan.training.start == 0) == starts, now_s
        assert plan.decodes == (1,)
    late = policy.plan(seen(offer(), now_s=17.0))
    assert late.training.start is None
    assert late.training.again_s == pytest.approx(3.0)
    assert policy.plan(seen(offer(is_begun=True), now_s=17.0)).training.start == 0


def test_periodic_with_no_share_never_begins_and_asks_for_nothing() -> None:
    policy = make_policy("periodic", PolicySettings(periodic_share=0.0))
    assert policy.plan(seen(offer(), now_s=1.0)).training == TrainingPlan()


def test_synchronous_stops_the_world_once_a_batch_has_begun() -> None:
    policy = make_policy("synchronous")
    begin = policy.plan(seen(offer()))
    assert not begin.is_pause  # an iteration between any two steps
    assert begin.decodes == (1,)
    assert begin.training == TrainingPlan(start=0)
    go_on = policy.plan(seen(offer(is_begun=True)))
    assert go_on == IterationPlan(training=TrainingPlan(start=0), is_pause=True)
    assert policy.plan(seen(is_busy=True)) == IterationPlan(is_pause=True)


def test_synchronous_pauses_nobody_where_there_is_nobody() -> None:
    policy = make_policy("synchronous")
    plan = policy.plan(seen(offer(is_begun=True), is_idle=True))
    assert plan == IterationPlan(training=TrainingPlan(start=0))


def test_synchronous_serves_on_while_its_batch_waits_for_memory() -> None:
    memory = MemoryView(0, 10**6, 0, 0, training_token=10.0)
    plan = make_policy("synchronous").plan(seen(offer(is_begun=True), memory=memory))
    assert not plan.is_pause
    assert plan.decodes == (1,)
    assert plan.training == TrainingPlan(again_s=MEMORY_AGAIN_S)
