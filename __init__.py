"""cotune: answer requests and learn from the feedback on them, in one process, on one device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .runtime.errors import (
    AdapterLoadError,
    ConfigError,
    ContextLengthError,
    CotuneError,
    DrainingError,
    IterationError,
    ModelLoadError,
    NotFoundError,
    OverloadedError,
    RequestError,
    UnavailableError,
)
from .runtime.types import (
    BASE,
    AdapterVersion,
    Delta,
    Message,
    Response,
    SamplingParams,
    Timings,
    TokenLogprob,
    Usage,
)

if TYPE_CHECKING:
    from .runtime.config import RuntimeConfig
    from .runtime.runtime import ResponseStream, Runtime

__version__ = "0.1.0"

# torch takes a second to import; these come when first asked for.
_LAZY = {
    "ResponseStream": "runtime.runtime",
    "Runtime": "runtime.runtime",
    "RuntimeConfig": "runtime.config",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BASE",
    "AdapterLoadError",
    "AdapterVersion",
    "ConfigError",
    "ContextLengthError",
    "CotuneError",
    "Delta",
    "DrainingError",
    "IterationError",
    "Message",
    "ModelLoadError",
    "NotFoundError",
    "OverloadedError",
    "RequestError",
    "Response",
    "ResponseStream",
    "Runtime",
    "RuntimeConfig",
    "SamplingParams",
    "Timings",
    "TokenLogprob",
    "UnavailableError",
    "Usage",
    "__version__",
]
