"""What bytes each token of a vocabulary stands for.

Text is a sequence of bytes; byte-level and byte-fallback tokenizers may end a token in the middle
of a character. Knowing every token's bytes makes decoding exact and incremental: concatenate, then
decode UTF-8 (`detokenizer`). That covers the decoders of practically all language models:

    ByteLevel                                          GPT-2, Llama 3, Qwen, OLMo, Granite, ...
    Replace "▁" " ", ByteFallback, Fuse, Strip         Llama 2, Mistral, Gemma, Phi-3, ...
    Metaspace                                          T5-like Unigram models

Invalid UTF-8 becomes U+FFFD as Unicode recommends (one per maximal ill-formed part), for all of
them alike. For any other decoder `TokenTable.is_exact` is False, and the text comes from the
tokenizer's own decoder.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PROBE = "Hello, world!\n  It is 12 o'clock\tin Zürich; 你好 🌍 👩\u200d👧 e\u0301."


def _byte_level_alphabet() -> dict[str, int]:
    """The printable characters that byte-level BPE writes bytes with (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


_ALPHABET = _byte_level_alphabet()


class TokenTable:
    """The bytes of a tokenizer's tokens, worked out when first asked for.

    Args:
        tokenizer: a transformers tokenizer.

    Attributes:
        is_exact: whether the bytes below are known; where not, they are those of the token decoded
            alone.
        pieces: token id to bytes; ids that the tokenizer does not know have none.
        visible_pieces: the same, with no bytes for special tokens.
        leading_spaces: spaces that the decoder strips from the start of a text.
        strips_first_token: whether the first token of a text loses its leading "▁" (Metaspace).
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer_decode = tokenizer.decode
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._special = _special_ids(tokenizer)
        self.leading_spaces = 0
        self.strips_first_token = False
        self._marker = ""
        self._convert = self._read_decoder()
        self.pieces = _Lazy(self._piece)
        self.visible_pieces = _Lazy(lambda i: b"" if i in self._special else self.pieces[i])
        self.is_exact = self._convert is not None and self._agrees_with_tokenizer()
        if not self.is_exact:
            self._convert = None
            self.leading_spaces = 0
            self.strips_first_token = False
            self.pieces.clear()

    def first_piece(self, token_id: int) -> bytes:
        """A token's bytes if it is the first of a text."""
        if self.strips_first_token:
            token = self._backend.id_to_token(token_id)
            return str(token).replace(self._marker, "").encode()
        return self.pieces[token_id]

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of a whole sequence, special tokens included; only where `is_exact`."""
        ids = list(token_ids)
        data = b"".join(self.pieces[i] for i in ids[1:])
        text = ((self.first_piece(ids[0]) if ids else b"") + data).decode("utf-8", "replace")
        spaces = len(text) - len(text.lstrip(" "))
        return text[min(self.leading_spaces, spaces) :]

    def _piece(self, token_id: int) -> bytes:
        if self._convert is None:
            text = self._tokenizer_decode(
                [token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            return str(text).encode("utf-8", "replace")
        token = self._backend.id_to_token(token_id)
        return b"" if token is None else self._convert(token)

    def _read_decoder(self) -> Callable[[str], bytes] | None:
        """The function from a token's string to its bytes, or None for a decoder not known here."""
        if self._backend is None or self._backend.decoder is None:
            return None
        spec = json.loads(self._backend.decoder.__getstate__())
        steps = spec["decoders"] if spec["type"] == "Sequence" else [spec]
        kinds = [step["type"] for step in steps]
        if kinds in (["ByteLevel"], ["ByteLevel", "Fuse"]):
            return _byte_level
        if kinds == ["Metaspace"]:
            self._marker = steps[0]["replacement"]
            self.strips_first_token = steps[0]["prepend_scheme"] != "never"
            return lambda token: token.replace(self._marker, " ").encode()
        return self._read_sentencepiece(steps)

    def _read_sentencepiece(self, steps: list[dict[str, Any]]) -> Callable[[str], bytes] | None:
        replacements: list[tuple[str, str]] = []
        has_bytes = is_fused = False
        for step in steps:
            match step:
                case {"type": "Replace", "pattern": {"String": old}, "content": new} if (
                    not is_fused and not has_bytes
                ):
                    replacements.append((old, new))
                case {"type": "ByteFallback"} if not is_fused:
                    has_bytes = True
                case {"type": "Fuse"}:
                    is_fused = True
                case {"type": "Strip", "content": " ", "start": start, "stop": 0} if is_fused:
                    self.leading_spaces += start
                case _:
                    return None
        if not is_fused:
            return None

        def convert(token: str) -> bytes:
            for old, new in replacements:
                token = token.replace(old, new)
            if has_bytes and (match := _BYTE_TOKEN.fullmatch(token)):
                return bytes((int(match[1], 16),))
            return token.encode()

        return convert

    def _agrees_with_tokenizer(self) -> bool:
        """Whether a text of many kinds of characters decodes to what the tokenizer makes of it."""
        ids = self._backend.encode(_PROBE, add_special_tokens=False).ids
        return bool(self.decode(ids) == self._backend.decode(ids, skip_special_tokens=False))


class _Lazy(dict[int, bytes]):
    """Computes a missing value once."""

    def __init__(self, compute: Callable[[int], bytes]) -> None:
        super().__init__()
        self._compute = compute

    def __missing__(self, key: int) -> bytes:
        value = self[key] = self._compute(key)
        return value


def _byte_level(token: str) -> bytes:
    """Bytes from GPT-2's characters; a token with any other character (an added one) is text."""
    try:
        return bytes([_ALPHABET[char] for char in token])
    except KeyError:
        return token.encode()


def _special_ids(tokenizer: Any) -> frozenset[int]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return frozenset(tokenizer.all_special_ids)
    added = backend.get_added_tokens_decoder()
    return frozenset(token_id for token_id, token in added.items() if token.special)


_tables: WeakKeyDictionary[Any, TokenTable] = WeakKeyDictionary()


def table_of(tokenizer: Any) -> TokenTable:
    """The tokenizer's table, made once. Tokens added to the tokenizer afterwards are not seen."""
    table = _tables.get(tokenizer)
    if table is None:
        table = _tables[tokenizer] = TokenTable(tokenizer)
    return table
