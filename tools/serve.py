"""`cotune serve`: a runtime behind an HTTP server, from the first flag to the last request.

    check settings and port ─► load ─► "ready at ..." ─► requests ─► signal ─► drain ─► exit 0

SIGTERM and SIGINT (Ctrl-C) ask for the drain; a second one cuts it short. Before the server is
ready there is nothing to drain, so the first one ends the process. An exit that was cut short has
the status 128 + signal number, as shells have it.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

from ..runtime.errors import CotuneError
from ..web.settings import ServerSettings
from .options import (
    add_general_arguments,
    add_runtime_arguments,
    api_key,
    loop_factory,
    parse_count,
    runtime_config,
)

if TYPE_CHECKING:
    import argparse

    from ..runtime.config import RuntimeConfig
    from ..runtime.runtime import Runtime

EPILOG = """\
examples:
  cotune serve                                  the demo model at http://127.0.0.1:8000
  cotune serve path/to/model --dtype bfloat16 --max-model-len 8K
  cotune serve path/to/model --lora-modules tutor=path/to/adapter --max-lora-rank 16
  COTUNE_API_KEY=secret cotune serve --host 0.0.0.0      reachable by other machines
  cotune serve --config serve.yaml --port 9000           the command line wins over the file
  cotune serve --state-dir state --learning-adapters tutor     learn here, two models apart
  cotune serve --no-learning                             answer and keep nothing

then:
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "Hello!"}]}'

serve.yaml:
  model: path/to/model
  max-num-seqs: 64
  lora-modules: {tutor: path/to/adapter}

SIGTERM or Ctrl-C: no new requests, running ones finish (--shutdown-timeout), then exit 0.
"""


class PortError(CotuneError):
    """The address cannot be listened on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``cotune serve``."""
    settings = ServerSettings()
    parser.usage = "cotune serve [MODEL] [flags]"
    parser.description = """\
Serve a model at an address that speaks the OpenAI API. In brackets: what holds
if a flag is left out. Without an API key only this machine can reach the server."""
    parser.epilog = EPILOG
    server = parser.add_argument_group("server")
    server.add_argument("--host", default=settings.host, help="address to listen on (%(default)s)")
    server.add_argument(
        "--port",
        type=int,
        default=settings.port,
        metavar="N",
        help="TCP port; 0 takes any free one (%(default)s)",
    )
    server.add_argument(
        "--api-key",
        metavar="KEY",
        help="key that clients must send as a bearer token ($COTUNE_API_KEY)",
    )
    server.add_argument(
        "--shutdown-timeout",
        type=float,
        default=settings.shutdown_timeout_s,
        metavar="S",
        help="seconds that running requests may go on at shutdown (%(default)g)",
    )
    server.add_argument(
        "--allowed-origins",
        nargs="+",
        default=list(settings.allowed_origins),
        metavar="ORIGIN",
        help="web origins that browsers may call from, * for any (none)",
    )
    server.add_argument(
        "--max-body-bytes",
        type=parse_count,
        default=settings.max_body_bytes,
        metavar="BYTES",
        help="largest request body (8M, which is 8 MiB)",
    )
    server.add_argument(
        "--max-messages",
        type=int,
        default=settings.max_messages,
        metavar="N",
        help="most messages in one chat request (%(default)s)",
    )
    server.add_argument(
        "--max-n",
        type=int,
        default=settings.max_n,
        metavar="N",
        help="most completions per prompt (%(default)s)",
    )
    add_runtime_arguments(parser, learning=True)
    add_general_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal; the exit status."""
    settings = server_settings(args)
    config = runtime_config(args)
    check_port(settings)
    print(f"cotune: loading {config.model.source or 'the demo model'}", file=sys.stderr)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_serve(config, settings))


def server_settings(args: argparse.Namespace) -> ServerSettings:
    """The web layer's settings from the flags, validated."""
    settings = ServerSettings(
        host=args.host,
        port=args.port,
        api_key=api_key(args),
        max_body_bytes=args.max_body_bytes,
        max_messages=args.max_messages,
        max_n=args.max_n,
        shutdown_timeout_s=args.shutdown_timeout,
        allowed_origins=tuple(args.allowed_origins),
    )
    settings.validate()
    return settings


def check_port(settings: ServerSettings) -> None:
    """Raise `PortError` if another program has the port, before time is spent on a model.

    What else may be wrong with the address is found when the server opens it.
    """
    try:
        addresses = socket.getaddrinfo(
            settings.host.strip("[]"), settings.port, type=socket.SOCK_STREAM
        )
    except socket.gaierror as error:
        raise PortError(
            f"--host is {settings.host!r}, which is no address ({error.strerror}); use 127.0.0.1 "
            "for this machine alone or 0.0.0.0 for all its addresses"
        ) from error
    for family, _kind, _protocol, _name, address in addresses:
        try:
            socket.create_server(address[:2], family=family).close()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortError(
                    f"port {settings.port} on {settings.host} is in use by another program; choose "
                    "another with --port (0 takes any free one), or stop that program"
                ) from error
            if error.errno == errno.EACCES:
                raise PortError(
                    f"this user may not open port {settings.port}; choose one from 1024 on"
                ) from error


class _Signals:
    """What the signals so far ask for; its method runs on the loop's thread."""

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self._task = task
        self.stop = asyncio.Event()
        self.is_serving = False
        self.cut_short_by: signal.Signals | None = None

    def received(self, number: signal.Signals) -> None:
        if self.is_serving and not self.stop.is_set():
            print(
                f"cotune: {number.name}, finishing running requests (once more to stop at once)",
                file=sys.stderr,
            )
            self.stop.set()
        else:
            self.cut_short_by = number
            self._task.cancel()


async def _serve(config: RuntimeConfig, settings: ServerSettings) -> int:
    from ..runtime.runtime import Runtime
    from ..web.server import serve

    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    signals = _Signals(task)
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, signals.received, number)
    try:
        async with Runtime(config=config) as runtime:
            # What was loaded stays to the end: the collector need not walk through it again.
            gc.collect()
            gc.freeze()
            signals.is_serving = True
            await serve(
                runtime,
                settings,
                on_ready=lambda url: print(ready_line(url, runtime), flush=True),
                stop=signals.stop,
            )
    except asyncio.CancelledError:
        if signals.cut_short_by is None:
            raise
        print("cotune: stopped before all was done", file=sys.stderr)
        return 128 + signals.cut_short_by
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
    return 0


def ready_line(url: str, runtime: Runtime) -> str:
    """What the terminal says when requests are taken."""
    facts = runtime.describe()
    names = ("model", "device", "dtype", "attention")
    parts = [f"{name} {facts[name]}" for name in names if name in facts]
    parts.append(f"KV pages {facts['num_pages']} of {facts['page_size']} tokens")
    parts.append(f"context {runtime.max_model_len}")
    if adapters := [info.id for info in runtime.model_names() if info.parent is not None]:
        parts.append(f"adapters {', '.join(adapters)}")
    if facts.get("state_dir"):
        parts.append(f"learning in {facts['state_dir']}")
    return f"cotune: ready at {url} ({', '.join(parts)})"
