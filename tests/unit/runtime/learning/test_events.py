from __future__ import annotations

from typing import Any, TypeAlias

import pytest

from cotune.runtime.errors import RequestError
from cotune.runtime.learning.events import (
    MAX_COMMENT_CHARS,
    MAX_ID_CHARS,
    MAX_MESSAGES,
    MAX_TEXT_CHARS,
    Edit,
    FeedbackEvent,
    Preference,
    Rating,
    TextRating,
    Withdrawal,
    as_body,
    check_event,
    check_source,
    event_type,
    parse_event,
    subject_of,
)

Body: TypeAlias = dict[str, object]

PROMPT: list[dict[str, Any]] = [
    {"role": "system", "content": ""},
    {"role": "user", "content": "Hi", "name": "ann"},
]
RATING: Body = {"id": "e1", "type": "rating", "response_id": "r1", "rating": 1}
TEXT_RATING: Body = {
    "id": "e1",
    "type": "rating",
    "prompt": PROMPT,
    "completion": "Ho",
    "rating": -1,
}
TEXTS: Body = {"id": "e1", "type": "preference", "prompt": PROMPT, "chosen": "A", "rejected": "B"}
IDS: Body = {"id": "e1", "type": "preference", "chosen_id": "r1", "rejected_id": "r2"}
EDIT: Body = {"id": "e1", "type": "edit", "response_id": "r1", "text": "Better."}
WITHDRAWAL: Body = {"id": "e2", "type": "withdraw", "target": "e1"}

MESSAGES: Any = tuple(PROMPT)


