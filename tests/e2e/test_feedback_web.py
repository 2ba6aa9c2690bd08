"""The feedback WebSocket over a real socket, as its clients use it."""

from __future__ import annotations

import asyncio
import base64
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp import WSMsgType

from cotune.tools.null_learning import NullLearning
from cotune.tools.null_runtime import NullRuntime
from web_server import http, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import pytest

PATH = "/v1/feedback"


def preference(id: str, **fields: Any) -> dict[str, Any]:
    prompt = [{"role": "user", "content": f"question {id}"}]
    return {
        "id": id,
        "type": "preference",
        "prompt": prompt,
        "chosen": "yes",
        "rejected": "no",
        **fields,
    }


@asynccontextmanager
async def socket(
    learning: NullLearning, *, path: str = PATH, **settings: Any
) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    async with (
        NullRuntime(served_name=learning.adapter, learning=learning) as runtime,
        serving(runtime, **settings) as server,
        http(server) as client,
        client.ws_connect(path) as ws,
    ):
        yield ws


async def test_every_event_is_acknowledged_under_its_id() -> None:
    learning = NullLearning("null")
    async with socket(learning) as ws:
        for id, duplicate in (("a", False), ("b", False), ("a", True)):
            await ws.send_json(preference(id))
            assert await ws.receive_json() == {"type": "ack", "id": id, "duplicate": duplicate}
    assert [id for _, id in learning.events] == ["a", "b"]


async def test_a_chat_is_rated_compared_edited_and_all_of_it_taken_back() -> None:
    learning = NullLearning("null")
    async with (
        NullRuntime(learning=learning) as runtime,
        serving(runtime) as server,
        http(server) as client,
        client.ws_connect(PATH, params={"source": "ann"}) as ws,
    ):
        body = {"messages": [{"role": "user", "content": "hi"}], "n": 2, "max_tokens": 4}
        async with client.post("/v1/chat/completions", json=body) as response:
            id = (await response.json())["id"]
        events: list[dict[str, Any]] = [
            {"id": "1", "type": "rating", "response_id": f"{id}:0", "rating": 1, "comment": "nice"},
            {
                "id": "2",
                "type": "preference",
                "chosen_id": f"{id}:0",
                "rejected_id": f"{id}:1",
            },
            {"id": "3", "type": "edit", "response_id": f"{id}:1", "text": "better"},
            *({"id": f"w{n}", "type": "withdraw", "target": str(n)} for n in (1, 2, 3)),
        ]
        for event in events:  # without waiting: those about one thing keep their order
            await ws.send_json(event)
        frames = [await ws.receive_json() for _ in events]
        assert {frame["id"] for frame in frames} == {event["id"] for event in events}
        assert {frame["type"] for frame in frames} == {"ack"}
        assert all(learning.events["ann", id].is_withdrawn for id in ("1", "2", "3"))
        async with client.get(f"{PATH}/export") as response:
            assert len((await response.text()).splitlines()) == 3  # the withdrawals


async def test_what_is_no_event_gets_an_error_and_the_connection_stays() -> None:
    learning = NullLearning("null")
    async with socket(learning) as ws:
        for text, code in (
            ("", "invalid_json"),
            ("{", "invalid_json"),
            ("[1]", "invalid_json"),
            ("null", "invalid_json"),
            ("[" * 100_000, "invalid_json"),
            ('{"id": "\\ud800"}', "invalid_json"),
        ):
            await ws.send_str(text)
            frame = await ws.receive_json()
            assert (frame["type"], frame["id"], frame["error"]["code"]) == ("error", None, code)
            assert set(frame["error"]) == {"message", "type", "param", "code"}
        await ws.send_bytes(b'{"id": "a"}')
        frame = await ws.receive_json()
        assert (frame["id"], frame["error"]["code"]) == (None, "binary_frame")
        for body, param in (
            ({"id": "x", "type": "rating", "response_id": "r", "rating": 2}, "rating"),
            ({"id": "x", "type": "dance"}, "type"),
            (preference("x", rejected="yes"), "rejected"),
        ):
            await ws.send_json(body)
            frame = await ws.receive_json()
            assert (frame["id"], frame["error"]["param"]) == ("x", param)
        await ws.send_json(preference("a"))
        assert (await ws.receive_json())["type"] == "ack"
    assert len(learning.events) == 1


async def test_an_acknowledgement_waits_until_its_event_is_stored() -> None:
    learning = NullLearning("null", manual=True)
    async with socket(learning) as ws:
        receiving = asyncio.ensure_future(ws.receive_json())
        await ws.send_json(preference("a"))
        await learning.wait_waiting(1)
        await ws.send_json(preference("b"))
        await learning.wait_waiting(2)
        assert not receiving.done()
        learning.commit()
        assert (await receiving)["id"] == "a"
        assert (await ws.receive_json())["id"] == "b"


async def test_a_frame_that_is_too_large_ends_the_connection_with_1009() -> None:
    learning = NullLearning("null")
    async with socket(learning, max_frame_bytes=1000) as ws:
        await ws.send_json(preference("a"))
        assert (await ws.receive_json())["id"] == "a"
        await ws.send_json(preference("b", chosen="x" * 2000))
        message = await ws.receive()
        assert (message.type, message.data) == (WSMsgType.CLOSE, 1009)
    assert len(learning.events) == 1


async def test_a_client_that_closes_has_its_last_events_stored() -> None:
    learning = NullLearning("null", manual=True)
    async with socket(learning) as ws:
        await ws.send_json(preference("a"))
        await ws.send_json(preference("b"))
        await learning.wait_waiting(2)
        closing = asyncio.ensure_future(ws.close())
        await asyncio.sleep(0)
        learning.commit()
        await closing
        assert ws.close_code == 1000
    assert len(learning.events) == 2


