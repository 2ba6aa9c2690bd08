"""Does it learn? Replay feedback whose topic drifts while chat traffic runs, and measure.

    stream ─► WebSocket /v1/feedback ─► the runtime learns, judges and publishes
    prompts ─► POST /v1/chat/completions, streamed ─► TTFT, TBT
    held-out fifth of each phase, never sent ─► every published version ─► win rates

Server, users and evaluation live in this one process, on a free port of this machine. Nothing of
the held-out rows is ever sent. Answers of the versions are not looked at: how likely each version
finds the chosen and the rejected answer of every held-out row is, by `Runtime.score`.

The stream waits for a learner that is behind (--max-ahead), so that a slow machine measures the
same thing as a fast one; 0 switches that off. It ends when the learner has nothing left to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..runtime.errors import ConfigError, CotuneError
from .bench_report import environment
from .drift_plot import plot, plot_pool, require_plots
from .drift_report import WINS, curves, pool, read_reports, table, write_json
from .drift_run import DriftRun, DriftSettings, TurnCodec, plain
from .drift_stream import read_stream
from .options import (
    add_general_arguments,
    add_runtime_arguments,
    loop_factory,
    runtime_config,
)

if TYPE_CHECKING:
    import argparse

    from ..runtime.config import RuntimeConfig
    from .drift_report import Win
    from .drift_stream import DriftStream

STREAMS: Final = ("persona", "text")
KEPT_VERSIONS: Final = 100_000

EPILOG = """\
examples:
  cotune drift --data ../shared/data                      the persona stream, plot and JSON
  cotune drift --data ../shared/data --stream text --events-per-s 2
  cotune drift --data ../shared/data --flip 0.3           three labels in ten are wrong
  cotune drift --data ../shared/data --users 4 --flood 5  a fifth user floods the opposite
  cotune drift --data ../shared/data --limit 40 --chat-per-s 0     a quick look

  for k in 0 1 2 3 4; do cotune drift --data ../shared/data --evaluation-fold $k --output $k.json
  done; cotune drift --pool ?.json --plot pooled.svg    every row held out in one of five

The exit status is 0 when the run was completed, whatever it found.
"""


# -- the command ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``cotune drift``."""
    settings = DriftSettings()
    parser.usage = "cotune drift [MODEL] --data DIR [flags]"
    parser.description = __doc__
    parser.epilog = EPILOG
    stream = parser.add_argument_group("stream")
    stream.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with drift_persona.jsonl.gz and drift_text.jsonl.gz",
    )
    stream.add_argument(
        "--stream",
        default=STREAMS[0],
        metavar="NAME",
        help=f"{' or '.join(STREAMS)}: the file drift_NAME.jsonl.gz ({STREAMS[0]})",
    )
    pace = stream.add_mutually_exclusive_group()
    pace.add_argument(
        "--speed",
        type=float,
        default=None,
        metavar="X",
        help=f"times faster than the times in the file, which span 42 minutes ({settings.speed:g})",
    )
    pace.add_argument(
        "--events-per-s", type=float, metavar="R", help="a steady pace in place of that"
    )
    stream.add_argument(
        "--max-ahead",
        type=int,
        default=settings.max_ahead,
        metavar="N",
        help="wait for the learner after so many events and at the end of each phase, until it has "
        "done what it can with them; 0: never (%(default)s)",
    )
    stream.add_argument(
        "--users",
        type=int,
        default=settings.users,
        metavar="N",
        help="people who share the feedback among them (%(default)s)",
    )
    stream.add_argument(
        "--flip",
        type=float,
        default=settings.flip,
        metavar="SHARE",
        help="share of labels to turn round (%(default)g)",
    )
    stream.add_argument(
        "--flood",
        type=int,
        nargs="?",
        const=5,
        default=settings.flood,
        metavar="N",
        help="one more user sends each phase turned round, N times over, as it begins (5)",
    )
    stream.add_argument(
        "--limit", type=int, metavar="N", help="only the first N rows of each phase (all)"
    )
    stream.add_argument(
        "--evaluation-share",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="share of each phase that is never sent, and evaluated (%(default)g)",
    )
    stream.add_argument(
        "--evaluation-fold",
        type=int,
        default=0,
        metavar="K",
        help="which share of the prompts that is, from 0; see --pool (%(default)s)",
    )
    stream.add_argument(
        "--evaluate",
        choices=("all", "current"),
        default=settings.evaluate,
        help="phases that every version is evaluated on (%(default)s)",
    )
    stream.add_argument(
        "--settle-s",
        type=float,
        default=settings.settle_s,
        metavar="S",
        help="longest wait at the end for the learner to finish (%(default)g)",
    )
    chat = parser.add_argument_group("chat traffic")
    chat.add_argument(
        "--chat-per-s",
        type=float,
        default=settings.chat_per_s,
        metavar="R",
        help="chat requests per second; 0: none (%(default)g)",
    )
    chat.add_argument(
        "--chat-tokens",
        type=int,
        default=settings.chat_tokens,
        metavar="N",
        help="tokens of each answer (%(default)s)",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the report, as JSON (drift-NAME.json)",
    )
    output.add_argument(
        "--pool",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="run nothing; read the reports of runs with different --evaluation-fold, and print "
        "the table of all their held-out rows together",
    )
    output.add_argument(
        "--plot", type=Path, metavar="FILE", help="the curves, as SVG, PNG or PDF (none)"
    )
    output.add_argument(
        "--win",
        choices=WINS,
        default="sum",
        help="what the plot and the progress show; the report has all three (%(default)s)",
    )
    add_runtime_arguments(parser, learning=True)
    add_general_arguments(parser, default_log_level="warning")


