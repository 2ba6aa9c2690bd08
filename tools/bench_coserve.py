"""Serving while learning under each policy: latencies, goodput, and how much training gets done.

    cotune bench coserve --data ../shared/data
    cotune bench coserve --data ../shared/data --policies inference-only cotune --rates 0 0.5
    cotune bench coserve --data ../shared/data --check inflow

Requests come at random times (Poisson, open loop) at a share of what a calibration finds this
machine can do; their lengths are those of a chat service's trace, scaled down (--scale-tokens), and
their texts are cut from real sessions; without --data both are made up. Feedback is given in bursts
of a batch at the pace that makes the stated share of tasks training. One task is one request, or
one visit of a sample by training: at retrain rate r there are r / (1 - r) visits per request, and
each pair is visited --epochs times. Reference log-probabilities of what is given are computed by
the serving engine under every policy. No candidates are judged or published: that is what `cotune
bench publish` measures.

Each policy runs on a fresh runtime with the same model, requests and feedback; policies take turns
within each round, and their order rotates, so that a slow moment of the machine meets them all. The
lanes have a thread each on a CPU. Targets, unless given: TTFT 10 times that of a request alone,
gaps 5 times a decode iteration of 32 requests without prompts (the strict target of Agrawal et al.
2024, "Sarathi-Serve", §5). A request attains them if its first token is in time and 99 of 100 of
its gaps are.

Better is: the attainment of `inference-only`, a low p99 of TBT, and training that is near 100 % of
what was asked or, where that is more than the device has left, of what is idle. The JSON file has
every request; `cotune simulate --compare` replays it.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..policy import POLICY_NAMES
from ..policy.settings import PolicySettings
from ..runtime.config import (
    DTYPES,
    LaneConfig,
    ModelConfig,
    RuntimeConfig,
    ScheduleConfig,
)
from ..runtime.errors import ConfigError
from ..runtime.learning.config import (
    FeedbackConfig,
    GateConfig,
    LearningConfig,
    TrainingConfig,
)
from . import coserve_checks as checks
from .bench_report import environment, print_json
from .coserve_load import (
    PREFERENCES_FILE,
    SESSIONS_FILE,
    TRACE_FILE,
    choose_feedback,
    feedback_times,
    made_up_lengths,
    made_up_pairs,
    made_up_texts,
    make_requests,
    poisson_times,
    read_lengths,
    read_pairs,
    read_texts,
)
from .coserve_log import CoserveLog, LoggedBudgets, LoggedTraining, Targets, write_logs
from .coserve_progress import Progress
from .coserve_report import Found, as_json, plot, summarize, table, verdicts
from .coserve_run import Calibration, RunPlan, calibrate, perform, train_alone
from .drift_plot import require_plots
from .options import loop_factory, parse_positive

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..policy.profile import Profile
    from ..runtime.runtime import Runtime
    from ..runtime.tokenization import TextCodec
    from .coserve_load import Arrival, Feedback, Lengths, TextPool
    from .coserve_report import Summary
    from .coserve_run import RunResult

NAME: Final = "coserve"
TTFT_FACTOR: Final = 10.0
TBT_FACTOR: Final = 5.0
"""Targets: times the TTFT of a request alone, and times a decode iteration of many."""
CALIBRATION_REQUESTS: Final = 250
CALIBRATION_S: Final = 20.0
ALONE_BURSTS: Final = 24
"""Of feedback, for training alone."""
START_S: Final = 2.5
"""About what starting a runtime, its first training and its end take."""
WINDOWS: Final = 4
"""Of the policy `periodic` in what is measured of a run."""
NEVER: Final = 1 << 20
"""So many held-out samples or events are never reached."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="directory or hub id (the demo model)")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    model.add_argument("--dtype", default="auto", choices=DTYPES)
    load = parser.add_argument_group("load")
    load.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help=f"folder with {TRACE_FILE}, {SESSIONS_FILE} and {PREFERENCES_FILE} (made up)",
    )
    load.add_argument(
        "--load",
        type=_share,
        default=0.5,
        metavar="SHARE",
        help="of the requests per second that inference alone can do (%(default)g)",
    )
    load.add_argument(
        "--requests-per-s", type=_positive, metavar="R", help="in place of --load: so many"
    )
    load.add_argument(
        "--scale-tokens",
        type=_positive,
        default=0.25,
        metavar="F",
        help="times the trace's lengths (%(default)g)",
    )
    load.add_argument(
        "--shared",
        type=_share,
        default=0.36,
        metavar="SHARE",
        help="of each prompt that others have in common with it (%(default)g)",
    )
    feedback = parser.add_argument_group("feedback")
    feedback.add_argument(
        "--batch-size",
        type=parse_positive,
        default=8,
        metavar="N",
        help="pairs of a step (%(default)s)",
    )
    feedback.add_argument(
        "--epochs",
        type=parse_positive,
        default=2,
        metavar="N",
        help="visits of each pair (%(default)s)",
    )
    feedback.add_argument(
        "--pair-tokens",
        type=parse_positive,
        default=512,
        metavar="N",
        help="most tokens of a pair, prompt and both answers (%(default)s)",
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--policies",
        nargs="+",
        choices=POLICY_NAMES,
        metavar="NAME",
        help=f"which to run ({', '.join(POLICY_NAMES)})",
    )
    run.add_argument(
        "--rates",
        nargs="+",
        type=_rate,
        default=None,
        metavar="RATE",
        help="shares of tasks that are training (0 0.1 0.3 0.5; of a check 0.3)",
    )
    run.add_argument("--rounds", type=parse_positive, default=2, metavar="N", help="%(default)s")
    run.add_argument(
        "--seconds",
        type=_positive,
        default=12.0,
        metavar="S",
        help="measured of a run (%(default)g)",
    )
    run.add_argument(
        "--warmup", type=_positive, default=2.0, metavar="S", help="of load before (%(default)g)"
    )
    run.add_argument(
        "--check",
        choices=checks.CHECKS,
        help="in place of the table: a sudden inflow of large prompts; the weight of the loss in "
        "the priority; prompts with nothing in common; a profile that is wrong by a factor of 3",
    )
    run.add_argument(
        "--noisy",
        type=_share,
        default=0.5,
        metavar="SHARE",
        help="of --check gamma: labels that are wrong with the noisy adapter (%(default)g)",
    )
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--ttft-target-ms", type=_positive, metavar="MS", help="(derived)")
    run.add_argument("--tbt-target-ms", type=_positive, metavar="MS", help="(derived)")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", type=Path, default=None, metavar="FILE", help="JSON (coserve.json)"
    )
    output.add_argument("--plot", type=Path, metavar="FILE", help="curves, as SVG, PNG or PDF")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark, print its figures and write its file."""
    if args.plot is not None:
        require_plots()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    bench = Bench(args)
    with Progress(bench.estimate_s) as progress:
        await bench.prepare(progress)
        if args.check is None:
            found = await bench.measure(progress)
        else:
            found = await checks.perform(args.check, bench, progress)
    print(found.text)
    output = args.output or Path("coserve.json" if args.check is None else f"{args.check}.json")
    report = bench.report() | found.report
    output.parent.mkdir(parents=True, exist_ok=True)
    write_logs(output, [bench.log(result) for result in found.results], report)
    print(f"\nrequests and all: {output}")
    if args.plot is not None and found.summaries:
        plot(args.plot, bench.title, found.summaries)
        print(f"plot: {args.plot}")
    print_json({name: item for name, item in report.items() if name != "runs"})
    return 0


class Bench:
    """The settings, what calibration found, and the plans that follow from both."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.policies: tuple[str, ...] = tuple(dict.fromkeys(args.policies or POLICY_NAMES))
        default_rates = (0.0, 0.1, 0.3, 0.5) if args.check is None else (0.3,)
        self.rates: tuple[float, ...] = tuple(dict.fromkeys(args.rates or default_rates))
        self._calibration: Calibration | None = None
        self._lengths: Sequence[Lengths] = ()
        self._texts: TextPool | None = None
        self._pairs: list[dict[str, Any]] = []
        self._codec: TextCodec | None = None
        self._alone: list[float] = []
        self._profile: Profile | None = None

    # -- before --------------------------------------------------------------------------------

    @property
    def run_s(self) -> float:
        """About what one run takes."""
        return float(self.args.warmup + self.args.seconds + START_S)

    @property
    def estimate_s(self) -> float:
        """About what everything takes."""
        if self.args.check is not None:
            return CALIBRATION_S + checks.runs_of(self.args.check, self) * self.run_s
        rounds: int = self.args.rounds
        cells = len(self.policies) * len(self.rates) * rounds
        return CALIBRATION_S + cells * self.run_s + rounds * self._alone_s * 2

    @property
    def _alone_s(self) -> float:
        return float(self.args.seconds) / 2 if self.trains else 0.0

    @property
    def trains(self) -> bool:
        """Whether any run trains."""
        return any(rate > 0.0 for rate in self.rates) and self.policies != ("inference-only",)

    async def prepare(self, progress: Progress) -> None:
        """Read the data, and find out what this machine can do."""
        from ..runtime.runtime import Runtime

        args = self.args
        progress.begin("calibrating")
        config = replace(self.config("inference-only"), learning=LearningConfig())
        async with Runtime(config=config) as runtime:
            self._codec = codec = runtime.codec
            vocab_size = runtime._served.loaded.vocab_size

            def encode(text: str) -> Sequence[int]:
                return codec.encode(text, add_special_tokens=False)

            if args.data is None:
                self._lengths = made_up_lengths(4096, args.seed)
                self._texts = made_up_texts(vocab_size, seed=args.seed)
                self._pairs = made_up_pairs(4096, seed=args.seed)
            else:
                self._lengths = read_lengths(args.data / TRACE_FILE)
                self._texts = read_texts(args.data / SESSIONS_FILE, encode, seed=args.seed)
                self._pairs = read_pairs(args.data / PREFERENCES_FILE)
            context, texts = runtime.max_model_len, self._texts
            requests = make_requests(
                [0.0] * CALIBRATION_REQUESTS,
                self._lengths,
                texts,
                factor=args.scale_tokens,
                context=context,
                shared=args.shared,
                seed=f"{args.seed} calibration",
            )
            draw = random.Random(args.seed)
            full = int(str(runtime.describe()["max_num_batched_tokens"]))
            full_prompts = [texts.prompt(draw, min(full, context - 1), 0.0) for _ in range(5)]
            self._calibration = await calibrate(runtime, requests, full_prompts)
            if args.check == "stale":
                self._profile = await asyncio.to_thread(_kept_profile, runtime)
        progress.say(self._calibration.words)
        progress.end(CALIBRATION_S)

    @property
    def calibration(self) -> Calibration:
        """What this machine can do."""
        assert self._calibration is not None, "prepared"
        return self._calibration

    @property
    def profile(self) -> Profile:
        """What work costs here, as it was measured at the first start."""
        if self._profile is None:
            raise ConfigError(
                "--check stale needs the profile that a start leaves behind, and none was kept; "
                "set XDG_CACHE_HOME to a directory that can be written"
            )
        return self._profile

    @property
    def requests_per_s(self) -> float:
        """The load."""
        given: float | None = self.args.requests_per_s
        return float(self.args.load * self.calibration.requests_per_s) if given is None else given

    @property
    def targets(self) -> Targets:
        """Given, or derived from the calibration."""
        args, found = self.args, self.calibration
        ttft_s, tbt_s = args.ttft_target_ms, args.tbt_target_ms
        return Targets(
            ttft_s=TTFT_FACTOR * found.ttft_s if ttft_s is None else ttft_s / 1e3,
            tbt_s=TBT_FACTOR * found.decode_s if tbt_s is None else tbt_s / 1e3,
        )

    @property
    def title(self) -> str:
        """Of the plot."""
        targets = self.targets
        return (
            f"co-serving, {self.requests_per_s:.1f} requests/s; targets: TTFT "
            f"{1e3 * targets.ttft_s:.0f} ms, TBT {1e3 * targets.tbt_s:.0f} ms"
        )

    # -- plans -----------------------------------------------------------------------------------

    def config(self, policy: str, **schedule: Any) -> RuntimeConfig:
        """Of a runtime; `schedule` are further settings of `ScheduleConfig`."""
        args = self.args
        training = TrainingConfig(
            batch_size=args.batch_size, epochs=args.epochs, replay_share=0.0, threads=1
        )
        if self._calibration is not None:
            schedule = {
                "ttft_target_s": self.targets.ttft_s,
                "tbt_target_s": self.targets.tbt_s,
            } | schedule
        settings = schedule.pop("settings", PolicySettings())
        schedule["settings"] = replace(settings, periodic_window_s=args.seconds / WINDOWS)
        return RuntimeConfig(
            model=ModelConfig(source=args.model, device=args.device, dtype=args.dtype),
            schedule=ScheduleConfig(policy=policy, stop_grace_s=0.0, max_queue=NEVER, **schedule),
            lanes=LaneConfig(inference_threads=1),
            learning=LearningConfig(
                enabled=True,
                training=training,
                feedback=FeedbackConfig(quota_events=NEVER, record_responses=False),
                gate=GateConfig(min_held_out=NEVER, max_held_out=NEVER),
            ),
            seed=args.seed,
        )

    def plan(
        self,
        policy: str,
        rate: float,
        round_: int,
        *,
        label: str | None = None,
        shared: float | None = None,
        extra: Sequence[Arrival] = (),
        models: tuple[str | None, ...] = (None,),
        backlog: int = 0,
        epochs: int | None = None,
    ) -> RunPlan:
        """A run; the load depends on the seed and the round alone.

        Args:
            policy, rate, round_: of the run.
            label: for people.
            shared: share of prompts that is in common, if not as given.
            extra: further requests.
            models, backlog, epochs: see `RunPlan`.
        """
        args = self.args
        epochs = args.epochs if epochs is None else epochs
        seed = f"{args.seed} {round_}"
        times_s = poisson_times(self.requests_per_s, args.warmup + args.seconds, seed)
        assert self._texts is not None, "prepared"
        arrivals = make_requests(
            times_s,
            self._lengths,
            self._texts,
            factor=args.scale_tokens,
            context=self.calibration.context,
            shared=args.shared if shared is None else shared,
            seed=seed,
        )
        bursts_s = feedback_times(
            rate,
            sum(at_s >= args.warmup for at_s in times_s),
            warmup_s=args.warmup,
            seconds=args.seconds,
            visits=args.batch_size * epochs,
        )
        return RunPlan(
            label=f"{rate:.0%}" if label is None else label,
            policy=policy,
            rate=rate,
            round=round_,
            arrivals=tuple(sorted([*arrivals, *extra], key=lambda arrival: arrival.at_s)),
            bursts_s=tuple(bursts_s),
            feedback=self._feedback(len(models) + backlog + len(bursts_s), models, seed),
            burst=args.batch_size,
            epochs=epochs,
            warmup_s=args.warmup,
            seconds=args.seconds,
            models=models,
            backlog=backlog,
        )

    def inflow(self, at_s: float, count: int, seed: object) -> list[Arrival]:
        """Large prompts, all at once: three quarters of the context each."""
        from .coserve_load import make_inflow

        assert self._texts is not None, "prepared"
        tokens = self.calibration.context * 3 // 4
        return make_inflow(at_s, count, tokens, self._texts, seed=seed)

    def _feedback(self, bursts: int, models: tuple[str | None, ...], seed: object) -> Feedback:
        from ..runtime.learning.samples import is_held_out

        codec = self._codec
        assert codec is not None, "prepared"
        share = LearningConfig().gate.held_out_share
        names = [self.calibration.served_name if name is None else name for name in models]

        def on_the_gates_side(prompt: Sequence[int]) -> bool:
            """Of all adapters, or it would be trained on by some and not by others."""
            return any(is_held_out(name, prompt, share) for name in names)

        return choose_feedback(
            self._pairs,
            encode_prompt=codec.encode_chat,
            encode=lambda text: codec.encode(text, add_special_tokens=False),
            is_held_out=on_the_gates_side,
            most_tokens=min(self.args.pair_tokens, self.calibration.context),
            pairs=bursts * self.args.batch_size,
            primers=bursts,
            seed=seed,
        )

    # -- the table -------------------------------------------------------------------------------

    async def measure(self, progress: Progress) -> Found:
        """All policies at all rates, round after round."""
        results: list[RunResult] = []
        turn = 0
        for round_ in range(self.args.rounds):
            if self.trains:
                await self._train_alone(round_, progress)
            for rate in self.rates:
                for policy in self.rotated(self.policies, turn):
                    plan = self.plan(policy, rate, round_)
                    results.append(await self.perform(self.config(policy), plan, progress))
                turn += 1
        summaries = self.summarize(results)
        order = {policy: place for place, policy in enumerate(self.policies)}
        summaries.sort(key=lambda each: (each.rate, order[each.policy], each.round))
        text = "\n".join([table(summaries), "", *verdicts(summaries)])
        report = {
            "training_alone_rows_per_s": self._alone,
            "table": table(summaries),
            "verdicts": verdicts(summaries),
            "runs": [as_json(summary) for summary in summaries],
        }
        return Found(text=text, report=report, results=results, summaries=summaries)

    @staticmethod
    def rotated(policies: Sequence[str], turn: int) -> list[str]:
        """The same in another order: nobody is always first."""
        place = turn % len(policies)
        return [*policies[place:], *policies[:place]]

    async def perform(self, config: RuntimeConfig, plan: RunPlan, progress: Progress) -> RunResult:
        """One run."""
        progress.begin(f"round {plan.round + 1}, {plan.label}: {plan.policy}")
        result = await perform(config, plan)
        progress.end(self.run_s)
        return result

    async def _train_alone(self, round_: int, progress: Progress) -> None:
        """Training with nothing beside it, under a policy that never keeps it waiting."""
        progress.begin(f"round {round_ + 1}: training alone")
        plan = replace(
            self.plan("continuous", 0.0, round_, backlog=ALONE_BURSTS),
            arrivals=(),
            seconds=self._alone_s,
        )
        self._alone.append(await train_alone(self.config("continuous"), plan))
        progress.say(f"training alone: {self._alone[-1]:.0f} rows/s")
        progress.end(2 * self._alone_s)

    def summarize(self, results: Sequence[RunResult]) -> list[Summary]:
        """Runs in numbers, each beside `inference-only` on its load."""
        busy = {
            (result.plan.label, result.plan.rate, result.plan.round): result.usage.busy
            for result in results
            if result.plan.policy == "inference-only"
        }
        return [
            summarize(
                result,
                self.targets,
                idle_busy=busy.get((result.plan.label, result.plan.rate, result.plan.round)),
                alone=self._alone[min(result.plan.round, len(self._alone) - 1)]
                if self._alone
                else None,
            )
            for result in results
        ]

    # -- afterwards ------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """The settings, the calibration and the machine."""
        args = {
            name: str(item) if isinstance(item, Path) else item
            for name, item in vars(self.args).items()
            if isinstance(item, str | int | float | list | Path | None)
        }
        return {
            "benchmark": NAME,
            "settings": args,
            "policies": list(self.policies),
            "rates": list(self.rates),
            "calibration": asdict(self.calibration),
            "requests_per_s": self.requests_per_s,
            "targets": asdict(self.targets),
            "environment": environment(),
        }

    def log(self, result: RunResult) -> CoserveLog:
        """The record of a run that the simulator replays."""
        plan, chosen, usage = result.plan, result.chosen, result.usage
        training = TrainingConfig()
        return CoserveLog(
            policy=plan.policy,
            targets=self.targets,
            budgets=LoggedBudgets(
                tokens=chosen["max_num_batched_tokens"],
                sequences=chosen["max_num_seqs"],
                page_size=chosen["page_size"],
            ),
            pages=chosen["num_pages"],
            duration_s=max([plan.total_s, *(o.ended_s for o in result.outcomes)]),
            requests=tuple(outcome.request for outcome in result.outcomes),
            retrain_rate=plan.rate,
            settings=result.settings,
            training=LoggedTraining(
                batch_size=plan.burst,
                batch_wait_s=training.batch_wait_s,
                quantum_tokens=training.quantum_tokens,
                epochs=plan.epochs,
                replay_share=0.0,
            ),
            samples=result.samples,
            trained_tokens=result.trained_tokens,
            costs=result.costs,
            overhead_s=(usage.plan_s + usage.commit_s) / max(1, usage.iterations),
            round=plan.round,
        )


def _kept_profile(runtime: Runtime) -> Profile | None:
    """The one that this runtime started with. Reads files."""
    from ..runtime.scheduling.profiles import key_of, load

    served = runtime._served
    loaded = served.loaded
    return load(key_of(loaded, device=served.device, dtype=loaded.dtype, threads=1))


# -- values of flags -----------------------------------------------------------------------------


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _positive(text: str) -> float:
    value = _number(text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _share(text: str) -> float:
    value = _number(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not a share: use 0 to 1")
    return value


def _rate(text: str) -> float:
    value = _number(text)
    if not 0.0 <= value <= 0.95:
        raise argparse.ArgumentTypeError(
            f"{text} is not a retrain rate: use 0 to 0.95, as in 0.3 for 30 %"
        )
    return value
