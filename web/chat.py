"""A chat answer, whole and in chunks.

A stream's events, each ``data: {...}`` and a blank line; `n` completions interleave by index:

    role chunk        delta {"role": "assistant", "content": ""}
    content chunks    delta {"content": "..."}
    finish chunk      delta {}, finish_reason set
    usage chunk       no choices; only with stream_options.include_usage
    [DONE]

The parts of a chunk that do not change are bytes made once per completion; per token only its text
is turned into JSON. The plain form, which the tests compare with, is ``orjson.dumps`` of the dict.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from .logprobs import LogprobFormatter
from .shape import Envelope, usage_body, usage_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..runtime.types import Delta, Response
    from .backend import Codec, Stream
    from .requests import ChatRequest


class ChatAnswer:
    """Shapes the answer to one chat request. Created when its stream has been admitted."""

    def __init__(
        self, request: ChatRequest, stream: Stream, codec: Codec, *, id: str, created: int
    ) -> None:
        self._request = request
        self._stream = stream
        tier = request.service_tier
        self._envelope = Envelope(
            id, "chat.completion", created, stream.model, stream.adapter_version, tier
        )
        self._logprobs = LogprobFormatter(
            codec, top=request.params.logprobs or 0, as_ids=request.tokens_as_ids
        )
        self._prompt_logprobs = LogprobFormatter(codec, top=request.prompt_logprobs or 0)
        self._head = Envelope(
            id, "chat.completion.chunk", created, stream.model, stream.adapter_version, tier
        ).chunk_head()
        n = request.params.n
        self._content_heads = [
            self._head + b'{"index":%d,"delta":{"content":' % index for index in range(n)
        ]
        self._started = [False] * n
        self._tokens = [0] * n
        streaming = request.streaming
        self._continuous = streaming.continuous_usage
        self._null_usage = b',"usage":null' if streaming.include_usage else b""
        self._plain_tail = b'},"logprobs":null,"finish_reason":null}]' + self._end()
        # Text alone matters to most requests; the others want an event for tokens without any.
        self._plain = not (
            self._continuous or request.return_token_ids or request.params.logprobs is not None
        )

    def chunks(self, deltas: Sequence[Delta]) -> bytes:
        """The events for deltas that became ready together; may be empty."""
        return b"".join([self._chunk(delta) for delta in deltas])

    def usage_chunk(self) -> bytes:
        """The event without choices that ends a stream with `include_usage`."""
        usage = self._stream.usage
        return b'%s],"usage":%s}\n\n' % (
            self._head,
            usage_bytes(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens),
        )

    def body(self) -> dict[str, Any]:
        """The whole answer, once the stream has ended."""
        request = self._request
        body = self._envelope.fields()
        body["choices"] = [self._choice(response) for response in self._stream.responses]
        body["usage"] = usage_body(self._stream.usage)
        if request.prompt_logprobs is not None and self._stream.prompt_logprobs is not None:
            body["prompt_logprobs"] = self._prompt_logprobs.prompt(self._stream.prompt_logprobs)
        if request.return_token_ids:
            body["prompt_token_ids"] = list(self._stream.prompt_token_ids)
        return body

    def _choice(self, response: Response) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": response.index,
            "message": {"role": "assistant", "content": response.text, "refusal": None},
            "logprobs": (
                None if response.logprobs is None else self._logprobs.chat(response.logprobs)
            ),
            "finish_reason": response.finish_reason,
            "stop_reason": response.stop_reason,
        }
        if self._request.return_token_ids:
            choice["token_ids"] = list(response.token_ids)
        return choice

    def _chunk(self, delta: Delta) -> bytes:
        index = delta.index
        self._tokens[index] += len(delta.token_ids)
        if self._plain and self._started[index] and delta.finish_reason is None:
            if not delta.text:
                return b""
            return self._content_heads[index] + orjson.dumps(delta.text) + self._plain_tail
        parts: list[bytes] = []
        if not self._started[index]:
            self._started[index] = True
            parts.append(self._role_chunk(index))
        if delta.text or (delta.token_ids and not self._plain):
            parts.append(self._content_chunk(delta))
        # After "error" the stream raises; the error event then says what a finish chunk could not.
        if delta.finish_reason not in (None, "error"):
            parts.append(
                b'%s{"index":%d,"delta":{},"logprobs":null,"finish_reason":%s,"stop_reason":%s}]%s'
                % (
                    self._head,
                    index,
                    orjson.dumps(delta.finish_reason),
                    orjson.dumps(delta.stop_reason),
                    self._end(index),
                )
            )
        return b"".join(parts)

    def _role_chunk(self, index: int) -> bytes:
        end = self._end(index, tokens=0)
        if self._request.return_token_ids:
            ids = orjson.dumps(list(self._stream.prompt_token_ids))
            end = b',"prompt_token_ids":' + ids + end
        return (
            b'%s{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,'
            b'"finish_reason":null}]%s' % (self._head, index, end)
        )

    def _content_chunk(self, delta: Delta) -> bytes:
        logprobs, ids = b"null", b""
        if delta.logprobs is not None:
            logprobs = orjson.dumps(self._logprobs.chat(delta.logprobs))
        if self._request.return_token_ids:
            ids = b',"token_ids":' + orjson.dumps(delta.token_ids)
        return b'%s%s},"logprobs":%s,"finish_reason":null%s}]%s' % (
            self._content_heads[delta.index],
            orjson.dumps(delta.text),
            logprobs,
            ids,
            self._end(delta.index),
        )

    def _end(self, index: int = 0, *, tokens: int | None = None) -> bytes:
        """What follows the choices of a chunk."""
        if not self._continuous:
            return self._null_usage + b"}\n\n"
        usage = self._stream.usage
        done = self._tokens[index] if tokens is None else tokens
        counts = usage_bytes(usage.prompt_tokens, done, usage.cached_tokens)
        return b',"usage":%s}\n\n' % counts
