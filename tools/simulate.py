"""Replay a trace through the scheduling policies in virtual time.

The policies are the ones that serve; the device is a profile: what each iteration and each training
quantum costs. Arrivals, lengths and shared prefixes come from a trace, training samples come at the
retrain rate. Minutes of traffic take seconds, and no model is needed.
"""

from __future__ import annotations

import json
import math
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..policy import POLICY_NAMES
from ..policy.costs import CostModel, Costs, IterationShape
from ..policy.profile import Profile, ProfileError
from ..policy.types import Budgets
from ..runtime.config import ScheduleConfig
from ..runtime.errors import ConfigError
from ..runtime.scheduling.targets import choose_targets
from .bench_report import machine
from .coserve_log import CoserveLog, LoggedTraining, quantile, read_logs
from .options import parse_count
from .simulation import (
    Simulation,
    SimulationResult,
    SimulationSettings,
    samples_of,
)
from .simulation_report import (
    HEADINGS,
    Percentiles,
    Summary,
    summarize,
    summary_row,
    table,
    with_baseline,
)
from .traces import Trace, TraceRequest, find_trace, make_trace, read_trace, synthetic, transform

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    from ..policy.types import Policy
    from .coserve_log import LoggedSample
    from .simulation import Outcome

BASELINE: Final = "inference-only"
SCENARIOS: Final = ("inflow", "low-prefix", "gamma", "stale")
WITH_GAMMA: Final = ("cotune", "mace")
PROFILES: Final = Path(__file__).parent / "device_profiles"
LOAD: Final = 0.6
"""Of what the device can serve, what the requests made for a scenario ask."""
CONVERGED: Final = 0.15
"""A cost model has recovered once the median error of its predictions is back below this."""

EPILOG = """\
examples:
  cotune simulate --trace azure --data ../shared/data --profile demo --scale-tokens 0.1
  cotune simulate --trace requests.csv --policy all --retrain-rate 0.3 --profile mine.json
  cotune simulate --trace mooncake --data ../shared/data --profile demo --scale-tokens 0.05
  cotune simulate --scenario inflow --policy all --profile demo
  cotune simulate --compare coserve.json --profile demo     how far from what was measured?

A trace is a CSV with arrival_s,input_tokens,output_tokens, a JSONL file with prefix_blocks beside
these, or a JSONL file of conversations; azure, mooncake and sessions name files in --data.
"""


