from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.policy import POLICY_NAMES, InferenceOnly, make_policy
from cotune.policy.costs import Costs, IterationShape
from cotune.policy.types import Budgets, Chunk, IterationPlan, TrainingPlan
from cotune.tools.coserve_log import LoggedSample, LoggedTraining
from cotune.tools.simulation import Simulation
from cotune.tools.simulation_training import samples_of
from cotune.tools.simulation_types import (
    Outcome,
    SimulationError,
    SimulationResult,
    SimulationSettings,
)
from cotune.tools.traces import Segment, TraceRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cotune.policy.types import Observation, Policy

# An iteration takes 1 s, 0.5 s more per decode and 0.125 s per prompt token; all sums are exact.
COSTS = Costs(
    base_s=1.0,
    per_decode_s=0.5,
    per_context_s=0.0,
    per_token_s=0.125,
    per_attention_s=0.0,
    interference=2.0,
    quantum_interference=4.0,
    per_row_s=(0.0, 0.25, 0.5),
    quantum_base_s=1.0,
    step_s=3.0,
)
BUDGETS = Budgets(tokens=64, sequences=8, page_size=4)
PLAIN = SimulationSettings(budgets=BUDGETS, pages=64)
TRAINING = LoggedTraining(batch_size=2, batch_wait_s=100.0, quantum_tokens=8)


def request(arrival_s: float, prompt: int, output: int, *path: Segment) -> TraceRequest:
    return TraceRequest(
        arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output, segments=path
    )


def simulate(
    requests: Sequence[TraceRequest],
    settings: SimulationSettings = PLAIN,
    policy: Policy | None = None,
    *,
    costs: Costs = COSTS,
    samples: Sequence[LoggedSample] = (),
) -> SimulationResult:
    return Simulation(requests, policy or InferenceOnly(), costs, settings, samples=samples).run()


class Scripted:
    """Serves as inference-only does, and trains as the test says."""

    def __init__(self, decide: Callable[[Observation], TrainingPlan | None]) -> None:
        self._decide = decide
        self._serve = InferenceOnly()
        self.seen: list[Observation] = []

    def plan(self, observation: Observation) -> IterationPlan:
        self.seen.append(observation)
        training = self._decide(observation)
        if training is None:
            return self._serve.plan(observation)
        return replace(self._serve.plan(observation), training=training)


class Pausing:
    """Stops everyone as long as there is anything to train."""

    def plan(self, observation: Observation) -> IterationPlan:
        training = observation.training
        assert training is not None
        if training.running is None and not training.offers:
            return InferenceOnly().plan(observation)
        start = None if training.running is not None else training.offers[0].key
        return IterationPlan(training=TrainingPlan(start=start), is_pause=True)


def eagerly(observation: Observation) -> TrainingPlan:
    training = observation.training
    assert training is not None
    return TrainingPlan(start=training.offers[0].key if training.offers else None)


def kept(result: SimulationResult) -> list[tuple[float | None, list[float], float | None]]:
    return [(o.ttft_s, list(o.gaps_s), o.ended_s) for o in result.outcomes]


# -- serving, computed by hand --------------------------------------------------------------------


def test_a_request_alone_takes_what_its_iterations_cost() -> None:
    result = simulate([request(0.0, 8, 3)])
    assert kept(result) == [(2.0, [1.5, 1.5], 5.0)]
    assert (result.iterations, result.batch_tokens, result.decode_tokens) == (3, 10, 2)
    assert result.busy_s == result.duration_s == 5.0


def test_a_request_that_comes_during_an_iteration_starts_with_the_next() -> None:
    result = simulate([request(0.0, 8, 3), request(1.0, 8, 1)])
    # At 2 s: one decode and a prompt of 8, for 1 + 0.5 + 1 seconds.
    assert kept(result) == [(2.0, [2.5, 1.5], 6.0), (3.5, [], 4.5)]


