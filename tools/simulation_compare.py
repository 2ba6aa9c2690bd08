"""Live runs beside simulated ones: the same arrivals, and how far off each percentile is."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..policy import POLICY_NAMES
from ..policy.costs import Costs
from ..policy.types import Budgets
from ..runtime.errors import ConfigError
from .coserve_log import CoserveLog, quantile
from .simulation_report import Percentiles, table
from .simulation_run import World, simulate, time_bars
from .simulation_types import SimulationResult, SimulationSettings
from .traces import Trace, TraceRequest

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """A percentile, live and simulated, in seconds."""

    name: str
    live: float
    simulated: float

    @property
    def error(self) -> float:
        """(simulated - live) / live; 0 where both are nothing."""
        if not self.live:
            return 0.0 if not self.simulated else math.inf
        return (self.simulated - self.live) / self.live


def world_of(log: CoserveLog, costs: Costs | None, max_queue: int = 1 << 30) -> World:
    """What a live run was made of.

    What each request found cached is taken from the log, and not worked out again. Requests that
    never had a token were refused or given up, and are left out.

    Args:
        log: the run.
        costs: of the device; None: those that the log ends with.
        max_queue: more than ever waited, since what the log has was taken.

    Raises:
        ConfigError: neither has costs.
    """
    if costs is None:
        if log.costs is None:
            raise ConfigError(
                'the log has no "costs"; say with --profile what the device is, or run the '
                "benchmark again"
            )
        try:
            costs = Costs(**log.costs | {"per_row_s": tuple(log.costs["per_row_s"])})
        except (TypeError, KeyError) as error:
            raise ConfigError(
                f'"costs" of the log is of another release ({error}); say with --profile what the '
                "device is, or run the benchmark again"
            ) from error
    budgets = Budgets(**asdict(log.budgets), ttft_s=log.targets.ttft_s, tbt_s=log.targets.tbt_s)
    requests = [
        TraceRequest(
            arrival_s=request.arrival_s,
            prompt_tokens=request.prompt_tokens,
            output_tokens=request.output_tokens,
            cached_tokens=request.cached_tokens,
            request_class="batch" if request.request_class == "batch" else "interactive",
            is_background=request.is_background,
        )
        for request in sorted(log.requests, key=lambda request: request.arrival_s)
        if request.output_tokens or request.is_background
    ]
    if not requests:
        raise ConfigError("the log holds no requests; run the benchmark for longer")
    return World(
        trace=Trace(name=f"{log.policy} at {log.retrain_rate:g}", requests=tuple(requests)),
        samples=tuple(sorted(log.samples, key=lambda sample: sample.arrival_s)),
        costs=costs,
        settings=SimulationSettings(
            budgets=budgets,
            pages=log.pages,
            max_queue=max_queue,
            training=log.training,
            overhead_s=log.overhead_s,
        ),
    )


def agreements(logs: Sequence[CoserveLog], results: Sequence[SimulationResult]) -> list[Agreement]:
    """Each percentile of runs that belong together, live and simulated."""
    awaited = [r for log in logs for r in log.requests if not r.is_background]
    outcomes = [outcome for result in results for outcome in result.outcomes]
    found = []
    for name, live, simulated in (
        (
            "TTFT",
            [r.ttft_s for r in awaited if r.ttft_s is not None],
            [o.ttft_s for o in outcomes if o.ttft_s is not None],
        ),
        (
            "TBT",
            [gap for request in awaited for gap in request.gaps_s],
            [gap for outcome in outcomes for gap in outcome.gaps_s],
        ),
    ):
        a, b = Percentiles.of(live), Percentiles.of(simulated)
        found += [
            Agreement(name=f"{name} p{share}", live=of_live, simulated=of_simulated)
            for share, of_live, of_simulated in (
                (50, a.p50, b.p50),
                (90, a.p90, b.p90),
                (99, a.p99, b.p99),
            )
        ]
    return found


def compare(
    logs: Sequence[CoserveLog], costs: Costs | None, overrides: dict[str, Any]
) -> dict[str, Any]:
    """Replay each run, and put the percentiles of those that belong together side by side.

    Args:
        logs: the runs.
        costs: of the device; None: those that each log ends with.
        overrides: settings of the policies that are not as they were.

    Raises:
        ConfigError: a log cannot be replayed.
    """
    groups: dict[tuple[str, float], list[CoserveLog]] = {}
    for log in logs:
        if log.policy not in POLICY_NAMES:
            raise ConfigError(
                f'"policy" of the log is {log.policy!r}, which this release does not have; run the '
                "benchmark again"
            )
        groups.setdefault((log.policy, log.retrain_rate), []).append(log)
    rows, found, errors = [], [], []
    until_s = max(log.duration_s for log in logs)
    with time_bars(until_s) as start:
        for (policy, rate), members in groups.items():
            results = []
            for log in members:
                name = f"{policy} at {rate:g}"
                world = world_of(log, costs)
                settings = log.settings | overrides
                results.append(simulate(world, policy, settings, progress=start(name)))
            pairs = agreements(members, results)
            errors += [abs(pair.error) for pair in pairs if pair.live]
            live_s = sum(log.duration_s for log in members)
            trained = Agreement(
                name="trained tokens/s",
                live=sum(log.trained_tokens for log in members) / live_s,
                simulated=sum(result.trained_tokens for result in results) / live_s,
            )
            rows += [
                (
                    f"{policy} at {rate:.0%}",
                    pair.name,
                    f"{1000 * pair.live:.4g}",
                    f"{1000 * pair.simulated:.4g}",
                    f"{pair.error:+.0%}",
                )
                for pair in pairs
            ]
            rows.append(
                (
                    f"{policy} at {rate:.0%}",
                    trained.name,
                    f"{trained.live:.0f}",
                    f"{trained.simulated:.0f}",
                    f"{trained.error:+.0%}",
                )
            )
            found.append(
                {
                    "policy": policy,
                    "retrain_rate": rate,
                    "runs": len(members),
                    "percentiles": [asdict(pair) | {"error": pair.error} for pair in pairs],
                    "trained_tokens_per_s": asdict(trained) | {"error": trained.error},
                }
            )
    print(table(("run", "", "live ms", "simulated ms", "error"), rows))
    median = quantile(sorted(errors), 0.5) if errors else 0.0
    worst = max(errors, default=0.0)
    print(f"error of a percentile: median {median:.0%}, most {worst:.0%}, of {len(errors)}")
    return {"compared": found, "median_error": median, "most_error": worst}
