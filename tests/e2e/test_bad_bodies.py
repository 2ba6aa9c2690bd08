"""Whatever is posted, the answer is an answer or an error object, and never a 500."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
import pytest
import pytest_asyncio
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bad_bodies import BAD_CHAT, BAD_COMPLETION, HELLO, JSON, NAMES, NO_OBJECTS
from cotune import Runtime
from cotune.tools.null_runtime import NullRuntime
from tiny_models import save_model_directory
from web_server import http, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import aiohttp

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
PATHS = (
    CHAT,
    COMPLETIONS,
    "/tokenize",
    "/detokenize",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
)


@pytest_asyncio.fixture(params=["null", "tiny"], scope="module", loop_scope="module")
async def client(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[aiohttp.ClientSession]:
    runtime: Any = NullRuntime()
    if request.param == "tiny":
        torch.set_num_threads(1)
        path = save_model_directory(tmp_path_factory.mktemp("model") / "tiny", "llama")
        runtime = Runtime(path, "cpu", max_model_len=256)
    async with (
        runtime,
        serving(runtime, max_messages=3, max_prompts=3, max_n=8) as server,
        http(server) as session,
    ):
        yield session
        # Nothing leaked, and the server goes on.
        assert runtime.statistics().running == 0
        assert runtime.statistics().waiting == 0
        assert runtime.statistics().cache.owned_pages == 0
        async with session.post(CHAT, json={"messages": HELLO, "max_tokens": 2}) as response:
            assert response.status == 200


async def post(client: aiohttp.ClientSession, path: str, body: bytes) -> tuple[int, bytes]:
    headers = {"Content-Type": "application/json"}
    async with client.post(path, data=body, headers=headers) as response:
        return response.status, await response.read()


def error_in(answer: bytes) -> dict[str, Any]:
    (error,) = orjson.loads(answer).values()
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    return dict(error)


@pytest.mark.parametrize("path", PATHS)
async def test_a_body_that_is_no_json_object_is_refused_everywhere(
    client: aiohttp.ClientSession, path: str
) -> None:
    for body in NO_OBJECTS:
        status, answer = await post(client, path, body)
        assert status == 400, body
        assert error_in(answer)["code"] == "invalid_json", body


@pytest.mark.parametrize("stream", [True, False])
async def test_a_bad_field_is_refused_by_name(client: aiohttp.ClientSession, stream: bool) -> None:
    for path, base, table in (
        (CHAT, {"messages": HELLO}, BAD_CHAT),
        (COMPLETIONS, {"prompt": "once"}, BAD_COMPLETION),
    ):
        for fields, param in table:
            if stream and {"stream_options", "prompt_logprobs", "stream"} & fields.keys():
                continue  # what is wrong with these depends on streaming
            body = orjson.dumps({**base, "stream": stream, **fields})
            status, answer = await post(client, path, body)
            error = error_in(answer)
            assert (status, error["param"]) == (400, param), (fields, error)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"model": "other"}, "model", "model_not_found"),
        ({"prompt": "long " * 5000}, "prompt", "context_length_exceeded"),
        ({"max_tokens": 100_000}, "max_tokens", "context_length_exceeded"),
        ({"prompt": [10**9]}, "prompt", None),
        ({"logit_bias": {"1000000": 1}}, "logit_bias.1000000", None),
        ({"stop_token_ids": [1_000_000]}, "stop_token_ids.0", None),
    ],
)
async def test_what_only_the_runtime_can_know_is_refused_as_clearly(
    client: aiohttp.ClientSession, fields: dict[str, Any], param: str, code: str | None
) -> None:
    for stream in (True, False):
        body = orjson.dumps({"prompt": "once", "stream": stream, **fields})
        status, answer = await post(client, COMPLETIONS, body)
        error = error_in(answer)
        assert status == (404 if param == "model" else 400)
        assert error["param"].startswith(param)
        assert code is None or error["code"] == code


@settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    fields=st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4),
    path=st.sampled_from([CHAT, COMPLETIONS, "/tokenize"]),
)
async def test_whatever_json_comes_there_is_an_answer_or_an_error_object(
    client: aiohttp.ClientSession, fields: dict[str, Any], path: str
) -> None:
    base = {"prompt": "once"} if path != CHAT else {"messages": HELLO}
    status, answer = await post(client, path, orjson.dumps({**base, "max_tokens": 3, **fields}))
    assert status in (200, 400, 404), answer
    if status != 200:
        assert error_in(answer)["param"], answer


@pytest.mark.parametrize(
    "text",
    ["", "\0", "\x1b[31m", "\u202e", "\N{GRINNING FACE}" * 3, "e\u0301", "\ufffd", "<|end|>"],
)
async def test_any_text_is_a_prompt(client: aiohttp.ClientSession, text: str) -> None:
    body = orjson.dumps({"messages": [{"role": "user", "content": text}], "max_tokens": 2})
    status, answer = await post(client, CHAT, body)
    assert status == 200, answer
    body = orjson.dumps({"prompt": text, "max_tokens": 2, "echo": True})
    status, answer = await post(client, COMPLETIONS, body)
    if text:
        assert status == 200, answer
        assert orjson.loads(answer)["choices"][0]["text"].startswith(text)
    else:
        assert (status, error_in(answer)["param"]) == (400, "prompt")
