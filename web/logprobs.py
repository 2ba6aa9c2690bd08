"""Log-probabilities in the three shapes that clients know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..runtime.types import TokenLogprob
    from .backend import Codec

LOWEST: Final = -9999.0
"""Stands for minus infinity, which JSON has no word for; the value vLLM sends."""


class LogprobFormatter:
    """Turns `TokenLogprob` values into JSON values.

    Args:
        codec: names the tokens.
        top: how many alternatives to report.
        as_ids: name tokens ``token_id:N`` instead of by their text, so that none are confused.
    """

    def __init__(self, codec: Codec, *, top: int, as_ids: bool = False) -> None:
        self._codec = codec
        self._top = top
        self._as_ids = as_ids

    def chat(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """``{"content": [{token, logprob, bytes, top_logprobs}], "refusal": null}``."""
        return {
            "content": [
                {
                    **self._chat_token(entry.token_id, entry.logprob),
                    "top_logprobs": [
                        self._chat_token(token, logprob)
                        for token, logprob in entry.top[: self._top]
                    ],
                }
                for entry in entries
            ],
            "refusal": None,
        }

    def completion(
        self, token_ids: Sequence[int], entries: Sequence[TokenLogprob | None], offset: int
    ) -> dict[str, Any]:
        """``{tokens, token_logprobs, top_logprobs, text_offset}``, one entry per token each.

        `offset` counts the characters of the choice's text that stand before these tokens. The
        alternatives of a token include the token itself, as in vLLM; a prompt's first token has
        none and a log-probability of null.
        """
        tokens: list[str] = []
        logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for token_id, entry in zip(token_ids, entries, strict=True):
            text = self._codec.token_text(token_id)
            tokens.append(self._name(token_id))
            offsets.append(offset)
            offset += len(text)
            if entry is None:
                logprobs.append(None)
                tops.append(None)
                continue
            logprobs.append(_finite(entry.logprob))
            top = {self._name(entry.token_id): _finite(entry.logprob)}
            for other, logprob in entry.top[: self._top]:
                # Two byte fragments may look the same as text: the likelier one stays.
                top.setdefault(self._name(other), _finite(logprob))
            tops.append(top)
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def prompt(self, entries: Sequence[TokenLogprob | None]) -> list[dict[str, Any] | None]:
        """vLLM's `prompt_logprobs`: per token, token id to {logprob, rank, decoded_token}."""
        return [None if entry is None else self._prompt_token(entry) for entry in entries]

    def _prompt_token(self, entry: TokenLogprob) -> dict[str, Any]:
        found = {
            str(token): {
                "logprob": _finite(logprob),
                "rank": rank,
                "decoded_token": self._codec.token_text(token),
            }
            for rank, (token, logprob) in enumerate(entry.top[: self._top], 1)
        }
        found.setdefault(
            str(entry.token_id),
            {
                "logprob": _finite(entry.logprob),
                "rank": entry.rank,
                "decoded_token": self._codec.token_text(entry.token_id),
            },
        )
        return found

    def _chat_token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._name(token_id),
            "logprob": _finite(logprob),
            "bytes": list(self._codec.token_bytes(token_id)),
        }

    def _name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._codec.token_text(token_id)


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
