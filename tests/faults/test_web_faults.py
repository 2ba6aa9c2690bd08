"""What goes wrong between a client and an answer; each test ends with nothing left behind."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from cotune.runtime.errors import IterationError
from cotune.tools.null_runtime import NullRuntime
from web_server import http, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import aiohttp

    from web_server import Server

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
PROMPTS: dict[str, Any] = {"prompt": ["one", "two", "three"], "n": 2, "max_tokens": 8}


@asynccontextmanager
async def harness(
    *, max_requests: int = 1024, **settings: Any
) -> AsyncIterator[tuple[NullRuntime, Server, aiohttp.ClientSession]]:
    """A server whose steps the test makes; checks at the end that nothing is left."""
    before = asyncio.all_tasks()
    async with NullRuntime(manual=True, max_requests=max_requests) as runtime:
        async with serving(runtime, **settings) as server, http(server) as client:
            yield runtime, server, client
            await runtime.wait_live(0)
            assert runtime.statistics().cache.owned_pages == 0
            async with client.get("/health") as response:
                assert response.status == 200
        assert runtime.listeners._listeners == ()
    await asyncio.sleep(0)  # the turn in which cancelled tasks leave
    assert asyncio.all_tasks() == before


def raw(path: str, body: dict[str, Any]) -> bytes:
    data = orjson.dumps(body)
    return (
        b"POST %s HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (path.encode(), len(data), data)
    )


# Clients that leave.


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("path", "body"), [(CHAT, HELLO), (COMPLETIONS, PROMPTS)])
async def test_a_client_that_leaves_before_the_first_token_frees_everything(
    path: str, body: dict[str, Any], stream: bool
) -> None:
    async with harness() as (runtime, server, _):
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(raw(path, {**body, "stream": stream}))
        await runtime.wait_live(len(body.get("prompt", [None])))
        writer.transport.abort()
        await runtime.wait_live(0)  # without another step


@pytest.mark.parametrize(("path", "body"), [(CHAT, HELLO), (COMPLETIONS, PROMPTS)])
async def test_a_client_that_leaves_mid_stream_frees_everything(
    path: str, body: dict[str, Any]
) -> None:
    async with harness() as (runtime, server, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(raw(path, {**body, "stream": True}))
        await runtime.wait_live(len(body.get("prompt", [None])))
        runtime.step()
        assert b" 200 " in await reader.readline()
        writer.transport.abort()
        await runtime.wait_live(0)


async def test_a_client_that_only_stops_writing_has_left() -> None:
    async with harness() as (runtime, server, _):
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(raw(CHAT, HELLO))
        await runtime.wait_live(1)
        writer.write_eof()
        await runtime.wait_live(0)
        writer.transport.abort()


@pytest.mark.parametrize("turns", range(40))
async def test_a_client_may_leave_at_any_turn_of_the_loop(
    turns: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with harness() as (runtime, server, _):
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(raw(COMPLETIONS, {**PROMPTS, "stream": True}))
        for turn in range(turns):
            if turn % 3 == 0:
                runtime.step()
            await asyncio.sleep(0)
        writer.transport.abort()
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


async def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_nothing() -> None:
    async with harness() as (_, server, _):
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(raw(CHAT, HELLO)[:-5])
        await writer.drain()
        writer.transport.abort()


async def test_many_clients_that_leave_at_once_free_everything() -> None:
    async with harness() as (runtime, server, _):
        writers = []
        for _ in range(64):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(raw(CHAT, {**HELLO, "stream": True, "n": 3}))
            writers.append(writer)
        await runtime.wait_live(64)
        runtime.step()
        for writer in writers:
            writer.transport.abort()
        await runtime.wait_live(0)


# Clients that are slow or speak no HTTP.


async def test_a_body_that_does_not_arrive_is_given_up() -> None:
    async with harness(read_timeout_s=0.01) as (_, server, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(raw(CHAT, HELLO)[:-5])
        assert b" 408 " in await reader.readline()
        writer.transport.abort()


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # the start of a TLS handshake
        b"\x00" * 100,
        b"POST " + CHAT.encode() + b" HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST " + CHAT.encode() + b" HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    ],
)
async def test_what_is_no_http_is_refused_and_harms_nobody(data: bytes) -> None:
    async with harness() as (_, server, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(data)
        status = await reader.readline()
        assert status == b"" or b" 400 " in status
        writer.transport.abort()


async def test_requests_in_one_packet_are_answered_in_order() -> None:
    async with harness() as (runtime, server, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(raw(CHAT, HELLO) + raw("/tokenize", {"prompt": "x"}))
        await runtime.wait_live(1)
        runtime.step(8)
        assert b" 200 " in await reader.readline()
        seen = b""
        while b'"tokens":[120]' not in seen:
            seen += await reader.read(4096)
        writer.transport.abort()


# Answers that fail.


def error_of(text: str) -> dict[str, Any]:
    error: dict[str, Any] = orjson.loads(text)["error"]
    return error


@pytest.mark.parametrize("stream", [True, False])
async def test_a_failure_before_the_first_token_has_a_status_of_its_own(stream: bool) -> None:
    async with harness() as (runtime, _, client):
        asking = asyncio.ensure_future(client.post(CHAT, json={**HELLO, "stream": stream}))
        await runtime.wait_live(1)
        runtime.fail_all(IterationError("the iteration failed"))
        async with await asking as response:
            assert response.status == 500
            assert error_of(await response.text()) == {
                "message": "the iteration failed",
                "type": "server_error",
                "param": None,
                "code": "iteration_failed",
            }


@pytest.mark.parametrize(
    ("error", "code"),
    [(IterationError("half-way"), "iteration_failed"), (RuntimeError("bug"), "internal_error")],
)
@pytest.mark.parametrize(("path", "body"), [(CHAT, HELLO), (COMPLETIONS, PROMPTS)])
async def test_a_failure_mid_stream_is_the_last_event(
    path: str, body: dict[str, Any], error: Exception, code: str
) -> None:
    async with harness() as (runtime, _, client):
        asking = asyncio.ensure_future(client.post(path, json={**body, "stream": True}))
        await runtime.wait_live(len(body.get("prompt", [None])))
        runtime.step()
        async with await asking as response:
            assert response.status == 200
            await response.content.readuntil(b"\n\n")
            runtime.fail_all(error)
            *_, last, done, end = (await response.text()).split("\n\n")
            assert error_of(last.removeprefix("data: "))["code"] == code
            assert "bug" not in last
            assert (done, end) == ("data: [DONE]", "")


async def test_a_failure_fails_its_own_requests_and_not_the_server() -> None:
    async with harness() as (runtime, _, client):
        for _ in range(3):
            asking = asyncio.ensure_future(client.post(CHAT, json=HELLO))
            await runtime.wait_live(1)
            runtime.fail_all(IterationError("x"))
            async with await asking as response:
                assert response.status == 500
        asking = asyncio.ensure_future(client.post(CHAT, json=HELLO))
        await runtime.wait_live(1)
        runtime.step(8)
        async with await asking as response:
            assert response.status == 200


# Too much at once.


async def test_prompts_are_admitted_together_or_not_at_all() -> None:
    async with harness(max_requests=2) as (runtime, _, client):
        async with client.post(COMPLETIONS, json=PROMPTS) as response:
            assert response.status == 429
            assert response.headers["Retry-After"] == "2"
            assert error_of(await response.text())["code"] == "overloaded"
        assert runtime.live == 0
        async with client.post(COMPLETIONS, json={**PROMPTS, "stream": True}) as response:
            assert response.status == 429
        assert runtime.live == 0


async def test_a_full_queue_refuses_the_next_and_recovers() -> None:
    async with harness(max_requests=1) as (runtime, _, client):
        first = asyncio.ensure_future(client.post(CHAT, json=HELLO))
        await runtime.wait_live(1)
        async with client.post(CHAT, json=HELLO) as response:
            assert response.status == 429
        runtime.step(8)
        async with await first as response:
            assert response.status == 200
        await runtime.wait_live(0)
        again = asyncio.ensure_future(client.post(CHAT, json=HELLO))
        await runtime.wait_live(1)
        runtime.step(8)
        async with await again as response:
            assert response.status == 200
