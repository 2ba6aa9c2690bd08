from __future__ import annotations

import asyncio
import json
import math
from typing import TYPE_CHECKING, Any

import pytest

from cotune.runtime.scheduling.timeline import (
    IterationRecord,
    Mark,
    QuantumRecord,
    TimelineSnapshot,
)
from cotune.runtime.types import SamplingParams
from cotune.tools.cli import main
from cotune.tools.null_runtime import NullRuntime
from cotune.tools.save_trace import OVERLAP_S, POLL_S, Recording, describe, watch
from web_server import serving

if TYPE_CHECKING:
    from pathlib import Path

    from web_server import Server


def iteration(index: int, ended_s: float) -> IterationRecord:
    return IterationRecord(
        index=index,
        started_s=ended_s - 0.25,
        ended_s=ended_s,
        plan_s=0.0001,
        decodes=1,
        prefill_tokens=0,
        admissions=0,
        preemptions=0,
        context_tokens=1,
        predicted_s=0.2,
        margin=1.0,
        slack_s=math.inf,
        budget_tokens=8,
        started_quantum=None,
        is_holding=False,
        beside_training=0.5,
        memory_threshold=None,
    )


def quantum(ended_s: float) -> QuantumRecord:
    return QuantumRecord("tutor", "forward", 8, 1, ended_s - 1.0, ended_s, 0.0, None, 0, None)


class FakeServer:
    """A server whose clock a test moves; it ends an iteration every quarter of a second."""

    def __init__(self, *, forgets_after: int = 1000) -> None:
        self.now_s = 50.0
        self.asked: list[float | None] = []
        self._forgets_after = forgets_after
        self.interrupt_at_s = math.inf

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        if self.now_s >= self.interrupt_at_s:
            raise KeyboardInterrupt

    def clock(self) -> float:
        return self.now_s + 1000.0  # the watcher's clock is another one

    def records(self, seconds: float | None) -> dict[str, Any]:
        self.asked.append(seconds)
        since_s = -math.inf if seconds is None else self.now_s - seconds
        ends = [index / 4 for index in range(1, int(self.now_s * 4) + 1)][-self._forgets_after :]
        whole = TimelineSnapshot(
            now_s=self.now_s,
            iterations=tuple(iteration(int(4 * s), s) for s in ends if s >= since_s),
            quanta=tuple(quantum(s) for s in ends if s >= since_s and s == int(s)),
            marks=tuple(Mark(s, "pause", "") for s in ends if s >= since_s and s == int(s)),
        )
        return {"object": "timeline", "epoch": 1e9, **whole.to_dict()}


def record(server: FakeServer, seconds: float) -> Recording:
    recording = Recording()
    watch(server, recording, seconds, lambda _s, _n: None, clock=server.clock, sleep=server.sleep)
    return recording


def test_pieces_that_overlap_become_one_without_gaps_or_repeats() -> None:
    server = FakeServer()
    recording = record(server, 3.5)
    snapshot = recording.snapshot()
    assert [r.index for r in snapshot.iterations] == list(range(200, 215))
    assert [r.ended_s for r in snapshot.quanta] == [50.0, 51.0, 52.0, 53.0]
    assert [mark.at_s for mark in snapshot.marks] == [50.0, 51.0, 52.0, 53.0]
    assert (recording.lost, recording.epoch, snapshot.now_s) == (0, 1e9, 53.5)
    assert server.asked[1:] == [POLL_S + OVERLAP_S] * 3 + [0.5 + OVERLAP_S]


def test_what_the_server_forgot_in_between_is_counted() -> None:
    recording = record(FakeServer(forgets_after=3), 2.0)
    assert recording.lost == 1
    assert describe(recording.snapshot(), recording.lost).endswith("by then")


def test_an_interrupt_ends_it_early_and_keeps_what_there_is() -> None:
    server = FakeServer()
    server.interrupt_at_s = 52.0
    recording = record(server, 60.0)
    assert recording.snapshot().iterations[-1].ended_s == 52.0


def test_the_summary_says_what_was_seen() -> None:
    recording = Recording()
    recording.add(FakeServer().records(1.0))
    first, second, third = describe(recording.snapshot(), 0).splitlines()
    assert first == "5 iterations and 2 training quanta in 2.0 s"
    assert "took 250.00 ms, a decision 100 us; training ran beside 50%" in second
    assert third == "predictions were off by 20% (median)"
    empty = TimelineSnapshot(now_s=1.0)
    assert describe(empty, 0) == "0 iterations and 0 training quanta in 0.0 s"


async def trace(server: Server, *argv: str) -> int:
    return await asyncio.to_thread(main, ["trace", "--url", server.url, *argv])


async def test_the_past_of_a_server_is_saved_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "past.json"
    async with NullRuntime() as runtime, serving(runtime, api_key="secret") as server:
        await runtime.complete("x", SamplingParams(max_tokens=5))
        assert await trace(server, "--past", "--output", str(path), "--api-key", "secret") == 0
        assert await trace(server, "--past", "--output", str(path), "--api-key", "wrong") == 1
    said = capsys.readouterr()
    assert "iterations and 0 training quanta" in said.out
    assert "open it at https://ui.perfetto.dev" in said.out
    assert "(status 401)" in said.err
    slices = [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]
    assert sum(e["args"].get("decodes", 0) for e in slices) == 5


async def test_what_comes_is_watched_for_as_long_as_was_said(tmp_path: Path) -> None:
    path = tmp_path / "now.json"
    async with NullRuntime(manual=True) as runtime, serving(runtime) as server:
        async with runtime.complete("x", SamplingParams(max_tokens=5)):
            runtime.step()  # before the watching begins
        assert await trace(server, "--seconds", "0.01", "--output", str(path)) == 0
    assert not [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seconds", "0"], "--seconds is 0.0; use a number above 0"),
        (["--seconds", "nan"], "use a number above 0"),
        (["--url", "ftp://x"], "--url is 'ftp://x'; use http://HOST:PORT"),
        (["--output", "no/such/place.json"], "make it first"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_watched(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert main(["trace", *argv]) == 2
    assert message in capsys.readouterr().err


async def test_a_server_that_is_not_there_is_told_with_a_remedy(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    async with NullRuntime() as runtime, serving(runtime) as server:
        pass
    assert await trace(server, "--output", str(tmp_path / "x.json")) == 1
    assert "start one with `cotune serve`" in capsys.readouterr().err
