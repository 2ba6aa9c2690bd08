from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from cotune.runtime.types import AdapterVersion, Delta
from cotune.tools.null_runtime import NullRuntime, text_of
from cotune.web.chat import ChatAnswer
from cotune.web.requests import parse_chat
from cotune.web.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from cotune.tools.null_runtime import NullStream

HELLO = [{"role": "user", "content": "hello"}]


def events(data: bytes) -> list[Any]:
    """The events in bytes that consist of nothing but whole events."""
    assert data == b"" or data.endswith(b"\n\n")
    parsed = []
    for event in data.split(b"\n\n")[:-1]:
        assert event.startswith(b"data: {")
        parsed.append(orjson.loads(event.removeprefix(b"data: ")))
    return parsed


@asynccontextmanager
async def answering(
    runtime: NullRuntime | None = None, **fields: Any
) -> AsyncIterator[tuple[NullRuntime, NullStream, ChatAnswer]]:
    request = parse_chat({"messages": HELLO, **fields}, ServerSettings())
    async with (
        runtime or NullRuntime(manual=True) as runtime,
        runtime.chat(request.messages, request.params, model=request.model) as stream,
    ):
        yield (
            runtime,
            stream,
            ChatAnswer(request, stream, runtime.codec, id="chatcmpl-1", created=7),
        )


def head(**changes: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 7,
        "model": "null",
        "system_fingerprint": "cotune-base",
        **changes,
    }


def choice(index: int, delta: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **changes}


async def test_a_stream_is_role_then_text_then_finish() -> None:
    async with answering(max_tokens=2, stream=True) as (runtime, stream, answer):
        text = text_of(stream.prompt_token_ids, 2)
        runtime.step()
        assert events(answer.chunks(stream.take_nowait())) == [
            {**head(), "choices": [choice(0, {"role": "assistant", "content": ""})]},
            {**head(), "choices": [choice(0, {"content": text[0]})]},
        ]
        runtime.step()
        assert events(answer.chunks(stream.take_nowait())) == [
            {**head(), "choices": [choice(0, {"content": text[1]})]},
            {**head(), "choices": [choice(0, {}, finish_reason="length", stop_reason=None)]},
        ]


async def test_the_tier_is_named_in_every_chunk_and_in_the_whole_answer() -> None:
    async with answering(max_tokens=2, stream=True, service_tier="flex") as (
        runtime,
        stream,
        answer,
    ):
        runtime.step(2)
        told = events(answer.chunks(stream.take_nowait())) + events(answer.usage_chunk())
        assert len(told) == 4
        assert {event["service_tier"] for event in told} == {"flex"}
        assert answer.body()["service_tier"] == "flex"


async def test_the_template_is_the_plain_form() -> None:
    async with answering(max_tokens=3, stream=True) as (runtime, stream, answer):
        runtime.step()
        answer.chunks(stream.take_nowait())
        for text in (
            "a",
            'quote " and \\',
            "line\nbreak",
            "ä\u2028€\N{GRINNING FACE}",
            "\x01</script>",
        ):
            plain = {**head(), "choices": [choice(0, {"content": text})]}
            assert answer.chunks([Delta(0, text, (1,))]) == b"data: %s\n\n" % orjson.dumps(plain)


async def test_tokens_without_text_make_no_event() -> None:
    async with answering(max_tokens=3, stream=True) as (runtime, stream, answer):
        runtime.step()
        answer.chunks(stream.take_nowait())
        assert answer.chunks([Delta(0, "", (1,))]) == b""


async def test_tokens_without_text_make_an_event_when_their_logprobs_were_asked_for() -> None:
    async with answering(max_tokens=3, stream=True, logprobs=True) as (runtime, stream, answer):
        runtime.step(2)
        (delta,) = stream.take_nowait()
        held_back = Delta(0, "", delta.token_ids, delta.logprobs)
        role, content = events(answer.chunks([held_back]))
        assert role["choices"][0]["delta"]["role"] == "assistant"
        assert content["choices"][0]["delta"] == {"content": ""}
        assert len(content["choices"][0]["logprobs"]["content"]) == 2


async def test_completions_interleave_by_index_and_each_has_its_role_chunk() -> None:
    async with answering(max_tokens=1, n=2, stream=True) as (runtime, stream, answer):
        runtime.step()
        choices = [event["choices"][0] for event in events(answer.chunks(stream.take_nowait()))]
        assert [c["index"] for c in choices] == [0, 0, 0, 1, 1, 1]
        assert [c["delta"].get("role") for c in choices[::3]] == ["assistant", "assistant"]
        assert [c["finish_reason"] for c in choices[2::3]] == ["length", "length"]