# -- the command ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``cotune simulate``."""
    budgets = Budgets(tokens=512, sequences=256, page_size=16)
    training = LoggedTraining()
    parser.description = __doc__
    parser.epilog = EPILOG
    what = parser.add_argument_group("what is simulated")
    what.add_argument(
        "--trace", metavar="FILE", help="requests; or azure, mooncake or sessions with --data"
    )
    what.add_argument("--data", type=Path, metavar="DIR", help="folder of the traces")
    what.add_argument(
        "--scenario", choices=SCENARIOS, help="a situation that schedulers find hard, in variants"
    )
    what.add_argument(
        "--compare",
        type=Path,
        metavar="FILE",
        help="replay the runs of `cotune bench coserve --output FILE` and print the error of each "
        "percentile",
    )
    what.add_argument(
        "--policy",
        default="cotune" if "cotune" in POLICY_NAMES else BASELINE,
        metavar="NAME",
        help=f"all, or one of {', '.join(POLICY_NAMES)} (%(default)s)",
    )
    what.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="settings",
        help="a setting of the policy, such as gamma=0; may be repeated",
    )
    what.add_argument(
        "--profile",
        metavar="NAME",
        help=f"the device: a file of `cotune profile --output`, or one of {_shipped() or 'none'}",
    )
    trace = parser.add_argument_group("the trace")
    trace.add_argument(
        "--scale-tokens", type=float, default=1.0, metavar="F", help="factor of all lengths (1)"
    )
    trace.add_argument(
        "--speed", type=float, default=1.0, metavar="X", help="times faster than recorded (1)"
    )
    trace.add_argument("--limit-s", type=float, metavar="S", help="only the first seconds (all)")
    trace.add_argument(
        "--no-sharing", action="store_true", help="no prompt begins as any other does"
    )
    trace.add_argument(
        "--session-rate",
        type=float,
        default=1.0,
        metavar="R",
        help="conversations that begin per second, where the trace has no times (%(default)g)",
    )
    trace.add_argument(
        "--think-s",
        type=float,
        default=10.0,
        metavar="S",
        help="mean time between the turns of such a conversation (%(default)g)",
    )
    learning = parser.add_argument_group("training")
    learning.add_argument(
        "--retrain-rate",
        type=float,
        default=0.3,
        metavar="SHARE",
        help="share of all tasks that are training (%(default)g)",
    )
    learning.add_argument(
        "--sample-tokens",
        type=int,
        metavar="N",
        help="rows of a sample (prompt and both answers of the request that it rates)",
    )
    learning.add_argument(
        "--max-sample-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="most of these (%(default)s)",
    )
    learning.add_argument(
        "--batch-size", type=int, default=training.batch_size, metavar="N", help="(%(default)s)"
    )
    learning.add_argument(
        "--batch-wait-s",
        type=float,
        default=training.batch_wait_s,
        metavar="S",
        help="how long an incomplete batch waits (%(default)g)",
    )
    learning.add_argument(
        "--quantum-tokens",
        type=int,
        default=training.quantum_tokens,
        metavar="N",
        help="most rows of a quantum (%(default)s)",
    )
    learning.add_argument(
        "--epochs",
        type=int,
        default=training.epochs,
        metavar="N",
        help="visits of each sample; a task is a sample, however often it is visited (%(default)s)",
    )
    learning.add_argument(
        "--references",
        action="store_true",
        help="compute each sample in the background before it is trained on, as serving does",
    )
    server = parser.add_argument_group("the server")
    server.add_argument(
        "--ttft-target-ms", type=float, metavar="MS", help="time to first token (of the profile)"
    )
    server.add_argument(
        "--tbt-target-ms", type=float, metavar="MS", help="time between tokens (of the profile)"
    )
    server.add_argument(
        "--pages", type=parse_count, default=4096, metavar="N", help="KV pages (4K)"
    )
    server.add_argument(
        "--block-size", type=int, default=16, metavar="N", help="tokens per page (%(default)s)"
    )
    server.add_argument(
        "--max-num-seqs",
        type=int,
        default=budgets.sequences,
        metavar="N",
        help="most sequences that run at once (%(default)s)",
    )
    server.add_argument(
        "--max-num-batched-tokens",
        type=int,
        default=budgets.tokens,
        metavar="N",
        help="most tokens per iteration (%(default)s)",
    )
    server.add_argument(
        "--max-queue",
        type=int,
        default=1024,
        metavar="N",
        help="most requests that wait; further ones are refused (%(default)s)",
    )
    server.add_argument(
        "--overhead-ms",
        type=float,
        default=0.0,
        metavar="MS",
        help="between two iterations, beyond what the profile holds (%(default)g)",
    )
    server.add_argument(
        "--noise",
        type=float,
        default=0.0,
        metavar="S",
        help="scatter of an iteration's time: standard deviation of its logarithm (%(default)g)",
    )
    server.add_argument("--seed", type=int, default=0, help="of everything drawn (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the results as JSON (none)")


def run(args: argparse.Namespace) -> int:
    """Simulate, print, write; the exit status."""
    chosen = [name for name in ("trace", "scenario", "compare") if getattr(args, name)]
    if not chosen:
        raise ConfigError("say what to simulate: --trace FILE, --scenario NAME or --compare FILE")
    if "compare" in chosen and len(chosen) > 1:
        raise ConfigError("--compare replays what was measured; leave --trace and --scenario out")
    policies = _policies(args.policy)
    overrides = _overrides(args.settings)
    profile = None if args.profile is None else read_profile(args.profile)
    if profile is None and not args.compare:
        raise ConfigError(
            "--profile is missing: the device; use the file of `cotune profile --output`"
            + (f", or {_shipped()}" if _shipped() else "")
        )
    if profile is not None:
        _say_profile(profile)
    if args.compare:
        logs = read_logs(args.compare)
        report = _compare(logs, None if profile is None else profile.costs, overrides, args)
    else:
        assert profile is not None
        world = _world(args, profile.costs)
        for note in world.trace.notes:
            print(f"note: {note}", file=sys.stderr)
        if args.scenario:
            report = _SCENARIOS[args.scenario](world, policies, overrides, profile)
        else:
            report = _replay(world, policies, overrides)
    report = {
        "command": sys.argv[1:],
        "machine": machine(),
        "profile": None if profile is None else {"note": profile.note} | _named(profile),
    } | report
    if args.output is not None:
        try:
            args.output.write_text(json.dumps(report, indent=1), encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"--output {args.output} cannot be written ({error.strerror}); use another path"
            ) from error
        print(f"results: {args.output}")
    return 0


