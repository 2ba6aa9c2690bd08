from __future__ import annotations

import logging
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bad_bodies import BAD_CHAT, BAD_COMPLETION, HELLO, JSON, NAMES, NO_OBJECTS
from cotune.runtime.errors import ContextLengthError, RequestError
from cotune.runtime.types import SamplingParams
from cotune.web.requests import (
    parse_chat,
    parse_completion,
    parse_detokenize,
    parse_feedback,
    parse_json,
    parse_load_adapter,
    parse_promote,
    parse_request_id,
    parse_source,
    parse_tokenize,
    parse_unload_adapter,
)
from cotune.web.settings import ServerSettings

SETTINGS = ServerSettings(max_messages=3, max_prompts=3, max_n=8)


def chat(**fields: Any) -> Any:
    return parse_chat({"messages": HELLO, **fields}, SETTINGS)


def completion(**fields: Any) -> Any:
    return parse_completion({"prompt": "once", **fields}, SETTINGS)


# What is understood.


@pytest.mark.parametrize("parse", [chat, completion])
def test_who_asks_and_whether_to_record_it_arrive(parse: Any) -> None:
    assert (parse().record, parse().source) == (None, None)
    assert parse(store=True).record is True
    assert parse(store=False).record is False
    assert parse(user="ann").source == "ann"
    assert parse(user="").source is None
    assert parse(user="ann", safety_identifier="bob").source == "bob"


@pytest.mark.parametrize("parse", [chat, completion])
@pytest.mark.parametrize(
    ("fields", "request_class", "tier"),
    [
        ({}, "interactive", None),
        ({"service_tier": None}, "interactive", None),
        ({"service_tier": "auto"}, "interactive", "default"),
        ({"service_tier": "default"}, "interactive", "default"),
        ({"service_tier": "priority"}, "interactive", "default"),
        ({"service_tier": "flex"}, "batch", "flex"),
        ({"request_class": "batch"}, "batch", None),
        ({"request_class": "interactive"}, "interactive", None),
        ({"request_class": "batch", "service_tier": "auto"}, "batch", "flex"),
        ({"request_class": "interactive", "service_tier": "flex"}, "interactive", "default"),
    ],
)
def test_a_tier_is_a_class_of_requests_and_the_answer_names_the_one_it_got(
    parse: Any, fields: dict[str, Any], request_class: str, tier: str | None
) -> None:
    request = parse(**fields)
    assert (request.request_class, request.service_tier) == (request_class, tier)


def test_feedback_is_one_event_or_a_bounded_list_of_them() -> None:
    few = ServerSettings(max_feedback_events=2)
    assert parse_feedback(b'{"id": "a"}', few) == {"id": "a"}
    assert parse_feedback(b'[{"id": "a"}, 3]', few) == [{"id": "a"}, 3]
    for body, code in (
        (b"[]", "invalid_json"),
        (b"3", "invalid_json"),
        (b"", "invalid_json"),
        (b"[{}, {}, {}]", "too_many_events"),
    ):
        with pytest.raises(RequestError) as caught:
            parse_feedback(body, few)
        assert caught.value.code == code


def test_promoting_takes_an_empty_body_or_force() -> None:
    assert not parse_promote(b" ").force
    assert not parse_promote(b"{}").force
    assert parse_promote(b'{"force": true}').force
    with pytest.raises(RequestError) as caught:
        parse_promote(b'{"force": 1}')
    assert caught.value.param == "force"


@pytest.mark.parametrize("source", ["", "x" * 257, "two\nlines", "\0"])
def test_a_source_is_a_short_printable_name(source: str) -> None:
    assert parse_source("Zo\u00eb @ work", param="source") == "Zo\u00eb @ work"
    with pytest.raises(RequestError) as caught:
        parse_source(source, param="source")
    assert caught.value.param == "source"
    assert len(caught.value.message) < 300


def test_a_plain_chat_request_takes_every_default() -> None:
    request = chat()
    assert request.messages == ({"role": "user", "content": "hello"},)
    assert request.params == SamplingParams()
    assert request.model is None
    assert not request.streaming.stream
    assert request.add_generation_prompt


def test_a_plain_completion_gets_sixteen_tokens_and_null_means_no_limit() -> None:
    assert completion().params.max_tokens == 16
    assert completion(max_tokens=None).params.max_tokens is None


