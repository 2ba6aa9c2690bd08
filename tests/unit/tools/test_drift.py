from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest

from cotune.runtime.errors import ConfigError
from cotune.runtime.learning.status import AdapterLearning
from cotune.tools import drift
from cotune.tools.drift_plot import plot, plot_pool, require_plots
from cotune.tools.drift_report import (
    Evaluated,
    PairLogps,
    PhaseResult,
    PhaseSpan,
    compare,
    curves,
    pool,
    summarize,
    table,
    wilson,
    within,
)
from cotune.tools.drift_run import DriftRun, DriftSettings, TurnCodec
from cotune.tools.drift_stream import (
    FLOODER,
    DriftRow,
    DriftStream,
    due_times_s,
    is_evaluated,
    read_stream,
    share_out,
)
from cotune.tools.drift_traffic import DriftError, quantiles
from cotune.tools.null_learning import NullLearning
from cotune.tools.null_runtime import NullRuntime
from web_server import serving

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from cotune.runtime.learning.events import Acknowledgement, FeedbackEvent


def row(number: int, phase: int = 0, **fields: Any) -> dict[str, Any]:
    return {
        "id": f"row-{number}",
        "t_s": float(number),
        "phase": phase,
        "phase_name": ("first", "second", "third")[phase],
        "prompt": [{"role": "user", "content": f"question {number}"}],
        "chosen": "Yes",
        "rejected": "No",
        "more": "is left alone",
    } | fields


def write(path: Path, rows: Sequence[object]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as lines:
        lines.writelines(f"{json.dumps(entry)}\n" for entry in rows)
    return path


def stream_of(tmp_path: Path, sizes: Sequence[int], **options: Any) -> DriftStream:
    rows = [row(100 * phase + n, phase) for phase, size in enumerate(sizes) for n in range(size)]
    path = write(tmp_path / "drift_test.jsonl.gz", rows)
    return read_stream(path, **({"held_out_share": 0.2} | options))


class TestReading:
    def test_a_row_is_either_sent_or_held_out_and_about_a_fifth_is(self, tmp_path: Path) -> None:
        stream = stream_of(tmp_path, (100, 100))
        sent = {row.id for row in stream.sent}
        held_out = {row.id for part in stream.held_out for row in part}
        assert not sent & held_out
        assert len(sent | held_out) == 200
        assert 25 <= len(held_out) <= 55
        assert stream.phases == ("first", "second")
        assert all(row.phase == n for n, part in enumerate(stream.held_out) for row in part)

    def test_which_rows_are_held_out_never_changes(self, tmp_path: Path) -> None:
        stream = stream_of(tmp_path, (20,))
        assert [row.id for row in stream.held_out[0]] == HELD_OUT_OF_TWENTY

    def test_rows_of_one_prompt_are_on_one_side(self) -> None:
        prompt = ({"role": "user", "content": "again"},)
        rows = [parsed(n, prompt=prompt, chosen=f"answer {n}") for n in range(30)]
        assert len({is_evaluated(row, 0.5) for row in rows}) == 1

    def test_a_larger_share_holds_out_the_same_rows_and_more(self) -> None:
        rows = [parsed(n) for n in range(200)]
        few = {row.id for row in rows if is_evaluated(row, 0.1)}
        many = {row.id for row in rows if is_evaluated(row, 0.4)}
        assert few < many

    def test_the_folds_together_hold_out_every_row_once(self) -> None:
        rows = [parsed(n) for n in range(200)]
        folds = [[row.id for row in rows if is_evaluated(row, 0.2, fold)] for fold in range(5)]
        assert sorted(itertools.chain.from_iterable(folds)) == sorted(row.id for row in rows)
        assert min(map(len, folds)) > 20

    def test_rows_are_sent_in_the_order_of_their_times(self, tmp_path: Path) -> None:
        path = write(tmp_path / "s.jsonl.gz", [row(n) for n in (5, 3, 9, 1, 7, 2, 4, 6, 8)])
        times = [row.time_s for row in read_stream(path, held_out_share=0.3).sent]
        assert times == sorted(times)

    def test_a_plain_file_is_read_as_well(self, tmp_path: Path) -> None:
        path = tmp_path / "s.jsonl"
        path.write_text("".join(f"{json.dumps(row(n))}\n" for n in range(40)))
        assert len(read_stream(path, held_out_share=0.5).sent) < 40

    def test_a_limit_takes_the_first_rows_of_each_phase(self, tmp_path: Path) -> None:
        stream = stream_of(tmp_path, (50, 50), limit=20)
        everything = [*stream.sent, *(row for part in stream.held_out for row in part)]
        assert {row.id for row in everything} == {
            f"row-{100 * phase + n}" for phase in (0, 1) for n in range(20)
        }

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            (["{"], "line 1 is not JSON"),
            (["[]"], "line 1 is no JSON object"),
            ([json.dumps({"id": "a"})], "missing: t_s"),
            ([json.dumps(row(1)), json.dumps(row(1))], "ids occur twice"),
            ([json.dumps(row(n, 1)) for n in range(20)], "number them from 0"),
            ([json.dumps(row(1))], "both need one at least"),
        ],
    )
    def test_a_malformed_stream_is_refused(
        self, lines: list[str], message: str, tmp_path: Path
    ) -> None:
        path = tmp_path / "s.jsonl"
        path.write_text("\n".join(lines))
        with pytest.raises(ConfigError, match=message):
            read_stream(path, held_out_share=0.2)

    def test_a_missing_file_names_the_flag(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="--data"):
            read_stream(tmp_path / "none.jsonl.gz", held_out_share=0.2)


