"""How far a co-serving benchmark is."""

from __future__ import annotations

import time


class Progress:
    """What runs now and how long the rest takes: a bar on a terminal, else a line per run."""

    def __init__(self, total_s: float) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self._console = Console(stderr=True, highlight=False)
        self._total_s = total_s
        self._done_s = 0.0
        self._began_s = 0.0
        self._what = ""
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("of about {task.fields[total_min]:.0f} min"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=total_s, total_min=total_s / 60)

    def __enter__(self) -> Progress:
        self._bar.start()
        self.say(f"this takes about {self._total_s / 60:.1f} minutes")
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def begin(self, what: str) -> None:
        """This runs now."""
        self._what = what
        self._began_s = time.monotonic()
        self._bar.update(self._task, description=what)

    def end(self, expected_s: float) -> None:
        """What ran has ended; it counts as so many seconds of the whole."""
        self._done_s += expected_s
        self._bar.update(self._task, completed=self._done_s)
        if not self._console.is_terminal:
            self.say(
                f"{self._what} ({time.monotonic() - self._began_s:.1f} s; "
                f"{min(1.0, self._done_s / self._total_s):.0%} done)"
            )

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(f"cotune bench coserve: {text}", markup=False)
