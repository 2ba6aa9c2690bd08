"""`cotune trace`: save what a running server's lanes did, to be looked at in Perfetto."""

from __future__ import annotations

import contextlib
import math
import time
import urllib.parse
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import orjson

from ..runtime.errors import ConfigError
from ..runtime.scheduling.timeline import TimelineSnapshot, chrome_trace
from .live_server import LiveServer, ServerError
from .options import add_api_key_argument, add_general_arguments, api_key
from .progress_bar import progress_bar

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from ..runtime.scheduling.timeline import IterationRecord, JobRecord, Mark, QuantumRecord

EPILOG = """\
examples:
  cotune trace                                       the next ten seconds of the server here
  cotune trace --seconds 60 --output busy.json
  cotune trace --past --url http://127.0.0.1:8000    what it still remembers, at once

Open the file at https://ui.perfetto.dev (it stays in the browser) or in chrome://tracing. There is
a row for the scheduler's decisions, one for the inference lane and one for the training lane;
click a slice for what it held, what it was expected to take and what it took.
"""

DEFAULT_URL: Final = "http://127.0.0.1:8000"
POLL_S: Final = 1.0
"""The server is asked this often: it remembers some thousand iterations, and forgets the others."""
OVERLAP_S: Final = 1.0
"""Each time it is asked for so much more than is new."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``cotune trace``."""
    parser.description = (
        "Save what the lanes of a running server do: each iteration and each training quantum, as "
        "planned and as measured. Ctrl-C ends it early and saves what there is."
    )
    parser.epilog = EPILOG
    what = parser.add_argument_group("trace")
    what.add_argument("--url", default=DEFAULT_URL, metavar="URL", help="the server (%(default)s)")
    what.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="for how long to watch (10), or, with --past, how far to look back (all)",
    )
    what.add_argument(
        "--past", action="store_true", help="what has happened already instead of what comes"
    )
    what.add_argument(
        "--output",
        type=Path,
        default=Path("cotune-trace.json"),
        metavar="FILE",
        help="where to write (%(default)s)",
    )
    add_api_key_argument(what)
    add_general_arguments(parser, default_log_level="warning")


def run(args: argparse.Namespace) -> int:
    """Watch, and write the file."""
    seconds: float | None = args.seconds
    if seconds is not None and not (math.isfinite(seconds) and seconds > 0.0):
        raise ConfigError(f"--seconds is {seconds}; use a number above 0")
    if not args.output.absolute().parent.is_dir():
        raise ConfigError(
            f"--output is {args.output}, and there is no directory {args.output.parent}; make it "
            "first"
        )
    remedy = "start one with `cotune serve`, or give its --url"
    server = TimelineServer(LiveServer(args.url, api_key(args), remedy))
    recording = Recording()
    if args.past:
        recording.add(server.records(seconds))
    else:
        with _progress(seconds or 10.0) as show:
            watch(server, recording, seconds or 10.0, show)
    snapshot = recording.snapshot()
    try:
        args.output.write_bytes(orjson.dumps(chrome_trace(snapshot, recording.epoch)))
    except OSError as error:
        raise ConfigError(f"--output {args.output} cannot be written: {error.strerror}") from error
    print(describe(snapshot, recording.lost))
    print(f"wrote {args.output}; open it at https://ui.perfetto.dev")
    return 0


# -- recording -----------------------------------------------------------------------------------


class Source(Protocol):
    """Where records come from."""

    def records(self, seconds: float | None) -> dict[str, Any]:
        """The body of /v1/timeline as records, of the last seconds (None: all of it)."""