HELD_OUT_OF_TWENTY = ["row-3", "row-13", "row-17"]


def parsed(number: int, phase: int = 0, **fields: Any) -> DriftRow:
    values: dict[str, Any] = {
        "id": f"row-{number}",
        "time_s": float(number),
        "phase": phase,
        "prompt": ({"role": "user", "content": f"question {number}"},),
        "chosen": "Yes",
        "rejected": "No",
    }
    return DriftRow(**(values | fields))


class TestSharingOut:
    def test_everything_is_sent_once_in_order(self) -> None:
        rows = [parsed(n) for n in range(50)]
        sent = share_out(rows, users=3)
        assert [event.row for event in sent] == rows
        assert {event.source for event in sent} == {"user-0", "user-1", "user-2"}
        assert not any(event.is_flipped for event in sent)

    def test_a_flipped_label_prefers_the_rejected_answer(self) -> None:
        (event,) = share_out([parsed(1, chosen="good", rejected="bad")], users=1, flip=1.0)
        assert event.frame() == {
            "id": "row-1",
            "type": "preference",
            "prompt": [{"role": "user", "content": "question 1"}],
            "chosen": "bad",
            "rejected": "good",
        }

    def test_about_the_asked_share_is_flipped_whoever_sends_it(self) -> None:
        sent = share_out([parsed(n) for n in range(1000)], users=2, flip=0.3)
        for user in ("user-0", "user-1"):
            flips = [event.is_flipped for event in sent if event.source == user]
            assert 0.24 <= sum(flips) / len(flips) <= 0.36

    def test_a_flood_turns_a_whole_phase_round_before_it_begins(self) -> None:
        rows = [parsed(1), parsed(2), parsed(3, phase=1)]
        sent = share_out(rows, users=1, flood=2)
        assert [(event.source == FLOODER, event.row.id) for event in sent] == [
            *[(True, "row-1"), (True, "row-2")] * 2,
            *[(False, "row-1"), (False, "row-2")],
            *[(True, "row-3")] * 2,
            (False, "row-3"),
        ]
        assert all(event.is_flipped == (event.source == FLOODER) for event in sent)
        assert len({event.id for event in sent}) == len(sent)

    def test_the_times_of_the_file_are_run_through_faster(self) -> None:
        sent = share_out([parsed(10), parsed(30)], users=1)
        assert due_times_s(sent, speed=5.0, events_per_s=None) == (2.0, 6.0)

    def test_a_steady_pace_does_not_count_the_flood(self) -> None:
        sent = share_out([parsed(1), parsed(2), parsed(3, phase=1)], users=1, flood=1)
        times = due_times_s(sent, speed=None, events_per_s=2.0)
        assert times == (0.0, 0.0, 0.0, 0.5, 1.0, 1.0)

    def test_a_flood_comes_as_its_phase_begins(self) -> None:
        sent = share_out([parsed(10), parsed(20), parsed(30, phase=1)], users=1, flood=1)
        times = due_times_s(sent, speed=1.0, events_per_s=None)
        assert times == (10.0, 10.0, 10.0, 20.0, 30.0, 30.0)


