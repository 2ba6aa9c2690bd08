"""The record of one co-serving run: every request with its times, and what the run was made with.

`cotune bench coserve` writes it, `cotune simulate --compare` replays it. A file is a JSON object
whose "logs" is a list of such records, whatever else it holds; or one record alone.

    {"logs": [{"format": "cotune-coserve-log", "version": 1, "policy": "cotune",
               "targets": {"ttft_s": 0.5, "tbt_s": 0.05},
               "budgets": {"tokens": 512, "sequences": 64, "page_size": 16, ...}, "pages": 1024,
               "settings": {...}, "training": {...}, "costs": {...},
               "samples": [{"arrival_s": 0.4, "tokens": 180}, ...],
               "requests": [{"arrival_s": 0.1, "prompt_tokens": 96, "cached_tokens": 0,
                             "output_tokens": 3, "ttft_s": 0.021, "gaps_s": [0.004, 0.005]}, ...]},
              ...]}

Times count from the start of the run, in seconds.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final

from ..runtime.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

FORMAT: Final = "cotune-coserve-log"
VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedRequest:
    """One request, as it went."""

    arrival_s: float
    """When the engine took it."""
    prompt_tokens: int
    cached_tokens: int = 0
    """Of the prompt, what was found in the prefix cache when it was first scheduled."""
    output_tokens: int
    """Tokens that were generated; 0 where only the prompt was computed."""
    ttft_s: float | None = None
    """Arrival to first token; None where there was none."""
    gaps_s: tuple[float, ...] = ()
    """Between its tokens, in order: one fewer than there are tokens."""
    request_class: str = "interactive"
    """"interactive" or "batch"."""
    is_background: bool = False
    """The runtime's own work: it takes part, and is left out of percentiles."""

    def attains(self, targets: Targets) -> bool:
        """Whether the first token came in time, and 99 of 100 gaps after it kept the target."""
        return keeps_targets(self.ttft_s, self.gaps_s, targets.ttft_s, targets.tbt_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedSample:
    """A training sample that became ready to train on."""

    arrival_s: float
    tokens: int
    """Rows that a forward over it computes: the prompt and its completions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What was promised, in seconds."""

    ttft_s: float = math.inf
    tbt_s: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedBudgets:
    """What an iteration could hold; see `cotune.policy.Budgets`."""

    tokens: int
    sequences: int
    page_size: int
    background_tokens: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedTraining:
    """How batches were formed; see `TrainingConfig`."""

    batch_size: int = 16
    batch_wait_s: float = 5.0
    quantum_tokens: int = 1024
    epochs: int = 1
    replay_share: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CoserveLog:
    """One run of one policy."""

    policy: str
    """As `--policy` takes it."""
    targets: Targets
    budgets: LoggedBudgets
    pages: int
    """KV pages there were."""
    duration_s: float
    """How long the run was: until its last request ended."""
    requests: tuple[LoggedRequest, ...]
    """In order of arrival."""
    retrain_rate: float = 0.0
    """Share of tasks that were training."""
    settings: dict[str, Any] = field(default_factory=dict)
    """`PolicySettings`, those that were not left at their defaults at least."""
    training: LoggedTraining | None = None
    """None: nothing learned."""
    samples: tuple[LoggedSample, ...] = ()
    """In order of arrival."""
    trained_tokens: int = 0
    """Rows of the steps that were finished."""
    costs: dict[str, Any] | None = None
    """The fields of `cotune.policy.costs.Costs` that the cost model had at the end of the run."""
    overhead_s: float = 0.0
    """What passed between two iterations, on average: planning, committing, waking the lane."""
    round: int = 0
    """Which round of the benchmark."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        found = asdict(self)
        found["targets"] = {
            name: value if math.isfinite(value) else None
            for name, value in found["targets"].items()
        }
        return {"format": FORMAT, "version": VERSION} | found

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> CoserveLog:
        """Back from JSON.

        Raises:
            ConfigError: it is no such record, or a field is missing or wrong.
        """
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ConfigError(
                f'not a co-serving log: "format" is not "{FORMAT}"; '
                "use the --output of `cotune bench coserve`"
            )
        if value.get("version") != VERSION:
            raise ConfigError(
                f'"version" of the log is {value.get("version")!r}, and this release reads '
                f"{VERSION}; run the benchmark again"
            )
        rest = {key: item for key, item in value.items() if key not in ("format", "version")}
        targets = {
            name: math.inf if target is None else target
            for name, target in _mapping(rest.pop("targets", None), "targets").items()
        }
        training = rest.pop("training", None)
        log: CoserveLog = _make(
            cls,
            rest
            | {
                "targets": _make(Targets, targets, "targets"),
                "budgets": _make(LoggedBudgets, rest.get("budgets"), "budgets"),
                "training": training and _make(LoggedTraining, training, "training"),
                "requests": tuple(
                    _request(entry, f"requests[{index}]")
                    for index, entry in enumerate(rest.get("requests", ()))
                ),
                "samples": tuple(
                    _sample(entry, f"samples[{index}]")
                    for index, entry in enumerate(rest.get("samples", ()))
                ),
            },
            "the log",
        )
        return log


def write_logs(path: Path, logs: Iterable[CoserveLog], beside: Mapping[str, Any] = {}) -> None:
    """Write records, and what else the file shall hold, as JSON."""
    content = dict(beside) | {"logs": [log.to_dict() for log in logs]}
    path.write_text(json.dumps(content), encoding="utf-8")


def read_logs(path: Path) -> list[CoserveLog]:
    """The records of a file.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); check the path") from error
    except ValueError as error:
        raise ConfigError(
            f"{path} is not JSON ({error}); use the --output of `cotune bench coserve`"
        ) from error
    found = content.get("logs", [content]) if isinstance(content, dict) else [content]
    if not isinstance(found, list) or not found:
        raise ConfigError(f'{path}: "logs" is not a list of runs; run the benchmark again')
    logs = []
    for index, entry in enumerate(found):
        try:
            logs.append(CoserveLog.from_dict(entry))
        except ConfigError as error:
            raise ConfigError(f"{path}, logs[{index}]: {error.message}") from error
    return logs


