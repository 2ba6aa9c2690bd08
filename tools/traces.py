"""Request traces: when requests came, how long they were, and which prompts began alike.

    azure      CSV: arrival_s, input_tokens, output_tokens; or Azure's own TIMESTAMP,
               ContextTokens, GeneratedTokens
    mooncake   JSONL: arrival_s, input_tokens, output_tokens, prefix_blocks; or Mooncake's own
               timestamp (ms), input_length, output_length, hash_ids
    sessions   JSONL: messages of whole conversations; each turn becomes a request that extends the
               one before it, with seeded arrivals

The form is told from the content; `.gz` files are opened as such. What cannot be meant is refused
with line, field and remedy; what can be put right is, and said so.

A prompt's beginning is a path of segments: two prompts share as many tokens as their leading
segments agree. A trace whose lengths were scaled keeps that structure.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import random
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ..runtime.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from ..policy.types import RequestClass

BLOCK_TOKENS: Final = 512
"""Tokens of prompt that a Mooncake block stands for."""
CHARACTERS_PER_TOKEN: Final = 4.0
MESSAGE_TOKENS: Final = 4
"""What a chat template adds around each message."""
NAMED: Final = {
    "azure": "trace_azure_conv.csv",
    "mooncake": "trace_mooncake_conversation.jsonl.gz",
    "sessions": "sessions_sgd.jsonl.gz",
}
"""Files that have a short name where their folder is given."""


class Segment(NamedTuple):
    """A piece of a sequence that others may begin with as well."""

    key: int
    """Names its content."""
    end: int
    """Tokens of the sequence up to its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One request of a trace.

    Attributes:
        arrival_s: since the start of the trace.
        prompt_tokens: at least 1.
        output_tokens: that it generates; 0 computes the prompt alone.
        segments: of prompt and answer, from the first token on; they may end before it does, and
            what follows is this request's own.
        cached_tokens: of the prompt, what is found in the cache, where that is known from elsewhere
            and not to be worked out.
        request_class: whether somebody waits for each token.
        is_background: work of the runtime's own.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    segments: tuple[Segment, ...] = ()
    cached_tokens: int | None = None
    request_class: RequestClass = "interactive"
    is_background: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Requests in order of arrival, and what was put right to get them so."""

    name: str
    requests: tuple[TraceRequest, ...]
    notes: tuple[str, ...] = ()

    @property
    def duration_s(self) -> float:
        """Until the last arrival."""
        return self.requests[-1].arrival_s if self.requests else 0.0


def find_trace(name: str, data: Path | None) -> Path:
    """The file that `--trace` means: a path, or a short name in the folder of `--data`.

    Raises:
        ConfigError: there is none.
    """
    from pathlib import Path

    path = Path(name)
    if name in NAMED and not path.exists():
        if data is None:
            raise ConfigError(
                f"--trace {name} is the name of {NAMED[name]}; say with --data which folder has it"
            )
        path = data / NAMED[name]
    elif data is not None and not path.exists():
        path = data / name
    if not path.is_file():
        raise ConfigError(
            f"--trace: there is no file {path}; give a path, or one of {', '.join(NAMED)} "
            "and --data DIR"
        )
    return path


def read_trace(
    path: Path,
    *,
    session_rate: float = 1.0,
    think_s: float = 10.0,
    seed: int = 0,
) -> Trace:
    """Read a trace of any of the three forms.

    Args:
        path: the file.
        session_rate: of conversations, how many begin per second (Poisson).
        think_s: of conversations, how long a user takes for the next turn, on average
            (exponential), from the arrival of the one before.
        seed: of these two.

    Raises:
        ConfigError: it cannot be read or has a value that cannot be meant.
    """
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error}); check the path") from error
    except (EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); fetch it again") from error
    if text.lstrip()[:1] == "{":
        rows = list(_json_rows(path, text))
        if "messages" in rows[0].fields:
            requests = _sessions(rows, session_rate, think_s, seed)
        else:
            requests = _mooncake(rows)
    else:
        requests = _azure(list(_csv_rows(path, text)))
    return make_trace(path.name, requests)


def make_trace(name: str, requests: Sequence[TraceRequest]) -> Trace:
    """A trace that begins at 0, sorted by arrival where it was not.

    Raises:
        ConfigError: there are no requests.
    """
    if not requests:
        raise ConfigError(f"{name} holds no requests; use another trace")
    notes = []
    late = sum(after.arrival_s < before.arrival_s for before, after in pairwise(requests))
    if late:
        requests = sorted(requests, key=lambda request: request.arrival_s)
        notes.append(
            f"{name}: {late} of {len(requests)} requests came before the one above them; "
            "sorted by arrival"
        )
    first_s = requests[0].arrival_s
    if first_s:
        requests = [replace(r, arrival_s=r.arrival_s - first_s) for r in requests]
    return Trace(name=name, requests=tuple(requests), notes=tuple(notes))


def transform(
    trace: Trace,
    *,
    scale_tokens: float = 1.0,
    speed: float = 1.0,
    limit_s: float | None = None,
    sharing: bool = True,
) -> Trace:
    """A trace with other lengths, at another pace, or cut.

    Args:
        trace: where to start from.
        scale_tokens: factor of all lengths; none gets shorter than a token.
        speed: times faster than it was recorded.
        limit_s: only what arrives before this time, counted after `speed`.
        sharing: False makes every prompt unlike all others.

    Raises:
        ConfigError: a factor is not a positive number, or nothing is left.
    """
    for flag, value in (("--scale-tokens", scale_tokens), ("--speed", speed)):
        if not (math.isfinite(value) and value > 0.0):
            raise ConfigError(f"{flag} is {value:g}; use a number above 0")
    if limit_s is not None and not limit_s > 0.0:
        raise ConfigError(f"--limit-s is {limit_s:g}; use a number of seconds above 0")

    def scaled(tokens: int) -> int:
        return max(1, round(tokens * scale_tokens)) if tokens else 0

    requests = []
    for request in trace.requests:
        arrival_s = request.arrival_s / speed
        if limit_s is not None and arrival_s >= limit_s:
            break
        segments = tuple(
            Segment(segment.key, round(segment.end * scale_tokens)) for segment in request.segments
        )
        requests.append(
            replace(
                request,
                arrival_s=arrival_s,
                prompt_tokens=scaled(request.prompt_tokens),
                output_tokens=scaled(request.output_tokens),
                segments=segments if sharing else (),
            )
        )
    return replace(trace, requests=tuple(requests))


def synthetic(
    *,
    requests: int,
    rate: float,
    prompt_tokens: float,
    output_tokens: float,
    shared_tokens: int = 0,
    groups: int = 8,
    spread: float = 0.5,
    seed: int = 0,
) -> Trace:
    """Poisson arrivals of requests with log-normal lengths, for scenarios.

    Args:
        requests: how many.
        rate: per second.
        prompt_tokens: median of what is a prompt's own.
        output_tokens: median.
        shared_tokens: of a prefix that comes before that, one of `groups`.
        groups: how many such prefixes there are.
        spread: standard deviation of the logarithm of the lengths.
        seed: of everything drawn.
    """
    draw = random.Random(seed)
    now_s = 0.0
    found = []
    for _ in range(requests):
        own = max(1, round(draw.lognormvariate(math.log(prompt_tokens), spread)))
        output = max(1, round(draw.lognormvariate(math.log(output_tokens), spread)))
        group = draw.randrange(groups)
        found.append(
            TraceRequest(
                arrival_s=now_s,
                prompt_tokens=shared_tokens + own,
                output_tokens=output,
                segments=(Segment(group, shared_tokens),) if shared_tokens else (),
            )
        )
        now_s += draw.expovariate(rate)
    return make_trace("synthetic", found)


# -- rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Row:
    """A line of a file: its fields, and how to complain about them."""

    path: Path
    line: int
    fields: dict[str, Any]

    def refuse(self, field: str, value: Any, remedy: str) -> ConfigError:
        return ConfigError(f"{self.path}, line {self.line}: {field} is {value!r}; {remedy}")

    def number(self, field: str, least: float, unit: str) -> float:
        """A finite number of at least `least`."""
        value = self.fields.get(field)
        remedy = f"it must be a number of {unit}, {least:g} or more: mend or remove the line"
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise self.refuse(field, value, remedy)
        try:
            number = float(value)
        except ValueError as error:
            raise self.refuse(field, value, remedy) from error
        if not (math.isfinite(number) and number >= least):
            raise self.refuse(field, value, remedy)
        return number

    def count(self, field: str, least: int) -> int:
        """A whole number of tokens."""
        number = self.number(field, least, "tokens")
        if number != int(number):
            raise self.refuse(field, self.fields[field], "it must be a whole number of tokens")
        return int(number)

    def time_s(self, field: str) -> float:
        """A point in time as seconds or, in a CSV of Azure's, a date and time."""
        value = self.fields.get(field)
        if isinstance(value, str) and "-" in value[1:] and ":" in value:
            try:
                # Azure writes seven digits of a second; Python reads six.
                head, _, fraction = value.partition(".")
                moment = datetime.fromisoformat(head.strip())
                digits = fraction.strip().split("+")[0].rstrip("Z")
                return (moment - datetime(1970, 1, 1)).total_seconds() + float(f"0.{digits or 0}")
            except (ValueError, TypeError) as error:
                raise self.refuse(field, value, "it must be a date and time or seconds") from error
        return self.number(field, 0.0, "seconds")


