from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import pytest

from cotune.runtime.errors import ConfigError
from cotune.tools import serve
from cotune.tools.cli import main
from cotune.tools.serve import PortError, check_port, ready_line, server_settings
from cotune.web.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from cotune.runtime.config import RuntimeConfig


class FakeRuntime:
    """Loads nothing; remembers its config and that it was left."""

    made: list[FakeRuntime]
    load: Callable[[], Awaitable[None]]

    def __init__(self, *, config: RuntimeConfig) -> None:
        self.config = config
        self.events: list[str] = []
        self.max_model_len = 2048
        FakeRuntime.made.append(self)

    async def __aenter__(self) -> Self:
        await FakeRuntime.load()
        self.events.append("entered")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.events.append("left")

    def describe(self) -> dict[str, object]:
        return {
            "model": "demo",
            "device": "cpu",
            "dtype": "float32",
            "attention": "paged",
            "num_pages": 640,
            "page_size": 16,
        }

    def model_names(self) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(id="demo", parent=None),
            SimpleNamespace(id="tutor", parent="demo"),
        ]


class FakeServer:
    """Stands in for `web.server.serve`: runs the test's function once it is ready."""

    def __init__(self) -> None:
        self.settings: ServerSettings | None = None
        self.while_serving: Callable[[], Awaitable[None]] = nothing
        self.drain: Callable[[], Awaitable[None]] = nothing
        self.has_drained = False

    async def serve(
        self,
        runtime: FakeRuntime,
        settings: ServerSettings,
        *,
        on_ready: Callable[[str], None],
        stop: asyncio.Event,
    ) -> None:
        self.settings = settings
        on_ready("http://127.0.0.1:8000")
        await self.while_serving()
        await stop.wait()
        await self.drain()
        self.has_drained = True


async def nothing() -> None:
    return


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    server = FakeServer()
    runtime_module, server_module = ModuleType("runtime"), ModuleType("server")
    runtime_module.Runtime = FakeRuntime  # type: ignore[attr-defined]
    server_module.serve = server.serve  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cotune.runtime.runtime", runtime_module)
    monkeypatch.setitem(sys.modules, "cotune.web.server", server_module)
    FakeRuntime.made = []
    FakeRuntime.load = staticmethod(nothing)
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    monkeypatch.delenv("COTUNE_API_KEY", raising=False)
    return server


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


