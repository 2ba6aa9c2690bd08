from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING

import pytest

from cotune.runtime.errors import ConfigError
from cotune.tools.traces import (
    Segment,
    TraceRequest,
    find_trace,
    make_trace,
    read_trace,
    synthetic,
    transform,
)

if TYPE_CHECKING:
    from pathlib import Path

AZURE = "arrival_s,input_tokens,output_tokens\n"
MOONCAKE = {"arrival_s": 0.0, "input_tokens": 700, "output_tokens": 5, "prefix_blocks": [3, 4]}


def write(tmp_path: Path, text: str, name: str = "trace") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# -- forms ----------------------------------------------------------------------------------------


def test_a_csv_is_read_and_begins_at_zero(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, AZURE + "2.0,10,3\n2.5,20,4\n"))
    assert trace.requests == (
        TraceRequest(arrival_s=0.0, prompt_tokens=10, output_tokens=3),
        TraceRequest(arrival_s=0.5, prompt_tokens=20, output_tokens=4),
    )
    assert trace.notes == ()
    assert trace.duration_s == 0.5


def test_the_csv_that_azure_publishes_is_read(tmp_path: Path) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,396,109\n"
    )
    trace = read_trace(write(tmp_path, text))
    assert [request.prompt_tokens for request in trace.requests] == [374, 396]
    assert trace.duration_s == pytest.approx(4.314579, abs=1e-6)


def test_blocks_become_segments_that_end_with_the_prompt(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, jsonl(MOONCAKE)))
    assert trace.requests[0].segments == (Segment(3, 512), Segment(4, 700))