def test_an_idle_device_waits_for_the_next_request() -> None:
    result = simulate([request(0.0, 8, 1), request(10.0, 8, 1)])
    assert kept(result) == [(2.0, [], 2.0), (2.0, [], 12.0)]
    assert result.busy_s == 4.0


def test_a_long_prompt_is_cut_to_the_token_budget() -> None:
    few = replace(PLAIN, budgets=BUDGETS._replace(tokens=4))
    result = simulate([request(0.0, 10, 1)], few)
    assert kept(result) == [(3.0 + 10 * 0.125, [], 4.25)]
    assert result.iterations == 3


def test_attention_and_context_are_counted_as_the_device_sees_them() -> None:
    shapes: list[IterationShape] = []

    class Noting(Costs):
        def iteration_s(self, shape: IterationShape, *, beside_training: bool = False) -> float:
            shapes.append(shape)
            return 1.0

    few = replace(PLAIN, budgets=BUDGETS._replace(tokens=4))
    simulate([request(0.0, 6, 2), request(0.0, 5, 1)], few, costs=Noting(*COSTS))
    assert shapes == [
        IterationShape(0, 0, 4, 10, 1),
        # The last 2 of the first prompt after 4, and 2 of the second.
        IterationShape(0, 0, 4, (2 * 4 + 3) + 3, 2),
        # A decode that reads 7 entries, and 3 after 2.
        IterationShape(1, 7, 3, 3 * 2 + 6, 1),
    ]


def test_a_last_prompt_token_alone_costs_what_a_decode_costs() -> None:
    few = replace(PLAIN, budgets=BUDGETS._replace(tokens=4))
    result = simulate([request(0.0, 5, 1)], few)
    assert kept(result) == [(1.5 + 1.5, [], 3.0)]


def test_time_between_iterations_is_added_and_told_to_the_policy() -> None:
    policy = Scripted(lambda observation: None)
    result = simulate([request(0.0, 8, 3)], replace(PLAIN, overhead_s=0.25), policy)
    assert kept(result) == [(2.0, [1.75, 1.75], 5.5)]
    assert policy.seen[0].costs == COSTS._replace(base_s=1.25)


def test_a_slower_device_is_slower_from_that_moment_on() -> None:
    result = simulate([request(0.0, 8, 3)], replace(PLAIN, slowdowns=((3.0, 2.0),)))
    assert kept(result) == [(2.0, [1.5, 3.0], 6.5)]


# -- pages and prefixes ---------------------------------------------------------------------------


def test_a_prompt_that_begins_as_an_earlier_one_computes_the_rest_only() -> None:
    shared = Segment(7, 6)
    result = simulate([request(0.0, 8, 1, shared), request(10.0, 8, 1, shared)])
    # Six tokens agree; one full page of four of them can be shared.
    assert [outcome.cached_tokens for outcome in result.outcomes] == [0, 4]
    assert [outcome.ttft_s for outcome in result.outcomes] == [2.0, 1.5]


def test_a_prompt_that_is_cached_whole_still_computes_its_last_token() -> None:
    shared = Segment(7, 8)
    result = simulate([request(0.0, 8, 1, shared), request(10.0, 8, 1, shared)])
    assert [outcome.cached_tokens for outcome in result.outcomes] == [0, 4]


def test_equal_segments_after_different_ones_are_not_shared() -> None:
    result = simulate(
        [
            request(0.0, 12, 1, Segment(1, 4), Segment(9, 8)),
            request(10.0, 12, 1, Segment(2, 4), Segment(9, 8)),
            request(20.0, 12, 1, Segment(1, 4), Segment(9, 8)),
        ]
    )
    assert [outcome.cached_tokens for outcome in result.outcomes] == [0, 0, 8]