def test_every_sampling_field_arrives() -> None:
    request = chat(
        n=2,
        max_tokens=7,
        min_tokens=2,
        temperature=1,
        top_p=0.5,
        top_k=3,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=-1,
        frequency_penalty=0.5,
        logit_bias={"17": 5, "3": -100},
        seed=-4,
        stop="end",
        stop_token_ids=[5],
        include_stop_str_in_output=True,
        ignore_eos=True,
        skip_special_tokens=False,
        logprobs=True,
        top_logprobs=2,
        prompt_logprobs=1,
        priority=-3,
    )
    assert request.params == SamplingParams(
        n=2,
        max_tokens=7,
        min_tokens=2,
        temperature=1.0,
        top_p=0.5,
        top_k=3,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=-1.0,
        frequency_penalty=0.5,
        logit_bias={17: 5.0, 3: -100.0},
        seed=-4,
        stop=("end",),
        stop_token_ids=(5,),
        include_stop_str_in_output=True,
        ignore_eos=True,
        skip_special_tokens=False,
        logprobs=2,
        prompt_logprobs=1,
    )
    assert request.priority == -3


def test_null_is_the_same_as_leaving_a_field_out() -> None:
    names = (
        "n max_tokens min_tokens temperature top_p top_k min_p repetition_penalty logit_bias seed "
        "stop stop_token_ids logprobs top_logprobs stream stream_options response_format tools "
        "tool_choice functions model priority request_id user add_generation_prompt ignore_eos "
        "request_class service_tier"
    )
    assert chat(**dict.fromkeys(names.split())) == chat()


def test_the_newer_name_of_max_tokens_wins() -> None:
    assert chat(max_tokens=5, max_completion_tokens=9).params.max_tokens == 9


def test_logprobs_of_chat_without_alternatives_are_zero_alternatives() -> None:
    assert chat(logprobs=True).params.logprobs == 0
    assert chat(logprobs=False, top_logprobs=0).params.logprobs is None


def test_a_developer_is_the_system() -> None:
    request = chat(messages=[{"role": "developer", "content": "be brief"}, *HELLO])
    assert request.messages[0]["role"] == "system"


def test_text_parts_are_joined_by_line_breaks() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0]["content"] == "one\ntwo"


def test_an_assistant_message_as_clients_echo_it_is_taken() -> None:
    echoed: dict[str, Any] = {
        "role": "assistant",
        "content": "hi",
        "refusal": None,
        "tool_calls": [],
        "annotations": [],
        "name": "bot",
    }
    request = chat(messages=[*HELLO, echoed])
    assert request.messages[1] == {"role": "assistant", "content": "hi", "name": "bot"}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
        ("", ("",)),
    ],
)
def test_a_prompt_has_four_forms(prompt: object, expected: object) -> None:
    assert completion(prompt=prompt).prompts == expected


def test_echo_with_logprobs_asks_for_those_of_the_prompt() -> None:
    assert completion(echo=True, logprobs=3).params.prompt_logprobs == 3
    assert completion(echo=True, logprobs=3, prompt_logprobs=5).params.prompt_logprobs == 5
    assert completion(echo=True).params.prompt_logprobs is None
    assert completion(echo=True, max_tokens=0).params == SamplingParams(
        max_tokens=0, prompt_logprobs=0
    )


def test_best_of_is_harmless_when_it_is_n() -> None:
    assert completion(n=2, best_of=2) == completion(n=2)


def test_fields_that_ask_for_nothing_are_taken() -> None:
    assert (
        chat(
            tools=[],
            tool_choice="none",
            functions=[],
            response_format={"type": "text"},
            modalities=["text"],
            use_beam_search=False,
            bad_words=[],
        )
        == chat()
    )
    assert completion(suffix="", add_special_tokens=True) == completion()


def test_unknown_fields_are_ignored_and_named_in_the_debug_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.DEBUG, logger="cotune.web.requests"):
        assert chat(verbosity="low", metadata={"a": 1}, no_such_field=3) == chat()
    assert "['metadata', 'no_such_field', 'verbosity']" in caplog.text


def test_usage_in_every_chunk_needs_usage_at_the_end() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    assert chat(stream=True, stream_options=options).streaming.continuous_usage
    options["include_usage"] = False
    assert not chat(stream=True, stream_options=options).streaming.continuous_usage


