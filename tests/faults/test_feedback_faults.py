"""What goes wrong between those who give feedback and the store; nothing is left behind."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from aiohttp import WSMsgType

from cotune.runtime.errors import StorageError
from cotune.tools.null_learning import NullLearning
from cotune.tools.null_runtime import NullRuntime
from cotune.web import server as web_server_module
from web_server import http, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import aiohttp

    from web_server import Server

PATH = "/v1/feedback"
HANDSHAKE = (
    b"GET /v1/feedback HTTP/1.1\r\nHost: test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def preference(id: str, **fields: Any) -> dict[str, Any]:
    prompt = [{"role": "user", "content": f"question {id}"}]
    pair = {"prompt": prompt, "chosen": "yes", "rejected": "no"}
    return {"id": id, "type": "preference", **pair, **fields}


def frame(value: object) -> bytes:
    """A client's text frame, masked with zeros."""
    data = orjson.dumps(value)
    length = len(data)
    head = struct.pack("!BB", 0x81, 0x80 | length) if length < 126 else b""
    return (head or struct.pack("!BBH", 0x81, 0x80 | 126, length)) + b"\0\0\0\0" + data


@asynccontextmanager
async def harness(
    learning: NullLearning, **settings: Any
) -> AsyncIterator[tuple[Server, aiohttp.ClientSession]]:
    """A server that learns; checks at the end that nothing waits and nothing runs."""
    before = asyncio.all_tasks()
    async with NullRuntime(learning=learning) as runtime:
        async with serving(runtime, **settings) as server, http(server) as client:
            yield server, client
            if not server.stop.is_set():
                await connections(client, 0)
        assert learning.waiting == 0
    for _ in range(3):  # the turns in which cancelled tasks leave
        await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


async def connections(client: aiohttp.ClientSession, count: int) -> None:
    """Wait until the server has this many feedback connections."""
    text = ""
    while f"cotune_feedback_connections {count}.0" not in text:
        async with client.get("/metrics") as response:
            text = await response.text()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# Clients that leave.


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("turns", range(0, 40, 2))
async def test_a_client_may_leave_at_any_turn_of_the_loop(
    turns: int, manual: bool, caplog: pytest.LogCaptureFixture
) -> None:
    learning = NullLearning("null", manual=manual)
    async with harness(learning) as (server, _):
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(HANDSHAKE)
        writer.write(b"".join(frame(preference(str(i))) for i in range(20)))
        for turn in range(turns):
            if turn % 10 == 9:
                learning.commit()
            await asyncio.sleep(0)
        writer.transport.abort()
    assert warnings(caplog) == []


async def test_a_client_that_leaves_while_the_disk_works_leaves_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    learning = NullLearning("null", manual=True)
    async with harness(learning) as (server, _):
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(HANDSHAKE + frame(preference("a")) + frame(preference("b")))
        await learning.wait_waiting(2)
        writer.transport.abort()
        await learning.wait_waiting(0)
    assert learning.events == {}
    (line,) = [r.getMessage() for r in caplog.records if "path=/v1/feedback" in r.getMessage()]
    assert "status=499" in line
    assert warnings(caplog) == []


async def test_a_post_that_is_given_up_leaves_nothing() -> None:
    learning = NullLearning("null", manual=True)
    async with harness(learning) as (_, client):
        posting = asyncio.ensure_future(
            client.post(PATH, json=[preference(str(i)) for i in range(5)])
        )
        await learning.wait_waiting(5)
        posting.cancel()
        await learning.wait_waiting(0)
    assert learning.events == {}


