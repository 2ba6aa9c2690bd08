"""What the next batch holds."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from cotune.runtime.learning.config import TrainingConfig
from cotune.runtime.learning.replay import ReplayBuffer, within_share
from cotune.runtime.learning.samples import PreferencePair, RatedCompletion, Sample

if TYPE_CHECKING:
    from collections.abc import Sequence


def pair(key: int, source: str = "a") -> PreferencePair:
    return PreferencePair(
        key=key,
        adapter="m",
        source=source,
        prompt_ids=(1,),
        chosen_ids=(2,),
        rejected_ids=(3,),
        ref_chosen_logp=-1.0,
        ref_rejected_logp=-1.0,
    )


def buffer(
    samples: Sequence[Sample], *, is_shared: bool = False, **settings: object
) -> ReplayBuffer:
    made = ReplayBuffer(TrainingConfig(**settings), is_shared=is_shared)  # type: ignore[arg-type]
    made.update(samples)
    return made


def test_every_new_sample_is_trained_on_as_often_as_configured_and_then_no_batch_is_left() -> None:
    replay = buffer([pair(key) for key in range(1, 11)], batch_size=4, epochs=3, replay_share=0.0)
    seen: Counter[int] = Counter()
    while batch := replay.next_batch():
        seen.update(sample.key for sample in batch)
    assert all(seen[key] >= 3 for key in range(1, 11))
    assert replay.owed_samples == 0
    assert replay.next_batch() == []


def test_no_sample_has_its_second_turn_before_all_have_had_their_first() -> None:
    replay = buffer([pair(key) for key in range(1, 9)], batch_size=4, epochs=2, replay_share=0.0)
    first = [sample.key for _ in range(2) for sample in replay.next_batch()]
    assert sorted(first) == list(range(1, 9))


def test_a_batch_holds_the_configured_share_of_earlier_feedback() -> None:
    replay = buffer([pair(key) for key in range(1, 9)], batch_size=8, epochs=1, replay_share=0.25)
    replay.next_batch()
    replay.update([pair(key) for key in range(1, 17)])
    keys = [sample.key for sample in replay.next_batch()]
    assert sum(key <= 8 for key in keys) == 2
    assert sum(key > 8 for key in keys) == 6


def test_newer_feedback_is_replayed_more_often_than_older() -> None:
    old = [pair(key) for key in range(1, 81)]
    replay = buffer(
        old, batch_size=80, epochs=1, replay_share=0.0, replay_half_life=20, max_source_share=1.0
    )
    replay.next_batch()
    drawn: Counter[bool] = Counter()
    for key in range(81, 181):
        replay = buffer(
            [*old, pair(key)],
            batch_size=8,
            epochs=1,
            replay_share=0.9,
            replay_half_life=20,
            seed=key,
        )
        replay.restore({**replay.state(), "visits": {str(known): 1 for known in range(1, 81)}})
        drawn.update(sample.key > 40 for sample in replay.next_batch() if sample.key <= 80)
    # The newer 40 of 80 have 2 half-lives: 4/5 of the weight. Chance would draw one half of them.
    assert 0.7 < drawn[True] / drawn.total() < 0.9


def test_a_flooding_source_gets_no_more_than_its_share_while_others_have_samples() -> None:
    samples = [pair(key, "flood") for key in range(1, 101)]
    samples += [pair(key, "quiet") for key in range(101, 105)]
    replay = buffer(samples, batch_size=8, epochs=1, replay_share=0.0, max_source_share=0.5)
    sources = Counter(sample.source for sample in replay.next_batch())
    assert sources == {"flood": 4, "quiet": 4}


def test_a_source_that_is_alone_fills_the_batch() -> None:
    replay = buffer([pair(key) for key in range(1, 9)], batch_size=8, max_source_share=0.5)
    assert len(replay.next_batch()) == 8


def test_samples_that_are_gone_are_never_drawn_again() -> None:
    replay = buffer([pair(1), pair(2)], batch_size=1, epochs=5)
    replay.update([pair(2)])
    assert {sample.key for _ in range(5) for sample in replay.next_batch()} == {2}
    assert replay.next_batch() == []


def test_a_restored_buffer_goes_on_exactly_where_it_was() -> None:
    samples = [pair(key) for key in range(1, 40)]
    replay = buffer(samples, batch_size=4, epochs=2)
    for _ in range(5):
        replay.next_batch()
    state = json.loads(json.dumps(replay.state()))
    expected = [replay.next_batch() for _ in range(10)]
    restored = buffer(samples, batch_size=4, epochs=2)
    restored.restore(state)
    assert [restored.next_batch() for _ in range(10)] == expected


# --- what training on a sample has done so far ----------------------------------------------------

LN_2 = math.log(2.0)


def test_new_samples_of_a_batch_are_those_of_prompts_that_were_never_trained_on() -> None:
    def about(key: int, prompt: int) -> PreferencePair:
        return dataclasses.replace(pair(key), prompt_ids=(prompt, 7))

    earlier, later = [about(1, 1), about(2, 2)], [about(3, 3), about(4, 1), about(5, 3)]
    replay = buffer(earlier, batch_size=3, epochs=2, replay_share=0.0)
    assert replay.last_new == frozenset()
    untrained = replay.state()
    replay.next_batch()
    assert replay.last_new == {1, 2}
    replay.next_batch()
    assert replay.last_new == frozenset(), "their second turn"
    replay.update([*earlier, *later])
    assert {sample.key for sample in replay.next_batch()} == {3, 4, 5}
    assert replay.last_new == {3, 5}, "4 has the prompt of 1"
    replay.restore(untrained)  # as after a refusal
    new: set[int] = set()
    for _ in range(2):
        replay.next_batch()
        assert not new & replay.last_new
        new |= replay.last_new
    assert {2} < new


def rated(key: int) -> RatedCompletion:
    return RatedCompletion(
        key=key,
        adapter="m",
        source="a",
        prompt_ids=(1,),
        completion_ids=(2,),
        is_desirable=True,
        ref_logp=-1.0,
    )


def trained_once(priority: str, losses: dict[int, tuple[float, ...]]) -> ReplayBuffer:
    """One visit of each sample, after which these losses were seen of it, in turn."""
    replay = buffer(
        [pair(key) for key in losses],
        batch_size=len(losses),
        epochs=3,
        replay_share=0.0,
        max_source_share=1.0,
        sample_priority=priority,
    )
    replay.next_batch()
    for key, seen in losses.items():
        replay.note_losses((key, loss) for loss in seen)
    return replay


LEARNED, NOISE, FALLING = (LN_2, 0.01), (2.0, 2.0, 2.0, 2.0), (1.5, 1.0, 0.7)


def small_batches(replay: ReplayBuffer, size: int) -> list[int]:
    """Keys in the order in which batches of `size` would hold them."""
    other = ReplayBuffer(dataclasses.replace(replay._config, batch_size=size))
    other.update(list(replay._samples.values()))
    other.restore(replay.state())
    return [sample.key for _ in range(3) for sample in other.next_batch()]


def test_samples_from_which_most_is_to_be_learned_go_first() -> None:
    replay = trained_once("learnability", {1: LEARNED, 2: NOISE, 3: FALLING})
    assert small_batches(replay, 1)[0] == 3


def test_by_loss_noise_goes_before_what_is_learned() -> None:
    replay = trained_once("loss", {1: LEARNED, 2: NOISE})
    assert small_batches(replay, 1)[0] == 2


def test_a_sample_that_sinks_still_has_all_its_turns() -> None:
    for priority in ("learnability", "loss"):
        replay = trained_once(priority, {1: LEARNED, 2: NOISE, 3: FALLING})
        turns: Counter[int] = Counter()
        while batch := replay.next_batch():
            turns.update(sample.key for sample in batch)
            replay.note_losses((s.key, 0.01 if s.key == 1 else 2.0) for s in batch)
        assert turns == {1: 2, 2: 2, 3: 2}


def test_new_feedback_goes_before_any_that_was_trained_on() -> None:
    replay = trained_once("learnability", {1: FALLING, 2: FALLING})
    replay.update([pair(key) for key in (1, 2, 3)])
    assert small_batches(replay, 1)[0] == 3


def test_without_a_priority_losses_change_no_batch() -> None:
    told, untold = (buffer([pair(k) for k in range(40)], batch_size=4) for _ in range(2))
    for _ in range(30):
        batch = told.next_batch()
        assert batch == untold.next_batch()
        told.note_losses((sample.key, float(sample.key)) for sample in batch)


def test_the_outlook_is_of_the_next_batch_and_asking_changes_nothing() -> None:
    asked, unasked = (buffer([pair(k) for k in range(1, 20)], batch_size=4) for _ in range(2))
    for step in range(30):
        before = asked.state()
        outlook = asked.outlook()
        assert asked.outlook() == outlook
        assert asked.state() == before
        losses = {k: seen.left * LN_2 for k, seen in asked._histories.items()}
        batch = asked.next_batch()
        assert batch == unasked.next_batch()
        assert outlook.loss == pytest.approx(
            sum(losses.get(s.key, LN_2) for s in batch) / len(batch)
        )
        assert 0.0 <= outlook.signal <= 1.0
        seen = [(sample.key, 0.6 / (step + 1)) for sample in batch]
        asked.note_losses(seen)
        unasked.note_losses(seen)


def test_the_outlook_follows_samples_and_losses_that_come_between() -> None:
    replay = buffer([pair(1)], batch_size=1, epochs=2)
    assert replay.outlook() == pytest.approx((LN_2, 1.0))
    replay.next_batch()
    replay.note_losses([(1, 0.1 * LN_2)])
    assert replay.outlook() == pytest.approx((0.1 * LN_2, 0.1))
    replay.update([])
    assert replay.outlook() == (0.0, 0.0)
    assert replay.next_batch() == []


@pytest.mark.parametrize(("loss", "expected"), [("sigmoid", LN_2), ("ipo", 1.0)])
def test_the_outlook_of_what_was_never_trained_on_is_the_loss_without_training(
    loss: str, expected: float
) -> None:
    assert buffer([pair(1)], loss=loss, beta=0.5).outlook() == pytest.approx((expected, 1.0))
    assert buffer([rated(1)], loss=loss, beta=0.5).outlook() == pytest.approx((0.5, 1.0))


def test_losses_of_samples_that_are_gone_are_forgotten() -> None:
    replay = buffer([pair(1), pair(2)], batch_size=2)
    replay.note_losses([(1, 0.1), (7, 0.1)])
    replay.update([pair(2)])
    assert replay.state()["histories"] == {}


def test_a_state_carries_what_was_learned_of_the_samples() -> None:
    replay = trained_once("learnability", {1: LEARNED, 2: NOISE, 3: FALLING})
    restored = buffer(
        [pair(key) for key in (1, 2, 3)],
        batch_size=3,
        epochs=3,
        replay_share=0.0,
        max_source_share=1.0,
        sample_priority="learnability",
    )
    restored.restore(json.loads(json.dumps(replay.state())))
    assert restored.outlook() == replay.outlook()
    assert small_batches(restored, 1) == small_batches(replay, 1)


def test_a_state_of_before_there_were_histories_is_taken_up() -> None:
    replay = trained_once("learnability", {1: LEARNED, 2: FALLING})
    state = replay.state()
    del state["histories"]
    replay.restore(state)
    assert replay.outlook().signal == 1.0
    assert replay.state()["visits"] == {"1": 1, "2": 1}


# -- shares of all that is trained on --------------------------------------------------------------


def test_what_a_flood_says_before_anybody_else_waits_until_others_have_said_as_much() -> None:
    flood = [pair(key, "flood") for key in range(1, 41)]
    replay = buffer(flood, is_shared=True, batch_size=4, epochs=1)
    assert len(replay) == replay.owed_samples == 0
    assert replay.next_batch() == []
    assert replay.outlook().loss == 0.0

    others = [pair(key, f"user {key % 3}") for key in range(41, 51)]
    replay.update(flood + others)
    assert replay.owed_samples == 20
    assert [sample.key for sample in flood if sample.key in replay] == list(range(1, 11))
    while replay.next_batch():
        pass
    replay.update(flood + others + [pair(key, "user 1") for key in range(51, 56)])
    assert replay.owed_samples == 10
    assert [sample.key for sample in flood if sample.key in replay] == list(range(1, 16))


def test_sources_that_say_about_as_much_are_all_heard() -> None:
    samples = [pair(key, f"user {key % 3}") for key in range(1, 31)]
    assert within_share(samples, 0.5) == samples
    two = [pair(key, f"user {key % 2}") for key in range(1, 21)]
    assert within_share(two, 0.5) == two
    assert len(within_share(two, 0.25)) == 6  # a third of what the other has, each
    assert within_share(two, 1.0) == two


def test_where_one_source_is_enough_it_is_trained_on_alone() -> None:
    assert buffer([pair(key, "user") for key in range(1, 9)]).owed_samples == 8
