from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from typing import Any

import pytest

from cotune.runtime.scheduling.statistics import DECISION_BUCKETS_S, ScheduleStatistics
from cotune.runtime.scheduling.timeline import (
    RECENT,
    IterationRecord,
    JobRecord,
    QuantumRecord,
    Timeline,
    TimelineSnapshot,
    chrome_trace,
)


class Clock:
    """Stands until a test moves it."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def iteration(index: int, started_s: float, ended_s: float, **changes: Any) -> IterationRecord:
    values: dict[str, Any] = {
        "index": index,
        "started_s": started_s,
        "ended_s": ended_s,
        "plan_s": 0.0001,
        "decodes": 3,
        "prefill_tokens": 0,
        "admissions": 0,
        "preemptions": 0,
        "context_tokens": 90,
        "predicted_s": None,
        "margin": 1.0,
        "slack_s": math.inf,
        "budget_tokens": 10,
        "started_quantum": None,
        "is_holding": False,
        "beside_training": 0.0,
        "memory_threshold": None,
    }
    return IterationRecord(**{**values, **changes})


def quantum(started_s: float, ended_s: float, **changes: Any) -> QuantumRecord:
    values: dict[str, Any] = {
        "adapter": "tutor",
        "kind": "forward",
        "tokens": 64,
        "samples": 2,
        "started_s": started_s,
        "ended_s": ended_s,
        "held_s": 0.0,
        "predicted_s": None,
        "halvings": 0,
        "error": None,
    }
    return QuantumRecord(**{**values, **changes})


def full() -> TimelineSnapshot:
    return TimelineSnapshot(
        now_s=20.0,
        iterations=(
            iteration(1, 10.0, 11.0, predicted_s=0.9, margin=1.5, slack_s=0.5),
            iteration(2, 11.0, 12.0, is_holding=True, memory_threshold=3 << 20, error="boom"),
            iteration(3, 12.5, 13.0, prefill_tokens=7, running=4, waiting=2),
        ),
        quanta=(quantum(9.5, 10.5), quantum(10.5, 13.0, held_s=1.5, kind="backward")),
        marks=(),
    )


# -- what is remembered --------------------------------------------------------------------------


def test_the_oldest_records_make_room_for_the_newest() -> None:
    timeline = Timeline(capacity=2, clock=Clock())
    for index in range(5):
        timeline.add_iteration(iteration(index, 1.0 * index, index + 0.5))
        timeline.add_quantum(quantum(1.0 * index, index + 0.5))
        timeline.mark(f"mark {index}")
    snapshot = timeline.snapshot()
    assert [record.index for record in snapshot.iterations] == [3, 4]
    assert [record.started_s for record in snapshot.quanta] == [3.0, 4.0]
    assert [mark.name for mark in snapshot.marks] == ["mark 3", "mark 4"]
    assert timeline.statistics().decisions == 5


def test_the_last_seconds_hold_what_ended_in_them() -> None:
    clock = Clock()
    timeline = Timeline(clock=clock)
    timeline.mark("early")
    for index, ended_s in enumerate((101.0, 104.0, 105.0)):
        timeline.add_iteration(iteration(index, ended_s - 2.0, ended_s))
        timeline.add_quantum(quantum(ended_s - 2.0, ended_s))
    clock.now_s = 106.0
    timeline.mark("late")
    snapshot = timeline.snapshot(2.0)
    assert snapshot.now_s == 106.0
    assert [record.index for record in snapshot.iterations] == [1, 2]
    assert [record.ended_s for record in snapshot.quanta] == [104.0, 105.0]
    assert [(mark.at_s, mark.name) for mark in snapshot.marks] == [(106.0, "late")]
    assert len(timeline.snapshot().iterations) == 3


def test_a_snapshot_begins_with_the_first_thing_that_it_tells_of() -> None:
    assert TimelineSnapshot(now_s=7.0).starts_s == 7.0
    assert full().starts_s == 9.5
    planned = TimelineSnapshot(now_s=7.0, iterations=(iteration(1, 5.0, 6.0, planned_s=4.0),))
    assert planned.starts_s == 4.0


@pytest.mark.parametrize("last_s", [-1.0, math.nan])
def test_seconds_that_cannot_be_are_refused(last_s: float) -> None:
    with pytest.raises(ValueError, match=r"last_s is .*use 0 or more"):
        Timeline().snapshot(last_s)
    with pytest.raises(ValueError, match="capacity is 0; use 1 or more"):
        Timeline(capacity=0)


def test_a_snapshot_survives_json() -> None:
    snapshot = full()
    body = json.loads(json.dumps(snapshot.to_dict(), allow_nan=False))
    assert body["iterations"][1]["slack_s"] is None
    assert TimelineSnapshot.from_dict(body) == snapshot


def test_records_of_another_version_are_read_as_far_as_they_are_known() -> None:
    body = full().to_dict()
    body["iterations"][0]["colour"] = "red"
    del body["iterations"][0]["waiting"]  # it has a default
    assert TimelineSnapshot.from_dict(body) == full()


@pytest.mark.parametrize("wrong", [{}, {"now_s": None}, {"now_s": 1.0, "iterations": [{}]}])
def test_what_is_no_timeline_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"no records of a timeline.*format=records"):
        TimelineSnapshot.from_dict(wrong)


# -- what is added up ----------------------------------------------------------------------------


def test_everything_is_added_up_over_what_was_forgotten_too() -> None:
    timeline = Timeline(capacity=1, clock=Clock())
    timeline.add_iteration(iteration(1, 0.0, 0.5, slack_s=-0.1, is_holding=True))
    timeline.add_iteration(iteration(2, 1.0, 1.25, prefill_tokens=5, plan_s=1.0, predicted_s=0.2))
    timeline.add_quantum(quantum(0.0, 2.0, held_s=0.5, halvings=2))
    timeline.add_quantum(quantum(2.0, 3.0, error="out of memory"))
    timeline.add_quantum(quantum(3.0, 3.25, kind="step", tokens=0))
    timeline.pause()
    found = timeline.statistics(ScheduleStatistics(policy="mace", training_share=0.25))
    assert (found.policy, found.training_share) == ("mace", 0.25)
    assert (found.decisions, found.decision_s) == (2, 1.0001)
    assert found.iteration_s == 0.75
    assert (found.tokens, found.budget_tokens) == (11, 20)
    assert found.predicted == 1
    assert found.late_iterations == 1
    assert found.holds == 1
    assert found.pauses == 1
    assert [mark.name for mark in timeline.snapshot().marks] == ["pause"]
    assert found.quanta == {"forward": 2, "step": 1}
    assert found.quantum_s == {"forward": 2.5, "step": 0.25}
    assert (found.rows, found.halvings, found.failed_quanta, found.held_s) == (128, 2, 1, 0.5)


def test_what_others_know_stays_as_they_gave_it() -> None:
    given = ScheduleStatistics(
        policy="cotune",
        training_share=0.5,
        memory_threshold=7,
        near_misses=2,
        out_of_memories=1,
        interference=1.5,
        is_profile_stale=True,
    )
    assert Timeline().statistics(given) == given


def test_recent_numbers_are_of_the_last_iterations_alone() -> None:
    timeline = Timeline(clock=Clock())
    timeline.add_iteration(iteration(0, 0.0, 1.0, decodes=10, predicted_s=9.0, slack_s=-5.0))
    for index in range(RECENT):
        timeline.add_iteration(
            iteration(index, 0.0, 1.0, decodes=5, predicted_s=1.1, slack_s=float(index))
        )
    found = timeline.statistics()
    assert found.fill == 0.5
    assert found.prediction_error_p50 == pytest.approx(0.1)
    assert found.prediction_error_p95 == pytest.approx(0.1)
    assert found.prediction_bias == pytest.approx(0.1)
    assert found.slack_p5_s == math.ceil(0.05 * RECENT) - 1


def test_errors_of_predictions_are_shares_of_what_was_measured() -> None:
    timeline = Timeline(clock=Clock())
    for expected_s in (1.0, 1.0, 1.0, 3.0):
        timeline.add_iteration(iteration(1, 0.0, 2.0, predicted_s=expected_s))
    timeline.add_iteration(iteration(1, 0.0, 2.0))  # nothing was predicted
    timeline.add_iteration(iteration(1, 0.0, 2.0, predicted_s=90.0, error="it failed"))
    timeline.add_iteration(iteration(1, 2.0, 2.0, predicted_s=90.0))  # took no time at all
    found = timeline.statistics()
    assert (found.prediction_error_p50, found.prediction_error_p95) == (0.5, 0.5)
    assert found.prediction_bias == 6.0 / 8.0 - 1.0


def test_what_is_not_known_yet_is_none() -> None:
    found = Timeline().statistics()
    assert found == ScheduleStatistics()
    for name in ("fill", "prediction_error_p50", "prediction_bias", "slack_p5_s"):
        assert getattr(found, name) is None


def test_decisions_fall_in_the_first_class_that_is_not_below_them() -> None:
    timeline = Timeline(clock=Clock())
    for plan_s in (0.0, DECISION_BUCKETS_S[0], DECISION_BUCKETS_S[0] * 1.1, 9.0):
        timeline.add_iteration(iteration(1, 0.0, 1.0, plan_s=plan_s))
    found = timeline.statistics()
    assert found.decision_counts == (2, 1, *(0 for _ in DECISION_BUCKETS_S[2:]), 1)
    assert found.decision_quantile_s(0.5) == DECISION_BUCKETS_S[0]
    assert found.decision_quantile_s(0.75) == DECISION_BUCKETS_S[1]
    assert found.decision_quantile_s(1.0) == math.inf
    assert found.decision_mean_s == pytest.approx(9.0 / 4, rel=1e-4)


def test_without_decisions_none_took_time() -> None:
    assert ScheduleStatistics().decision_quantile_s(0.99) == 0.0
    assert ScheduleStatistics().decision_mean_s == 0.0
    for share in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="use one above 0 and at most 1"):
            ScheduleStatistics().decision_quantile_s(share)


def test_every_number_is_documented() -> None:
    text = ScheduleStatistics.__doc__ or ""
    assert not [field.name for field in fields(ScheduleStatistics) if field.name not in text]


# -- as a trace ----------------------------------------------------------------------------------


def events(snapshot: TimelineSnapshot, phase: str) -> list[dict[str, Any]]:
    trace = chrome_trace(snapshot, 0.0)
    return [event for event in trace["traceEvents"] if event["ph"] == phase]


def rows(snapshot: TimelineSnapshot) -> dict[str, list[tuple[str, float, float]]]:
    """Name, begin and duration in milliseconds of the slices in each row."""
    names = {
        event["tid"]: event["args"]["name"]
        for event in events(snapshot, "M")
        if event["name"] == "thread_name"
    }
    found: dict[str, list[tuple[str, float, float]]] = {name: [] for name in names.values()}
    for event in events(snapshot, "X"):
        found[names[event["tid"]]].append((event["name"], event["ts"] / 1e3, event["dur"] / 1e3))
    return found


def test_each_lane_has_a_row_of_its_own() -> None:
    found = rows(full())
    assert found["lane: inference"] == [
        ("decode", 500.0, 1000.0),
        ("failed decode", 1500.0, 1000.0),
        ("mixed", 3000.0, 500.0),
    ]
    assert found["lane: training"] == [
        ("forward", 0.0, 1000.0),
        ("backward", 1000.0, 2500.0),
        ("told to wait", 1500.0, 1500.0),
    ]
    assert [(name, round(ms, 3)) for name, _, ms in found["scheduler"]] == [("decide", 0.1)] * 3
    assert found["scheduler"][0][1] == pytest.approx(499.9)


def test_a_wait_is_shown_within_the_quanta_that_waited() -> None:
    snapshot = TimelineSnapshot(
        now_s=9.0,
        iterations=(
            iteration(1, 0.0, 1.0, is_holding=True),
            iteration(2, 1.0, 2.0, is_holding=True),
            iteration(3, 2.5, 3.0),
            iteration(4, 6.0, 7.0, is_holding=True),
        ),
        quanta=(quantum(-1.0, 0.5), quantum(0.75, 4.0), quantum(5.0, 6.5), quantum(7.5, 8.0)),
    )
    waits = [(begin, ms) for name, begin, ms in rows(snapshot)["lane: training"] if "wait" in name]
    assert waits == [(1000.0, 500.0), (1750.0, 1750.0), (7000.0, 500.0)]


def test_a_slice_tells_what_was_expected_beside_what_was_measured() -> None:
    first, second, _ = [event["args"] for event in events(full(), "X") if event["tid"] == 2]
    assert (first["measured_ms"], first["predicted_ms"]) == (1000.0, 900.0)
    assert first["predicted_with_margin_ms"] == pytest.approx(1350.0)
    assert (second["predicted_ms"], second["error"]) == (None, "boom")


def test_counters_are_there_where_there_is_something_to_count() -> None:
    by_name: dict[str, list[dict[str, float]]] = {}
    for event in events(full(), "C"):
        by_name.setdefault(event["name"], []).append(event["args"])
    assert by_name["tokens"][2] == {"decode": 3, "prefill": 7}
    assert by_name["sequences"][2] == {"running": 4, "waiting": 2}
    assert by_name["slack (ms)"] == [{"slack": 500.0}]
    assert by_name["memory threshold (MiB)"] == [{"threshold": 3.0}]
    assert len(by_name["share of training"]) == 3


def test_marks_are_moments_and_the_trace_says_when_it_began() -> None:
    clock = Clock()
    timeline = Timeline(clock=clock)
    timeline.mark("publication", "tutor@3")
    clock.now_s = 102.0
    snapshot = timeline.snapshot()
    (mark,) = events(snapshot, "i")
    assert (mark["name"], mark["ts"], mark["args"]) == ("publication", 0.0, {"detail": "tutor@3"})
    told = chrome_trace(snapshot, 1_000_000_000.0 - 100.0)["otherData"]
    assert told["began"] == "2001-09-09T01:46:40Z"


def test_a_trace_is_strict_json_without_times_before_its_beginning() -> None:
    trace = json.loads(json.dumps(chrome_trace(full(), 5.0), allow_nan=False))
    times = [event["ts"] for event in trace["traceEvents"] if "ts" in event]
    assert min(times) == 0.0
    assert all(event["dur"] >= 0.0 for event in trace["traceEvents"] if event["ph"] == "X")


# -- jobs ----------------------------------------------------------------------------------------


def with_jobs() -> TimelineSnapshot:
    jobs = (
        JobRecord("tutor", "checkpoint", 8.5, 9.25),
        JobRecord("tutor", "checkpoint", 13.0, 13.5, "OSError: full"),
        JobRecord("coder", "version", 14.0, 16.0),
    )
    return replace(full(), jobs=jobs)


def test_jobs_are_remembered_and_counted_apart_from_quanta() -> None:
    clock = Clock()
    timeline = Timeline(capacity=2, clock=clock)
    for job in with_jobs().jobs:
        timeline.add_job(job)
    assert timeline.snapshot().jobs == with_jobs().jobs[1:]
    clock.now_s = 17.0
    assert timeline.snapshot(2.0).jobs == with_jobs().jobs[2:]
    found = timeline.statistics()
    assert found.jobs == {"checkpoint": 2, "version": 1}
    assert found.job_s == {"checkpoint": 1.25, "version": 2.0}
    assert (found.quanta, found.quantum_s) == ({}, {})


def test_jobs_survive_json_and_an_older_server_has_none() -> None:
    snapshot = with_jobs()
    assert snapshot.starts_s == 8.5
    body = json.loads(json.dumps(snapshot.to_dict(), allow_nan=False))
    assert TimelineSnapshot.from_dict(body) == snapshot
    del body["jobs"]
    assert TimelineSnapshot.from_dict(body) == full()


def test_jobs_are_slices_of_their_own_on_the_training_lanes_row() -> None:
    events = chrome_trace(with_jobs(), 0.0)["traceEvents"]
    jobs = [event for event in events if event.get("cat") == "job"]
    (row,) = {event["tid"] for event in events if event.get("cat") == "quantum"}
    assert [(e["name"], e["ts"], e["dur"], e["tid"]) for e in jobs] == [
        ("checkpoint", 0.0, 0.75e6, row),
        ("failed checkpoint", 4.5e6, 0.5e6, row),
        ("version", 5.5e6, 2e6, row),
    ]
    assert jobs[1]["args"] == {"adapter": "tutor", "measured_ms": 500.0, "error": "OSError: full"}
    assert len([event for event in events if event.get("cat") == "quantum"]) == 2
