"""The official `openai` client, over a real socket, against both runtimes.

The runtime without a model has answers that are known beforehand; the other one computes them with
a tiny random model. What is asserted holds for both unless the test says which one it is about.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import openai
import pytest
import pytest_asyncio
import torch
from openai import AsyncOpenAI

from cotune import Runtime
from cotune.tools.null_runtime import NullRuntime
from step_spy import StepSpy
from tiny_models import save_lora, save_model_directory, tiny_model
from web_server import serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from openai.types.chat import ChatCompletionMessageParam

    from cotune.runtime.types import Response
    from web_server import Server

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEY = "sesame"
MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "You are kind and brief."},
    {"role": "user", "content": "Tell me about the sea, and about the ships that sail on it."},
]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}


class Watch:
    """A listener, so that a test can wait for what happens inside the runtime."""

    def __init__(self) -> None:
        self.responses: list[Response] = []
        self.started = asyncio.Event()
        self._changed = asyncio.Event()

    def on_finished(self, response: Response, /) -> None:
        self.responses.append(response)
        self._changed.set()

    def on_first_token(self, ttft_s: float, /) -> None:
        self.started.set()

    def on_token_gap(self, gap_s: float, /) -> None:
        pass

    def on_rejected(self, reason: str, /) -> None:
        pass

    async def wait_finished(self, count: int) -> None:
        while len(self.responses) < count:
            self._changed.clear()
            await self._changed.wait()


@dataclass(frozen=True)
class Service:
    """A server, the runtime behind it, and a client with the right key."""

    runtime: Any
    server: Server
    client: AsyncOpenAI
    model: str
    has_model: bool

    def other_client(self, key: str) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.server.url}/v1", api_key=key, max_retries=0)


@pytest_asyncio.fixture(params=["null", "tiny"], scope="module", loop_scope="module")
async def service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Service]:
    runtime: Any
    if request.param == "null":
        runtime = NullRuntime(served_name="tiny", max_model_len=512)
    else:
        torch.set_num_threads(1)
        path = save_model_directory(tmp_path_factory.mktemp("model") / "tiny", "qwen3")
        runtime = Runtime(path, "cpu", served_name="tiny", max_model_len=512, seed=7)
    async with (
        runtime,
        serving(runtime, api_key=KEY) as server,
        AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client,
    ):
        yield Service(runtime, server, client, "tiny", request.param == "tiny")
        assert runtime.statistics().running == 0
        assert runtime.statistics().cache.owned_pages == 0


async def ask(service: Service, **fields: Any) -> Any:
    return await service.client.chat.completions.create(
        **{"model": service.model, "messages": MESSAGES, **GREEDY, **fields}
    )


async def ask_in_chunks(service: Service, **fields: Any) -> list[Any]:
    stream = await ask(service, stream=True, **fields)
    return [chunk async for chunk in stream]


async def complete(service: Service, **fields: Any) -> Any:
    return await service.client.completions.create(
        **{"model": service.model, "prompt": "Once upon a time", **GREEDY, **fields}
    )


# Answers.


async def test_models_are_listed(service: Service) -> None:
    models = [model async for model in service.client.models.list()]
    assert [model.id for model in models] == ["tiny"]
    model = await service.client.models.retrieve("tiny")
    assert model.object == "model"
    assert model.owned_by == "cotune"
    assert model.model_extra is not None
    assert model.model_extra["max_model_len"] == 512
    assert model.model_extra["parent"] is None


async def test_a_chat_answer(service: Service) -> None:
    answer = await ask(service)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "tiny"
    assert answer.system_fingerprint == "cotune-base"
    (choice,) = answer.choices
    assert choice.index == 0
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.message.tool_calls is None
    assert choice.logprobs is None
    usage = answer.usage
    assert (choice.finish_reason, usage.completion_tokens) == ("length", 24) or (
        choice.finish_reason == "stop" and usage.completion_tokens <= 24
    )
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


async def test_a_chat_stream_is_the_same_answer_in_order(service: Service) -> None:
    whole = await ask(service)
    chunks = await ask_in_chunks(service, stream_options={"include_usage": True})
    role, *deltas, finish, usage = chunks
    assert role.choices[0].delta.role == "assistant"
    assert role.choices[0].delta.content == ""
    assert all(chunk.choices[0].delta.role is None for chunk in deltas)
    assert all(chunk.choices[0].finish_reason is None for chunk in [role, *deltas])
    assert "".join(c.choices[0].delta.content for c in deltas) == whole.choices[0].message.content
    assert len(deltas) > 1
    assert finish.choices[0].finish_reason == whole.choices[0].finish_reason
    assert finish.choices[0].delta.content is None
    assert usage.choices == []
    assert usage.usage.completion_tokens == whole.usage.completion_tokens
    assert usage.usage.prompt_tokens == whole.usage.prompt_tokens
    assert {chunk.id for chunk in chunks} == {role.id}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_without_the_option_there_is_no_usage_chunk(service: Service) -> None:
    chunks = await ask_in_chunks(service, max_tokens=3)
    assert all(chunk.choices for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"


async def test_the_stream_helper_of_the_client_understands_it(service: Service) -> None:
    # The helper takes an answer that ran into max_tokens for a failure.
    stop = (await ask(service)).choices[0].message.content[8:11]
    whole = await ask(service, stop=stop)
    async with service.client.chat.completions.stream(
        model=service.model, messages=MESSAGES, stop=stop, **GREEDY
    ) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == "stop"


async def test_a_stop_string_ends_the_answer_before_it(service: Service) -> None:
    text = (await ask(service)).choices[0].message.content
    stop = text[len(text) // 2 :][:3]
    expected = text[: text.index(stop)]
    answer = await ask(service, stop=[stop, "never in it"])
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].model_extra["stop_reason"] == stop
    chunks = await ask_in_chunks(service, stop=stop)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == expected
    kept = await ask(service, stop=stop, extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].message.content == expected + stop


async def test_a_stop_token_ends_the_answer(service: Service) -> None:
    whole = await ask(service, extra_body={"return_token_ids": True})
    token = whole.choices[0].model_extra["token_ids"][5]
    answer = await ask(service, extra_body={"stop_token_ids": [token]})
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].model_extra["stop_reason"] == token
    assert whole.choices[0].message.content.startswith(answer.choices[0].message.content)
    longer = await ask(service, extra_body={"stop_token_ids": [token], "min_tokens": 10})
    if service.has_model:
        assert longer.usage.completion_tokens >= 10


async def test_chat_logprobs_are_those_of_the_tokens(service: Service) -> None:
    answer = await ask(service, logprobs=True, top_logprobs=3)
    (choice,) = answer.choices
    tokens = choice.logprobs.content
    assert len(tokens) == answer.usage.completion_tokens
    if choice.finish_reason == "length":
        text = bytes(byte for token in tokens for byte in token.bytes).decode(errors="replace")
        assert text == choice.message.content
    for token in tokens:
        assert token.logprob <= 0
        assert math.isfinite(token.logprob)
        assert len(token.top_logprobs) == 3
        best = [top.logprob for top in token.top_logprobs]
        assert best == sorted(best, reverse=True)
        assert token.top_logprobs[0].token == token.token  # greedy
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)
    chunks = await ask_in_chunks(service, logprobs=True, top_logprobs=3)
    streamed = [
        token
        for chunk in chunks
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert [token.token for token in streamed] == [token.token for token in tokens]
    for one, other in zip(streamed, tokens, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


async def test_n_answers_share_a_prompt(service: Service) -> None:
    answer = await ask(service, n=3, temperature=1.0, seed=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    single = await ask(service)
    assert answer.usage.prompt_tokens == single.usage.prompt_tokens
    assert answer.usage.completion_tokens > single.usage.completion_tokens


async def test_n_streams_interleave_by_index(service: Service) -> None:
    whole = await ask(service, n=3, temperature=1.0, seed=3)
    texts = ["", "", ""]
    ends: list[int] = []
    chunks = await ask_in_chunks(service, n=3, temperature=1.0, seed=3)
    for chunk in chunks:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason is not None:
            ends.append(choice.index)
    assert texts == [choice.message.content for choice in whole.choices]
    assert sorted(ends) == [0, 1, 2]
    order = [chunk.choices[0].index for chunk in chunks]
    assert order != sorted(order)


async def test_a_seed_makes_an_answer_repeatable(service: Service) -> None:
    first, second = [
        (await ask(service, temperature=1.0, seed=11)).choices[0].message.content for _ in range(2)
    ]
    assert first == second


async def test_a_repeated_prompt_is_cached(service: Service) -> None:
    first = await ask(service)
    again = await ask(service)
    cached = again.usage.prompt_tokens_details.cached_tokens
    assert 0 < cached < again.usage.prompt_tokens
    assert again.choices[0].message.content == first.choices[0].message.content


async def test_the_newer_name_of_max_tokens(service: Service) -> None:
    answer = await service.client.chat.completions.create(
        model=service.model, messages=MESSAGES, max_completion_tokens=2, temperature=0
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 2


async def test_content_in_parts_is_the_same_prompt(service: Service) -> None:
    parts: Any = [
        {"role": "system", "content": [{"type": "text", "text": "You are kind and brief."}]},
        MESSAGES[1],
    ]
    one, other = await ask(service), await ask(service, messages=parts)
    assert one.choices[0].message.content == other.choices[0].message.content


# Completions.


async def test_a_completion_and_its_stream(service: Service) -> None:
    answer = await complete(service)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    stream = await complete(service, stream=True, stream_options={"include_usage": True})
    *chunks, usage = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
    assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason
    assert usage.choices == []
    assert usage.usage.total_tokens == answer.usage.total_tokens


async def test_completions_get_sixteen_tokens_by_default(service: Service) -> None:
    answer = await service.client.completions.create(
        model=service.model, prompt="Once", temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


async def test_several_prompts_are_several_choices(service: Service) -> None:
    prompts = ["Once", "The sea", "A ship"]
    answer = await complete(service, prompt=prompts)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        alone = await complete(service, prompt=prompt)
        assert alone.choices[0].text == choice.text
    stream = await complete(service, prompt=prompts, stream=True)
    texts = ["", "", ""]
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in answer.choices]


async def test_token_ids_are_a_prompt_too(service: Service) -> None:
    text = await complete(service, extra_body={"return_token_ids": True})
    ids = text.choices[0].model_extra["prompt_token_ids"]
    for prompt in (ids, [ids]):
        answer = await complete(service, prompt=prompt)
        assert answer.choices[0].text == text.choices[0].text


async def test_completion_logprobs_and_echo(service: Service) -> None:
    prompt = "Once upon a time"
    answer = await complete(service, echo=True, logprobs=2, max_tokens=4)
    (choice,) = answer.choices
    assert choice.text.startswith(prompt)
    logprobs = choice.logprobs
    count = answer.usage.total_tokens
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == count
    assert len(logprobs.top_logprobs) == len(logprobs.text_offset) == count
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert logprobs.text_offset[0] == 0
    for token, logprob, top in zip(
        logprobs.tokens[1:], logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True
    ):
        assert top[token] == pytest.approx(logprob)
        assert 2 <= len(top) <= 3
    scored = await complete(service, echo=True, logprobs=2, max_tokens=0)
    assert scored.choices[0].text == prompt
    assert scored.usage.completion_tokens == 0
    size = answer.usage.prompt_tokens
    assert scored.choices[0].logprobs.tokens == logprobs.tokens[:size]
    assert scored.choices[0].logprobs.token_logprobs[1:] == pytest.approx(
        logprobs.token_logprobs[1:size], abs=1e-4
    )


async def test_an_echo_is_streamed_first(service: Service) -> None:
    stream = await complete(service, echo=True, stream=True, max_tokens=3)
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].text == "Once upon a time"
    whole = await complete(service, echo=True, max_tokens=3)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


# Errors.


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 5000}, "temperature"),
        ({"n": 1000}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"stop": ["x"] * 100}, "stop"),
        ({"logit_bias": {"99999": 1}}, "logit_bias.99999"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"stream": True, "temperature": -1}, "temperature"),
    ],
)
async def test_a_bad_request_names_its_field(
    service: Service, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(service, **fields)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert param.split(".")[0] in caught.value.message


@pytest.mark.parametrize("stream", [True, False])
async def test_a_prompt_that_is_too_long_says_so(service: Service, stream: bool) -> None:
    long: Any = [{"role": "user", "content": "sea " * 2000}]
    for fields in ({"messages": long}, {"max_tokens": 5000}):
        with pytest.raises(openai.BadRequestError) as caught:
            await ask(service, stream=stream, **fields)
        assert caught.value.code == "context_length_exceeded"
        assert "512" in caught.value.message
    if service.has_model:
        with pytest.raises(openai.BadRequestError) as caught:
            await ask(service, messages=long, stream=stream)
        assert caught.value.param == "messages"


async def test_an_unknown_model_is_not_found(service: Service) -> None:
    for name in ("gpt-4", "tiny@3", "tiny@", "@", "no/such"):
        with pytest.raises(openai.NotFoundError) as caught:
            await ask(service, model=name)
        assert caught.value.code == "model_not_found"
        assert caught.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        await service.client.models.retrieve("gpt-4")


async def test_a_wrong_key_is_refused(service: Service) -> None:
    async with service.other_client("wrong") as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.chat.completions.create(model=service.model, messages=MESSAGES)
        assert caught.value.code == "invalid_api_key"


async def test_an_unknown_endpoint_is_not_found(service: Service) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await service.client.embeddings.create(model=service.model, input="x")
    assert caught.value.code == "unknown_url"


async def test_the_request_id_reaches_the_client(service: Service) -> None:
    answer = await ask(service, extra_headers={"X-Request-Id": "trace-1"})
    assert answer._request_id == "trace-1"
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(service, n=0)
    assert caught.value.request_id


# Leaving, and many at once.


async def test_closing_a_stream_frees_its_pages(service: Service) -> None:
    watch = Watch()
    service.runtime.add_listener(watch)
    try:
        stream = await ask(
            service, stream=True, n=2, max_tokens=300, extra_body={"ignore_eos": True}
        )
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        await stream.close()
        await watch.wait_finished(2)
    finally:
        service.runtime.remove_listener(watch)
    assert {response.finish_reason for response in watch.responses} == {"abort"}
    answer = await ask(service)
    assert answer.choices[0].message.content
    assert service.runtime.statistics().running == 0


async def test_cancelling_a_request_frees_its_pages(service: Service) -> None:
    watch = Watch()
    service.runtime.add_listener(watch)
    try:
        asking = asyncio.ensure_future(
            ask(service, max_tokens=400, extra_body={"ignore_eos": True})
        )
        await watch.started.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await watch.wait_finished(1)
    finally:
        service.runtime.remove_listener(watch)
    assert watch.responses[0].finish_reason == "abort"


async def test_sixty_four_at_once_get_the_answers_they_would_get_alone(service: Service) -> None:
    async def stream_one(number: int) -> str:
        stream = await ask(
            service,
            messages=[{"role": "user", "content": f"Ship number {number}"}],
            max_tokens=8,
            stream=True,
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream])

    together = await asyncio.gather(*[stream_one(number) for number in range(64)])
    for number in (0, 31, 63):
        assert await stream_one(number) == together[number]


# Limits, which need a runtime of their own.


@pytest.mark.parametrize("kind", ["null", "tiny"])
async def test_a_full_queue_is_a_rate_limit_with_a_time_to_come_back(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime: Any
    spy = StepSpy(monkeypatch)
    if kind == "null":
        runtime = NullRuntime(served_name="tiny", max_requests=2, manual=True)
    else:
        torch.set_num_threads(1)
        path = save_model_directory(tmp_path / "tiny", "llama")
        runtime = Runtime(path, "cpu", served_name="tiny", max_num_seqs=1, max_queue=1)
    async with (
        runtime,
        serving(runtime) as server,
        AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        spy.gate.clear()  # nobody ends before all have asked
        many = [
            client.chat.completions.create(
                model="tiny",
                messages=MESSAGES,
                max_tokens=200,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            for _ in range(6)
        ]
        tasks = [asyncio.ensure_future(one) for one in many]
        refused = []
        for task in asyncio.as_completed(tasks):
            try:
                await (await task).close()
            except openai.RateLimitError as error:
                refused.append(error)
            if len(refused) == 4:  # the two that were admitted get their first token
                spy.gate.set()
                if kind == "null":
                    runtime.step()
        assert len(refused) >= 4
        for refusal in refused:
            assert refusal.code == "overloaded"
            assert int(refusal.response.headers["Retry-After"]) >= 1


async def test_adapters_are_models_of_their_own(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    path = save_model_directory(tmp_path / "tiny", "llama")
    save_lora(tmp_path / "kind", tiny_model("llama"), rank=4, targets=["q_proj", "v_proj"], seed=1)
    runtime = Runtime(
        path, "cpu", served_name="tiny", adapters={"kind": tmp_path / "kind"}, max_model_len=512
    )
    async with (
        runtime,
        serving(runtime) as server,
        AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        models = {model.id: model async for model in client.models.list()}
        assert set(models) == {"tiny", "kind"}
        assert models["kind"].model_extra is not None
        assert models["kind"].model_extra["parent"] == "tiny"
        texts = {}
        for name in ("tiny", "kind", "kind@1"):
            answer = await client.chat.completions.create(
                model=name, messages=MESSAGES, temperature=0, max_tokens=16
            )
            texts[name] = answer.choices[0].message.content
            assert answer.model == name
            assert answer.system_fingerprint == ("cotune-base" if name == "tiny" else "kind@1")
        assert texts["kind"] == texts["kind@1"] != texts["tiny"]
        loaded = await client.post(
            "/load_lora_adapter",
            cast_to=object,
            body={"lora_name": "kind", "lora_path": str(tmp_path / "kind"), "load_inplace": True},
        )
        assert "kind@2" in str(loaded)
        answer = await client.chat.completions.create(
            model="kind", messages=MESSAGES, temperature=0, max_tokens=16
        )
        assert answer.system_fingerprint == "kind@2"
        assert answer.choices[0].message.content == texts["kind"]
        with pytest.raises(openai.BadRequestError) as caught:
            await client.post(
                "/load_lora_adapter",
                cast_to=object,
                body={"lora_name": "bad", "lora_path": str(tmp_path / "tiny")},
            )
        assert "adapter" in caught.value.message.lower()
