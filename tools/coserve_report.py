"""What co-serving runs come to: percentiles, attainment, goodput, training; tables and a plot.

    of a run     TTFT, TBT      of the ordinary requests that came within the window
                 attained       share of them that ended, had their first token in time, and of
                                whose gaps 99 in 100 kept the target (`attained_mean`: their mean)
                 goodput        those per second
                 busy           share of the window in which the inference lane had an iteration
                 plan           share of the iterations that was observing, planning and preparing
                 decide         the decision of the policy alone, with what it sees put together
    of training  rows           tokens of forward and backward quanta, each counted half
                 of alone       rows per second / those with nothing beside it and no end of work
                 of asked       rows / those of the feedback that was given in the window
                 of idle        of alone / (1 - busy of `inference-only` on the same load)
                 of possible    rows per second / the lesser of what was asked and what idle
                                capacity allows: alone * (1 - busy of `inference-only`)

A request that was given up counts its wait as time to first token, which it was at least. Values
only; nothing here runs a model.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from .bench_report import show
from .coserve_log import quantile
from .coserve_run import trained_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from _typeshed import DataclassInstance

    from .coserve_log import Targets
    from .coserve_run import Outcome, RunResult

LONG_FACTOR: Final = 10.0
"""A gap is long where it is so many times the median one."""
KEPT_GAPS: Final = 20
"""Long gaps that a report tells one by one."""
OVERLAP: Final = 0.05
"""Least share of a gap that an iteration ran in it to count."""
PREFILL_CAUSE_TOKENS: Final = 128
"""Prompt tokens of an iteration from which on a long gap is put down to them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """Percentiles in milliseconds; NaN where there is nothing."""

    ttft_p50: float
    ttft_p99: float
    tbt_p50: float
    tbt_p99: float
    tbt_max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LongGap:
    """A gap between two tokens, and what ran then.

    Attributes:
        at_s: when it ended, since the beginning of the load.
        gap_ms: how long it was.
        cause: "pause" (no iteration for most of it), "prefill", "beside training" or "other".
        iterations: that ran in it, for a twentieth of it at least.
        longest_ms: of these iterations.
        prefill_tokens: the most that one of them held.
        quanta: that ran meanwhile, by kind.
        marks: what else happened, by name.
    """

    at_s: float
    gap_ms: float
    cause: str
    iterations: int
    longest_ms: float
    prefill_tokens: int
    quanta: Mapping[str, int]
    marks: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A run in numbers; see the module. None: there was nothing to divide by, or it is not known.

    `training` are rows per second, `asked` those that the feedback in the window asks for.
    """

    label: str
    policy: str
    rate: float
    round: int
    requests: int
    endings: Mapping[str, int]
    latencies: Latencies
    attained: float
    attained_mean: float
    goodput: float
    answer_tokens_per_s: float
    cached: float
    busy: float
    planning: float | None
    deciding: float | None
    iterations: int
    preemptions: int
    steps: int
    training: float
    asked: float
    asked_rate: float
    of_alone: float | None
    of_asked: float | None
    of_idle: float | None
    of_possible: float | None
    held: float
    quanta: Mapping[str, int]
    long_gaps: int
    long_gap_causes: Mapping[str, int]
    longest_gaps: tuple[LongGap, ...]
    prediction_error: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a benchmark or a check found.

    Attributes:
        text: for people.
        report: for programs.
        results: the runs.
        summaries: of the runs that a plot shows.
    """

    text: str
    report: dict[str, Any]
    results: Sequence[RunResult]
    summaries: Sequence[Summary] = ()


# -- one run -------------------------------------------------------------------------------------


def latencies(outcomes: Sequence[Outcome]) -> Latencies:
    """Percentiles of some requests."""
    firsts = sorted(1e3 * outcome.first_s for outcome in outcomes)
    gaps = sorted(1e3 * gap_s for outcome in outcomes for gap_s in outcome.request.gaps_s)
    return Latencies(
        ttft_p50=_quantile(firsts, 0.5),
        ttft_p99=_quantile(firsts, 0.99),
        tbt_p50=_quantile(gaps, 0.5),
        tbt_p99=_quantile(gaps, 0.99),
        tbt_max=gaps[-1] if gaps else math.nan,
    )


def _quantile(ordered: list[float], share: float) -> float:
    return quantile(ordered, share) if ordered else math.nan


