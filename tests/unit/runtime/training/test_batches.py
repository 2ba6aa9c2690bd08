from __future__ import annotations

import pytest

from cotune.runtime.training.batches import Group, Segment, pack


def test_a_pair_is_laid_out_with_its_prompt_once() -> None:
    packed = pack([Group(prompt_ids=(1, 2, 3), completions=((4, 5), (6,)))])
    assert packed.token_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 3]
    assert packed.segments == (Segment(0, 0, 0, 3), Segment(0, 3, 3, 5), Segment(0, 3, 5, 6))
    assert packed.tokens == 6
    assert packed.completions == 2


def test_the_last_row_of_the_prompt_predicts_the_first_token_of_every_completion() -> None:
    packed = pack([Group(prompt_ids=(1, 2, 3), completions=((4, 5), (6,)))])
    assert packed.rows.tolist() == [2, 3, 2]
    assert packed.targets.tolist() == [4, 5, 6]
    assert packed.completion_of.tolist() == [0, 0, 1]
    assert packed.counts.tolist() == [2, 1]


def test_groups_follow_one_another_and_completions_are_numbered_through() -> None:
    packed = pack(
        [
            Group(prompt_ids=(1,), completions=((2,),)),
            Group(prompt_ids=(3, 4), completions=((5,), (6, 7))),
        ]
    )
    assert packed.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert packed.positions.tolist() == [0, 1, 0, 1, 2, 2, 3]
    assert packed.segments[2:] == (Segment(2, 2, 2, 4), Segment(2, 4, 4, 5), Segment(2, 4, 5, 7))
    assert packed.rows.tolist() == [0, 3, 3, 5]
    assert packed.targets.tolist() == [2, 5, 6, 7]
    assert packed.completion_of.tolist() == [0, 1, 2, 2]


def test_a_group_counts_its_prompt_once() -> None:
    assert Group(prompt_ids=(1, 2), completions=((3,), (4, 5, 6))).tokens == 6


def test_segments_know_how_many_rows_their_last_one_attends() -> None:
    assert Segment(0, 0, 0, 3).keys == 3
    assert Segment(0, 3, 7, 9).keys == 5


@pytest.mark.parametrize(("prompt", "completions"), [((), ((1,),)), ((1,), ()), ((1,), ((2,), ()))])
def test_empty_parts_are_refused(
    prompt: tuple[int, ...], completions: tuple[tuple[int, ...], ...]
) -> None:
    with pytest.raises(ValueError, match="empty"):
        Group(prompt_ids=prompt, completions=completions)


def test_a_batch_without_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        pack([])
