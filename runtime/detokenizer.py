"""From tokens to text as they arrive: whole characters only, and nothing past a stop string."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING, Any

from .token_table import TokenTable, table_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_MAX_PENDING_TOKENS = 8  # a character has at most four bytes, and a token at least one


class IncrementalDetokenizer:
    """The text of an answer, a few tokens at a time.

    The pieces joined are what decoding the prompt and the answer in one go adds to decoding the
    prompt: an answer to "…:" begins with the space that its first token carries. Never half a
    character: its bytes are held until the last one arrives. A push costs the same at any length.

    Args:
        tokenizer: a transformers tokenizer.
        prompt_ids: what comes before the answer.
        skip_special_tokens: leave special tokens out of the text.
    """

    __slots__ = ("_stream",)

    def __init__(
        self, tokenizer: Any, prompt_ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> None:
        table = table_of(tokenizer)
        self._stream: _ByteStream | _WindowStream
        if table.is_exact:
            self._stream = _ByteStream(table, prompt_ids, skip_special_tokens)
        else:
            self._stream = _WindowStream(tokenizer, prompt_ids, skip_special_tokens)

    def push(self, token_ids: Iterable[int]) -> str:
        """Take the next tokens; the text that they complete (possibly none)."""
        return self._stream.push(token_ids)

    def finish(self) -> str:
        """The rest, at the end of the answer: U+FFFD if it stopped within a character."""
        return self._stream.finish()


class _ByteStream:
    """Joins the tokens' bytes and decodes UTF-8."""

    __slots__ = ("_at_start", "_decode", "_drops_marker", "_pieces", "_spaces", "_splits", "_table")

    def __init__(
        self, table: TokenTable, prompt_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        pieces = table.visible_pieces if skip_special_tokens else table.pieces
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # A prompt may end within a character. Three tokens hold all its bytes; what else they
        # decode to is the prompt's.
        for token_id in prompt_ids[-3:]:
            decoder.decode(pieces[token_id])
        begins_text = not any(pieces[token_id] for token_id in prompt_ids)
        self._table = table
        self._pieces = pieces
        self._decode = decoder.decode
        self._splits = bool(decoder.getstate()[0])
        self._drops_marker = begins_text and table.strips_first_token
        self._spaces = table.leading_spaces if begins_text else 0
        self._at_start = self._splits or self._drops_marker or self._spaces > 0

    def push(self, token_ids: Iterable[int]) -> str:
        if self._at_start:
            return "".join([self._push_at_start(token_id) for token_id in token_ids])
        pieces = self._pieces
        return self._decode(b"".join([pieces[token_id] for token_id in token_ids]))

    def finish(self) -> str:
        return self._trim(self._decode(b"", True))

    def _push_at_start(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        if piece and self._drops_marker:
            piece = self._table.first_piece(token_id)
            self._drops_marker = False
        return self._trim(self._decode(piece))

    def _trim(self, text: str) -> str:
        """Take off what a start has too much of; the start is over with the first text left."""
        if not self._at_start or not text:
            return text
        if self._splits:
            # Not completed, the prompt's last character was U+FFFD already there.
            text = text.removeprefix("\ufffd")
            self._splits = False
        while self._spaces and text.startswith(" "):
            text = text[1:]
            self._spaces -= 1
        if text:
            self._spaces = 0
        self._at_start = self._drops_marker or self._spaces > 0
        return text


class _WindowStream:
    """Asks the tokenizer for the text of the last few tokens, with and without the new ones.

    tokens   … a  b  c │ d  e          decode(abcde) minus decode(abc) is new,
               └ window ┘              unless it ends in U+FFFD: then wait for more
    """

    __slots__ = ("_decode", "_new", "_skip", "_text", "_window")

    def __init__(
        self, tokenizer: Any, prompt_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._decode = tokenizer.decode
        self._skip = skip_special_tokens
        self._window = list(prompt_ids[-_MAX_PENDING_TOKENS:])
        self._text = self._text_of(self._window)
        self._new = 0

    def push(self, token_ids: Iterable[int]) -> str:
        return "".join([self._push(token_id) for token_id in token_ids])

    def finish(self) -> str:
        return self._take(self._text_of(self._window)) if self._new else ""

    def _push(self, token_id: int) -> str:
        self._window.append(token_id)
        self._new += 1
        text = self._text_of(self._window)
        if self._new < _MAX_PENDING_TOKENS and (
            text.endswith("\ufffd") or len(text) <= len(self._text)
        ):
            return ""
        return self._take(text)

    def _take(self, text: str) -> str:
        fresh = text[len(self._text) :]
        # The newest tokens alone are context enough for those to come.
        self._window = self._window[-self._new :]
        self._text = self._text_of(self._window)
        self._new = 0
        return fresh

    def _text_of(self, token_ids: list[int]) -> str:
        return str(
            self._decode(
                token_ids,
                skip_special_tokens=self._skip,
                clean_up_tokenization_spaces=False,
            )
        )


class StopChecker:
    """Finds the stop string that is complete first, however the text is cut into pieces.

    Text that may turn out to be the start of a stop string is held back. Of several that are
    complete at the same character the longest counts. Each character moves one counter per stop
    string (Knuth, Morris, Pratt 1977), so that neither long nor self-similar stop strings cost
    more; text without any first character of one passes at once.

    Args:
        stop: the stop strings; none may be empty.
        include_stop: keep the matched string in the text.
        min_tokens: a match that is complete within the first `min_tokens` tokens does not count.

    Attributes:
        matched: the stop string that ended the text, or None.
    """

    __slots__ = (
        "_borders",
        "_first_chars",
        "_held",
        "_include",
        "_lengths",
        "_min_tokens",
        "_stop",
        "matched",
    )

    def __init__(
        self, stop: Sequence[str], *, include_stop: bool = False, min_tokens: int = 0
    ) -> None:
        if not all(stop):
            raise ValueError("a stop string is empty")
        self.matched: str | None = None
        self._stop = tuple(stop)
        self._include = include_stop
        self._min_tokens = min_tokens
        self._first_chars = frozenset(text[0] for text in stop)
        self._lengths = [0] * len(self._stop)  # how much of each the text ends in
        self._borders: list[list[int]] = [[0, 0] for _ in stop]
        self._held = ""

    def push(self, text: str, token_count: int) -> str:
        """Take new text; what of it (and of the text held back) may be shown.

        Args:
            text: what the detokenizer returned.
            token_count: tokens of the answer so far, those of `text` included.
        """
        if not self._held and self._first_chars.isdisjoint(text):
            return "" if self.matched else text
        if self.matched:
            return ""
        return self._search(text, counts=token_count > self._min_tokens)

    def finish(self) -> str:
        """The text still held back, at the end of an answer that no stop string ended."""
        held, self._held = self._held, ""
        return held

    def _search(self, text: str, *, counts: bool) -> str:
        lengths, stops = self._lengths, self._stop
        buffer = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            complete = ""
            for i, stop in enumerate(stops):
                length = lengths[i]
                while length and stop[length] != char:
                    length = self._border(i, length)
                if stop[length] == char:
                    length += 1
                    if length == len(stop):
                        if counts and length > len(complete):
                            complete = stop
                        length = self._border(i, length)
                lengths[i] = length
            if complete:
                self.matched = complete
                self._held = ""
                return buffer[: end if self._include else end - len(complete)]
        held = max(lengths)
        cut = len(buffer) - held
        self._held = buffer[cut:]
        return buffer[:cut]

    def _border(self, i: int, length: int) -> int:
        """Length of the longest proper prefix of stop[:length] that is also its suffix."""
        stop, borders = self._stop[i], self._borders[i]
        while len(borders) <= length:  # worked out as far as the text has ever matched
            char, border = stop[len(borders) - 1], borders[-1]
            while border and stop[border] != char:
                border = borders[border]
            borders.append(border + 1 if stop[border] == char else 0)
        return borders[length]
