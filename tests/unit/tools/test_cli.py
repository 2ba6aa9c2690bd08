from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import subprocess
import sys
import tempfile
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import cotune
from cotune.runtime.errors import ConfigError, CotuneError, OverloadedError
from cotune.tools import cli
from cotune.tools.cli import BENCHMARKS, COMMANDS, main
from cotune.tools.options import add_general_arguments, loop_factory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ALL_COMMANDS = [[name] for name in COMMANDS if name != "bench"]
ALL_COMMANDS += [["bench", name] for name in BENCHMARKS]


class Command(ModuleType):
    """A subcommand that does what the test says."""

    def __init__(self, action: Callable[[argparse.Namespace], int]) -> None:
        super().__init__("cotune.tools.example")
        self.run = action

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--size", type=int, default=1)
        add_general_arguments(parser)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., int]], None]:
    """Registers a command `example` and a benchmark `example` that run the function given."""
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)

    def add(action: Callable[..., int]) -> None:
        monkeypatch.setitem(COMMANDS, "example", ("example", "an example"))
        monkeypatch.setitem(BENCHMARKS, "example", ("example", "an example"))
        monkeypatch.setitem(sys.modules, "cotune.tools.example", Command(action))

    return add


def fail_with(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def action(args: argparse.Namespace) -> int:
        raise error

    return action


@pytest.mark.parametrize("argv", ALL_COMMANDS, ids=" ".join)
def test_every_command_in_the_tables_is_there_and_explains_its_flags(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    added: list[argparse.Action] = []
    add = argparse._ActionsContainer._add_action

    def spy(self: Any, action: Any) -> Any:
        added.append(action)
        return add(self, action)

    monkeypatch.setattr(argparse._ActionsContainer, "_add_action", spy)
    with pytest.raises(SystemExit) as left:
        main([*argv, "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: cotune {' '.join(argv)}")
    assert len(text.split("\n\n")) >= 3, "usage, a description, flags"
    told = ("help", "metavar", "choices", "type")
    assert not [a.dest for a in added if not any(getattr(a, name) for name in told)]


def test_a_command_gets_its_flags_and_its_status_is_returned(
    install: Callable[[Callable[..., int]], None],
) -> None:
    install(lambda args: int(args.size))
    assert main(["example", "--size", "3"]) == 3
    assert main(["bench", "example", "--size", "4"]) == 4


def test_the_file_of_config_is_read_and_the_command_line_wins(
    install: Callable[[Callable[..., int]], None], tmp_path: Path
) -> None:
    install(lambda args: int(args.size))
    file = tmp_path / "settings.toml"
    file.write_text("size = 5\n")
    assert main(["example", f"--config={file}"]) == 5
    assert main(["bench", "example", "--config", str(file)]) == 5
    assert main(["example", "--size", "6", "--config", str(file)]) == 6


def test_an_unknown_key_in_the_file_is_one_line_and_status_2(
    install: Callable[[Callable[..., int]], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install(lambda args: 0)
    file = tmp_path / "settings.yaml"
    file.write_text("sizes: 5\n")
    assert main(["example", "--config", str(file)]) == 2
    expected = f"cotune example: {file}: there is no setting 'sizes'; did you mean 'size'?\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("wrong; mend it"), 2, "cotune example: wrong; mend it\n"),
        (
            ConfigError("model.dtype is 'x'; use y", param="model.dtype"),
            2,
            "cotune example: model.dtype is 'x'; use y (--dtype)\n",
        ),
        (
            ConfigError("port 80 is taken; change --port", param="port"),
            2,
            "cotune example: port 80 is taken; change --port\n",
        ),
        (CotuneError("broken"), 1, "cotune example: broken\n"),
        (OverloadedError("full", param="seed"), 1, "cotune example: full\n"),
        (KeyboardInterrupt(), 130, "cotune example: interrupted\n"),
    ],
)
def test_an_error_of_ours_is_one_line_on_stderr_and_a_status(
    install: Callable[[Callable[..., int]], None],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    line: str,
) -> None:
    install(fail_with(error))
    assert main(["example"]) == status
    captured = capsys.readouterr()
    assert captured.err == line
    assert captured.out == ""


def test_an_error_that_is_not_ours_keeps_its_traceback(
    install: Callable[[Callable[..., int]], None],
) -> None:
    install(fail_with(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        main(["example"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["bench"], "the following arguments are required: BENCHMARK"),
        (["sreve"], "invalid choice: 'sreve'"),
        (["serve", "--prot", "1"], "cotune serve: error: unknown: --prot (did you mean --port?)"),
        (["serve", "--max-num", "1"], "unknown: --max-num"),
        (["serve", "m", "extra"], "unknown: extra"),
        (["serve", "--port", "x"], "argument --port: invalid int value: 'x'"),
        (["serve", "--max-model-len", "4KB"], "'4KB' is not a whole number"),
        (["serve", "--lora-modules", "a=b", "model"], "'model' is not name=path (put MODEL"),
        (["serve", "--config"], "cotune serve: error: argument --config: expected one argument"),
    ],
)
def test_wrong_flags_are_refused_with_status_2(
    capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    assert words in capsys.readouterr().err


def test_help_lists_every_command_and_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for name in COMMANDS:
        assert name in text
    assert "examples:" in text
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = capsys.readouterr().out
    for name in BENCHMARKS:
        assert name in text


@pytest.mark.parametrize("argv", [["version"], ["--version"]])
def test_the_version_is_printed(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    try:
        status: Any = main(argv)
    except SystemExit as left:
        status = left.code
    assert status == 0
    assert capsys.readouterr().out == f"cotune {cotune.__version__}\n"


def test_logs_go_to_stderr_at_the_level_asked_for(
    monkeypatch: pytest.MonkeyPatch, install: Callable[[Callable[..., int]], None]
) -> None:
    asked: list[Any] = []
    install(lambda args: 0)
    monkeypatch.setattr(cli, "logging", SimpleNamespace(basicConfig=lambda **k: asked.append(k)))
    assert main(["example", "--log-level", "debug"]) == 0
    assert [values["level"] for values in asked] == ["DEBUG"]


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    # The report is longer than nothing reads of it: the pipe is closed before the first byte.
    process = subprocess.Popen(
        [sys.executable, "-m", "cotune.tools.cli", "serve", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    process.wait(60)
    assert "Traceback" not in errors


@pytest.mark.parametrize("is_async", [False, True])
def test_sigterm_unwinds_a_command(
    install: Callable[[Callable[..., int]], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    is_async: bool,
) -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(asyncio.Event().wait())
                asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGTERM)
        finally:
            ended.append("work")

    def run(_args: object) -> int:
        with tempfile.TemporaryDirectory(dir=tmp_path):
            if is_async:
                with asyncio.Runner(loop_factory=loop_factory()) as runner:
                    runner.run(work())
            signal.raise_signal(signal.SIGTERM)
        return 0

    install(run)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["example"]) == 143
    assert capsys.readouterr().err == "cotune example: terminated\n"
    assert list(tmp_path.iterdir()) == []
    assert ended == (["work"] if is_async else [])
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "argv", [["--help"], ["serve", "--help"], ["chat", "--help"]], ids=" ".join
)
def test_help_comes_at_once(argv: list[str]) -> None:
    """In 0.15 s on a quiet machine. Importing torch alone takes a second, so that is what counts:
    what is slow to import is imported for what runs, and not to tell of it.
    """
    code = "import sys; from cotune.tools.cli import main\n"
    code += "try: main(sys.argv[1:])\n"
    code += "finally: print(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True
    )
    assert "usage: cotune" in done.stdout
    loaded = {name.split(".")[0] for name in done.stderr.split()}
    assert "argparse" in loaded
    assert not loaded & {"aiohttp", "matplotlib", "numba", "numpy", "peft", "torch", "transformers"}