def attains(outcome: Outcome, targets: Targets) -> bool:
    """Whether a request ended and kept its targets, 99 of 100 gaps counted."""
    return outcome.ending == "done" and outcome.request.attains(targets)


def attains_mean(outcome: Outcome, targets: Targets) -> bool:
    """The same with the mean of its gaps (TPOT)."""
    request = outcome.request
    if outcome.ending != "done" or request.ttft_s is None or request.ttft_s > targets.ttft_s:
        return False
    return not request.gaps_s or statistics.fmean(request.gaps_s) <= targets.tbt_s


def summarize(
    result: RunResult,
    targets: Targets,
    *,
    idle_busy: float | None = None,
    alone: float | None = None,
) -> Summary:
    """A run in numbers.

    Args:
        result: of the run.
        targets: for TTFT and gaps.
        idle_busy: `busy` of the policy `inference-only` on the same load.
        alone: training rows per second with nothing beside it.
    """
    plan, usage, outcomes = result.plan, result.usage, result.measured
    count = max(1, len(outcomes))
    good = sum(attains(outcome, targets) for outcome in outcomes)
    prompts = sum(outcome.request.prompt_tokens for outcome in outcomes)
    cached = sum(outcome.request.cached_tokens for outcome in outcomes)
    training = trained_rows(result.quanta, plan.warmup_s, plan.total_s) / plan.seconds
    asked = result.asked_tokens / plan.seconds
    of_alone = training / alone if alone else None
    idle = None if idle_busy is None else max(0.0, 1.0 - idle_busy)
    possible = asked if alone is None or idle is None else min(asked, alone * idle)
    gaps = long_gaps(result)
    return Summary(
        label=plan.label,
        policy=plan.policy,
        rate=plan.rate,
        round=plan.round,
        requests=len(outcomes),
        endings=Counter(outcome.ending for outcome in outcomes),
        latencies=latencies(outcomes),
        attained=good / count,
        attained_mean=sum(attains_mean(outcome, targets) for outcome in outcomes) / count,
        goodput=good / plan.seconds,
        answer_tokens_per_s=usage.generated_tokens / usage.wall_s,
        cached=cached / max(1, prompts),
        busy=usage.busy,
        planning=usage.planning,
        deciding=usage.deciding,
        iterations=usage.iterations,
        preemptions=usage.preemptions,
        steps=usage.steps,
        training=training,
        asked=asked,
        asked_rate=result.asked_visits / max(1, result.asked_visits + len(outcomes)),
        of_alone=of_alone,
        of_asked=training / asked if asked else None,
        of_idle=of_alone / idle if of_alone is not None and idle else None,
        of_possible=training / possible if possible else None,
        held=usage.held_s / usage.wall_s,
        quanta=dict(usage.quanta),
        long_gaps=len(gaps),
        long_gap_causes=Counter(gap.cause for gap in gaps),
        longest_gaps=tuple(sorted(gaps, key=lambda gap: -gap.gap_ms)[:KEPT_GAPS]),
        prediction_error=result.schedule.prediction_error_p50,
    )


def long_gaps(result: RunResult, factor: float = LONG_FACTOR) -> list[LongGap]:
    """Gaps of more than `factor` times the median of the run, and what ran then."""
    gaps = [gap for outcome in result.measured for gap in outcome.request.gaps_s]
    if not gaps:
        return []
    limit_s = factor * statistics.median(gaps)
    found = []
    for outcome in result.measured:
        if outcome.request.ttft_s is None:
            continue
        at_s = outcome.request.arrival_s + outcome.request.ttft_s
        for gap_s in outcome.request.gaps_s:
            at_s += gap_s
            if gap_s > limit_s:
                found.append(_explain(result, at_s - gap_s, at_s))
    return found


