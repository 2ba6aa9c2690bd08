"""What chat and completions answers have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import orjson

from ..runtime.types import BASE, Usage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..runtime.types import AdapterVersion
    from .errors import Refusal

DONE: Final = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Envelope:
    """The fields that are the same in every chunk of an answer, and in the whole of one."""

    id: str
    kind: str
    created: int
    model: str
    adapter_version: AdapterVersion
    service_tier: str | None = None
    """Told where the request named one."""

    def fields(self) -> dict[str, Any]:
        """In the order the OpenAI API sends them."""
        fields: dict[str, Any] = {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
        }
        if self.service_tier is not None:
            fields["service_tier"] = self.service_tier
        fields["system_fingerprint"] = fingerprint(self.adapter_version)
        return fields

    def chunk_head(self) -> bytes:
        """An event's bytes up to and including ``"choices":[``."""
        return b"data: " + orjson.dumps(self.fields())[:-1] + b',"choices":['


def fingerprint(version: AdapterVersion) -> str:
    """`system_fingerprint`: which weights wrote an answer."""
    return "cotune-base" if version == BASE else str(version)


def total_usage(usages: Sequence[Usage]) -> Usage:
    """The sum over several prompts."""
    return Usage(
        sum(usage.prompt_tokens for usage in usages),
        sum(usage.completion_tokens for usage in usages),
        sum(usage.cached_tokens for usage in usages),
    )


def usage_body(usage: Usage) -> dict[str, Any]:
    """The `usage` object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def usage_bytes(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> bytes:
    """The same object as JSON, quickly: continuous usage sends one per token."""
    return (
        b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d,'
        b'"prompt_tokens_details":{"cached_tokens":%d}}'
        % (prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, cached_tokens)
    )


def error_event(refusal: Refusal) -> bytes:
    """An event that ends a stream whose answer failed half-way."""
    return b"data: " + orjson.dumps(refusal.body) + b"\n\n"
