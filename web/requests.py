"""Bodies of requests: bytes to frozen values, or one `RequestError` that names the field.

This is the only place where the web layer validates. Three rules decide about a field:

- *understood*: its type and range are checked, and `null` means that it was left out;
- *refused*: we know it and know that ignoring it would change the answer that its caller wants
  (tools, JSON mode, beam search ...), so it gets a 400 unless its value asks for nothing;
- *ignored*: all others, as vLLM does, with a line in the debug log. Clients send hints that belong
  to other services (`metadata`, `verbosity` ...), and a server that refuses them helps
  nobody.

Of a name that stands twice in one JSON object the last counts, as in most JSON readers.
"""

from __future__ import annotations

import logging
import math
import re
import reprlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import orjson

from ..runtime.errors import ContextLengthError, RequestError
from ..runtime.types import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_STRINGS,
    Message,
    SamplingParams,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..runtime.types import RequestClass
    from .settings import ServerSettings

T = TypeVar("T")

logger = logging.getLogger(__name__)

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
COMPLETION_MAX_TOKENS: Final = 16
"""What a completions request without `max_tokens` gets, as in the OpenAI API and vLLM."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_INT_LIMIT: Final = 2**31
_MAX_NAME_CHARS: Final = 256
_MAX_PATH_CHARS: Final = 4096
MAX_SOURCE_CHARS: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """Whether and how an answer is streamed."""

    stream: bool = False
    include_usage: bool = False
    """Send a last chunk with the token counts and no choices."""
    continuous_usage: bool = False
    """vLLM's `continuous_usage_stats`: the counts so far, in every chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """What chat and completions requests share."""

    model: str | None
    params: SamplingParams
    streaming: StreamOptions
    priority: int = 0
    request_class: RequestClass = "interactive"
    """`request_class`, else what `service_tier` says: "flex" is "batch"."""
    names_service_tier: bool = False
    """Whether `service_tier` was given, so that the answer says which it got."""
    request_id: str | None = None
    return_token_ids: bool = False
    """vLLM's: put token ids beside the text."""
    tokens_as_ids: bool = False
    """vLLM's `return_tokens_as_token_ids`: logprobs name tokens ``token_id:N``."""
    prompt_logprobs: int | None = None
    """vLLM's: alternatives wanted for every prompt token, reported beside the answer."""
    record: bool | None = None
    """`store`: keep the answer so that feedback can name it; None is as the server is set."""
    source: str | None = None
    """`safety_identifier`, or its older name `user`: whose request it is."""

    @property
    def service_tier(self) -> str | None:
        """The tier that the answer names; None where the request named none."""
        if not self.names_service_tier:
            return None
        return "flex" if self.request_class == "batch" else "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest(GenerateRequest):
    """A body of /v1/chat/completions."""

    messages: tuple[Message, ...]
    add_generation_prompt: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest(GenerateRequest):
    """A body of /v1/completions. Each prompt is a text or its token ids."""

    prompts: tuple[str | tuple[int, ...], ...]
    echo: bool = False
    add_special_tokens: bool = True
    """vLLM's: let the tokenizer add to a text what it adds (a beginning-of-sequence token)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeRequest:
    """A body of /tokenize: a text or a conversation."""

    model: str | None
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DetokenizeRequest:
    """A body of /detokenize."""

    model: str | None
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadAdapterRequest:
    """A body of /v1/load_lora_adapter."""

    name: str
    path: str
    in_place: bool = False
    """The name may be taken already; its new version then goes live."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadAdapterRequest:
    """A body of /v1/unload_lora_adapter."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PromoteRequest:
    """A body of /v1/adapters/VERSION/promote; an empty one is all defaults."""

    force: bool = False
    """Also a version that the gate has refused."""


def parse_json(body: bytes | str, *, what: str = "the body") -> dict[str, Any]:
    """The JSON object in a body (or in `what`). Raises `RequestError` for anything else."""
    return as_object(_load(body, what), what=what)


def as_object(value: object, *, what: str) -> dict[str, Any]:
    """`value`, which must be a JSON object."""
    if not isinstance(value, dict):
        raise RequestError(f"{what} must be a JSON object, not {_kind(value)}", code="invalid_json")
    return value


def parse_feedback(body: bytes, settings: ServerSettings) -> dict[str, Any] | list[object]:
    """Read a body of /v1/feedback: one event, or a list of what should be events."""
    value = _load(body, "the body")
    if not isinstance(value, list):
        return as_object(value, what="the body")
    if not value:
        raise RequestError("the list of events is empty; send at least one", code="invalid_json")
    if len(value) > settings.max_feedback_events:
        raise RequestError(
            f"the list has {len(value)} events; this server takes at most "
            f"{settings.max_feedback_events} in one request",
            code="too_many_events",
        )
    return value


def parse_promote(body: bytes) -> PromoteRequest:
    """Read a body of /v1/adapters/VERSION/promote, which may be empty."""
    if not body.strip():
        return PromoteRequest()
    fields = _Fields(parse_json(body))
    request = PromoteRequest(force=fields.boolean("force", False))
    fields.log_ignored()
    return request


def parse_source(value: str, *, param: str) -> str:
    """Check the name of who gives feedback. Quotas, weights and deletion go by it."""
    if not 0 < len(value) <= MAX_SOURCE_CHARS or not value.isprintable():
        raise RequestError(
            f"{param} is {_show(value)}; use 1 to {MAX_SOURCE_CHARS} printable characters",
            param=param,
        )
    return value


def _load(data: bytes | str, what: str) -> object:
    if not data.strip():
        raise RequestError(f"{what} is empty; send a JSON object", code="invalid_json")
    try:
        value: object = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise RequestError(
            f"{what} is not valid JSON: {error}; send JSON in UTF-8", code="invalid_json"
        ) from None
    return value


def parse_chat(body: Mapping[str, Any], settings: ServerSettings) -> ChatRequest:
    """Read a body of /v1/chat/completions."""
    fields = _Fields(body)
    fields.refuse(_REFUSED | _REFUSED_IN_CHAT)
    _check_response_format(fields)
    streaming = _stream_options(fields)
    messages = _messages(fields, settings)
    wants_logprobs = fields.boolean("logprobs", False)
    top_logprobs = fields.optional_integer("top_logprobs", 0, MAX_LOGPROBS)
    if top_logprobs and not wants_logprobs:
        raise RequestError(
            f'top_logprobs is {top_logprobs} but logprobs is off; set "logprobs": true',
            param="top_logprobs",
        )
    max_tokens = fields.optional_integer("max_tokens", 0, _INT_LIMIT)
    max_tokens_field = "max_tokens"
    if (newer := fields.optional_integer("max_completion_tokens", 0, _INT_LIMIT)) is not None:
        max_tokens, max_tokens_field = newer, "max_completion_tokens"
    prompt_logprobs = _prompt_logprobs(fields, streaming)
    request = ChatRequest(
        model=fields.string("model", _MAX_NAME_CHARS),
        messages=messages,
        params=_sampling(
            fields,
            settings,
            max_tokens=max_tokens,
            max_tokens_field=max_tokens_field,
            logprobs=(top_logprobs or 0) if wants_logprobs else None,
            prompt_logprobs=prompt_logprobs,
        ),
        streaming=streaming,
        priority=_priority(fields),
        request_class=_request_class(fields),
        names_service_tier=fields.get("service_tier") is not None,
        request_id=_request_id(fields),
        return_token_ids=fields.boolean("return_token_ids", False),
        tokens_as_ids=fields.boolean("return_tokens_as_token_ids", False),
        prompt_logprobs=prompt_logprobs,
        record=_record(fields),
        source=_source(fields),
        add_generation_prompt=fields.boolean("add_generation_prompt", True),
    )
    fields.log_ignored()
    return request


def parse_completion(
    body: Mapping[str, Any], settings: ServerSettings, *, max_model_len: int | None = None
) -> CompletionRequest:
    """Read a body of /v1/completions.

    Args:
        body: the JSON object.
        settings: its limits.
        max_model_len: prompts of more token ids are refused before they are looked through.
    """
    fields = _Fields(body)
    fields.refuse(_REFUSED | _REFUSED_IN_COMPLETIONS)
    _check_response_format(fields)
    streaming = _stream_options(fields)
    prompts = _prompts(fields, settings, max_model_len)
    echo = fields.boolean("echo", False)
    logprobs = fields.optional_integer("logprobs", 0, MAX_LOGPROBS)
    max_tokens = fields.optional_integer("max_tokens", 0, _INT_LIMIT)
    if max_tokens is None and "max_tokens" not in body:
        max_tokens = COMPLETION_MAX_TOKENS
    prompt_logprobs = _prompt_logprobs(fields, streaming)
    # With `echo` the prompt's log-probabilities are part of the answer's; and an answer of no
    # tokens is a pass over the prompt alone.
    needed = prompt_logprobs
    if echo and logprobs is not None:
        needed = max(logprobs, needed or 0)
    elif echo and max_tokens == 0:
        needed = needed or 0
    request = CompletionRequest(
        model=fields.string("model", _MAX_NAME_CHARS),
        prompts=prompts,
        echo=echo,
        add_special_tokens=fields.boolean("add_special_tokens", True),
        params=_sampling(
            fields,
            settings,
            max_tokens=max_tokens,
            max_tokens_field="max_tokens",
            logprobs=logprobs,
            prompt_logprobs=needed,
        ),
        streaming=streaming,
        priority=_priority(fields),
        request_class=_request_class(fields),
        names_service_tier=fields.get("service_tier") is not None,
        request_id=_request_id(fields),
        return_token_ids=fields.boolean("return_token_ids", False),
        tokens_as_ids=fields.boolean("return_tokens_as_token_ids", False),
        prompt_logprobs=prompt_logprobs,
        record=_record(fields),
        source=_source(fields),
    )
    best_of = fields.optional_integer("best_of", 1, _INT_LIMIT)
    if best_of is not None and best_of != request.params.n:
        raise RequestError(
            f"best_of is {best_of} and n is {request.params.n}; choosing the best of more "
            "completions than are returned is not supported, leave best_of out",
            param="best_of",
            code="unsupported_parameter",
        )
    fields.log_ignored()
    return request


def parse_tokenize(body: Mapping[str, Any], settings: ServerSettings) -> TokenizeRequest:
    """Read a body of /tokenize."""
    fields = _Fields(body)
    fields.refuse(_REFUSED_IN_TOKENIZE)
    prompt = fields.string("prompt", None, empty=True)
    messages = _messages(fields, settings) if body.get("messages") is not None else None
    if (prompt is None) == (messages is None):
        raise RequestError(
            'give either "prompt" (a string) or "messages" (a conversation)', param="prompt"
        )
    request = TokenizeRequest(
        model=fields.string("model", _MAX_NAME_CHARS),
        prompt=prompt,
        messages=messages,
        add_special_tokens=fields.boolean("add_special_tokens", True),
        add_generation_prompt=fields.boolean("add_generation_prompt", True),
        return_token_strs=fields.boolean("return_token_strs", False),
    )
    fields.log_ignored()
    return request


def parse_detokenize(body: Mapping[str, Any], vocab_size: int) -> DetokenizeRequest:
    """Read a body of /detokenize."""
    fields = _Fields(body)
    tokens = _token_ids("tokens", fields.required("tokens"))
    if tokens and max(tokens) >= vocab_size:
        i = next(i for i, token in enumerate(tokens) if token >= vocab_size)
        raise RequestError(
            f"tokens.{i} is {tokens[i]}; token ids of this model are 0 to {vocab_size - 1}",
            param=f"tokens.{i}",
        )
    request = DetokenizeRequest(model=fields.string("model", _MAX_NAME_CHARS), tokens=tokens)
    fields.log_ignored()
    return request


def parse_load_adapter(body: Mapping[str, Any]) -> LoadAdapterRequest:
    """Read a body of /v1/load_lora_adapter."""
    fields = _Fields(body)
    name = _adapter_name(fields)
    fields.required("lora_path")
    path = fields.string("lora_path", _MAX_PATH_CHARS)
    assert path is not None
    if "\0" in path:
        raise RequestError("lora_path holds a NUL character; give a path", param="lora_path")
    request = LoadAdapterRequest(
        name=name, path=path, in_place=fields.boolean("load_inplace", False)
    )
    fields.log_ignored()
    return request


def parse_unload_adapter(body: Mapping[str, Any]) -> UnloadAdapterRequest:
    """Read a body of /v1/unload_lora_adapter."""
    fields = _Fields(body)
    request = UnloadAdapterRequest(name=_adapter_name(fields))
    fields.log_ignored()
    return request


def parse_request_id(value: str, *, param: str) -> str:
    """Check an id that a client chose. It ends up in headers, logs and feedback."""
    if not _REQUEST_ID.fullmatch(value):
        raise RequestError(
            f"{param} is {_show(value)}; use 1 to 128 letters, digits and . _ : / + = @ -",
            param=param,
        )
    return value


# Values that ask for nothing; any other is refused.
_REFUSED: Final[dict[str, tuple[object, ...]]] = {
    "use_beam_search": (None, False),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "truncate_prompt_tokens": (None,),
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "logprob_token_ids": (None,),
    "logits_processors": (None, []),
    "thinking_token_budget": (None,),
}
_REFUSED_IN_CHAT: Final[dict[str, tuple[object, ...]]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, [], ["text"]),
    "audio": (None,),
    "web_search_options": (None,),
    "continue_final_message": (None, False),
    "echo": (None, False),
    "documents": (None, []),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "add_special_tokens": (None, False),
}
_REFUSED_IN_COMPLETIONS: Final[dict[str, tuple[object, ...]]] = {
    "suffix": (None, ""),
    "prompt_embeds": (None,),
}
_REFUSED_IN_TOKENIZE: Final[dict[str, tuple[object, ...]]] = {
    "continue_final_message": (None, False),
    "tools": (None, []),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
}


_CLASS_OF_TIER: Final[dict[str, RequestClass]] = {
    "auto": "interactive",
    "default": "interactive",
    "priority": "interactive",
    "flex": "batch",
}
_CLASSES: Final[dict[str, RequestClass]] = {"interactive": "interactive", "batch": "batch"}


class _Fields:
    """Reads typed fields out of a JSON object and remembers which were asked for."""

    def __init__(self, body: Mapping[str, Any], prefix: str = "") -> None:
        self._body = body
        self._prefix = prefix
        self._known: set[str] = set()

    def get(self, name: str) -> Any:
        """The raw value; None if it is null or absent."""
        self._known.add(name)
        return self._body.get(name)

    def required(self, name: str) -> Any:
        """The raw value, which must be there."""
        value = self.get(name)
        if value is None:
            raise RequestError(f"{self._prefix}{name} is missing", param=self._prefix + name)
        return value

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        """An integer from `low` to `high`."""
        value = self.optional_integer(name, low, high)
        return default if value is None else value

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        """An integer from `low` to `high`, or None."""
        value = self.get(name)
        if value is None:
            return None
        # A JSON integer of more than 64 bits arrives as a float, and is out of range anyway.
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(name, value, "an integer")
        if not low <= value <= high:
            raise RequestError(
                f"{self._prefix}{name} is {value}; it must be from {low} to {high}",
                param=self._prefix + name,
            )
        if not isinstance(value, int):
            raise self._wrong(name, value, "an integer")
        return value

    def number(self, name: str) -> float | None:
        """A finite number."""
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(name, value, "a number")
        if not math.isfinite(value):
            raise self._wrong(name, value, "a finite number")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def string(self, name: str, max_chars: int | None, *, empty: bool = False) -> str | None:
        """A string of at most `max_chars` characters."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self._wrong(name, value, "a string")
        if not value and not empty:
            raise RequestError(
                f"{self._prefix}{name} is an empty string; give one, or leave it out",
                param=self._prefix + name,
            )
        if max_chars is not None and len(value) > max_chars:
            raise RequestError(
                f"{self._prefix}{name} has {len(value)} characters; at most {max_chars}",
                param=self._prefix + name,
            )
        return value

    def choice(self, name: str, meanings: Mapping[str, T]) -> T | None:
        """What one of the words in `meanings` stands for."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, str) or value not in meanings:
            raise RequestError(
                f"{self._prefix}{name} is {_show(value)}; it must be one of {', '.join(meanings)}",
                param=self._prefix + name,
            )
        return meanings[value]

    def refuse(self, fields: Mapping[str, tuple[object, ...]]) -> None:
        """Raise for a field that is not supported, unless its value asks for nothing."""
        for name, harmless in fields.items():
            value = self.get(name)
            if value not in harmless:
                raise RequestError(
                    f"{self._prefix}{name} is not supported by this server; leave it out",
                    param=self._prefix + name,
                    code="unsupported_parameter",
                )

    def log_ignored(self) -> None:
        """Say in the debug log which fields had no effect."""
        if logger.isEnabledFor(logging.DEBUG) and (extra := self._body.keys() - self._known):
            logger.debug("ignored fields: %s", _show(sorted(extra)))

    def _wrong(self, name: str, value: object, wanted: str) -> RequestError:
        return RequestError(
            f"{self._prefix}{name} must be {wanted}, not {_kind(value)} ({_show(value)})",
            param=self._prefix + name,
        )


def _sampling(
    fields: _Fields,
    settings: ServerSettings,
    *,
    max_tokens: int | None,
    max_tokens_field: str,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    if max_tokens == 0 and prompt_logprobs is None:
        raise RequestError(
            f"{max_tokens_field} is 0; ask for at least 1 token (0 is for scoring a prompt: "
            "completions with echo, or prompt_logprobs)",
            param=max_tokens_field,
        )
    n = fields.integer("n", 1, 1, settings.max_n)
    min_tokens = fields.integer("min_tokens", 0, 0, _INT_LIMIT)
    params = SamplingParams(
        n=n,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=fields.number("temperature"),
        top_p=fields.number("top_p"),
        top_k=fields.optional_integer("top_k", -1, _INT_LIMIT),
        min_p=fields.number("min_p"),
        repetition_penalty=fields.number("repetition_penalty"),
        presence_penalty=fields.number("presence_penalty") or 0.0,
        frequency_penalty=fields.number("frequency_penalty") or 0.0,
        logit_bias=_logit_bias(fields),
        seed=fields.optional_integer("seed", -(2**63), 2**63 - 1),
        stop=_stop(fields),
        stop_token_ids=_token_ids("stop_token_ids", fields.get("stop_token_ids") or []),
        include_stop_str_in_output=fields.boolean("include_stop_str_in_output", False),
        ignore_eos=fields.boolean("ignore_eos", False),
        skip_special_tokens=fields.boolean("skip_special_tokens", True),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    params.validate()
    return params


def _logit_bias(fields: _Fields) -> dict[int, float]:
    value = fields.get("logit_bias")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RequestError(
            f"logit_bias must be an object of token id to bias, not {_kind(value)}",
            param="logit_bias",
        )
    if len(value) > MAX_LOGIT_BIAS:
        raise RequestError(
            f"logit_bias has {len(value)} entries; at most {MAX_LOGIT_BIAS}", param="logit_bias"
        )
    biases: dict[int, float] = {}
    for key, bias in value.items():
        # isdecimal() alone would let other scripts' digits and endless numbers through.
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise RequestError(
                f"logit_bias has the key {_show(key)}; keys are token ids", param="logit_bias"
            )
        if isinstance(bias, bool) or not isinstance(bias, (int, float)):
            raise RequestError(
                f"logit_bias.{key} must be a number, not {_kind(bias)}", param=f"logit_bias.{key}"
            )
        biases[int(key)] = float(bias)
    return biases


def _stop(fields: _Fields) -> tuple[str, ...]:
    value = fields.get("stop")
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise RequestError(
            f"stop must be a string or a list of strings, not {_kind(value)}", param="stop"
        )
    if len(value) > MAX_STOP_STRINGS:
        raise RequestError(
            f"stop has {len(value)} strings; at most {MAX_STOP_STRINGS}", param="stop"
        )
    for i, text in enumerate(value):
        if not isinstance(text, str):
            raise RequestError(f"stop.{i} must be a string, not {_kind(text)}", param=f"stop.{i}")
    return tuple(value)


def _token_ids(name: str, value: object, limit: int | None = None) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise RequestError(f"{name} must be a list of token ids, not {_kind(value)}", param=name)
    if limit is not None and len(value) > limit:
        raise ContextLengthError(
            f"{name} has {len(value)} tokens, and the context length is {limit}; send fewer",
            param=name,
        )
    # A million of them are looked through in C; which one is wrong is found out only if one is.
    if not value or (
        set(map(type, value)) == {int} and min(value) >= 0 and max(value) < _INT_LIMIT
    ):
        return tuple(value)
    i, token = next(
        (i, token)
        for i, token in enumerate(value)
        if type(token) is not int or not 0 <= token < _INT_LIMIT
    )
    raise RequestError(
        f"{name}.{i} is {_show(token)}; a token id is an integer from 0", param=f"{name}.{i}"
    )


def _prompts(
    fields: _Fields, settings: ServerSettings, max_model_len: int | None
) -> tuple[str | tuple[int, ...], ...]:
    """A string, a list of strings, a list of token ids, or a list of such lists."""
    value = fields.required("prompt")
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise RequestError(
            "prompt must be a string, a list of strings, a list of token ids or a list of such "
            f"lists, not {_kind(value)}",
            param="prompt",
        )
    if not value:
        raise RequestError("prompt is an empty list; give at least one prompt", param="prompt")
    if not isinstance(value[0], (str, list)):
        return (_token_ids("prompt", value, max_model_len),)
    if len(value) > settings.max_prompts:
        raise RequestError(
            f"prompt has {len(value)} prompts; this server takes at most {settings.max_prompts} "
            "in one request",
            param="prompt",
        )
    prompts: list[str | tuple[int, ...]] = []
    for i, prompt in enumerate(value):
        if isinstance(value[0], str):
            if not isinstance(prompt, str):
                raise RequestError(
                    f"prompt.{i} must be a string like prompt.0, not {_kind(prompt)}",
                    param=f"prompt.{i}",
                )
            prompts.append(prompt)
            continue
        ids = _token_ids(f"prompt.{i}", prompt, max_model_len)
        if not ids:
            raise RequestError(f"prompt.{i} is empty; give token ids", param=f"prompt.{i}")
        prompts.append(ids)
    return tuple(prompts)


def _messages(fields: _Fields, settings: ServerSettings) -> tuple[Message, ...]:
    value = fields.required("messages")
    if not isinstance(value, list):
        raise RequestError(f"messages must be a list, not {_kind(value)}", param="messages")
    if not value:
        raise RequestError("messages is empty; give at least one message", param="messages")
    if len(value) > settings.max_messages:
        raise RequestError(
            f"messages has {len(value)} messages; this server takes at most "
            f"{settings.max_messages}",
            param="messages",
        )
    return tuple(_message(f"messages.{i}", message) for i, message in enumerate(value))


def _message(where: str, value: object) -> Message:
    if not isinstance(value, dict):
        raise RequestError(f"{where} must be an object, not {_kind(value)}", param=where)
    fields = _Fields(value, f"{where}.")
    fields.refuse({"tool_calls": (None, []), "function_call": (None,), "audio": (None,)})
    role = fields.required("role")
    if role not in ROLES:
        raise RequestError(
            f"{where}.role is {_show(role)}; it must be one of {', '.join(ROLES)}",
            param=f"{where}.role",
        )
    # "developer" is the OpenAI API's newer word; chat templates know "system".
    message = Message(
        role="system" if role == "developer" else role, content=_content(where, fields)
    )
    if (name := fields.string("name", _MAX_NAME_CHARS)) is not None:
        message["name"] = name
    return message


def _content(where: str, fields: _Fields) -> str:
    """A message's text. Text parts are joined with line breaks, as vLLM joins them."""
    value = fields.required("content")
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RequestError(
            f"{where}.content must be a string or a list of text parts, not {_kind(value)}",
            param=f"{where}.content",
        )
    texts: list[str] = []
    for i, part in enumerate(value):
        name = f"{where}.content.{i}"
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise RequestError(f"{name} must be an object, not {_kind(part)}", param=name)
        kind = part.get("type", "text")
        if kind != "text":
            raise RequestError(
                f"{name}.type is {_show(kind)}; this server reads text only",
                param=f"{name}.type",
            )
        text = part.get("text")
        if not isinstance(text, str):
            raise RequestError(
                f"{name}.text must be a string, not {_kind(text)}", param=f"{name}.text"
            )
        texts.append(text)
    return "\n".join(texts)


