"""Requests and their sequences: what the engine knows of them.

A request is a prompt and what was asked for; each of its `n` answers is a sequence. The engine is
the only writer of both, on the event loop's thread; the lane's thread reads the token lists of
sequences that are in flight, which only grow meanwhile.

    held ──► waiting ──► running ──► finished
              ▲             │
              └── preempt ──┘

Siblings are held until the first sequence has computed their common prompt, so that they find its
pages in the trie. A finished sequence that is in flight keeps its pages until that iteration ends.

What a reader may see runs behind what is known: tokens are appended when an iteration is committed,
and published (as text, looked through for stop strings) while the next one runs.

    tokens      p p p p p p │ a b c d e f
    output                    a b c d e f
    published                 ────────►│        4 of 6; the end, once known, is never after 6
    taken                     ───►│             2: what the reader has fetched
"""

from __future__ import annotations

import asyncio
import math
from enum import Enum
from itertools import pairwise
from typing import TYPE_CHECKING

from ..policy import rank_s
from .types import Delta, Response, Timings, Usage

if TYPE_CHECKING:
    from ..cache.manager import SequencePages
    from ..policy import Budgets, RequestClass
    from .answer_text import AnswerText
    from .errors import CotuneError
    from .sampling import SamplingState
    from .types import AdapterVersion, FinishReason, SamplingParams, TokenLogprob


class Status(Enum):
    """Where a sequence stands."""

    HELD = "held"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Request:
    """A prompt that was taken, what was asked of it, and its sequences.

    Args:
        request_id: unique among those that are live.
        prompt: token ids, at least one.
        params: resolved sampling parameters.
        max_tokens: most tokens of each answer, 0 to compute the prompt alone.
        seed: where its random numbers start; siblings differ by their index.
        version: the weights that answer.
        model: the name that the answers go under.
        priority: lower goes first.
        arrival_s: when it was made, on the engine's clock.
        is_background: the runtime's own work. It takes no place in the queue that callers fill, is
            in no statistics of requests, and does not survive the beginning of a shutdown.
        logprobs_start: with `params.prompt_logprobs`, the first prompt position whose
            log-probability is wanted (at least 1); what comes before may be read from the cache.
        record: what `Engine` hands on with each finished answer, for the one who records them.
        request_class: "interactive" answers have latency targets, "batch" ones come when they can.
    """

    __slots__ = (
        "_ready",
        "_waiters",
        "arrival_s",
        "error",
        "has_targets",
        "id",
        "is_background",
        "is_started",
        "logprobs_start",
        "max_tokens",
        "model",
        "params",
        "prompt",
        "prompt_logprobs",
        "prompt_logprobs_known",
        "rank_s",
        "record",
        "seed",
        "sequences",
        "unfinished",
        "version",
    )

    def __init__(
        self,
        *,
        request_id: str,
        prompt: tuple[int, ...],
        params: SamplingParams,
        max_tokens: int,
        seed: int,
        version: AdapterVersion,
        model: str,
        priority: int,
        arrival_s: float,
        is_background: bool = False,
        logprobs_start: int = 1,
        record: object = None,
        request_class: RequestClass = "interactive",
    ) -> None:
        self.id = request_id
        self.prompt = prompt
        self.params = params
        self.max_tokens = max_tokens
        self.seed = seed
        self.version = version
        self.model = model
        self.arrival_s = arrival_s
        self.rank_s = rank_s(priority, arrival_s, request_class)
        self.has_targets = request_class == "interactive" and not is_background
        self.sequences: tuple[SequenceState, ...] = ()
        self.unfinished = 0
        self.is_started = False
        self.error: CotuneError | None = None
        self.prompt_logprobs: list[TokenLogprob | None] = []
        self.is_background = is_background
        self.logprobs_start = logprobs_start  # at least 1: the first token is predicted by nothing
        self.record = record
        self.prompt_logprobs_known = logprobs_start
        self._ready: dict[int, None] = {}
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def is_done(self) -> bool:
        """Whether there is nothing more to come, be it for an error."""
        return self.unfinished == 0

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Whether prompt tokens must be computed (again) for their log-probabilities."""
        return (
            self.params.prompt_logprobs is not None
            and self.error is None
            and self.prompt_logprobs_known < len(self.prompt)
        )

    @property
    def usage(self) -> Usage:
        """Tokens published so far, over all answers; the prompt counts once."""
        return Usage(
            prompt_tokens=len(self.prompt),
            completion_tokens=sum(seq.published for seq in self.sequences),
            cached_tokens=self.sequences[0].cached_tokens,
        )

    # -- the reader's side -----------------------------------------------------------------------

    def announce(self, index: int) -> None:
        """Sequence `index` has something new for the reader: wake it, once."""
        self._ready[index] = None
        self.wake()

    def wake(self) -> None:
        """Let every `wait_news` return."""
        if self._waiters:
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_result(None)
            self._waiters.clear()

    async def wait_news(self) -> None:
        """Until `announce` or `wake` is called next. A cancellation point that leaves nothing."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def take(self) -> Delta | None:
        """The next delta: all that one sequence has published since its last one. None: nothing."""
        if not self._ready:
            return None
        index = next(iter(self._ready))
        del self._ready[index]
        return self.sequences[index].take()


