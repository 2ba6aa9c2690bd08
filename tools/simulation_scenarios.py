"""Situations that schedulers find hard, each in variants side by side.

inflow       large prompts all at once, in the middle: what do the others notice?
low-prefix   the same prompts, beginning alike or not
gamma        the weight of a batch's signal in its priority: none, as set, four times that
stale        the device becomes half as fast in the middle, and the profile does not say so
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from ..policy.costs import CostModel, IterationShape
from ..policy.settings import PolicySettings
from ..runtime.errors import ConfigError
from .coserve_log import quantile
from .simulation_report import HEADINGS, summarize, summary_row, table
from .simulation_run import Witness, World, described, heading, simulate, time_bars
from .traces import Trace, TraceRequest, make_trace, synthetic, transform

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..policy.costs import Costs
    from ..policy.profile import Profile
    from .simulation_types import Outcome

LOAD: Final = 0.6
"""Of what the device can serve, what the requests made for a scenario ask."""
WITH_GAMMA: Final = ("cotune", "mace")
CONVERGED: Final = 0.15
"""A cost model has recovered once the median error of its predictions is back below this."""


def make_requests(costs: Costs, seed: int) -> Trace:
    """Requests for a scenario without a trace, at `LOAD` of what the device can serve."""
    shared, own, output = 256, 192, 64
    batch = 8
    decode_s = costs.iteration_s(IterationShape(batch, batch * (shared + own))) / batch
    prefill_s = costs.iteration_s(IterationShape().with_chunk(own, shared)) - costs.base_s
    seconds = prefill_s + output * decode_s
    return synthetic(
        requests=600,
        rate=LOAD / (seconds * 1.2),
        prompt_tokens=own,
        output_tokens=output,
        shared_tokens=shared,
        seed=seed,
    )


def _inflow(
    world: World, policies: Sequence[str], overrides: dict[str, Any], profile: Profile
) -> dict[str, Any]:
    """Large prompts all at once, in the middle: what do the others notice?"""
    budgets = world.settings.budgets
    requests = world.trace.requests
    middle_s = world.trace.duration_s / 2
    longest = world.settings.pages * budgets.page_size // 4
    large = min(longest, 8 * budgets.tokens)
    inflow = [
        TraceRequest(arrival_s=middle_s + 0.01 * index, prompt_tokens=large, output_tokens=8)
        for index in range(16)
    ]
    merged = make_trace("inflow", sorted((*requests, *inflow), key=lambda r: r.arrival_s))
    after_s = 30.0
    ordinary = {id(request) for request in requests}

    def is_chosen(outcome: Outcome) -> bool:
        request = outcome.request
        return id(request) in ordinary and middle_s <= request.arrival_s < middle_s + after_s

    rows = []
    found: dict[str, dict[str, Any]] = {}
    with time_bars(world.trace.duration_s) as start:
        for name in policies:
            found[name] = {}
            for label, trace in (("without", world.trace), ("with", merged)):
                result = simulate(
                    replace(world, trace=trace),
                    name,
                    overrides,
                    progress=start(f"{name} {label}"),
                )
                summary = summarize(result, budgets, visits=world.visits, chosen=is_chosen)
                found[name][label] = summary.to_dict()
                rows.append(summary_row(f"{name} {label}", summary))
    print(heading(world))
    print(
        f"{len(inflow)} prompts of {large} tokens at {middle_s:.1f} s; times are of the other "
        f"requests that came within {after_s:.0f} s after that"
    )
    print(table(HEADINGS, rows))
    return described(world) | {"scenario": "inflow", "policies": found}


def _variants(
    world: World,
    name: str,
    runs: Sequence[tuple[str, World, str, dict[str, Any]]],
) -> dict[str, Any]:
    """Runs side by side."""
    rows, found = [], {}
    with time_bars(world.trace.duration_s) as start:
        for label, varied, policy, overrides in runs:
            result = simulate(varied, policy, overrides, progress=start(label))
            summary = summarize(result, varied.settings.budgets, visits=world.visits)
            found[label] = summary.to_dict()
            rows.append(summary_row(label, summary))
    print(heading(world))
    print(table(HEADINGS, rows))
    return described(world) | {"scenario": name, "variants": found}


def _low_prefix(
    world: World, policies: Sequence[str], overrides: dict[str, Any], profile: Profile
) -> dict[str, Any]:
    """The same prompts, beginning alike or not."""
    alone = replace(world, trace=transform(world.trace, sharing=False))
    return _variants(
        world,
        "low-prefix",
        [
            (f"{policy} {label}", varied, policy, overrides)
            for policy in policies
            for label, varied in (("shared", world), ("unlike", alone))
        ],
    )


def _gamma(
    world: World, policies: Sequence[str], overrides: dict[str, Any], profile: Profile
) -> dict[str, Any]:
    """The weight of the loss in a training task's priority: none, as it is, four times that."""
    usual = overrides.get("gamma", PolicySettings().gamma)
    policies = [name for name in policies if name in WITH_GAMMA]
    if not policies:
        raise ConfigError(f"--scenario gamma: use --policy all, or one of {', '.join(WITH_GAMMA)}")
    return _variants(
        world,
        "gamma",
        [
            (f"{policy} gamma={gamma:g}", world, policy, overrides | {"gamma": gamma})
            for policy in policies
            for gamma in (0.0, usual, 4.0 * usual)
        ],
    )


def iterations_to_recover(errors: Sequence[float], window: int = 20) -> int | None:
    """Iterations after which the median error of a window stays below `CONVERGED`; None: never.

    Args:
        errors: of each iteration's prediction, from the change on.
        window: iterations that the median is taken over.
    """
    last_bad = None
    for end in range(window, len(errors) + 1):
        if quantile(sorted(errors[end - window : end]), 0.5) >= CONVERGED:
            last_bad = end
    if last_bad is None:
        return 0 if len(errors) >= window else None
    return last_bad if last_bad < len(errors) else None


def _stale(
    world: World, policies: Sequence[str], overrides: dict[str, Any], profile: Profile
) -> dict[str, Any]:
    """The device becomes half as fast in the middle, and the profile does not say so."""
    middle_s = world.trace.duration_s / 2
    noise = world.settings.noise or 0.1
    settings = replace(world.settings, slowdowns=((middle_s, 2.0),), noise=noise)
    slowed = replace(world, settings=settings)
    rows, found = [], {}
    with time_bars(world.trace.duration_s) as start:
        for policy in policies:
            for label, model in (("learning", CostModel(profile)), ("as profiled", None)):
                name = f"{policy} {label}"
                witness = Witness(model, profile.costs)
                result = simulate(slowed, policy, overrides, witness=witness, progress=start(name))
                summary = summarize(result, settings.budgets, visits=world.visits)
                recovered = iterations_to_recover(witness.errors_after(middle_s))
                found[name] = summary.to_dict() | {"iterations_to_recover": recovered}
                shown = "never" if recovered is None else str(recovered)
                rows.append((*summary_row(name, summary), shown))
    print(heading(world))
    print(
        f"from {middle_s:.1f} s on the device is half as fast; recovered: iterations until the "
        f"median error of predictions is below {100 * CONVERGED:.0f} % for good"
    )
    print(table((*HEADINGS, "recovered"), rows))
    return described(slowed) | {"scenario": "stale", "variants": found}


SCENARIOS: Final = {
    "inflow": _inflow,
    "low-prefix": _low_prefix,
    "gamma": _gamma,
    "stale": _stale,
}
