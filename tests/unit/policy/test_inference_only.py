"""The serving policy: exact plans for chosen states, and what holds for any state."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.policy import (
    POLICY_NAMES,
    Budgets,
    Chunk,
    InferenceOnly,
    IterationPlan,
    Observation,
    RunningView,
    WaitingView,
    make_policy,
    rank_s,
)
from cotune.policy.packing import HEADROOM_TOKENS, pages_to_start
from cotune.policy.types import PRIORITY_STEP_S

if TYPE_CHECKING:
    from types import FrameType

SIZE = 16


def decoding(key: int, known: int, *, pages: int | None = None) -> RunningView:
    count = -(-known // SIZE) if pages is None else pages
    return RunningView(key, known - 1, known, count, count)


def prefilling(key: int, computed: int, known: int) -> RunningView:
    count = -(-known // SIZE)
    return RunningView(key, computed, known, count, count)


def waiting(key: int, known: int, *, cached: int = 0, adapter: str | None = None) -> WaitingView:
    return WaitingView(key, float(key), known, cached, adapter)


def plan(
    running: list[RunningView],
    queue: list[WaitingView],
    *,
    tokens: int = 64,
    sequences: int = 8,
    available: int = 1000,
    in_use: frozenset[str] = frozenset(),
    free_slots: int = 0,
) -> IterationPlan:
    budgets = Budgets(tokens, sequences, SIZE)
    return InferenceOnly().plan(
        Observation(0.0, budgets, available, tuple(running), tuple(queue), in_use, free_slots)
    )


def test_every_decode_is_in_the_plan_before_any_prefill_token() -> None:
    result = plan([decoding(1, 40), prefilling(2, 16, 100), decoding(3, 9)], [], tokens=10)
    assert result == IterationPlan(decodes=(1, 3), prefills=(Chunk(2, 8),))


def test_a_long_prompt_is_cut_to_what_the_decodes_leave() -> None:
    result = plan([decoding(1, 40)], [waiting(9, 5000)], tokens=64)
    assert result == IterationPlan(decodes=(1,), admissions=(Chunk(9, 63),))


def test_a_prompt_that_has_begun_goes_on_before_another_begins() -> None:
    result = plan([prefilling(1, 16, 100)], [waiting(2, 10)], tokens=90)
    assert result == IterationPlan(prefills=(Chunk(1, 84),), admissions=(Chunk(2, 6),))


def test_a_prompt_takes_no_tokens_for_what_is_cached() -> None:
    queue = [waiting(1, 100, cached=96), waiting(2, 60)]
    assert plan([], queue).admissions == (Chunk(1, 4), Chunk(2, 60))


def test_no_more_sequences_run_than_the_limit_or_the_budget_has_tokens() -> None:
    queue = [waiting(key, 1) for key in range(20)]
    assert len(plan([], queue, sequences=5).admissions) == 5
    assert len(plan([], queue, sequences=50, tokens=7).admissions) == 7
    full = [decoding(100 + i, 5) for i in range(7)]
    assert plan(full, queue, sequences=50, tokens=7).admissions == ()


def test_nobody_overtakes_a_sequence_that_waits_for_pages() -> None:
    queue = [waiting(1, 16 * 8), waiting(2, 1)]
    result = plan([decoding(9, 5)], queue, available=8, tokens=1000)
    assert result == IterationPlan(decodes=(9,))


def test_an_admission_leaves_room_for_the_running_ones_to_grow() -> None:
    running = [decoding(9, SIZE - 1)]  # it will want a second page soon
    assert plan(running, [waiting(1, SIZE)], available=1).admissions == ()
    assert plan(running, [waiting(1, SIZE)], available=2).admissions == (Chunk(1, SIZE),)
    assert HEADROOM_TOKENS == SIZE


def test_a_sequence_that_is_alone_may_take_every_page() -> None:
    assert plan([], [waiting(1, SIZE * 3)], available=3).admissions == (Chunk(1, SIZE * 3),)


def test_the_last_in_rank_give_way_until_the_others_fit() -> None:
    running = [decoding(key, SIZE + 1, pages=1) for key in (1, 2, 3)]
    assert plan(running, [], available=3).preemptions == ()
    assert plan(running, [], available=2) == IterationPlan(preemptions=(3,), decodes=(1, 2))
    assert plan(running, [], available=0) == IterationPlan(preemptions=(3, 2), decodes=(1,))


def test_a_sequence_whose_pages_are_shared_frees_only_its_own() -> None:
    sharing = RunningView(3, SIZE * 4 - 1, SIZE * 4, 4, 0)
    running = [decoding(1, SIZE + 1, pages=1), decoding(2, 3), sharing]
    assert plan(running, [], available=0).preemptions == (3, 2)


def test_the_first_in_rank_never_gives_way() -> None:
    running = [decoding(1, SIZE + 1, pages=1)]
    assert plan(running, [], available=0) == IterationPlan(decodes=(1,))


def test_nothing_is_admitted_while_pages_are_taken_back() -> None:
    running = [decoding(1, SIZE + 1, pages=1), decoding(2, 3)]
    result = plan(running, [waiting(3, 1)], available=0)
    assert result == IterationPlan(preemptions=(2,), decodes=(1,))


def test_a_sequence_without_a_slot_lets_the_base_model_overtake_and_nobody_else() -> None:
    queue = [
        waiting(1, 4, adapter="b"),
        waiting(2, 4),
        waiting(3, 4, adapter="a"),
    ]
    busy = plan([], queue, in_use=frozenset("a"), free_slots=0)
    assert busy.admissions == (Chunk(2, 4),)
    free = plan([], queue, in_use=frozenset("a"), free_slots=1)
    assert free.admissions == (Chunk(1, 4), Chunk(2, 4), Chunk(3, 4))


def test_two_sequences_of_one_new_adapter_take_one_slot() -> None:
    queue = [waiting(key, 4, adapter="b") for key in (1, 2)]
    assert len(plan([], queue, free_slots=1).admissions) == 2


def test_a_lower_priority_number_goes_first_but_not_for_ever() -> None:
    assert rank_s(0, 10.0) < rank_s(0, 11.0)
    assert rank_s(-1, 20.0) < rank_s(0, 10.0)
    assert rank_s(0, 10.0) < rank_s(-1, 10.0 + PRIORITY_STEP_S + 1.0)


def test_every_name_makes_a_policy_and_others_none() -> None:
    assert POLICY_NAMES[0] == "cotune"
    for name in POLICY_NAMES:
        assert make_policy(name).plan(Observation(0.0, Budgets(1, 1, 1), 1, (), ())) == (
            IterationPlan()
        )
    with pytest.raises(KeyError):
        make_policy("nonsense")


def test_a_decision_takes_no_more_steps_for_those_who_cannot_start_anyway() -> None:
    """`cotune bench policy` measures the time."""
    queue = tuple(waiting(1000 + key, 100) for key in range(20_000))
    running = tuple(decoding(key, 100) for key in range(256))
    short, long = (
        _lines(Observation(0.0, Budgets(2048, 512, SIZE), 100_000, running, queue[:length]))
        for length in (1000, 20_000)
    )
    assert 0 < short == long


def _lines(observation: Observation) -> int:
    """Lines of Python that a decision executes."""
    policy = InferenceOnly()
    count = 0

    def trace(_frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        policy.plan(observation)
    finally:
        sys.settrace(before)
    return count


# -- any state -----------------------------------------------------------------------------------


@st.composite
def observations(draw: st.DrawFn) -> Observation:
    """States that the engine can be in: no more running than the budgets allow."""
    size = draw(st.sampled_from([1, 4, 16]))
    budgets = Budgets(draw(st.integers(1, 40)), draw(st.integers(1, 12)), size)
    running = []
    for key in range(draw(st.integers(0, min(budgets.tokens, budgets.sequences)))):
        known = draw(st.integers(2, 80))
        lag = draw(st.sampled_from([1, 1, 1, 2, 7, known]))
        if lag == 1 and draw(st.booleans()):
            known = known // size * size + 1  # the next token needs a page of its own
        computed = max(0, known - lag)
        # A prefill has its pages from the start; a decode may be about to need one more.
        covered = known if known - computed > 1 else computed
        pages = max(1, -(-covered // size))
        running.append(RunningView(key, computed, known, pages, draw(st.integers(0, pages))))
    queue = []
    for key in range(100, 100 + draw(st.integers(0, 12))):
        known = draw(st.integers(1, 80))
        cached = draw(st.integers(0, (known - 1) // size)) * size
        adapter = draw(st.sampled_from([None, None, "a", "b", "c"]))
        queue.append(WaitingView(key, float(key), known, cached, adapter))
    return Observation(
        0.0,
        budgets,
        draw(st.one_of(st.integers(0, 3), st.integers(0, 30))),
        tuple(running),
        tuple(queue),
        frozenset(draw(st.sets(st.sampled_from("abc"), max_size=2))),
        draw(st.integers(0, 2)),
    )


@given(observations())
def test_no_plan_exceeds_tokens_sequences_or_pages(seen: Observation) -> None:
    result = InferenceOnly().plan(seen)
    views = {view.key: view for view in seen.running}
    queue = {view.key: view for view in seen.waiting}
    size = seen.budgets.page_size
    assert result.tokens <= seen.budgets.tokens
    assert all(chunk.tokens >= 1 for chunk in (*result.prefills, *result.admissions))
    staying = [view for view in seen.running if view.key not in result.preemptions]
    assert len(staying) + len(result.admissions) <= max(seen.budgets.sequences, len(staying))
    given_back = sum(views[key].private_pages for key in result.preemptions)
    wanted = sum(max(0, -(-view.known // size) - view.pages) for view in staying)
    for chunk in result.admissions:
        wanted += pages_to_start(queue[chunk.key], size)
    if wanted > seen.available_pages + given_back:
        # Only where there is one sequence that everything must be tried for.
        assert len(staying) + len(result.admissions) == 1
    new_adapters = {queue[chunk.key].adapter for chunk in result.admissions}
    assert len(new_adapters - {None} - seen.adapters_in_use) <= seen.free_adapter_slots


@given(observations())
def test_decodes_are_never_displaced(seen: Observation) -> None:
    result = InferenceOnly().plan(seen)
    decodes = [view.key for view in seen.running if view.known - view.computed == 1]
    assert list(result.decodes) == [key for key in decodes if key not in result.preemptions]


@given(observations())
def test_the_same_observation_gives_the_same_plan(seen: Observation) -> None:
    assert InferenceOnly().plan(seen) == InferenceOnly().plan(seen._replace())


@given(observations())
def test_the_first_in_rank_always_moves_on(seen: Observation) -> None:
    result = InferenceOnly().plan(seen)
    if seen.running:
        moving = {*result.decodes, *(chunk.key for chunk in result.prefills)}
        assert seen.running[0].key not in result.preemptions
        assert moving


@given(observations())
def test_no_sequence_is_named_twice_and_chunks_end_at_the_prompts_end(seen: Observation) -> None:
    result = InferenceOnly().plan(seen)
    lags = {view.key: view.known - view.computed for view in seen.running}
    lags.update({view.key: view.known - view.cached for view in seen.waiting})
    chunks = [*(Chunk(key, 1) for key in result.decodes), *result.prefills, *result.admissions]
    named = [*result.preemptions, *(chunk.key for chunk in chunks)]
    assert len(named) == len(set(named))
    assert all(chunk.tokens <= lags[chunk.key] for chunk in chunks)


# -- no arrival pattern starves anyone -------------------------------------------------------------


class Simulation:
    """Sequences of known lengths under the policy, in virtual time; pages are exact."""

    def __init__(self, tokens: int, sequences: int, pages: int, slots: int) -> None:
        self.budgets = Budgets(tokens, sequences, 4)
        self.pages = pages
        self.slots = slots
        self.now_s = 0.0
        self.items: dict[int, dict[str, Any]] = {}

    def arrive(self, prompt: int, answer: int, priority: int, adapter: str | None) -> None:
        self.items[len(self.items)] = {
            "rank": rank_s(priority, self.now_s),
            "known": prompt,
            "computed": 0,
            "end": prompt + answer,
            "pages": 0,
            "adapter": adapter,
            "is_running": False,
            "waited": 0,
        }

    def iterate(self) -> None:
        order = sorted(self.items, key=lambda key: (self.items[key]["rank"], key))
        running, queue, adapters = [], [], set()
        for key in order:
            item = self.items[key]
            if item["computed"] >= item["end"]:
                continue
            if item["is_running"]:
                running.append(
                    RunningView(key, item["computed"], item["known"], item["pages"], item["pages"])
                )
                adapters.add(item["adapter"])
            else:
                queue.append(WaitingView(key, item["rank"], item["known"], 0, item["adapter"]))
                item["waited"] += 1
        adapters.discard(None)
        free = self.pages - sum(view.pages for view in running)
        result = InferenceOnly().plan(
            Observation(
                self.now_s,
                self.budgets,
                free,
                tuple(running),
                tuple(queue),
                frozenset(adapters),
                self.slots - len(adapters),
            )
        )
        for key in result.preemptions:
            self.items[key].update(computed=0, pages=0, is_running=False)
        for key in result.decodes:
            self.advance(key, 1)
        for chunk in (*result.prefills, *result.admissions):
            self.items[chunk.key]["is_running"] = True
            self.advance(chunk.key, chunk.tokens)
        assert sum(item["pages"] for item in self.items.values()) <= self.pages
        self.now_s += 1.0

    def advance(self, key: int, tokens: int) -> None:
        item = self.items[key]
        item["pages"] = -(-item["known"] // self.budgets.page_size)
        item["computed"] += tokens
        if item["computed"] == item["known"]:
            item["known"] += 1
        if item["computed"] >= item["end"]:
            item.update(pages=0, is_running=False)


@given(
    tokens=st.integers(2, 24),
    sequences=st.integers(1, 6),
    slots=st.integers(1, 2),
    rounds=st.lists(
        st.lists(
            st.tuples(
                st.integers(1, 30),
                st.integers(1, 12),
                st.sampled_from([0, 0, -1, 1]),
                st.sampled_from([None, None, "a", "b", "c"]),
            ),
            max_size=3,
        ),
        max_size=25,
    ),
)
@settings(max_examples=60, deadline=None)
def test_nobody_waits_for_ever(
    tokens: int, sequences: int, slots: int, rounds: list[list[tuple[int, int, int, str | None]]]
) -> None:
    simulation = Simulation(tokens, sequences, pages=11, slots=slots)  # one sequence just fits
    for arrivals in rounds:
        for arrival in arrivals:
            simulation.arrive(*arrival)
        simulation.iterate()
    work = sum(item["end"] for item in simulation.items.values())
    for _ in range(2 * work + 1):  # one token per iteration, and each prompt computed twice
        if all(item["computed"] >= item["end"] for item in simulation.items.values()):
            break
        simulation.iterate()
    assert all(item["computed"] >= item["end"] for item in simulation.items.values())


@pytest.mark.parametrize("flood", [{"priority": -1}, {"prompt": 1}, {"adapter": "a"}])
def test_an_ordinary_request_gets_through_an_endless_flood(flood: dict[str, Any]) -> None:
    simulation = Simulation(tokens=16, sequences=3, pages=24, slots=1)
    simulation.arrive(30, 4, 0, "b")
    arrival = {"prompt": 20, "answer": 6, "priority": 0, "adapter": None, **flood}
    for _ in range(400):
        simulation.arrive(**arrival)
        simulation.iterate()
        if simulation.items[0]["computed"] >= simulation.items[0]["end"]:
            return
    raise AssertionError("it still waits")


def test_a_plan_is_a_value() -> None:
    assert replace(IterationPlan(), decodes=(1,)) == IterationPlan(decodes=(1,))
    assert hash(IterationPlan()) == hash(IterationPlan())


def in_background(view: Any) -> Any:
    return view._replace(is_background=True)


def test_background_prompts_get_a_small_share_while_anybody_waits_for_an_answer() -> None:
    share = Budgets(1024, 8, SIZE).background_tokens
    running = [decoding(1, 20), in_background(prefilling(2, 0, 600))]
    found = plan(running, [in_background(waiting(3, 600))], tokens=1024)
    assert found.decodes == (1,)
    assert found.prefills == (Chunk(2, share),)
    assert found.admissions == ()


def test_the_share_holds_when_the_one_who_waits_is_in_the_queue() -> None:
    share = Budgets(1024, 8, SIZE).background_tokens
    found = plan([in_background(prefilling(2, 0, 600))], [waiting(3, 40)], tokens=1024)
    assert found.prefills == (Chunk(2, share),)
    assert found.admissions == (Chunk(3, 40),)


def test_background_prompts_take_the_whole_budget_when_nobody_waits() -> None:
    running = [in_background(prefilling(2, 0, 600))]
    found = plan(running, [in_background(waiting(3, 600))], tokens=1024)
    assert found.prefills == (Chunk(2, 600),)
    assert found.admissions == (Chunk(3, 424),)


def test_a_waiting_request_is_admitted_past_background_prompts_that_may_not_start() -> None:
    share = Budgets(1024, 8, SIZE).background_tokens
    queue = [in_background(waiting(1, 600)), in_background(waiting(2, 600)), waiting(3, 40)]
    found = plan([decoding(9, 20)], queue, tokens=1024)
    assert found.admissions == (Chunk(1, share), Chunk(3, 40))