class TestIntervals:
    @pytest.mark.parametrize(
        ("wins", "pairs", "low", "high"),
        # Brown, Cai & DasGupta (2001), and by hand for the ends.
        [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)],
    )
    def test_it_is_wilsons(self, wins: float, pairs: int, low: float, high: float) -> None:
        interval = wilson(wins, pairs)
        assert interval.rate == wins / pairs
        assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)

    def test_its_ends_are_where_the_score_test_rejects(self) -> None:
        interval = wilson(31, 50)
        for end in (interval.low, interval.high):
            z = (interval.rate - end) / math.sqrt(end * (1 - end) / 50)
            assert abs(z) == pytest.approx(1.959964, rel=1e-6)

    def test_quantiles_are_of_the_nearest_rank(self) -> None:
        times = [n / 1000 for n in range(1, 201)]
        assert quantiles(times[::-1]) == {"n": 200, "p50_ms": 100.0, "p99_ms": 198.0}
        assert quantiles([]) == {"n": 0, "p50_ms": None, "p99_ms": None}


class TestWinning:
    def test_three_definitions_differ(self) -> None:
        # The chosen answer is long and less likely as a whole, likelier per token, and training
        # has lowered it.
        version = [PairLogps(-10.0, -6.0, chosen_tokens=10, rejected_tokens=2)]
        base = [PairLogps(-8.0, -6.0, chosen_tokens=10, rejected_tokens=2)]
        result = compare(version, base)
        assert result.wins == {"sum": 0.0, "per_token": 1.0, "implicit": 0.0}
        assert result.chosen_change == pytest.approx(-0.2)
        assert result.rejected_change == 0.0

    def test_the_base_model_has_no_implicit_reward(self) -> None:
        base = [PairLogps(-1.0, -2.0, 3, 3), PairLogps(-2.0, -1.0, 3, 3)]
        assert compare(base, base).wins == {"sum": 1.0, "per_token": 1.0, "implicit": 1.0}
        assert compare(base, base).interval("implicit").rate == 0.5


def result_of(wins: float, pairs: int = 100) -> PhaseResult:
    return PhaseResult(
        pairs=pairs,
        wins={"sum": wins, "per_token": wins, "implicit": wins},
        chosen_change=0.0,
        rejected_change=0.0,
    )


def entry(version: int, at_s: float, **wins: float) -> Evaluated:
    results = {("first", "second").index(name): result_of(n) for name, n in wins.items()}
    return Evaluated(version=version, live_at_s=at_s, sent=int(at_s), phase=0, results=results)


SPANS = (
    PhaseSpan(
        name="first",
        start_s=0.0,
        end_s=100.0,
        start_sent=0,
        end_sent=100,
        live_at_start=0,
        live_at_end=2,
    ),
    PhaseSpan(
        name="second",
        start_s=100.0,
        end_s=200.0,
        start_sent=100,
        end_sent=200,
        live_at_start=2,
        live_at_end=3,
    ),
)
EVALUATED = (
    entry(0, 0.0, first=60, second=30),
    entry(1, 20.0, first=90, second=10),
    entry(2, 60.0, first=80, second=25),
    entry(3, 150.0, first=95, second=38),
)


