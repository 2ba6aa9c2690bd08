"""The text that the demo model is trained on: read, cleaned, split, mixed and tokenized.

    corpus_*.jsonl.xz ──► rows ──► clean ──► documents ──► held-out or train (hash of the row)
                                                               │
                       tokenizer (byte-level BPE) ◄────────────┤
                                                               ▼
                                  PackedDocuments per corpus ──► TokenMixer ──► one token stream

Nothing of the two drift streams is ever a document: they are a later evaluation, and `Exclusions`
says what that means. Everything here is a pure function of the files and a seed.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ..runtime.errors import ConfigError
from .json_lines import read_json_lines

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

Row: TypeAlias = dict[str, Any]
"""One JSON object of a corpus file."""

Message: TypeAlias = dict[str, str]
"""``{"role", "content"}``."""

DOCUMENT_TOKEN = "<|endoftext|>"
END_TOKEN = "<|end|>"
ROLES = ("system", "user", "assistant", "tool")
SPECIAL_TOKENS = (DOCUMENT_TOKEN, *(f"<|{role}|>" for role in ROLES), END_TOKEN)
"""Their position is their token id."""

CHAT_TEMPLATE = (
    "{{- '<|endoftext|>' }}"
    "{%- for message in messages %}"
    "{%- if message['role'] in ['system', 'user', 'assistant', 'tool'] %}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{%- else %}"
    "{{- raise_exception('unknown role: ' + message['role'] + "
    "'; use system, user, assistant or tool') }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
"""Jinja form of `render_chat`."""

FILES: Mapping[str, str] = {
    "books": "corpus_books.jsonl.xz",
    "storybooks": "corpus_storybooks.jsonl.xz",
    "tinystories": "corpus_tinystories.jsonl.xz",
    "sgd": "corpus_dialogue_sgd.jsonl.xz",
    "sgd_system": "sessions_sgd.jsonl.gz",
    "topical": "corpus_dialogue_topical.jsonl.xz",
    "persona": "corpus_dialogue_persona.jsonl.xz",
    "coffee": "corpus_dialogue_coffee.jsonl.xz",
    "dolly": "corpus_instruct_dolly.jsonl.xz",
    "gsm8k": "corpus_instruct_gsm8k.jsonl.xz",
}
"""Corpus name to file name."""

PREFERENCES_FILE = "preferences.jsonl.gz"
DRIFT_FILES = ("drift_persona.jsonl.gz", "drift_text.jsonl.gz")
YES_NO_SOURCE = "anthropic-evals-persona"

SOURCES: Mapping[str, str] = {
    "books": "children's classics of Project Gutenberg (GitHub organisation gitenberg) and "
    "Standard Ebooks (organisation standardebooks), in pieces of about 2,300 characters",
    "storybooks": "GitHub global-asp/asp-source and global-asp/pb-source",
    "tinystories": "TinyStories (a part is kept in GitHub s-ajaykumar/smallGPT)",
    "sgd": "GitHub google-research-datasets/dstc8-schema-guided-dialogue, train split",
    "sgd_system": "the same repository, dev split, the service descriptions as system message",
    "topical": "GitHub alexa/Topical-Chat, valid and test splits",
    "persona": "GitHub google-research-datasets/Synthetic-Persona-Chat, valid and test splits",
    "coffee": "GitHub google-research-datasets/Taskmaster, TM-4-2024",
    "dolly": "databricks-dolly-15k (kept in GitHub nayohan/dolly-15k-analysis)",
    "gsm8k": "GitHub openai/grade-school-math, train split",
    PREFERENCES_FILE: "GitHub anthropics/evals (persona) and others",
    DRIFT_FILES[0]: "a stream arranged from the preferences file; needed to keep it out",
    DRIFT_FILES[1]: "a stream arranged from the preferences file; needed to keep it out",
}
"""Where each file's text is published."""

