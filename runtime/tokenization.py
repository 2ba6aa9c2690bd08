"""Text in, token ids out, and back: the runtime's front door for prompts and chat messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from .detokenizer import IncrementalDetokenizer
from .errors import RequestError
from .token_table import table_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROLES = ("system", "developer", "user", "assistant", "tool")
"""The roles that a message may have. A developer's messages reach the template as the system's."""


class TextCodec:
    """A model's tokenizer and chat template.

    Args:
        tokenizer: a transformers tokenizer. Truncation and padding settings that it may carry are
            switched off: a prompt is encoded whole or refused.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
        self._table = table_of(tokenizer)

    @property
    def vocab_size(self) -> int:
        """Token ids of the tokenizer, added ones included."""
        return len(self.tokenizer)

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` can work."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def encode(
        self, text: str, *, add_special_tokens: bool = True, param: str = "prompt"
    ) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text that UTF-8 can express.
            add_special_tokens: what the tokenizer adds to a text, such as a beginning-of-sequence
                token.
            param: the field's name for errors.

        Raises:
            RequestError: not a string, or it holds half of a surrogate pair.
        """
        if not isinstance(text, str):
            raise RequestError(f"{param} must be a string, not {_kind(text)}", param=param)
        _check_unicode(text, param)
        if self._backend is None:
            return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))
        # Straight to the Rust tokenizer: the wrapper sets truncation on each call, which fails when
        # two threads meet there.
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """The prompt that the model's chat template makes of the messages.

        Raises:
            RequestError: a message is malformed, the model has no chat template, or its template
                refuses the messages (for instance a system message that it has no place for).
        """
        checked = check_messages(messages)
        if not self.has_chat_template:
            raise RequestError(
                "this model has no chat template, so it cannot take messages; send a plain prompt "
                "to completions, or serve a chat model",
                param="messages",
                code="no_chat_template",
            )
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    checked, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            # Templates are programs that come with the model; any of these is its way to say no.
            raise RequestError(
                f"the model's chat template refuses these messages: {error}",
                param="messages",
                code="chat_template_error",
            ) from error

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation, ready for the assistant's turn.

        Args:
            messages: role and content each; content is a text or a list of text parts.
            add_generation_prompt: end with the opening of an assistant's turn.

        Raises:
            RequestError: as `render_chat`; `param` names the message, as in ``messages.2.role``.
        """
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt)
        # The template writes the special tokens itself.
        return self.encode(text, add_special_tokens=False, param="messages")

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence, as the incremental detokenizer gives it."""
        stream = self.detokenizer((), skip_special_tokens=skip_special_tokens)
        return stream.push(token_ids) + stream.finish()

    def detokenizer(
        self, prompt_ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> IncrementalDetokenizer:
        """A detokenizer for an answer to this prompt."""
        return IncrementalDetokenizer(
            self.tokenizer, prompt_ids, skip_special_tokens=skip_special_tokens
        )

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that a token stands for, possibly part of a character."""
        return self._table.pieces[token_id]

    def token_text(self, token_id: int) -> str:
        """A token as text, U+FFFD for what is part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")


def check_messages(messages: object) -> list[dict[str, Any]]:
    """The messages in the form that chat templates expect: role, content as one text, name.

    Parts of a content list are joined by line breaks. ``tool_calls`` and ``tool_call_id`` are
    passed on for templates that know them; other keys are left out.

    Raises:
        RequestError: with the path of the offending field.
    """
    if not isinstance(messages, (list, tuple)):
        raise RequestError(f"messages must be a list, not {_kind(messages)}", param="messages")
    if not messages:
        raise RequestError("messages is empty; send at least one message", param="messages")
    return [_check_message(message, f"messages.{i}") for i, message in enumerate(messages)]


def _check_message(message: object, path: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RequestError(
            f"{path} must be an object with role and content, not {_kind(message)}", param=path
        )
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        shown = "missing" if role is None else f"{role!r:.60}"
        raise RequestError(
            f"{path}.role is {shown}; it must be one of {', '.join(ROLES)}", param=f"{path}.role"
        )
    checked: dict[str, Any] = {"role": "system" if role == "developer" else role}
    tool_calls = message.get("tool_calls")
    if tool_calls is not None:
        if not isinstance(tool_calls, list) or not all(isinstance(c, dict) for c in tool_calls):
            raise RequestError(
                f"{path}.tool_calls must be a list of objects", param=f"{path}.tool_calls"
            )
        if tool_calls:
            checked["tool_calls"] = tool_calls
    content = message.get("content")
    if content is None and role == "assistant" and "tool_calls" in checked:
        content = ""
    checked["content"] = _check_content(content, f"{path}.content")
    for key in ("name", "tool_call_id"):
        value = message.get(key)
        if value is not None:
            if not isinstance(value, str):
                raise RequestError(
                    f"{path}.{key} must be a string, not {_kind(value)}", param=f"{path}.{key}"
                )
            _check_unicode(value, f"{path}.{key}")
            checked[key] = value
    return checked


def _check_content(content: object, path: str) -> str:
    if isinstance(content, str):
        _check_unicode(content, path)
        return content
    if not isinstance(content, (list, tuple)):
        raise RequestError(
            f"{path} must be a string or a list of text parts, not {_kind(content)}", param=path
        )
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict):
            raise RequestError(
                f"{path}.{i} must be an object with type and text, not {_kind(part)}",
                param=f"{path}.{i}",
            )
        if part.get("type") != "text":
            raise RequestError(
                f"{path}.{i}.type is {part.get('type')!r:.60}; only 'text' is supported",
                param=f"{path}.{i}.type",
            )
        text = part.get("text")
        if not isinstance(text, str):
            raise RequestError(
                f"{path}.{i}.text must be a string, not {_kind(text)}", param=f"{path}.{i}.text"
            )
        _check_unicode(text, f"{path}.{i}.text")
        texts.append(text)
    return "\n".join(texts)


def _check_unicode(text: str, param: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{param} holds half of a surrogate pair at character {error.start}, which is not "
            "valid Unicode; send the whole character",
            param=param,
        ) from error


def _kind(value: object) -> str:
    """The JSON name of a value's type."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list() | tuple():
            return "a list"
        case dict():
            return "an object"
        case _:
            return type(value).__name__
