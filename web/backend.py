"""What the web layer needs of a runtime, and nothing more.

`cotune.runtime.runtime.Runtime` is such a thing; so is the runtime without a model that the tests
and `tools/bench_web.py` use. The promises that types cannot say:

- `chat` and `complete` return at once. Admission happens on entering the stream, and that is where
  `RequestError`, `NotFoundError`, `OverloadedError` and `DrainingError` are raised.
- Leaving the stream's block, for whatever reason, aborts what is unfinished and frees its pages
  within an iteration.
- A stream never makes the engine wait. What its reader has not taken yet is joined into one delta
  per completion, so that a slow reader delays itself alone and gets fewer, larger pieces.
- Reading a stream raises what the request failed with, after the deltas that came before.
- `feedback` returns when the event is durable, and not before. It may be cancelled at any await:
  the event is then stored or not, and nothing else. What it refuses it counts in `learning()`.
- Whatever concerns feedback and versions raises `LearningOffError` in a runtime that does not
  learn; only `learning()` answers, with `enabled` false.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator, Mapping, Sequence
    from datetime import datetime
    from pathlib import Path
    from types import TracebackType

    from ..runtime.learning.events import Acknowledgement, FeedbackEvent
    from ..runtime.learning.status import LearningStatus
    from ..runtime.learning.versions import VersionRecord
    from ..runtime.scheduling.statistics import ScheduleStatistics
    from ..runtime.scheduling.timeline import TimelineSnapshot
    from ..runtime.types import (
        AdapterVersion,
        Delta,
        Message,
        RequestClass,
        Response,
        SamplingParams,
        TokenLogprob,
        Usage,
    )


class Codec(Protocol):
    """Text to token ids and back, for one model."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text, with those that the tokenizer adds to one unless told not to."""

    def encode_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """The token ids of a conversation under the model's chat template."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids."""

    def token_text(self, token_id: int, /) -> str:
        """One token as text; what is no character by itself has a replacement character."""

    def token_bytes(self, token_id: int, /) -> bytes:
        """One token's exact bytes."""


class Stream(Protocol):
    """One request, from admission to its last token, for all of its `n` completions."""

    @property
    def request_id(self) -> str:
        """The id given, or one made up."""

    @property
    def model(self) -> str:
        """The name that the answer goes under."""

    @property
    def adapter_version(self) -> AdapterVersion:
        """The weights that answer, pinned at admission."""

    @property
    def prompt_token_ids(self) -> Sequence[int]:
        """The prompt, known from admission on."""

    @property
    def usage(self) -> Usage:
        """Tokens so far, over all completions; the prompt counts once."""

    @property
    def prompt_logprobs(self) -> Sequence[TokenLogprob | None] | None:
        """One entry per prompt token; complete when the first delta is there. None: not asked."""

    @property
    def responses(self) -> tuple[Response, ...]:
        """The completions that have ended, in order of index."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> bool | None: ...

    def __aiter__(self) -> Self: ...

    async def __anext__(self) -> Delta: ...

    def take_nowait(self) -> list[Delta]:
        """All deltas that are ready now, at most one per completion; empty when there are none."""

    def __await__(self) -> Generator[object, None, Response]:
        """Wait for all completions; the first one. Also works inside the stream's block."""


class ModelInfo(Protocol):
    """One name that requests may ask for."""

    @property
    def id(self) -> str:
        """The name."""

    @property
    def parent(self) -> str | None:
        """The base model's name, for an adapter."""

    @property
    def root(self) -> str:
        """Where its weights come from."""

    @property
    def created(self) -> datetime:
        """When it was loaded."""

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and answer together."""


class CacheStatistics(Protocol):
    """Where the KV pages are, and how much of the prompts was found in them."""

    @property
    def total_pages(self) -> int:
        """All pages."""

    @property
    def free_pages(self) -> int:
        """Pages that hold nothing."""

    @property
    def cached_pages(self) -> int:
        """Pages that hold a prefix nobody uses now; they can be evicted."""

    @property
    def owned_pages(self) -> int:
        """Pages that running sequences hold."""

    @property
    def hit_tokens(self) -> int:
        """Prompt tokens found in the cache since the start."""

    @property
    def queried_tokens(self) -> int:
        """Prompt tokens looked up since the start."""

    @property
    def evicted_pages(self) -> int:
        """Pages evicted since the start."""


class Statistics(Protocol):
    """A runtime at one moment. Counters count from its start."""

    @property
    def running(self) -> int:
        """Sequences that hold pages."""

    @property
    def waiting(self) -> int:
        """Sequences in the queue."""

    @property
    def cache(self) -> CacheStatistics:
        """KV pages."""

    @property
    def preemptions(self) -> int:
        """Times that a running sequence lost its pages and was queued again."""

    @property
    def iterations(self) -> int:
        """Iterations of the engine's loop."""

    @property
    def failed_iterations(self) -> int:
        """Iterations that raised; their requests failed."""

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of admitted requests."""

    @property
    def generated_tokens(self) -> int:
        """Tokens generated."""

    @property
    def forward_s(self) -> float:
        """Seconds in the model's forward."""

    @property
    def sample_s(self) -> float:
        """Seconds in sampling."""

    @property
    def plan_s(self) -> float:
        """Seconds in planning and preparing iterations."""

    @property
    def commit_s(self) -> float:
        """Seconds in taking results."""

    @property
    def deliver_s(self) -> float:
        """Seconds in making text of tokens and waking readers."""

    @property
    def schedule(self) -> ScheduleStatistics:
        """What the scheduler did."""


