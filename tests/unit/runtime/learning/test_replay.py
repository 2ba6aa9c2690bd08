"""What the next batch holds."""

from __future__ import annotations

import json
from collections import Counter

from cotune.runtime.learning.config import TrainingConfig
from cotune.runtime.learning.replay import ReplayBuffer
from cotune.runtime.learning.samples import PreferencePair


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


def buffer(samples: list[PreferencePair], **settings: object) -> ReplayBuffer:
    made = ReplayBuffer(TrainingConfig(**settings))  # type: ignore[arg-type]
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
