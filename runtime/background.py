"""Prompts that the runtime computes for its own ends, through the serving engine.

Reference log-probabilities of feedback, the gate's questions to a candidate, and the prefixes that
a new version must have at hand are all prefill: the engine packs them beside the requests, with a
low rank and a small share of each iteration (`policy.types.Budgets.background_tokens`). So they
need no second forward path, are preempted like anything else, and judge exactly what is served.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

from .errors import ContextLengthError
from .sequence import Request
from .types import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .engine import Engine
    from .types import AdapterVersion, Response, TokenLogprob

PRIORITY = 10
"""Levels below an ordinary request: it goes first unless it came ten minutes later."""
MAX_CONCURRENT = 8


class Background:
    """Sends the runtime's own prompts through the engine, a few at a time.

    Every method raises `DrainingError` when the runtime shuts down, `IterationError` where the
    device failed, and gives its pages back when it is cancelled.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._clock = clock
        self._numbers = itertools.count()
        self._room = asyncio.Semaphore(MAX_CONCURRENT)

    async def score(
        self,
        version: AdapterVersion,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        *,
        top: int = 0,
    ) -> tuple[TokenLogprob, ...]:
        """The log-probability of each completion token after the prompt, under `version`.

        A prompt that was computed before is read from the cache.

        Args:
            version: held by the adapter store (live, or pinned by the caller).
            prompt_ids: at least one token.
            completion_ids: at least one token.
            top: alternatives to report at each position.

        Raises:
            ContextLengthError: both together exceed the context.
        """
        tokens = (*prompt_ids, *completion_ids)
        if len(tokens) > self._engine.max_model_len:
            raise ContextLengthError(
                f"prompt {len(prompt_ids)} tokens + completion {len(completion_ids)} exceeds the "
                f"context length {self._engine.max_model_len}; shorten them",
                param="completion_ids",
                code="context_length_exceeded",
            )
        params = SamplingParams(max_tokens=0, prompt_logprobs=top)
        request = await self._run(version, tokens, params, 0, len(prompt_ids))
        found = request.prompt_logprobs[len(prompt_ids) :]
        assert None not in found
        return tuple(entry for entry in found if entry is not None)

    async def prefill(self, version: AdapterVersion, token_ids: Sequence[int]) -> None:
        """Have the KV of `token_ids` in the cache, all full pages of it."""
        await self._run(version, tuple(token_ids), SamplingParams(), 0, 1)

    async def generate(
        self, version: AdapterVersion, prompt_ids: Sequence[int], max_tokens: int
    ) -> Response:
        """What `version` writes after the prompt, always the likeliest token."""
        params = SamplingParams(temperature=0.0).resolve({})
        request = await self._run(version, tuple(prompt_ids), params, max_tokens, 1)
        response = request.sequences[0].response
        assert response is not None
        return response

    async def _run(
        self,
        version: AdapterVersion,
        tokens: tuple[int, ...],
        params: SamplingParams,
        max_tokens: int,
        logprobs_start: int,
    ) -> Request:
        async with self._room:
            request = Request(
                request_id=f"background-{next(self._numbers)}",
                prompt=tokens,
                params=params,
                max_tokens=max_tokens,
                seed=0,
                version=version,
                model=str(version),
                priority=PRIORITY,
                arrival_s=self._clock(),
                is_background=True,
                logprobs_start=logprobs_start,
            )
            self._engine.submit(request)
            try:
                while not request.is_done:
                    await request.wait_news()
            finally:
                self._engine.abort(request)
            if request.error is not None:
                raise request.error
            return request
