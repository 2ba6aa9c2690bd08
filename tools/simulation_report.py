"""What a simulated run comes to: percentiles, targets kept, what training got; as values and text.

A request attains its targets if its first token came within the TTFT target and 99 of 100 of the
gaps between its tokens are within the TBT target. One that was refused does not. Goodput counts
those that do, per second.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from .coserve_log import keeps_targets, quantile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ..policy.types import Budgets
    from .simulation_types import Outcome, SimulationResult

PERCENTILES: Final = (50, 90, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """Of some times, in seconds; zero where there are none."""

    p50: float
    p90: float
    p99: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Percentiles:
        """Of these values."""
        ordered = sorted(values)
        if not ordered:
            return cls(p50=0.0, p90=0.0, p99=0.0, n=0)
        p50, p90, p99 = (quantile(ordered, share / 100) for share in PERCENTILES)
        return cls(p50=p50, p90=p90, p99=p99, n=len(ordered))


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One run in numbers. Shares are in [0, 1], times in seconds.

    Attributes:
        requests, refused: that came; that were turned away.
        duration_s: until the last one ended.
        ttft, tbt: over all requests; over all gaps.
        slo_attainment: share of all requests that attained both targets.
        goodput: requests per second that did.
        output_tokens_per_s: generated.
        cached_share: of prompt tokens, found in the cache.
        fill: of the token budget, used by the average iteration.
        busy: of the time, the inference lane worked.
        iterations, preemptions, evicted_pages, pauses: counts.
        trained_tokens_per_s: rows of finished steps.
        steps: finished.
        training_share: of the time, the training lane worked and was not held.
        held_share: of the time, a quantum was told to wait.
        training_alone_tokens_per_s: what the same quanta reach with nothing beside them.
        of_alone: throughput of training as a share of that.
        of_idle: as a share of what fits beside the serving of `inference-only`; None: not known.
        of_offered: share of the rows that there were to train on.
    """

    requests: int
    refused: int
    duration_s: float
    ttft: Percentiles
    tbt: Percentiles
    slo_attainment: float
    goodput: float
    output_tokens_per_s: float
    cached_share: float
    fill: float
    busy: float
    iterations: int
    preemptions: int
    evicted_pages: int
    pauses: int
    trained_tokens_per_s: float
    steps: int
    training_share: float
    held_share: float
    training_alone_tokens_per_s: float
    of_alone: float
    of_idle: float | None
    of_offered: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def attains(outcome: Outcome, budgets: Budgets) -> bool:
    """Whether a request kept its targets; see the module."""
    return keeps_targets(outcome.ttft_s, outcome.gaps_s, budgets.ttft_s, budgets.tbt_s)


def summarize(
    result: SimulationResult,
    budgets: Budgets,
    *,
    visits: float = 1.0,
    chosen: Callable[[Outcome], bool] | None = None,
) -> Summary:
    """The numbers of a run.

    Args:
        result: the run.
        budgets: it was made with.
        visits: rows trained for each row that came, if all goes well: epochs and replay.
        chosen: whose times count; None: all requests.
    """
    outcomes = [o for o in result.outcomes if chosen is None or chosen(o)]
    duration_s = result.duration_s or 1.0
    attained = sum(attains(outcome, budgets) for outcome in outcomes)
    started = [outcome for outcome in outcomes if outcome.refusal is None]
    prompt_tokens = sum(outcome.request.prompt_tokens for outcome in started)
    trained_per_s = result.trained_tokens / duration_s
    alone_per_s = (
        result.trained_tokens / result.training_alone_s if result.training_alone_s else 0.0
    )
    offered = result.arrived_tokens * visits
    return Summary(
        requests=len(outcomes),
        refused=len(outcomes) - len(started),
        duration_s=result.duration_s,
        ttft=Percentiles.of(o.ttft_s for o in outcomes if o.ttft_s is not None),
        tbt=Percentiles.of(gap for outcome in outcomes for gap in outcome.gaps_s),
        slo_attainment=attained / len(outcomes) if outcomes else 0.0,
        goodput=attained / duration_s,
        output_tokens_per_s=sum(o.request.output_tokens for o in started) / duration_s,
        cached_share=(
            sum(outcome.cached_tokens for outcome in started) / prompt_tokens
            if prompt_tokens
            else 0.0
        ),
        fill=result.batch_tokens / (result.iterations * budgets.tokens or 1),
        busy=result.busy_s / duration_s,
        iterations=result.iterations,
        preemptions=result.preemptions,
        evicted_pages=result.evicted_pages,
        pauses=result.pauses,
        trained_tokens_per_s=trained_per_s,
        steps=result.steps,
        training_share=result.training_s / duration_s,
        held_share=result.held_s / duration_s,
        training_alone_tokens_per_s=alone_per_s,
        of_alone=trained_per_s / alone_per_s if alone_per_s else 0.0,
        of_idle=None,
        of_offered=result.trained_tokens / offered if offered else 0.0,
    )


def with_baseline(summary: Summary, baseline: Summary) -> Summary:
    """`summary`, with what training got of the time that `baseline` left idle."""
    alone_per_s = summary.training_alone_tokens_per_s
    if not alone_per_s or baseline.busy >= 1.0:
        return summary
    return replace(
        summary, of_idle=summary.trained_tokens_per_s / (alone_per_s * (1.0 - baseline.busy))
    )


# -- text ----------------------------------------------------------------------------------------

HEADINGS: Final = (
    "",
    "TTFT ms p50/p90/p99",
    "TBT ms p50/p90/p99",
    "SLO %",
    "good/s",
    "train tok/s",
    "alone %",
    "idle %",
    "offered %",
    "fill %",
    "cached %",
    "preempted",
    "refused",
)


def summary_row(name: str, summary: Summary) -> tuple[str, ...]:
    """A run as a row under `HEADINGS`."""
    return (
        name,
        milliseconds(summary.ttft),
        milliseconds(summary.tbt),
        f"{100 * summary.slo_attainment:.1f}",
        f"{summary.goodput:.2f}",
        f"{summary.trained_tokens_per_s:.0f}",
        f"{100 * summary.of_alone:.0f}",
        "-" if summary.of_idle is None else f"{100 * summary.of_idle:.0f}",
        f"{100 * summary.of_offered:.0f}",
        f"{100 * summary.fill:.0f}",
        f"{100 * summary.cached_share:.0f}",
        str(summary.preemptions),
        str(summary.refused),
    )


def milliseconds(times: Percentiles) -> str:
    """Percentiles as "50/90/99"."""
    return "/".join(f"{1000 * value:.4g}" for value in (times.p50, times.p90, times.p99))


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as what is in them: the first to the left, the others to the right."""
    lines = [headings, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