def _csv_rows(path: Path, text: str) -> Iterator[_Row]:
    reader = csv.DictReader(io.StringIO(text))
    known = {"arrival_s", "TIMESTAMP"}
    if not known & set(reader.fieldnames or ()):
        raise ConfigError(
            f"{path} is no trace: its first line is {(text.splitlines() or [''])[0][:80]!r}; use a "
            "CSV with the columns arrival_s,input_tokens,output_tokens or a JSONL file"
        )
    for row in reader:
        yield _Row(path, reader.line_num, row)


def _json_rows(path: Path, text: str) -> Iterator[_Row]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise ConfigError(
                f"{path}, line {number}: not JSON ({error}); mend or remove the line"
            ) from error
        if not isinstance(fields, dict):
            raise ConfigError(
                f"{path}, line {number}: {str(fields)[:40]!r} is not an object; mend or "
                "remove the line"
            )
        yield _Row(path, number, fields)


def _azure(rows: list[_Row]) -> list[TraceRequest]:
    if not rows:
        return []
    names = ("arrival_s", "input_tokens", "output_tokens")
    if "TIMESTAMP" in rows[0].fields:
        names = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    return [
        TraceRequest(
            arrival_s=row.time_s(names[0]),
            prompt_tokens=row.count(names[1], 1),
            output_tokens=row.count(names[2], 1),
        )
        for row in rows
    ]