def _stream_options(fields: _Fields) -> StreamOptions:
    stream = fields.boolean("stream", False)
    value = fields.get("stream_options")
    if value is None:
        return StreamOptions(stream=stream)
    if not isinstance(value, dict):
        raise RequestError(
            f"stream_options must be an object, not {_kind(value)}", param="stream_options"
        )
    if not stream:
        raise RequestError(
            'stream_options is only for streams; set "stream": true or leave it out',
            param="stream_options",
        )
    options = _Fields(value, "stream_options.")
    include_usage = options.boolean("include_usage", False)
    return StreamOptions(
        stream=True,
        include_usage=include_usage,
        continuous_usage=options.boolean("continuous_usage_stats", False) and include_usage,
    )


def _prompt_logprobs(fields: _Fields, streaming: StreamOptions) -> int | None:
    value = fields.optional_integer("prompt_logprobs", 0, MAX_LOGPROBS)
    if value is not None and streaming.stream:
        raise RequestError(
            "prompt_logprobs is not available in a stream; leave out one of the two",
            param="prompt_logprobs",
        )
    return value


def _check_response_format(fields: _Fields) -> None:
    value = fields.get("response_format")
    if value is None:
        return
    if not isinstance(value, dict):
        raise RequestError(
            f"response_format must be an object, not {_kind(value)}", param="response_format"
        )
    if (kind := value.get("type")) != "text":
        raise RequestError(
            f"response_format.type is {_show(kind)}; this server writes free text only, leave "
            "response_format out",
            param="response_format.type",
            code="unsupported_parameter",
        )