def keeps_targets(
    ttft_s: float | None, gaps_s: Sequence[float], ttft_target_s: float, tbt_target_s: float
) -> bool:
    """Whether a first token came in time, and 99 of 100 gaps after it kept the target."""
    if ttft_s is None or ttft_s > ttft_target_s:
        return False
    return not gaps_s or quantile(sorted(gaps_s), 0.99) <= tbt_target_s


def quantile(ordered: list[float], share: float) -> float:
    """The value that this share of some ordered ones is not above, between neighbours linearly."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


# -- reading -------------------------------------------------------------------------------------


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is {value!r}, not an object; run the benchmark again")
    return value


def _make(kind: Any, value: Any, where: str) -> Any:
    """A frozen value of fields that must be known and complete."""
    known = {item.name for item in fields(kind)}
    if unknown := sorted(set(_mapping(value, where)) - known):
        raise ConfigError(f"{where} has the unknown field {unknown[0]!r}; run the benchmark again")
    try:
        return kind(**value)
    except TypeError as error:
        raise ConfigError(f"{where} is incomplete ({error}); run the benchmark again") from error


def _request(entry: Any, where: str) -> LoggedRequest:
    gaps = _mapping(entry, where).get("gaps_s", ())
    if not isinstance(gaps, list | tuple):
        raise ConfigError(f"{where}.gaps_s is {gaps!r}, not a list; run the benchmark again")
    for gap in gaps:
        _check(gap, f"{where}.gaps_s")
    found: LoggedRequest = _make(LoggedRequest, {**entry, "gaps_s": tuple(gaps)}, where)
    _check(found.arrival_s, f"{where}.arrival_s")
    _check(found.prompt_tokens, f"{where}.prompt_tokens", least=1)
    _check(found.cached_tokens, f"{where}.cached_tokens")
    _check(found.output_tokens, f"{where}.output_tokens")
    if found.ttft_s is not None:
        _check(found.ttft_s, f"{where}.ttft_s")
    if found.cached_tokens >= found.prompt_tokens:
        raise ConfigError(
            f"{where}.cached_tokens is {found.cached_tokens}, and the prompt has only "
            f"{found.prompt_tokens}: its last token is always computed; run the benchmark again"
        )
    return found


def _sample(entry: Any, where: str) -> LoggedSample:
    found: LoggedSample = _make(LoggedSample, entry, where)
    _check(found.arrival_s, f"{where}.arrival_s")
    _check(found.tokens, f"{where}.tokens", least=1)
    return found


def _check(value: Any, where: str, *, least: float = 0) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and value >= least):
        raise ConfigError(f"{where} is {value!r}; it must be a number of {least:g} or more")