# -- what a run is made of -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Everything but the policy."""

    trace: Trace
    samples: tuple[LoggedSample, ...]
    costs: Costs
    settings: SimulationSettings

    @property
    def visits(self) -> float:
        """Rows to train for each row of a sample."""
        training = self.settings.training
        return 1.0 if training is None else training.epochs / (1.0 - training.replay_share)


def _world(args: argparse.Namespace, costs: Costs) -> World:
    """What the flags say.

    Raises:
        ConfigError: a value is out of range, or the targets cannot be met.
    """
    if not 0.0 <= args.retrain_rate < 1.0:
        raise ConfigError(
            f"--retrain-rate is {args.retrain_rate:g}; use a share from 0 up to, not including, 1"
        )
    for flag, least in (
        ("--pages", 1),
        ("--block-size", 1),
        ("--max-num-seqs", 1),
        ("--max-num-batched-tokens", 1),
        ("--max-queue", 1),
        ("--batch-size", 1),
        ("--batch-wait-s", 0),
        ("--quantum-tokens", 1),
        ("--epochs", 1),
        ("--max-sample-tokens", 1),
        ("--sample-tokens", 1),
        ("--overhead-ms", 0),
        ("--noise", 0),
    ):
        value = getattr(args, flag[2:].replace("-", "_"))
        if value is not None and not (math.isfinite(value) and value >= least):
            raise ConfigError(f"{flag} is {value:g}; use {least} or more")
    budgets = Budgets(args.max_num_batched_tokens, args.max_num_seqs, args.block_size)
    schedule = ScheduleConfig(
        ttft_target_s=None if args.ttft_target_ms is None else args.ttft_target_ms / 1000.0,
        tbt_target_s=None if args.tbt_target_ms is None else args.tbt_target_ms / 1000.0,
    )
    schedule.validate()
    ttft_s, tbt_s = choose_targets(schedule, costs, budgets.tokens)
    budgets = budgets._replace(ttft_s=ttft_s, tbt_s=tbt_s)
    training = LoggedTraining(
        batch_size=args.batch_size,
        batch_wait_s=args.batch_wait_s,
        quantum_tokens=args.quantum_tokens,
        epochs=args.epochs,
    )
    settings = SimulationSettings(
        budgets=budgets,
        pages=args.pages,
        max_queue=args.max_queue,
        training=training if args.retrain_rate else None,
        references=args.references,
        overhead_s=args.overhead_ms / 1000.0,
        noise=args.noise,
        seed=args.seed,
    )
    if args.trace is None:
        trace = _made_for(costs, args)
    else:
        trace = read_trace(
            find_trace(args.trace, args.data),
            session_rate=args.session_rate,
            think_s=args.think_s,
            seed=args.seed,
        )
    trace = transform(
        trace,
        scale_tokens=args.scale_tokens,
        speed=args.speed,
        limit_s=args.limit_s,
        sharing=not args.no_sharing,
    )
    samples = samples_of(
        trace.requests,
        args.retrain_rate,
        tokens=args.sample_tokens,
        max_tokens=args.max_sample_tokens,
    )
    return World(trace=trace, samples=tuple(samples), costs=costs, settings=settings)


def _made_for(costs: Costs, args: argparse.Namespace) -> Trace:
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
        seed=args.seed,
    )


def read_profile(name: str) -> Profile:
    """A shipped profile by its name, or the one in a file.

    Raises:
        ConfigError: there is none, or it is none.
    """
    shipped = PROFILES / f"{name}.json"
    path = shipped if shipped.is_file() else Path(name)
    try:
        return Profile.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(
            f"--profile {name} cannot be read ({error.strerror}); use the file of `cotune profile "
            f"--output`, or one of {_shipped() or 'none'}"
        ) from error
    except ProfileError as error:
        raise ConfigError(f"--profile {name}: {error}") from error
    except ValueError as error:
        raise ConfigError(
            f"--profile {name} is not JSON ({error}); measure it again with `cotune profile`"
        ) from error


