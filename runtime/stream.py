"""What a caller holds of a request: a context manager, an iterator of deltas, an awaitable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator
    from types import TracebackType

    from .engine import Engine
    from .sequence import Request
    from .types import AdapterVersion, Delta, Response, TokenLogprob, Usage


class ResponseStream:
    """The answers to one request, while they are made.

        async with rt.chat(messages) as stream:      # admitted, or refused with an error, here
            async for delta in stream:
                print(delta.text, end="")
        stream.response.finish_reason

    or, for the whole at once, ``response = await rt.chat(messages)``. Leaving the block, for any
    reason, aborts what is unfinished; its KV pages are free within an iteration.

    A reader that is slow delays nobody: what it has not fetched is joined into one delta per
    answer, so that never more is kept than the answers themselves.

    Errors: `RequestError`, `NotFoundError`, `OverloadedError` and `DrainingError` are raised on
    entering. Reading raises `IterationError` where the device failed on this request, and
    `DrainingError` where the runtime shut down before the answer was complete, both after the
    deltas that were made before.
    """

    def __init__(
        self, request_id: str, admit: Callable[[str], Awaitable[tuple[Engine, Request]]]
    ) -> None:
        self._request_id = request_id
        self._admit: Callable[[str], Awaitable[tuple[Engine, Request]]] | None = admit
        self._engine: Engine | None = None
        self._request: Request | None = None

    # -- what is known from the start, or from admission on --------------------------------------

    @property
    def request_id(self) -> str:
        """The id given, or one made up."""
        return self._request_id

    @property
    def model(self) -> str:
        """The name that the answers go under."""
        return self._admitted.model

    @property
    def adapter_version(self) -> AdapterVersion:
        """The weights that answer, from the first token to the last."""
        return self._admitted.version

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """The prompt."""
        return self._admitted.prompt

    # -- what grows ------------------------------------------------------------------------------

    @property
    def usage(self) -> Usage:
        """Tokens so far, over all answers; the prompt counts once."""
        return self._admitted.usage

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        """One entry per prompt token, None for the first; complete with the first delta.

        None unless `SamplingParams.prompt_logprobs` asked for them.
        """
        request = self._admitted
        if request.params.prompt_logprobs is None:
            return None
        return tuple(request.prompt_logprobs)

    @property
    def responses(self) -> tuple[Response, ...]:
        """The answers that have ended, in order of index."""
        return tuple(seq.response for seq in self._admitted.sequences if seq.response is not None)

    @property
    def response(self) -> Response:
        """The first answer.

        Raises:
            CotuneError: what the request failed with.
            RuntimeError: it has not ended yet.
        """
        request = self._admitted
        if request.error is not None:
            raise request.error
        response = request.sequences[0].response
        if response is None:
            raise RuntimeError(
                f"answer 0 of request {request.id} has not ended; read or await the stream first"
            )
        return response

    # -- reading ---------------------------------------------------------------------------------

    def take_nowait(self) -> list[Delta]:
        """All deltas that are ready now; at most one per answer. Empty when there are none."""
        request = self._admitted
        deltas = []
        while (delta := request.take()) is not None:
            deltas.append(delta)
        return deltas

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        request = self._admitted
        while (delta := request.take()) is None:
            if request.is_done:
                if request.error is not None:
                    raise request.error
                raise StopAsyncIteration
            await request.wait_news()
        return delta

    def __await__(self) -> Generator[object, None, Response]:
        return self._collect().__await__()

    async def _collect(self) -> Response:
        """Wait for every answer; the first of them. Enters and leaves where nobody has entered."""
        if self._request is None:
            async with self:
                return await self._collect()
        while not self._request.is_done:
            await self._request.wait_news()
        return self.response

    # -- entering and leaving --------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._admit is None:
            raise RuntimeError("a ResponseStream is entered once; make another request")
        admit, self._admit = self._admit, None
        self._engine, self._request = await admit(self._request_id)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._engine is not None
        self._engine.abort(self._admitted)

    @property
    def _admitted(self) -> Request:
        if self._request is None:
            raise RuntimeError(
                f"request {self._request_id} was not admitted; use it in 'async with', or await it"
            )
        return self._request