@pytest.mark.parametrize(
    "data",
    [
        b"\x81\x05hello",  # not masked
        b"\xf1\x80\0\0\0\0",  # reserved bits
        b"\x83\x80\0\0\0\0",  # an unknown opcode
        b"\x80\x80\0\0\0\0",  # a continuation of nothing
        b"\x81\xff" + b"\xff" * 8,  # 2**64 - 1 bytes to come
        b"\x81\x82\0\0\0\0\xff\xfe",  # no UTF-8
        b"\x88\x81\0\0\0\0\x03",  # half a close code
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
async def test_what_breaks_the_protocol_ends_its_own_connection_alone(
    data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    learning = NullLearning("null")
    async with harness(learning) as (server, client), client.ws_connect(PATH) as other:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(HANDSHAKE)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(data)
        writer.write_eof()
        await reader.read()  # ends: the server has closed it
        writer.close()
        await other.send_json(preference("a"))
        assert (await other.receive_json())["type"] == "ack"
        await other.close()
    assert warnings(caplog) == []


# Clients that are too quick, or read nothing.


async def test_a_full_window_stops_the_reading_and_not_the_server() -> None:
    learning = NullLearning("null", manual=True)
    async with (
        harness(learning, feedback_window=4) as (_, client),
        client.ws_connect(PATH) as ws,
        client.ws_connect(PATH) as other,
    ):
        for i in range(10):
            await ws.send_json(preference(str(i)))
        await learning.wait_waiting(4)
        await other.send_json(preference("other"))
        await learning.wait_waiting(5)
        async with client.get("/health") as response:
            assert response.status == 200
        assert learning.waiting == 5  # the other six are not even read
        seen: set[str] = set()
        while len(seen) < 10:
            learning.commit()
            seen.add((await ws.receive_json())["id"])
        assert seen == {str(i) for i in range(10)}
        await ws.close()
        await other.close()


async def test_large_frames_fill_the_window_by_their_bytes() -> None:
    learning = NullLearning("null", manual=True)
    async with (
        harness(learning, max_frame_bytes=10_000) as (_, client),
        client.ws_connect(PATH) as ws,
    ):
        for i in range(10):
            await ws.send_json(preference(str(i), chosen="x" * 9000))
        await learning.wait_waiting(5)  # 5 * 9 kB: the one that fills four frames stands out
        async with client.get("/health") as response:
            assert response.status == 200
        assert learning.waiting == 5
        learning.commit()
        await learning.wait_waiting(5)
        learning.commit()
        assert {(await ws.receive_json())["type"] for _ in range(10)} == {"ack"}
        await ws.close()


async def test_a_client_that_reads_no_answers_is_paused_and_then_cut_off(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    learning = NullLearning("null")
    loop = asyncio.get_running_loop()
    wrong = b"".join(frame({"id": "x" * 256, "type": "dance"}) for _ in range(100))
    async with harness(learning, stall_timeout_s=0.2) as (server, client):
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(("127.0.0.1", server.port))
            deaf.setblocking(False)
            await loop.sock_sendall(deaf, HANDSHAKE)

            async def shout() -> None:
                while True:
                    await loop.sock_sendall(deaf, wrong)

            shouting = asyncio.ensure_future(shout())
            async with client.ws_connect(PATH) as other:
                i = 0
                while not shouting.done():  # nobody else waits
                    await other.send_json(preference(str(i)))
                    assert (await other.receive_json())["type"] == "ack"
                    i += 1
                await other.close()
            with pytest.raises((ConnectionError, BrokenPipeError)):
                await shouting
    # What was answered is what the system's buffers hold, and no more was read.
    assert 0 < learning.status().refused_events["invalid_feedback"] < 100_000
    lines = [r.getMessage() for r in caplog.records if "path=/v1/feedback" in r.getMessage()]
    assert sum("error=stalled" in line or "error=client_gone" in line for line in lines) == 1
    assert warnings(caplog) == []


async def test_a_flood_is_told_when_to_come_back_and_harms_no_other_source() -> None:
    learning = NullLearning("null", quota_events=10)
    async with (
        harness(learning) as (_, client),
        client.ws_connect(PATH, params={"source": "flood"}) as flood,
        client.ws_connect(PATH, params={"source": "ann"}) as ann,
    ):
        for i in range(500):
            await flood.send_json(preference(str(i)))
        frames = [await flood.receive_json() for _ in range(500)]
        refused = [f for f in frames if f["type"] == "error"]
        assert len(frames) - len(refused) == 10
        assert {f["error"]["code"] for f in refused} == {"quota_exceeded"}
        assert {f["retry_after"] for f in refused} == {7}
        assert {f["id"] for f in frames} == {str(i) for i in range(500)}
        await ann.send_json(preference("a"))
        assert (await ann.receive_json())["type"] == "ack"
        assert len(learning.events) == 11
        await flood.close()
        await ann.close()


# A disk that fails.


async def test_a_full_disk_acknowledges_nothing_and_the_connection_outlives_it() -> None:
    learning = NullLearning("null")
    async with harness(learning) as (_, client), client.ws_connect(PATH) as ws:
        learning.failure = StorageError("the disk is full", retry_after_s=2)
        await ws.send_json(preference("a"))
        answer = await ws.receive_json()
        assert (answer["id"], answer["error"]["code"]) == ("a", "storage_failed")
        assert answer["retry_after"] == 2
        learning.failure = ValueError("a bug")
        await ws.send_json(preference("a"))
        answer = await ws.receive_json()
        assert answer["error"]["code"] == "internal_error"
        assert "bug" not in str(answer)
        assert learning.events == {}
        learning.failure = None
        await ws.send_json(preference("a"))
        assert await ws.receive_json() == {"type": "ack", "id": "a", "duplicate": False}
        await ws.close()


# Shutdown.


async def test_at_shutdown_what_was_read_is_answered_and_then_comes_1001() -> None:
    learning = NullLearning("null", manual=True)
    async with (
        harness(learning) as (server, client),
        client.ws_connect(PATH) as ws,
        client.ws_connect(PATH) as idle,
    ):
        for i in range(100):
            await ws.send_json(preference(str(i)))
        await learning.wait_waiting(100)
        server.stop.set()
        message = await idle.receive()
        assert (message.type, message.data) == (WSMsgType.CLOSE, 1001)
        assert not server.task.done()
        learning.commit()
        answers = [await ws.receive_json() for _ in range(100)]
        assert {answer["id"] for answer in answers} == {str(i) for i in range(100)}
        message = await ws.receive()
        assert (message.type, message.data) == (WSMsgType.CLOSE, 1001)
        await server.task
    assert len(learning.events) == 100


async def test_shutdown_under_load_loses_nothing_that_it_acknowledged() -> None:
    learning = NullLearning("null")
    acknowledged: set[tuple[str, str]] = set()
    async with harness(learning) as (server, client):
        enough = asyncio.Event()

        async def send(source: str) -> int | None:
            async with client.ws_connect(PATH, params={"source": source}) as ws:

                async def write() -> None:
                    i = 0
                    while not ws.closed:
                        await ws.send_json(preference(str(i)))
                        i += 1
                        await asyncio.sleep(0)

                writing = asyncio.ensure_future(write())
                async for message in ws:
                    answer = message.json()
                    assert answer["type"] == "ack"
                    acknowledged.add((source, answer["id"]))
                    if len(acknowledged) > 200:
                        enough.set()
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)
                return ws.close_code

        async with asyncio.TaskGroup() as group:
            senders = [group.create_task(send(f"s{i}")) for i in range(4)]
            await enough.wait()
            server.stop.set()
        assert {sender.result() for sender in senders} == {1001}
        await server.task
    assert len(acknowledged) > 200
    assert set(learning.events) == acknowledged


async def test_shutdown_does_not_wait_for_a_disk_that_never_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(web_server_module, "_CLOSE_TIMEOUT_S", 0.05)
    learning = NullLearning("null", manual=True)
    async with harness(learning) as (server, client), client.ws_connect(PATH) as ws:
        await ws.send_json(preference("a"))
        await learning.wait_waiting(1)
        server.stop.set()
        await server.task
        assert (await ws.receive()).type in (WSMsgType.CLOSE, WSMsgType.CLOSED, WSMsgType.ERROR)
    assert learning.events == {}


async def test_shutdown_does_not_wait_for_a_client_that_reads_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cotune.web.feedback._CLOSE_TIMEOUT_S", 0.05)
    learning = NullLearning("null", manual=True)
    async with harness(learning) as (server, _):
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(HANDSHAKE + frame(preference("a")))
        await learning.wait_waiting(1)
        server.stop.set()
        learning.commit()
        await server.task  # though no close frame is ever answered
        writer.transport.abort()
    assert len(learning.events) == 1