def _mooncake(rows: list[_Row]) -> list[TraceRequest]:
    is_original = "timestamp" in rows[0].fields
    if is_original:
        names = ("timestamp", "input_length", "output_length", "hash_ids")
    else:
        names = ("arrival_s", "input_tokens", "output_tokens", "prefix_blocks")
    requests = []
    for row in rows:
        blocks = row.fields.get(names[3], [])
        if not isinstance(blocks, list) or not all(type(block) is int for block in blocks):
            raise row.refuse(names[3], blocks, "it must be a list of whole numbers")
        prompt = row.count(names[1], 1)
        seconds = row.number(names[0], 0.0, "milliseconds" if is_original else "seconds")
        requests.append(
            TraceRequest(
                arrival_s=seconds / 1000.0 if is_original else seconds,
                prompt_tokens=prompt,
                output_tokens=row.count(names[2], 1),
                segments=tuple(
                    Segment(block, min((index + 1) * BLOCK_TOKENS, prompt))
                    for index, block in enumerate(blocks)
                    if index * BLOCK_TOKENS < prompt
                ),
            )
        )
    return requests


def _sessions(
    rows: list[_Row], session_rate: float, think_s: float, seed: int
) -> list[TraceRequest]:
    for flag, value in (("--session-rate", session_rate), ("--think-s", think_s)):
        if not (math.isfinite(value) and value > 0.0):
            raise ConfigError(f"{flag} is {value:g}; use a number above 0")
    draw = random.Random(seed)
    keys: dict[tuple[str, str], int] = {}
    starts_s = 0.0
    requests: list[TraceRequest] = []
    for row in rows:
        messages = row.fields.get("messages")
        if not isinstance(messages, list) or not messages:
            raise row.refuse("messages", messages, "it must be a list of messages")
        requests += _turns(row, messages, keys, starts_s, lambda: draw.expovariate(1.0 / think_s))
        starts_s += draw.expovariate(session_rate)
    requests.sort(key=lambda request: request.arrival_s)
    return requests


def _turns(
    row: _Row,
    messages: list[Any],
    keys: dict[tuple[str, str], int],
    now_s: float,
    think: Callable[[], float],
) -> Iterator[TraceRequest]:
    """The requests of one conversation: one per answer of the assistant's."""
    segments: list[Segment] = []
    end = 0
    for message in messages:
        try:
            role, content = message["role"], message["content"]
            name = (str(role), str(content))
        except (KeyError, TypeError) as error:
            raise row.refuse(
                "messages", message, 'each must have "role" and "content": mend the line'
            ) from error
        tokens = MESSAGE_TOKENS + math.ceil(len(name[1]) / CHARACTERS_PER_TOKEN)
        segment = Segment(keys.setdefault(name, len(keys)), end + tokens)
        if role == "assistant" and end:
            yield TraceRequest(
                arrival_s=now_s,
                prompt_tokens=end,
                output_tokens=tokens,
                segments=(*segments, segment),
            )
            now_s += think()
        segments.append(segment)
        end += tokens
