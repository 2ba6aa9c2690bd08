"""What breaks such systems, as benchmarks: each check changes one thing and shows what follows.

inflow      large prompts come all at once in the middle of the window: what the ordinary
            requests and training see before, during and after
gamma       two adapters learn, one from labels of which many are wrong: which is trained
            first, with the weight of the loss in the priority (gamma) at 0 and as it is
low-prefix  no two prompts have a beginning in common, beside the ordinary load
stale       the profile says that everything takes three times as long: how many iterations
            until predictions are as good again as with the right one
"""

from __future__ import annotations

import math
import random
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..policy.settings import PolicySettings
from ..runtime.errors import ConfigError
from .coserve_report import Found, as_json, latencies, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..policy.profile import Profile
    from ..runtime.scheduling.timeline import IterationRecord
    from .bench_coserve import Bench
    from .coserve_load import Feedback
    from .coserve_progress import Progress
    from .coserve_report import Latencies
    from .coserve_run import Outcome, RunPlan, RunResult

CHECKS: Final = ("inflow", "gamma", "low-prefix", "stale")

INFLOW: Final = 8
"""Prompts that come at once."""
AFTERWARDS_S: Final = 0.5
"""An inflow lasts until its last prompt has been computed, and so much longer."""
NOISY, CLEAN = "noisy", "clean"
"""The adapters of the check gamma."""
GAMMA_BACKLOG: Final = 12
"""Bursts that are there for them at once."""
GAMMA_EPOCHS: Final = 4
STALE_FACTOR: Final = 3.0
STALE_WINDOW: Final = 20
"""Iterations over which the prediction error is looked at."""
STALE_TOLERANCE: Final = 1.25
"""An error is back where it is at most so many times the right profile's."""
_LEARNED: Final = ("mace", "cotune")
"""Policies whose priority has a gamma."""
_PREDICTING: Final = ("cotune", "mace")
"""Policies that ask the cost model."""


def policies_of(name: str, bench: Bench) -> tuple[str, ...]:
    """The policies that a check is about, of those asked for.

    Raises:
        ConfigError: none of them.
    """
    about = {"gamma": _LEARNED, "stale": _PREDICTING}.get(name, bench.policies)
    chosen = tuple(policy for policy in bench.policies if policy in about)
    if not chosen:
        raise ConfigError(
            f"--check {name} is about {' and '.join(about)}, and --policies has neither; add one"
        )
    return chosen


def runs_of(name: str, bench: Bench) -> int:
    """How many runs a check takes."""
    rounds: int = bench.args.rounds
    return len(policies_of(name, bench)) * rounds * (1 if name == "inflow" else 2)


async def perform(name: str, bench: Bench, progress: Progress) -> Found:
    """Run a check."""
    match name:
        case "inflow":
            found = await _inflow(bench, progress)
        case "gamma":
            found = await _gamma(bench, progress)
        case "low-prefix":
            found = await _low_prefix(bench, progress)
        case "stale":
            found = await _stale(bench, progress)
        case _:
            raise AssertionError(f"{name} is not in CHECKS")
    return replace(found, report={"check": name} | dict(found.report))


# -- inflow --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Inflow:
    """What an inflow did to the ordinary requests, in milliseconds, and to training.

    Attributes:
        before, during, after: of the requests that came then.
        lasted_s: until all of its prompts were computed, and half a second more.
        its_ttft_p50, its_ttft_max: of the inflow's own requests.
        lost: of all requests, those that did not end.
        trained_before, trained_during: rows of backward quanta per second.
    """

    policy: str
    round: int
    before: Latencies
    during: Latencies
    after: Latencies
    lasted_s: float
    its_ttft_p50: float
    its_ttft_max: float
    lost: int
    trained_before: float
    trained_during: float


