"""What became of a drift run: win rates with intervals, a table, a JSON file.

A version *wins* a held-out pair if it prefers the chosen answer. Three ways to ask that:

    sum        logp(chosen) > logp(rejected): which answer it would rather give, as a whole
    per token  the same, divided by the number of tokens: not decided by which answer is longer
    implicit   (logp - base's logp) of chosen > that of rejected: the implicit reward of DPO; what
               training has changed. Of the base model all are equal: one half, by definition

A tie is half a win. Intervals are Wilson's (1927), 95 %. Values only; nothing here runs a model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping  # noqa: TC003 - dataclass fields are inspected at run time
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

from ..runtime.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

Win: TypeAlias = Literal["sum", "per_token", "implicit"]
WINS: Final[tuple[Win, ...]] = get_args(Win)
WIN_WORDS: Final[Mapping[Win, str]] = {
    "sum": "log-probability of the answer",
    "per_token": "log-probability per token",
    "implicit": "implicit reward",
}
Z_95: Final = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True)
class Interval:
    """A share, and where it may lie with 95 % confidence."""

    rate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PairLogps:
    """A version's log-probabilities of one held-out pair, summed over completion tokens."""

    chosen: float
    rejected: float
    chosen_tokens: int
    rejected_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseResult:
    """How a version does on the held-out rows of one phase.

    Attributes:
        pairs: how many rows.
        wins: how many it gets right, by definition of winning.
        chosen_change, rejected_change: mean change of the log-probability per token against the
            base model.
    """

    pairs: int
    wins: Mapping[Win, float]
    chosen_change: float
    rejected_change: float

    def interval(self, win: Win) -> Interval:
        """The win rate."""
        return wilson(self.wins[win], self.pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """One version, on the held-out rows of some phases.

    Attributes:
        version: its number; 0 is the base model.
        live_at_s: when it was seen to be live first, in seconds since the start of the stream.
        sent: events that had been sent by then.
        phase: the phase of the stream at that time.
        results: by phase.
    """

    version: int
    live_at_s: float
    sent: int
    phase: int
    results: Mapping[int, PhaseResult]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseSpan:
    """When a phase was.

    Attributes:
        name: of the phase.
        start_s, end_s: of its first event, and the next phase's first (or the run's end).
        start_sent, end_sent: events sent before it, and by its end.
        live_at_start, live_at_end: numbers of the versions that were live then.
    """

    name: str
    start_s: float
    end_s: float
    start_sent: int
    end_sent: int
    live_at_start: int
    live_at_end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseSummary:
    """One line of the table; rates are of the phase's own held-out rows.

    Attributes:
        name: of the phase.
        pairs: held-out rows.
        base: of the base model.
        start: of the version that was live as the phase began.
        best: the best that was live during the phase, or at its end.
        end: of the version that was live as it ended.
        is_above_base: whether the whole interval of `end` is above the base model's rate.
        is_risen: whether `end` is above `start`.
    """

    name: str
    pairs: int
    base: Interval
    start: Interval
    best: Interval
    end: Interval
    is_above_base: bool
    is_risen: bool


def wilson(wins: float, pairs: int, z: float = Z_95) -> Interval:
    """Wilson's score interval of a share (Wilson 1927; Brown, Cai & DasGupta 2001).

    Args:
        wins: at most `pairs`; a tie may count as one half.
        pairs: at least 1.
        z: standard errors.
    """
    rate = wins / pairs
    spread = z * z / pairs
    centre = (rate + spread / 2) / (1 + spread)
    reach = z * math.sqrt(rate * (1 - rate) / pairs + spread / (4 * pairs)) / (1 + spread)
    return Interval(rate, centre - reach, centre + reach)


def compare(version: Sequence[PairLogps], base: Sequence[PairLogps]) -> PhaseResult:
    """Count the wins of a version, given its and the base model's log-probabilities of a phase.

    Args:
        version, base: the same pairs in the same order; the base model against itself is allowed.
    """
    wins: dict[Win, float] = dict.fromkeys(WINS, 0.0)
    chosen_change = rejected_change = 0.0
    for ours, theirs in zip(version, base, strict=True):
        wins["sum"] += _win(ours.chosen - ours.rejected)
        wins["per_token"] += _win(
            ours.chosen / ours.chosen_tokens - ours.rejected / ours.rejected_tokens
        )
        wins["implicit"] += _win((ours.chosen - theirs.chosen) - (ours.rejected - theirs.rejected))
        chosen_change += (ours.chosen - theirs.chosen) / ours.chosen_tokens
        rejected_change += (ours.rejected - theirs.rejected) / ours.rejected_tokens
    pairs = len(version)
    return PhaseResult(
        pairs=pairs,
        wins=wins,
        chosen_change=chosen_change / pairs,
        rejected_change=rejected_change / pairs,
    )


def _win(margin: float) -> float:
    return 0.5 if margin == 0 else float(margin > 0)


def summarize(
    spans: Sequence[PhaseSpan], evaluated: Iterable[Evaluated], win: Win
) -> tuple[PhaseSummary, ...]:
    """The table. Every version named by a span must have been evaluated on that phase."""
    by_version = {entry.version: entry for entry in evaluated}

    def rate(version: int, phase: int) -> Interval:
        return by_version[version].results[phase].interval(win)

    lines = []
    for phase, span in enumerate(spans):
        during = [
            rate(entry.version, phase)
            for entry in by_version.values()
            if phase in entry.results
            and entry.version
            and span.start_s <= entry.live_at_s <= span.end_s
        ]
        start, end = rate(span.live_at_start, phase), rate(span.live_at_end, phase)
        base = rate(0, phase)
        lines.append(
            PhaseSummary(
                name=span.name,
                pairs=by_version[0].results[phase].pairs,
                base=base,
                start=start,
                best=max([start, end, *during], key=lambda interval: interval.rate),
                end=end,
                is_above_base=end.low > base.rate,
                is_risen=end.rate > start.rate,
            )
        )
    return tuple(lines)


def pool(paths: Sequence[Path], win: Win) -> tuple[PhaseSummary, ...]:
    """The table of several runs together, each of which held out other rows (cross-validation).

    Every row is predicted by versions that were never trained on it, and counts once. `best` is
    the mean of the runs' best.

    Raises:
        ConfigError: a file is no report of a run, two held out the same rows, or their streams,
            shares or phases differ.
    """
    reports = read_reports(paths)
    first = reports[0]
    folds: dict[int, Path] = {}
    for path, report in zip(paths, reports, strict=True):
        for what, mine, theirs in (
            ("stream", report["stream"], first["stream"]),
            ("share", report["evaluation"]["share"], first["evaluation"]["share"]),
            ("phases", _names(report, win), _names(first, win)),
        ):
            if mine != theirs:
                raise ConfigError(
                    f"{path}: its {what} is {mine!r}, that of {paths[0]} {theirs!r}; pool runs of "
                    "one stream that differ in --evaluation-fold alone",
                    param="pool",
                )
        fold = int(report["evaluation"]["fold"])
        if fold in folds:
            raise ConfigError(
                f"{path} and {folds[fold]} both held out fold {fold}; pool runs with different "
                "--evaluation-fold, so that every row counts once",
                param="pool",
            )
        folds[fold] = path
    lines = []
    for parts in zip(*(report["summary"][win] for report in reports), strict=True):
        pairs = sum(part["pairs"] for part in parts)

        def together(name: str, parts: tuple[Any, ...] = parts, pairs: int = pairs) -> Interval:
            return wilson(sum(part[name]["rate"] * part["pairs"] for part in parts), pairs)

        base, start, end = together("base"), together("start"), together("end")
        lines.append(
            PhaseSummary(
                name=parts[0]["name"],
                pairs=pairs,
                base=base,
                start=start,
                best=together("best"),
                end=end,
                is_above_base=end.low > base.rate,
                is_risen=end.rate > start.rate,
            )
        )
    return tuple(lines)


def read_reports(paths: Sequence[Path]) -> tuple[dict[str, Any], ...]:
    """What runs wrote, which can be pooled as far as each file can tell.

    Raises:
        ConfigError: a file is no report of a run.
    """
    return tuple(_read_report(path) for path in paths)


def curves(report: Mapping[str, Any]) -> tuple[list[PhaseSpan], list[Evaluated]]:
    """What is plotted, from the report: a plot can be drawn again from its file."""
    spans = [PhaseSpan(**span) for span in report["phases"]]
    evaluated = [
        Evaluated(
            **entry
            | {"results": {int(p): PhaseResult(**result) for p, result in entry["results"].items()}}
        )
        for entry in report["evaluated"]
    ]
    return spans, evaluated


def within(
    span: PhaseSpan, phase: int, evaluated: Iterable[Evaluated], win: Win
) -> tuple[tuple[float, float], ...]:
    """The wins of what was live during a phase, from which share of its events on; from 0."""
    entries = {entry.version: entry for entry in evaluated if phase in entry.results}
    events = max(span.end_sent - span.start_sent, 1)
    steps = [(0.0, entries[span.live_at_start].results[phase].wins[win])]
    steps += [
        ((entry.sent - span.start_sent) / events, entry.results[phase].wins[win])
        for entry in sorted(entries.values(), key=lambda entry: entry.live_at_s)
        if span.start_s < entry.live_at_s <= span.end_s
    ]
    return tuple(steps)


def _read_report(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if {"share", "fold"} <= report["evaluation"].keys() and report["stream"]:
            return dict(report)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error)
    else:
        reason = "it does not say what it held out"
    raise ConfigError(
        f"{path} is no report of a drift run ({reason}); give files that --output wrote",
        param="pool",
    )


def _names(report: Mapping[str, Any], win: Win) -> list[str]:
    return [line["name"] for line in report["summary"][win]]


def table(lines: Sequence[PhaseSummary], win: Win) -> str:
    """The summary for people."""
    head = f"{'phase':20}{'n':>5}{'base':>7}{'start':>7}{'best':>7}{'end':>7}   95 % interval"
    rows = [
        f"{line.name:20.20}{line.pairs:5}{line.base.rate:7.2f}{line.start.rate:7.2f}"
        f"{line.best.rate:7.2f}{line.end.rate:7.2f}   {line.end.low:.2f} to {line.end.high:.2f}"
        f"{'  above base' if line.is_above_base else ''}"
        for line in lines
    ]
    return "\n".join([f"held-out win rate by {WIN_WORDS[win]}", head, *rows])


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """The whole report, for programs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
