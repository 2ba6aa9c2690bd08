from __future__ import annotations

import inspect

import pytest

from cotune.runtime import errors as runtime_errors
from cotune.runtime.errors import (
    AdapterLoadError,
    ConfigError,
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
)
from cotune.web.errors import INTERNAL, Refusal, RefusalError, refusal_for


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (RequestError("x", param="n"), 400, "invalid_request_error", None),
        (RequestError("x", code="own"), 400, "invalid_request_error", "own"),
        (ContextLengthError("x"), 400, "invalid_request_error", "context_length_exceeded"),
        (NotFoundError("x", param="model"), 404, "invalid_request_error", "model_not_found"),
        (NotFoundError("x"), 404, "invalid_request_error", "not_found"),
        (ConflictError("x"), 409, "invalid_request_error", "conflict"),
        (ConflictError("x", code="id_reused"), 409, "invalid_request_error", "id_reused"),
        (LearningOffError("x"), 400, "invalid_request_error", "learning_off"),
        (StorageError("x"), 503, "service_unavailable_error", "storage_failed"),
        (AdapterLoadError("x"), 400, "invalid_request_error", "adapter_not_loaded"),
        (OverloadedError("x"), 429, "rate_limit_error", "overloaded"),
        (DrainingError("x"), 503, "service_unavailable_error", "draining"),
        (IterationError("x"), 500, "server_error", "iteration_failed"),
        (ConfigError("x"), 500, "server_error", "internal_error"),
    ],
)
def test_each_class_has_its_status(
    error: CotuneError, status: int, kind: str, code: str | None
) -> None:
    refusal = refusal_for(error)
    assert (refusal.status, refusal.type, refusal.code) == (status, kind, code)
    assert refusal.message == "x"
    assert refusal.param == error.param


def test_every_error_of_the_runtime_has_a_row() -> None:
    for _, kind in inspect.getmembers(runtime_errors, inspect.isclass):
        if issubclass(kind, CotuneError):
            assert refusal_for(kind("x")).message == "x"


@pytest.mark.parametrize(("seconds", "header"), [(0.2, "1"), (1.0, "1"), (1.5, "2"), (30, "30")])
def test_what_may_be_tried_again_says_when_in_whole_seconds(seconds: float, header: str) -> None:
    for kind in (OverloadedError, DrainingError, StorageError):
        assert refusal_for(kind("x", retry_after_s=seconds)).headers == (("Retry-After", header),)
    assert refusal_for(RequestError("x")).headers == ()


def test_a_foreign_error_tells_the_client_nothing_about_itself() -> None:
    refusal = refusal_for(KeyError("/etc/secret"))
    assert refusal is INTERNAL
    assert "secret" not in str(refusal.body)


def test_a_refusal_travels_unchanged() -> None:
    refusal = Refusal(418, "teapot")
    assert refusal_for(RefusalError(refusal)) is refusal
    assert refusal.body == {
        "error": {
            "message": "teapot",
            "type": "invalid_request_error",
            "param": None,
            "code": None,
        }
    }