async def _inflow(bench: Bench, progress: Progress) -> Found:
    at_s = bench.args.warmup + bench.args.seconds / 3
    results = []
    for round_ in range(bench.args.rounds):
        extra = bench.inflow(at_s, INFLOW, round_)
        for policy in bench.rotated(policies_of("inflow", bench), round_):
            plan = bench.plan(policy, bench.rates[0], round_, label="inflow", extra=extra)
            results.append(await bench.perform(bench.config(policy), plan, progress))
    found = [inflow_of(result, at_s) for result in results]
    head = (
        f"{'policy':16}{'TBT p99 before':>15}{'during':>9}{'after':>9}{'longest':>9}"
        f"{'TTFT p99 before':>17}{'during':>9}{'after':>9}{'its TTFT':>10}{'lasted s':>10}"
        f"{'train':>8}{'during':>8}{'lost':>6}"
    )
    lines = [
        f"\n{INFLOW} prompts of {3 * bench.calibration.context // 4} tokens at once; ms, rows/s",
        head,
        *(
            f"{each.policy:16}{each.before.tbt_p99:15.1f}{each.during.tbt_p99:9.1f}"
            f"{each.after.tbt_p99:9.1f}{each.during.tbt_max:9.1f}{each.before.ttft_p99:17.0f}"
            f"{each.during.ttft_p99:9.0f}{each.after.ttft_p99:9.0f}{each.its_ttft_p50:10.0f}"
            f"{each.lasted_s:10.2f}{each.trained_before:8.0f}{each.trained_during:8.0f}"
            f"{each.lost:6}"
            for each in sorted(found, key=lambda each: bench.policies.index(each.policy))
        ),
    ]
    return Found(
        text="\n".join(lines), report={"inflow": [as_json(each) for each in found]}, results=results
    )


def inflow_of(result: RunResult, at_s: float) -> Inflow:
    """What an inflow at this time did."""
    extra = [outcome for outcome in result.outcomes if outcome.is_extra]
    computed_s = max(outcome.request.arrival_s + outcome.first_s for outcome in extra)
    end_s = computed_s + AFTERWARDS_S
    spans = ((-math.inf, at_s), (at_s, end_s), (end_s, math.inf))
    before, during, after = (
        latencies(
            [_within(outcome, *span) for outcome in result.measured if _is_in(outcome, *span)]
        )
        for span in spans
    )
    own = sorted(1e3 * outcome.first_s for outcome in extra)
    return Inflow(
        policy=result.plan.policy,
        round=result.plan.round,
        before=before,
        during=during,
        after=after,
        lasted_s=end_s - at_s,
        its_ttft_p50=statistics.median(own),
        its_ttft_max=own[-1],
        lost=sum(outcome.ending != "done" for outcome in result.outcomes),
        trained_before=_rows_per_s(result, result.plan.warmup_s, at_s),
        trained_during=_rows_per_s(result, at_s, end_s),
    )


def _is_in(outcome: Outcome, start_s: float, end_s: float) -> bool:
    """Whether it came, or had a token, between two moments."""
    arrival_s = outcome.request.arrival_s
    return arrival_s < end_s and outcome.ended_s >= start_s


def _within(outcome: Outcome, start_s: float, end_s: float) -> Outcome:
    """Of a request only the gaps that ended between two moments; its TTFT if it came then."""
    request = outcome.request
    if request.ttft_s is None:
        return outcome
    at_s = request.arrival_s + request.ttft_s
    gaps = []
    for gap_s in request.gaps_s:
        at_s += gap_s
        if start_s <= at_s < end_s:
            gaps.append(gap_s)
    return replace(outcome, request=replace(request, gaps_s=tuple(gaps)))


def _rows_per_s(result: RunResult, start_s: float, end_s: float) -> float:
    """Rows of backward quanta that ended between two moments, per second."""
    rows = sum(
        record.tokens
        for record in result.quanta
        if record.kind == "backward" and start_s <= record.ended_s < end_s
    )
    return rows / (end_s - start_s)


# -- gamma ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Gamma:
    """What was trained first.

    Attributes:
        gamma: the setting.
        noisy_first: of the first half of all optimizer steps, the share that were the noisy
            adapter's; one half where gamma makes no difference.
        steps: of the noisy and of the clean adapter within the load.
        latencies: of the requests meanwhile.
    """

    policy: str
    round: int
    gamma: float
    signal: str
    noisy_first: float
    steps: tuple[int, int]
    latencies: Latencies


