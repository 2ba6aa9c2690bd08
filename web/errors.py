"""The one table from our error classes to HTTP statuses and OpenAI error objects."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..runtime.errors import (
    AdapterLoadError,
    ConflictError,
    ContextLengthError,
    CotuneError,
    DrainingError,
    IterationError,
    LearningOffError,
    NotFoundError,
    OverloadedError,
    RequestError,
    StorageError,
    UnavailableError,
)

INVALID = "invalid_request_error"


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a client is told when its request is not answered.

    The body is ``{"error": {"message", "type", "param", "code"}}`` as the OpenAI API has it.
    """

    status: int
    message: str
    type: str = INVALID
    param: str | None = None
    code: str | None = None
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def body(self) -> dict[str, object]:
        """The OpenAI error object."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class RefusalError(Exception):
    """Carries a `Refusal` that no runtime error stands for: transport, routing, keys."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


@dataclass(frozen=True, slots=True)
class _Row:
    status: int
    type: str
    code: str | None


# First match wins, so a class stands above its bases.
_TABLE: tuple[tuple[type[CotuneError], _Row], ...] = (
    (ContextLengthError, _Row(400, INVALID, "context_length_exceeded")),
    (NotFoundError, _Row(404, INVALID, "not_found")),
    (ConflictError, _Row(409, INVALID, "conflict")),
    (LearningOffError, _Row(400, INVALID, "learning_off")),
    (RequestError, _Row(400, INVALID, None)),
    (AdapterLoadError, _Row(400, INVALID, "adapter_not_loaded")),
    (OverloadedError, _Row(429, "rate_limit_error", "overloaded")),
    (StorageError, _Row(503, "service_unavailable_error", "storage_failed")),
    (DrainingError, _Row(503, "service_unavailable_error", "draining")),
    (UnavailableError, _Row(503, "service_unavailable_error", "unavailable")),
    (IterationError, _Row(500, "server_error", "iteration_failed")),
    (CotuneError, _Row(500, "server_error", "internal_error")),
)

INTERNAL = Refusal(
    500,
    "the server failed to answer this request; its log says why",
    "server_error",
    code="internal_error",
)


def refusal_for(error: Exception) -> Refusal:
    """What to tell the client about `error`.

    An error that is not ours tells nothing about itself: the caller logs it, and the client gets
    `INTERNAL`.
    """
    if isinstance(error, RefusalError):
        return error.refusal
    for kind, row in _TABLE:
        if isinstance(error, kind):
            code = error.code or row.code
            if isinstance(error, NotFoundError) and error.param == "model" and not error.code:
                code = "model_not_found"
            return Refusal(
                row.status,
                error.message,
                row.type,
                error.param,
                code,
                _retry_after(error),
            )
    return INTERNAL


def _retry_after(error: CotuneError) -> tuple[tuple[str, str], ...]:
    if not isinstance(error, UnavailableError):
        return ()
    return (("Retry-After", str(max(1, math.ceil(error.retry_after_s)))),)
