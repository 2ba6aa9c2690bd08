"""The runtime with a model, and the one without, are both what the web layer needs."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import pytest

from cotune import ResponseStream, Runtime
from cotune.runtime.tokenization import TextCodec
from cotune.tools.null_runtime import NullCodec, NullRuntime, NullStream
from cotune.web import backend

if TYPE_CHECKING:
    from cotune.web.backend import Backend

    # mypy compares every signature and type.
    with_model: Backend = Runtime()
    without_model: Backend = NullRuntime()


@pytest.mark.parametrize(
    ("protocol", "classes"),
    [
        (backend.Backend, (Runtime, NullRuntime)),
        (backend.Stream, (ResponseStream, NullStream)),
        (backend.Codec, (TextCodec, NullCodec)),
    ],
)
def test_methods_have_the_parameters_that_the_web_layer_names(
    protocol: type, classes: tuple[type, ...]
) -> None:
    for name, method in vars(protocol).items():
        if name.startswith("_") or not inspect.isfunction(method):
            continue
        wanted = {
            p.name
            for p in inspect.signature(method).parameters.values()
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        }
        for kind in classes:
            assert wanted <= set(inspect.signature(getattr(kind, name)).parameters), (kind, name)
