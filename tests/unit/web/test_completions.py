from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import orjson

from cotune.runtime.types import Delta
from cotune.tools.null_runtime import NullRuntime, text_of
from cotune.web.completions import CompletionAnswer
from cotune.web.requests import parse_completion
from cotune.web.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cotune.tools.null_runtime import NullStream


def events(data: bytes) -> list[Any]:
    assert data == b"" or data.endswith(b"\n\n")
    return [orjson.loads(event.removeprefix(b"data: ")) for event in data.split(b"\n\n")[:-1]]


@asynccontextmanager
async def answering(
    **fields: Any,
) -> AsyncIterator[tuple[NullRuntime, list[NullStream], list[CompletionAnswer]]]:
    request = parse_completion({"prompt": "once", **fields}, ServerSettings())
    async with NullRuntime(manual=True) as runtime, AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(runtime.complete(prompt, request.params))
            for prompt in request.prompts
        ]
        yield (
            runtime,
            streams,
            [
                CompletionAnswer(request, stream, runtime.codec, prompt=i, id="cmpl-1", created=7)
                for i, stream in enumerate(streams)
            ],
        )


async def test_the_tier_that_was_asked_for_is_named() -> None:
    async with answering(max_tokens=1, stream=True, service_tier="priority") as (
        runtime,
        (stream,),
        (answer,),
    ):
        runtime.step()
        (chunk,) = events(answer.chunks(stream.take_nowait()))
        assert chunk["service_tier"] == "default"
        assert CompletionAnswer.body([answer])["service_tier"] == "default"


async def test_chunks_carry_text_and_the_last_one_the_reason() -> None:
    async with answering(max_tokens=2, stream=True) as (runtime, (stream,), (answer,)):
        text = text_of(stream.prompt_token_ids, 2)
        seen = []
        for _ in range(2):
            runtime.step()
            seen += events(answer.chunks(stream.take_nowait()))
        assert seen == [
            {
                "id": "cmpl-1",
                "object": "text_completion",
                "created": 7,
                "model": "null",
                "system_fingerprint": "cotune-base",
                "choices": [
                    {
                        "index": 0,
                        "text": text[i],
                        "logprobs": None,
                        "finish_reason": reason,
                        "stop_reason": None,
                    }
                ],
            }
            for i, reason in enumerate([None, "length"])
        ]


async def test_the_template_is_the_plain_form() -> None:
    async with answering(max_tokens=3, stream=True) as (runtime, (stream,), (answer,)):
        runtime.step()
        first = events(answer.chunks(stream.take_nowait()))[0]
        for text in ("a", '" \\ \n', "ä€\N{GRINNING FACE}"):
            first["choices"][0]["text"] = text
            assert answer.chunks([Delta(0, text, (1,))]) == b"data: %s\n\n" % orjson.dumps(first)
        assert answer.chunks([Delta(0, "", (1,))]) == b""


async def test_choices_of_several_prompts_are_numbered_through() -> None:
    async with answering(prompt=["a", "b", "c"], n=2, max_tokens=1) as (runtime, streams, answers):
        runtime.step()
        body = CompletionAnswer.body(answers)
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3, 4, 5]
        assert [choice["text"] for choice in body["choices"]] == [
            text_of(stream.prompt_token_ids, 1, index) for stream in streams for index in range(2)
        ]
        assert body["usage"] == {
            "prompt_tokens": 3,
            "completion_tokens": 6,
            "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        streamed = [
            event["choices"][0]["index"]
            for stream, answer in zip(streams, answers, strict=True)
            for event in events(answer.chunks(stream.take_nowait()))
        ]
        assert streamed == [0, 1, 2, 3, 4, 5]
        assert events(CompletionAnswer.usage_chunk(answers))[0]["usage"] == body["usage"]


async def test_echo_puts_the_prompt_before_the_text_whole_and_streamed() -> None:
    async with answering(prompt="once", echo=True, n=2, max_tokens=2, logprobs=1) as (
        rt,
        (s,),
        (a,),
    ):
        rt.step()
        streamed = events(a.chunks(s.take_nowait()))
        rt.step()
        streamed += events(a.chunks(s.take_nowait()))
        for index, choice in enumerate(CompletionAnswer.body([a])["choices"]):
            text = "once" + text_of(s.prompt_token_ids, 2, index)
            assert choice["text"] == text
            assert choice["logprobs"]["tokens"] == list(text)
            assert choice["logprobs"]["text_offset"] == list(range(6))
            assert choice["logprobs"]["token_logprobs"] == [None] + [-0.25] * 5
            parts = [c["choices"][0] for c in streamed if c["choices"][0]["index"] == index]
            assert "".join(part["text"] for part in parts) == text
            for name, whole in choice["logprobs"].items():
                assert [x for part in parts for x in part["logprobs"][name]] == whole


async def test_echo_of_token_ids_is_their_text() -> None:
    async with answering(prompt=[104, 105], echo=True, max_tokens=1) as (rt, _, (answer,)):
        rt.step()
        assert CompletionAnswer.body([answer])["choices"][0]["text"].startswith("hi")


async def test_scoring_a_prompt_generates_nothing() -> None:
    async with answering(prompt="once", echo=True, max_tokens=0, logprobs=2) as (rt, (s,), (a,)):
        rt.step()
        (choice,) = CompletionAnswer.body([a])["choices"]
        assert choice["text"] == "once"
        assert choice["finish_reason"] == "length"
        assert choice["logprobs"]["tokens"] == list("once")
        echoed, end = events(a.chunks(s.take_nowait()))
        assert echoed["choices"][0]["text"] == "once"
        assert end["choices"][0]["finish_reason"] == "length"
        assert end["choices"][0]["logprobs"]["tokens"] == []


async def test_offsets_count_the_text_before_each_token() -> None:
    async with answering(max_tokens=4, logprobs=0, stream=True) as (rt, (stream,), (answer,)):
        offsets = []
        for _ in range(4):
            rt.step()
            (event,) = events(answer.chunks(stream.take_nowait()))
            offsets += event["choices"][0]["logprobs"]["text_offset"]
        assert offsets == [0, 1, 2, 3]


async def test_token_ids_and_prompt_logprobs_are_per_choice() -> None:
    async with answering(max_tokens=1, return_token_ids=True, prompt_logprobs=0) as (
        rt,
        (s,),
        (a,),
    ):
        rt.step()
        (choice,) = CompletionAnswer.body([a])["choices"]
        assert choice["token_ids"] == list(s.responses[0].token_ids)
        assert choice["prompt_token_ids"] == list(s.prompt_token_ids)
        assert len(choice["prompt_logprobs"]) == len(s.prompt_token_ids)
        (event,) = events(a.chunks(s.take_nowait()))
        assert event["choices"][0]["token_ids"] == choice["token_ids"]


async def test_continuous_usage_counts_the_choice_it_stands_in() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with answering(max_tokens=2, n=2, stream=True, stream_options=options) as (
        rt,
        (s,),
        (a,),
    ):
        counts: list[tuple[int, int]] = []
        for _ in range(2):
            rt.step()
            for event in events(a.chunks(s.take_nowait())):
                index = event["choices"][0]["index"]
                counts.append((index, event["usage"]["completion_tokens"]))
        assert counts == [(0, 1), (1, 1), (0, 2), (1, 2)]