def _shipped() -> str:
    return ", ".join(sorted(path.stem for path in PROFILES.glob("*.json")))


def _say_profile(profile: Profile) -> None:
    kind = "ESTIMATED, not measured" if profile.is_estimated else "measured"
    print(f"profile: {profile.key.model} on {profile.key.device}, {profile.key.dtype} ({kind})")


def _named(profile: Profile) -> dict[str, Any]:
    return {
        "model": profile.key.model,
        "device": profile.key.device,
        "is_estimated": profile.is_estimated,
        "costs": profile.costs._asdict(),
    }


def _policies(name: str) -> tuple[str, ...]:
    if name == "all":
        return tuple(POLICY_NAMES)
    if name not in POLICY_NAMES:
        raise ConfigError(f"--policy is {name!r}; use all, or one of {', '.join(POLICY_NAMES)}")
    return (name,)


def _overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """Of ``--set NAME=VALUE``: settings of the policy, typed as their defaults are."""
    from ..policy.settings import PolicySettings

    defaults = asdict(PolicySettings())
    found: dict[str, Any] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator or name not in defaults:
            raise ConfigError(f"--set {pair}: use NAME=VALUE with one of {', '.join(defaults)}")
        kind = type(defaults[name])
        try:
            found[name] = text == "true" if kind is bool else kind(text)
        except ValueError as error:
            raise ConfigError(f"--set {pair}: {text!r} is no {kind.__name__}") from error
    return found


def build_policy(name: str, overrides: dict[str, Any]) -> Policy:
    """A policy of this name with some of its settings changed.

    Raises:
        ConfigError: a setting is out of range.
    """
    from ..policy import make_policy
    from ..policy.settings import PolicySettings, SettingError

    try:
        settings = replace(PolicySettings(), **overrides)
        settings.validate()
    except SettingError as error:
        raise ConfigError(f"--set {error}") from error
    return make_policy(name, settings)