class Recording:
    """Pieces of a timeline that overlap, put together.

    Attributes:
        epoch: the zero of the server's clock, in seconds since 1970.
    """

    def __init__(self) -> None:
        self.epoch = 0.0
        self._now_s = 0.0
        self._since_s: float | None = None
        self._iterations: dict[tuple[int, float], IterationRecord] = {}
        self._quanta: dict[tuple[str, float], QuantumRecord] = {}
        self._jobs: dict[tuple[str, float], JobRecord] = {}
        self._marks: dict[Mark, None] = {}

    def begin(self, body: dict[str, Any]) -> None:
        """What ended before this moment is not part of it."""
        self.epoch, self._now_s = float(body["epoch"]), float(body["now_s"])
        self._since_s = self._now_s

    def add(self, body: dict[str, Any]) -> None:
        """Take what is new in a piece."""
        piece = TimelineSnapshot.from_dict(body)
        self.epoch, self._now_s = float(body["epoch"]), piece.now_s
        since_s = -math.inf if self._since_s is None else self._since_s
        for iteration in piece.iterations:
            if iteration.ended_s >= since_s:
                self._iterations[iteration.index, iteration.started_s] = iteration
        for quantum in piece.quanta:
            if quantum.ended_s >= since_s:
                self._quanta[quantum.adapter, quantum.started_s] = quantum
        for job in piece.jobs:
            if job.ended_s >= since_s:
                self._jobs[job.adapter, job.started_s] = job
        for mark in piece.marks:
            if mark.at_s >= since_s:
                self._marks[mark] = None

    @property
    def lost(self) -> int:
        """Iterations that the server had forgotten when it was asked."""
        indices = [record.index for record in self._iterations.values()]
        return sum(max(after - before - 1, 0) for before, after in pairwise(indices))

    def snapshot(self) -> TimelineSnapshot:
        """All of it."""
        return TimelineSnapshot(
            now_s=self._now_s,
            iterations=tuple(self._iterations.values()),
            quanta=tuple(self._quanta.values()),
            jobs=tuple(self._jobs.values()),
            marks=tuple(self._marks),
        )


def watch(
    source: Source,
    recording: Recording,
    seconds: float,
    show: Callable[[float, int], None],
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Record what comes in the next seconds, or until Ctrl-C."""
    recording.begin(source.records(POLL_S))
    began_s = asked_s = clock()
    try:
        while (left_s := began_s + seconds - clock()) > 0.0:
            sleep(min(POLL_S, left_s))
            now_s = clock()
            recording.add(source.records(now_s - asked_s + OVERLAP_S))
            asked_s = now_s
            show(now_s - began_s, len(recording.snapshot().iterations))
    except KeyboardInterrupt:
        recording.add(source.records(clock() - asked_s + OVERLAP_S))


def describe(snapshot: TimelineSnapshot, lost: int) -> str:
    """What was recorded, in a few lines."""
    iterations, quanta = snapshot.iterations, snapshot.quanta
    span_s = max(snapshot.now_s - snapshot.starts_s, 0.0)
    lines = [f"{len(iterations)} iterations and {len(quanta)} training quanta in {span_s:.1f} s"]
    if iterations:
        busy_s = sum(record.seconds for record in iterations)
        decided_s = sum(record.plan_s for record in iterations) / len(iterations)
        beside_s = sum(record.seconds * record.beside_training for record in iterations)
        lines.append(
            f"an iteration took {busy_s / len(iterations) * 1e3:.2f} ms, a decision "
            f"{decided_s * 1e6:.0f} us; training ran beside "
            f"{beside_s / busy_s if busy_s else 0.0:.0%} of that time"
        )
    timed = [r for r in iterations if r.predicted_s is not None and r.seconds > 0.0]
    if timed:
        off = sorted(abs((r.predicted_s or 0.0) - r.seconds) / r.seconds for r in timed)
        lines.append(f"predictions were off by {off[len(off) // 2]:.0%} (median)")
    if lost:
        lines.append(f"{lost} iterations are missing: the server had forgotten them by then")
    return "\n".join(lines)


@contextlib.contextmanager
def _progress(seconds: float) -> Iterator[Callable[[float, int], None]]:
    with progress_bar() as bar:
        task = bar.add_task("watching", total=seconds)
        yield lambda done_s, iterations: bar.update(
            task, completed=done_s, description=f"watching: {iterations} iterations"
        )


# -- the server ----------------------------------------------------------------------------------


class TimelineServer:
    """The timeline of a server that runs."""

    def __init__(self, server: LiveServer) -> None:
        self._server = server

    def records(self, seconds: float | None) -> dict[str, Any]:
        """See `Source.records`.

        Raises:
            ServerError: there is no such server, or it refuses; says what to do.
        """
        asked = {"format": "records"} | ({} if seconds is None else {"seconds": f"{seconds:.3f}"})
        body = self._server.ask("GET", f"/timeline?{urllib.parse.urlencode(asked)}")
        if not isinstance(body, dict) or body.get("object") != "timeline":
            raise ServerError(f"{self._server.url} does not answer as cotune: {body!r:.200}")
        return body