def _priority(fields: _Fields) -> int:
    return fields.integer("priority", 0, -_INT_LIMIT, _INT_LIMIT)


def _request_class(fields: _Fields) -> RequestClass:
    """Ours is the more specific, so it wins; the tier is checked all the same."""
    tier = fields.choice("service_tier", _CLASS_OF_TIER)
    given = fields.choice("request_class", _CLASSES)
    return given or tier or "interactive"


def _record(fields: _Fields) -> bool | None:
    return None if fields.get("store") is None else fields.boolean("store", True)


def _source(fields: _Fields) -> str | None:
    """The newer name wins; an empty string is what some clients send for nobody."""
    source: str | None = None
    for name in ("user", "safety_identifier"):
        if value := fields.string(name, MAX_SOURCE_CHARS, empty=True):
            source = parse_source(value, param=name)
    return source


def _request_id(fields: _Fields) -> str | None:
    value = fields.string("request_id", None)
    return None if value is None else parse_request_id(value, param="request_id")


def _adapter_name(fields: _Fields) -> str:
    fields.required("lora_name")
    name = fields.string("lora_name", _MAX_NAME_CHARS)
    assert name is not None
    if "@" in name or not name.isprintable() or name != name.strip():
        raise RequestError(
            f"lora_name is {_show(name)}; use a printable name without '@' (it marks versions) and "
            "without spaces around it",
            param="lora_name",
        )
    return name


_KINDS: Final = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def _kind(value: object) -> str:
    return _KINDS.get(type(value), type(value).__name__)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60


def _show(value: object | Sequence[object]) -> str:
    """A value for a message: never long, whatever the client sent."""
    return _short.repr(value)
