"""The paper's policy: packing by priority into this iteration and those after it."""

from __future__ import annotations

from typing import Any

from cotune.policy import (
    Budgets,
    Chunk,
    Costs,
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

NOW_S = 100.0
SIZE = 4
COSTS = Costs(0.010, 0.001, 0.0, 0.001, 0.0, interference=1.5, per_row_s=(0.001, 0.001, 0.002))
FIFO = PolicySettings(gamma=0.0)


def decode(key: int = 1) -> RunningView:
    return RunningView(key, 7, 8, 2, 2, False, NOW_S + 0.1, NOW_S - 9.0)


def waiting(key: int, known: int, *, waited_s: float = 0.0) -> WaitingView:
    return WaitingView(key, NOW_S - waited_s, known, 0, None, False, NOW_S - waited_s + 1.0)


def offer(key: int = 0, **changes: Any) -> TrainingOffer:
    base = TrainingOffer(key, "forward", 40, 4, NOW_S - 0.1, 0.7, 0.5, is_begun=False)
    return base._replace(**changes)


def plan(
    running: tuple[RunningView, ...] = (),
    queue: tuple[WaitingView, ...] = (),
    *offers: TrainingOffer,
    settings: PolicySettings = FIFO,
    costs: Costs | None = COSTS,
    memory: MemoryView | None = None,
    quantum: RunningQuantum | None = None,
) -> IterationPlan:
    return make_policy("mace", settings).plan(
        Observation(
            NOW_S,
            Budgets(512, 16, SIZE, 64, 1.0, 0.1),
            1000,
            running,
            queue,
            training=TrainingView(offers, quantum),
            costs=costs,
            memory=memory,
        )
    )


def test_an_iteration_is_packed_up_to_the_latency_target() -> None:
    # 100 ms less 10 and 1: 89 tokens.
    found = plan((decode(),), (waiting(5, 400),))
    assert found == IterationPlan(decodes=(1,), admissions=(Chunk(5, 89),))


def test_a_prompt_that_fits_into_the_next_iteration_whole_is_not_cut() -> None:
    found = plan((decode(),), (waiting(5, 60, waited_s=0.2), waiting(6, 40, waited_s=0.1)))
    assert found.admissions == (Chunk(5, 60),)


def test_a_later_one_that_fits_fills_what_is_left() -> None:
    queue = tuple(
        waiting(5 + index, known, waited_s=0.5 - 0.1 * index)
        for index, known in enumerate((60, 40, 20))
    )
    assert plan((decode(),), queue).admissions == (Chunk(5, 60), Chunk(7, 20))


def test_with_one_bin_what_does_not_fit_is_cut() -> None:
    queue = (waiting(5, 60, waited_s=0.2), waiting(6, 40, waited_s=0.1))
    single = PolicySettings(gamma=0.0, packing_bins=1)
    assert plan((decode(),), queue, settings=single).admissions == (Chunk(5, 60), Chunk(6, 29))


def test_the_first_prompt_always_gets_a_piece() -> None:
    slow = COSTS._replace(base_s=0.5)  # more than the target before anything is in
    found = plan((decode(),), (waiting(5, 400), waiting(6, 400)), costs=slow)
    assert found.admissions == (Chunk(5, FIFO.min_chunk_tokens),)


def test_as_long_as_nothing_is_known_of_costs_a_bin_is_a_token_budget() -> None:
    assert plan((decode(),), (waiting(5, 3000),), costs=None).tokens == 512


def test_a_quantum_takes_of_the_iteration_what_it_slows_it_by() -> None:
    # It comes first (30 s): a third of the 100 ms is its own.
    found = plan((decode(),), (waiting(5, 400),), offer(since_s=NOW_S - 30.0))
    assert found.training == TrainingPlan(start=0)
    assert found.admissions == (Chunk(5, 55),)
    quantum = RunningQuantum(0, "forward", 40, NOW_S, is_held=False)
    beside = plan((decode(),), (waiting(5, 400),), quantum=quantum)
    assert beside.admissions == (Chunk(5, 55),)
    assert beside.training == TrainingPlan()


def test_a_quantum_waits_for_another_iteration_when_prompts_come_first_and_fill_this_one() -> None:
    assert plan((decode(),), (waiting(5, 400),), offer()).training.start is None
    assert plan((decode(),), (waiting(5, 20),), offer()).training.start == 0
    assert plan((decode(),), (), offer()).training.start == 0


def test_the_raw_loss_moves_a_batch_forward() -> None:
    by_loss = PolicySettings(gamma=5.0)
    queue = (waiting(5, 400),)
    assert plan((decode(),), queue, offer(loss=0.5), settings=by_loss).training.start is None
    assert plan((decode(),), queue, offer(loss=5.0), settings=by_loss).training.start == 0


def test_a_quantum_is_cut_to_the_memory_and_prompts_get_what_it_leaves() -> None:
    memory = MemoryView(300, 10_000, 0, 0, training_token=10.0, prefill_token=10.0)
    found = plan((), (waiting(5, 20),), offer(since_s=NOW_S - 30.0), memory=memory)
    assert found.training == TrainingPlan(start=0, max_tokens=30)
    assert found.tokens <= 16  # the first prompt, alone
    roomy = memory._replace(threshold=1000)
    found = plan((), (waiting(5, 20),), offer(since_s=NOW_S - 30.0), memory=roomy)
    assert found.training == TrainingPlan(start=0)
    assert found.admissions == (Chunk(5, 20),)


def test_only_the_window_of_the_highest_priority_is_looked_at() -> None:
    queue = tuple(waiting(5 + index, 1, waited_s=0.5 - index / 100) for index in range(10))
    narrow = PolicySettings(gamma=0.0, packing_window=4)
    assert [chunk.key for chunk in plan((), queue, settings=narrow).admissions] == [5, 6, 7, 8]
