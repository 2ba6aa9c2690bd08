"""Tokenizers of the kinds that language models have, made in code."""

from __future__ import annotations

import functools
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "hello world, this is a small corpus of text",
    "the quick brown fox jumps over the lazy dog; don't stop",
    "你好世界 🌍 café naïve e\u0301 日本語",
    "emoji 👩\u200d👩\u200d👧 family\n\n  two  spaces\tand tabs",
] * 3

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

KINDS = ("byte_level", "byte_fallback", "metaspace", "wordpiece")


@functools.cache
def small_tokenizer(kind: str) -> Any:
    """A transformers tokenizer with <s> and </s> as special tokens.

    byte_level: as GPT-2's, Llama 3's and Qwen's. byte_fallback: as Llama 2's and Gemma's, with a
    token for every byte. metaspace: Unigram as T5's. wordpiece: as BERT's, for which the tokenizer
    itself decodes.
    """
    tokenizer = {
        "byte_level": _byte_level,
        "byte_fallback": _byte_fallback,
        "metaspace": _metaspace,
        "wordpiece": _wordpiece,
    }[kind]()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    # Added but not special, with characters outside the byte-level alphabet: it stays in the text.
    tokenizer.add_tokens([AddedToken("日本 tok", special=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        BpeTrainer(
            vocab_size=400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def _byte_fallback() -> Tokenizer:
    # A Unigram model over the characters and words of the corpus, as SentencePiece would leave it.
    words = {f"▁{word}" for line in CORPUS for word in line.split() if word.isascii()}
    pieces = [*sorted(words), "▁", *"abcdefghijklmnopqrstuvwxyz,;'\n", "你好", "é"]
    vocab = [("<unk>", 0.0)]
    vocab += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    vocab += [(piece, -float(i) / 50 - 2) for i, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def _metaspace() -> Tokenizer:
    words = {f"▁{word}" for line in CORPUS for word in line.split()}
    pieces = [*sorted(words), "▁", *sorted({char for line in CORPUS for char in line} - {" "})]
    vocab = [("<unk>", 0.0), *((piece, -2.0 - i / 50) for i, piece in enumerate(pieces))]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def _wordpiece() -> Tokenizer:
    words = sorted({word for line in CORPUS for word in line.split()})
    chars = sorted({char for line in CORPUS for char in line} - {" "})
    vocab = ["<unk>", *words, *(f"##{char}" for char in chars)]
    vocab += [char for char in chars if char not in words]
    tokenizer = Tokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(vocab)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer
