from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from typing import Any

import aiohttp
import pytest

from cotune.runtime.errors import ConfigError
from cotune.runtime.types import SamplingParams
from cotune.tools.null_runtime import NullRuntime
from cotune.web.server import ServerSettings, serve
from web_server import http, serving

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}


async def test_a_port_in_use_is_one_clear_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        async with NullRuntime() as runtime:
            with pytest.raises(ConfigError, match=f"port {port} .*--port") as caught:
                await serve(runtime, ServerSettings(port=port), stop=asyncio.Event())
            assert caught.value.param == "port"
            assert caught.value.code == "port_in_use"
            assert runtime.listeners._listeners == ()


async def test_an_address_of_another_machine_is_one_clear_error() -> None:
    async with NullRuntime() as runtime:
        settings = ServerSettings(host="192.0.2.1", port=0, api_key="k")
        with pytest.raises(ConfigError, match="--host") as caught:
            await serve(runtime, settings, stop=asyncio.Event())
        assert caught.value.param == "host"


async def test_a_wrong_setting_opens_no_port() -> None:
    async with NullRuntime() as runtime:
        with pytest.raises(ConfigError, match="max_n"):
            await serve(runtime, ServerSettings(port=0, max_n=0), stop=asyncio.Event())


async def test_two_servers_live_in_one_process() -> None:
    async with (
        NullRuntime(served_name="one") as one,
        NullRuntime(served_name="two") as two,
        serving(one) as first,
        serving(two) as second,
        http(first) as a,
        http(second) as b,
    ):
        names = []
        for client in (a, b):
            async with client.get("/v1/models") as response:
                names.append((await response.json())["data"][0]["id"])
        assert names == ["one", "two"]


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_the_class_of_a_request_reaches_the_runtime(path: str) -> None:
    async with (
        NullRuntime(manual=True) as runtime,
        serving(runtime) as server,
        http(server) as client,
    ):
        body = {**HELLO, "prompt": "x", "service_tier": "flex"}
        answer = asyncio.ensure_future(client.post(path, json=body))
        await runtime.wait_live(1)
        (stream,) = runtime.streams
        assert stream.request_class == "batch"
        runtime.step(3)
        async with await answer as response:
            assert (await response.json())["service_tier"] == "flex"


async def test_readiness_follows_the_runtime() -> None:
    async with NullRuntime() as runtime, serving(runtime) as server, http(server) as client:
        async with client.get("/ready") as response:
            assert response.status == 200
        runtime.is_ready = False
        async with client.get("/ready") as response:
            assert response.status == 503
            assert response.headers["Retry-After"]
        async with client.get("/health") as response:
            assert response.status == 200


async def test_shutdown_lets_running_requests_finish_and_takes_no_more() -> None:
    async with (
        NullRuntime(manual=True) as runtime,
        serving(runtime, shutdown_timeout_s=60.0) as server,
        http(server) as client,
        http(server) as other,
    ):
        # `other` has a connection from before; a new one would not be accepted.
        async with other.get("/ready") as response:
            assert response.status == 200
        answer = asyncio.ensure_future(client.post(CHAT, json=HELLO))
        await runtime.wait_live(1)
        server.stop.set()
        await runtime.draining.wait()
        with pytest.raises(aiohttp.ClientError):
            async with aiohttp.ClientSession() as late:
                await late.get(f"{server.url}/health")
        assert not server.task.done()
        runtime.step(3)
        async with await answer as response:
            assert response.status == 200
            assert (await response.json())["usage"]["completion_tokens"] == 3
        await server.task
        assert runtime.live == 0


async def test_a_kept_connection_is_told_to_go_elsewhere_while_draining() -> None:
    async with (
        NullRuntime(manual=True) as runtime,
        serving(runtime, shutdown_timeout_s=60.0) as server,
        http(server) as client,
        http(server) as other,
    ):
        running = asyncio.ensure_future(client.post(CHAT, json=HELLO))
        async with other.get("/ready") as response:
            assert response.status == 200
        await runtime.wait_live(1)
        server.stop.set()
        await runtime.draining.wait()
        async with other.get("/ready") as response:
            assert response.status == 503
        async with other.post(CHAT, json=HELLO) as response:
            assert response.status == 503
            assert response.headers["Retry-After"] == "5"
            assert (await response.json())["error"]["code"] == "draining"
        runtime.step(3)
        async with await running as response:
            assert response.status == 200


async def test_shutdown_cancels_what_does_not_finish_in_time() -> None:
    async with (
        NullRuntime(manual=True) as runtime,
        serving(runtime, shutdown_timeout_s=0.0) as server,
        http(server) as client,
    ):
        whole = asyncio.ensure_future(client.post(CHAT, json=HELLO))
        await runtime.wait_live(1)
        stream = asyncio.ensure_future(client.post(CHAT, json={**HELLO, "stream": True}))
        await runtime.wait_live(2)
        runtime.step()
        async with await stream as streamed:
            assert streamed.status == 200
            server.stop.set()
            # The stream says why it ends; its status was sent long ago.
            rest = (await streamed.content.read()).decode()
            assert '"code":"draining"' in rest
            assert rest.endswith("data: [DONE]\n\n")
        async with await whole as response:
            assert response.status == 503
            assert (await response.json())["error"]["code"] == "draining"
        await server.task
        assert runtime.live == 0


async def test_cancelling_the_server_releases_everything() -> None:
    async with NullRuntime(manual=True) as runtime:
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        task = asyncio.ensure_future(
            serve(runtime, ServerSettings(port=0), on_ready=ready.set_result, stop=asyncio.Event())
        )
        url = await ready
        async with aiohttp.ClientSession(url) as client:
            answer = asyncio.ensure_future(client.post(CHAT, json=HELLO))
            await runtime.wait_live(1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await runtime.wait_live(0)
            with pytest.raises(aiohttp.ClientError):
                await answer
        assert runtime.listeners._listeners == ()


async def test_a_burst_of_connections_does_not_wait() -> None:
    """The system's queue of connections holds a burst (128, the usual length, would not)."""
    async with NullRuntime() as runtime, serving(runtime) as server:

        async def ask() -> int:
            async with (
                aiohttp.ClientSession(server.url) as client,
                client.get("/health") as response,
            ):
                return response.status

        assert set(await asyncio.gather(*[ask() for _ in range(300)])) == {200}


async def test_the_runtime_is_told_nothing_after_the_server_has_stopped() -> None:
    async with NullRuntime() as runtime:
        async with serving(runtime):
            pass
        runtime.is_ready = True
        await runtime.complete("x", SamplingParams(max_tokens=1))
        assert runtime.listeners._listeners == ()


def test_the_web_layer_imports_no_torch() -> None:
    code = "import sys, cotune.web.server; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


async def test_models_and_their_adapters_are_listed(tmp_path: Any) -> None:
    async with (
        NullRuntime() as runtime,
        serving(runtime) as server,
        http(server) as client,
    ):
        body = {"lora_name": "org/mine", "lora_path": str(tmp_path)}
        async with client.post("/v1/load_lora_adapter", json=body) as response:
            assert response.status == 200
            assert "org/mine@1" in await response.text()
        async with client.post("/v1/load_lora_adapter", json=body) as response:
            assert response.status == 400
            error = (await response.json())["error"]
            assert error["param"] == "lora_name"
            assert "load_inplace" in error["message"]
        async with client.post(
            "/v1/load_lora_adapter", json={**body, "load_inplace": True}
        ) as response:
            assert "org/mine@2" in await response.text()
        async with client.get("/v1/models/org/mine") as response:
            model = await response.json()
            assert model["parent"] == "null"
            assert model["root"] == str(tmp_path)
            assert model["object"] == "model"
        async with client.get("/v1/models") as response:
            listed = (await response.json())["data"]
            assert [m["id"] for m in listed] == ["null", "org/mine"]
            assert listed[0]["parent"] is None
            assert listed[0]["max_model_len"] == 4096
        async with client.post(CHAT, json={**HELLO, "model": "org/mine"}) as response:
            answer = await response.json()
            assert answer["system_fingerprint"] == "org/mine@2"
            assert answer["model"] == "org/mine"
        async with client.post(
            "/v1/unload_lora_adapter", json={"lora_name": "org/mine"}
        ) as response:
            assert response.status == 200
        for path, name in (
            ("/v1/unload_lora_adapter", "org/mine"),
            ("/v1/unload_lora_adapter", "null"),
        ):
            async with client.post(path, json={"lora_name": name}) as response:
                assert response.status == 404
                assert (await response.json())["error"]["param"] == "lora_name"
        async with client.post(
            "/v1/load_lora_adapter", json={"lora_name": "null", "lora_path": str(tmp_path)}
        ) as response:
            assert response.status == 400
        async with client.post(
            "/v1/load_lora_adapter", json={"lora_name": "b", "lora_path": "/no/such/dir"}
        ) as response:
            assert response.status == 400
            assert (await response.json())["error"]["param"] == "lora_path"


async def test_adapter_loading_can_be_switched_off(tmp_path: Any) -> None:
    async with (
        NullRuntime() as runtime,
        serving(runtime, enable_adapter_loading=False) as server,
        http(server) as client,
    ):
        body = {"lora_name": "mine", "lora_path": str(tmp_path)}
        async with client.post("/v1/load_lora_adapter", json=body) as response:
            assert response.status == 404


async def test_tokenizing_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async with NullRuntime() as runtime, serving(runtime) as server, http(server) as client:
        for text in ("häuser", "", "long " * 5000):  # the last one is done in a thread
            async with client.post("/tokenize", json={"prompt": text}) as response:
                body = await response.json()
                assert body["tokens"] == list(text.encode())
                assert body["count"] == len(body["tokens"])
                assert body["max_model_len"] == 4096
                assert body["token_strs"] is None
            async with client.post("/detokenize", json={"tokens": body["tokens"]}) as response:
                assert await response.json() == {"prompt": text}
        async with client.post(
            "/tokenize", json={"messages": HELLO["messages"], "return_token_strs": True}
        ) as response:
            body = await response.json()
            assert "".join(body["token_strs"]) == "user\nhelloassistant\n"
        for path, bad, param in (
            ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
            ("/detokenize", {"tokens": [999]}, "tokens.0"),
        ):
            async with client.post(path, json=bad) as response:
                assert response.status in (400, 404)
                assert (await response.json())["error"]["param"] == param
