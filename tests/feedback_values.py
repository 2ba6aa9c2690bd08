"""Feedback for tests: responses, samples and a clock that the test turns."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING

from cotune.runtime.learning.config import FeedbackConfig
from cotune.runtime.learning.sqlite_store import SqliteBackend
from cotune.runtime.learning.store import FeedbackStore, NewSample, RecordedResponse

if TYPE_CHECKING:
    from pathlib import Path

    from cotune.runtime.types import Message

ADAPTER = "tutor"
PROMPT: tuple[Message, ...] = ({"role": "user", "content": "How far is the moon?"},)


class Clock:
    """The time of day, as the test says."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def pass_s(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def open_store(
    path: Path, config: FeedbackConfig | None = None, clock: Clock | None = None
) -> FeedbackStore:
    return FeedbackStore(
        partial(SqliteBackend, path), config or FeedbackConfig(), clock=clock or Clock()
    )


def response(
    response_id: str = "r1",
    *,
    source: str = "asker",
    text: str = "Far.",
    created_s: float | None = None,
) -> RecordedResponse:
    return RecordedResponse(
        id=response_id,
        adapter=ADAPTER,
        version=3,
        model="demo",
        source=source,
        prompt_ids=(1, 2, 2**31),
        completion_ids=(4, 5),
        text=text,
        messages=PROMPT,
        sampling={"temperature": 0.5, "seed": None, "logit_bias": {3: 1.0}},
        finish_reason="stop",
        created_s=Clock().now.timestamp() if created_s is None else created_s,
    )


def rated(
    is_desirable: bool = True, *, adapter: str = ADAPTER, held_out: bool = False
) -> NewSample:
    return NewSample(
        kind="rated",
        adapter=adapter,
        prompt_ids=(1, 2),
        completion_ids=(3,),
        is_desirable=is_desirable,
        is_held_out=held_out,
        response_id="r1",
        prompt_messages=PROMPT,
        completion_text="Far.",
    )


def pair(
    chosen: str = "384,400 km", *, adapter: str = ADAPTER, held_out: bool = False
) -> NewSample:
    return NewSample(
        kind="pair",
        adapter=adapter,
        prompt_ids=(1, 2),
        chosen_ids=(3, 4),
        rejected_ids=(5,),
        is_held_out=held_out,
        prompt_messages=PROMPT,
        chosen_text=chosen,
        rejected_text="Far.",
    )
