"""The command line of the co-serving benchmark, and the plans that it makes."""

from __future__ import annotations

import argparse
import json
import random
from typing import TYPE_CHECKING, Any

import pytest

from cotune.policy import POLICY_NAMES
from cotune.policy.costs import Costs
from cotune.policy.profile import Profile, ProfileKey
from cotune.policy.settings import PolicySettings
from cotune.runtime.errors import ConfigError
from cotune.runtime.scheduling import profiles
from cotune.tools import bench_coserve, coserve_checks
from cotune.tools.bench_coserve import Bench
from cotune.tools.coserve_checks import noisy_feedback, policies_of, runs_of, scaled
from cotune.tools.coserve_load import Feedback, Lengths, Pair, TextPool
from cotune.tools.coserve_log import read_logs
from cotune.tools.coserve_run import Calibration, RunPlan

if TYPE_CHECKING:
    from pathlib import Path

CALIBRATION = Calibration(
    ttft_s=0.02,
    tbt_s=0.002,
    decode_s=0.012,
    iteration_s=0.04,
    requests_per_s=20.0,
    context=256,
    served_name="tiny",
)


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_coserve.add_arguments(parser)
    return parser.parse_args(flags)


class Codec:
    """Characters are tokens."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [ord(letter) for letter in text]

    def encode_chat(self, messages: Any) -> list[int]:
        return self.encode(str(messages[0]["content"]), add_special_tokens=False)


def prepared(*flags: str) -> Bench:
    """As after the calibration, without a model."""
    bench = Bench(parse(*flags))
    bench._calibration = CALIBRATION
    bench._lengths = (Lengths(100, 40), Lengths(400, 80))
    bench._texts = TextPool(heads=((1,) * 64,), body=tuple(range(1000, 3000)))
    bench._codec = Codec()  # type: ignore[assignment]
    draw = random.Random(0)
    bench._pairs = [
        {
            "prompt": [{"role": "user", "content": f"{number} {draw.random()}"}],
            "chosen": "yes",
            "rejected": "no",
        }
        for number in range(4000)
    ]
    return bench


# -- flags ---------------------------------------------------------------------------------------


def test_everything_takes_a_quarter_of_an_hour_unless_told_otherwise() -> None:
    bench = Bench(parse())
    assert bench.policies == POLICY_NAMES
    assert bench.rates == (0.0, 0.1, 0.3, 0.5)
    assert 12 * 60 < bench.estimate_s < 16 * 60
    assert Bench(parse("--policies", "cotune", "--rates", "0.5")).estimate_s < 2 * 60


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rates", "1"], "is not a retrain rate"),
        (["--rates", "30"], "use 0 to 0.95, as in 0.3 for 30 %"),
        (["--load", "1.5"], "is not a share"),
        (["--seconds", "0"], "is not above 0"),
        (["--seconds", "long"], "is not a number"),
        (["--epochs", "0"], "is below 1"),
        (["--batch-size", "many"], "is not a whole number"),
        (["--policies", "best"], "invalid choice: 'best'"),
        (["--check", "all"], "invalid choice: 'all'"),
    ],
)
def test_a_wrong_flag_is_refused_with_what_to_use(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(*flags)
    assert words in capsys.readouterr().err


def test_policies_and_rates_that_are_named_twice_run_once() -> None:
    bench = Bench(parse("--policies", "cotune", "mace", "cotune", "--rates", "0.5", "0.50"))
    assert bench.policies == ("cotune", "mace")
    assert bench.rates == (0.5,)


def test_every_policy_is_first_once() -> None:
    orders = [Bench.rotated(("a", "b", "c"), turn) for turn in range(4)]
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


# -- what follows from them ----------------------------------------------------------------------


def test_targets_follow_from_the_calibration_unless_given() -> None:
    targets = prepared().targets
    assert targets.ttft_s == pytest.approx(0.2)
    assert targets.tbt_s == pytest.approx(0.06)
    targets = prepared("--ttft-target-ms", "500", "--tbt-target-ms", "50").targets
    assert (targets.ttft_s, targets.tbt_s) == (0.5, 0.05)


def test_the_load_is_a_share_of_what_can_be_done() -> None:
    assert prepared("--load", "0.25").requests_per_s == 5.0
    assert prepared("--requests-per-s", "7").requests_per_s == 7.0


def test_every_runtime_has_the_same_settings_but_the_policy() -> None:
    bench = prepared("--seconds", "8", "--batch-size", "4", "--epochs", "3")
    config = bench.config("cotune")
    config.validate()
    assert bench.config("synchronous").schedule.policy == "synchronous"
    assert config.schedule.ttft_target_s == pytest.approx(0.2)
    assert config.schedule.tbt_target_s == pytest.approx(0.06)
    assert config.schedule.settings == PolicySettings(periodic_window_s=2.0)
    assert config.lanes.inference_threads == 1
    training = config.learning.training
    assert (training.threads, training.batch_size, training.epochs) == (1, 4, 3)
    assert training.replay_share == 0.0
    # Nothing is judged, so nothing is published.
    assert config.learning.gate.min_held_out > config.learning.training.buffer_size
    other = bench.config("cotune", settings=PolicySettings(gamma=0.0), profile="off")
    assert other.schedule.settings == PolicySettings(gamma=0.0, periodic_window_s=2.0)
    assert other.schedule.profile == "off"


def test_all_policies_of_a_round_get_the_same_load() -> None:
    bench = prepared("--load", "0.5", "--seconds", "20")
    one, other = bench.plan("cotune", 0.5, 0), bench.plan("mace", 0.5, 0)
    assert one.arrivals == other.arrivals
    assert one.bursts_s == other.bursts_s
    assert one.feedback == other.feedback
    assert bench.plan("cotune", 0.5, 1).arrivals != one.arrivals
    # Requests are the same at every rate; the feedback is what differs.
    assert bench.plan("cotune", 0.1, 0).arrivals == one.arrivals


def test_a_plan_has_the_feedback_that_makes_its_retrain_rate() -> None:
    plan = prepared("--load", "0.5", "--seconds", "20").plan("cotune", 0.5, 0)
    requests = sum(arrival.at_s >= plan.warmup_s for arrival in plan.arrivals)
    visits = sum(at_s >= plan.warmup_s for at_s in plan.bursts_s) * plan.burst * plan.epochs
    assert visits / (visits + requests) == pytest.approx(0.5, abs=0.03)
    assert len(plan.feedback.pairs) == plan.bursts * plan.burst
    assert len(plan.feedback.primers) == plan.bursts == 1 + len(plan.bursts_s)
    assert plan.pairs_of(1) == plan.feedback.pairs[plan.burst : 2 * plan.burst]


def test_bursts_before_and_after_the_beginning_go_round_the_models() -> None:
    plan = prepared().plan("cotune", 0.0, 0, models=("a", "b"), backlog=3)
    assert plan.bursts == 5
    assert [plan.model_of(burst) for burst in range(5)] == ["a", "b", "a", "b", "a"]


# -- checks --------------------------------------------------------------------------------------


def test_a_check_runs_the_policies_that_it_is_about() -> None:
    bench = Bench(parse("--check", "gamma", "--rounds", "2"))
    assert policies_of("gamma", bench) == ("cotune", "mace")
    assert runs_of("gamma", bench) == 8
    bench = Bench(parse("--check", "inflow", "--rounds", "1"))
    assert policies_of("inflow", bench) == POLICY_NAMES
    assert runs_of("inflow", bench) == 6
    bench = Bench(parse("--check", "gamma", "--policies", "continuous"))
    with pytest.raises(ConfigError, match="--policies has neither"):
        policies_of("gamma", bench)


def test_only_labels_of_the_noisy_adapter_are_turned_round() -> None:
    pairs = tuple(
        Pair(({"role": "user", "content": str(number)},), "yes", "no", 5) for number in range(40)
    )
    plan = RunPlan(
        label="",
        policy="cotune",
        rate=0.0,
        round=0,
        arrivals=(),
        bursts_s=(),
        feedback=Feedback((), pairs),
        burst=10,
        epochs=1,
        warmup_s=1.0,
        seconds=1.0,
        models=("noisy", "clean"),
        backlog=2,
    )
    wrong = [pair.chosen == "no" for pair in noisy_feedback(plan, 1.0, seed=0).pairs]
    assert wrong == [True] * 10 + [False] * 10 + [True] * 10 + [False] * 10
    half = sum(pair.chosen == "no" for pair in noisy_feedback(plan, 0.5, seed=0).pairs)
    assert 3 < half < 17
    assert noisy_feedback(plan, 0.0, seed=0) == plan.feedback


def test_a_profile_that_is_wrong_says_that_everything_takes_longer(tmp_path: Path) -> None:
    costs = Costs(1.0, 2.0, 3.0, 4.0, 5.0, per_row_s=(1.0, 2.0, 3.0), margin=1.5, step_s=7.0)
    key = ProfileKey(model="m", fingerprint="f", device="d", dtype="float32", threads=1)
    right = Profile(key=key, costs=costs, created="2026-01-01T00:00:00+00:00")
    wrong = scaled(right, 3.0)
    assert wrong.costs.base_s == 3.0
    assert wrong.costs.per_attention_s == 15.0
    assert wrong.costs.per_row_s == (3.0, 6.0, 9.0)
    assert wrong.costs.step_s == 21.0
    assert wrong.costs.margin == 1.5
    coserve_checks.write_profile(wrong, tmp_path / "wrong.json")
    assert profiles.read(tmp_path / "wrong.json") == wrong


def test_without_a_kept_profile_the_check_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME"):
        _ = prepared().profile


# -- all of it -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_short_run_measures_and_records_every_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_coserve, "CALIBRATION_REQUESTS", 40)
    monkeypatch.setattr(bench_coserve, "ALONE_BURSTS", 4)
    output = tmp_path / "coserve.json"
    flags = "--policies inference-only continuous --rates 0.5 --rounds 1 --seconds 1 --warmup 0.5"
    load = "--requests-per-s 8 --scale-tokens 0.05 --batch-size 2 --epochs 1"
    args = parse(*flags.split(), *load.split(), "--output", str(output))
    assert bench_coserve.run(args) == 0
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("50%: ") for line in printed)
    result = json.loads(printed[-1])
    assert result["calibration"]["requests_per_s"] > 0
    report = json.loads(output.read_text())
    by_policy = {entry["policy"]: entry for entry in report["runs"]}
    assert set(by_policy) == {"inference-only", "continuous"}
    assert by_policy["inference-only"]["steps"] == 0
    assert by_policy["continuous"]["of_alone"] > 0
    served, trained = read_logs(output)
    assert [each.arrival_s for each in served.requests] == [
        each.arrival_s for each in trained.requests
    ]
    assert all(each.output_tokens == len(each.gaps_s) + 1 for each in trained.requests)
    assert trained.samples == served.samples
    assert trained.trained_tokens > served.trained_tokens == 0