def test_the_jsonl_that_mooncake_publishes_is_read_compressed(tmp_path: Path) -> None:
    row = {"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}
    path = tmp_path / "trace.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(row | {"timestamp": 0}, row).encode()))
    trace = read_trace(path)
    assert [request.arrival_s for request in trace.requests] == [0.0, 3.0]
    assert trace.requests[0].segments == trace.requests[1].segments


def test_each_turn_of_a_conversation_extends_the_one_before(tmp_path: Path) -> None:
    def say(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    talk = [
        say("system", "x" * 40), say("user", "hello"), say("assistant", "yes"),
        say("user", "more?"), say("assistant", "no"),
    ]  # fmt: skip
    other = [say("system", "x" * 40), say("user", "other"), say("assistant", "ok")]
    trace = read_trace(write(tmp_path, jsonl({"messages": talk}, {"messages": other})), seed=1)
    turns = [r for r in trace.requests if r.segments[1] == trace.requests[0].segments[1]]
    first, second = turns
    assert (first.prompt_tokens, first.output_tokens) == (14 + 6, 5)
    assert second.prompt_tokens == 14 + 6 + 5 + 6
    assert second.segments[:3] == first.segments
    assert second.arrival_s > first.arrival_s
    (third,) = (r for r in trace.requests if r not in turns)
    assert third.segments[0] == first.segments[0]
    assert third.segments[1] != first.segments[1]
    assert read_trace(write(tmp_path, jsonl({"messages": talk}, {"messages": other})), seed=1) == (
        trace
    )


# -- repairs and refusals -------------------------------------------------------------------------


def test_unsorted_arrivals_are_sorted_and_counted(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, AZURE + "0,1,1\n5,2,1\n3,3,1\n4,4,1\n2,5,1\n"))
    assert [request.prompt_tokens for request in trace.requests] == [1, 5, 3, 4, 2]
    assert trace.notes == (
        "trace: 2 of 5 requests came before the one above them; sorted by arrival",
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-1.0,10,3", r"line 3: arrival_s is '-1.0'; .* seconds, 0 or more"),
        ("nan,10,3", r"line 3: arrival_s is 'nan'"),
        ("inf,10,3", r"line 3: arrival_s is 'inf'"),
        ("soon,10,3", r"line 3: arrival_s is 'soon'"),
        ("1.0,0,3", r"line 3: input_tokens is '0'; .* tokens, 1 or more"),
        ("1.0,2.5,3", r"line 3: input_tokens is '2.5'; it must be a whole number"),
        ("1.0,10,-4", r"line 3: output_tokens is '-4'"),
        ("1.0,10", r"line 3: output_tokens is None"),
        ("2023-11-16 18:99:00,10,3", r"line 3: arrival_s is .* date and time"),
    ],
)
def test_values_that_cannot_be_meant_are_refused_with_line_and_field(
    tmp_path: Path, line: str, message: str
) -> None:
    path = write(tmp_path, f"{AZURE}0.0,5,5\n{line}\n")
    with pytest.raises(ConfigError, match=message):
        read_trace(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (MOONCAKE | {"arrival_s": -3}, "line 2: arrival_s is -3"),
        (MOONCAKE | {"arrival_s": True}, "line 2: arrival_s is True"),
        (MOONCAKE | {"prefix_blocks": "0"}, "line 2: prefix_blocks is '0'"),
        (MOONCAKE | {"prefix_blocks": [1.5]}, r"line 2: prefix_blocks is \[1.5\]"),
        ([1, 2], r"line 2: '\[1, 2\]' is not an object"),
    ],
)
def test_wrong_rows_of_a_jsonl_are_refused(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_trace(write(tmp_path, jsonl(MOONCAKE, row)))


def test_not_a_number_in_json_is_refused(tmp_path: Path) -> None:
    text = jsonl(MOONCAKE) + '{"arrival_s": NaN, "input_tokens": 1, "output_tokens": 1}\n'
    with pytest.raises(ConfigError, match="line 2: arrival_s is nan"):
        read_trace(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no trace"),
        ("a,b\n1,2\n", "is no trace: its first line is 'a,b'"),
        (AZURE, "holds no requests"),
        ('{"arrival_s": 1', "line 1: not JSON"),
        ('{"messages": []}', "line 1: messages"),
        ('{"messages": ["hello"]}', "line 1: messages is 'hello'; each must have \"role\""),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_trace(write(tmp_path, text))


def test_a_damaged_archive_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.gz"
    path.write_bytes(gzip.compress(b"arrival_s" * 100)[:30])
    with pytest.raises(ConfigError, match="damaged"):
        read_trace(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "nothing")


@pytest.mark.parametrize("wrong", [{"session_rate": 0.0}, {"think_s": -1.0}])
def test_paces_of_conversations_must_be_positive(tmp_path: Path, wrong: dict[str, float]) -> None:
    path = write(tmp_path, jsonl({"messages": [{"role": "user", "content": "x"}]}))
    with pytest.raises(ConfigError, match="use a number above 0"):
        read_trace(path, **wrong)  # type: ignore[arg-type]


# -- finding and changing -------------------------------------------------------------------------


def test_traces_have_short_names_within_a_folder(tmp_path: Path) -> None:
    path = write(tmp_path, AZURE, "trace_azure_conv.csv")
    assert find_trace("azure", tmp_path) == path
    assert find_trace("trace_azure_conv.csv", tmp_path) == path
    assert find_trace(str(path), None) == path
    with pytest.raises(ConfigError, match="say with --data which folder has it"):
        find_trace("azure", None)
    with pytest.raises(ConfigError, match="there is no file"):
        find_trace("mooncake", tmp_path)


def example() -> TraceRequest:
    return TraceRequest(
        arrival_s=8.0, prompt_tokens=1000, output_tokens=3, segments=(Segment(1, 512),)
    )


def test_scaling_keeps_who_shares_what_and_leaves_a_token() -> None:
    trace = make_trace("t", [TraceRequest(arrival_s=0.0, prompt_tokens=1, output_tokens=0)])
    first = transform(trace, scale_tokens=0.1).requests[0]
    assert (first.prompt_tokens, first.output_tokens) == (1, 0)
    trace = make_trace("t", [example()])
    scaled = transform(trace, scale_tokens=0.1).requests[0]
    assert (scaled.prompt_tokens, scaled.output_tokens) == (100, 1)
    assert scaled.segments == (Segment(1, 51),)
    assert transform(trace, sharing=False).requests[0].segments == ()


def test_a_trace_is_cut_after_it_was_sped_up() -> None:
    requests = [
        TraceRequest(arrival_s=float(t), prompt_tokens=1, output_tokens=1) for t in range(9)
    ]
    trace = transform(make_trace("t", requests), speed=2.0, limit_s=2.0)
    assert [request.arrival_s for request in trace.requests] == [0.0, 0.5, 1.0, 1.5]


@pytest.mark.parametrize("wrong", [{"scale_tokens": 0.0}, {"speed": -1.0}, {"limit_s": 0.0}])
def test_factors_must_be_positive(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="use a number"):
        transform(make_trace("t", [example()]), **wrong)  # type: ignore[arg-type]


def test_requests_made_up_are_the_same_for_the_same_seed() -> None:
    def make(seed: int) -> tuple[TraceRequest, ...]:
        return synthetic(
            requests=50, rate=2.0, prompt_tokens=100, output_tokens=20, shared_tokens=64, seed=seed
        ).requests

    assert make(1) == make(1) != make(2)
    assert {request.segments[0].end for request in make(1)} == {64}
    assert all(request.prompt_tokens > 64 for request in make(1))
    assert 10.0 < make(1)[-1].arrival_s < 50.0
