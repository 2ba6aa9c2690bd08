"""The default policy: chunks by slack, who goes first, and when training runs."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from cotune.policy import (
    Budgets,
    Chunk,
    Costs,
    IterationPlan,
    IterationShape,
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
    rank_s,
)
from policy_world import Learner, World

NOW_S = 100.0
SIZE = 4
TTFT_S, TBT_S = 1.0, 0.1
COSTS = Costs(
    base_s=0.0095,  # half a token less than 10 ms, so that no rounding decides
    per_decode_s=0.001,
    per_context_s=0.0,
    per_token_s=0.001,
    per_attention_s=0.0,
    margin=1.25,
    interference=1.5,
    quantum_interference=1.5,
    per_row_s=(0.001, 0.001, 0.002),
)
EXACT = PolicySettings(slack_use=1.0, queue_use=1.0, gamma=0.0)


def decode(key: int = 1, *, due_in_s: float = TBT_S) -> RunningView:
    return RunningView(key, 7, 8, 2, 2, False, NOW_S + due_in_s, NOW_S - 9.0)


def prefill(
    key: int, computed: int, known: int, *, waited_s: float = 0.5, is_batch: bool = False
) -> RunningView:
    pages = -(-known // SIZE)
    due_s = math.inf if is_batch else NOW_S - waited_s + TTFT_S
    rank = rank_s(0, NOW_S - waited_s, "batch" if is_batch else "interactive")
    return RunningView(key, computed, known, pages, pages, False, due_s, rank)


def waiting(key: int, known: int, *, waited_s: float = 0.0, **changes: Any) -> WaitingView:
    arrival_s = NOW_S - waited_s
    base = WaitingView(
        key, arrival_s, known, 0, None, False, arrival_s + TTFT_S, arrival_s=arrival_s
    )
    return base._replace(**changes)


def offer(key: int = 0, **changes: Any) -> TrainingOffer:
    base = TrainingOffer(key, "forward", 400, 4, NOW_S - 0.1, 0.7, 0.5, is_begun=False)
    return base._replace(**changes)


def lane(*offers: TrainingOffer, share: float = 0.5, **changes: Any) -> TrainingView:
    return TrainingView(offers, None, share, NOW_S - 0.1)._replace(**changes)


def on_lane(*, is_held: bool = False, share: float = 0.5) -> TrainingView:
    return TrainingView((), RunningQuantum(0, "forward", 400, NOW_S, is_held), share, NOW_S)


def seen(
    running: tuple[RunningView, ...] = (),
    queue: tuple[WaitingView, ...] = (),
    *,
    training: TrainingView | None = None,
    tokens: int = 512,
    costs: Costs | None = COSTS,
    **changes: Any,
) -> Observation:
    budgets = Budgets(tokens, 16, SIZE, 64, TTFT_S, TBT_S)
    base = Observation(NOW_S, budgets, 10_000, running, queue, training=training, costs=costs)
    return base._replace(**changes)


def plan(state: Observation, settings: PolicySettings = EXACT) -> IterationPlan:
    return make_policy("cotune", settings).plan(state)


def seconds(state: Observation, found: IterationPlan, *, beside: bool = False) -> float:
    """What `found` takes, with its margin."""
    assert state.costs is not None
    shape = IterationShape(len(found.decodes), 8 * len(found.decodes))
    for chunk in (*found.prefills, *found.admissions):
        shape = shape.with_chunk(chunk.tokens, 0)
    return state.costs.margin * state.costs.iteration_s(shape, beside_training=beside)


# -- prompts ---------------------------------------------------------------------------------------


def test_a_prompt_gets_as_many_tokens_as_the_nearest_decode_has_slack() -> None:
    state = seen((decode(), decode(2, due_in_s=0.06)), (waiting(5, 400),))
    found = plan(state)
    assert found.decodes == (1, 2)
    # 60 ms / 1.25, less 9.5 ms and two decodes of 1 ms: 36 tokens of 1 ms.
    assert found.admissions == (Chunk(5, 36),)
    assert seconds(state, found) <= 0.06


def test_a_part_of_the_slack_is_kept_for_the_unforeseen_unless_the_prompt_is_near_its_target() -> (
    None
):
    usual = PolicySettings(slack_use=0.5)
    assert plan(seen((decode(),), (waiting(5, 80),)), usual).admissions == (Chunk(5, 29),)
    # Due in 0.12 s: three iterations at that pace are too many, two at the full one are not.
    near = waiting(5, 80, waited_s=0.88)
    assert plan(seen((decode(),), (near,)), usual).admissions == (Chunk(5, 69),)


def test_without_deadlines_the_whole_budget_is_used() -> None:
    relaxed = Budgets(512, 16, SIZE)
    running = (decode(due_in_s=math.inf),)
    queue = (waiting(5, 5000, due_s=math.inf),)
    state = seen(running, queue, budgets=relaxed)
    assert plan(state).admissions == (Chunk(5, 511),)


def test_as_long_as_nothing_is_known_of_costs_the_budget_alone_counts() -> None:
    assert plan(seen((decode(),), (waiting(5, 5000),), costs=None)).tokens == 512


def test_without_decodes_an_iteration_is_a_part_of_the_ttft_target_at_most() -> None:
    state = seen((), (waiting(5, 5000, due_s=math.inf),))
    found = plan(state)
    assert found.admissions == (Chunk(5, 390),)  # 0.5 s / 1.25 less 9.5 ms
    assert seconds(state, found) <= 0.5 * TTFT_S


def test_a_prompt_never_stalls_however_late_the_decodes_are() -> None:
    settings = PolicySettings(min_chunk_tokens=7, prefill_floor=0.0)
    late = (decode(due_in_s=-3.0),)
    assert plan(seen(late, (waiting(5, 400),)), settings).admissions == (Chunk(5, 7),)
    share = PolicySettings(min_chunk_tokens=1, prefill_floor=1.0)
    assert plan(seen(late, (waiting(5, 400),)), share).admissions == (Chunk(5, 10),)


def test_only_the_first_prompt_is_cut_below_the_smallest_piece() -> None:
    state = seen((decode(due_in_s=0.0625),), (waiting(5, 30, waited_s=0.1), waiting(6, 40)))
    assert plan(state).admissions == (Chunk(5, 30),)  # 9.5 ms are left, a piece is 16 tokens
    short = seen((decode(due_in_s=0.0625),), (waiting(5, 30, waited_s=0.1), waiting(6, 8)))
    assert plan(short).admissions == (Chunk(5, 30), Chunk(6, 8))


def test_who_gets_the_first_token_at_the_end_is_not_kept_waiting_by_who_comes_behind() -> None:
    # Due in 0.1 s: 60 tokens of the long one fit beside it, not 380.
    queue = (waiting(5, 10, waited_s=0.9), waiting(6, 3000, due_s=math.inf))
    state = seen((), queue)
    found = plan(state)
    assert found.admissions == (Chunk(5, 10), Chunk(6, 60))
    assert seconds(state, found) <= 0.1


def test_an_interactive_request_goes_before_the_rest_of_a_batch_prompt() -> None:
    running = (decode(due_in_s=math.inf), prefill(2, 100, 4000, waited_s=5.0, is_batch=True))
    found = plan(seen(running, (waiting(5, 200),)))
    assert found.admissions == (Chunk(5, 200),)
    assert found.prefills == (Chunk(2, 189),)  # of 0.4 s


def test_a_batch_prompt_that_has_waited_long_goes_before_a_new_interactive_one() -> None:
    running = (decode(), prefill(2, 100, 4000, waited_s=31.0, is_batch=True))
    assert plan(seen(running, (waiting(5, 400),))).prefills == (Chunk(2, 69),)


def test_a_prompt_that_is_late_anyway_lets_those_go_first_that_can_still_make_it() -> None:
    late, fresh = waiting(5, 300, waited_s=1.2), waiting(6, 300)
    settings = PolicySettings(slack_use=1.0, late_step=2.0)
    found = plan(seen((decode(),), (late, fresh)), settings)
    assert [chunk.key for chunk in found.admissions] == [6]
    in_order = plan(seen((decode(),), (late, fresh)), PolicySettings(late_step=0.0))
    assert [chunk.key for chunk in in_order.admissions] == [5]
    older = waiting(5, 300, waited_s=2.1)  # two targets later it is its turn
    found = plan(seen((decode(),), (older, fresh)), settings)
    assert [chunk.key for chunk in found.admissions] == [5]


def test_a_request_waits_for_a_prefix_that_another_is_computing() -> None:
    running = (prefill(2, 40, 100),)
    follower = waiting(5, 100, coming=96)
    other = waiting(6, 20)
    found = plan(seen(running, (follower, other)))
    assert [chunk.key for chunk in found.admissions] == [6]
    assert found.prefills == (Chunk(2, 60),)


def test_it_waits_for_a_prefix_only_while_it_can_afford_to() -> None:
    running = (prefill(2, 40, 100),)
    near = waiting(5, 100, waited_s=0.9, coming=96)
    assert plan(seen(running, (near,))).admissions
    untimed = waiting(5, 100, due_s=math.inf, coming=96)
    assert not plan(seen(running, (untimed,))).admissions
    patient = untimed._replace(arrival_s=NOW_S - 6.0)
    assert plan(seen(running, (patient,))).admissions
    assert not plan(seen(running, (patient,)), PolicySettings(prefix_patience_s=9.0)).admissions


# -- training --------------------------------------------------------------------------------------


def test_training_runs_beside_an_iteration_that_stays_in_time() -> None:
    state = seen((decode(),), training=lane(offer()))
    assert plan(state).training == TrainingPlan(start=0)
    shorter = PolicySettings(quantum_slack=4.0)
    expected = TrainingPlan(start=0, max_tokens=133)  # 0.4 s / 1.5 / 2 ms
    assert plan(state, shorter).training == expected


def test_beside_training_a_prompt_gets_fewer_tokens_so_that_the_decodes_are_in_time() -> None:
    alone = seen((decode(),), (waiting(5, 400),))
    both = alone._replace(training=lane(offer()))
    found = plan(both)
    assert found.training.start == 0
    assert 0 < found.admissions[0].tokens < plan(alone).admissions[0].tokens
    assert seconds(both, found, beside=True) <= TBT_S


def test_nothing_starts_and_what_runs_waits_when_a_decode_would_be_late_beside_it() -> None:
    near = (decode(due_in_s=0.016),)  # 13.1 ms alone, 19.7 beside
    assert plan(seen(near, training=lane(offer()))).training == TrainingPlan()
    assert plan(seen(near, training=on_lane())).training == TrainingPlan(hold=True)
    assert plan(seen(near, training=on_lane(is_held=True))).training == TrainingPlan(hold=True)
    far = (decode(due_in_s=0.021),)
    assert plan(seen(far, training=on_lane(is_held=True))).training == TrainingPlan()


def test_training_waits_when_a_prompt_would_be_late_because_of_it() -> None:
    queue = (waiting(5, 500, waited_s=0.2),)  # 0.63 s of work at its pace, due in 0.8 s
    assert plan(seen((), queue, training=on_lane())).training.hold
    early = (waiting(5, 300, waited_s=0.2),)
    assert not plan(seen((), early, training=on_lane())).training.hold


def test_a_part_of_the_prompts_time_is_kept_for_those_who_are_still_to_come() -> None:
    queue = (waiting(5, 300, waited_s=0.2),)  # 0.58 s beside training, due in 0.8 s
    for use, is_held in ((1.0, False), (0.5, True)):
        settings = PolicySettings(slack_use=1.0, queue_use=use)
        assert plan(seen((), queue, training=on_lane()), settings).training.hold == is_held


def test_training_waits_while_the_queue_is_behind() -> None:
    queue = tuple(waiting(5 + index, 400, waited_s=0.1) for index in range(6))
    assert plan(seen((), queue, training=on_lane())).training.hold
    relaxed = tuple(view._replace(due_s=math.inf) for view in queue)
    assert not plan(seen((), relaxed, training=on_lane())).training.hold


def test_the_floor_lets_training_go_on_whatever_is_late() -> None:
    near = (decode(due_in_s=0.016),)
    settings = PolicySettings(training_floor=0.2)
    assert plan(seen(near, training=lane(offer(), share=0.1)), settings).training.start == 0
    assert plan(seen(near, training=lane(offer(), share=0.3)), settings).training.start is None
    assert not plan(seen(near, training=on_lane(share=0.1)), settings).training.hold
    assert plan(seen(near, training=on_lane(share=0.3)), settings).training.hold


def test_a_quantum_that_was_told_to_wait_for_long_goes_on() -> None:
    near = (decode(due_in_s=0.016),)
    held = on_lane(is_held=True)._replace(idle_since_s=NOW_S - 19.0)
    assert plan(seen(near, training=held)).training.hold
    assert not plan(seen(near, training=held._replace(idle_since_s=NOW_S - 21.0))).training.hold


def test_the_ceiling_starts_nothing_while_anybody_waits() -> None:
    settings = PolicySettings(training_ceiling=0.6)
    full = lane(offer(), share=0.7)
    assert plan(seen((decode(),), training=full), settings).training.start is None
    assert plan(seen((), training=full), settings).training.start == 0
    nobody = decode()._replace(is_background=True, due_s=math.inf)
    assert plan(seen((nobody,), training=full), settings).training.start == 0


def test_a_quantum_is_cut_only_while_somebody_waits() -> None:
    idle = plan(seen((), training=lane(offer())))
    assert idle.training == TrainingPlan(start=0)
    shorter = PolicySettings(quantum_slack=1.0)
    assert plan(seen((decode(),), training=lane(offer())), shorter).training.max_tokens == 100
    assert plan(seen((decode(),), training=lane(offer(tokens=120))), EXACT).training == (
        TrainingPlan(start=0)
    )


def test_a_batch_that_has_begun_goes_on_unless_memory_says_no() -> None:
    begun = offer(1, is_begun=True, signal=0.0)
    better = offer(0, signal=1.0, since_s=NOW_S - 50.0, tokens=40)
    assert plan(seen((), training=lane(better, begun))).training.start == 1
    memory = MemoryView(600, 10**6, 0, 0, training_token=10.0)
    found = plan(seen((), training=lane(better, begun), memory=memory))
    assert found.training == TrainingPlan(start=0)
    backward = begun._replace(kind="backward")
    none = memory._replace(threshold=0)
    assert plan(seen((), training=lane(better, backward), memory=none)).training.start == 1


def test_nothing_is_held_while_nothing_runs_beside_it() -> None:
    # The only one waits for memory that the quantum on the lane holds.
    memory = MemoryView(0, 10**6, 100, 10_000, training_token=10.0, prefill_token=10.0)
    behind = waiting(5, 4000, waited_s=0.9)
    found = plan(seen((), (behind,), training=on_lane(), memory=memory))
    assert found == IterationPlan()


# -- the whole, in virtual time --------------------------------------------------------------------


def test_with_nothing_to_serve_training_goes_on_whatever_an_iteration_would_take() -> None:
    # An iteration alone takes more than its part of the TTFT target: with one, nothing would start.
    slow = COSTS._replace(base_s=0.6)
    late = seen((decode(),), training=lane(offer()), costs=slow)
    assert plan(late).training == TrainingPlan()
    assert plan(seen(training=lane(offer()), costs=slow)).training == TrainingPlan(start=0)


@pytest.mark.parametrize("seed", [1, 2])
def test_training_beside_serving_costs_next_to_no_target(seed: int) -> None:
    """Requests at about 60 % of what the device can do, and training for all that is left."""
    budgets = Budgets(256, 64, SIZE, 64, 0.8, 0.06)
    costs = COSTS._replace(base_s=0.004, per_decode_s=0.0005, per_token_s=0.0004, margin=1.1)

    def attained(name: str, learners: list[Learner]) -> tuple[float, World]:
        draw = random.Random(seed)
        world = World(
            make_policy(name),
            budgets,
            pages=100_000,
            costs=costs,
            learners=learners,
            may_pause=True,
        )
        next_s = 0.0
        while world.now_s < 15.0 or world.live:
            while next_s <= min(world.now_s, 15.0):
                world.arrive(draw.randrange(10, 250), draw.randrange(5, 60)).arrival_s = next_s
                next_s += draw.expovariate(6.0)
            if world.live or learners:
                world.step()
            else:
                world.now_s = next_s
        good = sum(
            seq.first_token_s is not None
            and seq.first_token_s - seq.arrival_s <= budgets.ttft_s
            and max(seq.gaps_s, default=0.0) <= budgets.tbt_s
            for seq in world.sequences
        )
        return good / len(world.sequences), world

    alone, _ = attained("inference-only", [])
    learner = Learner(0, [16] * 10_000, rows_per_sample=16, quantum_samples=8)
    together, world = attained("cotune", [learner])
    assert together >= max(alone, 0.98) - 0.02
    assert world.active_s / world.now_s > 0.6