@contextmanager
def _progress(until_s: float) -> Iterator[Callable[[str], Callable[[float], None]]]:
    """A bar on stderr that shows virtual time, run after run."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:

        def start(name: str) -> Callable[[float], None]:
            task = bar.add_task(name, total=until_s)
            return lambda now_s: bar.update(task, completed=now_s)

        yield start


def simulate(
    world: World,
    policy: str,
    overrides: dict[str, Any],
    *,
    witness: Witness | None = None,
    progress: Callable[[float], None] | None = None,
) -> SimulationResult:
    """One run of one policy."""
    simulation = Simulation(
        world.trace.requests,
        build_policy(policy, overrides),
        world.costs,
        world.settings,
        samples=world.samples,
        beliefs=witness,
        progress=progress,
    )
    if witness is not None:
        witness.clock = lambda: simulation.now_s
    return simulation.run()


def _replay(world: World, policies: Sequence[str], overrides: dict[str, Any]) -> dict[str, Any]:
    """The trace through each policy; the baseline always runs, to know what it leaves idle."""
    summaries: dict[str, Summary] = {}
    with _progress(world.trace.duration_s) as start:
        for name in dict.fromkeys((BASELINE, *policies)):
            result = simulate(world, name, overrides, progress=start(name))
            summaries[name] = summarize(result, world.settings.budgets, visits=world.visits)
    baseline = summaries[BASELINE]
    shown = {
        name: summary if name == BASELINE else with_baseline(summary, baseline)
        for name, summary in summaries.items()
        if name in policies or world.settings.training is not None
    }
    print(_header(world))
    print(table(HEADINGS, [summary_row(name, summary) for name, summary in shown.items()]))
    return _described(world) | {
        "policies": {name: summary.to_dict() for name, summary in shown.items()}
    }


def _header(world: World) -> str:
    budgets = world.settings.budgets
    return (
        f"{world.trace.name}: {len(world.trace.requests)} requests in "
        f"{world.trace.duration_s:.0f} s, {len(world.samples)} training samples; targets: first "
        f"token {1000 * budgets.ttft_s:.4g} ms, between tokens {1000 * budgets.tbt_s:.4g} ms"
    )


def _described(world: World) -> dict[str, Any]:
    settings = asdict(world.settings)
    settings["budgets"] = world.settings.budgets._asdict()
    return {
        "trace": {
            "name": world.trace.name,
            "requests": len(world.trace.requests),
            "duration_s": world.trace.duration_s,
            "samples": len(world.samples),
            "notes": list(world.trace.notes),
        },
        "settings": settings,
    }


# -- scenarios -----------------------------------------------------------------------------------


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
    with _progress(world.trace.duration_s) as start:
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
    print(_header(world))
    print(
        f"{len(inflow)} prompts of {large} tokens at {middle_s:.1f} s; times are of the other "
        f"requests that came within {after_s:.0f} s after that"
    )
    print(table(HEADINGS, rows))
    return _described(world) | {"scenario": "inflow", "policies": found}


def _variants(
    world: World,
    name: str,
    runs: Sequence[tuple[str, World, str, dict[str, Any]]],
) -> dict[str, Any]:
    """Runs side by side."""
    rows, found = [], {}
    with _progress(world.trace.duration_s) as start:
        for label, varied, policy, overrides in runs:
            result = simulate(varied, policy, overrides, progress=start(label))
            summary = summarize(result, varied.settings.budgets, visits=world.visits)
            found[label] = summary.to_dict()
            rows.append(summary_row(label, summary))
    print(_header(world))
    print(table(HEADINGS, rows))
    return _described(world) | {"scenario": name, "variants": found}


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
    from ..policy.settings import PolicySettings

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


class Witness:
    """Costs that are learned, or not, and how well each iteration was predicted before it ran."""

    def __init__(self, model: CostModel | None, costs: Costs) -> None:
        self._model = model
        self._costs = costs
        self.clock: Callable[[], float] = lambda: 0.0
        self._errors: list[tuple[float, float]] = []

    @property
    def costs(self) -> Costs:
        """What the policy is told."""
        return self._costs if self._model is None else self._model.costs

    def observe_iteration(
        self, shape: IterationShape, seconds: float, *, beside_training: float
    ) -> None:
        """See `LearningCosts`."""
        costs = self.costs
        predicted_s = costs.iteration_s(shape)
        predicted_s *= 1.0 + (costs.interference - 1.0) * beside_training
        self._errors.append((self.clock(), abs(predicted_s - seconds) / seconds))
        if self._model is not None:
            self._model.observe_iteration(shape, seconds, beside_training=beside_training)

    def observe_quantum(
        self, kind: str, tokens: int, seconds: float, *, beside_serving: float
    ) -> None:
        """See `LearningCosts`."""
        if self._model is not None and seconds > 0.0:
            self._model.observe_quantum(kind, tokens, seconds, beside_serving=beside_serving)

    def errors_after(self, start_s: float) -> list[float]:
        """|predicted - measured| / measured of the iterations that ended after this."""
        return [error for at_s, error in self._errors if at_s > start_s]


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
    with _progress(world.trace.duration_s) as start:
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
    print(_header(world))
    print(
        f"from {middle_s:.1f} s on the device is half as fast; recovered: iterations until the "
        f"median error of predictions is below {100 * CONVERGED:.0f} % for good"
    )
    print(table((*HEADINGS, "recovered"), rows))
    return _described(slowed) | {"scenario": "stale", "variants": found}


_SCENARIOS: Final = {
    "inflow": _inflow,
    "low-prefix": _low_prefix,
    "gamma": _gamma,
    "stale": _stale,
}


# -- beside live runs ----------------------------------------------------------------------------


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


def _compare(
    logs: Sequence[CoserveLog],
    costs: Costs | None,
    overrides: dict[str, Any],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Replay each run, and put the percentiles of those that belong together side by side."""
    groups: dict[tuple[str, float], list[CoserveLog]] = {}
    for log in logs:
        groups.setdefault((log.policy, log.retrain_rate), []).append(log)
    rows, found, errors = [], [], []
    until_s = max(log.duration_s for log in logs)
    with _progress(until_s) as start:
        for (policy, rate), members in groups.items():
            results = []
            for log in members:
                _policies(log.policy)
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
