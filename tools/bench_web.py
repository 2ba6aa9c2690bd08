"""How many tokens per second the web layer alone streams, and whether a slow reader costs others.

    cotune bench web [--clients 64] [--tokens 1000] [--repeats 5]
    python -m cotune.tools.bench_web

A runtime without a model (`null_runtime`) gives every request a token per turn of the event loop.
The clients live in a process of their own and count events without parsing them. Each repeat has
two rounds that follow one another at once: all clients read as fast as they can; then the same
while one more client asks for a long answer and never reads it.

Better is: more tokens/s; events per token at 1 (each token was an event of its own); `with a
stalled reader` close to 1 (a ratio to the round before it), in throughput and in the gaps between
tokens. Rounds include sending the requests and the first token. The first repeat is warm-up and
does not count.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import socket
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, cast

import aiohttp
import orjson

from ..web.server import ServerSettings, serve
from .bench_report import machine, print_json, spread
from .null_runtime import NullRuntime

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

NAME: Final = "web"
HELP: Final = "stream tokens through the web layer alone, without a model"
TARGET_TOKENS_PER_S: Final = 20_000

_STALLED_TOKENS: Final = 200_000
_CPU_TICK_S: Final = 0.01
_USAGE = re.compile(rb'"completion_tokens":(\d+),[^{]*\{"cached_tokens":\d+\}\}\}\n\n')


@dataclass(frozen=True, slots=True)
class Round:
    """What the clients saw. Gaps are between packets of one stream, in milliseconds."""

    seconds: float
    server_cpu_s: float
    tokens: int
    events: int
    gap_p50_ms: float
    gap_p99_ms: float

    @property
    def tokens_per_s(self) -> float:
        """Over all clients."""
        return self.tokens / self.seconds

    @property
    def tokens_per_cpu_s(self) -> float:
        """Per second of the server's CPU time: what it would reach with a core to itself."""
        return self.tokens / self.server_cpu_s


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--clients", type=int, default=64, help="streams at once (64)")
    parser.add_argument("--tokens", type=int, default=1000, help="tokens per stream (1000)")
    parser.add_argument("--repeats", type=int, default=5, help="repeats that count (5)")
    parser.add_argument(
        "--require",
        type=float,
        default=0.0,
        metavar="TOKENS_PER_S",
        help="exit with 1 if the median is below this (0)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the benchmark and print a table, and one line of JSON last."""
    if min(args.clients, args.tokens, args.repeats) < 1:
        print("bench web: --clients, --tokens and --repeats must be 1 or more", file=sys.stderr)
        return 2
    rounds = _run_loop(_bench(args.clients, args.tokens, args.repeats))
    alone, stalled = rounds[0::2], rounds[1::2]
    result = {
        "bench": NAME,
        "clients": args.clients,
        "tokens_per_stream": args.tokens,
        "repeats": args.repeats,
        "tokens_per_s": spread([r.tokens_per_s for r in alone]),
        "tokens_per_server_cpu_s": spread([r.tokens_per_cpu_s for r in alone]),
        "events_per_token": spread([_events_per_token(r, args.clients) for r in alone]),
        "gap_p50_ms": spread([r.gap_p50_ms for r in alone]),
        "gap_p99_ms": spread([r.gap_p99_ms for r in alone]),
        "stalled_reader_throughput_ratio": spread(
            [b.tokens_per_s / a.tokens_per_s for a, b in zip(alone, stalled, strict=True)]
        ),
        "stalled_reader_gap_p99_ratio": spread(
            [b.gap_p99_ms / a.gap_p99_ms for a, b in zip(alone, stalled, strict=True)]
        ),
        "target_tokens_per_s": TARGET_TOKENS_PER_S,
        "environment": _environment(),
    }
    _print_table(result)
    print_json(result)
    return 1 if result["tokens_per_s"]["median"] < args.require else 0


async def _bench(clients: int, tokens: int, repeats: int) -> list[Round]:
    """Serve here, read in another process; two rounds per repeat, warm-up left out."""
    stop = asyncio.Event()
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    settings = ServerSettings(port=0, shutdown_timeout_s=0.0)
    async with (
        NullRuntime(max_model_len=2 * _STALLED_TOKENS + tokens) as runtime,
        asyncio.TaskGroup() as group,
    ):
        group.create_task(serve(runtime, settings, on_ready=ready.set_result, stop=stop))
        try:
            reader = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "cotune.tools.bench_web", "--read-from"),
                *(await ready, str(clients), str(tokens), str(repeats)),
                stdout=asyncio.subprocess.PIPE,
            )
            output, _ = await reader.communicate()
        finally:
            stop.set()
    if reader.returncode != 0:
        raise RuntimeError(f"the process with the clients failed with status {reader.returncode}")
    return [Round(**line) for line in orjson.loads(output)]