def test_the_next_turn_finds_prompt_and_answer_of_the_turn_before() -> None:
    first = (Segment(1, 8), Segment(2, 16))
    result = simulate([request(0.0, 8, 8, *first), request(100.0, 20, 1, *first, Segment(3, 20))])
    # The 16th token was sampled and never computed, so its page is not there.
    assert [outcome.cached_tokens for outcome in result.outcomes] == [0, 12]


def test_cached_prefixes_go_when_their_pages_are_needed() -> None:
    a, b = Segment(1, 12), Segment(2, 12)
    result = simulate(
        [request(0.0, 13, 1, a), request(10.0, 13, 1, b), request(20.0, 13, 1, a)],
        replace(PLAIN, pages=5),
    )
    # Four pages each: the second takes two of the first's three, the last ones first.
    assert [outcome.cached_tokens for outcome in result.outcomes] == [0, 0, 4]
    assert result.evicted_pages > 0


def test_a_given_number_of_cached_tokens_is_taken_as_it_is() -> None:
    given = replace(request(0.0, 8, 1), cached_tokens=6)
    result = simulate([given])
    assert result.outcomes[0].cached_tokens == 6
    assert result.outcomes[0].ttft_s == 1.0 + 2 * 0.125


def test_the_policy_is_told_what_a_running_prompt_is_about_to_cache() -> None:
    policy = Scripted(lambda observation: None)
    few = replace(PLAIN, budgets=BUDGETS._replace(tokens=6))
    shared = Segment(1, 10)
    simulate([request(0.0, 16, 1, shared), request(0.5, 16, 1, shared)], few, policy)
    views = [observation.waiting[0] for observation in policy.seen if observation.waiting]
    assert [(view.cached, view.coming) for view in views[:2]] == [(0, 0), (4, 8)]


def test_who_is_last_gives_way_when_pages_run_out_and_everyone_ends() -> None:
    requests = [request(0.0, 8, 24), request(0.0, 8, 24)]
    result = simulate(requests, replace(PLAIN, pages=10))
    assert result.preemptions == 1
    assert [len(outcome.gaps_s) for outcome in result.outcomes] == [23, 23]
    first, second = (outcome.ended_s for outcome in result.outcomes)
    assert first is not None
    assert second is not None
    assert first < second


def test_who_would_never_fit_and_who_finds_the_queue_full_is_refused() -> None:
    few = replace(PLAIN, pages=4, max_queue=1)
    result = simulate([request(0.0, 20, 1), request(0.0, 8, 1), request(0.0, 8, 1)], few)
    assert [outcome.refusal for outcome in result.outcomes] == ["too_long", None, "queue_full"]
    assert [outcome.ttft_s for outcome in result.outcomes] == [None, 2.0, None]


# -- what the policy sees -------------------------------------------------------------------------


def test_tokens_are_due_as_the_targets_say() -> None:
    policy = Scripted(lambda observation: None)
    targets = replace(PLAIN, budgets=BUDGETS._replace(ttft_s=5.0, tbt_s=0.5), fast_forward=False)
    batch = replace(request(0.0, 8, 2), request_class="batch")
    simulate([batch, request(1.0, 8, 3)], targets, policy)
    due = [{view.key: view.due_s for view in observation.running} for observation in policy.seen]
    assert policy.seen[0].waiting[0].due_s == math.inf
    assert policy.seen[1].waiting[0].due_s == 6.0
    # The second's first token came at 4.5 s, its next at 6 s.
    assert due == [{}, {0: math.inf}, {1: 5.0}, {1: 6.5}]


def test_the_order_is_that_of_the_rank_and_arrival() -> None:
    policy = Scripted(lambda observation: None)
    batch = replace(request(0.0, 8, 1), request_class="batch")
    narrow = replace(PLAIN, budgets=BUDGETS._replace(sequences=1))
    result = simulate([batch, request(0.0, 8, 1)], narrow, policy)
    assert [view.key for view in policy.seen[0].waiting] == [1, 0]
    assert [outcome.ttft_s for outcome in result.outcomes] == [4.0, 2.0]


