"""What people say about answers: the frames of feedback as frozen values, and their validator.

    {"id", "type": "rating", "response_id", "rating": 1 | -1, "comment"?}
    {"id", "type": "rating", "prompt": [messages], "completion", "rating": 1 | -1, "model"?}
    {"id", "type": "preference", "chosen_id", "rejected_id"}
    {"id", "type": "preference", "prompt": [messages], "chosen", "rejected", "model"?}
    {"id", "type": "edit", "response_id", "text"}
    {"id", "type": "withdraw", "target"}

`id` is chosen by the sender and names the event among those of its source: sending it again changes
nothing, which is how a client that lost its connection finds out what arrived. Feedback by response
id goes to the adapter that answered; `model` says which one learns from texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, cast

import orjson

from ..errors import RequestError
from ..types import Message  # noqa: TC001 - dataclass fields are inspected at run time

INVALID: Final = "invalid_feedback"
MAX_ID_CHARS: Final = 256
MAX_COMMENT_CHARS: Final = 4096
MAX_TEXT_CHARS: Final = 2**20
MAX_MESSAGES: Final = 1024
ROLES: Final = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rating:
    """The answer with this id was good (1) or bad (-1)."""

    id: str
    response_id: str
    rating: Literal[1, -1]
    comment: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRating:
    """A text was a good (1) or bad (-1) answer to a prompt; `model` learns from it."""

    id: str
    prompt: tuple[Message, ...]
    completion: str
    rating: Literal[1, -1]
    comment: str | None = None
    model: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """One answer is better than another: two texts for a prompt, or two responses by their ids.

    Either `prompt`, `chosen` and `rejected` are set, and perhaps `model`; or `chosen_id` and
    `rejected_id`.
    """

    id: str
    prompt: tuple[Message, ...] | None = None
    chosen: str | None = None
    rejected: str | None = None
    chosen_id: str | None = None
    rejected_id: str | None = None
    model: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """`text` is what the answer should have been: it is chosen, the answer itself rejected."""

    id: str
    response_id: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdrawal:
    """The sender takes back its event `target`; taking back a withdrawal reinstates."""

    id: str
    target: str


FeedbackEvent: TypeAlias = Rating | TextRating | Preference | Edit | Withdrawal

EVENT_TYPES: Final = ("rating", "preference", "edit", "withdraw")


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledgement:
    """The event `id` is durable. A `duplicate` one had been stored before."""

    id: str
    duplicate: bool


def event_type(event: FeedbackEvent) -> str:
    """The frame's `type`, one of `EVENT_TYPES`."""
    match event:
        case Rating() | TextRating():
            return "rating"
        case Preference():
            return "preference"
        case Edit():
            return "edit"
        case Withdrawal():
            return "withdraw"


def parse_event(body: Mapping[str, object]) -> FeedbackEvent:
    """The event that a frame says.

    Raises:
        RequestError: of code "invalid_feedback"; `param` is the first field that is wrong.
    """
    if not isinstance(body, Mapping):
        raise _wrong("", f"a feedback event must be a JSON object, not {_kind(body)}")
    fields = _Fields(body)
    event_id = fields.identifier("id")
    kind = fields.get("type")
    event: FeedbackEvent
    match kind:
        case "rating" if fields.has("response_id"):
            event = Rating(
                id=event_id,
                response_id=fields.identifier("response_id"),
                rating=fields.rating(),
                comment=fields.optional_text("comment", MAX_COMMENT_CHARS),
            )
        case "rating":
            event = _text_rating(event_id, fields)
        case "preference":
            event = _preference(event_id, fields)
        case "edit":
            event = Edit(
                id=event_id, response_id=fields.identifier("response_id"), text=fields.text("text")
            )
        case "withdraw":
            event = Withdrawal(id=event_id, target=fields.identifier("target"))
        case None:
            raise _wrong("type", f"type is missing; send one of {', '.join(EVENT_TYPES)}")
        case _:
            raise _wrong("type", f"type is {_shown(kind)}; send one of {', '.join(EVENT_TYPES)}")
    fields.refuse_others(str(kind))
    return event


