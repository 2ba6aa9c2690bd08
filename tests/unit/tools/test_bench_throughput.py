from __future__ import annotations

import argparse
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from cotune.runtime.errors import ConfigError
from cotune.tools.bench_throughput import Peer

if TYPE_CHECKING:
    from pathlib import Path


def test_an_engine_that_cannot_start_is_ended_and_what_it_said_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[str]] = []

    class Popen(subprocess.Popen[str]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    args = argparse.Namespace(dtype="float32", device="cpu", threads=1)
    with pytest.raises(ConfigError, match=r"'nobody' ended unexpectedly:\n(.*\n)*.*nobody"):
        Peer("nobody", sys.executable, tmp_path, args)
    (process,) = started
    assert process.returncode is not None
    assert process.stdin is not None
    assert process.stdin.closed
    assert process.stdout is not None
    assert process.stdout.closed