# -- training, computed by hand -------------------------------------------------------------------


def two_samples() -> list[LoggedSample]:
    return [LoggedSample(arrival_s=0.0, tokens=4), LoggedSample(arrival_s=0.0, tokens=8)]


LEARNING = replace(PLAIN, training=TRAINING)


def test_quanta_alone_take_what_they_cost() -> None:
    # Two forwards of 4 and 8 rows, two backwards, a step: 2 + 3 + 3 + 5 + 3 = 16 s.
    policy = Scripted(eagerly)
    result = simulate([request(20.0, 8, 1)], LEARNING, policy, samples=two_samples())
    kinds = [offer.kind for seen in policy.seen if seen.training for offer in seen.training.offers]
    assert kinds == ["forward", "backward", "forward", "backward", "step"]
    assert result.training_s == result.training_alone_s == 16.0
    assert (result.steps, result.trained_tokens, result.trained_samples) == (1, 12, 2)
    assert kept(result) == [(2.0, [], 22.0)]


def test_an_iteration_and_a_quantum_slow_each_other_while_both_run() -> None:
    # Prompt of 8 alone: 2 s, beside training 4 s. Forward of 4 rows alone: 2 s, beside serving 8 s.
    policy = Scripted(eagerly)
    result = simulate([request(0.0, 8, 1), request(30.0, 8, 1)], LEARNING, policy,
                      samples=two_samples())  # fmt: skip
    assert result.outcomes[0].ttft_s == 4.0
    # Half of the forward is done at 4 s, the rest takes 1 s; then 3 + 3 + 5 + 3.
    assert result.training_s == 19.0
    assert result.outcomes[1].ttft_s == 2.0


def test_an_iteration_goes_on_undisturbed_after_the_quantum_beside_it_has_ended() -> None:
    # A step of 3 s beside serving takes 12 s; a prompt of 56 takes 8 s alone, so 16 s beside.
    samples = [LoggedSample(arrival_s=0.0, tokens=4)]
    one = replace(LEARNING, training=replace(TRAINING, batch_size=1))
    policy = Scripted(eagerly)
    result = simulate([request(5.0, 56, 1)], one, policy, samples=samples)
    # Forward until 2 s, backward until 5 s, then the step beside the prompt: until 17 s, when 6 of
    # the 8 s are done.
    assert kept(result) == [(14.0, [], 19.0)]
    assert result.training_s == 17.0


def test_a_held_quantum_makes_no_progress_and_slows_nobody() -> None:
    def hold(observation: Observation) -> TrainingPlan:
        plan = eagerly(observation)
        return plan._replace(hold=True)

    policy = Scripted(hold)
    result = simulate(
        [request(0.0, 8, 3), request(30.0, 8, 1)], LEARNING, policy, samples=two_samples()
    )
    assert kept(result)[0] == (2.0, [1.5, 1.5], 5.0)
    assert result.held_s == 5.0
    running = policy.seen[1].training and policy.seen[1].training.running
    assert running
    assert (running.is_held, running.held_s) == (True, 2.0)
    assert result.training_s == 16.0  # all of it after 5 s: nobody is served, so nothing is held


def test_a_cut_quantum_holds_the_samples_that_fit_and_one_at_least() -> None:
    def cut(observation: Observation) -> TrainingPlan:
        return eagerly(observation)._replace(max_tokens=5)

    samples = [LoggedSample(arrival_s=0.0, tokens=tokens) for tokens in (2, 2, 6)]
    training = replace(LEARNING, training=replace(TRAINING, batch_size=3, quantum_tokens=16))
    policy = Scripted(cut)
    result = simulate([request(50.0, 8, 1)], training, policy, samples=samples)
    offers = [o for seen in policy.seen if seen.training for o in seen.training.offers]
    assert [(o.kind, o.tokens, o.samples) for o in offers] == [
        ("forward", 10, 3), ("backward", 4, 2), ("forward", 6, 1), ("backward", 6, 1),
        ("step", 0, 3),
    ]  # fmt: skip
    assert [o.is_begun for o in offers] == [False, True, True, True, True]
    assert result.trained_tokens == 10