async def test_usage_comes_once_at_the_end_and_is_null_before() -> None:
    options = {"include_usage": True}
    async with answering(max_tokens=1, stream=True, stream_options=options) as (rt, stream, answer):
        rt.step()
        assert all(event["usage"] is None for event in events(answer.chunks(stream.take_nowait())))
        prompt = len(stream.prompt_token_ids)
        assert events(answer.usage_chunk()) == [
            {
                **head(),
                "choices": [],
                "usage": {
                    "prompt_tokens": prompt,
                    "completion_tokens": 1,
                    "total_tokens": prompt + 1,
                    "prompt_tokens_details": {"cached_tokens": 0},
                },
            }
        ]


async def test_continuous_usage_counts_in_every_chunk() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with answering(max_tokens=3, stream=True, stream_options=options) as (rt, stream, answer):
        counts = []
        for _ in range(3):
            rt.step()
            for event in events(answer.chunks(stream.take_nowait())):
                counts.append(event["usage"]["completion_tokens"])  # noqa: PERF401 - two loops
        assert counts == [0, 1, 2, 3, 3]


async def test_token_ids_are_beside_the_text_when_asked_for() -> None:
    async with answering(max_tokens=1, stream=True, return_token_ids=True) as (rt, stream, answer):
        rt.step()
        role, content, _ = events(answer.chunks(stream.take_nowait()))
        assert role["prompt_token_ids"] == list(stream.prompt_token_ids)
        assert content["choices"][0]["token_ids"] == list(stream.responses[0].token_ids)
        body = answer.body()
        assert body["prompt_token_ids"] == list(stream.prompt_token_ids)
        assert body["choices"][0]["token_ids"] == list(stream.responses[0].token_ids)


async def test_the_whole_answer_has_the_same_text_as_its_chunks() -> None:
    async with answering(max_tokens=8, n=2, logprobs=True, top_logprobs=1) as (rt, stream, answer):
        rt.step(8)
        texts = ["", ""]
        for event in events(answer.chunks(stream.take_nowait())):
            delta = event["choices"][0]["delta"]
            texts[event["choices"][0]["index"]] += delta.get("content", "")
        body = orjson.loads(orjson.dumps(answer.body()))
        assert body["object"] == "chat.completion"
        assert [c["message"]["content"] for c in body["choices"]] == texts
        assert body["choices"][0]["message"] == {
            "role": "assistant",
            "content": texts[0],
            "refusal": None,
        }
        assert body["usage"]["completion_tokens"] == 16
        assert [len(c["logprobs"]["content"]) for c in body["choices"]] == [8, 8]
        assert body["choices"][0]["finish_reason"] == "length"


async def test_a_failed_completion_has_no_finish_chunk() -> None:
    async with answering(max_tokens=3, stream=True) as (runtime, stream, answer):
        runtime.step()
        answer.chunks(stream.take_nowait())
        (event,) = events(answer.chunks([Delta(0, "x", (1,), finish_reason="error")]))
        assert event["choices"][0]["delta"] == {"content": "x"}


@pytest.mark.parametrize("is_stop", [True, False])
async def test_the_stop_that_ended_it_is_named(is_stop: bool) -> None:
    async with NullRuntime(manual=True) as runtime:
        prompt = runtime.codec.encode_chat(HELLO)  # type: ignore[arg-type]
    text = text_of(prompt, 6)
    fields = {"stop": text[3:5]} if is_stop else {"stop_token_ids": [ord(text[3])]}
    async with answering(stream=True, **fields) as (runtime, stream, answer):
        runtime.step(6)
        chunks = events(answer.chunks(stream.take_nowait()))
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert chunks[-1]["choices"][0]["stop_reason"] == next(
            reason[0] if isinstance(reason, list) else reason for reason in fields.values()
        )
        assert answer.body()["choices"][0]["message"]["content"] == text[:3]


async def test_the_fingerprint_is_the_version_that_answers(tmp_path: Path) -> None:
    async with NullRuntime(manual=True) as runtime:
        await runtime.load_adapter("mine", tmp_path)
        assert await runtime.load_adapter("mine", tmp_path) == AdapterVersion("mine", 2)
        request = parse_chat({"messages": HELLO, "model": "mine"}, ServerSettings())
        async with runtime.chat(request.messages, request.params, model="mine") as stream:
            answer = ChatAnswer(request, stream, runtime.codec, id="x", created=7)
            runtime.step()
            (first, *_) = events(answer.chunks(stream.take_nowait()))
            assert first["system_fingerprint"] == "mine@2"
            assert first["model"] == "mine"
            assert answer.body()["system_fingerprint"] == "mine@2"


async def test_prompt_logprobs_stand_beside_the_answer() -> None:
    async with answering(max_tokens=1, prompt_logprobs=1) as (runtime, stream, answer):
        runtime.step()
        shaped = answer.body()["prompt_logprobs"]
        assert shaped[0] is None
        assert len(shaped) == len(stream.prompt_token_ids)
        assert str(stream.prompt_token_ids[1]) in shaped[1]