# Who may connect.


async def connect(server: Any, **kwargs: Any) -> int:
    """The status of a handshake; 101 is a WebSocket."""
    async with aiohttp.ClientSession(server.url) as client:
        try:
            async with client.ws_connect(PATH, **kwargs) as ws:
                assert ws.protocol in (None, "cotune.feedback")
                return 101
        except aiohttp.WSServerHandshakeError as error:
            return error.status


def key_protocol(key: str) -> str:
    return "cotune-key." + base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")


async def test_the_key_is_taken_from_the_header_or_from_a_subprotocol(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    key = "sesame~?>>"  # + and / in plain base64
    async with (
        NullRuntime(learning=NullLearning("null")) as runtime,
        serving(runtime, api_key=key) as server,
    ):
        spoken = "cotune.feedback"
        assert await connect(server) == 401
        assert await connect(server, headers={"Authorization": "Bearer wrong"}) == 401
        assert await connect(server, headers={"Authorization": f"Bearer {key}"}) == 101
        assert await connect(server, protocols=[spoken, key_protocol(key)]) == 101
        assert await connect(server, protocols=[key_protocol(key), spoken]) == 101
        assert await connect(server, protocols=[spoken, key_protocol("wrong")]) == 401
        assert await connect(server, protocols=[spoken, "cotune-key."]) == 401
        assert await connect(server, protocols=[spoken, "cotune-key.!"]) == 401
        assert await connect(server, protocols=[spoken]) == 401
        # The key alone is no language; it is refused before anything logs the offer.
        assert await connect(server, protocols=[key_protocol(key)]) == 400
        async with aiohttp.ClientSession(server.url) as client:
            headers = {"Sec-WebSocket-Protocol": f"{spoken}, {key_protocol(key)}"}
            async with client.get("/v1/models", headers=headers) as response:
                assert response.status == 401  # for WebSockets only
    assert key not in caplog.text
    assert key_protocol(key).removeprefix("cotune-key.") not in caplog.text


async def test_pages_of_other_sites_may_not_connect_nor_act() -> None:
    learning = NullLearning("null")
    learning.publish()
    async with (
        NullRuntime(learning=learning) as runtime,
        serving(runtime, allowed_origins=("https://friend.example",)) as server,
        http(server) as client,
    ):
        assert await connect(server, origin=server.url) == 101
        assert await connect(server, origin="https://friend.example") == 101
        for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
            assert await connect(server, origin=origin) == 403
            # What a browser sends without asking first: no body, or a form's content type.
            async with client.post(
                "/v1/adapters/1/rollback", headers={"Origin": origin}
            ) as response:
                assert response.status == 403
                assert (await response.json())["error"]["code"] == "origin_not_allowed"
        assert learning.live == 1
        async with client.post(
            "/v1/adapters/1/rollback", headers={"Origin": "https://friend.example"}
        ) as response:
            assert response.status == 200


async def test_no_more_connections_than_the_server_takes() -> None:
    async with (
        NullRuntime(learning=NullLearning("null")) as runtime,
        serving(runtime, max_feedback_connections=2) as server,
        http(server) as client,
    ):
        async with client.ws_connect(PATH), client.ws_connect(PATH):
            assert await connect(server) == 429
            async with client.get("/metrics") as response:
                assert "cotune_feedback_connections 2.0" in await response.text()
        assert await connect(server) == 101


async def test_a_server_that_does_not_learn_refuses_the_handshake() -> None:
    async with NullRuntime() as runtime, serving(runtime) as server:
        assert await connect(server) == 400


async def test_a_quiet_connection_gets_pings_and_lives_on_their_pongs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learning = NullLearning("null")
    loop = asyncio.get_running_loop()
    time, skipped_s = loop.time, 0.0
    monkeypatch.setattr(loop, "time", lambda: time() + skipped_s)
    async with (
        NullRuntime(learning=learning) as runtime,
        serving(runtime, heartbeat_s=60.0) as server,
        http(server) as client,
        client.ws_connect(PATH, autoping=False) as ws,
    ):
        for _ in range(2):
            skipped_s += 61.0
            message = await ws.receive()
            assert message.type is WSMsgType.PING
            await ws.pong(message.data)
            await ws.ping(b"and you?")  # what answers this has seen the pong
            message = await ws.receive()
            assert (message.type, message.data) == (WSMsgType.PONG, b"and you?")
        await ws.send_json(preference("a"))
        assert (await ws.receive_json())["type"] == "ack"
        # Without a pong it is over.
        skipped_s += 61.0
        message = await ws.receive()
        assert message.type is WSMsgType.PING
        skipped_s += 31.0
        while (await ws.receive()).type is not WSMsgType.CLOSED:
            pass


async def test_a_client_that_lost_its_connection_sends_again_and_nothing_counts_twice() -> None:
    learning = NullLearning("null")
    async with (
        NullRuntime(learning=learning) as runtime,
        serving(runtime) as server,
        http(server) as client,
    ):
        async with client.ws_connect(PATH) as ws:
            for i in range(5):
                await ws.send_json(preference(str(i)))
            await ws.receive_json()  # the other acknowledgements are lost
        async with client.ws_connect(PATH) as ws:
            for i in range(10):
                await ws.send_json(preference(str(i)))
            frames = [await ws.receive_json() for _ in range(10)]
    assert {frame["type"] for frame in frames} == {"ack"}
    assert len(learning.events) == 10