@pytest.mark.parametrize(
    ("body", "event"),
    [
        (RATING, Rating(id="e1", response_id="r1", rating=1)),
        (
            RATING | {"rating": -1, "comment": "no\n\x00"},
            Rating(id="e1", response_id="r1", rating=-1, comment="no\n\x00"),
        ),
        (TEXT_RATING, TextRating(id="e1", prompt=MESSAGES, completion="Ho", rating=-1)),
        (TEXTS, Preference(id="e1", prompt=MESSAGES, chosen="A", rejected="B")),
        (
            TEXTS | {"model": "tutor"},
            Preference(id="e1", prompt=MESSAGES, chosen="A", rejected="B", model="tutor"),
        ),
        (IDS, Preference(id="e1", chosen_id="r1", rejected_id="r2")),
        (EDIT, Edit(id="e1", response_id="r1", text="Better.")),
        (WITHDRAWAL, Withdrawal(id="e2", target="e1")),
    ],
)
def test_a_frame_becomes_an_event_and_the_event_the_same_frame(
    body: Body, event: FeedbackEvent
) -> None:
    assert parse_event(body) == event
    assert as_body(event) == body
    assert check_event(event) == event
    assert event_type(event) == body["type"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "id"),
        (RATING | {"id": ""}, "id"),
        (RATING | {"id": 7}, "id"),
        (RATING | {"id": "a\nb"}, "id"),
        (RATING | {"id": "x" * (MAX_ID_CHARS + 1)}, "id"),
        (RATING | {"id": "\ud800"}, "id"),
        ({"id": "e1"}, "type"),
        (RATING | {"type": "like"}, "type"),
        (RATING | {"type": ["rating"]}, "type"),
        ({"id": "e1", "type": "rating", "rating": 1}, "response_id"),
        (RATING | {"response_id": 5}, "response_id"),
        ({"id": "e1", "type": "rating", "response_id": "r1"}, "rating"),
        (RATING | {"rating": 0}, "rating"),
        (RATING | {"rating": True}, "rating"),
        (RATING | {"rating": 1.0}, "rating"),
        (RATING | {"rating": "1"}, "rating"),
        (RATING | {"comment": 5}, "comment"),
        (RATING | {"comment": "x" * (MAX_COMMENT_CHARS + 1)}, "comment"),
        (RATING | {"score": 5}, "score"),
        (RATING | {"completion": "Ho"}, "completion"),
        (TEXT_RATING | {"completion": ""}, "completion"),
        (TEXT_RATING | {"prompt": None}, "prompt"),
        (TEXTS | {"prompt": []}, "prompt"),
        (TEXTS | {"prompt": "Hi"}, "prompt"),
        (TEXTS | {"prompt": PROMPT * MAX_MESSAGES}, "prompt"),
        (TEXTS | {"prompt": ["Hi"]}, "prompt.0"),
        (TEXTS | {"prompt": [{"role": "robot", "content": "Hi"}]}, "prompt.0.role"),
        (TEXTS | {"prompt": [{"role": [], "content": "Hi"}]}, "prompt.0.role"),
        (TEXTS | {"prompt": [*PROMPT, {"role": "user"}]}, "prompt.2.content"),
        (TEXTS | {"prompt": [PROMPT[0] | {"name": 5}]}, "prompt.0.name"),
        (TEXTS | {"prompt": [PROMPT[0] | {"tool_calls": []}]}, "prompt.0.tool_calls"),
        (TEXTS | {"chosen": ""}, "chosen"),
        (TEXTS | {"chosen": ["A"]}, "chosen"),
        (TEXTS | {"chosen": "x" * (MAX_TEXT_CHARS + 1)}, "chosen"),
        (TEXTS | {"rejected": None}, "rejected"),
        (TEXTS | {"rejected": "A"}, "rejected"),
        (TEXTS | {"chosen_id": "r1"}, "chosen_id"),
        (IDS | {"rejected_id": None}, "rejected_id"),
        (IDS | {"rejected_id": "r1"}, "rejected_id"),
        (IDS | {"prompt": PROMPT}, "chosen_id"),
        (IDS | {"model": "tutor"}, "chosen_id"),
        (EDIT | {"text": ""}, "text"),
        (EDIT | {"rating": 1}, "rating"),
        ({"id": "e1", "type": "withdraw"}, "target"),
    ],
)
def test_a_wrong_frame_is_refused_by_the_name_of_the_field(body: Body, param: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_event(body)
    assert refused.value.param == param
    assert refused.value.code == "invalid_feedback"
    assert param.rpartition(".")[2] in refused.value.message
    assert len(refused.value.message) < 300


def test_what_is_no_object_is_refused() -> None:
    wrong: Any = ["rating"]
    with pytest.raises(RequestError, match="must be a JSON object, not a list"):
        parse_event(wrong)


def test_null_and_a_blank_comment_count_as_left_out() -> None:
    body = RATING | {"comment": "", "text": None}
    assert parse_event(body) == Rating(id="e1", response_id="r1", rating=1)


def test_an_event_made_in_code_is_held_to_the_same_rules() -> None:
    with pytest.raises(RequestError, match="half a surrogate"):
        check_event(Edit(id="e1", response_id="r1", text="\ud800"))
    with pytest.raises(RequestError, match="printable"):
        check_source("a\tb")
    assert check_source("Ann Lee") == "Ann Lee"


@pytest.mark.parametrize("body", [RATING, TEXT_RATING, TEXTS, IDS, EDIT, WITHDRAWAL])
def test_another_event_about_the_same_has_the_same_subject(body: Body) -> None:
    later = body | {"id": "later"}
    if "rating" in body:
        later |= {"rating": 1, "comment": "after all"}
    if "text" in body:
        later |= {"text": "Best."}
    assert subject_of(parse_event(later)) == subject_of(parse_event(body))


def test_a_preference_turned_round_has_the_same_subject() -> None:
    turned = TEXTS | {"chosen": "B", "rejected": "A"}
    assert subject_of(parse_event(turned)) == subject_of(parse_event(TEXTS))
    turned = IDS | {"chosen_id": "r2", "rejected_id": "r1"}
    assert subject_of(parse_event(turned)) == subject_of(parse_event(IDS))


def test_events_about_different_things_have_different_subjects() -> None:
    bodies: list[Body] = [RATING, TEXT_RATING, TEXTS, IDS, EDIT, WITHDRAWAL]
    bodies += [RATING | {"response_id": "r2"}, EDIT | {"response_id": "r2"}]
    bodies += [TEXTS | {"model": "tutor"}, TEXTS | {"rejected": "C"}, IDS | {"rejected_id": "r3"}]
    assert len({subject_of(parse_event(body)) for body in bodies}) == len(bodies)