def test_of_a_name_that_stands_twice_the_last_counts() -> None:
    assert parse_json(b'{"n": 1, "n": 2}') == {"n": 2}


# What is refused.


@pytest.mark.parametrize(("fields", "param"), BAD_CHAT)
def test_a_bad_chat_field_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    # Through JSON, as a client would send it.
    body = parse_json(orjson.dumps({"messages": HELLO, **fields}))
    with pytest.raises(RequestError) as caught:
        parse_chat(body, SETTINGS)
    assert caught.value.param == param
    assert param.rpartition(".")[2].rstrip("0123456789") in caught.value.message
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(("fields", "param"), BAD_COMPLETION)
def test_a_bad_completion_field_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    body = parse_json(orjson.dumps({"prompt": "once", **fields}))
    with pytest.raises(RequestError) as caught:
        parse_completion(body, SETTINGS)
    assert caught.value.param == param
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("body", NO_OBJECTS)
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_json(body)
    assert caught.value.code == "invalid_json"
    assert "body" in caught.value.message


def test_token_ids_beyond_the_context_are_refused_without_being_looked_through() -> None:
    for prompt, param in (([1, 2, "x"], "prompt"), ([[1], [1, 2, "x"]], "prompt.1")):
        with pytest.raises(ContextLengthError) as caught:
            parse_completion({"prompt": prompt}, SETTINGS, max_model_len=2)
        assert caught.value.param == param


def test_tokenize_takes_a_text_or_a_conversation_but_not_both() -> None:
    assert parse_tokenize({"prompt": ""}, SETTINGS).prompt == ""
    assert parse_tokenize({"messages": HELLO}, SETTINGS).messages is not None
    for body in ({}, {"prompt": "a", "messages": HELLO}, {"prompt": None}):
        with pytest.raises(RequestError) as caught:
            parse_tokenize(body, SETTINGS)
        assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("tokens", "param"),
    [
        (None, "tokens"),
        ("a", "tokens"),
        ([1, "a"], "tokens.1"),
        ([10], "tokens.0"),
        ([-1], "tokens.0"),
    ],
)
def test_detokenize_refuses_what_is_no_token(tokens: object, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_detokenize({"tokens": tokens}, vocab_size=10)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "lora_name"),
        ({"lora_name": 1}, "lora_name"),
        ({"lora_name": ""}, "lora_name"),
        ({"lora_name": "a@1"}, "lora_name"),
        ({"lora_name": " a"}, "lora_name"),
        ({"lora_name": "a\nb"}, "lora_name"),
        ({"lora_name": "a"}, "lora_path"),
        ({"lora_name": "a", "lora_path": ["x"]}, "lora_path"),
        ({"lora_name": "a", "lora_path": "x\0y"}, "lora_path"),
        ({"lora_name": "a", "lora_path": "x" * 5000}, "lora_path"),
        ({"lora_name": "a", "lora_path": "x", "load_inplace": 1}, "load_inplace"),
    ],
)
def test_a_bad_adapter_request_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_load_adapter(body)
    assert caught.value.param == param
    if param == "lora_name":
        with pytest.raises(RequestError):
            parse_unload_adapter(body)


@pytest.mark.parametrize("value", ["", "a b", "a\r\nSet-Cookie: x", "é", "x" * 129])
def test_an_id_that_could_break_a_header_is_refused(value: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request_id(value, param="X-Request-Id")
    assert caught.value.param == "X-Request-Id"


# The first draw builds hypothesis's character tables, which takes seconds on a busy machine.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=6))
def test_whatever_json_comes_it_is_understood_or_refused(fields: dict[str, Any]) -> None:
    for parse, base in ((parse_chat, {"messages": HELLO}), (parse_completion, {"prompt": "x"})):
        body = parse_json(orjson.dumps({**base, **fields}))
        try:
            parse(body, SETTINGS)
        except RequestError as error:
            assert error.param  # noqa: PT017 - understanding it is as good


@settings(deadline=None)
@given(st.binary(max_size=64))
def test_whatever_bytes_come_they_are_an_object_or_refused(body: bytes) -> None:
    try:
        parse_json(body)
    except RequestError as error:
        assert error.code == "invalid_json"  # noqa: PT017