class Listener(Protocol):
    """Is told what happens to requests. Called on the event loop; must be quick and not raise."""

    def on_finished(self, response: Response, /) -> None:
        """A completion has ended, for whatever reason."""

    def on_first_token(self, ttft_s: float, /) -> None:
        """A completion has its first token, this long after its arrival."""

    def on_token_gap(self, gap_s: float, /) -> None:
        """A completion has another token, this long after the one before."""

    def on_rejected(self, reason: str, /) -> None:
        """A request was not admitted."""


class Backend(Protocol):
    """A runtime, as the web layer sees it."""

    @property
    def codec(self) -> Codec:
        """The model's tokenizer and chat template."""

    @property
    def served_name(self) -> str:
        """The base model's name for clients."""

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and answer together."""

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken now."""

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams,
        *,
        model: str | None = None,
        priority: int = 0,
        request_class: RequestClass = "interactive",
        request_id: str | None = None,
        record: bool | None = None,
        source: str | None = None,
    ) -> Stream:
        """Answer a conversation.

        `request_class` says whether somebody waits for each token, or for the whole some time;
        `record` keeps the answer, so that feedback can name it (None: as configured); `source` says
        whose it is.
        """

    def complete(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        model: str | None = None,
        priority: int = 0,
        request_class: RequestClass = "interactive",
        request_id: str | None = None,
        record: bool | None = None,
        source: str | None = None,
    ) -> Stream:
        """Continue a text, or token ids."""

    def model_names(self) -> Sequence[ModelInfo]:
        """The base model and all live adapters."""

    async def load_adapter(self, name: str, path: str | Path) -> AdapterVersion:
        """Publish a LoRA directory under a name. Raises `AdapterLoadError`."""

    async def unload_adapter(self, name: str) -> None:
        """Retire a name. Running requests keep their version. Raises `NotFoundError`."""

    async def feedback(
        self, event: FeedbackEvent | Mapping[str, object], *, source: str = "local"
    ) -> Acknowledgement:
        """Store an event, given as a value or as the frame that clients send.

        Raises `RequestError` for a frame that says nothing sensible, `NotFoundError` for a response
        or event that is not there, `ConflictError` for an id that named another event,
        `OverloadedError` for a source that has used up its quota, `StorageError` for a full disk.
        """

    def export_feedback(self, adapter: str | None = None) -> AsyncIterator[Mapping[str, object]]:
        """All events that are not withdrawn, oldest first, as rows that TRL reads."""

    async def forget(self, source: str) -> int:
        """Remove what a person said and was answered. Returns how many things went."""

    def learning(self) -> LearningStatus:
        """What was learned so far. No I/O."""

    async def adapters(self) -> tuple[VersionRecord, ...]:
        """All versions on disk, published and refused."""

    async def promote(self, model: str, *, force: bool = False) -> VersionRecord | None:
        """Make a version live: ``name@7``, or ``7`` of the served model (None: the base model).

        Raises `NotFoundError`, and `ConflictError` for one that the gate refused, unless forced.
        """

    async def rollback(self, model: str) -> VersionRecord | None:
        """Take a live version back; what was live before it is again (None: the base model).

        Raises `NotFoundError`, and `ConflictError` for one that is not live.
        """

    def statistics(self) -> Statistics:
        """A snapshot."""

    def timeline(self, last_s: float | None = None) -> TimelineSnapshot:
        """What iterations and quanta did of late, or of that what ended in the last seconds.

        Its times are those of `time.monotonic()`.
        """

    def describe(self) -> Mapping[str, object]:
        """What was chosen at start: device, dtype, attention, page size ..."""

    def add_listener(self, listener: Listener, /) -> None:
        """Tell `listener` from now on."""

    def remove_listener(self, listener: Listener, /) -> None:
        """Stop telling it."""

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests; wait for the running ones, then abort what is left."""
