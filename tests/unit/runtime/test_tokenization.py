from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from cotune.runtime.errors import RequestError
from cotune.runtime.tokenization import TextCodec, check_messages
from small_tokenizers import KINDS, small_tokenizer


@pytest.fixture
def codec() -> TextCodec:
    return TextCodec(small_tokenizer("byte_level"))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_transformers_tokenizer(kind: str) -> None:
    tokenizer = small_tokenizer(kind)
    text = "hello world, the quick fox 你好"
    assert TextCodec(tokenizer).encode(text) == tokenizer(text)["input_ids"]


def test_special_tokens_are_added_to_prompts_only_on_request() -> None:
    from tokenizers import processors

    wrapped = small_tokenizer("byte_level").backend_tokenizer.from_str(
        small_tokenizer("byte_level").backend_tokenizer.to_str()
    )
    bos = wrapped.token_to_id("<s>")
    wrapped.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    codec = TextCodec(PreTrainedTokenizerFast(tokenizer_object=wrapped))
    plain = codec.encode("hello", add_special_tokens=False)
    assert codec.encode("hello") == [bos, *plain]


def test_a_truncation_setting_in_the_tokenizer_is_switched_off() -> None:
    backend = small_tokenizer("byte_level").backend_tokenizer
    short = backend.from_str(backend.to_str())
    short.enable_truncation(3)
    short.enable_padding(length=64)
    codec = TextCodec(PreTrainedTokenizerFast(tokenizer_object=short))
    text = "the quick brown fox jumps over the lazy dog"
    assert codec.decode(codec.encode(text)) == text


def test_decoding_is_what_the_tokenizer_decodes(codec: TextCodec) -> None:
    ids = codec.encode("hello</s> 你好 🌍")
    for skip in (True, False):
        expected = codec.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=skip)
        assert codec.decode(ids, skip_special_tokens=skip) == expected


def test_a_tokens_bytes_join_to_the_text_even_within_a_character(codec: TextCodec) -> None:
    text = " héllo 𝄞</s>"
    ids = codec.encode(text)
    assert b"".join(codec.token_bytes(token) for token in ids) == text.encode()
    assert any("\ufffd" in codec.token_text(token) for token in ids)


def test_a_token_of_a_sentencepiece_vocabulary_shows_its_space() -> None:
    codec = TextCodec(small_tokenizer("byte_fallback"))
    token = codec.tokenizer.convert_tokens_to_ids("▁quick")
    assert codec.token_text(token) == " quick"
    assert codec.token_bytes(codec.tokenizer.convert_tokens_to_ids("<0xE4>")) == b"\xe4"


def test_vocab_size_counts_added_tokens(codec: TextCodec) -> None:
    assert codec.vocab_size == len(codec.tokenizer)
    assert codec.tokenizer.convert_tokens_to_ids("日本 tok") < codec.vocab_size


def test_a_chat_is_rendered_by_the_models_template(codec: TextCodec) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": ""},
    ]
    rendered = "<s><|system|>be brief</s><|user|>a\nb</s><|assistant|>c</s><|user|></s>"
    assert codec.render_chat(messages, add_generation_prompt=False) == rendered
    ids = codec.encode_chat(messages)
    assert codec.decode(ids, skip_special_tokens=False) == rendered + "<|assistant|>"
    bos = codec.tokenizer.bos_token_id
    assert ids.count(bos) == 1, "the template writes the special tokens, once"


def test_ids_of_a_chat_are_those_of_apply_chat_template(codec: TextCodec) -> None:
    messages = [{"role": "user", "content": "hello world"}]
    expected = codec.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert codec.encode_chat(messages) == expected


def test_a_template_that_refuses_is_the_requests_error(codec: TextCodec) -> None:
    with pytest.raises(RequestError, match="no tools here") as caught:
        codec.encode_chat([{"role": "tool", "content": "x"}])
    assert caught.value.param == "messages"
    assert caught.value.code == "chat_template_error"


def test_a_model_without_template_can_do_all_but_chat() -> None:
    backend = small_tokenizer("byte_level").backend_tokenizer
    codec = TextCodec(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert not codec.has_chat_template
    assert codec.encode("hello")
    with pytest.raises(RequestError, match="no chat template") as caught:
        codec.encode_chat([{"role": "user", "content": "hi"}])
    assert caught.value.code == "no_chat_template"


def test_an_assistants_tool_calls_may_stand_for_its_content() -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    checked = check_messages(
        [
            {"role": "assistant", "content": None, "tool_calls": calls, "refusal": None},
            {"role": "tool", "content": "42", "tool_call_id": "1"},
        ]
    )
    assert checked == [
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ("hi", "messages"),
        (None, "messages"),
        ([], "messages"),
        ([USER, "hi"], "messages.1"),
        ([{"content": "hi"}], "messages.0.role"),
        ([{"role": "robot", "content": "hi"}], "messages.0.role"),
        ([{"role": ["user"], "content": "hi"}], "messages.0.role"),
        ([USER, {"role": "user"}], "messages.1.content"),
        ([{"role": "user", "content": None}], "messages.0.content"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "messages.0.content"),
        ([{"role": "assistant", "tool_calls": "f()"}], "messages.0.tool_calls"),
        ([{"role": "user", "content": 7}], "messages.0.content"),
        ([{"role": "user", "content": ["hi"]}], "messages.0.content.0"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content.0.type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0.text"),
        ([{"role": "user", "content": "\ud83d"}], "messages.0.content"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "\udc00"}]}],
            "messages.0.content.0.text",
        ),
        ([{**USER, "name": 3}], "messages.0.name"),
        ([{**USER, "name": "\ud800"}], "messages.0.name"),
    ],
)
def test_a_malformed_message_is_named_by_its_path(
    codec: TextCodec, messages: Any, param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        codec.encode_chat(messages)
    assert caught.value.param == param
    assert param in caught.value.message
    caught.value.message.encode()  # fit to be sent back


@pytest.mark.parametrize("text", ["a\ud800b", None, 5, b"hi"])
def test_a_prompt_that_is_no_text_is_refused(codec: TextCodec, text: Any) -> None:
    with pytest.raises(RequestError) as caught:
        codec.encode(text)
    assert caught.value.param == "prompt"


def test_any_unicode_text_survives_encoding(codec: TextCodec) -> None:
    text = "\x00\t\u2028 e\u0301 \ufeff \U0010ffff 👩\u200d👧"
    assert codec.decode(codec.encode(text)) == text