def test_a_pause_lets_everyone_wait_until_training_has_ended() -> None:
    result = simulate([request(0.0, 8, 1)], LEARNING, Pausing(), samples=two_samples())
    assert kept(result) == [(18.0, [], 18.0)]
    assert result.pauses == 5
    assert result.training_s == result.training_alone_s == 16.0


def test_an_incomplete_batch_begins_after_it_has_waited() -> None:
    policy = Scripted(eagerly)
    training = replace(LEARNING, training=replace(TRAINING, batch_wait_s=6.0))
    samples = [LoggedSample(arrival_s=1.0, tokens=4)]
    simulate([request(50.0, 8, 1)], training, policy, samples=samples)
    offers = [o for seen in policy.seen if seen.training for o in seen.training.offers]
    assert [offer.since_s for offer in offers] == [7.0, 9.0, 12.0]


def test_samples_are_visited_as_often_as_asked_and_some_are_replayed() -> None:
    training = LoggedTraining(
        batch_size=2, batch_wait_s=1.0, quantum_tokens=8, epochs=3, replay_share=0.5
    )
    samples = [LoggedSample(arrival_s=t, tokens=4) for t in (0.0, 0.0, 500.0)]
    result = simulate([request(1000.0, 8, 1)], replace(LEARNING, training=training),
                      Scripted(eagerly), samples=samples)  # fmt: skip
    # Three batches of two; then three of the new one and one earlier each.
    assert (result.steps, result.trained_samples) == (6, 12)


def test_a_policy_asks_to_be_asked_again() -> None:
    def late(observation: Observation) -> TrainingPlan:
        if observation.now_s < 4.0:
            return TrainingPlan(again_s=1.5)
        return eagerly(observation)

    policy = Scripted(late)
    simulate([request(20.0, 8, 1)], LEARNING, policy, samples=two_samples())
    assert [observation.now_s for observation in policy.seen[:4]] == [0.0, 1.5, 3.0, 4.5]


def test_references_are_computed_in_the_background_before_a_sample_is_trained_on() -> None:
    policy = Scripted(eagerly)
    samples = [LoggedSample(arrival_s=0.0, tokens=8), LoggedSample(arrival_s=0.0, tokens=8)]
    result = simulate(
        [request(20.0, 8, 1)], replace(LEARNING, references=True), policy, samples=samples
    )
    assert [view.is_background for view in policy.seen[0].waiting] == [True, True]
    offers = [o for seen in policy.seen if seen.training for o in seen.training.offers]
    assert offers[0].since_s == 1.0 + 16 * 0.125
    assert len(result.outcomes) == 1


def test_the_share_of_training_is_as_asked() -> None:
    requests = [request(float(t), 8, 4) for t in range(70)]
    for rate, count in ((0.0, 0), (0.3, 30), (0.5, 70)):
        assert len(samples_of(requests, rate)) == count
    assert {sample.tokens for sample in samples_of(requests, 0.5)} == {16}
    assert {sample.tokens for sample in samples_of(requests, 0.5, max_tokens=10)} == {10}
    assert {sample.tokens for sample in samples_of(requests, 0.5, tokens=99)} == {99}


# -- faults of a policy ---------------------------------------------------------------------------


class Idle:
    def plan(self, observation: Observation) -> IterationPlan:
        return IterationPlan()


class Confused:
    def __init__(self, plan: IterationPlan) -> None:
        self._plan = plan

    def plan(self, observation: Observation) -> IterationPlan:
        return self._plan


def test_a_policy_that_lets_everyone_wait_is_named_as_the_fault() -> None:
    with pytest.raises(SimulationError, match=r"plans nothing for 0 running and 1 waiting"):
        simulate([request(0.0, 8, 1)], policy=Idle())


