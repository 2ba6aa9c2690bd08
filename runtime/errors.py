"""Every error that cotune raises on purpose.

    CotuneError
    ├── ConfigError                a setting is wrong; refused before anything starts
    │   ├── ModelLoadError         a model directory cannot be served correctly
    │   └── AdapterLoadError       a LoRA directory does not fit this model
    ├── RequestError               a request is wrong; the caller can mend it
    │   ├── ContextLengthError     prompt plus answer do not fit the context
    │   ├── NotFoundError          the model, adapter or response named does not exist
    │   ├── ConflictError          it contradicts what is stored, or the state of an adapter
    │   └── LearningOffError       feedback, to a runtime that does not learn
    ├── UnavailableError           nothing is wrong with the request; not now
    │   ├── OverloadedError        a queue is full, or a quota used up (try again)
    │   ├── StorageError           the disk is full or failing; nothing was stored
    │   └── DrainingError          the runtime is shutting down
    └── IterationError             a device step failed; its requests fail, the runtime goes on

A message names the field, the value and the remedy. `param` is the field in the caller's own words
(``"messages.0.role"``), `code` a stable machine-readable word. `web` turns each class into an HTTP
status and an OpenAI error object in one table.
"""

from __future__ import annotations

from typing import Final

# What allocators and libraries say, where they do not raise torch.OutOfMemoryError.
_OUT_OF_MEMORY: Final = (
    "DefaultCPUAllocator: can't allocate",
    "out of memory",
    "ALLOC_FAILED",
)


class CotuneError(Exception):
    """Base of every deliberate error.

    Args:
        message: what happened, the numbers, and the remedy.
        param: the offending field, in the caller's words, or None.
        code: a stable machine-readable word, or None.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class ConfigError(CotuneError):
    """A setting is wrong; nothing was started."""


class ModelLoadError(ConfigError):
    """A model cannot be loaded, or could not be served correctly; the message has the reason."""


class AdapterLoadError(ConfigError):
    """A LoRA directory is unreadable or does not fit this model."""


class RequestError(CotuneError, ValueError):
    """A request has a wrong field. Nothing was computed."""


class ContextLengthError(RequestError):
    """Prompt plus requested tokens exceed the context length."""


class NotFoundError(RequestError):
    """The model, adapter or response named does not exist."""


class ConflictError(RequestError):
    """The request contradicts what is stored, or the state that an adapter is in."""


class LearningOffError(RequestError):
    """Feedback was sent to a runtime that does not learn."""


class UnavailableError(CotuneError):
    """The request is fine but cannot be taken now; try again after `retry_after_s` seconds."""

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: float = 1.0,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after_s = retry_after_s


class OverloadedError(UnavailableError):
    """A bounded queue is full, or a source has used up its quota."""


class StorageError(UnavailableError):
    """The disk is full or failing. Nothing was stored, and nothing is acknowledged."""


class DrainingError(UnavailableError):
    """The runtime is shutting down and takes no new requests."""


class IterationError(CotuneError):
    """A device step failed. The requests in it fail with this error; the runtime goes on."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the device or on the host.

    Torch's own error is known by its name, so that nobody needs torch to ask.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