def _explain(result: RunResult, start_s: float, end_s: float) -> LongGap:
    """What ran between two moments."""
    iterations = result.iterations
    first = bisect.bisect_right(iterations, start_s, key=lambda record: record.ended_s)
    during = []
    working_s = 0.0
    for record in iterations[first:]:
        if record.started_s >= end_s:
            break
        both_s = min(record.ended_s, end_s) - max(record.started_s, start_s)
        # A token reaches its reader when the next iteration has begun.
        if both_s >= OVERLAP * (end_s - start_s):
            during.append(record)
            working_s += both_s
    quanta = Counter(
        record.kind
        for record in result.quanta
        if record.started_s < end_s and record.ended_s > start_s
    )
    prefill_tokens = max((record.prefill_tokens for record in during), default=0)
    if not iterations:
        cause = "other"
    elif working_s < (end_s - start_s) / 2:
        cause = "pause"
    elif prefill_tokens >= PREFILL_CAUSE_TOKENS:
        cause = "prefill"
    elif quanta:
        cause = "beside training"
    else:
        cause = "other"
    return LongGap(
        at_s=end_s,
        gap_ms=1e3 * (end_s - start_s),
        cause=cause,
        iterations=len(during),
        longest_ms=1e3 * max((record.seconds for record in during), default=0.0),
        prefill_tokens=prefill_tokens,
        quanta=dict(quanta),
        marks=dict(Counter(mark.name for mark in result.marks if start_s <= mark.at_s <= end_s)),
    )


# -- all of them ---------------------------------------------------------------------------------

COLUMNS: Final[tuple[tuple[str, str, float, int], ...]] = (
    ("TTFT p50", "ttft_p50", 1.0, 1),
    ("TTFT p99", "ttft_p99", 1.0, 0),
    ("TBT p50", "tbt_p50", 1.0, 2),
    ("TBT p99", "tbt_p99", 1.0, 1),
    ("attained %", "attained", 100.0, 1),
    ("goodput /s", "goodput", 1.0, 2),
    ("train rows/s", "training", 1.0, 0),
    ("of alone %", "of_alone", 100.0, 0),
    ("of asked %", "of_asked", 100.0, 0),
    ("of idle %", "of_idle", 100.0, 0),
    ("plan %", "planning", 100.0, 1),
    ("decide %", "deciding", 100.0, 1),
)
"""(heading, number of `Summary` or `Latencies`, factor, digits) of the table."""


def value(summary: Summary, name: str) -> float | None:
    """A number of a summary by its name, those of its latencies included; None where unknown."""
    owner = summary if hasattr(summary, name) else summary.latencies
    found: float | None = getattr(owner, name)
    return None if found is None or math.isnan(found) else found


def over_rounds(summaries: Iterable[Summary], name: str) -> list[float]:
    """A number in each round, without those where it is not known."""
    return [found for summary in summaries if (found := value(summary, name)) is not None]


def group(
    summaries: Iterable[Summary],
) -> dict[tuple[str, float], dict[str, list[Summary]]]:
    """By (label, rate), then by policy, in the order in which they came."""
    grouped: dict[tuple[str, float], dict[str, list[Summary]]] = {}
    for summary in summaries:
        cell = grouped.setdefault((summary.label, summary.rate), {})
        cell.setdefault(summary.policy, []).append(summary)
    return grouped


