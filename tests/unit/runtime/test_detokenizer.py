from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.decoders import DecodeStream

from cotune.runtime.detokenizer import IncrementalDetokenizer, StopChecker
from cotune.runtime.token_table import table_of
from small_tokenizers import KINDS, small_tokenizer

BYTE_KINDS = ("byte_level", "byte_fallback")
TEXTS = (
    "hello world, don't stop",
    "  two  leading spaces and a newline\n\n",
    "你好世界 日本語",
    "emoji 👩\u200d👩\u200d👧 🌍🌍",
    "combining e\u0301 a\u0308\u0323 ñ",
    "\x00 control \x7f and \U0010ffff",
)


def pieces_of(
    tokenizer: Any, ids: list[int], prompt: list[int] | None = None, *, skip: bool = True
) -> list[str]:
    stream = IncrementalDetokenizer(tokenizer, prompt or [], skip_special_tokens=skip)
    return [stream.push((token,)) for token in ids] + [stream.finish()]


@pytest.mark.parametrize("kind", BYTE_KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_whole_and_never_as_half_a_character(kind: str, text: str) -> None:
    tokenizer = small_tokenizer(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_join_to_what_the_tokenizer_decodes_at_once(kind: str) -> None:
    tokenizer = small_tokenizer(kind)
    rng = random.Random(0)
    words = [
        "hello",
        "world",
        "the",
        "quick",
        "fox",
        "你好世界",
        "日本語",
        "café",
        "dog;",
        "<s>",
        "</s>",
    ]
    for _ in range(50):
        text = " ".join(rng.choices(words, k=rng.randrange(1, 12)))
        ids = tokenizer.encode(text, add_special_tokens=False)
        for skip in (True, False):
            whole = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=skip)
            assert "".join(pieces_of(tokenizer, ids, skip=skip)) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_continues_its_prompt(kind: str) -> None:
    tokenizer = small_tokenizer(kind)
    decode = tokenizer.backend_tokenizer.decode
    ids = tokenizer.encode(
        "<s>the quick fox 你好 don't stop </s> hello world", add_special_tokens=False
    )
    for cut in range(len(ids) + 1):
        prompt_text = decode(ids[:cut], skip_special_tokens=True)
        if prompt_text.endswith("\ufffd"):
            continue
        answer = "".join(pieces_of(tokenizer, ids[cut:], ids[:cut]))
        assert prompt_text + answer == decode(ids, skip_special_tokens=True), cut


def test_an_answer_completes_the_character_that_its_prompt_began() -> None:
    tokenizer = small_tokenizer("byte_fallback")
    cut = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "界".encode()]
    assert pieces_of(tokenizer, cut[1:], cut[:1]) == ["", "界", ""]
    letter = tokenizer.convert_tokens_to_ids("a")
    assert "".join(pieces_of(tokenizer, [letter], cut[:2])) == "a"


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=30))
def test_invalid_bytes_become_what_unicode_recommends(data: list[int]) -> None:
    tokenizer = small_tokenizer("byte_fallback")
    ids = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in data]
    prompt = tokenizer.encode("hello", add_special_tokens=False)
    assert "".join(pieces_of(tokenizer, ids, prompt)) == bytes(data).decode("utf-8", "replace")


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 389), max_size=30), st.booleans())
def test_random_byte_level_tokens_decode_as_the_tokenizer_decodes_them(
    ids: list[int], skip: bool
) -> None:
    tokenizer = small_tokenizer("byte_level")
    whole = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(pieces_of(tokenizer, ids, skip=skip)) == whole


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40), st.integers(0, 10))
def test_text_arrives_when_the_tokenizers_own_stream_has_it(text: str, cut: int) -> None:
    tokenizer = small_tokenizer("byte_level")
    ids = tokenizer.encode(text, add_special_tokens=False)
    oracle = DecodeStream(ids=ids[:cut], skip_special_tokens=True)
    ours = pieces_of(tokenizer, ids[cut:], ids[:cut])
    if tokenizer.backend_tokenizer.decode(ids[:cut]).endswith("\ufffd"):
        return  # the oracle does not show a character that its prompt began
    theirs = [oracle.step(tokenizer.backend_tokenizer, token) or "" for token in ids[cut:]]
    assert "".join(ours) == "".join(theirs)
    seen = 0
    for mine, oracles in zip(ours, theirs, strict=False):
        seen += len(mine) - len(oracles)
        assert seen >= 0


