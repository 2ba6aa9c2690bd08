"""The handlers: each reads a request, asks the runtime and shapes its answer."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, TypeVar

from aiohttp import web

from .. import __version__
from ..runtime.errors import CotuneError, NotFoundError, RequestError
from .chat import ChatAnswer
from .completions import CompletionAnswer
from .edge import RECORD, json_response, printable, read_body, source_of
from .errors import RefusalError, refusal_for
from .events import EventStream, StalledClientError
from .metrics import CONTENT_TYPE
from .requests import (
    parse_chat,
    parse_completion,
    parse_detokenize,
    parse_json,
    parse_load_adapter,
    parse_tokenize,
    parse_unload_adapter,
)
from .shape import error_event, total_usage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from ..runtime.types import Delta, Message
    from .backend import Backend, ModelInfo, Stream
    from .metrics import Metrics
    from .requests import GenerateRequest
    from .settings import ServerSettings

    Answer = ChatAnswer | CompletionAnswer

logger = logging.getLogger(__name__)

T = TypeVar("T")

SHORT_TEXT_CHARS: Final = 4096
"""Text up to this length is tokenized on the event loop (well under a millisecond)."""


class Routes:
    """The handlers of one server, and what they share."""

    def __init__(
        self,
        runtime: Backend,
        settings: ServerSettings,
        metrics: Metrics,
        is_stopping: Callable[[], bool],
    ) -> None:
        self._runtime = runtime
        self._settings = settings
        self._metrics = metrics
        self._is_stopping = is_stopping

    def table(self) -> list[web.RouteDef]:
        """All routes."""
        routes = [
            web.post("/v1/chat/completions", self.chat),
            web.post("/v1/completions", self.complete),
            web.get("/v1/models", self.models),
            web.get("/v1/models/{id:.+}", self.model),
            web.post("/tokenize", self.tokenize),
            web.post("/detokenize", self.detokenize),
            web.get("/health", self.health),
            web.get("/ready", self.ready),
            web.get("/version", self.version),
            web.get("/metrics", self.metrics),
        ]
        if self._settings.enable_adapter_loading:
            routes += [
                web.post("/v1/load_lora_adapter", self.load_adapter),
                web.post("/v1/unload_lora_adapter", self.unload_adapter),
            ]
        return routes

    # Answers.

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        parsed = parse_chat(await self._body(request), self._settings)
        id = self._answer_id("chatcmpl-", request, parsed)
        created = _now()
        if parsed.add_generation_prompt:
            stream = self._runtime.chat(
                parsed.messages,
                parsed.params,
                model=parsed.model,
                priority=parsed.priority,
                request_class=parsed.request_class,
                request_id=id,
                record=parsed.record,
                source=parsed.source or source_of(request),
            )
        else:
            stream = self._runtime.complete(
                await self._encode_chat(parsed.messages, False),
                parsed.params,
                model=parsed.model,
                priority=parsed.priority,
                request_class=parsed.request_class,
                request_id=id,
                record=parsed.record,
                source=parsed.source or source_of(request),
            )
        async with _speaking_of_messages(stream):
            answer = ChatAnswer(parsed, stream, self._runtime.codec, id=id, created=created)
            if parsed.streaming.stream:
                return await self._stream(request, parsed, [stream], [answer], answer.usage_chunk)
            await self._wait(request, [stream])
            return json_response(answer.body())

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        parsed = parse_completion(
            await self._body(request),
            self._settings,
            max_model_len=self._runtime.max_model_len,
        )
        id = self._answer_id("cmpl-", request, parsed)
        created = _now()
        source = parsed.source or source_of(request)
        async with AsyncExitStack() as admitted:
            # All prompts are admitted, or none is answered.
            streams = [
                await admitted.enter_async_context(
                    self._runtime.complete(
                        prompt
                        if parsed.add_special_tokens or not isinstance(prompt, str)
                        else await self._encode(prompt, False),
                        parsed.params,
                        model=parsed.model,
                        priority=parsed.priority,
                        request_class=parsed.request_class,
                        request_id=id if len(parsed.prompts) == 1 else f"{id}-{i}",
                        record=parsed.record,
                        source=source,
                    )
                )
                for i, prompt in enumerate(parsed.prompts)
            ]
            answers = [
                CompletionAnswer(
                    parsed, stream, self._runtime.codec, prompt=i, id=id, created=created
                )
                for i, stream in enumerate(streams)
            ]
            if parsed.streaming.stream:
                return await self._stream(
                    request,
                    parsed,
                    streams,
                    answers,
                    lambda: CompletionAnswer.usage_chunk(answers),
                )
            await self._wait(request, streams)
            return json_response(CompletionAnswer.body(answers))

    # Models and adapters.

    async def models(self, request: web.Request) -> web.Response:
        """GET /v1/models."""
        return json_response(
            {
                "object": "list",
                "data": [_model_body(model) for model in self._runtime.model_names()],
            }
        )

    async def model(self, request: web.Request) -> web.Response:
        """GET /v1/models/ID."""
        return json_response(_model_body(self._find(request.match_info["id"])))

    async def load_adapter(self, request: web.Request) -> web.Response:
        """POST /v1/load_lora_adapter. A name that is taken needs ``"load_inplace": true``."""
        parsed = parse_load_adapter(await self._body(request))
        known = {model.id: model for model in self._runtime.model_names()}
        if (taken := known.get(parsed.name)) is not None:
            if taken.parent is None:
                raise RequestError(
                    f"lora_name is {parsed.name!r}, which is the base model's name; choose another",
                    param="lora_name",
                )
            if not parsed.in_place:
                raise RequestError(
                    f"the adapter {parsed.name!r} is loaded already; choose another name, or set "
                    '"load_inplace": true to publish a new version of it',
                    param="lora_name",
                    code="adapter_exists",
                )
        version = await self._runtime.load_adapter(parsed.name, parsed.path)
        return web.Response(
            text=f"Success: LoRA adapter '{parsed.name}' added successfully as {version}."
        )

    async def unload_adapter(self, request: web.Request) -> web.Response:
        """POST /v1/unload_lora_adapter. Requests that run keep their version."""
        parsed = parse_unload_adapter(await self._body(request))
        if all(
            model.id != parsed.name or model.parent is None for model in self._runtime.model_names()
        ):
            raise NotFoundError(
                f"no adapter {parsed.name!r} is loaded; /v1/models lists those that are",
                param="lora_name",
                code="adapter_not_found",
            )
        await self._runtime.unload_adapter(parsed.name)
        return web.Response(text=f"Success: LoRA adapter '{parsed.name}' removed successfully.")

    # Tokens.

    async def tokenize(self, request: web.Request) -> web.Response:
        """POST /tokenize."""
        parsed = parse_tokenize(await self._body(request), self._settings)
        self._check_model(parsed.model)
        codec = self._runtime.codec
        if parsed.messages is not None:
            tokens = await self._encode_chat(parsed.messages, parsed.add_generation_prompt)
        else:
            prompt = parsed.prompt or ""
            tokens = await self._encode(prompt, parsed.add_special_tokens)
        return json_response(
            {
                "count": len(tokens),
                "max_model_len": self._runtime.max_model_len,
                "tokens": tokens,
                "token_strs": (
                    [codec.token_text(token) for token in tokens]
                    if parsed.return_token_strs
                    else None
                ),
            }
        )

    async def detokenize(self, request: web.Request) -> web.Response:
        """POST /detokenize."""
        codec = self._runtime.codec
        parsed = parse_detokenize(await self._body(request), codec.vocab_size)
        self._check_model(parsed.model)
        text = await _off_loop(
            4 * len(parsed.tokens), lambda: codec.decode(parsed.tokens, skip_special_tokens=False)
        )
        return json_response({"prompt": text})

    # Probes.

    async def health(self, request: web.Request) -> web.Response:
        """GET /health: the process lives and its event loop turns."""
        return json_response({"status": "ok"})

    async def ready(self, request: web.Request) -> web.Response:
        """GET /ready: 200 while requests are taken, otherwise 503."""
        if self._runtime.is_ready and not self._is_stopping():
            return json_response({"status": "ready"})
        return json_response({"status": "not ready"}, status=503, headers={"Retry-After": "1"})

    async def version(self, request: web.Request) -> web.Response:
        """GET /version."""
        return json_response({"version": __version__})

    async def metrics(self, request: web.Request) -> web.Response:
        """GET /metrics."""
        return web.Response(body=self._metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    # What they share.

    async def _body(self, request: web.Request) -> dict[str, Any]:
        return parse_json(await read_body(request, self._settings))

    def _answer_id(self, prefix: str, request: web.Request, parsed: GenerateRequest) -> str:
        """What names the answer, for feedback too, and so is unique.

        It is not the X-Request-Id header's: a client may send one id with several requests at once.
        """
        record = request[RECORD]
        record.answer = prefix + (parsed.request_id or record.made_id)
        return record.answer

    async def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        codec = self._runtime.codec
        return await _off_loop(
            len(text), lambda: codec.encode(text, add_special_tokens=add_special_tokens)
        )

    async def _encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool
    ) -> list[int]:
        codec = self._runtime.codec
        return await _off_loop(
            sum(len(message["content"]) for message in messages),
            lambda: codec.encode_chat(messages, add_generation_prompt=add_generation_prompt),
        )

    def _note(self, request: web.Request, streams: Sequence[Stream]) -> None:
        """Put what an answer cost into the access log."""
        record = request[RECORD]
        record.model = streams[0].model
        record.usage = total_usage([stream.usage for stream in streams])

    async def _wait(self, request: web.Request, streams: Sequence[Stream]) -> None:
        """Wait for whole answers."""
        try:
            for stream in streams:
                await stream
        finally:
            self._note(request, streams)

    def _find(self, name: str) -> ModelInfo:
        for model in self._runtime.model_names():
            if model.id == name:
                return model
        raise NotFoundError(
            f"the model {printable(name)!r} does not exist; /v1/models lists those that do",
            param="model",
            code="model_not_found",
        )

    def _check_model(self, name: str | None) -> None:
        """An adapter shares its base's tokenizer, so that any name that exists will do."""
        if name is not None:
            self._find(name.partition("@")[0])

    async def _stream(
        self,
        request: web.Request,
        parsed: GenerateRequest,
        streams: Sequence[Stream],
        answers: Sequence[Answer],
        usage_chunk: Callable[[], bytes],
    ) -> web.StreamResponse:
        """Send an answer as events.

        A failure before the first token is raised and becomes a response of its own; a later one
        becomes the stream's last event, because the status has been sent by then.
        """
        record = request[RECORD]
        events = EventStream(request, self._metrics, stall_timeout_s=self._settings.stall_timeout_s)
        try:
            first = await anext(aiter(streams[0]), None)
            await events.open()
            try:
                await _pump_all(streams, answers, events, first)
                last = usage_chunk() if parsed.streaming.include_usage else b""
            except ConnectionError:
                raise
            except Exception as error:
                # The boundary: the client has a status already, so it is told in the stream.
                if isinstance(error, CotuneError):
                    logger.error("request %s failed half-way: %s", record.id, error)
                else:
                    logger.exception("request %s failed half-way", record.id)
                refusal = refusal_for(error)
                record.error = refusal.code or refusal.type
                last = error_event(refusal)
            return await events.close(last)
        except ConnectionError as error:
            if not events.is_open:
                raise
            record.is_client_gone = True
            record.error = "stalled" if isinstance(error, StalledClientError) else "client_gone"
            return events.abandon()
        finally:
            self._note(request, streams)


