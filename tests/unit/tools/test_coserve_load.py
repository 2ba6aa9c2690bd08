"""The load of a co-serving run is what it says, and the same whenever it is made."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import statistics
from typing import TYPE_CHECKING, Any

import pytest

from cotune.runtime.errors import ConfigError
from cotune.tools.coserve_load import (
    Lengths,
    Pair,
    TextPool,
    choose_feedback,
    feedback_times,
    made_up_lengths,
    made_up_pairs,
    made_up_texts,
    make_inflow,
    make_requests,
    poisson_times,
    read_lengths,
    read_pairs,
    read_texts,
    scale,
    visits_per_request,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cotune.runtime.types import Message

POOL = TextPool(heads=((1,) * 100, (2,) * 10), body=tuple(range(1000, 3000)))


def characters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for row in rows:
            file.write((row if isinstance(row, str) else json.dumps(row)) + "\n")
    return path


# -- lengths -------------------------------------------------------------------------------------


def test_the_lengths_of_a_trace_are_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n0.0,374,44\n4.3,396,109\n")
    assert read_lengths(path) == (Lengths(374, 44), Lengths(396, 109))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("0,374,44\n1,many,3\n", "line 3"),
        ("0,0,44\n", "line 2: a length is below 1"),
        ("", "has no rows"),
    ],
)
def test_a_trace_with_a_wrong_length_is_refused_with_its_line(
    rows: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n" + rows)
    with pytest.raises(ConfigError, match=words):
        read_lengths(path)


def test_a_trace_that_is_not_there_is_refused_with_the_flag(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="check --data"):
        read_lengths(tmp_path / "nothing.csv")


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        (Lengths(1000, 100), Lengths(250, 25)),
        (Lengths(9, 1), Lengths(8, 4)),  # the least there is
        (Lengths(14050, 1000), Lengths(1798, 250)),  # prompt and answer fill the context
        (Lengths(400, 9000), Lengths(100, 512)),  # an answer takes a quarter of it at most
    ],
)
def test_lengths_are_scaled_and_fit_into_the_context(lengths: Lengths, expected: Lengths) -> None:
    assert scale(lengths, 0.25, 2048) == expected


def test_made_up_lengths_have_the_median_of_the_trace() -> None:
    lengths = made_up_lengths(20_000, seed=0)
    assert statistics.median(each.prompt for each in lengths) == pytest.approx(1014, rel=0.05)
    assert statistics.median(each.answer for each in lengths) == pytest.approx(115, rel=0.05)
    above = sum(each.prompt > 4085 for each in lengths) / len(lengths)
    assert above == pytest.approx(0.05, abs=0.01)


# -- texts ---------------------------------------------------------------------------------------


def test_a_prompt_is_a_common_beginning_and_a_passage_of_its_own() -> None:
    draw = random.Random(0)
    prompts = [POOL.prompt(draw, 50, 0.4) for _ in range(20)]
    for prompt in prompts:
        assert len(prompt) == 50
        head = prompt.count(prompt[0])
        assert head == (20 if prompt[0] == 1 else 10)  # the second beginning is only so long
        rest = prompt[head:]
        assert rest == tuple(range(rest[0], rest[0] + len(rest)))
        assert rest[0] >= 1000
    assert len(set(prompts)) > 15


def test_a_prompt_with_nothing_in_common_is_a_passage_alone() -> None:
    prompt = POOL.prompt(random.Random(0), 50, 0.0)
    assert prompt == tuple(range(prompt[0], prompt[0] + 50))


def test_system_messages_are_beginnings_as_often_as_sessions_have_them(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}]
    sessions = [
        {"messages": [{"role": "system", "content": text}, *turns]} for text in ("aa", "bb", "aa")
    ]
    pool = read_texts(write_lines(tmp_path / "s.gz", sessions), characters, seed=0)
    assert sorted(pool.heads) == [(97, 97), (97, 97), (98, 98)]
    assert pool.body == tuple(characters("user: hi\n" * 3))


def test_no_more_is_read_of_sessions_than_is_wanted(tmp_path: Path) -> None:
    session = {
        "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b" * 50}]
    }
    path = write_lines(tmp_path / "s.gz", [session] * 100)
    assert len(read_texts(path, characters, seed=0, tokens=100).body) == 2 * len(
        f"user: {'b' * 50}\n"
    )


def test_sessions_without_a_system_message_are_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "s.gz", [{"messages": [{"role": "user", "content": "a"}]}])
    with pytest.raises(ConfigError, match="no session with a system message"):
        read_texts(path, characters, seed=0)


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}
    with pytest.raises(ConfigError, match="line 2 is not JSON"):
        read_pairs(write_lines(tmp_path / "p.gz", [row, "{"]))


@pytest.mark.parametrize("rejected", ["", None, 3, ["a text"]])
def test_a_preference_without_an_answer_is_named(tmp_path: Path, rejected: object) -> None:
    row = {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": rejected}
    with pytest.raises(ConfigError, match="line 1 has no 'rejected'"):
        read_pairs(write_lines(tmp_path / "p.gz", [row]))


# -- requests ------------------------------------------------------------------------------------


def test_arrivals_are_a_poisson_process_and_the_same_for_the_same_seed() -> None:
    times = poisson_times(20.0, 500.0, "0 1")
    assert times == poisson_times(20.0, 500.0, "0 1")
    assert times != poisson_times(20.0, 500.0, "0 2")
    assert times == sorted(times)
    assert times[0] > 0.0
    assert times[-1] < 500.0
    # 10,000 are expected, with a standard deviation of 100; gaps have mean = deviation.
    assert len(times) == pytest.approx(10_000, abs=400)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert statistics.stdev(gaps) == pytest.approx(statistics.fmean(gaps), rel=0.05)


def test_requests_take_consecutive_lengths_and_go_round_the_trace() -> None:
    lengths = [Lengths(100 + number, 40) for number in range(5)]
    requests = make_requests(
        [0.5 * number for number in range(7)],
        lengths,
        POOL,
        factor=1.0,
        context=2048,
        shared=0.0,
        seed=3,
    )
    assert [request.at_s for request in requests] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    sizes = [len(request.prompt) - 100 for request in requests]
    assert sizes == [(sizes[0] + number) % 5 for number in range(7)]
    assert {request.answer_tokens for request in requests} == {40}
    again = make_requests(
        [request.at_s for request in requests],
        lengths,
        POOL,
        factor=1.0,
        context=2048,
        shared=0.0,
        seed=3,
    )
    assert again == requests


def test_an_inflow_comes_at_once_with_nothing_in_common() -> None:
    texts = made_up_texts(4096, seed=0, tokens=20_000)
    inflow = make_inflow(4.0, 8, 1500, texts, seed=0)
    assert {(request.at_s, len(request.prompt)) for request in inflow} == {(4.0, 1500)}
    assert len({request.prompt[:16] for request in inflow}) == 8
    assert all(request.is_extra for request in inflow)


# -- feedback ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "visits"), [(0.0, 0.0), (0.1, 1 / 9), (0.5, 1.0), (0.75, 3.0)])
def test_the_retrain_rate_is_the_share_of_tasks_that_train(rate: float, visits: float) -> None:
    assert visits_per_request(rate) == pytest.approx(visits)
    assert visits / (1 + visits) == pytest.approx(rate)


def test_bursts_are_evenly_spaced_and_one_opens_the_window() -> None:
    # 96 requests at 50 % are 96 visits: 6 bursts of 16 in 12 s, and one more in the 3 s before.
    times = feedback_times(0.5, 96, warmup_s=3.0, seconds=12.0, visits=16)
    assert times == [1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0]


def test_there_is_at_least_one_burst_and_none_without_training() -> None:
    assert feedback_times(0.1, 9, warmup_s=2.0, seconds=12.0, visits=16) == [2.0]
    assert feedback_times(0.0, 96, warmup_s=2.0, seconds=12.0, visits=16) == []


def encode_prompt(messages: Sequence[Message]) -> list[int]:
    return characters(str(messages[0]["content"]))


def row(prompt: str, chosen: str = "yes", rejected: str = "no") -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": chosen,
        "rejected": rejected,
    }


def choose(rows: Sequence[dict[str, Any]], pairs: int, primers: int) -> tuple[list[str], list[str]]:
    """The prompts that are chosen, of both kinds. Held out are those that begin with h."""
    feedback = choose_feedback(
        rows,
        encode_prompt=encode_prompt,
        encode=characters,
        is_held_out=lambda prompt: prompt[0] == ord("h"),
        most_tokens=20,
        pairs=pairs,
        primers=primers,
        seed=0,
    )

    def prompts(kind: tuple[Pair, ...]) -> list[str]:
        return sorted(str(pair.prompt[0]["content"]) for pair in kind)

    return prompts(feedback.pairs), prompts(feedback.primers)


def test_pairs_are_short_distinct_and_on_their_side_of_the_gate() -> None:
    rows = [
        row("a"),
        row("a"),
        row("b", rejected="yes"),
        row("c" * 14),
        row("d" * 13),  # 13 + 4 + 3 = 20 tokens: it just fits
        row("h"),
        row("h2"),
    ]
    assert choose(rows, pairs=2, primers=2) == (["a", "d" * 13], ["h", "h2"])


def test_too_few_pairs_are_refused_with_numbers_and_remedy() -> None:
    with pytest.raises(ConfigError, match=r"there are 1 pairs .* needs 2 and 0; lower --seconds"):
        choose([row("a")], pairs=2, primers=0)


def test_a_pair_counts_the_rows_of_a_forward_over_it() -> None:
    feedback = choose_feedback(
        [row("abc")],
        encode_prompt=encode_prompt,
        encode=characters,
        is_held_out=lambda prompt: False,
        most_tokens=20,
        pairs=1,
        primers=0,
        seed=0,
    )
    assert feedback.pairs[0].tokens == 3 + 4 + 3


def test_an_event_is_of_the_form_that_feedback_takes() -> None:
    pair = Pair(({"role": "user", "content": "a"},), "yes", "no", 5)
    assert pair.event("e1", "tenant") == {
        "id": "e1",
        "type": "preference",
        "prompt": [{"role": "user", "content": "a"}],
        "chosen": "yes",
        "rejected": "no",
        "model": "tenant",
    }
    assert "model" not in pair.event("e1")
    wrong = pair.turned_round()
    assert (wrong.chosen, wrong.rejected, wrong.turned_round()) == ("no", "yes", pair)


def test_made_up_pairs_are_enough_for_a_run() -> None:
    rows = made_up_pairs(300, seed=0)
    assert rows == made_up_pairs(300, seed=0)
    assert all(each["chosen"] != each["rejected"] for each in rows)
    assert len({str(each["prompt"]) for each in rows}) == 300
