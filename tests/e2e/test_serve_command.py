"""`cotune serve` as a process of its own, from the shell's side: lines, statuses and signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tiny_models import save_lora, save_model_directory, tiny_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

START_S = 240


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_directory(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lora(tmp_path_factory.mktemp("adapter") / "tutor", tiny_model("llama"))


@contextmanager
def command(*flags: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "cotune.tools.cli", "serve", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def get(url: str, body: dict[str, Any] | None = None) -> Any:
    request = urllib.request.Request(
        url,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "Authorization": "Bearer key"},
    )
    return urllib.request.urlopen(request, timeout=START_S)


def test_it_says_when_it_is_ready_and_a_signal_lets_the_running_answer_finish(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(
        f"model: {model}\nport: 1\nthreads: 1\nnum-gpu-blocks-override: 64\nblock-size: 16\n"
        f"lora-modules: {{tutor: {adapter}}}\nshutdown-timeout: {START_S}\n"
    )
    with command("--config", str(config), "--port", "0", COTUNE_API_KEY="key") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        match = re.fullmatch(r"cotune: ready at (http://127\.0\.0\.1:\d+) \((.*)\)\n", line)
        assert match is not None, line + process.stderr.read()
        url = match[1]
        assert "model tiny, device cpu" in match[2]
        assert "KV pages 64 of 16 tokens, context 512, adapters tutor" in match[2]

        names = [entry["id"] for entry in json.load(get(f"{url}/v1/models"))["data"]]
        assert names == ["tiny", "tutor"]
        body = {
            "model": "tutor",
            "prompt": "the cat",
            "max_tokens": 400,
            "ignore_eos": True,
            "stream": True,
        }
        with get(f"{url}/v1/completions", body) as reply:
            first = reply.readline()
            process.send_signal(signal.SIGTERM)
            events = [first, *reply]
        data = [event.removeprefix(b"data: ").strip() for event in events if event.strip()]
        assert data[-1] == b"[DONE]"
        assert json.loads(data[-2])["choices"][0]["finish_reason"] == "length"

        errors = process.stderr.read()
        assert process.wait(START_S) == 0, errors
        assert errors.startswith(f"cotune: loading {model}\n")
        assert "SIGTERM, finishing running requests" in errors
        assert "Traceback" not in errors


def test_a_model_that_cannot_be_served_is_one_line_and_status_2(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with command(str(empty), "--port", "0") as process:
        output, errors = process.communicate(timeout=START_S)
    assert process.returncode == 2
    assert output == ""
    loading, line = errors.splitlines()
    assert loading == f"cotune: loading {empty}"
    assert line.startswith("cotune serve: ")
    assert str(empty) in line