@pytest.mark.parametrize(
    "plan",
    [
        IterationPlan(admissions=(Chunk(99, 1),)),
        IterationPlan(prefills=(Chunk(99, 1),)),
        IterationPlan(decodes=(99,)),
        IterationPlan(preemptions=(99,)),
    ],
)
def test_a_policy_that_plans_for_nobody_is_named_as_the_fault(plan: IterationPlan) -> None:
    with pytest.raises(SimulationError, match="sequence 99, which is not there"):
        simulate([request(0.0, 8, 1)], policy=Confused(plan))


def test_a_policy_that_starts_what_is_not_offered_is_named_as_the_fault() -> None:
    with pytest.raises(SimulationError, match="offer 5, which is not there"):
        simulate([request(0.0, 8, 1)], LEARNING, Scripted(lambda _: TrainingPlan(start=5)))


# -- properties -----------------------------------------------------------------------------------


@st.composite
def loads(draw: st.DrawFn) -> list[TraceRequest]:
    now_s = 0.0
    found = []
    for _ in range(draw(st.integers(1, 12))):
        now_s += draw(st.sampled_from((0.0, 0.01, 0.3, 5.0)))
        prompt, output = draw(st.integers(1, 60)), draw(st.integers(1, 30))
        path = []
        end = 0
        for _ in range(draw(st.integers(0, 3))):
            end = min(prompt + output, end + draw(st.integers(1, 25)))
            path.append(Segment(draw(st.integers(0, 2)), end))
        found.append(request(now_s, prompt, output, *path))
    return found


DEVICE = Costs(
    2e-3, 3e-4, 1e-6, 1e-4, 1e-8, 1e-4, interference=1.4, quantum_interference=1.2, margin=1.2,
    per_row_s=(1e-4, 2e-4, 3e-4), quantum_base_s=1e-3, step_s=2e-3,
)  # fmt: skip


@pytest.mark.parametrize("name", POLICY_NAMES)
@settings(max_examples=25, deadline=None)
@given(requests=loads(), pages=st.integers(24, 80), rate=st.sampled_from((0.0, 0.5)))
def test_every_request_ends_no_page_is_lost_and_stretches_change_nothing(
    name: str, requests: list[TraceRequest], pages: int, rate: float
) -> None:
    tight = SimulationSettings(
        budgets=BUDGETS._replace(tokens=24, sequences=4, ttft_s=0.1, tbt_s=0.01),
        pages=pages,
        training=LoggedTraining(batch_size=3, batch_wait_s=0.1, quantum_tokens=64)
        if rate
        else None,
        overhead_s=1e-4,
        noise=0.1,
    )
    samples = samples_of(requests, rate)
    fast = simulate(requests, tight, make_policy(name), costs=DEVICE, samples=samples)
    slow = simulate(
        requests,
        replace(tight, fast_forward=False),
        make_policy(name),
        costs=DEVICE,
        samples=samples,
    )
    assert kept(fast) == kept(slow)
    assert replace(fast, outcomes=(), plans=0) == replace(slow, outcomes=(), plans=0)
    assert slow.plans >= fast.plans
    for outcome in fast.outcomes:
        assert_complete(outcome)


def assert_complete(outcome: Outcome) -> None:
    asked = outcome.request
    assert outcome.refusal is None
    assert len(outcome.gaps_s) == asked.output_tokens - 1
    assert outcome.ttft_s is not None
    assert outcome.ended_s is not None
    assert min(outcome.gaps_s, default=1.0) > 0.0
    total = asked.arrival_s + outcome.ttft_s + sum(outcome.gaps_s)
    assert outcome.ended_s == pytest.approx(total)


def test_a_stretch_of_equal_iterations_asks_the_policy_once() -> None:
    result = simulate([request(0.0, 8, 200)])
    assert result.iterations == 200
    assert result.plans < 10