@asynccontextmanager
async def _speaking_of_messages(stream: Stream) -> AsyncIterator[None]:
    """Enter a chat's stream. What the runtime finds wrong with its prompt, is so with messages."""
    async with AsyncExitStack() as admitted:
        try:
            _ = await admitted.enter_async_context(stream)
        except RequestError as error:
            if error.param != "prompt":
                raise
            raise RefusalError(replace(refusal_for(error), param="messages")) from error
        yield


async def _pump(stream: Stream, answer: Answer, events: EventStream, first: Delta | None) -> None:
    """Pass a stream's deltas on: one write for all that are ready, then wait for more."""
    if first is not None:
        await events.send(answer.chunks([first, *stream.take_nowait()]))
    async for delta in stream:
        await events.send(answer.chunks([delta, *stream.take_nowait()]))


async def _pump_all(
    streams: Sequence[Stream],
    answers: Sequence[Answer],
    events: EventStream,
    first: Delta | None,
) -> None:
    """Pump them together; `first` is of the first one. A failure ends all and is raised itself."""
    if len(streams) == 1:
        await _pump(streams[0], answers[0], events, first)
        return
    try:
        async with asyncio.TaskGroup() as group:
            for stream, answer in zip(streams, answers, strict=True):
                group.create_task(_pump(stream, answer, events, first))
                first = None
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def _off_loop(chars: int, work: Callable[[], T]) -> T:
    """Do `work`, in a thread if the text is long enough to hold the event loop up."""
    return work() if chars <= SHORT_TEXT_CHARS else await asyncio.to_thread(work)


def _model_body(model: ModelInfo) -> dict[str, Any]:
    return {
        "id": model.id,
        "object": "model",
        "created": int(model.created.timestamp()),
        "owned_by": "cotune",
        "root": model.root,
        "parent": model.parent,
        "max_model_len": model.max_model_len,
    }


def _now() -> int:
    return int(datetime.now(UTC).timestamp())