async def _gamma(bench: Bench, progress: Progress) -> Found:
    policies = policies_of("gamma", bench)
    results: list[tuple[float, str, RunResult]] = []
    defaults = PolicySettings()
    for round_ in range(bench.args.rounds):
        for policy in bench.rotated(policies, round_):
            for gamma in (0.0, defaults.gamma):
                plan = bench.plan(
                    policy,
                    0.0,
                    round_,
                    label=f"gamma {gamma:g}",
                    models=(NOISY, CLEAN),
                    backlog=GAMMA_BACKLOG,
                    epochs=GAMMA_EPOCHS,
                )
                plan = replace(
                    plan, feedback=noisy_feedback(plan, bench.args.noisy, bench.args.seed)
                )
                config = bench.config(policy, settings=replace(defaults, gamma=gamma))
                training = replace(config.learning.training, epochs=GAMMA_EPOCHS)
                learning = replace(config.learning, adapters=(NOISY, CLEAN), training=training)
                result = await bench.perform(replace(config, learning=learning), plan, progress)
                results.append((gamma, defaults.training_signal, result))
    found = [gamma_of(result, gamma, signal) for gamma, signal, result in results]
    lines = [
        f"\n{bench.args.noisy:.0%} of the labels of {NOISY!r} are wrong; both have "
        f"{GAMMA_BACKLOG // 2} bursts to train on from the start, {GAMMA_EPOCHS} visits of each",
        f"{'policy':16}{'gamma':>6}{'noisy in the first half':>25}{'steps noisy/clean':>20}"
        f"{'TTFT p99':>10}{'TBT p99':>9}",
        *(
            f"{each.policy:16}{each.gamma:6g}{each.noisy_first:25.0%}"
            f"{f'{each.steps[0]}/{each.steps[1]}':>20}{each.latencies.ttft_p99:10.0f}"
            f"{each.latencies.tbt_p99:9.1f}"
            for each in found
        ),
    ]
    return Found(
        text="\n".join(lines),
        report={"gamma": [as_json(each) for each in found]},
        results=[result for *_, result in results],
    )


