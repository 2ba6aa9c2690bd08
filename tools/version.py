"""`cotune version`: the version, in one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import __version__

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No flags."""
    parser.description = "Print the version of cotune."


def run(args: argparse.Namespace) -> int:
    """Print it."""
    del args
    print(f"cotune {__version__}")
    return 0
