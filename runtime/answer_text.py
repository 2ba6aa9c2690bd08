"""The text of one answer: its tokens, put together and looked through for stop strings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from .detokenizer import StopChecker

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .types import SamplingParams


class Detokenizer(Protocol):
    """Turns tokens into whole characters; see `IncrementalDetokenizer`."""

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete."""

    def finish(self) -> str:
        """The rest."""


class AnswerText:
    """What a reader of the answer sees, as the tokens come.

    Args:
        detokenizer: fresh, for this answer.
        params: stop strings, whether to keep them, and from which token on they count.
    """

    __slots__ = ("_checker", "_count", "_detokenizer")

    def __init__(self, detokenizer: Detokenizer, params: SamplingParams) -> None:
        self._detokenizer = detokenizer
        self._count = 0
        self._checker: StopChecker | None = None
        if params.stop:
            self._checker = StopChecker(
                params.stop,
                include_stop=params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
            )

    def push(self, token_id: int) -> str:
        """The text that is certain with this token; may be empty. See `stop` afterwards."""
        self._count += 1
        text = self._detokenizer.push((token_id,))
        return text if self._checker is None else self._checker.push(text, self._count)

    def finish(self) -> str:
        """The text that was held back; nothing is pushed after this. See `stop` afterwards."""
        text = self._detokenizer.finish()
        if self._checker is None:
            return text
        return self._checker.push(text, self._count) + self._checker.finish()

    @property
    def stop(self) -> str | None:
        """The stop string that ended the text."""
        return None if self._checker is None else self._checker.matched
