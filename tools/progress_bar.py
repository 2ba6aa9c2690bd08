"""A bar that says how far a command is."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.progress import Progress, ProgressColumn


@contextlib.contextmanager
def progress_bar(*columns: ProgressColumn) -> Iterator[Progress]:
    """A bar on stderr, taken away at the end; where that is no terminal, nothing is shown.

    Args:
        columns: what it says of each task (its description, a bar and the time that is left).
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    if not columns:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    if not sys.stderr.isatty():
        yield bar  # never started, it takes tasks and shows nothing
        return
    with bar:
        yield bar
