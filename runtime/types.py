"""The values that callers hand in and get back. All frozen; none knows about tensors.

Token ids are plain ints, times are seconds of `time.monotonic()`, log-probabilities are natural.
"""

from __future__ import annotations

import math
from collections.abc import Mapping  # noqa: TC003 - dataclass fields are inspected at run time
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from .errors import RequestError

if TYPE_CHECKING:
    from ..policy.types import RequestClass as RequestClass

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
MAX_LOGIT_BIAS = 1024
MAX_SEED = 2**63 - 1


class Message(TypedDict, total=False):
    """One chat message: a role (system, user, assistant, tool) and its text."""

    role: str
    content: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens. A field left at None takes the model's own default.

    The model's defaults come from its ``generation_config.json``; where that is silent the values
    in parentheses hold. Names and meanings are those of the OpenAI API and of vLLM.
    """

    n: int = 1
    """Completions per prompt; siblings share the prompt's KV pages. 1..128."""
    max_tokens: int | None = None
    """Most tokens to generate (the rest of the context). 0 only with `prompt_logprobs`."""
    min_tokens: int = 0
    """No end-of-sequence or stop token is chosen, and no stop string ends the text, before this."""
    temperature: float | None = None
    """0 is greedy; otherwise logits are divided by it (1.0). 0..100."""
    top_p: float | None = None
    """Keep the smallest set of tokens whose probability reaches this (1.0). (0, 1]."""
    top_k: int | None = None
    """Keep the k most likely tokens; 0 or -1 keeps all (0)."""
    min_p: float | None = None
    """Keep tokens at least this share as likely as the most likely one (0.0). [0, 1]."""
    repetition_penalty: float | None = None
    """Divides (positive) or multiplies (negative) logits of tokens in prompt or answer (1.0)."""
    presence_penalty: float = 0.0
    """Subtracted once from logits of tokens already in the answer. -2..2."""
    frequency_penalty: float = 0.0
    """Subtracted per occurrence from logits of tokens already in the answer. -2..2."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logit of each token id. Values -100..100."""
    seed: int | None = None
    """Makes this request's draws reproducible whatever else is in the batch."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings; found across token boundaries."""
    stop_token_ids: tuple[int, ...] = ()
    """The answer ends at any of these tokens."""
    include_stop_str_in_output: bool = False
    """Keep the matched stop string in the text."""
    ignore_eos: bool = False
    """Go on past the model's end-of-sequence tokens."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    logprobs: int | None = None
    """None: off. k: report each chosen token's log-probability and the k best alternatives."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens (from the second one on)."""

    def validate(self, *, vocab_size: int | None = None) -> None:
        """Raise `RequestError` naming the field, its value and the remedy."""
        _check_int("n", self.n, 1, MAX_N)
        if self.max_tokens is not None:
            _check_int(
                "max_tokens", self.max_tokens, 0 if self.prompt_logprobs is not None else 1, 2**31
            )
        _check_int("min_tokens", self.min_tokens, 0, 2**31)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}; "
                "lower min_tokens or raise max_tokens",
                param="min_tokens",
            )
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_float("top_p", self.top_p, 0.0, 1.0, open_low=True)
        if self.top_k is not None:
            _check_int("top_k", self.top_k, -1, 2**31)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _check_int("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError(
                f"logit_bias has {len(self.logit_bias)} entries; at most {MAX_LOGIT_BIAS}",
                param="logit_bias",
            )
        for token, bias in self.logit_bias.items():
            _check_token(f"logit_bias.{token}", token, vocab_size)
            _check_float(f"logit_bias.{token}", bias, -100.0, 100.0)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(
                f"stop has {len(self.stop)} strings; at most {MAX_STOP_STRINGS}", param="stop"
            )
        for i, text in enumerate(self.stop):
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARS:
                raise RequestError(
                    f"stop[{i}] must be a string of 1 to {MAX_STOP_CHARS} characters",
                    param=f"stop.{i}",
                )
        if len(self.stop_token_ids) > MAX_STOP_STRINGS:
            raise RequestError(
                f"stop_token_ids has {len(self.stop_token_ids)} ids; at most {MAX_STOP_STRINGS}",
                param="stop_token_ids",
            )
        for i, token in enumerate(self.stop_token_ids):
            _check_token(f"stop_token_ids.{i}", token, vocab_size)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _check_int(name, value, 0, MAX_LOGPROBS)

    def resolve(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """A copy in which every None that has a default takes it.

        Args:
            defaults: field name to value, as read from ``generation_config.json``. Unknown names
                are ignored.
        """
        changes: dict[str, Any] = {}
        for name, fallback in _FALLBACKS.items():
            if getattr(self, name) is None:
                value = defaults.get(name)
                changes[name] = fallback if value is None else value
        if not changes:
            return self
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return SamplingParams(**{**values, **changes})


_FALLBACKS: dict[str, float | int] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be an integer, not {value!r}", param=name)
    if not low <= value <= high:
        raise RequestError(f"{name} is {value}; it must be from {low} to {high}", param=name)


def _check_float(
    name: str, value: object, low: float, high: float, *, open_low: bool = False
) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RequestError(f"{name} must be a number, not {value!r}", param=name)
    if not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
        low_text = f"above {low:g}" if open_low else f"from {low:g}"
        raise RequestError(f"{name} is {value}; it must be {low_text} to {high:g}", param=name)


def _check_token(name: str, token: object, vocab_size: int | None) -> None:
    if isinstance(token, bool) or not isinstance(token, int):
        raise RequestError(f"{name}: a token id must be an integer, not {token!r}", param=name)
    if token < 0 or (vocab_size is not None and token >= vocab_size):
        limit = "" if vocab_size is None else f" to {vocab_size - 1}"
        raise RequestError(f"{name}: token id {token} is not from 0{limit}", param=name)


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """The weights that answer: a name and the counter of its published versions.

    The base model is ``AdapterVersion("", 0)``. Written as ``name@version``; the base as ``base``.
    """

    name: str
    version: int

    def __str__(self) -> str:
        return f"{self.name}@{self.version}" if self.name else "base"


BASE = AdapterVersion("", 0)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's log-probability and the most likely alternatives at its position.

    `top` holds (token id, log-probability), best first; it has as many entries as were asked for
    and does not always contain the chosen token. `rank` is 1 for the most likely token.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request. `cached_tokens` of the prompt came from the prefix trie."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt plus completion."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timings:
    """When things happened to one completion, in seconds.

    `queue_s` is arrival to first scheduled, `ttft_s` arrival to first token, `tbt_s` the gaps
    between successive tokens, `e2e_s` arrival to finish.
    """

    queue_s: float
    ttft_s: float | None
    tbt_s: tuple[float, ...]
    e2e_s: float


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of one completion, as it is produced.

    `text` never ends in half a character and may be empty while one is held back. The last delta
    of a completion has a `finish_reason`; `stop_reason` is then the stop string or token that
    ended it, or None for the model's own end-of-sequence token.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One finished completion.

    `id` names this completion for feedback: the request's id, followed by ``:index`` when n > 1.
    `prompt_logprobs` has one entry per prompt token, None for the first.
    """

    id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None
    usage: Usage
    model: str
    adapter_version: AdapterVersion
    timings: Timings
    prompt_token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