def run(args: argparse.Namespace) -> int:
    """Replay the stream, and write the report; the exit status."""
    if args.pool is not None:
        for win in WINS:
            print(f"\n{table(pool(args.pool, win), win)}")
        if args.plot is not None:
            require_plots()
            reports = read_reports(args.pool)
            title = f"drift_{reports[0]['stream']}, {len(reports)} runs, each with other rows"
            plot_pool(args.plot, f"{title} held out", reports, args.win)
            print(f"plot: {args.plot}")
        return 0
    if args.data is None:
        raise ConfigError("--data is missing; give the folder of the streams", param="data")
    settings = DriftSettings(
        speed=_speed(args),
        events_per_s=args.events_per_s,
        users=args.users,
        flip=args.flip,
        flood=args.flood,
        max_ahead=args.max_ahead,
        chat_per_s=args.chat_per_s,
        chat_tokens=args.chat_tokens,
        settle_s=args.settle_s,
        evaluate=args.evaluate,
        seed=args.seed or 0,
    )
    settings.validate()
    if not 0 < args.evaluation_share < 1:
        raise ConfigError(
            f"--evaluation-share is {args.evaluation_share:g}; use a share between 0 and 1"
        )
    if args.evaluation_fold < 0 or (args.evaluation_fold + 1) * args.evaluation_share > 1 + 1e-9:
        raise ConfigError(
            f"--evaluation-fold is {args.evaluation_fold}, and there are "
            f"{int(1 / args.evaluation_share + 1e-9)} of --evaluation-share "
            f"{args.evaluation_share:g}; use 0 or more, and fewer than that"
        )
    if args.plot is not None:
        require_plots()
    stream = read_stream(
        args.data / f"drift_{args.stream}.jsonl.gz",
        held_out_share=args.evaluation_share,
        fold=args.evaluation_fold,
        limit=args.limit,
    )
    config = runtime_config(args)
    if not config.learning.enabled:
        raise ConfigError("--no-learning leaves nothing to measure; leave it out")
    learning = config.learning
    waits_s = (learning.training.batch_wait_s, learning.gate.candidate_wait_s)
    settings = replace(settings, quiet_s=max(waits_s) + 1.0)
    # Every version is evaluated some time after it went live, and none may be gone by then.
    learning = replace(learning, gate=replace(learning.gate, keep_versions=KEPT_VERSIONS))
    with contextlib.ExitStack() as stack:
        if learning.state_dir is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="cotune-drift-"))
            learning = replace(learning, state_dir=Path(folder))
        config = replace(config, learning=learning)
        _say(f"loading {config.model.source or 'the demo model'}")
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            try:
                report = runner.run(_run(config, stream, settings, args.win))
            except BaseExceptionGroup as group:
                raise _first_of(group) from group
    report = {
        "command": sys.argv[1:],
        "stream": args.stream,
        "evaluation": {"share": args.evaluation_share, "fold": args.evaluation_fold},
    } | report
    output = args.output or Path(f"drift-{args.stream}.json")
    write_json(output, report)
    for win in WINS:
        print(f"\n{report['tables'][win]}")
    print(f"\n{_words(report)}")
    print(f"report: {output}")
    if args.plot is not None:
        plot(args.plot, _title(args.stream, settings), *curves(report), args.win)
        print(f"plot: {args.plot}")
    return 0


