from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cotune.policy.costs import CostModel, Costs, IterationShape
from cotune.policy.profile import Profile, ProfileKey
from cotune.tools.cli import main
from cotune.tools.coserve_log import (
    CoserveLog,
    LoggedBudgets,
    LoggedRequest,
    LoggedSample,
    LoggedTraining,
    Targets,
    read_logs,
    write_logs,
)
from cotune.tools.simulation_run import Witness
from cotune.tools.simulation_scenarios import iterations_to_recover

if TYPE_CHECKING:
    from pathlib import Path

COSTS = Costs(
    base_s=1.0, per_decode_s=0.5, per_context_s=0.0, per_token_s=0.125, per_attention_s=0.0,
    interference=2.0, quantum_interference=4.0, per_row_s=(0.25, 0.25, 0.5), quantum_base_s=1.0,
    step_s=3.0,
)  # fmt: skip
FAST = COSTS._replace(
    base_s=2e-3, per_decode_s=2e-4, per_token_s=1e-4, interference=1.3, quantum_interference=1.2,
    per_row_s=(1e-4, 1e-4, 2e-4), quantum_base_s=1e-3, step_s=4e-3,
)  # fmt: skip


def profile_of(costs: Costs, *, is_estimated: bool = False) -> Profile:
    key = ProfileKey(model="tiny", fingerprint="f", device="slate", dtype="float32", threads=1)
    return Profile(key=key, costs=costs, created="2026-01-01", is_estimated=is_estimated)


@pytest.fixture
def slate(tmp_path: Path) -> str:
    """A device on which an iteration takes a second and more."""
    path = tmp_path / "slate.json"
    path.write_text(json.dumps(profile_of(COSTS).to_dict()), encoding="utf-8")
    return str(path)


@pytest.fixture
def quick(tmp_path: Path) -> str:
    """A device for scenarios."""
    path = tmp_path / "quick.json"
    path.write_text(json.dumps(profile_of(FAST).to_dict()), encoding="utf-8")
    return str(path)


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.csv"
    path.write_text(
        "arrival_s,input_tokens,output_tokens\n0,8,3\n60,24,2\n30,8,1\n", encoding="utf-8"
    )
    return str(path)


def cells(output: str, name: str) -> list[str]:
    """What a table has under its headings in the row of this name."""
    (line,) = (line for line in output.splitlines() if line.startswith(f"{name} "))
    return line.removeprefix(name).split()


# -- replaying ------------------------------------------------------------------------------------


