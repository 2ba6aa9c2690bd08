"""The room of an iteration: memory, and who gives way in which order."""

from __future__ import annotations

from cotune.policy import (
    Budgets,
    MemoryView,
    Observation,
    RunningQuantum,
    RunningView,
    TrainingOffer,
    TrainingPlan,
    TrainingView,
    WaitingView,
)
from cotune.policy.packing import ALONE_TOKENS, MEMORY_AGAIN_S, Room, pack_in_order

SIZE = 4


def decoding(key: int, known: int, *, pages: int | None = None) -> RunningView:
    count = -(-known // SIZE) if pages is None else pages
    return RunningView(key, known - 1, known, count, count)


def seen(
    *,
    running: tuple[RunningView, ...] = (),
    waiting: tuple[WaitingView, ...] = (),
    available: int = 100,
    memory: MemoryView | None = None,
    training: TrainingView | None = None,
) -> Observation:
    budgets = Budgets(64, 8, SIZE)
    return Observation(0.0, budgets, available, running, waiting, training=training, memory=memory)


def waiting(key: int, known: int) -> WaitingView:
    return WaitingView(key, float(key), known, 0, None)


def offer(kind: str = "forward", tokens: int = 100) -> TrainingOffer:
    base = TrainingOffer(0, "forward", tokens, 4, 0.0, 0.7, 0.5, is_begun=False)
    return base._replace(kind=kind)  # type: ignore[arg-type]  # any kind


def test_pages_that_were_never_used_take_memory_and_others_do_not() -> None:
    queue = (waiting(1, 8), waiting(2, 8))
    paid = MemoryView(0, 1000, 50, unused_pages=96, returned_pages=4)
    assert len(pack_in_order(seen(waiting=queue, memory=paid)).plan().admissions) == 2
    short = paid._replace(unused_pages=98, returned_pages=2)
    assert len(pack_in_order(seen(waiting=queue, memory=short)).plan().admissions) == 1
    bought = short._replace(threshold=100)
    assert len(pack_in_order(seen(waiting=queue, memory=bought)).plan().admissions) == 2


def test_pages_of_kept_prefixes_are_no_substitute_for_those_that_take_memory() -> None:
    """They are evicted last, so what seems to be free of charge there is taken from new pages."""
    memory = MemoryView(100, 1000, 50, unused_pages=3, training_token=10.0)  # and 97 are cached
    room = pack_in_order(seen(waiting=(waiting(1, 8),), memory=memory))  # two pages
    assert room.training_bytes == 0.0
    room = pack_in_order(seen(waiting=(waiting(1, 40),), memory=memory._replace(threshold=170)))
    assert room.training_bytes == 20.0  # ten pages, of which three are new


def test_what_is_on_the_lane_still_takes_its_memory() -> None:
    memory = MemoryView(1000, 10_000, 0, 0, training_token=1.0, prefill_token=10.0)
    quantum = RunningQuantum(0, "forward", 900, 0.0, is_held=False)
    state = seen(waiting=(waiting(1, 40),), memory=memory)
    assert pack_in_order(state).plan().tokens == 40
    busy = state._replace(training=TrainingView((), quantum))
    assert pack_in_order(busy).plan().tokens == 10
    ending = state._replace(training=TrainingView((), quantum._replace(kind="backward")))
    assert pack_in_order(ending).plan().tokens == 40


def test_running_sequences_give_way_when_their_growth_is_not_paid_for() -> None:
    running = tuple(decoding(key, SIZE + 1, pages=1) for key in (1, 2, 3))
    memory = MemoryView(120, 1000, 50, unused_pages=100)
    plan = Room(seen(running=running, memory=memory)).plan()
    assert plan.preemptions == (3,)
    assert plan.decodes == (1, 2)
    nothing = memory._replace(threshold=-5)
    plan = Room(seen(running=running, memory=nothing)).plan()
    assert plan.preemptions == (3, 2)  # the page of each pays for one of the first
    assert plan.decodes == (1,)


def test_a_prompt_is_cut_to_the_memory_its_tokens_take() -> None:
    memory = MemoryView(100, 1000, 0, 0, prefill_token=10.0)
    state = seen(running=(decoding(1, 3),), waiting=(waiting(2, 30),), memory=memory)
    plan = pack_in_order(state).plan()
    assert plan.decodes == (1,)
    assert plan.tokens == 10


def test_pages_and_tokens_of_one_prompt_share_the_memory() -> None:
    memory = MemoryView(230, 1000, 50, 100, prefill_token=10.0)
    state = seen(running=(decoding(1, 3),), waiting=(waiting(2, 16),), memory=memory)
    room = pack_in_order(state)
    assert room.plan().admissions[0].tokens == 2  # 10 for the decode, 200 for 4 pages, 20 left
    assert room.training_bytes == 0.0


def test_a_sequence_that_is_alone_starts_without_memory_once_the_lane_is_free() -> None:
    memory = MemoryView(0, 1000, 50, 100, prefill_token=10.0)
    state = seen(waiting=(waiting(1, 40), waiting(2, 4)), memory=memory)
    plan = pack_in_order(state).plan()
    assert [tuple(chunk) for chunk in plan.admissions] == [(1, ALONE_TOKENS)]
    quantum = RunningQuantum(0, "forward", 64, 0.0, is_held=False)
    busy = state._replace(training=TrainingView((), quantum))
    assert pack_in_order(busy).plan().tokens == 0  # what training holds comes back


def test_training_gets_what_serving_leaves() -> None:
    memory = MemoryView(1000, 10_000, 0, 0, training_token=10.0, prefill_token=10.0)
    state = seen(waiting=(waiting(1, 40),), memory=memory)
    room = pack_in_order(state)
    assert room.start_quantum([offer()]) == TrainingPlan(start=0, max_tokens=60)
    assert room.free_bytes == 0.0


def test_a_quantum_is_never_cut_below_a_sample() -> None:
    memory = MemoryView(240, 10_000, 0, 0, training_token=10.0)
    room = Room(seen(memory=memory))
    assert room.start_quantum([offer()]) == TrainingPlan(again_s=MEMORY_AGAIN_S)
    room = Room(seen(memory=memory._replace(threshold=250)))
    assert room.start_quantum([offer()], most_rows=3) == TrainingPlan(start=0, max_tokens=25)


def test_a_backward_and_a_step_run_without_memory_since_they_give_it_back() -> None:
    memory = MemoryView(-1, 10_000, 0, 0, training_token=10.0)
    for kind, tokens in (("backward", 100), ("step", 0)):
        room = Room(seen(memory=memory))
        assert room.start_quantum([offer(kind, tokens)], most_rows=1) == TrainingPlan(start=0)


def test_another_learner_goes_when_the_first_does_not_fit() -> None:
    memory = MemoryView(300, 10_000, 0, 0, training_token=10.0)
    large = offer(tokens=400)._replace(samples=1)
    small = offer(tokens=20)._replace(key=1, samples=1)
    assert Room(seen(memory=memory)).start_quantum([large, small]) == TrainingPlan(start=1)
