"""The curves of drift runs, drawn into a file. Needs matplotlib, which is an extra."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from ..runtime.errors import ConfigError
from .drift_report import WIN_WORDS, curves, wilson, within

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from .drift_report import Evaluated, PhaseSpan, Win


def require_plots() -> None:
    """Raise `ConfigError` if matplotlib is missing: before a long run, not after it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed; pip install 'cotune[plots]', or "
            "leave --plot out: the JSON file holds the curves",
            param="plot",
        ) from error


def plot(
    path: Path, title: str, spans: Sequence[PhaseSpan], evaluated: Sequence[Evaluated], win: Win
) -> None:
    """Draw the held-out win rate of each phase over the stream, into a file (SVG, PNG, PDF).

    Thick and with its interval while the phase lasts, thin before and after; dashed: the base
    model. A dot is a version, where it went live. The same input gives the same SVG file.
    """
    with _drawing(path, title, len(spans), win) as all_axes:
        end = spans[-1].end_sent
        for phase, (span, axes) in enumerate(zip(spans, all_axes, strict=True)):
            color = f"C{phase}"
            entries = sorted(
                (entry for entry in evaluated if phase in entry.results),
                key=lambda entry: entry.live_at_s,
            )
            base = next(entry for entry in entries if entry.version == 0).results[phase]
            axes.axhline(base.interval(win).rate, color="0.5", linewidth=0.8, linestyle="--")
            axes.axvspan(span.start_sent, span.end_sent, color=color, alpha=0.10, linewidth=0)
            intervals = [entry.results[phase].interval(win) for entry in entries]
            rates = [interval.rate for interval in intervals]
            sent = [entry.sent for entry in entries]
            axes.step([*sent, end], [*rates, rates[-1]], where="post", color=color, linewidth=0.9)
            # The band needs points of its own where the phase begins and ends.
            before = [i for i, x in enumerate(sent) if x <= span.start_sent]
            during = [i for i, x in enumerate(sent) if span.start_sent < x <= span.end_sent]
            band = [*before[-1:], *during, *(during or before)[-1:]]
            axes.fill_between(
                [span.start_sent, *(sent[i] for i in during), span.end_sent],
                [intervals[i].low for i in band],
                [intervals[i].high for i in band],
                step="post",
                color=color,
                alpha=0.20,
                linewidth=0,
            )
            axes.plot(sent, rates, ".", color=color, markersize=4)
            axes.set_title(f"{span.name} (n = {base.pairs})", loc="left", fontsize=9, pad=3)
        all_axes[-1].set_xlabel("events sent")
        all_axes[-1].set_xlim(0, 1.01 * max(end, 1))


def plot_pool(path: Path, title: str, reports: Sequence[Mapping[str, Any]], win: Win) -> None:
    """Draw what was live during each phase, of all runs together; see `drift_report.pool`.

    Thick, with its interval: all held-out rows together, each under its own run's version. Thin:
    each run alone. Dashed: the base model. The same input gives the same SVG file.
    """
    runs = [curves(report) for report in reports]
    phases = range(len(runs[0][0]))
    with _drawing(path, title, len(phases), win) as all_axes:
        for phase, axes in zip(phases, all_axes, strict=True):
            color = f"C{phase}"
            each = [within(spans[phase], phase, evaluated, win) for spans, evaluated in runs]
            grid = sorted({1.0}.union(share for steps in each for share, _ in steps))
            pairs, base = 0, 0.0
            wins = [0.0] * len(grid)
            for (_, evaluated), steps in zip(runs, each, strict=True):
                first = next(entry for entry in evaluated if entry.version == 0).results[phase]
                pairs, base = pairs + first.pairs, base + first.wins[win]
                live = [[won for share, won in steps if share <= x][-1] for x in grid]
                wins = [total + won for total, won in zip(wins, live, strict=True)]
                rates = [won / first.pairs for won in live]
                axes.step(grid, rates, where="post", color=color, linewidth=0.5, alpha=0.6)
            together = [wilson(won, pairs) for won in wins]
            axes.axhline(base / pairs, color="0.5", linewidth=0.8, linestyle="--")
            axes.step(grid, [i.rate for i in together], where="post", color=color, linewidth=1.6)
            axes.fill_between(
                grid,
                [interval.low for interval in together],
                [interval.high for interval in together],
                step="post",
                color=color,
                alpha=0.20,
                linewidth=0,
            )
            name = runs[0][0][phase].name
            axes.set_title(f"{name} (n = {pairs})", loc="left", fontsize=9, pad=3)
        all_axes[-1].set_xlabel("share of the phase's events that had been sent")
        all_axes[-1].set_xlim(0.0, 1.0)


@contextlib.contextmanager
def _drawing(path: Path, title: str, panels: int, win: Win) -> Iterator[Sequence[Any]]:
    """Panels of win rates, one below the other, to be drawn into; then the file."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "cotune", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(9.0, 1.2 + 1.3 * panels), layout="constrained")
        all_axes = figure.subplots(panels, 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        yield list(all_axes)
        for axes in all_axes:
            axes.set_ylim(0.0, 1.0)
            axes.set_yticks([0.0, 0.25, 0.5, 0.75, 1.0])
            axes.grid(axis="y", linewidth=0.3)
        figure.supylabel(f"held-out win rate ({WIN_WORDS[win]})", fontsize=9)
        figure.suptitle(title, fontsize=10)
        path.parent.mkdir(parents=True, exist_ok=True)
        is_svg = path.suffix.lower() == ".svg"
        figure.savefig(path, metadata={"Date": None} if is_svg else None)
