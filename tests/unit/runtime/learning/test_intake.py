"""Events become samples: the right tokens, the right adapter, or a refusal that says what to do."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from cotune.runtime.errors import ContextLengthError, NotFoundError, RequestError
from cotune.runtime.learning.config import FeedbackConfig
from cotune.runtime.learning.events import Edit, Rating, Withdrawal
from cotune.runtime.learning.intake import Intake
from cotune.runtime.learning.samples import is_held_out
from cotune.runtime.learning.sqlite_store import SqliteBackend
from cotune.runtime.learning.store import FeedbackStore, RecordedResponse
from cotune.runtime.tokenization import TextCodec
from tiny_models import EOS_ID, tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from cotune.runtime.learning.store import NewSample

QUESTION: Any = ({"role": "user", "content": "what is the name of the river"},)
MAX_LENGTH = 64


class Door:
    """An intake over a real store, and what is at hand to feed it."""

    def __init__(self, store: FeedbackStore) -> None:
        self.store = store
        self.codec = TextCodec(tiny_tokenizer())
        self.prompt_ids = tuple(self.codec.encode_chat(QUESTION))
        self.intake = Intake(
            store,
            self.codec,
            eos_token_ids=(EOS_ID,),
            max_length=MAX_LENGTH,
            held_out_share=0.2,
            learner_of=self._learner_of,
            learning=("main", "tutor"),
        )

    def _learner_of(self, model: str | None) -> str:
        name = (model or "main").partition("@")[0]
        if name not in ("main", "tutor"):
            raise NotFoundError(f"{name!r} does not learn", param="model", code="model_not_found")
        return name

    def answered(self, response_id: str, text: str, **changes: Any) -> RecordedResponse:
        """Record an answer to `QUESTION`."""
        values: dict[str, Any] = {
            "id": response_id,
            "adapter": "main",
            "version": 3,
            "model": "main",
            "source": "somebody",
            "prompt_ids": self.prompt_ids,
            "completion_ids": (*self.codec.encode(text, add_special_tokens=False), EOS_ID),
            "text": text,
            "messages": QUESTION,
            "sampling": {"temperature": 1.0},
            "finish_reason": "stop",
            "created_s": 4e9,  # far from expiring
        }
        response = RecordedResponse(**values | changes)
        self.store.record(response)
        return response

    async def sample(self, event: Any) -> NewSample:
        """The one sample of an event."""
        (sample,) = await self.intake.prepare(event)
        return sample


@pytest_asyncio.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    backend = partial(SqliteBackend, tmp_path / "feedback.sqlite")
    async with FeedbackStore(backend, FeedbackConfig()) as store:
        yield Door(store)


def texts(**changes: Any) -> dict[str, Any]:
    body = {"id": "e1", "type": "preference", "prompt": list(QUESTION)}
    return {**body, "chosen": "the old river", "rejected": "the bird", **changes}


async def test_a_rating_takes_the_tokens_of_the_answer_exactly_as_they_were(door: Door) -> None:
    response = door.answered("r1", "she said hello")
    sample = await door.sample(Rating(id="e1", response_id="r1", rating=-1))
    assert sample.kind == "rated"
    assert sample.adapter == "main"
    assert sample.prompt_ids == response.prompt_ids
    assert sample.completion_ids == response.completion_ids
    assert sample.is_desirable is False
    assert sample.response_id == "r1"


async def test_texts_are_tokenized_as_the_chat_template_would_have_them(door: Door) -> None:
    await door.intake.take(texts(), source="a")
    (sample,) = await door.store.pending("main", 10)
    turn: Any = {"role": "assistant", "content": "the old river"}
    whole = door.codec.encode_chat([*QUESTION, turn], add_generation_prompt=False)
    assert [*sample.prompt_ids, *sample.chosen_ids] == whole  # type: ignore[union-attr]
    assert sample.chosen_ids[-1] == EOS_ID  # type: ignore[union-attr]


async def test_an_answer_and_the_same_text_given_by_hand_are_the_same_tokens(door: Door) -> None:
    response = door.answered("r1", "the bird")
    sample = await door.sample(Edit(id="e1", response_id="r1", text="the old river"))
    assert sample.rejected_ids == response.completion_ids
    await door.intake.take(texts(), source="a")
    (given,) = await door.store.pending("main", 10)
    assert sample.chosen_ids == given.chosen_ids  # type: ignore[union-attr]
    assert sample.rejected_ids == given.rejected_ids  # type: ignore[union-attr]


async def test_an_edit_of_a_plain_completion_ends_as_the_model_would(door: Door) -> None:
    door.answered("r1", "the bird", messages=None)
    sample = await door.sample(Edit(id="e1", response_id="r1", text="the cat"))
    assert sample.chosen_ids == (*door.codec.encode("the cat", add_special_tokens=False), EOS_ID)


async def test_two_answers_to_one_prompt_make_a_pair(door: Door) -> None:
    good, bad = door.answered("r1", "the river"), door.answered("r2", "the dog")
    body = {"id": "e1", "type": "preference", "chosen_id": "r1", "rejected_id": "r2"}
    assert not (await door.intake.take(body, source="a")).duplicate
    (sample,) = await door.store.pending("main", 10)
    assert sample.chosen_ids == good.completion_ids  # type: ignore[union-attr]
    assert sample.rejected_ids == bad.completion_ids  # type: ignore[union-attr]


async def test_the_side_of_the_split_follows_from_the_prompt_alone(door: Door) -> None:
    door.answered("r1", "she said hello")
    rated = await door.sample(Rating(id="e1", response_id="r1", rating=1))
    edited = await door.sample(Edit(id="e2", response_id="r1", text="the cat"))
    assert rated.is_held_out == edited.is_held_out == is_held_out("main", door.prompt_ids, 0.2)


async def test_feedback_follows_its_response_to_the_adapter_that_answered(door: Door) -> None:
    door.answered("r1", "hello", adapter="tutor", model="tutor@2")
    assert (await door.sample(Rating(id="e1", response_id="r1", rating=1))).adapter == "tutor"


async def test_a_withdrawal_makes_no_sample(door: Door) -> None:
    assert await door.intake.prepare(Withdrawal(id="e2", target="e1")) == ()


@pytest.mark.parametrize(
    ("body", "kind", "param", "code"),
    [
        ({"id": "e", "type": "rating", "response_id": "nobody", "rating": 1},
         NotFoundError, "response_id", "response_not_found"),
        ({"id": "e", "type": "rating", "response_id": "left", "rating": 1},
         NotFoundError, "response_id", "adapter_not_learning"),
        ({"id": "e", "type": "rating", "response_id": "empty", "rating": 1},
         RequestError, "response_id", "empty_answer"),
        ({"id": "e", "type": "edit", "response_id": "r1", "text": "hello"},
         RequestError, "text", "identical_answers"),
        ({"id": "e", "type": "preference", "chosen_id": "r1", "rejected_id": "tutored"},
         RequestError, "rejected_id", "different_adapters"),
        ({"id": "e", "type": "preference", "chosen_id": "r1", "rejected_id": "other"},
         RequestError, "rejected_id", "different_prompts"),
        ({"id": "e", "type": "preference", "chosen_id": "r1", "rejected_id": "twin"},
         RequestError, "rejected_id", "identical_answers"),
        ({"id": "e", "type": "preference", "chosen_id": "gone", "rejected_id": "r1"},
         NotFoundError, "chosen_id", "response_not_found"),
        (texts(model="stranger"), NotFoundError, "model", "model_not_found"),
        (texts(chosen="the cat " * 40), ContextLengthError, "chosen", "too_long_to_train"),
        (texts(prompt=[{"role": "user", "content": "the dog " * 40}]),
         ContextLengthError, "chosen", "too_long_to_train"),
        (texts(rejected="the old river"), RequestError, "rejected", "invalid_feedback"),
    ],
)  # fmt: skip
async def test_what_cannot_be_learned_from_is_refused_and_nothing_is_stored(
    door: Door, body: dict[str, Any], kind: type[RequestError], param: str, code: str
) -> None:
    door.answered("r1", "hello")
    door.answered("twin", "hello")
    door.answered("left", "hello", adapter="gone-adapter")
    door.answered("empty", "", completion_ids=())
    door.answered("tutored", "the cat", adapter="tutor")
    door.answered("other", "the cat", prompt_ids=(5, 6, 7))
    with pytest.raises(kind) as refusal:
        await door.intake.take(body, source="a")
    assert refusal.value.param == param
    assert refusal.value.code == code
    assert door.store.counts().events == {}
    assert await door.store.pending("main", 10) == ()
    assert door.intake.refused == {code: 1}


async def test_sending_again_what_was_stored_is_acknowledged_even_when_its_response_is_gone(
    door: Door,
) -> None:
    door.answered("r1", "hello", source="somebody")
    body = {"id": "e1", "type": "rating", "response_id": "r1", "rating": 1}
    await door.intake.take(body, source="a")
    await door.store.expire()  # nothing is old enough
    door.answered("r1", "", completion_ids=())  # as good as gone: it cannot be rated
    assert (await door.intake.take(body, source="a")).duplicate
