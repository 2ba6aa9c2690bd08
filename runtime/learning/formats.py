"""Feedback as the datasets that TRL reads: JSON Lines, one row per event.

    preference   {"prompt", "chosen", "rejected"}
    unpaired     {"prompt", "completion", "label"}     label: true is desirable

Conversational rows have lists of messages, plain ones texts. Rows of an export hold, besides those
columns, `id`, `source`, `type`, `created`, `adapter`, `state`, `response_id` and `comment`, which
TRL passes over; an import keeps `id` and `source`, and the `comment` of unpaired rows.

An import takes an answer of one assistant message. It makes one user message of a plain prompt, and
takes the prompt out of `chosen` and `rejected` where these are whole conversations (TRL's implicit
prompt).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import orjson

from ..errors import RequestError
from .events import (
    INVALID,
    Edit,
    FeedbackEvent,
    Preference,
    Rating,
    TextRating,
    event_type,
    parse_event,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..types import Message
    from .store import StoredFeedback

Format: TypeAlias = Literal["preference", "unpaired"]
FORMATS: Final[tuple[Format, ...]] = ("preference", "unpaired")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedRow:
    """A row as an event; `source` is None where the row names none."""

    event: FeedbackEvent
    source: str | None


def as_row(feedback: StoredFeedback) -> dict[str, object]:
    """One piece of stored feedback as a row of an export.

    The texts are the sample's, or the event's own where none was made of it. A row whose texts are
    not known (a rating whose sample is still to be made) has none of TRL's columns.
    """
    event = feedback.stored.event
    row: dict[str, object] = {
        "id": event.id,
        "source": feedback.stored.source,
        "type": event_type(event),
        "created": feedback.stored.created.isoformat(),
        "adapter": feedback.adapter,
        "state": feedback.state,
        "response_id": feedback.response_id,
        "comment": event.comment if isinstance(event, (Rating, TextRating)) else None,
    }
    if feedback.prompt is not None and feedback.is_desirable is not None:
        return row | _unpaired(feedback.prompt, feedback.completion, feedback.is_desirable)
    if feedback.prompt is not None:
        return row | _preference(feedback.prompt, feedback.chosen, feedback.rejected)
    match event:
        case Preference(prompt=tuple() as prompt):
            return (
                row | {"adapter": event.model} | _preference(prompt, event.chosen, event.rejected)
            )
        case TextRating():
            texts = _unpaired(event.prompt, event.completion, event.rating == 1)
            return row | {"adapter": event.model} | texts
        case Rating() | Edit():
            return row | {"response_id": event.response_id}
        case _:
            return row


def format_of(row: Mapping[str, object]) -> Format | None:
    """Which of TRL's formats a row has; None for neither."""
    if row.get("chosen") is not None and row.get("rejected") is not None:
        return "preference"
    if row.get("completion") is not None and row.get("label") is not None:
        return "unpaired"
    return None


def parse_row(line: bytes | str, *, model: str | None = None) -> ImportedRow:
    """The event that a line of JSON Lines says.

    Args:
        line: one JSON object.
        model: the adapter that is to learn from it; None for the served model's.

    An event without an `id` gets one made from its texts, so that a second import changes nothing.

    Raises:
        RequestError: of code "invalid_feedback"; `param` is the column that is wrong.
    """
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"not valid JSON: {error}", code=INVALID) from None
    if not isinstance(row, dict):
        raise RequestError("not a JSON object; give one object per line", code=INVALID)
    body: dict[str, object]
    match format_of(row):
        case "preference":
            prompt, chosen, rejected = _prompt_and_answers(row)
            body = {"type": "preference", "prompt": prompt}
            body |= {"chosen": chosen, "rejected": rejected}
        case "unpaired":
            body = {"type": "rating", "prompt": _prompt(row), "completion": _answer(row)}
            body |= {"rating": _rating(row["label"]), "comment": row.get("comment")}
        case None:
            raise RequestError(
                f"columns are {', '.join(map(str, row)) or 'none'}; TRL's formats have prompt, "
                "chosen and rejected, or prompt, completion and label",
                code=INVALID,
            )
    body["model"] = model
    body["id"] = row.get("id")
    if body["id"] is None:
        digest = hashlib.blake2b(orjson.dumps(body, option=orjson.OPT_SORT_KEYS), digest_size=16)
        body["id"] = f"row-{digest.hexdigest()}"
    source = row.get("source")
    if source is not None and not isinstance(source, str):
        raise _wrong("source", f"source is {source!r}; give a text, or leave it out")
    return ImportedRow(event=parse_event(body), source=source)


# -- our texts to TRL's columns ------------------------------------------------------------------


def _preference(
    prompt: tuple[Message, ...] | str, chosen: str | None, rejected: str | None
) -> dict[str, object]:
    if chosen is None or rejected is None:
        return {}
    return {
        "prompt": _as_prompt(prompt),
        "chosen": _as_answer(prompt, chosen),
        "rejected": _as_answer(prompt, rejected),
    }


def _unpaired(
    prompt: tuple[Message, ...] | str, completion: str | None, is_desirable: bool
) -> dict[str, object]:
    if completion is None:
        return {}
    return {
        "prompt": _as_prompt(prompt),
        "completion": _as_answer(prompt, completion),
        "label": is_desirable,
    }


def _as_prompt(prompt: tuple[Message, ...] | str) -> object:
    return prompt if isinstance(prompt, str) else [dict(message) for message in prompt]


def _as_answer(prompt: tuple[Message, ...] | str, text: str) -> object:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


# -- TRL's columns to ours -----------------------------------------------------------------------


def _prompt(row: Mapping[str, object]) -> object:
    """The prompt as messages; whether they are well-formed is for `parse_event` to say."""
    prompt = row.get("prompt")
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _prompt_and_answers(row: Mapping[str, object]) -> tuple[object, str, str]:
    chosen, rejected = row["chosen"], row["rejected"]
    if row.get("prompt") is not None:
        return _prompt(row), _answer_text("chosen", chosen), _answer_text("rejected", rejected)
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        raise _wrong(
            "prompt", "prompt is missing; add a column with what chosen and rejected answer"
        )
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        raise _wrong("prompt", "prompt is missing, and chosen and rejected do not begin alike")
    return (
        chosen[:shared],
        _answer_text("chosen", chosen[shared:]),
        _answer_text("rejected", rejected[shared:]),
    )


def _answer(row: Mapping[str, object]) -> str:
    return _answer_text("completion", row["completion"])


def _answer_text(name: str, value: object) -> str:
    """The text of an answer: a text, or a list of one assistant message."""
    if isinstance(value, str):
        return value
    match value:
        case [{"role": "assistant", "content": str() as text}]:
            return text
        case _:
            raise _wrong(name, f"{name} must be a text, or one assistant message after the prompt")


def _rating(label: object) -> int:
    if label not in (True, False):
        raise _wrong("label", f"label is {label!r}; use true (desirable) or false")
    return 1 if label else -1


def _wrong(param: str, message: str) -> RequestError:
    return RequestError(message, param=param, code=INVALID)