class TestSummary:
    def test_each_phase_is_judged_by_what_was_live_in_it(self) -> None:
        first, second = summarize(SPANS, EVALUATED, "sum")
        rates = (first.base.rate, first.start.rate, first.best.rate, first.end.rate)
        assert rates == (0.60, 0.60, 0.90, 0.80)  # not 0.95: that came after the phase
        rates = (second.base.rate, second.start.rate, second.best.rate, second.end.rate)
        assert rates == (0.30, 0.25, 0.38, 0.38)

    def test_above_the_base_model_means_the_whole_interval(self) -> None:
        first, second = summarize(SPANS, EVALUATED, "sum")
        assert first.is_above_base
        assert not second.is_above_base  # 0.38, from 0.29 on
        assert first.is_risen
        assert second.is_risen

    def test_the_base_model_is_no_candidate_for_the_best_unless_it_was_live(self) -> None:
        spans = (replace(SPANS[1], live_at_start=1, live_at_end=1),)
        evaluated = [entry(0, 100.0, first=99), entry(1, 120.0, first=40)]
        spans = (replace(spans[0], name="first"),)
        (line,) = summarize(spans, evaluated, "sum")
        assert line.best.rate == 0.40

    def test_the_table_has_a_line_per_phase(self) -> None:
        lines = table(summarize(SPANS, EVALUATED, "per_token"), "per_token").splitlines()
        assert "per token" in lines[0]
        assert lines[2].split()[:6] == ["first", "100", "0.60", "0.60", "0.90", "0.80"]
        assert lines[2].endswith("above base")
        assert not lines[3].endswith("above base")