def table(summaries: Iterable[Summary]) -> str:
    """For people: a block per rate, a line per policy; median of the rounds (least to greatest)."""
    lines = []
    for (label, rate), policies in sorted(group(summaries).items(), key=lambda cell: cell[0][1]):
        some = next(iter(policies.values()))
        asked = statistics.median(summary.asked_rate for summary in some)
        requests = sum(summary.requests for summary in some)
        lines.append(f"\n{label}: {asked:.0%} of tasks were training; {requests} requests each")
        rows = [["policy", *(heading for heading, *_ in COLUMNS)]]
        for policy, cell in policies.items():
            row = [policy]
            for _, name, factor, digits in COLUMNS:
                found = [factor * each for each in over_rounds(cell, name)]
                row.append(_spread(found, digits) if found else "-")
            rows.append(row)
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines += [
            "  ".join(
                text.ljust(width) if place == 0 else text.rjust(width)
                for place, (text, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        for policy, cell in policies.items():
            if words := _troubles(cell):
                lines.append(f"  {policy}: {words}")
        del rate
    return "\n".join(lines)


def _spread(values: Sequence[float], digits: int) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return show(values, digits).replace(" to ", "-")


def _troubles(cell: Sequence[Summary]) -> str:
    """What else there is to say: requests that did not end, long gaps and their causes."""
    endings: Counter[str] = Counter()
    causes: Counter[str] = Counter()
    for summary in cell:
        endings.update(summary.endings)
        causes.update(summary.long_gap_causes)
    words = [f"{count} requests {kind}" for kind, count in endings.items() if kind != "done"]
    if causes:
        longest = max(gap.gap_ms for summary in cell for gap in summary.longest_gaps)
        kinds = ", ".join(f"{count} {cause}" for cause, count in causes.most_common())
        words.append(
            f"{sum(causes.values())} gaps over {LONG_FACTOR:g} x the median ({kinds}); the longest "
            f"{longest:.0f} ms"
        )
    return "; ".join(words)


def verdicts(summaries: Iterable[Summary]) -> list[str]:
    """How `cotune` stands against the others at each rate above 0, in words."""
    lines = []
    for (label, rate), policies in sorted(group(summaries).items(), key=lambda cell: cell[0][1]):
        ours = policies.get("cotune")
        if rate <= 0.0 or ours is None:
            continue
        parts = []
        if others := policies.get("inference-only"):
            points = 100 * (_median(ours, "attained") - _median(others, "attained"))
            parts.append(f"attainment {points:+.1f} points against inference-only")
        for name in ("synchronous", "continuous", "periodic", "mace"):
            if others := policies.get(name):
                ratio = _median(others, "tbt_p99") / _median(ours, "tbt_p99")
                parts.append(f"TBT p99 of {name} / ours {ratio:.2f}")
        if over_rounds(ours, "of_possible"):
            parts.append(f"trains {100 * _median(ours, 'of_possible'):.0f} % of what is possible")
        lines.append(f"cotune at {label}: {'; '.join(parts)}")
    return lines


def _median(cell: Iterable[Summary], name: str) -> float:
    found = over_rounds(cell, name)
    return statistics.median(found) if found else math.nan


def as_json(value: DataclassInstance) -> dict[str, Any]:
    """A dataclass as JSON has it; numbers that JSON has not are null."""
    found: dict[str, Any] = _plain(asdict(value))
    return found


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case float():
            return value if math.isfinite(value) else None
        case _:
            return value


# -- the plot ------------------------------------------------------------------------------------

_PANELS: Final = (
    ("tbt_p99", 1.0, "TBT p99 (ms)", True),
    ("ttft_p99", 1.0, "TTFT p99 (ms)", True),
    ("attained", 100.0, "SLO attainment (%)", False),
    ("of_alone", 100.0, "training / training alone (%)", False),
)


def plot(path: Path, title: str, summaries: Sequence[Summary]) -> None:
    """Draw latencies, attainment and training over the retrain rate (SVG, PNG, PDF).

    A line per policy through the medians of the rounds, a bar from the least to the greatest. The
    same input gives the same SVG file.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    policies = list(dict.fromkeys(summary.policy for summary in summaries))
    with mpl.rc_context({"svg.hashsalt": "cotune", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(9.0, 6.4), layout="constrained")
        all_axes = figure.subplots(2, 2).flat
        for axes, (name, factor, heading, is_log) in zip(all_axes, _PANELS, strict=True):
            for number, policy in enumerate(policies):
                points = _points([s for s in summaries if s.policy == policy], name, factor)
                if not points:
                    continue
                rates, middle, low, high = zip(*points, strict=True)
                errors = [
                    [m - least for m, least in zip(middle, low, strict=True)],
                    [most - m for m, most in zip(middle, high, strict=True)],
                ]
                axes.errorbar(
                    rates,
                    middle,
                    yerr=errors,
                    color=f"C{number}",
                    label=policy,
                    marker=".",
                    linewidth=2.0 if policy == "cotune" else 1.0,
                    capsize=2,
                )
            if is_log:
                axes.set_yscale("log")
            axes.set_title(heading, loc="left", fontsize=9)
            axes.set_xlabel("retrain rate (% of tasks)")
            axes.grid(axis="y", linewidth=0.3)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
        figure.suptitle(title, fontsize=10)
        path.parent.mkdir(parents=True, exist_ok=True)
        is_svg = path.suffix.lower() == ".svg"
        figure.savefig(path, metadata={"Date": None} if is_svg else None)


def _points(
    summaries: Sequence[Summary], name: str, factor: float
) -> list[tuple[float, float, float, float]]:
    """(rate in percent, median, least, greatest) in order of rate."""
    points = []
    for rate in sorted({summary.rate for summary in summaries}):
        found = [
            factor * each for each in over_rounds((s for s in summaries if s.rate == rate), name)
        ]
        if found:
            points.append((100 * rate, statistics.median(found), min(found), max(found)))
    return points