def _speed(args: argparse.Namespace) -> float | None:
    """Of the file's times; None where a pace is given."""
    if args.events_per_s is not None:
        return None
    return DriftSettings().speed if args.speed is None else float(args.speed)


async def _run(
    config: RuntimeConfig, stream: DriftStream, settings: DriftSettings, win: Win
) -> dict[str, Any]:
    from ..runtime.runtime import Runtime
    from ..web.server import serve
    from ..web.settings import ServerSettings

    stop = asyncio.Event()
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    async with Runtime(config=config) as runtime, asyncio.TaskGroup() as group:
        web = ServerSettings(port=0, shutdown_timeout_s=5.0)
        group.create_task(serve(runtime, web, on_ready=ready.set_result, stop=stop))
        try:
            codec = runtime.codec
            end = codec.tokenizer.eos_token_id
            turns = TurnCodec(
                prompt=codec.encode_chat,
                answer=lambda text: (
                    codec.encode(text, add_special_tokens=False) + ([] if end is None else [end])
                ),
            )
            drift = DriftRun(runtime, await ready, stream, settings, turns, win=win, say=_say)
            report = await drift.run()
        finally:
            stop.set()
    return report | {"environment": environment(), "config": plain(asdict(config))}


# -- helpers -------------------------------------------------------------------------------------


def _title(stream: str, settings: DriftSettings) -> str:
    parts = [f"drift_{stream}"]
    if settings.flip:
        parts.append(f"{settings.flip:.0%} of labels flipped")
    if settings.flood:
        parts.append("one user floods the opposite")
    return ", ".join(parts)


def _words(report: dict[str, Any]) -> str:
    """Versions, feedback and latencies for people."""
    versions = report["versions"]
    published = [v for v in versions if v["state"] == "published"]
    reasons = Counter(reason for v in versions for reason in v["reasons"])
    undecided: Counter[str] = Counter()
    for adapter in report["learning"]["adapters"]:
        undecided.update(adapter["candidates_undecided"])
    feedback, chat = report["feedback"], report["chat"]
    lines = [
        f"{report['seconds']:.0f} s, {feedback['sent']} events sent, "
        f"{feedback['acknowledged']} acknowledged"
        + "".join(f", {n} refused ({code})" for code, n in feedback["refused"].items())
        + "".join(
            f", {n} of the flood refused ({c})" for c, n in feedback["refused_of_flood"].items()
        ),
        f"versions: {len(published)} published, {len(versions) - len(published)} refused"
        + (f" ({', '.join(f'{r}: {n}' for r, n in reasons.items())})" if reasons else "")
        + f"; {undecided.total()} candidates left undecided"
        + (f" ({', '.join(f'{r}: {n}' for r, n in undecided.items())})" if undecided else ""),
    ]
    for name, words in (("ttft", "chat TTFT"), ("tbt", "chat TBT")):
        for when, times in chat[name].items():
            if times["n"]:
                lines.append(
                    f"{words} {when.replace('_', ' ')}: p50 {times['p50_ms']:.1f} ms, p99 "
                    f"{times['p99_ms']:.1f} ms (n = {times['n']})"
                )
    if not report["is_settled"]:
        lines.append("the learner was not done when --settle-s had passed")
    return "\n".join(lines)


def _first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What went wrong in a group of tasks: an error that can be told to people, if there is one."""
    told, _ = group.split(CotuneError)
    error: BaseException = told or group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _say(text: str) -> None:
    print(f"cotune drift: {text}", file=sys.stderr, flush=True)
