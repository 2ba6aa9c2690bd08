from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from cotune.runtime.errors import RequestError
from cotune.runtime.learning.events import FeedbackEvent, Preference, Rating, TextRating, Withdrawal
from cotune.runtime.learning.formats import as_row, format_of, parse_row
from cotune.runtime.learning.store import StoredEvent, StoredFeedback

PROMPT: Any = ({"role": "user", "content": "Hi"},)
HI = [{"role": "user", "content": "Hi"}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def stored(event: FeedbackEvent, **sample: Any) -> StoredFeedback:
    created = datetime(2026, 1, 1, tzinfo=UTC)
    return StoredFeedback(
        stored=StoredEvent(key=1, source="ann", event=event, created=created),
        **{"state": "ready", **sample},
    )


def line(**row: object) -> str:
    return json.dumps(row)


def test_a_pair_of_a_conversation_is_a_conversational_preference_row() -> None:
    event = Preference(id="e1", chosen_id="r1", rejected_id="r2")
    row = as_row(
        stored(event, adapter="m", response_id="r1", prompt=PROMPT, chosen="Hello!", rejected="Go.")
    )
    assert row == {
        "id": "e1",
        "source": "ann",
        "type": "preference",
        "created": "2026-01-01T00:00:00+00:00",
        "adapter": "m",
        "state": "ready",
        "response_id": "r1",
        "comment": None,
        "prompt": HI,
        "chosen": assistant("Hello!"),
        "rejected": assistant("Go."),
    }
    assert format_of(row) == "preference"


def test_a_rated_plain_completion_is_a_plain_unpaired_row() -> None:
    event = Rating(id="e1", response_id="r1", rating=-1, comment="rude")
    row = as_row(stored(event, prompt="Once", completion=" upon", is_desirable=False))
    assert (row["prompt"], row["completion"], row["label"]) == ("Once", " upon", False)
    assert row["comment"] == "rude"
    assert format_of(row) == "unpaired"


def test_texts_without_a_sample_come_from_the_event() -> None:
    preference = Preference(id="e1", prompt=PROMPT, chosen="A", rejected="B", model="m")
    row = as_row(stored(preference, state="unprepared"))
    assert (row["adapter"], row["prompt"], row["chosen"]) == ("m", HI, assistant("A"))
    rating = TextRating(id="e1", prompt=PROMPT, completion="A", rating=1)
    row = as_row(stored(rating, state="unprepared"))
    assert (row["prompt"], row["completion"], row["label"]) == (HI, assistant("A"), True)
    row = as_row(stored(Rating(id="e1", response_id="r1", rating=1), state="unprepared"))
    assert format_of(row) is None
    assert row["response_id"] == "r1"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": HI, "chosen": assistant("A"), "rejected": assistant("B")},
        {"prompt": "Hi", "chosen": "A", "rejected": "B"},
        {"chosen": HI + assistant("A"), "rejected": HI + assistant("B")},
        {"prompt": "Hi", "chosen": "A", "rejected": "B", "score": 5, "completion": None},
    ],
    ids=["conversational", "plain", "implicit prompt", "further columns"],
)
def test_rows_of_preferences_are_read(row: dict[str, object]) -> None:
    imported = parse_row(line(**row, id="e1", source="ann"), model="m")
    assert imported.source == "ann"
    assert imported.event == Preference(id="e1", prompt=PROMPT, chosen="A", rejected="B", model="m")


@pytest.mark.parametrize(("label", "rating"), [(True, 1), (False, -1), (1, 1), (0, -1)])
def test_rows_of_ratings_are_read(label: object, rating: Any) -> None:
    row = line(id="e1", prompt=HI, completion="A", label=label, comment="well")
    expected = TextRating(id="e1", prompt=PROMPT, completion="A", rating=rating, comment="well")
    assert parse_row(row).event == expected
    assert parse_row(row).source is None


def test_a_row_without_an_id_is_named_by_its_texts() -> None:
    first = parse_row(line(prompt="Hi", chosen="A", rejected="B")).event
    same = parse_row(line(rejected="B", prompt=HI, chosen=assistant("A"))).event
    other = parse_row(line(prompt="Hi", chosen="A", rejected="C")).event
    assert first == same
    assert first.id != other.id


def test_an_exported_row_is_read_as_the_event_it_came_from() -> None:
    event = Preference(id="e1", prompt=PROMPT, chosen="A", rejected="B")
    row = as_row(stored(event, adapter="m", prompt=PROMPT, chosen="A", rejected="B"))
    imported = parse_row(json.dumps(row))
    assert imported.event == event
    assert imported.source == "ann"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        (line(text="Hi"), "columns are text;"),
        (line(prompt="Hi", chosen="A"), "columns are prompt, chosen;"),
        (line(chosen="A", rejected="B"), "prompt is missing"),
        (line(chosen=assistant("A"), rejected=assistant("B")), "do not begin alike"),
        (line(chosen=HI, rejected=HI), "chosen must be a text, or one assistant"),
        (line(prompt=HI, chosen=HI, rejected="B"), "chosen must be a text, or one assistant"),
        (line(prompt="", chosen="A", rejected="A"), "the same text"),
        (line(prompt=[], chosen="A", rejected="B"), "prompt must be a list of one or more"),
        (line(prompt="Hi", completion="A", label="yes"), "label is 'yes'"),
        (line(prompt="Hi", completion="", label=True), "completion is empty"),
        (line(prompt="Hi", chosen="A", rejected="B", id=5), "id must be a text"),
        (line(prompt="Hi", chosen="A", rejected="B", source=5), "source is 5"),
    ],
)
def test_a_wrong_row_is_refused_with_the_column(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as refused:
        parse_row(text)
    assert refused.value.code == "invalid_feedback"


def test_a_withdrawal_has_no_texts() -> None:
    assert format_of(as_row(stored(Withdrawal(id="w", target="e1"), state="none"))) is None
