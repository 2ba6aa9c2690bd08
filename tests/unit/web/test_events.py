"""Slow readers. The client's end is a plain socket, read only when the test says so."""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from cotune.tools.null_runtime import NullRuntime, text_of
from web_server import http, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

    from web_server import Server

CHAT = "/v1/chat/completions"
TOKENS = 20_000
# Twenty alternatives per token: a few dozen pieces fill every buffer on the way.
LONG: dict[str, Any] = {
    "messages": [{"role": "user", "content": "a"}],
    "max_tokens": TOKENS,
    "ignore_eos": True,
    "stream": True,
    "logprobs": True,
    "top_logprobs": 20,
}
SHORT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "b"}],
    "max_tokens": 5,
    "stream": True,
}


@contextmanager
def connected(server: Server) -> Iterator[socket.socket]:
    """A connection with a small receive buffer."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.setblocking(False)
        yield connection


def request(body: dict[str, Any]) -> bytes:
    data = orjson.dumps(body)
    return (
        b"POST %s HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\nConnection: close\r\n\r\n%s" % (CHAT.encode(), len(data), data)
    )


async def paused_streams(client: Any) -> float:
    async with client.get("/metrics") as response:
        for line in (await response.text()).splitlines():
            if line.startswith("cotune_http_paused_streams "):
                return float(line.split()[1])
    raise AssertionError("no such metric")


async def fill_up(runtime: NullRuntime, client: Any) -> int:
    """Step until the stalled client's stream is paused. Returns the steps taken."""
    steps = 0
    while not await paused_streams(client):
        runtime.step(100)
        steps += 100
        assert steps < TOKENS
    return steps


async def test_a_stalled_reader_stops_nobody_and_gets_everything_when_it_reads_on() -> None:
    loop = asyncio.get_running_loop()
    async with (
        NullRuntime(manual=True, max_model_len=2 * TOKENS) as runtime,
        serving(runtime) as server,
        http(server) as client,
    ):
        with connected(server) as stalled:
            await loop.sock_sendall(stalled, request(LONG))
            await runtime.wait_live(1)
            steps = await fill_up(runtime, client)

            # Another client's tokens come one by one, each as it is made.
            prompt = runtime.codec.encode_chat(SHORT["messages"])
            asking = asyncio.ensure_future(client.post(CHAT, json=SHORT))
            await runtime.wait_live(2)
            runtime.step()
            async with await asking as response:
                for i in range(5):
                    text = ""
                    while not text:
                        event = await response.content.readuntil(b"\n\n")
                        choice = orjson.loads(event.removeprefix(b"data: "))["choices"][0]
                        text = choice["delta"].get("content", "")
                    assert text == text_of(prompt, 5)[i]
                    runtime.step()
                rest = await response.content.read()
                assert rest.endswith(b"data: [DONE]\n\n")
            assert await paused_streams(client) == 1

            # The engine finishes the stalled one's answer too; what is unread waits as one piece.
            runtime.step(TOKENS - steps)
            received = bytearray()
            while data := await loop.sock_recv(stalled, 1 << 20):
                received += data
        events = [
            orjson.loads(line.removeprefix(b"data: "))["choices"][0]["delta"]
            for line in _lines(bytes(received))
            if line != b"data: [DONE]"
        ]
        texts = [event["content"] for event in events if event.get("content")]
        prompt = runtime.codec.encode_chat(LONG["messages"])
        assert "".join(texts) == text_of(prompt, TOKENS)
        assert len(texts) <= steps // 100 + 2
        await runtime.wait_live(0)


async def test_a_reader_that_stalls_too_long_is_disconnected_and_frees_its_pages(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    loop = asyncio.get_running_loop()
    async with (
        NullRuntime(manual=True, max_model_len=2 * TOKENS) as runtime,
        serving(runtime, stall_timeout_s=0.01) as server,
        http(server) as client,
    ):
        with connected(server) as stalled:
            await loop.sock_sendall(stalled, request(LONG))
            await runtime.wait_live(1)
            while runtime.live:
                runtime.step(100)
                async with client.get("/health") as response:
                    assert response.status == 200
            assert runtime.statistics().cache.owned_pages == 0
            received = bytearray()
            while data := await loop.sock_recv(stalled, 1 << 20):
                received += data
            assert not received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    (line,) = [r for r in caplog.records if "path=/v1/chat/completions" in r.getMessage()]
    assert "status=499" in line.getMessage()
    assert "error=stalled" in line.getMessage()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_stalled_reader_that_leaves_frees_its_pages() -> None:
    loop = asyncio.get_running_loop()
    async with (
        NullRuntime(manual=True, max_model_len=2 * TOKENS) as runtime,
        serving(runtime) as server,
        http(server) as client,
    ):
        with connected(server) as stalled:
            await loop.sock_sendall(stalled, request(LONG))
            await runtime.wait_live(1)
            await fill_up(runtime, client)
        await runtime.wait_live(0)
        assert await paused_streams(client) == 0


def _lines(response: bytes) -> list[bytes]:
    """The event lines of a chunked response."""
    head, _, rest = response.partition(b"\r\n\r\n")
    assert b"Transfer-Encoding: chunked" in head
    body = bytearray()
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return [line for line in bytes(body).split(b"\n\n") if line]