class SequenceState:
    """One answer in the making.

    Attributes:
        key: the engine's number for it.
        index: which of the request's answers.
        tokens: prompt and answer, from the first time in the queue on; grows by one token per
            iteration.
        output: the answer's tokens; the same tokens, as the sampler sees them.
        computed: tokens whose KV is in `pages`.
        pages: its KV pages while it runs.
        slot: the adapter slot while it runs.
        end: how many tokens of `output` count, once it is finished.
        published: how many of them have become text.
        looked_up_at: the waiting line's count when the cache was last asked about its tokens.
        shared_with: by the key of a prefilling sequence, how many tokens both begin with.
    """

    __slots__ = (
        "_ends_with_token",
        "_taken_parts",
        "_taken_tokens",
        "cached_tokens",
        "computed",
        "end",
        "finish_reason",
        "in_flight",
        "index",
        "is_published",
        "key",
        "logprobs",
        "looked_up_at",
        "output",
        "pages",
        "published",
        "request",
        "response",
        "sampling",
        "scheduled_s",
        "shared_with",
        "slot",
        "status",
        "stop_reason",
        "text",
        "text_parts",
        "token_times",
        "tokens",
    )

    def __init__(
        self, key: int, request: Request, index: int, text: AnswerText, output: list[int]
    ) -> None:
        self.key = key
        self.request = request
        self.index = index
        self.status = Status.HELD
        self.tokens: list[int] = []
        self.output = output
        self.computed = 0
        self.pages: SequencePages | None = None
        self.slot = 0
        self.in_flight = False
        self.cached_tokens = 0
        self.scheduled_s: float | None = None
        self.sampling: SamplingState | None = None
        self.logprobs: list[TokenLogprob] = []
        self.token_times: list[float] = []
        self.end = -1
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.text = text
        self.text_parts: list[str] = []
        self.published = 0
        self.is_published = False
        self.response: Response | None = None
        self.shared_with: dict[int, int] = {}
        self.looked_up_at = -1
        self._ends_with_token = False
        self._taken_parts = 0
        self._taken_tokens = 0

    @property
    def cacheable(self) -> list[int]:
        """Its tokens that may be found in the cache, up to the last but one of them.

        All of them, not copied; fewer while prompt log-probabilities are due, for which the others
        must be computed.
        """
        if self.index == 0 and self.request.lacks_prompt_logprobs:
            return self.tokens[: self.request.logprobs_start]
        return self.tokens

    def due_s(self, budgets: Budgets) -> float:
        """When its next token is due, on the engine's clock; infinite where it has no target.

        One that gave way has missed its TBT target already: it is to be back within that of a
        first token, which can be kept, and keeps its place among those that can keep theirs.
        """
        request = self.request
        if not request.has_targets:
            return math.inf
        if not self.token_times:
            return request.arrival_s + budgets.ttft_s
        is_decoding = self.computed == len(self.tokens) - 1
        return self.token_times[-1] + (budgets.tbt_s if is_decoding else budgets.ttft_s)

    def append(self, token_id: int, now_s: float) -> None:
        """Take a sampled token and see whether it is the last.

        Sets `end`, `finish_reason` and `stop_reason` then; the caller does the rest.
        """
        assert self.sampling is not None
        kind = self.sampling.stop_kind(token_id)
        self.tokens.append(token_id)
        self.output.append(token_id)
        self.token_times.append(now_s)
        if kind is not None:
            self.finish("stop", None if kind == "eos" else kind)
            self._ends_with_token = True
        elif len(self.output) >= self.request.max_tokens:
            self.finish("length", None)

    def finish(self, reason: FinishReason, stop_reason: str | int | None) -> None:
        """Say that the tokens known are all, and why."""
        self.end = len(self.output)
        self.finish_reason = reason
        self.stop_reason = stop_reason

    def abandon(self, reason: FinishReason) -> None:
        """Say that nothing more will come, and that what is not published yet never will be."""
        self.end = self.published
        self.finish_reason = reason
        self.stop_reason = None
        self.is_published = True

    def publish(self) -> None:
        """Turn the tokens that are known and not yet published into text.

        A stop string found sets `end` and the reasons and drops the tokens after it. At the end of
        a sequence the text held back follows, and `is_published` is set.
        """
        while self.published < (len(self.output) if self.end < 0 else self.end):
            token_id = self.output[self.published]
            self.published += 1
            if self._is_hidden():
                continue
            if part := self.text.push(token_id):
                self.text_parts.append(part)
            if self.text.stop is not None:
                self._end_at_stop_string()
                break
        if self.finish_reason is not None:
            if part := self.text.finish():
                self.text_parts.append(part)
            if self.text.stop is not None:
                self._end_at_stop_string()  # it may have been complete only with the rest
            self.is_published = True

    def _is_hidden(self) -> bool:
        """Whether the token just published ended the answer and is no part of its text."""
        return (
            self._ends_with_token
            and self.published == self.end
            and not self.request.params.include_stop_str_in_output
        )

    def _end_at_stop_string(self) -> None:
        self.end = self.published
        self.finish_reason = "stop"
        self.stop_reason = self.text.stop

    def take(self) -> Delta:
        """All that was published since the last call."""
        parts, self._taken_parts = self._taken_parts, len(self.text_parts)
        start, self._taken_tokens = self._taken_tokens, self.published
        wants_logprobs = self.request.params.logprobs is not None
        return Delta(
            self.index,
            "".join(self.text_parts[parts:]),
            tuple(self.output[start : self.published]),
            tuple(self.logprobs[start : self.published]) if wants_logprobs else None,
            self.finish_reason if self.is_published else None,
            self.stop_reason if self.is_published else None,
        )

    def respond(self, now_s: float) -> Response:
        """The finished answer."""
        request = self.request
        assert self.finish_reason is not None
        times = self.token_times[: self.published]
        prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
        if request.params.prompt_logprobs is not None:
            prompt_logprobs = tuple(request.prompt_logprobs)
        started_s = now_s if self.scheduled_s is None else self.scheduled_s
        return Response(
            id=request.id if request.params.n == 1 else f"{request.id}:{self.index}",
            index=self.index,
            text="".join(self.text_parts),
            token_ids=tuple(self.output[: self.published]),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            usage=Usage(len(request.prompt), self.published, self.cached_tokens),
            model=request.model,
            adapter_version=request.version,
            timings=Timings(
                queue_s=started_s - request.arrival_s,
                ttft_s=times[0] - request.arrival_s if times else None,
                tbt_s=tuple(later - earlier for earlier, later in pairwise(times)),
                e2e_s=(times[-1] if times else now_s) - request.arrival_s,
            ),
            prompt_token_ids=request.prompt,
            logprobs=(
                None if request.params.logprobs is None else tuple(self.logprobs[: self.published])
            ),
            prompt_logprobs=prompt_logprobs,
        )
