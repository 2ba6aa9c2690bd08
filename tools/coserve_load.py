"""The load of a co-serving run: which request comes when, and which feedback.

    trace    lengths of prompts and answers, scaled down ─┐
    sessions system prompts, what people said ────────────┼─► arrivals  Poisson, open loop
    seed ─────────────────────────────────────────────────┤
    preferences  chosen and rejected answers ─────────────┴─► bursts of feedback, evenly spaced

A prompt begins with a part of a system prompt, which many requests have in common, and goes on with
a passage that no other request has at that place. The same seed gives the same load, whatever
policy answers it. Pure functions of files and seeds; nothing here runs a model.
"""

from __future__ import annotations

import csv
import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ..runtime.errors import ConfigError
from .json_lines import read_json_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from ..runtime.types import Message

TRACE_FILE: Final = "trace_azure_conv.csv"
SESSIONS_FILE: Final = "sessions_sgd.jsonl.gz"
PREFERENCES_FILE: Final = "preferences.jsonl.gz"
BODY_TOKENS: Final = 200_000
"""Tokens of what people said that prompts are cut from."""
MIN_PROMPT_TOKENS: Final = 8
MIN_ANSWER_TOKENS: Final = 4
ANSWER_SHARE: Final = 0.25
"""Most of the context that an answer takes."""

_PROMPT_QUANTILES: Final = (1014.0, 4085.0)
_ANSWER_QUANTILES: Final = (115.0, 449.0)
"""Median and 95 % quantile of the trace's lengths: what is drawn from where it is not there."""
_Z_95: Final = 1.645

_PAIR: Final = {"prompt": list, "chosen": str, "rejected": str}
"""What a preference has, and of what kind."""

_WORDS: Final = (
    "the a some every this river house garden train letter window morning winter summer teacher "
    "doctor child friend city village road bridge music story picture number answer question "
    "opens closes finds loses makes takes gives sees hears keeps leaves brings slow quick small "
    "large old new quiet loud warm cold early late near far under over before after with without"
)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of one request, in tokens."""

    prompt: int
    answer: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of the load.

    Attributes:
        at_s: when it comes, in seconds since the load began.
        prompt: token ids.
        answer_tokens: it gets exactly as many.
        is_extra: not part of the ordinary load: one of a sudden inflow.
    """

    at_s: float
    prompt: tuple[int, ...]
    answer_tokens: int
    is_extra: bool = False


@dataclass(frozen=True, slots=True)
class Pair:
    """A preference: which of two answers to a prompt is the better one.

    `tokens` are those of the prompt and both answers: rows of a forward over it.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    tokens: int

    def event(self, identifier: str, model: str | None = None) -> dict[str, Any]:
        """As `Runtime.feedback` takes it."""
        event: dict[str, Any] = {
            "id": identifier,
            "type": "preference",
            "prompt": list(self.prompt),
            "chosen": self.chosen,
            "rejected": self.rejected,
        }
        return event if model is None else event | {"model": model}

    def turned_round(self) -> Pair:
        """The same with the wrong label."""
        return Pair(self.prompt, self.rejected, self.chosen, self.tokens)


@dataclass(frozen=True, slots=True)
class Feedback:
    """The feedback of a run.

    Attributes:
        primers: pairs that are held out from training. One opens each burst, so that the pairs
            behind it reach the learner together.
        pairs: what is trained on, in the order in which it is given.
    """

    primers: tuple[Pair, ...]
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, slots=True)
class TextPool:
    """What prompts are made of, as token ids.

    Attributes:
        heads: beginnings that several prompts have in common, as often as they are used.
        body: what people said, one after the other; longer than any prompt.
    """

    heads: tuple[tuple[int, ...], ...]
    body: tuple[int, ...]

    def prompt(self, draw: random.Random, tokens: int, shared: float) -> tuple[int, ...]:
        """A prompt of so many tokens, of which the share `shared` is a common beginning."""
        head = draw.choice(self.heads)[: round(shared * tokens)]
        rest = tokens - len(head)
        start = draw.randrange(len(self.body) - rest)
        return (*head, *self.body[start : start + rest])


# -- lengths -------------------------------------------------------------------------------------


def read_lengths(path: Path) -> tuple[Lengths, ...]:
    """The lengths of a trace with the columns input_tokens and output_tokens.

    Raises:
        ConfigError: it cannot be read, or a length is no whole number of 1 or more.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            found = tuple(_lengths_of_rows(path, csv.DictReader(file)))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); check --data, or leave it out",
            param="data",
        ) from error
    if not found:
        raise ConfigError(f"{path} has no rows; check --data, or leave it out", param="data")
    return found


