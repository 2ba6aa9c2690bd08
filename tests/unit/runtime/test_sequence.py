"""A sequence: what its reader sees of the tokens that are known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cotune import BASE, SamplingParams, TokenLogprob
from cotune.runtime.answer_text import AnswerText
from cotune.runtime.sampling import SamplingState
from cotune.runtime.sequence import Request, SequenceState
from engine_fakes import EOS, letters

if TYPE_CHECKING:
    from collections.abc import Iterable


class Lagging:
    """A detokenizer that is always one token behind."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, token_ids: Iterable[int]) -> str:
        text = self._held + letters(list(token_ids))
        self._held = text[-1:]
        return text[:-1]

    def finish(self) -> str:
        return self._held


def sequence(**params: Any) -> SequenceState:
    resolved = SamplingParams(**{"max_tokens": 100, **params}).resolve({})
    assert resolved.max_tokens is not None
    request = Request(
        request_id="r",
        prompt=(1, 2, 3),
        params=resolved,
        max_tokens=resolved.max_tokens,
        seed=0,
        version=BASE,
        model="m",
        priority=0,
        arrival_s=10.0,
    )
    output: list[int] = []
    seq = SequenceState(0, request, 0, AnswerText(Lagging(), resolved), output)
    seq.sampling = SamplingState(resolved, request.prompt, output, frozenset({EOS}), seed=0)
    return seq


def feed(seq: SequenceState, *tokens: int) -> None:
    for token in tokens:
        seq.logprobs.append(TokenLogprob(token, -1.0, 1))
        seq.append(token, 11.0 + len(seq.output))


def test_a_reader_sees_what_was_published_and_not_what_is_known() -> None:
    seq = sequence(logprobs=0)
    feed(seq, 4, 5)
    seq.publish()
    feed(seq, 6)  # an iteration was committed, and its text is not made yet
    delta = seq.take()
    assert delta.token_ids == (4, 5)
    assert delta.text == letters([4])
    assert delta.logprobs is not None
    assert [entry.token_id for entry in delta.logprobs] == [4, 5]
    seq.publish()
    assert seq.take().token_ids == (6,)
    assert seq.request.sequences == ()


def test_a_stop_string_drops_the_tokens_that_were_known_already() -> None:
    seq = sequence(stop=(letters([5]),))
    feed(seq, 4, 5, 6, 7)
    seq.publish()
    assert seq.published == seq.end == 3  # the detokenizer gave the text of 5 with token 6
    assert seq.take().token_ids == (4, 5, 6)
    response = seq.respond(50.0)
    assert response.text == letters([4])
    assert response.usage.completion_tokens == 3
    assert response.timings.tbt_s == (1.0, 1.0)
    assert response.timings.e2e_s == 3.0


def test_a_stop_string_that_is_complete_with_the_last_held_text_counts() -> None:
    seq = sequence(stop=(letters([6]),), max_tokens=3)
    feed(seq, 4, 5, 6)
    assert seq.finish_reason == "length"
    seq.publish()
    assert (seq.finish_reason, seq.stop_reason) == ("stop", letters([6]))
    assert seq.respond(50.0).text == letters([4, 5])


def test_text_that_only_looks_like_a_stop_string_comes_out_at_the_end() -> None:
    seq = sequence(stop=(letters([6, 7]),), max_tokens=3)
    feed(seq, 4, 5, 6)
    seq.publish()
    assert seq.finish_reason == "length"
    assert seq.take().text == letters([4, 5, 6])


def test_an_abandoned_sequence_ends_where_its_reader_is() -> None:
    seq = sequence()
    feed(seq, 4, 5)
    seq.publish()
    feed(seq, 6)
    seq.abandon("abort")
    response = seq.respond(50.0)
    assert response.token_ids == (4, 5)
    assert response.finish_reason == "abort"
