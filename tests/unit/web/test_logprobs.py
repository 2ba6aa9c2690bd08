from __future__ import annotations

import math

import orjson

from cotune.runtime.types import TokenLogprob
from cotune.tools.null_runtime import NullCodec
from cotune.web.logprobs import LOWEST, LogprobFormatter

A, B, C = (ord(letter) for letter in "abc")
HALF = 0xC3  # the first byte of a two-byte character
OTHER_HALF = 0xA4


def entry(token: int, logprob: float, *top: tuple[int, float], rank: int = 1) -> TokenLogprob:
    return TokenLogprob(token, logprob, rank, top)


def test_chat_lists_the_alternatives_best_first_and_no_more_than_asked() -> None:
    shaped = LogprobFormatter(NullCodec(), top=2).chat(
        [entry(C, -2.0, (A, -0.5), (B, -1.0), (C, -2.0), rank=3)]
    )
    assert shaped == {
        "content": [
            {
                "token": "c",
                "logprob": -2.0,
                "bytes": [C],
                "top_logprobs": [
                    {"token": "a", "logprob": -0.5, "bytes": [A]},
                    {"token": "b", "logprob": -1.0, "bytes": [B]},
                ],
            }
        ],
        "refusal": None,
    }


def test_a_byte_fragment_has_its_bytes() -> None:
    shaped = LogprobFormatter(NullCodec(), top=0).chat([entry(HALF, -1.0)])
    assert shaped["content"][0]["bytes"] == [HALF]
    assert shaped["content"][0]["token"] == "\N{REPLACEMENT CHARACTER}"
    assert shaped["content"][0]["top_logprobs"] == []


def test_completions_name_the_chosen_token_even_when_it_is_not_among_the_best() -> None:
    shaped = LogprobFormatter(NullCodec(), top=1).completion(
        [A, C], [None, entry(C, -2.0, (A, -0.5), (B, -1.0), rank=3)], offset=10
    )
    assert shaped == {
        "tokens": ["a", "c"],
        "token_logprobs": [None, -2.0],
        "top_logprobs": [None, {"c": -2.0, "a": -0.5}],
        "text_offset": [10, 11],
    }


def test_of_tokens_that_look_alike_the_likelier_stays() -> None:
    shaped = LogprobFormatter(NullCodec(), top=2).completion(
        [HALF], [entry(HALF, -0.1, (HALF, -0.1), (OTHER_HALF, -3.0))], offset=0
    )
    assert shaped["top_logprobs"] == [{"\N{REPLACEMENT CHARACTER}": -0.1}]
    by_id = LogprobFormatter(NullCodec(), top=2, as_ids=True).completion(
        [HALF], [entry(HALF, -0.1, (HALF, -0.1), (OTHER_HALF, -3.0))], offset=0
    )
    assert by_id["tokens"] == [f"token_id:{HALF}"]
    assert by_id["top_logprobs"] == [{f"token_id:{HALF}": -0.1, f"token_id:{OTHER_HALF}": -3.0}]


def test_the_impossible_is_a_number_json_can_write() -> None:
    shaped = LogprobFormatter(NullCodec(), top=1).chat([entry(A, -math.inf, (B, -math.inf))])
    assert shaped["content"][0]["logprob"] == LOWEST
    assert b"null" not in orjson.dumps(shaped["content"])


def test_prompt_logprobs_are_by_token_id_with_rank() -> None:
    shaped = LogprobFormatter(NullCodec(), top=1).prompt(
        [None, entry(C, -2.0, (A, -0.5), (B, -1.0), rank=3), entry(A, -0.5, (A, -0.5))]
    )
    assert shaped == [
        None,
        {
            str(A): {"logprob": -0.5, "rank": 1, "decoded_token": "a"},
            str(C): {"logprob": -2.0, "rank": 3, "decoded_token": "c"},
        },
        {str(A): {"logprob": -0.5, "rank": 1, "decoded_token": "a"}},
    ]