def test_a_trace_is_replayed_and_its_percentiles_printed(
    trace: str, slate: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.json"
    status = main(
        ["simulate", "--trace", trace, "--profile", slate, "--policy", "inference-only",
         "--retrain-rate", "0", "--ttft-target-ms", "3000", "--tbt-target-ms", "1500",
         "--output", str(output)]
    )  # fmt: skip
    printed = capsys.readouterr()
    assert status == 0
    assert "1 of 3 requests came before the one above them" in printed.err
    assert "tiny on slate, float32 (measured)" in printed.out
    row = cells(printed.out, "inference-only")
    # TTFT 2, 2 and 4 s; gaps 1.5 s each; two of three in time, within 65.5 s.
    assert row[:4] == ["2000/3600/3960", "1500/1500/1500", "66.7", "0.03"]
    report = json.loads(output.read_text(encoding="utf-8"))
    summary = report["policies"]["inference-only"]
    assert summary["ttft"] == {"p50": 2.0, "p90": 3.6, "p99": pytest.approx(3.96), "n": 3}
    assert summary["duration_s"] == 65.5
    assert report["trace"]["requests"] == 3


def test_training_is_measured_against_what_serving_leaves(
    trace: str, slate: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.json"
    status = main(
        ["simulate", "--trace", trace, "--profile", slate, "--policy", "continuous",
         "--retrain-rate", "0.5", "--batch-size", "1", "--batch-wait-s", "0",
         "--sample-tokens", "4", "--output", str(output)]
    )  # fmt: skip
    assert status == 0
    report = json.loads(output.read_text(encoding="utf-8"))
    assert list(report["policies"]) == ["inference-only", "continuous"]
    serving = report["policies"]["inference-only"]
    training = report["policies"]["continuous"]
    assert serving["trained_tokens_per_s"] == 0.0
    assert serving["busy"] == pytest.approx((5.0 + 2.0 + 5.5) / 65.5)
    # Alone: 4 rows in 2 s forward, 3 s backward and 3 s for the step.
    assert training["training_alone_tokens_per_s"] == 0.5
    assert training["of_idle"] == pytest.approx(
        training["trained_tokens_per_s"] / (0.5 * (1.0 - serving["busy"]))
    )
    assert cells(capsys.readouterr().out, "continuous")


def test_all_policies_run_side_by_side(
    trace: str, slate: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "--trace", trace, "--profile", slate, "--policy", "all"]) == 0
    printed = capsys.readouterr().out
    for name in ("cotune", "mace", "inference-only", "periodic", "synchronous", "continuous"):
        assert cells(printed, name)


def test_an_estimated_device_is_said_to_be_one(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "guess.json"
    path.write_text(json.dumps(profile_of(COSTS, is_estimated=True).to_dict()), encoding="utf-8")
    assert main(["simulate", "--trace", trace, "--profile", str(path), "--limit-s", "1"]) == 0
    assert "(ESTIMATED, not measured)" in capsys.readouterr().out


# -- scenarios ------------------------------------------------------------------------------------


def scenario(name: str, quick: str, tmp_path: Path, *more: str) -> dict[str, Any]:
    output = tmp_path / "out.json"
    status = main(
        ["simulate", "--scenario", name, "--profile", quick, "--output", str(output), *more]
    )
    assert status == 0
    report: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    assert report["scenario"] == name
    return report


def test_an_inflow_is_seen_by_the_others(quick: str, tmp_path: Path) -> None:
    report = scenario("inflow", quick, tmp_path, "--policy", "inference-only")
    found = report["policies"]["inference-only"]
    assert found["with"]["requests"] == found["without"]["requests"] > 10
    assert found["with"]["ttft"]["p99"] > 2 * found["without"]["ttft"]["p99"]


def test_prompts_that_are_unlike_find_nothing_cached(quick: str, tmp_path: Path) -> None:
    report = scenario("low-prefix", quick, tmp_path, "--policy", "inference-only")
    shared, unlike = report["variants"].values()
    assert shared["cached_share"] > 0.4
    assert unlike["cached_share"] == 0.0
    assert unlike["ttft"]["p50"] > shared["ttft"]["p50"]


def test_gamma_is_varied(quick: str, tmp_path: Path) -> None:
    report = scenario("gamma", quick, tmp_path, "--policy", "mace", "--set", "gamma=2")
    assert list(report["variants"]) == ["mace gamma=0", "mace gamma=2", "mace gamma=8"]


def test_a_stale_profile_is_recovered_from_where_costs_are_learned(
    quick: str, tmp_path: Path
) -> None:
    report = scenario("stale", quick, tmp_path, "--policy", "cotune")
    learning, profiled = report["variants"].values()
    assert learning["iterations_to_recover"] <= 200
    assert profiled["iterations_to_recover"] is None


def test_recovery_is_when_the_error_stays_small() -> None:
    assert iterations_to_recover([0.0] * 30) == 0
    assert iterations_to_recover([0.5] * 30) is None
    assert iterations_to_recover([0.0] * 10) is None
    # With 10 bad ones among the last 20 the median is halfway; with 9 it is small.
    assert iterations_to_recover([0.5] * 40 + [0.0] * 40) == 50


def test_a_witness_compares_each_iteration_with_what_was_believed_before() -> None:
    witness = Witness(None, COSTS)
    now_s = 1.0
    witness.clock = lambda: now_s
    shape = IterationShape(2, 0, 0, 0, 0)
    witness.observe_iteration(shape, 4.0, beside_training=0.0)
    now_s = 2.0
    witness.observe_iteration(shape, 4.0, beside_training=1.0)
    assert witness.errors_after(0.0) == [0.5, 0.0]
    assert witness.errors_after(1.0) == [0.0]
    learning = Witness(CostModel(profile_of(COSTS)), COSTS)
    for _ in range(100):
        learning.observe_iteration(shape, 4.0, beside_training=0.0)
    assert learning.costs.iteration_s(shape) == pytest.approx(4.0, rel=0.05)


# -- beside live runs -----------------------------------------------------------------------------


def log(**changes: Any) -> CoserveLog:
    """A run as the device of `slate` would have it."""
    made = CoserveLog(
        policy="inference-only",
        targets=Targets(ttft_s=2.5, tbt_s=1.5),
        budgets=LoggedBudgets(tokens=64, sequences=8, page_size=4),
        pages=64,
        duration_s=34.0,
        requests=(
            LoggedRequest(
                arrival_s=0.0, prompt_tokens=12, cached_tokens=4, output_tokens=3, ttft_s=2.0,
                gaps_s=(1.5, 1.5),
            ),
            LoggedRequest(arrival_s=32.0, prompt_tokens=8, output_tokens=1, ttft_s=1.6),
            # One that was refused, or given up before it had a token: nothing to compare.
            LoggedRequest(arrival_s=32.0, prompt_tokens=60, output_tokens=0),
        ),
        costs=COSTS._asdict(),
    )  # fmt: skip
    return replace(made, **changes)


def test_a_live_run_is_replayed_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = tmp_path / "coserve.json", tmp_path / "out.json"
    write_logs(path, [log(), log(round=1)], {"command": "bench coserve"})
    assert main(["simulate", "--compare", str(path), "--output", str(output)]) == 0
    report = json.loads(output.read_text(encoding="utf-8"))
    (compared,) = report["compared"]
    assert compared["runs"] == 2
    errors = {entry["name"]: entry["error"] for entry in compared["percentiles"]}
    # Simulated 2.0 and 2.0 s; live 2.0 and 1.6.
    assert errors["TTFT p50"] == pytest.approx(2.0 / 1.8 - 1.0)
    assert errors["TTFT p99"] == errors["TBT p50"] == errors["TBT p99"] == 0.0
    assert report["most_error"] == pytest.approx(2.0 / 1.8 - 1.0)
    assert "error of a percentile: median 0%, most 11%, of 6" in capsys.readouterr().out


def test_logs_survive_the_file(tmp_path: Path) -> None:
    written = [
        log(
            policy="cotune", retrain_rate=0.3, settings={"gamma": 0.0}, training=LoggedTraining(),
            samples=(LoggedSample(arrival_s=0.5, tokens=9),), targets=Targets(tbt_s=0.5),
        ),
        log(costs=None),
    ]  # fmt: skip
    path = tmp_path / "logs.json"
    write_logs(path, written)
    read = read_logs(path)
    read = [
        replace(entry, costs=entry.costs and entry.costs | {"per_row_s": COSTS.per_row_s})
        for entry in read
    ]
    assert read == written
    assert read[0].targets.ttft_s == math.inf


def test_one_log_alone_is_a_file_as_well(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_text(json.dumps(log().to_dict()), encoding="utf-8")
    assert len(read_logs(path)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, 'logs\\[0\\]: not a co-serving log: "format" is not'),
        ({"version": 99}, '"version" of the log is 99, and this release reads 1'),
        ({"surprise": 1}, "the log has the unknown field 'surprise'"),
        ({"budgets": {"tokens": 3}}, "budgets is incomplete"),
        ({"targets": None}, "targets is None, not an object"),
        ({"requests": [{"arrival_s": -1.0, "prompt_tokens": 1, "output_tokens": 1}]},
         r"requests\[0\].arrival_s is -1.0; it must be a number of 0 or more"),
        ({"requests": [{"arrival_s": 1.0, "prompt_tokens": 4, "cached_tokens": 4,
                        "output_tokens": 1}]}, r"cached_tokens is 4, and the prompt has only 4"),
        ({"requests": [{"arrival_s": 1.0, "prompt_tokens": 4, "output_tokens": 1,
                        "gaps_s": [None]}]}, r"requests\[0\].gaps_s is None"),
        ({"samples": [{"arrival_s": 1.0, "tokens": 0}]}, r"samples\[0\].tokens is 0"),
    ],
)  # fmt: skip
def test_logs_that_are_wrong_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "log.json"
    path.write_text(json.dumps({"logs": [log().to_dict() | change]}), encoding="utf-8")
    with pytest.raises(Exception, match=message):
        read_logs(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"policy": "oracle"},
            "\"policy\" of the log is 'oracle', which this release does not have",
        ),
        ({"settings": {"delta": 1.0}}, "delta: no such setting of a policy; use some of gamma,"),
        ({"costs": None}, 'the log has no "costs"; say with --profile'),
    ],
)
def test_a_log_that_cannot_be_replayed_is_refused_with_a_remedy(
    tmp_path: Path, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.json"
    write_logs(path, [log(**change)])
    assert main(["simulate", "--compare", str(path)]) == 2
    assert message in capsys.readouterr().err


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "say what to simulate"),
        (["--trace", "T"], "--profile is missing"),
        (["--trace", "T", "--profile", "nowhere"], "--profile nowhere cannot be read"),
        (["--trace", "T", "--profile", "T"], "is not JSON"),
        (["--trace", "T", "--profile", "P", "--policy", "best"], "--policy is 'best'; use all"),
        (["--trace", "T", "--profile", "P", "--retrain-rate", "1"], "--retrain-rate is 1; use"),
        (["--trace", "T", "--profile", "P", "--pages", "0"], "--pages is 0; use 1 or more"),
        (["--trace", "T", "--profile", "P", "--tbt-target-ms", "1000"],
         "schedule.tbt_target_s is 1 s, but a decode alone takes 1.5 s on this device"),
        (["--trace", "T", "--profile", "P", "--ttft-target-ms", "nan"], "schedule.ttft_target_s"),
        (["--trace", "T", "--profile", "P", "--set", "gamma"], "use NAME=VALUE with one of"),
        (["--trace", "T", "--profile", "P", "--set", "gamma=x"], "'x' is no float"),
        (["--trace", "T", "--profile", "P", "--set", "gamma=-1"], "gamma"),
        (["--scenario", "gamma", "--profile", "P", "--policy", "periodic"], "use --policy all"),
        (["--trace", "T", "--profile", "P", "--scale-tokens", "0"], "--scale-tokens is 0"),
        (["--trace", "T", "--compare", "T"], "--compare replays what was measured"),
        (["--compare", "T"], "is not JSON"),
        (["--trace", "T", "--profile", "P", "--output", "/nowhere/at/all"], "cannot be written"),
    ],
)  # fmt: skip
def test_wrong_flags_are_refused_with_a_remedy(
    flags: list[str], message: str, trace: str, slate: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"T": trace, "P": slate}
    assert main(["simulate", *(names.get(flag, flag) for flag in flags)]) == 2
    assert message in capsys.readouterr().err