# The clients' process.


class _Reader(asyncio.Protocol):
    """Reads one answer at a time and counts its events."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self._tail = b""
        self.events = 0
        self.tokens = 0
        self.gaps_s: list[float] = []
        self._last_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's have no such base

    def connection_lost(self, error: Exception | None) -> None:
        """The server closed the connection: an error if an answer was due."""
        if self._done is not None and not self._done.done():
            self._done.set_exception(error or ConnectionError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        """Count events: each ends in an empty line, which HTTP's own framing does not have."""
        now_s = time.perf_counter()
        if self._last_s:
            self.gaps_s.append(now_s - self._last_s)
        self._last_s = now_s
        split = self._tail[-1:] == b"\n" and self._tail[-2:] != b"\n\n" and data[:1] == b"\n"
        self.events += data.count(b"\n\n") + split
        self._tail = (self._tail + data)[-1024:]
        if self._tail.endswith(b"\r\n0\r\n\r\n"):
            usage = _USAGE.search(self._tail)
            assert self._done is not None
            if usage is None:
                self._done.set_exception(
                    RuntimeError(f"no usage at the end: {self._tail[-300:]!r}")
                )
                return
            self.tokens = int(usage[1])
            self._done.set_result(None)

    async def ask(self, request: bytes) -> None:
        """Send a request and read the whole answer."""
        assert self._transport is not None
        self._done = asyncio.get_running_loop().create_future()
        self._tail, self._last_s = b"", 0.0
        self.events = self.tokens = 0
        self.gaps_s = []
        self._transport.write(request)
        await self._done

    def close(self) -> None:
        """Close the connection."""
        assert self._transport is not None
        self._transport.close()


async def _read(url: str, clients: int, tokens: int, repeats: int) -> list[Round]:
    host, port = url.removeprefix("http://").split(":")
    loop = asyncio.get_running_loop()
    readers = [(await loop.create_connection(_Reader, host, int(port)))[1] for _ in range(clients)]
    request = _request(host, tokens)
    rounds: list[Round] = []
    for repeat in range(repeats + 1):
        alone = await _round(url, readers, request)
        with _stalled_client(host, int(port)):
            await _wait_paused(url, 1)
            stalled = await _round(url, readers, request)
        await _wait_paused(url, 0)
        if repeat > 0:
            rounds += [alone, stalled]
    for reader in readers:
        reader.close()
    return rounds


