"""The `cotune` command: finds the subcommand, reads its flags, runs it, and reports errors.

Each subcommand is a module in this folder with ``add_arguments(parser)`` and ``run(args) -> int``
(the exit status); its docstring describes it in ``--help`` unless `add_arguments` does. Only the
module of the command that was asked for is imported, and modules import torch inside ``run``, so
that help comes at once.

Exit status: 0 done; 1 failed; 2 wrong flags, settings, model or adapter; 130 interrupted; 143
terminated. Both ways to end it early leave no process and no temporary folder behind.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import logging
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Protocol, cast

from .. import __version__
from ..runtime.errors import ConfigError, CotuneError
from .options import FLAG_OF_SETTING, apply_config_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import FrameType


class Command(Protocol):
    """What a subcommand's module offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare flags, description and examples."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it; the exit status."""


class _TerminatedError(SystemExit):
    """SIGTERM has come; asyncio lets an exit of the process through, whoever waits."""


# Name: module in this folder, one line of help (here so that listing them imports none).
COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("serve", "answer requests over HTTP, as the OpenAI API does"),
    "chat": ("chat", "talk to a model in the terminal"),
    "profile": ("profile_device", "measure what work costs on this device"),
    "simulate": ("simulate", "replay a trace through the policies in virtual time"),
    "trace": ("save_trace", "save what a running server's lanes did, for Perfetto"),
    "bench": ("", "measure speed; `cotune bench --help` lists the benchmarks"),
    "feedback": ("feedback", "import, export or delete feedback"),
    "adapters": ("adapters", "list, compare, promote or roll back what was learned"),
    "drift": ("drift", "replay drifting feedback under chat traffic; does it learn?"),
    "train-demo": ("train_demo", "train the demo model from scratch"),
    "collect-env": ("collect_env", "print versions, devices and limits for a bug report"),
    "version": ("version", "print the version"),
}
BENCHMARKS: dict[str, tuple[str, str]] = {
    "throughput": ("bench_throughput", "tokens per second of mixed requests, beside other engines"),
    "prefix": ("bench_prefix", "time to first token with and without a cached prefix"),
    "overhead": ("bench_overhead", "where an iteration's time goes"),
    "attention": ("bench_attention", "paged attention beside torch's own"),
    "policy": ("bench_policy", "how long each policy takes to decide"),
    "coserve": ("bench_coserve", "serving while learning, under each policy"),
    "train": ("bench_train", "training steps per second and memory, beside TRL's DPOTrainer"),
    "memory": ("bench_memory", "resident memory, stage by stage, with learning on and off"),
    "length": ("bench_length", "feedback on nothing but the length of answers"),
    "publish": ("bench_publish", "adapter versions that go live while clients stream"),
    "web": ("bench_web", "the HTTP layer alone, without a model"),
}

EPILOG = """\
examples:
  cotune serve                               the demo model at http://127.0.0.1:8000
  cotune serve path/to/model --dtype bfloat16
  cotune chat                                talk to the demo model
  cotune chat --url http://127.0.0.1:8000    talk to a server that is running
  cotune COMMAND --help                      flags and examples of one command
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (default: the process's arguments) asks for."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = _name_of(argv)
    try:
        args, command = _parse(argv)
        if level := getattr(args, "log_level", None):
            logging.basicConfig(
                level=level.upper(),
                format="%(asctime)s %(levelname)s %(name)s: %(message)s",
                datefmt="%H:%M:%S",
            )
        with _leaving_on_sigterm():
            return command.run(args)
    except CotuneError as error:
        is_wrong_setting = isinstance(error, ConfigError)
        flag = FLAG_OF_SETTING.get(error.param or "") if is_wrong_setting else None
        place = f" ({flag})" if flag and flag not in error.message else ""
        print(f"{name}: {error.message}{place}", file=sys.stderr)
        return 2 if is_wrong_setting else 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except _TerminatedError:
        print(f"{name}: terminated", file=sys.stderr)
        return 128 + signal.SIGTERM
    except BrokenPipeError:
        # The reader of our output has gone (`cotune ... | head`). Nothing more can be said there,
        # and the interpreter's own flush at exit must not fail on it either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


@contextlib.contextmanager
def _leaving_on_sigterm() -> Iterator[None]:
    """SIGTERM unwinds the command as Ctrl-C does, unless the command listens for it itself."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        raise _TerminatedError

    if threading.current_thread() is not threading.main_thread():  # it gets no signals
        yield
        return
    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _name_of(argv: Sequence[str]) -> str:
    """The words to start an error line with: "cotune serve"."""
    words = [word for word in argv[:2] if word in COMMANDS or word in BENCHMARKS]
    return " ".join(["cotune", *words])


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Command]:
    parser = argparse.ArgumentParser(
        prog="cotune",
        description="Serve a language model and let it learn from feedback, in one process.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"cotune {__version__}")
    chosen, command = _add_commands(parser, COMMANDS, argv, "command")
    if command is None and chosen is not None:  # bench, the only one with commands of its own
        chosen.description = "Measure speed. Each benchmark prints a table and, last, a JSON line."
        rest = argv[argv.index("bench") + 1 :]
        chosen, command = _add_commands(chosen, BENCHMARKS, rest, "benchmark")
    if chosen is not None and command is not None:
        _apply_config(chosen, argv)
    args, unknown = parser.parse_known_args(argv)
    assert chosen is not None, "argparse leaves when no command is given"
    assert command is not None, "argparse leaves when no benchmark is given"
    if unknown:
        close = difflib.get_close_matches(unknown[0], chosen._option_string_actions, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        chosen.error(f"unknown: {' '.join(unknown)}{hint}")
    return args, command


def _add_commands(
    parser: argparse.ArgumentParser,
    table: Mapping[str, tuple[str, str]],
    argv: Sequence[str],
    noun: str,
) -> tuple[argparse.ArgumentParser | None, Command | None]:
    """Add a subparser per entry; the one that `argv` asks for gets its module's arguments.

    Returns:
        That subparser and module; the module is None where the entry names none, and both are
        None where `argv` asks for no entry.
    """
    asked = next((word for word in argv if not word.startswith("-")), None)
    subparsers = parser.add_subparsers(title=f"{noun}s", metavar=noun.upper(), required=True)
    chosen: argparse.ArgumentParser | None = None
    command: Command | None = None
    for name, (module, text) in table.items():
        subparser = subparsers.add_parser(
            name,
            help=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name == asked:
            chosen = subparser
            if module:
                command = cast("Command", importlib.import_module(f".{module}", __package__))
                command.add_arguments(subparser)
                subparser.description = subparser.description or command.__doc__
    return chosen, command


def _apply_config(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Where the command has ``--config`` and it is given, take the file's values as defaults."""
    if "--config" not in parser._option_string_actions:
        return
    before = argparse.ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    before._add_action(parser._option_string_actions["--config"])
    found, _ = before.parse_known_args(argv)
    if found.config is not None:
        apply_config_file(parser, found.config)


if __name__ == "__main__":
    sys.exit(main())