def check_event(event: FeedbackEvent) -> FeedbackEvent:
    """`event` itself, having passed what `parse_event` asks of a frame; raises as that does."""
    return parse_event(as_body(event))


def check_source(source: str) -> str:
    """`source` itself: a name of 1 to `MAX_ID_CHARS` characters. Raises `RequestError`."""
    return _Fields({"source": source}).identifier("source")


def as_body(event: FeedbackEvent) -> dict[str, object]:
    """The frame that says `event`; `parse_event` makes the same event of it."""
    body: dict[str, object] = {"id": event.id, "type": event_type(event)}
    optional: dict[str, object] = {}
    match event:
        case Rating():
            body |= {"response_id": event.response_id, "rating": event.rating}
            optional = {"comment": event.comment}
        case TextRating():
            body |= {
                "prompt": [dict(message) for message in event.prompt],
                "completion": event.completion,
                "rating": event.rating,
            }
            optional = {"comment": event.comment, "model": event.model}
        case Preference():
            if event.prompt is not None:
                body["prompt"] = [dict(message) for message in event.prompt]
            names = ("chosen", "rejected", "chosen_id", "rejected_id", "model")
            optional = {name: getattr(event, name) for name in names}
        case Edit():
            body |= {"response_id": event.response_id, "text": event.text}
        case Withdrawal():
            body["target"] = event.target
    return body | {name: value for name, value in optional.items() if value is not None}


def subject_of(event: FeedbackEvent) -> str:
    """What an event is about: of one source, a later event about the same replaces an earlier one.

    A rating and an edit of one response are about different things. The order of the two texts
    of a preference plays no part, so that a change of mind replaces the first opinion.
    """
    match event:
        case Rating():
            return f"rating:{event.response_id}"
        case TextRating():
            return f"rating-text:{_digest(event.model, event.prompt, event.completion)}"
        case Preference(chosen_id=str() as chosen, rejected_id=str() as rejected):
            return f"preference:{_digest(*sorted((chosen, rejected)))}"
        case Preference():
            texts = sorted((event.chosen or "", event.rejected or ""))
            return f"preference-text:{_digest(event.model, event.prompt, *texts)}"
        case Edit():
            return f"edit:{event.response_id}"
        case Withdrawal():
            return f"withdraw:{event.target}"


def _digest(*parts: object) -> str:
    return hashlib.blake2b(orjson.dumps(parts), digest_size=16).hexdigest()


def _text_rating(event_id: str, fields: _Fields) -> TextRating:
    if not (fields.has("prompt") or fields.has("completion")):
        raise _wrong(
            "response_id",
            "response_id is missing; send the id of the response that is rated, "
            "or prompt and completion",
        )
    return TextRating(
        id=event_id,
        prompt=fields.messages("prompt"),
        completion=fields.text("completion"),
        rating=fields.rating(),
        comment=fields.optional_text("comment", MAX_COMMENT_CHARS),
        model=fields.optional_identifier("model"),
    )


def _preference(event_id: str, fields: _Fields) -> Preference:
    texts = [name for name in ("prompt", "chosen", "rejected", "model") if fields.has(name)]
    ids = [name for name in ("chosen_id", "rejected_id") if fields.has(name)]
    if texts and ids:
        raise _wrong(
            ids[0],
            f"{ids[0]} is given beside {texts[0]}; send either chosen_id and rejected_id, "
            "or prompt, chosen and rejected",
        )
    if ids:
        chosen, rejected = fields.identifier("chosen_id"), fields.identifier("rejected_id")
        if chosen == rejected:
            raise _wrong(
                "rejected_id",
                f"chosen_id and rejected_id are both {_shown(chosen)}; name two responses",
            )
        return Preference(id=event_id, chosen_id=chosen, rejected_id=rejected)
    preference = Preference(
        id=event_id,
        prompt=fields.messages("prompt"),
        chosen=fields.text("chosen"),
        rejected=fields.text("rejected"),
        model=fields.optional_identifier("model"),
    )
    if preference.chosen == preference.rejected:
        raise _wrong(
            "rejected",
            "chosen and rejected are the same text; a preference needs two different ones",
        )
    return preference