def sends(*numbers: signal.Signals) -> Callable[[], Awaitable[None]]:
    """A step of the fake server in which this process gets signals, then waits to be ended."""

    async def send() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)
        if len(numbers) > 1:
            await asyncio.get_running_loop().create_future()

    return send


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_exits_with_0(
    server: FakeServer, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    server.while_serving = sends(number)
    assert main(["serve", "--port", "0"]) == 0
    assert server.has_drained
    assert FakeRuntime.made[0].events == ["entered", "left"]
    captured = capsys.readouterr()
    assert captured.out.startswith("cotune: ready at http://127.0.0.1:8000 (model demo, ")
    assert f"{number.name}, finishing running requests" in captured.err


def test_a_second_signal_cuts_the_drain_short(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.while_serving = sends(signal.SIGTERM)
    server.drain = sends(signal.SIGINT, signal.SIGINT)
    assert main(["serve", "--port", "0"]) == 128 + signal.SIGINT
    assert not server.has_drained
    assert FakeRuntime.made[0].events == ["entered", "left"]
    assert "stopped before all was done" in capsys.readouterr().err


def test_a_signal_while_loading_ends_it_at_once(server: FakeServer) -> None:
    async def load() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.get_running_loop().create_future()

    FakeRuntime.load = staticmethod(load)
    assert main(["serve", "--port", "0"]) == 128 + signal.SIGTERM
    assert FakeRuntime.made[0].events == []
    assert server.settings is None


def test_signals_do_what_they_did_before_once_it_has_ended(server: FakeServer) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    server.while_serving = sends(signal.SIGTERM)
    main(["serve", "--port", "0"])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_settings_reach_the_runtime_and_the_server(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COTUNE_API_KEY", "secret")
    server.while_serving = sends(signal.SIGTERM)
    flags = "some/model --host 127.0.0.2 --port 0 --max-num-seqs 3 --max-n 4 --max-messages 5"
    flags += " --max-body-bytes 1K --shutdown-timeout 2.5 --allowed-origins http://a http://b"
    assert main(["serve", *flags.split()]) == 0
    assert FakeRuntime.made[0].config.model.source == "some/model"
    assert FakeRuntime.made[0].config.schedule.max_num_seqs == 3
    assert server.settings == ServerSettings(
        host="127.0.0.2",
        port=0,
        api_key="secret",
        max_n=4,
        max_messages=5,
        max_body_bytes=1024,
        shutdown_timeout_s=2.5,
        allowed_origins=("http://a", "http://b"),
    )


def test_a_port_in_use_is_one_line_and_status_1_before_loading(
    server: FakeServer, capsys: pytest.CaptureFixture[str], busy_port: int
) -> None:
    assert main(["serve", "--port", str(busy_port)]) == 1
    assert capsys.readouterr().err == (
        f"cotune serve: port {busy_port} on 127.0.0.1 is in use by another program; choose another "
        "with --port (0 takes any free one), or stop that program\n"
    )
    assert FakeRuntime.made == []


def test_an_address_that_is_none_is_refused_before_loading() -> None:
    with pytest.raises(PortError, match=r"--host is 'no.such.host.invalid', which is no address"):
        check_port(ServerSettings(host="no.such.host.invalid", api_key="k"))


def test_a_free_port_is_still_free_after_the_check() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    check_port(ServerSettings(port=port))
    check_port(ServerSettings(port=port))


def test_a_port_that_only_root_may_open_is_refused_before_loading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: object, **kwargs: object) -> socket.socket:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket, "create_server", refuse)
    with pytest.raises(PortError, match="may not open port 80; choose one from 1024 on"):
        check_port(ServerSettings(port=80))


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--host", "0.0.0.0"], "--api-key or COTUNE_API_KEY"),
        (["--port", "70000"], "port is 70000; choose 0 to 65535 (--port)"),
        (["--api-key", ""], "api_key is empty; give a key, or leave it out (--api-key)"),
        (["--threads", "0"], "lanes.inference_threads is 0; use 1 or more (--threads)"),
        (["--shutdown-timeout", "-1"], "(--shutdown-timeout)"),
    ],
)
def test_a_wrong_setting_is_one_line_and_status_2_before_loading(
    server: FakeServer, capsys: pytest.CaptureFixture[str], flags: list[str], line: str
) -> None:
    assert main(["serve", *flags]) == 2
    captured = capsys.readouterr().err
    assert line in captured
    assert captured.count("\n") == 1
    assert FakeRuntime.made == []


def test_a_model_that_cannot_be_loaded_is_one_line_and_status_2(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    async def load() -> None:
        raise ConfigError("some/model has no tokenizer", param="model.source")

    FakeRuntime.load = staticmethod(load)
    assert main(["serve", "some/model", "--port", "0"]) == 2
    assert capsys.readouterr().err == (
        "cotune: loading some/model\ncotune serve: some/model has no tokenizer (MODEL)\n"
    )


def test_an_empty_key_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTUNE_API_KEY", "")
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    with pytest.raises(ConfigError, match="api_key is empty"):
        server_settings(parser.parse_args([]))


def test_the_ready_line_tells_what_was_chosen() -> None:
    runtime: Any = FakeRuntime.__new__(FakeRuntime)
    runtime.max_model_len = 2048
    assert ready_line("http://127.0.0.1:8000", runtime) == (
        "cotune: ready at http://127.0.0.1:8000 (model demo, device cpu, dtype float32, attention "
        "paged, KV pages 640 of 16 tokens, context 2048, adapters tutor)"
    )


def test_the_ready_line_says_where_it_keeps_what_it_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime: Any = FakeRuntime.__new__(FakeRuntime)
    runtime.max_model_len = 2048
    facts = {**runtime.describe(), "state_dir": "/var/state"}
    monkeypatch.setattr(FakeRuntime, "describe", lambda self: facts)
    assert ready_line("http://x", runtime).endswith(", adapters tutor, learning in /var/state)")
