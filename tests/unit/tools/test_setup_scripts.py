"""`tools/up` and `tools/test` before and after the installing, which no test does."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import cotune

ROOT = Path(cotune.__file__).resolve().parent
TOOLS = ("bash", "cat", "cksum", "dirname", "env", "grep", "ln", "mkdir")


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def run(
    name: str, *args: str, path: Path, venv: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script of ours with nothing but `path` to find programs in."""
    return subprocess.run(
        [str(ROOT / "tools" / name), *args],
        env={"PATH": str(path), "COTUNE_VENV": str(venv), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def bin_path(tmp_path: Path) -> Path:
    """A folder with the few programs that the scripts use, and no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        found = next(
            Path(place) / tool
            for place in os.environ["PATH"].split(os.pathsep)
            if (Path(place) / tool).is_file()
        )
        (folder / tool).symlink_to(found)
    return folder


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """An environment that is said to be up to date; its programs print what they are asked."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    for name in ("cotune", "ruff", "mypy"):
        script(venv / "bin" / name, f'echo "{name} $*"')
    script(venv / "bin" / "pytest", 'echo "pytest $* with $OMP_NUM_THREADS thread"; exit "$FAIL"')
    text = (ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes()
    sums = subprocess.run(["cksum"], input=text, capture_output=True, check=True).stdout.decode()
    (venv / ".cotune-set-up-dev").write_text(sums)  # which has all that "up" needs as well
    return venv


def test_without_a_new_enough_python_it_says_what_to_do(bin_path: Path, tmp_path: Path) -> None:
    script(bin_path / "python3", "exit 1")  # as an old Python answers the version check
    done = run("up", path=bin_path, venv=tmp_path / "new")
    assert done.returncode == 1
    assert "no Python 3.11 or newer found; install one, or name it: PYTHON=" in done.stderr
    done = run("up", path=bin_path, venv=tmp_path / "new", PYTHON="python3")
    assert done.returncode == 1
    assert "PYTHON is python3, which is not Python 3.11 or newer" in done.stderr


def test_a_python_without_venv_is_named_with_the_remedy(bin_path: Path, tmp_path: Path) -> None:
    # Debian's python3 without python3-venv: runs, but has no ensurepip.
    script(bin_path / "python3", 'case "$*" in *ensurepip*) exit 1;; esac')
    done = run("test", path=bin_path, venv=tmp_path / "new")
    assert done.returncode == 1
    assert "cannot make virtual environments" in done.stderr
    assert "apt install python3-venv" in done.stderr


def test_up_serves_at_once_where_the_environment_is_up_to_date(bin_path: Path, venv: Path) -> None:
    done = run("up", "some/model", "--port", "1", path=bin_path, venv=venv)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"cotune: environment {venv} is up to date\ncotune serve some/model --port 1\n"
    )


@pytest.mark.parametrize("status", [0, 1])
def test_test_runs_every_check_and_fails_if_one_does(
    bin_path: Path, venv: Path, status: int
) -> None:
    done = run("test", "-k", "word", path=bin_path, venv=venv, FAIL=str(status))
    assert done.returncode == status, done.stderr
    out = done.stdout
    assert "ruff check .\n" in out
    assert "ruff format --check .\n" in out
    assert "-p cotune\n" in out
    assert "pytest -k word with 1 thread\n" in out
    assert f"tests                  {'FAILED' if status else 'passed'} " in out
    assert (venv / "src" / "cotune").resolve() == ROOT


def test_ci_runs_the_same_command(bin_path: Path, venv: Path) -> None:
    done = run("../.ci/run", path=bin_path, venv=venv, FAIL="0")
    assert done.returncode == 0, done.stderr
    assert "cotune: summary" in done.stdout