def test_half_a_character_at_the_end_becomes_one_replacement_character() -> None:
    tokenizer = small_tokenizer("byte_level")
    ids = tokenizer.encode("𝄞", add_special_tokens=False)
    assert len(ids) > 1, "the test wants a character of several tokens"
    assert pieces_of(tokenizer, ids[:-1]) == [""] * (len(ids) - 1) + ["\ufffd"]


def test_special_tokens_are_left_out_only_if_asked() -> None:
    tokenizer = small_tokenizer("byte_level")
    ids = tokenizer.encode("hello</s>日本 tok", add_special_tokens=False)
    assert "".join(pieces_of(tokenizer, ids)) == "hello日本 tok"
    assert "".join(pieces_of(tokenizer, ids, skip=False)) == "hello</s>日本 tok"


def test_ids_beyond_the_tokenizer_have_no_text() -> None:
    """The output layer of many models is padded beyond their vocabulary."""
    tokenizer = small_tokenizer("byte_level")
    assert pieces_of(tokenizer, [len(tokenizer) + 5]) == ["", ""]


def test_several_tokens_at_once_give_the_same_text() -> None:
    for kind in KINDS:
        tokenizer = small_tokenizer(kind)
        ids = tokenizer.encode("the quick fox 你好 hello world", add_special_tokens=False)
        stream = IncrementalDetokenizer(tokenizer, [])
        assert stream.push(ids) + stream.finish() == "".join(pieces_of(tokenizer, ids))


def test_only_decoders_that_are_understood_are_read_as_bytes() -> None:
    exact = {kind: table_of(small_tokenizer(kind)).is_exact for kind in KINDS}
    assert exact == {
        "byte_level": True, "byte_fallback": True, "metaspace": True, "wordpiece": False,
    }  # fmt: skip


def test_the_table_of_a_tokenizer_is_made_once() -> None:
    tokenizer = small_tokenizer("byte_level")
    assert table_of(tokenizer) is table_of(tokenizer)


# --- stop strings


def expected(text: str, stops: list[str], *, include: bool) -> tuple[str, str | None]:
    """The match that ends first; of those the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.text("ab", max_size=5), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4),
    st.booleans(),
)
def test_the_same_stop_is_found_however_the_text_is_cut(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    checker = StopChecker(stops, include_stop=include)
    shown = ""
    text, match = expected("".join(pieces), stops, include=include)
    for count, piece in enumerate(pieces, start=1):
        shown += checker.push(piece, count)
        assert text.startswith(shown), "showed text that a stop string takes back"
    assert checker.matched == match
    assert shown + checker.finish() == text


@settings(max_examples=200, deadline=None)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=6), min_size=1))
def test_no_more_is_held_back_than_may_become_a_stop(text: str, stops: list[str]) -> None:
    checker = StopChecker(stops)
    shown = ""
    for before, after in pairwise(range(len(text) + 1)):
        shown += checker.push(text[before:after], after)
        if checker.matched:
            return
        held = text[len(shown) : after]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_a_stop_within_the_first_min_tokens_is_plain_text() -> None:
    checker = StopChecker(["stop"], min_tokens=2)
    assert checker.push("a stop b", 1) == "a stop b"
    assert checker.push(" st", 2) == " "
    assert checker.push("op c", 3) == ""
    assert checker.matched == "stop"


def test_nothing_follows_a_match() -> None:
    checker = StopChecker(["END"])
    assert checker.push("one END two", 1) == "one "
    assert checker.push("three", 2) == ""
    assert checker.finish() == ""


def test_a_long_self_similar_stop_costs_no_more_than_its_text() -> None:
    """Quadratic search would compare 10**9 characters here, and hit the timeout."""
    stop = "a" * 1000 + "b" + "a" * 20
    checker = StopChecker([stop] * 2)
    for count in range(200):
        checker.push("a" * 500, count)
    assert checker.matched is None
    assert checker.finish() == "a" * 1000


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopChecker(["a", ""])
