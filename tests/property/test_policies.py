"""What holds for every policy: any state, any pattern of arrivals, and each setting's direction."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cotune.policy import (
    POLICY_NAMES,
    Budgets,
    Chunk,
    Costs,
    MemoryView,
    Observation,
    PolicySettings,
    RunningQuantum,
    RunningView,
    TrainingOffer,
    TrainingView,
    WaitingView,
    make_policy,
)
from cotune.policy.types import QuantumKind
from policy_world import COSTS, Learner, World, check_plan, finish

SIZE = 4
policies = pytest.mark.parametrize("name", POLICY_NAMES)


# -- any state -------------------------------------------------------------------------------------


def dues(now_s: float) -> st.SearchStrategy[float]:
    return st.one_of(st.just(math.inf), st.floats(now_s - 1.0, now_s + 3.0))


@st.composite
def offers(draw: st.DrawFn, now_s: float) -> tuple[TrainingOffer, ...]:
    found = []
    for key in range(draw(st.integers(0, 3))):
        kind: QuantumKind = draw(st.sampled_from(get_args(QuantumKind)))
        samples = draw(st.integers(1, 6))
        tokens = 0 if kind == "step" else samples * draw(st.integers(1, 40))
        since_s = now_s - draw(st.floats(0.0, 60.0))
        loss = draw(st.sampled_from([0.0, 0.69, 3.0, math.nan, math.inf]))
        is_begun = kind in ("backward", "step") or draw(st.booleans())
        signal = draw(st.floats(0.0, 1.0))
        found.append(TrainingOffer(key, kind, tokens, samples, since_s, loss, signal, is_begun))
    return tuple(sorted(found, key=lambda offer: offer.since_s))


@st.composite
def observations(draw: st.DrawFn) -> Observation:
    """States that the engine can be in: no more running than the budgets allow."""
    now_s = 100.0
    size = draw(st.sampled_from([1, 4, 16]))
    budgets = Budgets(
        draw(st.integers(1, 60)),
        draw(st.integers(1, 12)),
        size,
        draw(st.integers(1, 64)),
        draw(st.sampled_from([math.inf, 1.0, 0.2])),
        draw(st.sampled_from([math.inf, 0.1, 0.01])),
    )
    running = []
    for key in range(draw(st.integers(0, min(budgets.tokens, budgets.sequences)))):
        known = draw(st.integers(2, 80))
        lag = draw(st.sampled_from([1, 1, 1, 2, 7, known]))
        if lag == 1 and draw(st.booleans()):
            known = known // size * size + 1  # the next token needs a page of its own
        computed = max(0, known - lag)
        covered = known if known - computed > 1 else computed
        pages = max(1, -(-covered // size))
        running.append(
            RunningView(
                key,
                computed,
                known,
                pages,
                draw(st.integers(0, pages)),
                draw(st.integers(0, 4)) == 0,
                draw(dues(now_s)),
                now_s - draw(st.floats(-40.0, 60.0)),
            )
        )
    queue = []
    for key in range(100, 100 + draw(st.integers(0, 12))):
        known = draw(st.integers(1, 80))
        cached = draw(st.integers(0, (known - 1) // size)) * size
        queue.append(
            WaitingView(
                key,
                now_s - draw(st.floats(-40.0, 60.0)),
                known,
                cached,
                draw(st.sampled_from([None, None, "a", "b", "c"])),
                draw(st.integers(0, 4)) == 0,
                draw(dues(now_s)),
                draw(st.sampled_from([0, 0, known - 1])),
            )
        )
    available = draw(st.one_of(st.integers(0, 3), st.integers(0, 40)))
    training = None
    if draw(st.booleans()):
        quantum = None
        if draw(st.booleans()):
            quantum = RunningQuantum(9, "forward", 64, now_s - 0.1, draw(st.booleans()))
        share = draw(st.floats(0.0, 1.0))
        idle_since_s = now_s - draw(st.floats(0.0, 30.0))
        training = TrainingView(draw(offers(now_s)), quantum, share, idle_since_s)
    memory = None
    if draw(st.booleans()):
        memory = MemoryView(
            draw(st.sampled_from([-50, 0, 60, 400, 3000, 10**6])),
            10**7,
            draw(st.sampled_from([0, 20])),
            draw(st.integers(0, available)),
            draw(st.sampled_from([0.0, 5.0])),
            draw(st.sampled_from([0.0, 3.0])),
        )
    return Observation(
        now_s,
        budgets,
        available,
        tuple(sorted(running, key=lambda view: view.rank_s)),
        tuple(sorted(queue, key=lambda view: view.rank_s)),
        frozenset(draw(st.sets(st.sampled_from("abc"), max_size=2))),
        draw(st.integers(0, 2)),
        training,
        draw(st.sampled_from([None, COSTS])),
        memory,
    )


@policies
@given(seen=observations())
@settings(max_examples=150, deadline=None)
def test_no_plan_exceeds_a_budget_and_no_decode_is_displaced(name: str, seen: Observation) -> None:
    check_plan(seen, make_policy(name).plan(seen), may_pause=name == "synchronous")


@policies
@given(seen=observations())
@settings(max_examples=50, deadline=None)
def test_the_same_observation_gives_the_same_plan(name: str, seen: Observation) -> None:
    policy = make_policy(name)
    first = policy.plan(seen)
    policy.plan(seen._replace(now_s=seen.now_s + 50.0, waiting=()))
    assert policy.plan(seen._replace()) == first == make_policy(name).plan(seen)


@policies
@given(seen=observations())
@settings(max_examples=100, deadline=None)
def test_something_always_moves_on(name: str, seen: Observation) -> None:
    # One that waits for a slot waits for somebody who runs; here nobody may hold the slots.
    if not seen.running:
        seen = seen._replace(adapters_in_use=frozenset(), free_adapter_slots=2)
    plan = make_policy(name).plan(seen)
    is_lane_busy = seen.training is not None and seen.training.running is not None
    if seen.running or (seen.waiting and not is_lane_busy):
        assert plan.is_pause or plan.tokens > 0
    elif seen.waiting:
        assert not plan.training.hold  # at the latest when the lane has become free


# -- any arrivals ----------------------------------------------------------------------------------


arrivals = st.lists(
    st.lists(
        st.fixed_dictionaries(
            {"prompt": st.integers(1, 30), "answer": st.integers(1, 12)},
            optional={
                "priority": st.sampled_from([-1, 1]),
                "request_class": st.just("batch"),
                "adapter": st.sampled_from(["a", "b", "c"]),
                "is_background": st.just(True),
                "prompt_key": st.integers(0, 1),
            },
        ),
        max_size=3,
    ),
    max_size=20,
)


@policies
@given(
    rounds=arrivals,
    tokens=st.integers(2, 40),
    sequences=st.integers(1, 6),
    slots=st.integers(1, 2),
    ttft_s=st.sampled_from([math.inf, 0.5, 0.02]),
    tbt_s=st.sampled_from([math.inf, 0.05, 0.004]),
    costs=st.sampled_from([None, COSTS]),
    batches=st.lists(st.lists(st.integers(1, 9), max_size=3), max_size=3),
    thresholds=st.lists(st.sampled_from([-1, 0, 100, 500, 2000]), max_size=20),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_request_and_every_batch_ends(
    name: str,
    rounds: list[list[dict[str, Any]]],
    tokens: int,
    sequences: int,
    slots: int,
    ttft_s: float,
    tbt_s: float,
    costs: Costs | None,
    batches: list[list[int]],
    thresholds: list[int],
) -> None:
    budgets = Budgets(tokens, sequences, SIZE, 2, ttft_s, tbt_s)
    trains = name != "inference-only"
    world = World(
        make_policy(name),
        budgets,
        pages=11,  # one sequence just fits
        slots=slots,
        costs=costs,
        learners=[Learner(key, list(sizes)) for key, sizes in enumerate(batches)] if trains else [],
        may_pause=name == "synchronous",
    )
    for index, round_ in enumerate(rounds):
        for arrival in round_:
            world.arrive(**arrival)
        if thresholds:
            memory = MemoryView(thresholds[index % len(thresholds)], 10**6, 20, 5, 10.0, 3.0)
            world.memory = memory
        world.step()
    # Memory stays as short as it gets for requests, then there is enough for training.
    work = sum(seq.end for seq in world.sequences) + sum(map(sum, batches))
    if thresholds:
        world.memory = MemoryView(min(thresholds), 10**6, 20, 5, 10.0, 3.0)
        start = world.plans
        while world.live:
            assert world.plans - start < 8 * work + 200
            world.step()
        world.memory = MemoryView(5000, 10**6, 20, 5, 10.0, 3.0)
    finish(world, limit=8 * work + 200)


FLOODS: dict[str, dict[str, Any]] = {
    "urgent": {"priority": -1},
    "short": {"prompt": 1},
    "long": {"prompt": 60},
    "one adapter": {"adapter": "a"},
    "batch": {"request_class": "batch"},
    "background": {"is_background": True},
    "one prefix": {"prompt_key": 1},
}


@policies
@pytest.mark.parametrize("flood", FLOODS)
@pytest.mark.parametrize(
    "victim",
    [{}, {"adapter": "b"}, {"request_class": "batch"}, {"is_background": True}, {"prompt_key": 1}],
    ids=["plain", "adapter", "batch", "background", "prefix"],
)
def test_one_request_gets_through_an_endless_flood_beside_training(
    name: str, flood: str, victim: dict[str, Any]
) -> None:
    world = World(
        make_policy(name),
        Budgets(16, 3, SIZE, 2, 0.5, 0.02),
        pages=24,
        slots=1,
        learners=[Learner(0, [4] * 100_000)],
        may_pause=name == "synchronous",
    )
    one = world.arrive(30, 4, **victim)
    for _ in range(30_000):
        if len(world.live) < 40:
            world.arrive(**{"prompt": 20, "answer": 6, **FLOODS[flood]})
        world.step()
        if one.ended_s is not None:
            return
    raise AssertionError("it still waits")


def busy_world(policy_settings: PolicySettings, *, tbt_s: float, learners: int = 1) -> World:
    """Four streams that never end, in a time between tokens of 6 ms alone and 9 beside training."""
    budgets = Budgets(64, 8, SIZE, 64, 10.0, tbt_s)
    world = World(
        make_policy("cotune", policy_settings),
        budgets,
        pages=100_000,
        learners=[Learner(key, [8] * 100_000) for key in range(learners)],
    )
    for _ in range(4):
        world.arrive(4, 100_000)
    return world


def share_after(world: World, seconds: float) -> float:
    while world.now_s < seconds:
        world.step()
    return world.active_s / world.now_s


@pytest.mark.parametrize("floor", [0.05, 0.1, 0.4])
def test_training_keeps_its_floor_although_it_makes_every_token_late(floor: float) -> None:
    world = busy_world(PolicySettings(training_floor=floor), tbt_s=0.008)
    assert floor * 0.9 <= share_after(world, 40.0) <= floor * 1.6


def test_training_goes_on_nearly_always_where_the_targets_leave_room() -> None:
    assert share_after(busy_world(PolicySettings(), tbt_s=0.02), 20.0) > 0.75


def test_training_stays_under_its_ceiling_while_anybody_waits() -> None:
    share = share_after(busy_world(PolicySettings(training_ceiling=0.5), tbt_s=0.02), 20.0)
    assert 0.4 < share < 0.6


def test_no_learner_starves_beside_one_with_a_better_signal() -> None:
    world = busy_world(PolicySettings(), tbt_s=0.02, learners=2)
    world.learners[0].signal, world.learners[1].signal = 1.0, 0.0
    share_after(world, 20.0)
    assert world.learners[1].steps >= 2
    assert world.learners[0].steps > world.learners[1].steps


# -- each setting's direction ----------------------------------------------------------------------

NOW_S = 100.0
BUDGETS = Budgets(64, 8, SIZE, 64, 1.0, 0.1)


def offer(key: int, *, waited_s: float = 1.0, **changes: Any) -> TrainingOffer:
    base = TrainingOffer(
        key, "forward", 40, 4, NOW_S - waited_s, loss=0.69, signal=0.5, is_begun=False
    )
    return base._replace(**changes)


def decode(key: int = 1, *, due_in_s: float = 0.1) -> RunningView:
    return RunningView(key, 7, 8, 2, 2, False, NOW_S + due_in_s, NOW_S - 9.0)


def prompt(key: int, known: int, *, waited_s: float = 0.0) -> WaitingView:
    arrival_s = NOW_S - waited_s
    return WaitingView(key, arrival_s, known, 0, None, False, arrival_s + BUDGETS.ttft_s)


def seen_with(
    *found: TrainingOffer,
    running: tuple[RunningView, ...] = (),
    waiting: tuple[WaitingView, ...] = (),
    memory: MemoryView | None = None,
    share: float = 0.5,
) -> Observation:
    return Observation(
        NOW_S,
        BUDGETS,
        1000,
        running,
        waiting,
        training=TrainingView(found, None, share, NOW_S - 1.0),
        costs=COSTS,
        memory=memory,
    )


@given(gamma=st.floats(0.0, 50.0), gap_s=st.floats(0.0, 20.0), signal=st.floats(0.1, 1.0))
def test_gamma_is_the_waiting_that_a_signal_is_worth(
    gamma: float, gap_s: float, signal: float
) -> None:
    older = offer(0, waited_s=1.0 + gap_s, signal=0.0)
    better = offer(1, signal=signal)
    plan = make_policy("cotune", PolicySettings(gamma=gamma)).plan(seen_with(older, better))
    if abs(gamma * signal - gap_s) > 1e-6:
        assert plan.training.start == (1 if gamma * signal > gap_s else 0)


@pytest.mark.parametrize("name", ["cotune", "mace"])
def test_without_gamma_all_batches_count_alike(name: str) -> None:
    policy = make_policy(name, PolicySettings(gamma=0.0))
    older, better = offer(0, waited_s=2.0, loss=0.1, signal=0.0), offer(1, loss=9.0, signal=1.0)
    assert policy.plan(seen_with(older, better)).training.start == 0
    swapped = policy.plan(
        seen_with(older._replace(loss=9.0, signal=1.0), better._replace(loss=0.1, signal=0.0))
    )
    assert swapped.training.start == 0


def test_gamma_follows_the_raw_loss_under_mace_and_a_bounded_signal_under_cotune() -> None:
    noisy, learnable = offer(0, loss=50.0, signal=0.05), offer(1, loss=0.7, signal=0.9)
    seen = seen_with(noisy, learnable)
    assert make_policy("mace").plan(seen).training.start == 0
    assert make_policy("cotune").plan(seen).training.start == 1
    by_loss = PolicySettings(training_signal="loss")
    assert make_policy("cotune", by_loss).plan(seen).training.start == 0
    # Bounded: what is worth waiting for at most gamma seconds cannot pass one that waited longer.
    older = learnable._replace(since_s=NOW_S - 20.0, signal=0.0, loss=0.0)
    assert make_policy("cotune", by_loss).plan(seen_with(noisy, older)).training.start == 1


# A decode that is in time alone and late beside training: 3 ms alone, margin 1.1, factor 1.5.
TIGHT = decode(due_in_s=0.004)


@given(delta=st.floats(0.0, 40.0), waited_s=st.floats(0.0, 60.0))
def test_delta_of_a_decode_is_how_long_training_waits_before_it_may_make_one_late(
    delta: float, waited_s: float
) -> None:
    values = PolicySettings(gamma=0.0, delta_decode_s=delta, delta_prefill_s=0.0)
    plan = make_policy("cotune", values).plan(
        seen_with(offer(0, waited_s=waited_s), running=(TIGHT,))
    )
    if abs(waited_s - delta) > 1e-6:
        assert (plan.training.start == 0) == (waited_s > delta)


def test_delta_of_training_and_gamma_let_it_win_sooner() -> None:
    seen = seen_with(offer(0, waited_s=12.0, signal=1.0), running=(TIGHT,))
    base = PolicySettings(gamma=0.0)
    assert make_policy("cotune", base).plan(seen).training.start is None
    sooner = replace(base, delta_training_s=10.0)
    assert make_policy("cotune", sooner).plan(seen).training.start == 0
    assert make_policy("cotune", replace(base, gamma=9.0)).plan(seen).training.start == 0


def test_delta_of_a_prompt_is_how_long_training_waits_before_it_may_make_one_late() -> None:
    # 0.6 s of work, due in 0.75 s: in time alone, late beside training.
    queue = (prompt(5, 560, waited_s=0.25),)
    for delta, started in ((3.0, 0), (8.0, None)):
        values = PolicySettings(gamma=0.0, delta_prefill_s=delta)
        plan = make_policy("cotune", values).plan(seen_with(offer(0, waited_s=5.0), waiting=queue))
        assert plan.training.start == started, delta
        assert plan.admissions


def test_under_mace_the_deltas_decide_who_is_packed_first() -> None:
    # The prompt fills the iteration; training fits beside it only if it comes first.
    queue = (prompt(5, 64),)
    seen = seen_with(offer(0, loss=0.0), running=(decode(),), waiting=queue)
    last = make_policy("mace", PolicySettings(gamma=0.0)).plan(seen)
    assert last.training.start is None
    equal = PolicySettings(
        gamma=0.0, delta_decode_s=10.0, delta_prefill_s=10.0, delta_training_s=10.0
    )
    assert make_policy("mace", equal).plan(seen).training.start == 0
    by_loss = PolicySettings(gamma=20.0)
    urgent = seen_with(offer(0, loss=1.0), running=(decode(),), waiting=queue)
    assert make_policy("mace", by_loss).plan(urgent).training.start == 0


def test_lambda_decides_whether_memory_or_latency_is_to_be_used_up() -> None:
    # The quantum takes most of this iteration's memory and little of its time. The long prompt
    # does not fit beside it and goes to the next. The short one fits in both: this iteration has
    # less memory left, the next one less time.
    memory = MemoryView(1000, 10_000, 0, 0, training_token=20.0, prefill_token=5.0)
    quick = COSTS._replace(interference=1.05)
    queue = (prompt(5, 1, waited_s=0.3), prompt(6, 50, waited_s=0.2), prompt(7, 10, waited_s=0.1))
    seen = seen_with(offer(0, waited_s=60.0), waiting=queue, memory=memory)
    seen = seen._replace(costs=quick)

    def admitted(lambda_memory: float, lambda_latency: float) -> set[int]:
        values = PolicySettings(lambda_memory=lambda_memory, lambda_latency=lambda_latency)
        plan = make_policy("mace", values).plan(seen)
        assert plan.training.start == 0
        return {chunk.key for chunk in plan.admissions}

    assert admitted(1.0, 0.0) == {5, 7}
    assert admitted(0.0, 1.0) == {5}


def test_with_less_memory_training_shrinks_then_stops_then_admissions_then_prompts() -> None:
    running = (decode(), RunningView(2, 0, 20, 5, 5, False, NOW_S + 1.0, NOW_S))
    queue = (prompt(5, 12),)

    def given_way(threshold: int) -> tuple[int, bool, int]:
        """Rows of the quantum, whether the waiting one was admitted, tokens of prompts."""
        memory = MemoryView(threshold, 10**6, 100, 1000, training_token=10.0, prefill_token=5.0)
        seen = seen_with(offer(0), running=running, waiting=queue, memory=memory)
        plan = make_policy("cotune").plan(seen)
        rows = 0
        if plan.training.start is not None:
            rows = plan.training.max_tokens or 40
        assert plan.decodes == (1,)
        tokens = sum(chunk.tokens for chunk in (*plan.prefills, *plan.admissions))
        return rows, bool(plan.admissions), tokens

    assert given_way(5000) == (40, True, 32)
    assert given_way(465 + 200) == (20, True, 32)
    assert given_way(465 + 50) == (0, True, 32)
    assert given_way(300) == (0, False, 20)
    assert given_way(30) == (0, False, 5)
    assert given_way(0) == (0, False, 0)
    found = [given_way(threshold) for threshold in range(5000, -1, -100)]
    assert found == sorted(found, reverse=True)


@policies
def test_with_less_memory_no_policy_takes_more(name: str) -> None:
    queue = tuple(prompt(5 + index, 12) for index in range(5))
    last = math.inf
    for threshold in (3000, 1500, 700, 300, 100, 0):
        memory = MemoryView(threshold, 10**6, 100, 1000, training_token=10.0, prefill_token=5.0)
        seen = seen_with(offer(0), running=(decode(),), waiting=queue, memory=memory)
        plan = make_policy(name).plan(seen)
        rows = (plan.training.max_tokens or 40) if plan.training.start is not None else 0
        taken = rows + plan.tokens
        assert taken <= last
        last = taken
    assert last == 1  # the decode


def test_a_longer_prompt_never_takes_the_place_of_a_decode() -> None:
    plan = make_policy("cotune").plan(
        seen_with(running=(decode(), decode(2)), waiting=(prompt(5, 3000),))
    )
    assert plan.decodes == (1, 2)
    assert plan.admissions == (Chunk(5, plan.tokens - 2),)