async def _round(url: str, readers: Sequence[_Reader], request: bytes) -> Round:
    cpu_s = await _read_metric(url, "process_cpu_seconds_total")
    started_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for reader in readers:
            group.create_task(reader.ask(request))
    seconds = time.perf_counter() - started_s
    cpu_s = await _read_metric(url, "process_cpu_seconds_total") - cpu_s
    # An answer that came in one packet has no gap; a round shorter than a tick of the CPU clock
    # counts as one.
    gaps = sorted(gap for reader in readers for gap in reader.gaps_s) or [_CPU_TICK_S]
    return Round(
        seconds=seconds,
        server_cpu_s=max(cpu_s, _CPU_TICK_S),
        tokens=sum(reader.tokens for reader in readers),
        events=sum(reader.events for reader in readers),
        gap_p50_ms=gaps[len(gaps) // 2] * 1e3,
        gap_p99_ms=gaps[len(gaps) * 99 // 100] * 1e3,
    )


@contextlib.contextmanager
def _stalled_client(host: str, port: int) -> Any:
    """A client with a small buffer that asks for a long answer and reads nothing of it."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, port))
        connection.sendall(_request(host, _STALLED_TOKENS))
        yield


async def _read_metric(url: str, name: str) -> float:
    """Ask /metrics for one number without labels. Takes the server a few milliseconds."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as response:
        found = re.search(rf"^{name} (\S+)$", await response.text(), re.MULTILINE)
    assert found is not None
    return float(found[1])


async def _wait_paused(url: str, count: int) -> None:
    """Wait until so many streams wait for their reader. The server answers in its own time."""
    while await _read_metric(url, "cotune_http_paused_streams") != count:
        pass


def _request(host: str, tokens: int) -> bytes:
    body = orjson.dumps(
        {
            "messages": [{"role": "user", "content": "Tell me a story."}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


# What is printed.


def _events_per_token(result: Round, clients: int) -> float:
    """Beside tokens a stream has four events: role, finish, usage and [DONE]."""
    return (result.events - 4 * clients) / result.tokens


def _environment() -> dict[str, Any]:
    return machine() | {
        "aiohttp": aiohttp.__version__,
        "orjson": orjson.__version__,
        "event_loop": "uvloop" if _uvloop_runner() is not None else "asyncio",
    }


def _print_table(result: dict[str, Any]) -> None:
    environment = ", ".join(f"{name} {value}" for name, value in result["environment"].items())
    print(
        f"web layer alone: {result['clients']} clients, {result['tokens_per_stream']} tokens each"
    )
    print(environment)
    print(f"{'':36}{'median':>12}{'min':>12}{'max':>12}")
    for name, text in (
        ("tokens_per_s", "tokens/s"),
        ("tokens_per_server_cpu_s", "tokens/s of the server's CPU time"),
        ("events_per_token", "events per token"),
        ("gap_p50_ms", "gap between packets, p50 (ms)"),
        ("gap_p99_ms", "gap between packets, p99 (ms)"),
        ("stalled_reader_throughput_ratio", "with a stalled reader: tokens/s x"),
        ("stalled_reader_gap_p99_ratio", "with a stalled reader: gap p99 x"),
    ):
        row = result[name]
        print(f"{text:36}{row['median']:12,.2f}{row['min']:12,.2f}{row['max']:12,.2f}")
    reached = result["tokens_per_s"]["median"] >= result["target_tokens_per_s"]
    print(f"target {result['target_tokens_per_s']:,} tokens/s: {'met' if reached else 'NOT met'}")


def _uvloop_runner() -> Callable[[Coroutine[Any, Any, Any]], Any] | None:
    try:
        import uvloop
    except ImportError:
        return None
    runner: Callable[[Coroutine[Any, Any, Any]], Any] = uvloop.run
    return runner


def _run_loop(work: Coroutine[Any, Any, list[Round]]) -> list[Round]:
    result: list[Round] = (_uvloop_runner() or asyncio.run)(work)
    return result


def _main() -> int:
    if sys.argv[1:2] == ["--read-from"]:
        url, clients, tokens, repeats = sys.argv[2:]
        rounds = _run_loop(_read(url, int(clients), int(tokens), int(repeats)))
        sys.stdout.buffer.write(orjson.dumps([asdict(r) for r in rounds]))
        return 0
    parser = argparse.ArgumentParser(prog="cotune bench web", description=HELP)
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(_main())