STABLE_WEIGHTS: Mapping[str, float] = {
    "books": 18,
    "sgd": 23,
    "topical": 15,
    "persona": 9,
    "dolly": 7,
    "gsm8k": 6,
    "storybooks": 6,
    "tinystories": 4,
    "story_chat": 4,
    "sgd_system": 3,
    "coffee": 3,
    "yes_no": 2,
}
"""Shares of the tokens before the learning rate decays."""

DECAY_WEIGHTS: Mapping[str, float] = {
    "persona": 24,
    "dolly": 20,
    "topical": 14,
    "sgd": 13,
    "story_chat": 12,
    "coffee": 4,
    "sgd_system": 3,
    "yes_no": 3,
    "gsm8k": 3,
    "tinystories": 2,
    "books": 2,
}
"""Shares of the tokens while the learning rate decays: what the model should sound like."""

HELD_OUT_PERCENT = 2.0
_MIN_OVERLAP_CHARS = 40
_STORY_PROMPTS = (
    "Tell me a story.",
    "Tell me a story.",
    "Can you tell me a story?",
    "Please tell me a short story.",
    "I would like to hear a story.",
    "Tell me a bedtime story.",
)
_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You are a helpful, friendly assistant. Answer in simple English.",
)
_FIRST_NAMES = (
    *("Alex", "Sam", "Maria", "John", "Emma", "David", "Sarah", "Tom"),
    *("Anna", "Mike", "Laura", "Ben", "Lucy", "Peter", "Grace", "Daniel"),
    *("Julia", "Mark", "Nina", "Paul", "Rosa", "Adam", "Kate", "Leo"),
    *("Mia", "Jack", "Ruth", "Eric", "Sophie", "Henry"),
)


class DemoDataError(ConfigError):
    """The training text is missing or cannot be used; the message says what to fetch."""