def _lengths_of_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Iterator[Lengths]:
    for line, row in enumerate(rows, start=2):
        try:
            lengths = Lengths(int(row["input_tokens"]), int(row["output_tokens"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{path}, line {line}: input_tokens and output_tokens must be whole numbers "
                f"({type(error).__name__}: {error}); check --data",
                param="data",
            ) from error
        if min(lengths.prompt, lengths.answer) < 1:
            raise ConfigError(
                f"{path}, line {line}: a length is below 1; check --data", param="data"
            )
        yield lengths


def made_up_lengths(count: int, seed: int) -> tuple[Lengths, ...]:
    """Lengths with the median and the 95 % quantile of the trace, log-normal."""
    draw = random.Random(seed)

    def one(median: float, high: float) -> int:
        sigma = math.log(high / median) / _Z_95
        return max(1, round(draw.lognormvariate(math.log(median), sigma)))

    return tuple(Lengths(one(*_PROMPT_QUANTILES), one(*_ANSWER_QUANTILES)) for _ in range(count))


def scale(lengths: Lengths, factor: float, context: int) -> Lengths:
    """Scaled to a small model, and cut so that prompt and answer fit into its context."""
    most = max(MIN_ANSWER_TOKENS, int(context * ANSWER_SHARE))
    answer = min(max(round(lengths.answer * factor), MIN_ANSWER_TOKENS), most)
    prompt = min(max(round(lengths.prompt * factor), MIN_PROMPT_TOKENS), context - answer)
    return Lengths(prompt, answer)


# -- texts ---------------------------------------------------------------------------------------


def read_texts(
    path: Path, encode: Callable[[str], Sequence[int]], *, seed: int, tokens: int = BODY_TOKENS
) -> TextPool:
    """System prompts and what people said, from sessions in random order.

    Args:
        path: one JSON object with `messages` per line; see `read_json_lines`.
        encode: text to token ids.
        seed: of the order.
        tokens: at least so many are taken, or all there are.

    Raises:
        ConfigError: it cannot be read, or has no session with both.
    """
    sessions = [session for _, session in read_json_lines(path)]
    random.Random(seed).shuffle(sessions)
    heads: list[tuple[int, ...]] = []
    known: dict[str, tuple[int, ...]] = {}
    body: list[int] = []
    for session in sessions:
        if len(body) >= tokens:
            break
        for message in session.get("messages", ()):
            role, content = message["role"], message["content"]
            if role == "system":
                if content not in known:
                    known[content] = tuple(encode(content))
                heads.append(known[content])
            else:
                body += encode(f"{role}: {content}\n")
    if not heads or not body:
        raise ConfigError(
            f"{path} has no session with a system message and turns; check --data", param="data"
        )
    return TextPool(tuple(heads), tuple(body))


def made_up_texts(vocab_size: int, *, seed: int, tokens: int = BODY_TOKENS) -> TextPool:
    """Random tokens in place of texts: 40 beginnings, and a body."""
    draw = random.Random(seed)

    def some(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(8, vocab_size) for _ in range(count))

    return TextPool(tuple(some(512) for _ in range(40)), some(tokens))


# -- requests ------------------------------------------------------------------------------------


def poisson_times(rate: float, seconds: float, seed: object) -> list[float]:
    """Times of a Poisson process with `rate` events per second, within `seconds` of its start."""
    draw = random.Random(f"arrivals {seed}")
    times: list[float] = []
    at_s = draw.expovariate(rate)
    while at_s < seconds:
        times.append(at_s)
        at_s += draw.expovariate(rate)
    return times


def make_requests(
    times_s: Sequence[float],
    lengths: Sequence[Lengths],
    texts: TextPool,
    *,
    factor: float,
    context: int,
    shared: float,
    seed: object,
) -> list[Arrival]:
    """A request per time: consecutive lengths of the trace from a random place on, and a prompt.

    Args:
        times_s: in order.
        lengths: as in the trace.
        texts: where prompts are cut from.
        factor: what lengths are scaled by.
        context: of the model, in tokens.
        shared: share of each prompt that is a common beginning, as far as one is that long.
        seed: of the choices.
    """
    draw = random.Random(f"requests {seed}")
    place = draw.randrange(len(lengths))
    arrivals = []
    for number, at_s in enumerate(times_s):
        size = scale(lengths[(place + number) % len(lengths)], factor, context)
        arrivals.append(Arrival(at_s, texts.prompt(draw, size.prompt, shared), size.answer))
    return arrivals


def make_inflow(
    at_s: float, count: int, tokens: int, texts: TextPool, *, seed: object
) -> list[Arrival]:
    """`count` prompts of so many tokens at once, with nothing in common and short answers."""
    draw = random.Random(f"inflow {seed}")
    return [
        Arrival(at_s, texts.prompt(draw, tokens, 0.0), MIN_ANSWER_TOKENS, is_extra=True)
        for _ in range(count)
    ]


# -- feedback ------------------------------------------------------------------------------------


def visits_per_request(rate: float) -> float:
    """Visits of samples by training per request, where the share `rate` of all tasks trains."""
    return rate / (1.0 - rate)


def feedback_times(
    rate: float, requests: int, *, warmup_s: float, seconds: float, visits: int
) -> list[float]:
    """When a burst of feedback is given so that `rate` of the tasks in the window are training.

    Args:
        rate: the retrain rate, in [0, 1).
        requests: in the window.
        warmup_s: when the window begins.
        seconds: how long it is.
        visits: of samples that a burst leads to.

    Returns:
        Times since the load began, evenly spaced, one of them where the window begins; before it
        as many as fit. The number in the window is rounded, and at least one if `rate` is above 0.
    """
    if rate <= 0.0:
        return []
    bursts = max(1, round(visits_per_request(rate) * requests / visits))
    interval_s = seconds / bursts
    before = int(warmup_s / interval_s)
    return [warmup_s + number * interval_s for number in range(-before, bursts)]


def read_pairs(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of preferences: prompt (messages), chosen and rejected each.

    Raises:
        ConfigError: it cannot be read, or a row lacks one of them.
    """
    rows = []
    for place, row in read_json_lines(path):
        for name, kind in _PAIR.items():
            if not (row.get(name) and isinstance(row[name], kind)):
                raise ConfigError(f"{place} has no {name!r}; check --data", param="data")
        rows.append({name: row[name] for name in _PAIR})
    return rows


def made_up_pairs(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Preferences of random words."""
    draw = random.Random(seed)
    words = _WORDS.split()

    def some(least: int, most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(least, most)))

    return [
        {
            "prompt": [{"role": "user", "content": f"{some(10, 60)}?"}],
            "chosen": some(5, 60),
            "rejected": some(5, 60),
        }
        for _ in range(count)
    ]


def choose_feedback(
    rows: Sequence[Mapping[str, Any]],
    *,
    encode_prompt: Callable[[Sequence[Message]], Sequence[int]],
    encode: Callable[[str], Sequence[int]],
    is_held_out: Callable[[Sequence[int]], bool],
    most_tokens: int,
    pairs: int,
    primers: int,
    seed: object,
) -> Feedback:
    """So many pairs that are short enough, each prompt once, in random order.

    Args:
        rows: as `read_pairs` gives them.
        encode_prompt: messages to token ids.
        encode: an answer to token ids.
        is_held_out: whether a prompt is on the gate's side.
        most_tokens: of the prompt and both answers.
        pairs, primers: how many of each.
        seed: of the order.

    Raises:
        ConfigError: there are not so many.
    """
    order = list(range(len(rows)))
    random.Random(f"feedback {seed}").shuffle(order)
    chosen: list[Pair] = []
    held_out: list[Pair] = []
    seen: set[tuple[int, ...]] = set()
    for place in order:
        if len(chosen) >= pairs and len(held_out) >= primers:
            break
        row = rows[place]
        if row["chosen"] == row["rejected"]:
            continue
        prompt = tuple(encode_prompt(row["prompt"]))
        # Each answer ends with a token of its own.
        tokens = len(prompt) + sum(len(encode(row[name])) + 1 for name in ("chosen", "rejected"))
        if tokens > most_tokens or prompt in seen:
            continue
        seen.add(prompt)
        pair = Pair(tuple(row["prompt"]), row["chosen"], row["rejected"], tokens)
        (held_out if is_held_out(prompt) else chosen).append(pair)
    if len(chosen) < pairs or len(held_out) < primers:
        raise ConfigError(
            f"there are {len(chosen)} pairs of at most {most_tokens} tokens to train on and "
            f"{len(held_out)} to hold out, and the run needs {pairs} and {primers}; lower "
            "--seconds, raise --pair-tokens or --epochs, or leave --data out",
            param="data",
        )
    return Feedback(tuple(held_out[:primers]), tuple(chosen[:pairs]))
