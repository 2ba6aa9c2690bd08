"""A completions answer, whole and in chunks.

Choices are numbered through: prompt p's completion i has index ``p * n + i``. A stream's chunks
carry text, and the last one of a choice its finish_reason; then the usage chunk, if asked for, and
[DONE]. With `echo` a choice's first chunk is its prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from .logprobs import LogprobFormatter
from .shape import Envelope, total_usage, usage_body, usage_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..runtime.types import Delta, Response, Usage
    from .backend import Codec, Stream
    from .requests import CompletionRequest


class CompletionAnswer:
    """Shapes the choices of one prompt. Created when its stream has been admitted.

    Args:
        request: the whole request.
        stream: this prompt's.
        codec: the model's.
        prompt: which of the request's prompts this is.
        id: the whole answer's id.
        created: when the request came, in seconds since 1970.
    """

    def __init__(
        self,
        request: CompletionRequest,
        stream: Stream,
        codec: Codec,
        *,
        prompt: int,
        id: str,
        created: int,
    ) -> None:
        self._request = request
        self._stream = stream
        self._envelope = Envelope(
            id,
            "text_completion",
            created,
            stream.model,
            stream.adapter_version,
            request.service_tier,
        )
        self._logprobs = LogprobFormatter(
            codec, top=request.params.logprobs or 0, as_ids=request.tokens_as_ids
        )
        self._prompt_logprobs = LogprobFormatter(codec, top=request.prompt_logprobs or 0)
        self._echo = ""
        if request.echo:
            given = request.prompts[prompt]
            self._echo = (
                given
                if isinstance(given, str)
                else codec.decode(given, skip_special_tokens=request.params.skip_special_tokens)
            )
        n = request.params.n
        self._first_index = prompt * n
        head = self._envelope.chunk_head()
        self._heads = [head + b'{"index":%d,"text":' % (self._first_index + i) for i in range(n)]
        self._started = [False] * n
        self._tokens = [0] * n
        self._chars = [0] * n
        self._continuous = request.streaming.continuous_usage
        self._null_usage = b',"usage":null' if request.streaming.include_usage else b""
        self._plain_tail = b',"logprobs":null,"finish_reason":null,"stop_reason":null}]' + (
            self._null_usage + b"}\n\n"
        )
        self._plain = not (
            self._continuous or request.return_token_ids or request.params.logprobs is not None
        )

    @property
    def usage(self) -> Usage:
        """This prompt's tokens."""
        return self._stream.usage

    def chunks(self, deltas: Sequence[Delta]) -> bytes:
        """The events for deltas that became ready together; may be empty."""
        return b"".join([self._chunk(delta) for delta in deltas])

    def choices(self) -> list[dict[str, Any]]:
        """This prompt's choices, once its stream has ended."""
        return [self._choice(response) for response in self._stream.responses]

    @staticmethod
    def body(answers: Sequence[CompletionAnswer]) -> dict[str, Any]:
        """The whole answer: the choices of all prompts."""
        body = answers[0]._envelope.fields()
        body["choices"] = [choice for answer in answers for choice in answer.choices()]
        body["usage"] = usage_body(total_usage([answer.usage for answer in answers]))
        return body

    @staticmethod
    def usage_chunk(answers: Sequence[CompletionAnswer]) -> bytes:
        """The event without choices that ends a stream with `include_usage`."""
        usage = total_usage([answer.usage for answer in answers])
        return b'%s],"usage":%s}\n\n' % (
            answers[0]._envelope.chunk_head(),
            usage_bytes(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens),
        )

    def _choice(self, response: Response) -> dict[str, Any]:
        logprobs = None
        if response.logprobs is not None:
            ids, entries = list(response.token_ids), [*response.logprobs]
            if self._request.echo:
                prompt_ids, prompt_entries = self._prompt_tokens()
                logprobs = self._logprobs.completion(
                    [*prompt_ids, *ids], [*prompt_entries, *entries], 0
                )
            else:
                logprobs = self._logprobs.completion(ids, entries, 0)
        choice: dict[str, Any] = {
            "index": self._first_index + response.index,
            "text": self._echo + response.text,
            "logprobs": logprobs,
            "finish_reason": response.finish_reason,
            "stop_reason": response.stop_reason,
        }
        prompt_logprobs = self._stream.prompt_logprobs
        if self._request.prompt_logprobs is not None and prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._prompt_logprobs.prompt(prompt_logprobs)
        if self._request.return_token_ids:
            choice["token_ids"] = list(response.token_ids)
            choice["prompt_token_ids"] = list(self._stream.prompt_token_ids)
        return choice

    def _chunk(self, delta: Delta) -> bytes:
        index = delta.index
        self._tokens[index] += len(delta.token_ids)
        if self._plain and self._started[index] and delta.finish_reason is None:
            if not delta.text:
                return b""
            return self._heads[index] + orjson.dumps(delta.text) + self._plain_tail
        parts: list[bytes] = []
        if not self._started[index]:
            self._started[index] = True
            if self._request.echo:
                parts.append(self._echo_chunk(index))
        # After "error" the stream raises; the error event then says what a finish chunk could not.
        is_end = delta.finish_reason not in (None, "error")
        if delta.text or is_end or (delta.token_ids and not self._plain):
            parts.append(self._content_chunk(delta, is_end))
        return b"".join(parts)

    def _echo_chunk(self, index: int) -> bytes:
        logprobs: dict[str, Any] | None = None
        ids, entries = self._prompt_tokens()
        if self._request.params.logprobs is not None:
            logprobs = self._logprobs.completion(ids, entries, 0)
        self._chars[index] += len(self._echo)
        chunk = b'%s%s,"logprobs":%s,"finish_reason":null,"stop_reason":null' % (
            self._heads[index],
            orjson.dumps(self._echo),
            orjson.dumps(logprobs),
        )
        if self._request.return_token_ids:
            chunk += b',"prompt_token_ids":' + orjson.dumps(ids)
        return chunk + b"}]" + self._end(0)

    def _content_chunk(self, delta: Delta, is_end: bool) -> bytes:
        index = delta.index
        logprobs = b"null"
        if delta.logprobs is not None:
            logprobs = orjson.dumps(
                self._logprobs.completion(delta.token_ids, delta.logprobs, self._chars[index])
            )
        self._chars[index] += len(delta.text)
        chunk = b'%s%s,"logprobs":%s,"finish_reason":%s,"stop_reason":%s' % (
            self._heads[index],
            orjson.dumps(delta.text),
            logprobs,
            orjson.dumps(delta.finish_reason if is_end else None),
            orjson.dumps(delta.stop_reason),
        )
        if self._request.return_token_ids:
            chunk += b',"token_ids":' + orjson.dumps(delta.token_ids)
        return chunk + b"}]" + self._end(self._tokens[index])

    def _end(self, tokens: int) -> bytes:
        if not self._continuous:
            return self._null_usage + b"}\n\n"
        usage = self._stream.usage
        counts = usage_bytes(usage.prompt_tokens, tokens, usage.cached_tokens)
        return b',"usage":%s}\n\n' % counts

    def _prompt_tokens(self) -> tuple[list[int], list[Any]]:
        ids = list(self._stream.prompt_token_ids)
        entries = self._stream.prompt_logprobs
        return ids, [None] * len(ids) if entries is None else list(entries)