def noisy_feedback(plan: RunPlan, share: float, seed: int) -> Feedback:
    """The plan's feedback, with this share of the noisy adapter's labels turned round."""
    draw = random.Random(f"noise {seed}")
    pairs = [
        pair.turned_round()
        if plan.model_of(place // plan.burst) == NOISY and draw.random() < share
        else pair
        for place, pair in enumerate(plan.feedback.pairs)
    ]
    return replace(plan.feedback, pairs=tuple(pairs))


def gamma_of(result: RunResult, gamma: float, signal: str) -> Gamma:
    """Which adapter's steps came first."""
    steps = sorted(
        (at_s, name) for name in (NOISY, CLEAN) for at_s in result.steps_by_adapter.get(name, ())
    )
    first = [name for _, name in steps[: max(1, len(steps) // 2)]]
    return Gamma(
        policy=result.plan.policy,
        round=result.plan.round,
        gamma=gamma,
        signal=signal,
        noisy_first=sum(name == NOISY for name in first) / max(1, len(first)),
        steps=(
            sum(name == NOISY for _, name in steps),
            sum(name == CLEAN for _, name in steps),
        ),
        latencies=latencies(result.measured),
    )


# -- prompts with nothing in common ----------------------------------------------------------------


async def _low_prefix(bench: Bench, progress: Progress) -> Found:
    results = []
    for round_ in range(bench.args.rounds):
        for policy in bench.rotated(policies_of("low-prefix", bench), round_):
            for label, shared in (("as it is", bench.args.shared), ("nothing shared", 0.0)):
                plan = bench.plan(policy, bench.rates[0], round_, label=label, shared=shared)
                results.append(await bench.perform(bench.config(policy), plan, progress))
    summaries = bench.summarize(results)
    cached = {
        label: statistics.median(each.cached for each in summaries if each.label == label)
        for label in ("as it is", "nothing shared")
    }
    lines = [table(summaries), ""]
    lines += [
        f"{label}: {share:.1%} of prompt tokens came from the cache"
        for label, share in cached.items()
    ]
    report = {"cached": cached, "runs": [as_json(each) for each in summaries]}
    return Found(text="\n".join(lines), report=report, results=results)


# -- a stale profile -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Stale:
    """How long a wrong profile is felt.

    Attributes:
        right_error: median of |predicted - measured| / measured with the right profile, over the
            second half of its iterations.
        first_error: with the wrong one, over its first iterations.
        last_error: over the second half.
        recovered_after: iterations until the error was back; None: never.
        iterations: there were.
    """

    policy: str
    round: int
    right_error: float
    first_error: float
    last_error: float
    recovered_after: int | None
    iterations: int


async def _stale(bench: Bench, progress: Progress) -> Found:
    right = bench.profile
    results: list[RunResult] = []
    found: list[Stale] = []
    with tempfile.TemporaryDirectory(prefix="cotune-bench-") as directory:
        paths = {"right": Path(directory) / "right.json", "wrong": Path(directory) / "wrong.json"}
        write_profile(right, paths["right"])
        write_profile(scaled(right, STALE_FACTOR), paths["wrong"])
        for round_ in range(bench.args.rounds):
            for policy in bench.rotated(policies_of("stale", bench), round_):
                pair = {}
                for label, path in paths.items():
                    plan = bench.plan(policy, bench.rates[0], round_, label=f"{label} profile")
                    config = bench.config(policy, profile=str(path))
                    pair[label] = await bench.perform(config, plan, progress)
                results += pair.values()
                found.append(stale_of(pair["right"], pair["wrong"]))
    lines = [
        f"\na profile that is {STALE_FACTOR:g} times too slow",
        f"{'policy':16}{'error right':>12}{'first':>8}{'last':>8}{'back after':>12}{'of':>8}",
        *(
            f"{each.policy:16}{each.right_error:12.1%}{each.first_error:8.1%}"
            f"{each.last_error:8.1%}"
            f"{'never' if each.recovered_after is None else each.recovered_after:>12}"
            f"{each.iterations:8}"
            for each in found
        ),
    ]
    return Found(
        text="\n".join(lines), report={"stale": [as_json(each) for each in found]}, results=results
    )


def scaled(profile: Profile, factor: float) -> Profile:
    """A profile in which everything takes so many times as long."""
    costs = profile.costs
    seconds = {
        name: factor * value
        for name, value in costs._asdict().items()
        if name.endswith("_s") and isinstance(value, float)
    }
    kl_s, forward_s, backward_s = (factor * value for value in costs.per_row_s)
    rows = (kl_s, forward_s, backward_s)
    return replace(profile, costs=costs._replace(**seconds, per_row_s=rows))


def write_profile(profile: Profile, path: Path) -> None:
    """As ``--profile`` reads it."""
    from ..runtime.scheduling.profiles import write

    write(profile, path)


def stale_of(right: RunResult, wrong: RunResult) -> Stale:
    """How the predictions with a wrong profile came back to those with the right one."""
    right_errors = errors_of(right.iterations)
    wrong_errors = errors_of(wrong.iterations)
    usual = _median_of_second_half(right_errors)
    return Stale(
        policy=wrong.plan.policy,
        round=wrong.plan.round,
        right_error=usual,
        first_error=statistics.median(wrong_errors[:STALE_WINDOW] or [math.nan]),
        last_error=_median_of_second_half(wrong_errors),
        recovered_after=recovered_after(wrong_errors, STALE_TOLERANCE * usual),
        iterations=len(wrong_errors),
    )


def errors_of(iterations: Sequence[IterationRecord]) -> list[float]:
    """|predicted - measured| / measured of each that was predicted and did not fail."""
    return [
        abs(record.predicted_s - record.seconds) / record.seconds
        for record in iterations
        if record.predicted_s is not None and record.error is None and record.seconds > 0.0
    ]


def recovered_after(errors: Sequence[float], limit: float) -> int | None:
    """Iterations until the median error of the next `STALE_WINDOW` is at most `limit`."""
    for place in range(len(errors) - STALE_WINDOW + 1):
        if statistics.median(errors[place : place + STALE_WINDOW]) <= limit:
            return place
    return None


def _median_of_second_half(errors: Sequence[float]) -> float:
    rest = errors[len(errors) // 2 :]
    return statistics.median(rest) if rest else math.nan