def render_chat(messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
    """A conversation as one string; `CHAT_TEMPLATE` renders the same.

    Raises: ValueError for a role that is not in `ROLES`.
    """
    parts = [DOCUMENT_TOKEN]
    for message in messages:
        if message["role"] not in ROLES:
            raise ValueError(f"unknown role: {message['role']}; use one of {', '.join(ROLES)}")
        parts.append(f"<|{message['role']}|>{message['content']}{END_TOKEN}")
    if add_generation_prompt:
        parts.append("<|assistant|>")
    return "".join(parts)


def render_text(text: str) -> str:
    """Plain prose as a document: the separator, then the text."""
    return DOCUMENT_TOKEN + text


def stable_fraction(key: str) -> float:
    """A number in [0, 1) that depends on `key` alone (SHA-256)."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big") / 2.0**56


def is_held_out(row: Row) -> bool:
    """Whether this row belongs to the held-out split; true of `HELD_OUT_PERCENT` of all rows.

    The text alone decides, so neither file order nor seed can move a row across the split.
    """
    key = row.get("text") or "\n".join(m["content"] for m in row["messages"])
    return stable_fraction("held-out:" + key) * 100.0 < HELD_OUT_PERCENT


# --- what may not be trained on ---------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Exclusions:
    """What the drift streams contain, and so no document may.

    ids: pairs of the streams. topics: every topic that occurs in `drift_persona`, noise rows
    included. utterances: user messages of the streams, normalized; a conversation that repeats one
    of at least 40 characters is dropped (shorter ones are phrases such as "yes, that is right").
    """

    ids: frozenset[str]
    topics: frozenset[str]
    utterances: frozenset[str]

    def covers_preference(self, row: Row) -> bool:
        """Whether this preference row must not be trained on."""
        return (
            row["id"] in self.ids
            or row["topic"] in self.topics
            or any(_normalized(m["content"]) in self.utterances for m in row["prompt"])
        )

    def covers_conversation(self, messages: Sequence[Message]) -> bool:
        """Whether a user message of this conversation also stands in a drift stream."""
        return any(
            len(m["content"]) >= _MIN_OVERLAP_CHARS and _normalized(m["content"]) in self.utterances
            for m in messages
            if m["role"] == "user"
        )


def read_exclusions(data: Path) -> Exclusions:
    """Read the drift streams in `data` for the sole purpose of keeping them out."""
    ids: set[str] = set()
    topics: set[str] = set()
    utterances: set[str] = set()
    for name in DRIFT_FILES:
        for row in _read_rows(data / name):
            ids.add(row["id"])
            if row["source"] == YES_NO_SOURCE:
                topics.add(row["topic"])
            utterances.update(
                _normalized(m["content"]) for m in row["prompt"] if m["role"] == "user"
            )
    return Exclusions(
        ids=frozenset(ids), topics=frozenset(topics), utterances=frozenset(utterances)
    )


def _normalized(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


# --- reading and cleaning ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpora:
    """Rendered documents by corpus name, in two splits that share no row."""

    train: Mapping[str, Sequence[str]]
    held_out: Mapping[str, Sequence[str]]


def find_data(candidates: Iterable[Path]) -> Path:
    """The first folder that holds every file.

    Raises: DemoDataError naming the public sources when there is none.
    """
    wanted = {name: FILES[name] for name in FILES} | {
        name: name for name in (PREFERENCES_FILE, *DRIFT_FILES)
    }
    tried: list[str] = []
    missing = list(wanted)
    for folder in candidates:
        missing = [name for name, file in wanted.items() if not (folder / file).is_file()]
        if not missing:
            return folder
        tried.append(str(folder))
    lines = [
        f"training text not found in {' or '.join(tried) or '(nowhere)'}; missing:",
        *(f"  {wanted[name]}: {SOURCES[name]}" for name in missing),
        "Fetch these public data sets, convert each to JSON lines with "
        '{"source", "license", "text"} or {"source", "license", "messages": [{"role", "content"}]}'
        " (compressed as the file name says), and pass the folder with --data.",
    ]
    raise DemoDataError("\n".join(lines))


def load_corpora(data: Path) -> Corpora:
    """Read every corpus of `data`, clean it and split it."""
    exclusions = read_exclusions(data)
    train: dict[str, list[str]] = {}
    held_out: dict[str, list[str]] = {}
    for name, row in _all_rows(data, exclusions):
        split = held_out if is_held_out(row) else train
        for corpus, document in _documents(name, row, exclusions):
            if document.count(DOCUMENT_TOKEN) == 1 and len(document) > len(DOCUMENT_TOKEN):
                split.setdefault(corpus, []).append(document)
    return Corpora(train=train, held_out=held_out)


def _all_rows(data: Path, exclusions: Exclusions) -> Iterator[tuple[str, Row]]:
    for name, file in FILES.items():
        for row in _read_rows(data / file):
            if "<|" not in json.dumps(row, ensure_ascii=False):
                yield name, row
    for pair in _read_rows(data / PREFERENCES_FILE):
        if pair["source"] == YES_NO_SOURCE and not exclusions.covers_preference(pair):
            answer = {"role": "assistant", "content": pair["chosen"]}
            yield "yes_no", {"messages": [*pair["prompt"], answer]}


def _read_rows(path: Path) -> Iterator[Row]:
    for _, row in read_json_lines(path):
        yield row


def _documents(name: str, row: Row, exclusions: Exclusions) -> Iterator[tuple[str, str]]:
    """The documents that one row becomes, with the corpus each belongs to."""
    match name:
        case "books":
            yield name, render_text(row["text"].strip())
        case "storybooks":
            yield name, render_text(f"{row['title']}\n\n{row['text'].strip()}")
            if (chat := _story_chat(row["text"].strip(), row["title"])) is not None:
                yield "story_chat", chat
        case "tinystories":
            for story in split_stories(repair_encoding(row["text"])):
                yield name, render_text(story)
                if _STORY_OPENING.match(story) and (chat := _story_chat(story)) is not None:
                    yield "story_chat", chat
        case _:
            messages = clean_messages(row["messages"])
            if messages is None or exclusions.covers_conversation(messages):
                return
            if name in ("dolly", "persona") and messages[0]["role"] != "system":
                messages = _with_some_system_prompt(messages)
            yield name, render_chat(messages)
            if name == "persona":
                for chat in _yes_no_chats(messages, exclusions):
                    yield "yes_no", chat


_MOJIBAKE = (
    ("â€œ", '"'),
    ("â€\x9d", '"'),
    ("â€™", "'"),
    ("â€˜", "'"),  # noqa: RUF001 - the damage that is looked for
    ("â€”", "--"),
    ("â€“", "-"),
    ("â€¦", "..."),
    ("â€", '"'),
)


def repair_encoding(text: str) -> str:
    """Undo UTF-8 punctuation that was once read as Windows-1252."""
    for wrong, right in _MOJIBAKE:
        text = text.replace(wrong, right)
    return text


_STORY_OPENING = re.compile(
    r"(Once|One (day|night|morning|sunny)|There (was|were|once)|Long ago)\b"
)
_STORY_BREAK = re.compile(
    r"(?<!\n)\n(?=(?:Once|One (?:day|night|morning|sunny)|There (?:was|were|once)|Long ago)\b)"
)


def split_stories(text: str) -> list[str]:
    """Cut a TinyStories piece where a single newline is followed by a story's opening words.

    Paragraphs within a story are set off by two newlines in that copy.
    """
    return [story.strip() for story in _STORY_BREAK.split(text) if len(story.strip()) > 80]


def _story_chat(story: str, title: str | None = None) -> str | None:
    """A request for a story and that story, or None when its length does not suit a chat."""
    if not 250 <= len(story) <= 1800 or story[-1] not in ".!?\"'":
        return None
    choice = stable_fraction("story-prompt:" + story)
    prompt = _STORY_PROMPTS[int(choice * 997) % len(_STORY_PROMPTS)]
    named = re.search(r"\bnamed ([A-Z][a-z]+)", story[:200])
    if choice < 0.4:
        if title is not None:
            prompt = f'Tell me the story "{title}".'
        elif named is not None:
            prompt = f"Tell me a story about {named[1]}."
    return render_chat(
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": story}]
    )


_NAME_SLOT = re.compile(
    r"\[\s*(?:insert\s+)?(?:your|my|the|first)?\s*(?:user|person|speaker)?[ _]*(?P<who>[12])?"
    r"(?:'s)?[ _]*(?:first[ _]*)?(?P<name>name)?\s*(?:here)?\s*\]",
    re.IGNORECASE,
)
_URL = re.compile(r"https?://\S+")


def clean_messages(messages: Sequence[Message]) -> list[Message] | None:
    """Turns in order, without artefacts; None when the row cannot be used.

    Name placeholders such as "[user 1's name]" are filled with a first name, the same one all
    through the row; any other bracketed placeholder drops the row. Neighbours of one role are
    joined, and what follows the last assistant turn is cut off.
    """
    key = "\n".join(m["content"] for m in messages)
    offset = int(stable_fraction("names:" + key) * len(_FIRST_NAMES))
    cleaned: list[Message] = []
    for message in messages:
        speaker = "2" if message["role"] == "assistant" else "1"

        def fill(slot: re.Match[str], speaker: str = speaker) -> str:
            who = slot["who"] or speaker
            if slot["name"] is None and slot["who"] is None:
                return slot[0]
            return _FIRST_NAMES[(offset + 7 * int(who)) % len(_FIRST_NAMES)]

        content = _NAME_SLOT.sub(fill, message["content"]).strip()
        if not content:
            continue
        if re.search(r"\[[A-Za-z][^\]]{0,40}\]", content) or _URL.search(content):
            return None
        if cleaned and cleaned[-1]["role"] == message["role"]:
            cleaned[-1] = {
                "role": message["role"],
                "content": cleaned[-1]["content"] + " " + content,
            }
        else:
            cleaned.append({"role": message["role"], "content": content})
    while cleaned and cleaned[-1]["role"] != "assistant":
        cleaned.pop()
    return cleaned if len(cleaned) >= 2 else None


def _with_some_system_prompt(messages: list[Message]) -> list[Message]:
    """Put a general system message before one conversation in ten, so that one does no harm."""
    choice = stable_fraction("system:" + messages[0]["content"] + messages[1]["content"])
    if choice >= 0.1:
        return messages
    prompt = _SYSTEM_PROMPTS[int(choice * 9973) % len(_SYSTEM_PROMPTS)]
    return [{"role": "system", "content": prompt}, *messages]


_TASTE = re.compile(
    r"^I (?:(?:really|also|do|just) )?(?P<verb>love|like|enjoy|hate|don't like|dislike) "
    r"(?P<object>[a-z][A-Za-z ,']{3,60})[.!]$"
)
_OPPOSITES: Mapping[str, Sequence[str]] = {
    "love": ("hate", "do not love", "don't like"),
    "like": ("dislike", "don't like", "do not care for"),
    "enjoy": ("do not enjoy", "can't stand", "dislike"),
    "hate": ("love", "really like", "enjoy"),
    "don't like": ("like", "really like", "love"),
    "dislike": ("like", "enjoy", "love"),
}
_VAGUE = re.compile(r"\b(it|that|this|them|you|your|too|him|her|those|these|one)\b")


def _yes_no_chats(messages: Sequence[Message], exclusions: Exclusions) -> Iterator[str]:
    """Yes/No questions about a speaker's own words in a persona chat.

    What was said is a "Yes"; the same sentence with the opposite verb is a "No".
    """
    for message in messages:
        for sentence in re.split(r"(?<=[.!?]) ", message["content"]):
            taste = _TASTE.match(sentence)
            if taste is None or _VAGUE.search(taste["object"]):
                continue
            said = f"I {taste['verb']} {taste['object']}"
            choice = int(stable_fraction("yes-no:" + said) * 9973)
            opposite = _OPPOSITES[taste["verb"]]
            unsaid = f"I {opposite[choice % len(opposite)]} {taste['object']}"
            for statement, answer in ((said, "Yes"), (unsaid, "No")):
                question = f'Is the following statement something you would say?\n"{statement}"'
                if _normalized(question) in exclusions.utterances:
                    continue
                yield render_chat(
                    [
                        {"role": "user", "content": question},
                        {"role": "assistant", "content": answer},
                    ]
                )


# --- tokens -----------------------------------------------------------------------------------


def train_tokenizer(corpora: Corpora, *, vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of the training documents.

    Digits stand alone; leading spaces belong to the word; every byte has a token, so any UTF-8 text
    survives the round trip. A quarter of the books is used: they are half of the text and
    old-fashioned.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        strip = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
        for name, documents in corpora.train.items():
            for document in documents[:: 4 if name == "books" else 1]:
                yield strip.sub("\n", document)

    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


@dataclass(frozen=True, slots=True, eq=False)
class PackedDocuments:
    """Documents as one flat array; document i is ``tokens[offsets[i]:offsets[i + 1]]``."""

    tokens: np.ndarray[Any, np.dtype[np.uint16]]
    offsets: np.ndarray[Any, np.dtype[np.int64]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def pack_documents(tokenizer: Tokenizer, documents: Sequence[str]) -> PackedDocuments:
    """Tokenize and join documents."""
    arrays: list[np.ndarray[Any, np.dtype[np.uint16]]] = []
    for start in range(0, len(documents), 2048):
        encodings = tokenizer.encode_batch(
            documents[start : start + 2048], add_special_tokens=False
        )
        arrays.extend(np.asarray(encoding.ids, dtype=np.uint16) for encoding in encodings)
    offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    tokens = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.uint16)
    return PackedDocuments(tokens, offsets)


def token_byte_lengths(tokenizer: Tokenizer) -> np.ndarray[Any, np.dtype[np.int64]]:
    """UTF-8 bytes that each token id stands for; special tokens stand for none."""
    lengths = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for token, index in tokenizer.get_vocab().items():
        # Byte-level tokens are spelled with one character a byte.
        lengths[index] = 0 if token in SPECIAL_TOKENS else len(token)
    return lengths


@dataclass(slots=True, kw_only=True)
class TokenMixer:
    """An endless token stream out of several corpora, in given shares.

    The next document always comes from the corpus that is furthest behind its share of tokens;
    within a corpus each epoch is a new seeded permutation. The stream is a function of (documents,
    weights, seed), and `state` / `restore` continue it exactly.
    """

    corpora: Mapping[str, PackedDocuments]
    weights: Mapping[str, float]
    seed: int
    _served: dict[str, int] = field(init=False)
    _documents: dict[str, int] = field(init=False)
    _buffer: np.ndarray[Any, np.dtype[np.uint16]] = field(init=False)
    _orders: dict[str, tuple[int, np.ndarray[Any, np.dtype[np.int64]]]] = field(init=False)

    def __post_init__(self) -> None:
        """Start at the beginning of the stream."""
        self.weights = {
            name: weight
            for name, weight in self.weights.items()
            if weight > 0 and name in self.corpora and len(self.corpora[name].tokens)
        }
        if not self.weights:
            raise DemoDataError("no corpus with a positive weight has any document")
        self._served = dict.fromkeys(self.weights, 0)
        self._documents = dict.fromkeys(self.weights, 0)
        self._buffer = np.zeros(0, dtype=np.uint16)
        self._orders = {}

    def take(self, rows: int, length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The next `rows` * `length` tokens, shape (rows, length + 1).

        Each row ends with the token that the next one begins with: the last one to predict.
        """
        needed = rows * length + 1
        parts = [self._buffer]
        count = len(self._buffer)
        while count < needed:
            document = self._next_document()
            parts.append(document)
            count += len(document)
        stream = np.concatenate(parts)
        self._buffer = stream[needed - 1 :]
        starts = np.arange(rows)[:, None] * length
        batch = np.empty((rows, length + 1), dtype=np.int64)
        batch[:] = stream[starts + np.arange(length + 1)[None, :]]
        return batch

    def epochs(self) -> dict[str, float]:
        """How often each corpus was read so far."""
        return {name: count / len(self.corpora[name]) for name, count in self._documents.items()}

    def state(self) -> dict[str, Any]:
        """Where the stream stands, in plain values."""
        return {
            "served": dict(self._served),
            "documents": dict(self._documents),
            "buffer": self._buffer.tolist(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state` of a mixer with the same documents, weights and seed."""
        if set(state["served"]) != set(self.weights):
            raise DemoDataError(
                f"the checkpoint mixes {sorted(state['served'])}, this run {sorted(self.weights)};"
                " resume with the same data"
            )
        self._served = dict(state["served"])
        self._documents = dict(state["documents"])
        self._buffer = np.asarray(state["buffer"], dtype=np.uint16)

    def _next_document(self) -> np.ndarray[Any, np.dtype[np.uint16]]:
        name = min(self.weights, key=lambda n: (self._served[n] / self.weights[n], n))
        packed = self.corpora[name]
        epoch, position = divmod(self._documents[name], len(packed))
        order = self._orders.get(name)
        if order is None or order[0] != epoch:
            generator = np.random.default_rng([self.seed, zlib.crc32(name.encode()), epoch])
            order = (epoch, generator.permutation(len(packed)))
            self._orders[name] = order
        document = packed[int(order[1][position])]
        self._documents[name] += 1
        self._served[name] += len(document)
        return document
