"""From what people say to what is trained on: events become samples of token ids.

    event ─► the responses it names ─► prompt and completions as token ids ─► checks ─► store

An event is stored together with its samples, in one transaction, and acknowledged after that. What
could never be trained on is refused before. What is found out only later (out of memory, a number
that is not finite) makes the sample's state "refused".

Answers of the model itself are taken by their tokens, exactly as they were chosen. Texts are
tokenized as the chat template would have them in place of the answer, end of turn included.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import ContextLengthError, CotuneError, NotFoundError, RequestError
from .events import (
    Acknowledgement,
    Edit,
    Preference,
    Rating,
    TextRating,
    Withdrawal,
    check_event,
    parse_event,
)
from .samples import is_held_out
from .store import NewSample

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from ..tokenization import TextCodec
    from ..types import Message
    from .events import FeedbackEvent
    from .samples import TokenIds
    from .store import FeedbackStore, RecordedResponse

LARGE_TEXT_CHARS = 8192
"""Longer texts are tokenized on a thread of their own."""


class Intake:
    """Takes feedback events.

    Args:
        store: keeps them.
        codec: the model's tokenizer.
        eos_token_ids: the tokens that end a turn, the one that the tokenizer names first.
        max_length: most tokens of prompt plus one completion.
        held_out_share: share of prompts that are for the gate.
        learner_of: the adapter that a model name stands for; raises `NotFoundError`.
        learning: the adapters that learn.
    """

    def __init__(
        self,
        store: FeedbackStore,
        codec: TextCodec,
        *,
        eos_token_ids: Sequence[int],
        max_length: int,
        held_out_share: float,
        learner_of: Callable[[str | None], str],
        learning: Collection[str],
    ) -> None:
        self._store = store
        self._codec = codec
        self._eos = eos_token_ids
        self._max_length = max_length
        self._held_out_share = held_out_share
        self._learner_of = learner_of
        self._learning = learning
        self._refused: Counter[str] = Counter()

    @property
    def refused(self) -> Mapping[str, int]:
        """Events that were not taken since the start, by error code."""
        return dict(self._refused)

    async def take(
        self, event: FeedbackEvent | Mapping[str, object], *, source: str
    ) -> Acknowledgement:
        """Store an event and what is to be learned from it. Returns when both are durable.

        Raises:
            RequestError: something is wrong with it, `param` says what.
            ContextLengthError: it is too long to be trained on.
            NotFoundError: a response or event that it names is not known (any more).
            ConflictError: its id was used for another event.
            OverloadedError: the source's quota is used up, or the queue is full.
            StorageError: the disk is full or failing.
        """
        try:
            parsed = parse_event(event) if isinstance(event, Mapping) else check_event(event)
            try:
                samples = await self.prepare(parsed)
            except RequestError:
                # Its response may have expired since it was stored; the sender cannot know.
                if await self._store.has(parsed, source=source):
                    return Acknowledgement(id=parsed.id, duplicate=True)
                raise
            return await self._store.add(parsed, source=source, samples=samples)
        except CotuneError as error:
            self._refused[error.code or "refused"] += 1
            raise

    async def prepare(self, event: FeedbackEvent) -> Sequence[NewSample]:
        """The samples of an event. Raises as `take`."""
        match event:
            case Rating():
                response = await self._response(event.response_id, "response_id")
                self._check_completion(response, "response_id")
                return (self._rated(response, event.rating),)
            case TextRating():
                adapter = self._learner_of(event.model)
                prompt_ids, completion_ids = await self._encode(
                    event.prompt, event.completion, "completion"
                )
                return (
                    NewSample(
                        kind="rated",
                        adapter=adapter,
                        prompt_ids=prompt_ids,
                        completion_ids=completion_ids,
                        is_desirable=event.rating > 0,
                        is_held_out=self._is_held_out(adapter, prompt_ids),
                        prompt_messages=event.prompt,
                        completion_text=event.completion,
                    ),
                )
            case Preference(chosen_id=str() as chosen_id, rejected_id=str() as rejected_id):
                return (await self._preference_of_responses(chosen_id, rejected_id),)
            case Preference():
                assert event.prompt is not None
                assert event.chosen is not None
                assert event.rejected is not None
                adapter = self._learner_of(event.model)
                prompt_ids, chosen_ids = await self._encode(event.prompt, event.chosen, "chosen")
                _, rejected_ids = await self._encode(event.prompt, event.rejected, "rejected")
                return (
                    self._pair(
                        adapter,
                        prompt_ids,
                        chosen_ids,
                        rejected_ids,
                        "rejected",
                        prompt=event.prompt,
                        chosen=event.chosen,
                        rejected=event.rejected,
                    ),
                )
            case Edit():
                return (await self._edit(event),)
            case Withdrawal():
                return ()

    def _rated(self, response: RecordedResponse, rating: int) -> NewSample:
        return NewSample(
            kind="rated",
            adapter=response.adapter,
            prompt_ids=response.prompt_ids,
            completion_ids=response.completion_ids,
            is_desirable=rating > 0,
            is_held_out=self._is_held_out(response.adapter, response.prompt_ids),
            response_id=response.id,
            prompt_messages=response.messages,
            completion_text=response.text,
        )

    async def _preference_of_responses(self, chosen_id: str, rejected_id: str) -> NewSample:
        chosen = await self._response(chosen_id, "chosen_id")
        rejected = await self._response(rejected_id, "rejected_id")
        if chosen.adapter != rejected.adapter:
            raise RequestError(
                f"rejected_id {rejected_id!r} was answered by {rejected.adapter!r} and chosen_id "
                f"{chosen_id!r} by {chosen.adapter!r}; compare answers of one adapter",
                param="rejected_id",
                code="different_adapters",
            )
        if chosen.prompt_ids != rejected.prompt_ids:
            raise RequestError(
                f"rejected_id {rejected_id!r} and chosen_id {chosen_id!r} answer different "
                "prompts; compare answers to one prompt",
                param="rejected_id",
                code="different_prompts",
            )
        self._check_completion(chosen, "chosen_id")
        self._check_completion(rejected, "rejected_id")
        return self._pair(
            chosen.adapter,
            chosen.prompt_ids,
            chosen.completion_ids,
            rejected.completion_ids,
            "rejected_id",
            prompt=chosen.messages,
            chosen=chosen.text,
            rejected=rejected.text,
        )

    async def _edit(self, event: Edit) -> NewSample:
        response = await self._response(event.response_id, "response_id")
        self._check_completion(response, "response_id")
        if response.messages is None:
            chosen_ids = self._ended(await self._tokens(event.text, "text"))
            self._check_length(response.prompt_ids, chosen_ids, "text")
        else:
            prompt_ids, chosen_ids = await self._encode(response.messages, event.text, "text")
            if prompt_ids != response.prompt_ids:  # the prompt was more than its messages
                chosen_ids = self._ended(await self._tokens(event.text, "text"))
            self._check_length(response.prompt_ids, chosen_ids, "text")
        return self._pair(
            response.adapter,
            response.prompt_ids,
            chosen_ids,
            response.completion_ids,
            "text",
            response_id=response.id,
            prompt=response.messages,
            chosen=event.text,
            rejected=response.text,
        )

    def _pair(
        self,
        adapter: str,
        prompt_ids: TokenIds,
        chosen_ids: TokenIds,
        rejected_ids: TokenIds,
        param: str,
        *,
        prompt: tuple[Message, ...] | None,
        chosen: str,
        rejected: str,
        response_id: str | None = None,
    ) -> NewSample:
        if chosen_ids == rejected_ids:
            raise RequestError(
                f"{param}: the chosen and the rejected answer are the same; nothing can be learned "
                "from that",
                param=param,
                code="identical_answers",
            )
        return NewSample(
            kind="pair",
            adapter=adapter,
            prompt_ids=prompt_ids,
            chosen_ids=chosen_ids,
            rejected_ids=rejected_ids,
            is_held_out=self._is_held_out(adapter, prompt_ids),
            response_id=response_id,
            prompt_messages=prompt,
            chosen_text=chosen,
            rejected_text=rejected,
        )

    async def _response(self, response_id: str, param: str) -> RecordedResponse:
        try:
            response = await self._store.response(response_id)
        except NotFoundError as error:
            raise NotFoundError(error.message, param=param, code=error.code) from error
        if response.adapter not in self._learning:
            raise NotFoundError(
                f"{param} {response_id!r} was answered by {response.adapter!r}, which does not "
                f"learn here (any more); these do: {', '.join(self._learning)}",
                param=param,
                code="adapter_not_learning",
            )
        return response

    def _check_completion(self, response: RecordedResponse, param: str) -> None:
        if not response.completion_ids:
            raise RequestError(
                f"{param} {response.id!r} is an empty answer; nothing can be learned from it",
                param=param,
                code="empty_answer",
            )
        self._check_length(response.prompt_ids, response.completion_ids, param)

    def _check_length(self, prompt_ids: TokenIds, completion_ids: TokenIds, param: str) -> None:
        if len(prompt_ids) + len(completion_ids) > self._max_length:
            raise ContextLengthError(
                f"{param}: prompt {len(prompt_ids)} tokens + answer {len(completion_ids)} exceeds "
                f"the training length {self._max_length}; shorten them, or serve with a larger "
                "learning.training.max_length",
                param=param,
                code="too_long_to_train",
            )

    async def _encode(
        self, messages: tuple[Message, ...], text: str, param: str
    ) -> tuple[TokenIds, TokenIds]:
        """Prompt and completion: `text` in the place of the assistant's next turn."""

        def encode() -> tuple[TokenIds, TokenIds]:
            prompt = tuple(self._codec.encode_chat(messages))
            turn: Message = {"role": "assistant", "content": text}
            whole = tuple(self._codec.encode_chat([*messages, turn], add_generation_prompt=False))
            if whole[: len(prompt)] == prompt and len(whole) > len(prompt):
                return prompt, self._cut(whole[len(prompt) :])
            # The template writes past turns in another way than the one to come.
            return prompt, self._ended(self._codec.encode(text, add_special_tokens=False))

        chars = len(text) + sum(len(message["content"]) for message in messages)
        try:
            if chars > LARGE_TEXT_CHARS:
                prompt_ids, completion_ids = await asyncio.to_thread(encode)
            else:
                prompt_ids, completion_ids = encode()
        except RequestError as error:
            if error.param is not None and error.param.startswith("messages"):
                param = error.param.replace("messages", "prompt", 1)
            raise RequestError(error.message, param=param, code=error.code) from error
        self._check_length(prompt_ids, completion_ids, param)
        return prompt_ids, completion_ids

    async def _tokens(self, text: str, param: str) -> list[int]:
        if len(text) > LARGE_TEXT_CHARS:
            return await asyncio.to_thread(
                self._codec.encode, text, add_special_tokens=False, param=param
            )
        return self._codec.encode(text, add_special_tokens=False, param=param)

    def _ended(self, token_ids: Sequence[int]) -> TokenIds:
        """With the end-of-turn token that the model would have written."""
        return (*token_ids, self._eos[0]) if self._eos else tuple(token_ids)

    def _cut(self, completion_ids: TokenIds) -> TokenIds:
        """Up to its last end-of-turn token: what the template writes after it, it writes always."""
        for index in range(len(completion_ids) - 1, -1, -1):
            if completion_ids[index] in self._eos:
                return completion_ids[: index + 1]
        return completion_ids

    def _is_held_out(self, adapter: str, prompt_ids: TokenIds) -> bool:
        return is_held_out(adapter, prompt_ids, self._held_out_share)
