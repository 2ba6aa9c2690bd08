"""A profile: what work was measured to cost with one model on one device.

    {
      "format": 1,
      "key": {"model": "cotune-demo", "fingerprint": "…", "device": "…", "dtype": "float32", …},
      "costs": {"base_s": 0.0018, …},              what policies ask; see `Costs`
      "memory": {"training_row_bytes": …, …},
      "points": [{"shape": [8, 1024, 0, 0, 0], "seconds": 0.0031}, …],
      "quanta": [{"kind": "forward", "tokens": 256, "seconds": 0.02}, …],
      "created": "2026-11-21T03:00:00+00:00",
      "is_estimated": false, "note": ""
    }

Reading a file and measuring are the runtime's; here is the value, its check and the fit.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .costs import (
    ITERATION_SCALES,
    QUANTUM_ROWS,
    QUANTUM_SCALES,
    Costs,
    IterationShape,
    complete_rows,
    iteration_features,
    quantum_features,
)
from .latency_fit import solve_least_squares

FORMAT = 1
"""Of the file. One that says otherwise is refused."""

_MOST = 2**63 - 1
"""A count above it is none: it could not be computed with."""
_REMEDY = "measure again with `cotune profile`"


class ProfileError(ValueError):
    """A profile does not hold what it should.

    Attributes:
        field: which one, as a path such as "costs.base_s".
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}; {_REMEDY}")
        self.field = field


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileKey:
    """What a profile holds for. Another model, device, dtype or version costs something else.

    Attributes:
        model: the model's name.
        fingerprint: of its config and weights.
        device: the maker's name of the processor or card.
        dtype: of the weights.
        threads: intra-op threads on a CPU; 0 on a card.
        versions: (name, version) of what computes, sorted.
    """

    model: str
    fingerprint: str
    device: str
    dtype: str
    threads: int
    versions: tuple[tuple[str, str], ...] = ()

    @property
    def file_name(self) -> str:
        """A name that no other key has, and that says what it is of."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        readable = re.sub(r"[^a-z0-9]+", "-", f"{self.model}-{self.dtype}".lower()).strip("-")
        return f"{readable[:48]}-{digest}.json"

    def differences(self, other: ProfileKey) -> tuple[str, ...]:
        """The names of the fields in which they differ."""
        return tuple(
            f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "model": self.model,
            "fingerprint": self.fingerprint,
            "device": self.device,
            "dtype": self.dtype,
            "threads": self.threads,
            "versions": dict(self.versions),
        }

    @classmethod
    def from_dict(cls, value: object) -> ProfileKey:
        """The key that `to_dict` wrote. Raises `ProfileError`."""
        data = _mapping(value, "key")
        versions = _mapping(data.get("versions"), "key.versions")
        return cls(
            model=_text(data, "key", "model"),
            fingerprint=_text(data, "key", "fingerprint"),
            device=_text(data, "key", "device"),
            dtype=_text(data, "key", "dtype"),
            threads=_count(data, "key", "threads"),
            versions=tuple(
                sorted((name, _text(versions, "key.versions", name)) for name in versions)
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCosts:
    """What work takes while it runs, in bytes; 0 where it is not known.

    Attributes:
        training_row_bytes: each row of a training quantum, while its graph lives.
        prefill_token_bytes: each token of an iteration.
        page_bytes: a KV page.
    """

    training_row_bytes: float = 0.0
    prefill_token_bytes: float = 0.0
    page_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationPoint:
    """A kind of iteration and what it typically took, in seconds."""

    shape: IterationShape
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantumPoint:
    """A kind of quantum, the rows it had, and what it typically took, in seconds."""

    kind: str
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """See the module.

    Attributes:
        key: what it holds for.
        costs: fitted to `points` and `quanta`.
        memory: what work takes while it runs.
        points, quanta: what was measured.
        created: when, ISO 8601 with a time zone.
        is_estimated: whether it was derived from published figures and not measured.
        note: how, for people.
    """

    key: ProfileKey
    costs: Costs
    memory: MemoryCosts = MemoryCosts()
    points: tuple[IterationPoint, ...] = ()
    quanta: tuple[QuantumPoint, ...] = ()
    created: str = ""
    is_estimated: bool = False
    note: str = ""

    def errors(self) -> tuple[float, ...]:
        """|fitted - measured| / measured of each point."""
        return tuple(
            abs(self.costs.iteration_s(point.shape) - point.seconds) / point.seconds
            for point in self.points
        )

    @property
    def knows_prefill(self) -> bool:
        """Whether there is prefill behind its costs; else prompts look free."""
        return self.is_estimated or any(point.shape.prefill_tokens for point in self.points)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        costs = self.costs._asdict()
        costs["per_row_s"] = dict(zip(QUANTUM_ROWS, self.costs.per_row_s, strict=True))
        return {
            "format": FORMAT,
            "key": self.key.to_dict(),
            "costs": costs,
            "memory": {f.name: getattr(self.memory, f.name) for f in fields(self.memory)},
            "points": [{"shape": list(p.shape), "seconds": p.seconds} for p in self.points],
            "quanta": [
                {"kind": q.kind, "tokens": q.tokens, "seconds": q.seconds} for q in self.quanta
            ],
            "created": self.created,
            "is_estimated": self.is_estimated,
            "note": self.note,
        }

    @classmethod
    def from_dict(cls, value: object) -> Profile:
        """The profile that `to_dict` wrote.

        Raises:
            ProfileError: it has another format, or a field is missing or out of range.
        """
        data = _mapping(value, "profile")
        if data.get("format") != FORMAT:
            raise ProfileError("format", f"is {data.get('format')!r}, and {FORMAT} is read here")
        memory = _mapping(data.get("memory"), "memory")
        is_estimated = data.get("is_estimated")
        if not isinstance(is_estimated, bool):
            raise ProfileError("is_estimated", f"is {is_estimated!r}, not true or false")
        return cls(
            key=ProfileKey.from_dict(data.get("key")),
            costs=_costs(data.get("costs")),
            memory=MemoryCosts(
                training_row_bytes=_number(memory, "memory", "training_row_bytes"),
                prefill_token_bytes=_number(memory, "memory", "prefill_token_bytes"),
                page_bytes=_count(memory, "memory", "page_bytes"),
            ),
            points=tuple(
                _point(item, f"points.{index}")
                for index, item in enumerate(_sequence(data.get("points"), "points"))
            ),
            quanta=tuple(
                _quantum(item, f"quanta.{index}")
                for index, item in enumerate(_sequence(data.get("quanta"), "quanta"))
            ),
            created=_text(data, "", "created"),
            is_estimated=is_estimated,
            note=_text(data, "", "note"),
        )


def fit_costs(points: Sequence[IterationPoint], quanta: Sequence[QuantumPoint] = ()) -> Costs:
    """The costs that make the relative errors least, none of them negative.

    The margin is the largest that any point exceeds the fit by, 1.1 at least: the points are
    typical, single iterations scatter. Rows of quanta that were not measured are derived from those
    that were, or from prompt tokens (`complete_rows`).

    Raises:
        ValueError: there is no point.
    """
    if not points:
        raise ValueError("points is empty; measure one iteration at least")
    base_s, decode_s, context_s, token_s, attention_s, chunk_s = solve_least_squares(
        [iteration_features(point.shape) for point in points],
        [point.seconds for point in points],
        ITERATION_SCALES,
    )
    costs = Costs(base_s, decode_s, context_s, token_s, attention_s, chunk_s)
    quantum_base_s, kl_s, forward_s, backward_s, step_s = (
        solve_least_squares(
            [quantum_features(quantum.kind, quantum.tokens) for quantum in quanta],
            [quantum.seconds for quantum in quanta],
            QUANTUM_SCALES,
        )
        if quanta
        else (0.0,) * 5
    )
    margin = max(point.seconds / costs.iteration_s(point.shape) for point in points)
    costs = costs._replace(
        margin=max(margin, 1.1),
        per_row_s=complete_rows((kl_s, forward_s, backward_s), token_s),
        quantum_base_s=quantum_base_s or base_s,
        step_s=step_s or base_s,
    )
    if not quanta:
        return costs._replace(quantum_margin=1.5)
    quantum_margin = max(q.seconds / costs.quantum_s(q.kind, q.tokens) for q in quanta)
    return costs._replace(quantum_margin=max(quantum_margin, 1.1))


# -- reading ---------------------------------------------------------------------------------------


def _costs(value: object) -> Costs:
    data = _mapping(value, "costs")
    rows = _mapping(data.get("per_row_s"), "costs.per_row_s")
    numbers = {name: _number(data, "costs", name) for name in Costs._fields if name != "per_row_s"}
    for name in ("margin", "interference", "quantum_interference", "quantum_margin"):
        if numbers[name] < 1.0:
            raise ProfileError(f"costs.{name}", f"is {numbers[name]}, and is 1 or more")
    kl_s, forward_s, backward_s = (_number(rows, "costs.per_row_s", kind) for kind in QUANTUM_ROWS)
    if not any(numbers[name] for name in ("base_s", "per_decode_s", "per_token_s")):
        raise ProfileError("costs", "says that iterations take no time at all")
    return Costs(**numbers, per_row_s=(kl_s, forward_s, backward_s))


def _point(value: object, where: str) -> IterationPoint:
    data = _mapping(value, where)
    shape = _sequence(data.get("shape"), f"{where}.shape")
    if len(shape) != len(IterationShape._fields) or not all(map(_is_count, shape)):
        raise ProfileError(
            f"{where}.shape", f"is {_show(shape)}, not {len(IterationShape._fields)} counts"
        )
    return IterationPoint(shape=IterationShape(*shape), seconds=_seconds(data, where))


def _quantum(value: object, where: str) -> QuantumPoint:
    data = _mapping(value, where)
    kind = _text(data, where, "kind")
    if kind not in (*QUANTUM_ROWS, "step"):
        raise ProfileError(f"{where}.kind", f"is {kind!r}, no kind of quantum")
    return QuantumPoint(
        kind=kind, tokens=_count(data, where, "tokens"), seconds=_seconds(data, where)
    )


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ProfileError(where, f"is {_show(value)}, not an object")
    return value


def _sequence(value: object, where: str) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise ProfileError(where, f"is {_show(value)}, not a list")
    return value


def _text(data: Mapping[str, Any], where: str, name: str) -> str:
    value = data.get(name)
    if not isinstance(value, str):
        raise ProfileError(_path(where, name), f"is {_show(value)}, not a text")
    return value


def _number(data: Mapping[str, Any], where: str, name: str) -> float:
    value = data.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ProfileError(_path(where, name), f"is {_show(value)}, not a number")
    try:
        number = float(value)
    except OverflowError as error:
        raise ProfileError(_path(where, name), "is an integer beyond all numbers") from error
    if not math.isfinite(number) or number < 0:
        raise ProfileError(_path(where, name), f"is {_show(value)}, not a number from 0 up")
    return number


def _seconds(data: Mapping[str, Any], where: str) -> float:
    seconds = _number(data, where, "seconds")
    if seconds == 0.0:
        raise ProfileError(f"{where}.seconds", "is 0; work takes time")
    return seconds


def _count(data: Mapping[str, Any], where: str, name: str) -> int:
    value = data.get(name)
    if not _is_count(value):
        raise ProfileError(_path(where, name), f"is {_show(value)}, not a count")
    assert isinstance(value, int)
    return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST


def _path(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _show(value: object) -> str:
    """A value for a message, cut to what one can read."""
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
