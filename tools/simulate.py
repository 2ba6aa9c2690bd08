"""Replay a trace through the scheduling policies in virtual time.

The policies are the ones that serve; the device is a profile: what each iteration and each training
quantum costs. Arrivals, lengths and shared prefixes come from a trace, training samples come at the
retrain rate. Minutes of traffic take seconds, and no model is needed.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..policy import POLICY_NAMES
from ..policy.profile import Profile, ProfileError
from ..policy.settings import PolicySettings
from ..policy.types import Budgets
from ..runtime.config import ScheduleConfig
from ..runtime.errors import ConfigError
from ..runtime.scheduling.targets import choose_targets
from .bench_report import machine
from .coserve_log import LoggedTraining, read_logs
from .options import parse_count
from .simulation_compare import compare
from .simulation_report import HEADINGS, Summary, summarize, summary_row, table, with_baseline
from .simulation_run import World, described, heading, simulate, time_bars
from .simulation_scenarios import SCENARIOS, make_requests
from .simulation_training import samples_of
from .simulation_types import SimulationSettings
from .traces import find_trace, read_trace, transform

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from ..policy.costs import Costs

BASELINE: Final = "inference-only"
PROFILES: Final = Path(__file__).parent / "device_profiles"

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
        "--scenario",
        choices=tuple(SCENARIOS),
        help="a situation that schedulers find hard, in variants",
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
        default="cotune",
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
        report = compare(logs, None if profile is None else profile.costs, overrides)
    else:
        assert profile is not None
        world = _world(args, profile.costs)
        for note in world.trace.notes:
            print(f"note: {note}", file=sys.stderr)
        if args.scenario:
            report = SCENARIOS[args.scenario](world, policies, overrides, profile)
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


def _replay(world: World, policies: Sequence[str], overrides: dict[str, Any]) -> dict[str, Any]:
    """The trace through each policy; the baseline always runs, to know what it leaves idle."""
    summaries: dict[str, Summary] = {}
    with time_bars(world.trace.duration_s) as start:
        for name in dict.fromkeys((BASELINE, *policies)):
            result = simulate(world, name, overrides, progress=start(name))
            summaries[name] = summarize(result, world.settings.budgets, visits=world.visits)
    baseline = summaries[BASELINE]
    shown = {
        name: summary if name == BASELINE else with_baseline(summary, baseline)
        for name, summary in summaries.items()
        if name in policies or world.settings.training is not None
    }
    print(heading(world))
    print(table(HEADINGS, [summary_row(name, summary) for name, summary in shown.items()]))
    return described(world) | {
        "policies": {name: summary.to_dict() for name, summary in shown.items()}
    }


# -- what the flags say ---------------------------------------------------------------------------


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
        trace = make_requests(costs, args.seed)
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