class _Fields:
    """The fields of one frame, read by name; a field at null counts as left out."""

    def __init__(self, body: Mapping[str, object]) -> None:
        self._body = body
        self._read: set[str] = set()

    def has(self, name: str) -> bool:
        return self._body.get(name) is not None

    def get(self, name: str) -> object:
        self._read.add(name)
        return self._body.get(name)

    def text(self, name: str, limit: int = MAX_TEXT_CHARS) -> str:
        return _checked_text(name, self.get(name), limit)

    def optional_text(self, name: str, limit: int) -> str | None:
        value = self.get(name)
        # An empty comment says nothing; clients send it when the field was left blank.
        return None if value is None or value == "" else _checked_text(name, value, limit)

    def identifier(self, name: str) -> str:
        value = self.text(name, MAX_ID_CHARS)
        if not value.isprintable():
            raise _wrong(name, f"{name} is {_shown(value)}; use printable characters")
        return value

    def optional_identifier(self, name: str) -> str | None:
        return self.identifier(name) if self.has(name) else None

    def rating(self) -> Literal[1, -1]:
        value = self.get("rating")
        if value is None:
            raise _wrong("rating", "rating is missing; send 1 (good) or -1 (bad)")
        if isinstance(value, bool) or not isinstance(value, int) or value not in (1, -1):
            raise _wrong("rating", f"rating is {_shown(value)}; send 1 (good) or -1 (bad)")
        return cast("Literal[1, -1]", value)

    def messages(self, name: str) -> tuple[Message, ...]:
        value = self.get(name)
        if value is None:
            raise _wrong(name, f"{name} is missing; send a list of messages")
        if not isinstance(value, (list, tuple)) or not value:
            raise _wrong(name, f"{name} must be a list of one or more messages, not {_kind(value)}")
        if len(value) > MAX_MESSAGES:
            raise _wrong(name, f"{name} has {len(value)} messages; send at most {MAX_MESSAGES}")
        return tuple(_message(f"{name}.{i}", message) for i, message in enumerate(value))

    def refuse_others(self, kind: str) -> None:
        """Raise for a field that this type of event does not have."""
        for name, value in self._body.items():
            if name not in self._read and value is not None:
                raise _wrong(
                    str(name), f"{_shown(name)} is no field of a {kind} event; leave it out"
                )


def _message(name: str, value: object) -> Message:
    if not isinstance(value, Mapping):
        raise _wrong(name, f"{name} must be an object with role and content, not {_kind(value)}")
    role = value.get("role")
    if role not in ROLES:
        raise _wrong(f"{name}.role", f"{name}.role is {_shown(role)}; use {', '.join(ROLES)}")
    content = value.get("content")
    if content != "":
        content = _checked_text(f"{name}.content", content, MAX_TEXT_CHARS)
    message: Message = {"role": str(role), "content": content}
    if value.get("name") is not None:
        message["name"] = _checked_text(f"{name}.name", value["name"], MAX_ID_CHARS)
    for field, given in value.items():
        if field not in ("role", "content", "name") and given is not None:
            raise _wrong(f"{name}.{field}", f"{name}.{field} is not supported; leave it out")
    return message


def _checked_text(name: str, value: object, limit: int) -> str:
    if value is None:
        raise _wrong(name, f"{name} is missing; send a text")
    if not isinstance(value, str):
        raise _wrong(name, f"{name} must be a text, not {_kind(value)}")
    if not value:
        raise _wrong(name, f"{name} is empty; send a text")
    if len(value) > limit:
        raise _wrong(name, f"{name} has {len(value)} characters; send at most {limit}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _wrong(name, f"{name} holds half a surrogate pair; send valid Unicode") from None
    return value


def _wrong(param: str, message: str) -> RequestError:
    return RequestError(message, param=param or None, code=INVALID)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 64 else f"{text[:61]}..."


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a text" if value else "an empty text"
        case list() | tuple():
            return "a list" if value else "an empty list"
        case Mapping():
            return "an object"
        case _:
            return type(value).__name__
