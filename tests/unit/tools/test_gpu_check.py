"""The check of a card, dry: every section runs on the CPU, and a failed one spares the others."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cotune.tools import gpu_check
from cotune.tools.gpu_check_case import Check
from cotune.tools.gpu_check_sections import SECTION_FUNCTIONS
from cotune.tools.kernel_overlap import intersect, merge, overlap_of, total

if TYPE_CHECKING:
    from pathlib import Path


def a_check(tmp_path: Path) -> Check:
    return Check(torch.device("cpu"), "small", "float32", True, tmp_path, tmp_path)


def test_a_section_that_fails_is_reported_and_the_others_run(tmp_path: Path) -> None:
    seen: list[list[str]] = []
    output = tmp_path / "found.json"

    def broken(check: Check) -> dict[str, Any]:
        raise RuntimeError("no such kernel")

    def fine(check: Check) -> dict[str, Any]:
        seen.append(list(json.loads(output.read_text())["sections"]))
        return {"tokens": 3}

    def wrong(check: Check) -> dict[str, Any]:
        return {"worst_gap": 9.0, "ok": False}

    sections = {"broken": broken, "fine": fine, "wrong": wrong}
    result = gpu_check.perform(a_check(tmp_path), sections, output, limit_s=60.0)
    assert {name: entry["ok"] for name, entry in result["sections"].items()} == {
        "broken": False,
        "fine": True,
        "wrong": False,
    }
    assert result["sections"]["broken"]["error"] == "RuntimeError: no such kernel"
    assert "in broken" in result["sections"]["broken"]["traceback"]
    assert seen == [["broken"]]  # written after each section
    assert json.loads(output.read_text()) == result


def test_no_section_begins_after_the_limit(tmp_path: Path) -> None:
    now_s = 0.0

    def slow(check: Check) -> dict[str, Any]:
        nonlocal now_s
        now_s += 50.0
        return {}

    sections = {"first": slow, "second": slow, "third": slow}
    found = gpu_check.perform(
        a_check(tmp_path), sections, tmp_path / "f.json", limit_s=90.0, clock=lambda: now_s
    )["sections"]
    assert [found[name]["ok"] for name in sections] == [True, True, None]
    assert found["second"]["seconds"] == 50.0
    assert found["third"]["skipped"] == "90 s were used up"


def test_every_section_of_the_command_has_a_function() -> None:
    assert tuple(SECTION_FUNCTIONS) == gpu_check.SECTIONS


@pytest.mark.slow
def test_all_sections_run_dry_on_the_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _dry_run(tmp_path, capsys, gpu_check.SECTIONS)


def test_decode_and_training_run_dry_on_the_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _dry_run(tmp_path, capsys, ("attention", "graphs", "overlap", "exhaustion"))
    graphs = found["graphs"]
    assert graphs["recorded"]["replays"] > 0
    assert graphs["same_answers"].split()[0] == graphs["same_answers"].split()[2]
    trace = found["overlap"]["trace"]
    assert trace["overlap"]["both_us"] > 0
    with gzip.open(tmp_path / "out" / trace["file"], "rt", encoding="utf-8") as file:
        assert len(json.load(file)["traceEvents"]) == trace["events"]
    assert found["exhaustion"]["injected"] == found["exhaustion"]["halvings"] == 2


def _dry_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sections: tuple[str, ...]
) -> dict[str, Any]:
    threads = torch.get_num_threads()
    output = tmp_path / "out" / "check.json"
    try:
        code = gpu_check.main(
            ["--device", "cpu", "--quick", "--output", str(output), "--sections", *sections]
        )
    finally:
        torch.set_num_threads(threads)
    written = json.loads(output.read_text(encoding="utf-8"))
    found: dict[str, Any] = written["sections"]
    failed = {name: entry for name, entry in found.items() if not entry["ok"]}
    assert not failed
    assert code == 0
    assert tuple(found) == sections
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["sections"] == found
    return found


# -- the overlap in a trace ------------------------------------------------------------------------


def kernel(stream: int, ts: float, dur: float) -> dict[str, Any]:
    return {"ph": "X", "cat": "kernel", "ts": ts, "dur": dur, "args": {"stream": stream}}


def test_intervals_are_merged_and_intersected() -> None:
    some = merge([(5, 7), (0, 2), (1, 3), (3, 4)])
    assert some == [(0, 4), (5, 7)]
    assert intersect(some, [(3, 6), (6.5, 9)]) == [(3, 4), (5, 6), (6.5, 7)]
    assert total(some) == 6
    assert intersect(some, []) == []


def test_the_overlap_is_that_of_the_two_busiest_streams() -> None:
    events = [
        kernel(7, 0, 1),  # the default stream, hardly used
        *(kernel(20, 10 * i, 4) for i in range(10)),
        *(kernel(24, 10 * i + 2, 8) for i in range(10)),
        {"ph": "X", "cat": "cpu_op", "ts": 0, "dur": 500, "tid": 1},  # kernels count alone
        {"ph": "i", "cat": "kernel", "ts": 0},
    ]
    found = overlap_of(events)
    assert found is not None
    assert (found.first, found.second, found.events) == ("stream 24", "stream 20", 20)
    assert (found.first_us, found.second_us, found.both_us) == (80, 40, 20)
    assert found.share == 0.5


def test_one_lane_alone_has_no_overlap_and_threads_stand_in_where_there_are_no_kernels() -> None:
    assert overlap_of([kernel(7, 0, 1)]) is None
    assert overlap_of([]) is None
    ops = [
        {"ph": "X", "cat": "cpu_op", "ts": 0, "dur": 10, "tid": 1},
        {"ph": "X", "cat": "cpu_op", "ts": 2, "dur": 3, "tid": 1},  # nested
        {"ph": "X", "cat": "cpu_op", "ts": 8, "dur": 4, "tid": 2},
    ]
    found = overlap_of(ops)
    assert found is not None
    assert (found.first, found.first_us, found.both_us) == ("thread 1", 10, 2)
