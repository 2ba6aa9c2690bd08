"""What runs come to, with numbers that can be reckoned by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cotune.runtime.scheduling.timeline import IterationRecord, Mark, QuantumRecord
from cotune.tools.coserve_checks import errors_of, gamma_of, inflow_of, recovered_after, stale_of
from cotune.tools.coserve_load import Arrival, Feedback
from cotune.tools.coserve_log import LoggedRequest, Targets
from cotune.tools.coserve_report import (
    as_json,
    attains,
    attains_mean,
    long_gaps,
    plot,
    summarize,
    table,
    verdicts,
)
from cotune.tools.coserve_run import (
    Outcome,
    RunPlan,
    RunResult,
    Usage,
    counted_from,
    logged_request,
    trained_rows,
)

if TYPE_CHECKING:
    from pathlib import Path

    from cotune.tools.coserve_report import Summary
    from cotune.tools.coserve_run import Ending

TARGETS = Targets(ttft_s=0.1, tbt_s=0.02)
USAGE = Usage(
    wall_s=10.0,
    device_s=3.8,
    plan_s=0.1,
    commit_s=0.1,
    decision_s=0.04,
    iterations=1000,
    preemptions=0,
    prompt_tokens=5000,
    generated_tokens=900,
    steps=6,
    trained_tokens=4000,
    quanta={"forward": 12},
    held_s=0.5,
)


def plan(**changes: Any) -> RunPlan:
    values: dict[str, Any] = {
        "label": "50%",
        "policy": "cotune",
        "rate": 0.5,
        "round": 0,
        "arrivals": (),
        "bursts_s": (),
        "feedback": Feedback((), ()),
        "burst": 8,
        "epochs": 2,
        "warmup_s": 2.0,
        "seconds": 10.0,
    }
    return RunPlan(**values | changes)


def outcome(
    arrival_s: float = 3.0,
    ttft_s: float | None = 0.05,
    gaps_s: tuple[float, ...] = (0.01, 0.01),
    ending: Ending = "done",
    *,
    is_extra: bool = False,
    ended_s: float = 5.0,
) -> Outcome:
    request = LoggedRequest(
        arrival_s=arrival_s,
        prompt_tokens=100,
        cached_tokens=36,
        output_tokens=len(gaps_s) + (ttft_s is not None),
        ttft_s=ttft_s,
        gaps_s=gaps_s,
    )
    return Outcome(request, ending, is_extra, ended_s)


def result(*outcomes: Outcome, **changes: Any) -> RunResult:
    values: dict[str, Any] = {
        "plan": plan(),
        "outcomes": outcomes,
        "usage": USAGE,
        "samples": (),
        "asked_tokens": 5000,
        "asked_visits": 4,
        "quanta": (quantum(4.0, 5.0, rows=4000), quantum(5.0, 6.0, "backward", rows=4000)),
    }
    return RunResult(**values | changes)


def iteration(started_s: float, ended_s: float, **changes: Any) -> IterationRecord:
    record = IterationRecord(
        index=1,
        started_s=started_s,
        ended_s=ended_s,
        plan_s=0.0,
        decodes=1,
        prefill_tokens=0,
        admissions=0,
        preemptions=0,
        context_tokens=0,
        predicted_s=None,
        margin=1.0,
        slack_s=math.inf,
        budget_tokens=512,
        started_quantum=None,
        is_holding=False,
        beside_training=0.0,
        memory_threshold=None,
    )
    return record._replace(**changes)


def test_all_times_of_an_iteration_are_counted_from_the_beginning_of_the_load() -> None:
    shifted = counted_from(iteration(103.0, 104.0, planned_s=102.0), 100.0)
    assert shifted == iteration(3.0, 4.0, planned_s=2.0)
    assert counted_from(iteration(103.0, 104.0), 100.0).planned_s is None


def quantum(
    started_s: float, ended_s: float, kind: str = "forward", rows: int = 300
) -> QuantumRecord:
    return QuantumRecord("a", kind, rows, 2, started_s, ended_s, 0.0, None, 0, None)


# -- one request ---------------------------------------------------------------------------------


def test_times_of_tokens_become_a_first_one_and_gaps() -> None:
    arrival = Arrival(at_s=1.0, prompt=(1, 2, 3), answer_tokens=3)
    request = logged_request(arrival, [1.5, 1.75, 2.25], cached_tokens=2)
    assert request.ttft_s == 0.5
    assert request.gaps_s == (0.25, 0.5)
    assert (request.prompt_tokens, request.output_tokens, request.cached_tokens) == (3, 3, 2)
    assert logged_request(arrival, [], 0).ttft_s is None


@pytest.mark.parametrize(
    ("each", "by_p99", "by_mean"),
    [
        (outcome(), True, True),
        (outcome(ttft_s=0.11), False, False),
        (outcome(ttft_s=None, gaps_s=(), ending="unfinished"), False, False),
        (outcome(ending="failed"), False, False),
        # 99 of 100 gaps: of three the last one counts; their mean is 14 ms.
        (outcome(gaps_s=(0.01, 0.01, 0.022)), False, True),
        (outcome(gaps_s=()), True, True),
    ],
)
def test_a_request_attains_its_targets(each: Outcome, by_p99: bool, by_mean: bool) -> None:
    assert attains(each, TARGETS) is by_p99
    assert attains_mean(each, TARGETS) is by_mean


# -- one run -------------------------------------------------------------------------------------


def test_only_ordinary_requests_of_the_window_are_measured() -> None:
    inside = outcome(arrival_s=2.0)
    found = result(
        outcome(arrival_s=1.99), inside, outcome(arrival_s=4.0, is_extra=True), outcome(12.0)
    )
    assert found.measured == (inside,)


def test_a_run_in_numbers() -> None:
    late = outcome(ttft_s=0.15, gaps_s=(0.03,))
    lost = outcome(arrival_s=4.0, ttft_s=None, gaps_s=(), ending="unfinished", ended_s=9.0)
    found = summarize(result(outcome(), outcome(), late, lost), TARGETS, idle_busy=0.4, alone=1000)
    assert found.requests == 4
    assert found.endings == {"done": 3, "unfinished": 1}
    assert found.attained == 0.5
    assert found.goodput == 0.2
    assert found.latencies.ttft_p50 == pytest.approx(100.0)  # 50, 50, 150, 5000
    assert found.latencies.tbt_p50 == pytest.approx(10.0)
    assert found.latencies.tbt_max == pytest.approx(30.0)
    assert found.cached == 0.36
    assert found.busy == pytest.approx(0.38)
    assert found.planning == pytest.approx(0.1 / 4.0)
    assert found.deciding == pytest.approx(0.04 / 4.0)
    assert found.training == 400.0
    assert found.asked == 500.0
    assert found.asked_rate == 0.5  # 4 visits, 4 requests
    assert found.of_alone == pytest.approx(0.4)
    assert found.of_asked == pytest.approx(0.8)
    assert found.of_idle == pytest.approx(0.4 / 0.6)
    assert found.of_possible == pytest.approx(0.8)  # 500 asked, 600 idle
    assert found.held == 0.05


def test_no_more_is_possible_than_what_is_idle() -> None:
    found = summarize(result(outcome()), TARGETS, idle_busy=0.75, alone=1000)
    assert found.of_possible == pytest.approx(400 / 250)


def test_what_is_not_known_is_left_out() -> None:
    idle = replace(USAGE, device_s=0.0, plan_s=0.0, commit_s=0.0)
    found = summarize(result(usage=idle, asked_tokens=0, asked_visits=0), TARGETS)
    assert found.planning is None
    assert found.deciding is None
    assert found.of_alone is None
    assert found.of_asked is None
    assert found.of_idle is None
    assert found.of_possible is None
    text = json.dumps(as_json(found), allow_nan=False)  # NaN percentiles are null
    assert json.loads(text)["latencies"]["ttft_p50"] is None
    assert "-" in table([found])


def test_of_a_quantum_the_part_within_the_window_counts() -> None:
    quanta = [
        quantum(1.0, 3.0, rows=400),  # half of it within, and half of a row's work
        quantum(3.0, 4.0, "backward", rows=400),
        quantum(4.0, 4.1, "step", rows=0),
        quantum(9.0, 19.0, "backward", rows=200),  # a tenth within
        quantum(5.0, 6.0, rows=1000)._replace(error="out of memory"),
        quantum(20.0, 21.0),
    ]
    assert trained_rows(quanta, 2.0, 10.0) == pytest.approx(100 + 200 + 10)


# -- long gaps -----------------------------------------------------------------------------------


def test_a_long_gap_tells_what_ran_then() -> None:
    # Tokens at 3.05, then every 10 ms, and one gap of 150 ms from 3.07 to 3.22.
    each = outcome(gaps_s=(0.01, 0.01, 0.15, 0.01))
    found = long_gaps(
        result(
            each,
            iterations=(
                iteration(3.05, 3.06),
                iteration(3.06, 3.07),
                iteration(3.07, 3.20, prefill_tokens=500),
                iteration(3.20, 3.22),
                iteration(3.22, 3.23),
            ),
            quanta=(quantum(3.0, 3.1), quantum(3.1, 3.15, "backward"), quantum(3.5, 3.6)),
            marks=(Mark(3.1, "near miss", ""), Mark(3.4, "pause", "")),
        )
    )
    assert len(found) == 1
    gap = found[0]
    assert gap.gap_ms == pytest.approx(150.0)
    assert gap.cause == "prefill"
    assert gap.iterations == 2
    assert gap.longest_ms == pytest.approx(130.0)
    assert gap.prefill_tokens == 500
    assert gap.quanta == {"forward": 1, "backward": 1}
    assert gap.marks == {"near miss": 1}


@pytest.mark.parametrize(
    ("iterations", "quanta", "cause"),
    [
        ((iteration(3.07, 3.21),), (), "other"),
        ((iteration(3.07, 3.21),), (quantum(3.1, 3.2),), "beside training"),
        ((iteration(3.07, 3.10),), (quantum(3.1, 3.2),), "pause"),
        ((), (), "other"),
    ],
)
def test_the_cause_of_a_long_gap(
    iterations: tuple[IterationRecord, ...], quanta: tuple[QuantumRecord, ...], cause: str
) -> None:
    each = outcome(gaps_s=(0.01, 0.01, 0.15, 0.01))
    (gap,) = long_gaps(result(each, iterations=iterations, quanta=quanta))
    assert gap.cause == cause


# -- all of them ---------------------------------------------------------------------------------


def summaries() -> list[Summary]:
    """Two rounds of three policies; the gaps of each are all alike."""
    gaps_ms = {
        "inference-only": (10, 10),
        "synchronous": (60, 80),
        "cotune": (15, 20),
    }
    found = []
    for policy, values in gaps_ms.items():
        for round_, gap_ms in enumerate(values):
            each = outcome(gaps_s=(gap_ms / 1e3,) * 3)
            found.append(
                summarize(
                    result(each, plan=plan(policy=policy, round=round_)),
                    TARGETS,
                    idle_busy=0.4,
                    alone=1000,
                )
            )
    return found


def test_the_table_has_a_block_per_rate_and_a_line_per_policy() -> None:
    other = replace(summaries()[0], label="0%", rate=0.0, asked_rate=0.0, asked=0.0)
    text = table([*summaries(), other])
    lines = text.splitlines()
    assert lines[1] == "0%: 0% of tasks were training; 1 requests each"
    assert lines[5] == "50%: 80% of tasks were training; 2 requests each"
    line = next(line for line in lines if line.startswith("synchronous"))
    assert "70.0 (60.0-80.0)" in line


def test_verdicts_compare_ours_with_the_others_at_the_median() -> None:
    (line,) = verdicts(summaries())
    assert "attainment +0.0 points against inference-only" in line
    assert "TBT p99 of synchronous / ours 4.00" in line
    assert "trains 80 % of what is possible" in line


def test_without_ours_there_is_no_verdict() -> None:
    assert verdicts([each for each in summaries() if each.policy != "cotune"]) == []


def test_the_same_runs_give_the_same_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("one.svg", "other.svg"):
        plot(tmp_path / name, "a title", summaries())
    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "other.svg").read_text()
    for words in ("a title", "synchronous", "TBT p99 (ms)", "SLO attainment (%)"):
        assert words in text


# -- checks --------------------------------------------------------------------------------------


def test_an_inflow_is_told_apart_from_before_and_after() -> None:
    own = outcome(arrival_s=5.0, ttft_s=1.0, gaps_s=(), is_extra=True, ended_s=6.0)
    early = outcome(arrival_s=4.9, gaps_s=(0.02, 0.4, 0.01), ended_s=5.4)
    late = outcome(arrival_s=8.0, gaps_s=(0.03,), ended_s=8.1)
    found = inflow_of(
        result(
            own,
            early,
            late,
            quanta=(quantum(3.0, 3.2, "backward"), quantum(5.0, 6.0, "backward")),
        ),
        5.0,
    )
    assert found.lasted_s == pytest.approx(1.5)  # its prompt was computed after 1 s
    assert found.its_ttft_max == pytest.approx(1000.0)
    assert found.before.tbt_max == pytest.approx(20.0)
    assert found.during.tbt_max == pytest.approx(400.0)
    assert found.after.tbt_max == pytest.approx(30.0)
    assert found.trained_before == pytest.approx(100.0)  # 300 rows in the 3 s of the window
    assert found.trained_during == pytest.approx(200.0)


def test_what_was_trained_first_is_the_share_of_the_first_half() -> None:
    steps = {"noisy": [1.0, 2.0, 7.0, 8.0], "clean": [3.0, 4.0, 5.0, 6.0]}
    found = gamma_of(result(outcome(), steps_by_adapter=steps), 0.0, "loss")
    assert found.noisy_first == 0.5
    assert found.steps == (4, 4)
    ahead = {"noisy": [1.0, 2.0], "clean": [3.0, 4.0]}
    assert gamma_of(result(outcome(), steps_by_adapter=ahead), 5.0, "loss").noisy_first == 1.0


def test_the_error_of_a_prediction_is_relative_to_what_was_measured() -> None:
    records = [
        iteration(0.0, 0.1, predicted_s=0.15),
        iteration(0.0, 0.1),
        iteration(0.0, 0.1, predicted_s=0.1, error="it failed"),
        iteration(0.0, 0.2, predicted_s=0.1),
    ]
    assert errors_of(records) == pytest.approx([0.5, 0.5])


def test_predictions_are_back_when_the_median_of_a_window_is() -> None:
    assert recovered_after([0.1] * 20, 0.2) == 0
    # From place 31 on the window has 11 good ones.
    assert recovered_after([2.0] * 41 + [0.1] * 40, 0.2) == 31 + 1
    assert recovered_after([2.0] * 100, 0.2) is None
    assert recovered_after([0.1] * 19, 0.2) is None


def test_a_stale_profile_is_held_against_the_right_one() -> None:
    right = tuple(iteration(0.0, 0.1, predicted_s=0.11) for _ in range(100))
    bad = tuple(iteration(0.0, 0.1, predicted_s=0.3) for _ in range(50))
    found = stale_of(
        result(outcome(), iterations=right), result(outcome(), iterations=(*bad, *right))
    )
    assert found.right_error == pytest.approx(0.1)
    assert found.first_error == pytest.approx(2.0)
    assert found.last_error == pytest.approx(0.1)
    assert found.recovered_after == 41  # 9 bad ones and 11 good ones
    assert found.iterations == 150