class TestPool:
    def report(self, path: Path, fold: int, **changes: Any) -> Path:
        lines = [asdict(line) for line in summarize(SPANS, EVALUATED, "sum")]
        report = {
            "stream": "text",
            "evaluation": {"share": 0.2, "fold": fold},
            "summary": {"sum": lines},
        }
        path.write_text(json.dumps(report | changes))
        return path

    def test_pairs_and_wins_of_the_runs_are_added_up(self, tmp_path: Path) -> None:
        few = [asdict(line) for line in summarize(SPANS, EVALUATED, "sum")]
        few[0] |= {"pairs": 300, "end": {"rate": 0.6, "low": 0.0, "high": 1.0}}
        paths = [
            self.report(tmp_path / "a.json", 0),
            self.report(tmp_path / "b.json", 3, summary={"sum": few}),
        ]
        first, second = pool(paths, "sum")
        assert first.name == "first"
        assert first.pairs == 400
        assert first.end == wilson(80 + 180, 400)
        assert first.base.rate == pytest.approx(0.6)
        assert first.is_above_base == (first.end.low > 0.6)
        # Three shares of eight in a hundred pairs are no proof; in two hundred they are.
        (_, alone) = pool(paths[:1], "sum")
        assert not alone.is_above_base
        assert second.pairs == 200
        assert second.is_above_base

    def test_the_curves_of_the_runs_are_added_up(self, tmp_path: Path) -> None:
        first, second = (within(span, p, EVALUATED, "sum") for p, span in enumerate(SPANS))
        assert first == ((0.0, 60.0), (0.2, 90.0), (0.6, 80.0))
        assert second == ((0.0, 25.0), (0.5, 38.0)), "what was live before is where it begins"
        report = {
            "phases": [asdict(span) for span in SPANS],
            "evaluated": [asdict(entry) for entry in EVALUATED],
        }
        reports = [json.loads(json.dumps(report))] * 3
        for name in ("a.svg", "b.svg"):
            plot_pool(tmp_path / "new" / name, "a title", reports, "sum")
        drawn = (tmp_path / "new" / "a.svg").read_bytes()
        assert drawn == (tmp_path / "new" / "b.svg").read_bytes()
        texts = {text.text for text in ElementTree.fromstring(drawn).iter() if text.text}
        assert {"a title", "first (n = 300)", "second (n = 300)"} <= texts

    def test_rows_that_were_held_out_twice_are_refused(self, tmp_path: Path) -> None:
        paths = [self.report(tmp_path / name, 1) for name in ("a.json", "b.json")]
        with pytest.raises(ConfigError, match="both held out fold 1"):
            pool(paths, "sum")

    @pytest.mark.parametrize(
        ("changes", "what"),
        [
            ({"stream": "persona"}, "stream"),
            ({"evaluation": {"share": 0.1, "fold": 1}}, "share"),
            ({"summary": {"sum": []}}, "phases"),
        ],
    )
    def test_runs_of_different_streams_are_refused(
        self, tmp_path: Path, changes: dict[str, Any], what: str
    ) -> None:
        paths = [
            self.report(tmp_path / "a.json", 0),
            self.report(tmp_path / "b.json", 1, **changes),
        ]
        with pytest.raises(ConfigError, match=f"its {what} is"):
            pool(paths, "sum")

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"evaluation": {}, "stream": "text"}'])
    def test_what_is_no_report_is_refused(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "a.json"
        path.write_text(text)
        with pytest.raises(ConfigError, match="no report of a drift run"):
            pool([path], "sum")
        with pytest.raises(ConfigError, match="no report of a drift run"):
            pool([tmp_path / "none.json"], "sum")


class TestPlot:
    def test_the_same_run_gives_the_same_file(self, tmp_path: Path) -> None:
        for name in ("a.svg", "b.svg"):
            plot(tmp_path / "new" / name, "a title", SPANS, EVALUATED, "sum")
        first = (tmp_path / "new" / "a.svg").read_bytes()
        assert first == (tmp_path / "new" / "b.svg").read_bytes()
        texts = {text.text for text in ElementTree.fromstring(first).iter() if text.text}
        assert {"a title", "first (n = 100)", "second (n = 100)", "events sent"} <= texts

    def test_a_version_asked_about_one_phase_only_is_drawn_there(self, tmp_path: Path) -> None:
        evaluated = [*EVALUATED, entry(4, 170.0, second=50)]
        plot(tmp_path / "a.svg", "", SPANS, evaluated, "implicit")
        assert (tmp_path / "a.svg").stat().st_size > 0

    def test_without_matplotlib_it_says_what_to_install(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ConfigError, match=r"cotune\[plots\]"):
            require_plots()


class Scored(NullRuntime):
    """Publishes a version after every so many events, and prefers what it was last told.

    Of a held-out row it knows the phase by its prompt; version n gets everything right from its
    own phase on, and the base model nothing.
    """

    def __init__(self, learning: NullLearning, *, every: int, **options: Any) -> None:
        super().__init__(learning=learning, **options)
        self.log = learning
        self.every = every
        self.asked: set[str | None] = set()
        self.seen: list[tuple[int, ...]] = []

    async def feedback(
        self, event: FeedbackEvent | Mapping[str, object], *, source: str = "local"
    ) -> Acknowledgement:
        acknowledgement = await super().feedback(event, source=source)
        if len(self.log.events) % self.every == 0:
            self.log.publish(gain=0.25)
        return acknowledgement

    async def score(
        self, prompt: Sequence[int], completion: Sequence[int], *, model: str | None = None
    ) -> tuple[float, ...]:
        self.asked.add(model)
        self.seen.append(tuple(prompt))
        assert model is not None
        version = int(model.rpartition("@")[2])
        is_chosen = len(completion) == len(b"Yes") + 1
        return (-1.0 if is_chosen == (version > 0) else -5.0,) * len(completion)


TURNS = TurnCodec(
    prompt=lambda messages: [ord(c) for c in messages[-1]["content"]],
    answer=lambda text: [*text.encode(), 0],
)


async def replay(runtime: Scored, stream: DriftStream, **settings: Any) -> dict[str, Any]:
    fast: dict[str, Any] = {
        "speed": None,
        "events_per_s": 2000.0,
        "settle_s": 30.0,
        "quiet_s": 0.0,
        "chat_per_s": 0.0,
    }
    async with runtime, serving(runtime) as server:
        run = DriftRun(runtime, server.url, stream, DriftSettings(**fast | settings), TURNS)
        return await run.run()


@pytest.fixture
def learning() -> NullLearning:
    return NullLearning(NullRuntime().served_name)


class TestRun:
    async def test_everything_but_the_held_out_rows_arrives(
        self, learning: NullLearning, tmp_path: Path
    ) -> None:
        stream = stream_of(tmp_path, (30, 30))
        runtime = Scored(learning, every=1000)
        report = await replay(runtime, stream, users=3)
        sent = {row.id for row in stream.sent}
        assert {id for _, id in learning.events} == sent
        assert {source for source, _ in learning.events} == {"user-0", "user-1", "user-2"}
        assert report["feedback"]["sent"] == report["feedback"]["acknowledged"] == len(sent)
        assert not report["feedback"]["refused"]

    async def test_versions_are_evaluated_on_the_held_out_rows(
        self, learning: NullLearning, tmp_path: Path
    ) -> None:
        stream = stream_of(tmp_path, (40, 40))
        runtime = Scored(learning, every=20)
        report = await replay(runtime, stream)
        assert runtime.asked >= {f"{learning.adapter}@0", f"{learning.adapter}@{learning.live}"}
        expected = {tuple(TURNS.prompt(row.prompt)) for part in stream.held_out for row in part}
        assert set(runtime.seen) == expected
        for line in report["summary"]["sum"]:
            assert line["base"]["rate"] == 0.0
            assert line["end"]["rate"] == 1.0
            assert line["is_above_base"]
        assert len(report["versions"]) == learning.live
        assert report["is_settled"]

    async def test_a_report_can_be_plotted_from_its_file(
        self, learning: NullLearning, tmp_path: Path
    ) -> None:
        report = await replay(Scored(learning, every=20), stream_of(tmp_path, (40, 40)))
        from_file = json.loads(json.dumps(report, allow_nan=False))
        spans, evaluated = curves(from_file)
        plot(tmp_path / "again.svg", "", spans, evaluated, "sum")
        assert [span.name for span in spans] == ["first", "second"]
        assert {entry.version for entry in evaluated} >= {0, learning.live}

    async def test_candidates_that_became_no_versions_are_told_of(
        self, learning: NullLearning, tmp_path: Path
    ) -> None:
        learning.leave_undecided("not_better")
        learning.leave_undecided("not_better")
        report = await replay(Scored(learning, every=1000), stream_of(tmp_path, (20,)))
        assert "0 refused; 2 candidates left undecided (not_better: 2)" in drift._words(report)

    async def test_chat_goes_on_meanwhile_and_is_timed(
        self, learning: NullLearning, tmp_path: Path
    ) -> None:
        runtime = Scored(learning, every=1000)
        report = await replay(
            runtime, stream_of(tmp_path, (40,)), events_per_s=200.0, chat_per_s=200.0, chat_tokens=5
        )
        chat = report["chat"]
        assert chat["requests"]["completed"] > 0
        assert set(chat["requests"]) == {"completed"}
        assert chat["ttft"]["all"]["n"] >= chat["requests"]["completed"]
        assert chat["tbt"]["all"]["n"] > 0

    async def test_refusals_are_counted_by_who_and_why(self, tmp_path: Path) -> None:
        learning = NullLearning(NullRuntime().served_name, quota_events=30)
        stream = stream_of(tmp_path, (40,))
        report = await replay(Scored(learning, every=1000), stream, flood=2)
        sent = len(stream.sent)
        assert report["feedback"]["refused_of_flood"] == {"quota_exceeded": 2 * sent - 30}
        assert report["feedback"]["refused"] == {"quota_exceeded": sent - 30} or sent <= 30

    async def test_it_waits_while_the_learner_is_behind(
        self, learning: NullLearning, tmp_path: Path
    ) -> None:
        ahead: list[int] = []

        class Slow(Scored):
            """Is busy with each event for some looks, and then has done everything."""

            looks = 0

            def learning(self) -> Any:
                events = len(self.log.events)
                self.looks = self.looks + 1 if events > sum(ahead) else 0
                is_idle = self.looks == 0 or self.looks > 3
                if is_idle and events > sum(ahead):
                    ahead.append(events - sum(ahead))
                self.log.fixed = AdapterLearning(
                    adapter=self.log.adapter,
                    phase="idle" if is_idle else "training",
                    pairs={"trained": events},
                )
                return super().learning()

        stream = stream_of(tmp_path, (40,))
        runtime = Slow(learning, every=1000)
        report = await replay(runtime, stream, max_ahead=8, events_per_s=1e6)
        assert report["waited_for_learner_s"] > 0.0
        assert len(learning.events) == len(stream.sent)
        assert max(ahead) <= 8

    async def test_a_learner_that_has_not_heard_of_what_was_sent_is_not_taken_for_done(
        self, learning: NullLearning, tmp_path: Path
    ) -> None:
        """It is idle all the while; what it counts is some looks behind, as on a busy machine."""
        ahead: list[int] = []

        class Unaware(Scored):
            known = 0
            looks = 0

            def learning(self) -> Any:
                events = len(self.log.events)
                ahead.append(events - self.known)
                self.looks = self.looks + 1 if events > self.known else 0
                if self.looks > 6:
                    self.known, self.looks = events, 0
                self.log.fixed = AdapterLearning(
                    adapter=self.log.adapter, pairs={"trained": self.known}
                )
                return super().learning()

        stream = stream_of(tmp_path, (40,))
        report = await replay(Unaware(learning, every=1000), stream, max_ahead=8, events_per_s=1e6)
        assert len(learning.events) == len(stream.sent)
        assert max(ahead) <= 8
        assert report["is_settled"]

    @pytest.mark.parametrize("max_ahead", [1000, 0])
    async def test_a_phase_ends_when_all_of_it_was_learned_unless_nobody_waits(
        self, learning: NullLearning, tmp_path: Path, max_ahead: int
    ) -> None:
        begun: list[int] = []

        class Slow(Scored):
            """Publishes once it has had a phase's events for some looks."""

            looks = 0

            async def feedback(self, event: Any, *, source: str = "local") -> Acknowledgement:
                begun.append(self.log.live)
                return await super().feedback(event, source=source)

            def learning(self) -> Any:
                events = len(self.log.events)
                is_new = events > self.known
                self.looks = self.looks + 1 if is_new else 0
                if self.looks > 20:
                    self.known = events
                    self.log.publish(gain=0.25)
                self.log.fixed = AdapterLearning(
                    adapter=self.log.adapter,
                    live_version=self.log.live,
                    phase="training" if events > self.known else "idle",
                    pairs={"trained": events},
                )
                return super().learning()

            known = 0

        stream = stream_of(tmp_path, (20, 20, 20))
        runtime = Slow(learning, every=1000)
        report = await replay(runtime, stream, max_ahead=max_ahead, events_per_s=1e6)
        lives = [(span["live_at_start"], span["live_at_end"]) for span in report["phases"]]
        if max_ahead:
            assert lives == [(0, 1), (1, 2), (2, 3)]
            assert report["waited_for_learner_s"] > 0.0
            # Nothing of a phase was sent before the one before had been learned.
            per_phase = [sum(row.phase == phase for row in stream.sent) for phase in range(3)]
            assert begun == [phase for phase, count in enumerate(per_phase) for _ in range(count)]
        else:
            assert report["waited_for_learner_s"] == 0.0

    async def test_a_learner_that_is_never_done_holds_no_phase_back_for_ever(
        self, learning: NullLearning, tmp_path: Path
    ) -> None:
        learning.fixed = AdapterLearning(adapter=learning.adapter, phase="training")
        stream = stream_of(tmp_path, (20, 20))
        report = await replay(Scored(learning, every=1000), stream, max_ahead=1000, settle_s=0.05)
        assert len(learning.events) == len(stream.sent)
        assert not report["is_settled"]

    async def test_a_learner_that_has_stopped_ends_the_run(
        self, learning: NullLearning, tmp_path: Path
    ) -> None:
        learning.fixed = AdapterLearning(adapter=learning.adapter, phase="stopped")
        with pytest.RaisesGroup(DriftError, flatten_subgroups=True):
            await replay(Scored(learning, every=1000), stream_of(tmp_path, (40,)), events_per_s=1.0)

    async def test_a_state_that_has_learned_before_is_refused(
        self, learning: NullLearning, tmp_path: Path
    ) -> None:
        learning.publish()
        with pytest.RaisesGroup(DriftError, flatten_subgroups=True):
            await replay(Scored(learning, every=1000), stream_of(tmp_path, (40,)))

    async def test_held_out_rows_beyond_the_context_are_left_out(
        self, learning: NullLearning, tmp_path: Path
    ) -> None:
        stream = stream_of(tmp_path, (40,))
        long = replace(stream.held_out[0][0], chosen="Yes" * 10_000)
        stream = replace(stream, held_out=((long, *stream.held_out[0][1:]),))
        report = await replay(Scored(learning, every=1000), stream)
        assert report["feedback"]["held_out_too_long"] == 1
        assert report["feedback"]["held_out"] == [len(stream.held_out[0]) - 1]


class TestCommand:
    def parse(self, *argv: str) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        drift.add_arguments(parser)
        return parser.parse_args(argv)

    @pytest.mark.parametrize(
        "flags",
        [
            ("--speed", "0"),
            ("--events-per-s", "-1"),
            ("--users", "0"),
            ("--flip", "1.5"),
            ("--flood", "-1"),
            ("--chat-per-s", "-1"),
            ("--chat-tokens", "0"),
            ("--evaluation-share", "1"),
            ("--evaluation-fold", "5"),
            ("--evaluation-fold", "-1"),
            ("--no-learning",),
        ],
    )
    def test_a_wrong_flag_is_named_before_anything_is_loaded(
        self, flags: tuple[str, ...], tmp_path: Path
    ) -> None:
        write(tmp_path / "drift_persona.jsonl.gz", [row(n) for n in range(40)])
        with pytest.raises(ConfigError, match=flags[0]):
            drift.run(self.parse("--data", str(tmp_path), *flags))

    def test_without_data_nothing_runs(self) -> None:
        with pytest.raises(ConfigError, match="--data is missing"):
            drift.run(self.parse())

    def test_pooling_prints_the_tables_and_runs_nothing(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lines = [asdict(line) for line in summarize(SPANS, EVALUATED, "sum")]
        for fold in range(2):
            report = {
                "stream": "text",
                "evaluation": {"share": 0.2, "fold": fold},
                "summary": dict.fromkeys(("sum", "per_token", "implicit"), lines),
                "phases": [asdict(span) for span in SPANS],
                "evaluated": [asdict(entry) for entry in EVALUATED],
            }
            (tmp_path / f"{fold}.json").write_text(json.dumps(report))
        files = [str(tmp_path / f"{fold}.json") for fold in range(2)]
        image = tmp_path / "pooled.svg"
        assert drift.run(self.parse("--pool", *files, "--plot", str(image))) == 0
        assert b"drift_text, 2 runs, each with other rows held out" in image.read_bytes()
        shown = capsys.readouterr().out
        assert shown.count("held-out win rate by") == 3
        assert shown.count("first                 200") == 3

    def test_an_error_for_people_is_found_in_a_group(self) -> None:
        told = DriftError("told")
        group = ExceptionGroup("", [ValueError(), ExceptionGroup("", [told])])
        assert drift._first_of(group) is told
        other = ValueError()
        assert drift._first_of(ExceptionGroup("", [other])) is other
