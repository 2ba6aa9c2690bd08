"""A stream of preferences whose topic drifts, read from a file, and what of it is sent to whom.

    drift_NAME.jsonl.gz ──► rows ──► held out, by a hash of the prompt     only ever evaluated
                                └──► sent: labels flipped for some, shared out among users
                                     + with a flood: one more user who says the opposite of each

Pure functions of the file and a seed: a run is repeated exactly, and no row changes sides.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ..runtime.errors import ConfigError
from .json_lines import read_json_lines

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from ..runtime.types import Message

FLOODER: Final = "flooder"
"""The source of a flood."""
_FIELDS: Final = ("t_s", "phase", "phase_name", "prompt", "chosen", "rejected", "id")


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftRow:
    """One preference of the stream.

    Attributes:
        id: unique within the stream.
        time_s: when it comes, in seconds since the first one.
        phase: number of its phase, from 0.
        prompt: messages; the answers are the assistant's next turn.
        chosen, rejected: the answers.
    """

    id: str
    time_s: float
    phase: int
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A row on its way: who says so, and whether the label was turned round.

    Attributes:
        id: of the event; unique within the run.
        row: as it is in the file.
        source: who sends it.
        is_flipped: whether the rejected answer is sent as the chosen one.
    """

    id: str
    row: DriftRow
    source: str
    is_flipped: bool

    def frame(self) -> dict[str, Any]:
        """What goes over the WebSocket."""
        chosen, rejected = self.row.chosen, self.row.rejected
        if self.is_flipped:
            chosen, rejected = rejected, chosen
        return {
            "id": self.id,
            "type": "preference",
            "prompt": list(self.row.prompt),
            "chosen": chosen,
            "rejected": rejected,
        }


@dataclass(frozen=True, slots=True)
class DriftStream:
    """A stream, divided.

    Attributes:
        phases: their names, in order.
        sent: what may be sent, in order of time.
        held_out: per phase, what is only evaluated.
    """

    phases: tuple[str, ...]
    sent: tuple[DriftRow, ...]
    held_out: tuple[tuple[DriftRow, ...], ...]


def read_stream(
    path: Path, *, held_out_share: float, fold: int = 0, limit: int | None = None
) -> DriftStream:
    """Read a stream and hold out a share of its prompts.

    Args:
        path: JSON lines, compressed if the name ends in ``.gz``; see `DriftRow` for what they hold.
        held_out_share: (0, 1).
        fold: which share of the prompts, from 0; two folds have no prompt in common.
        limit: only the first so many rows of each phase (None: all).

    Raises:
        ConfigError: the file is missing or malformed, or nothing is left to send or to evaluate.
    """
    rows, names = _read(path)
    if limit is not None:
        rows = _first_of_each_phase(rows, limit)
    phases = sorted(names)
    if phases != list(range(len(phases))):
        raise ConfigError(f"{path}: phases are {phases}; number them from 0", param="stream")
    held_out = [[row for row in rows if row.phase == phase] for phase in phases]
    held_out = [
        [row for row in part if is_evaluated(row, held_out_share, fold)] for part in held_out
    ]
    stream = DriftStream(
        phases=tuple(names[phase] for phase in phases),
        sent=tuple(row for row in rows if not is_evaluated(row, held_out_share, fold)),
        held_out=tuple(tuple(part) for part in held_out),
    )
    for phase, part in enumerate(stream.held_out):
        to_send = sum(row.phase == phase for row in stream.sent)
        if not part or not to_send:
            raise ConfigError(
                f"{path}: phase {phase} has {len(part)} rows held out and {to_send} to send; both "
                "need one at least: change --evaluation-share, --evaluation-fold or --limit",
                param="stream",
            )
    return stream


def is_evaluated(row: DriftRow, share: float, fold: int = 0) -> bool:
    """Whether a row is never sent. All rows of one prompt are on one side, on every machine.

    Fold k holds out the k-th share of the prompts, so that folds 0 to 1 / share - 1 together hold
    out every row once. The runtime's gate divides by a hash of its own, so its held-out feedback is
    another part.
    """
    text = json.dumps([[m["role"], m["content"]] for m in row.prompt], ensure_ascii=False)
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"cotune-drift").digest()
    place = int.from_bytes(digest, "little") / 2**64
    return fold * share <= place < (fold + 1) * share


def share_out(
    rows: Sequence[DriftRow], *, users: int, flip: float = 0.0, flood: int = 0
) -> tuple[Sent, ...]:
    """Who sends what, in which order.

    Args:
        rows: in order of time.
        users: people among whom the rows are shared out by a hash; each stays for all phases.
        flip: share of rows whose label is turned round, chosen by a hash.
        flood: as a phase begins, `FLOODER` sends all of its rows turned round, so many times
            over, before anybody else says a word.
    """
    sent: list[Sent] = []
    phase = -1
    for row in rows:
        if flood and row.phase != phase:
            phase = row.phase
            sent += (
                Sent(
                    id=f"{FLOODER}-{turn}-{opposed.id}",
                    row=opposed,
                    source=FLOODER,
                    is_flipped=True,
                )
                for turn in range(flood)
                for opposed in rows
                if opposed.phase == phase
            )
        user = int(_fraction("user", row.id) * users)
        is_flipped = _fraction("flip", row.id) < flip
        sent.append(Sent(id=row.id, row=row, source=f"user-{user}", is_flipped=is_flipped))
    return tuple(sent)


def due_times_s(
    sent: Iterable[Sent], *, speed: float | None, events_per_s: float | None
) -> tuple[float, ...]:
    """When each event is due, in seconds since the start.

    Args:
        sent: in order; a flood is due at once, when its phase begins.
        speed: how many times faster than in the file.
        events_per_s: a steady pace instead; the flood comes on top of it.
    """
    times: list[float] = []
    ordinary = 0
    for event in sent:
        if events_per_s is not None:
            times.append(ordinary / events_per_s)
        else:
            assert speed is not None
            times.append(event.row.time_s / speed)
        ordinary += event.source != FLOODER
    # A flood's rows are a whole phase's, and all come when its first ordinary row is due.
    for i in range(len(times) - 2, -1, -1):
        times[i] = min(times[i], times[i + 1])
    return tuple(times)


def _fraction(salt: str, text: str) -> float:
    """A number in [0, 1) that stays the same for ever."""
    digest = hashlib.blake2b(f"{salt}:{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _first_of_each_phase(rows: Sequence[DriftRow], limit: int) -> list[DriftRow]:
    taken: dict[int, int] = {}
    kept = []
    for row in rows:
        taken[row.phase] = taken.get(row.phase, 0) + 1
        if taken[row.phase] <= limit:
            kept.append(row)
    return kept


def _read(path: Path) -> tuple[list[DriftRow], dict[int, str]]:
    """The rows in order of time, and the phases' names by number."""
    found = [_parse(fields, place) for place, fields in read_json_lines(path)]
    rows = [row for row, _ in found]
    if len({row.id for row in rows}) < len(rows):
        raise ConfigError(f"{path}: ids occur twice; each row needs its own", param="stream")
    return sorted(rows, key=lambda row: row.time_s), {row.phase: name for row, name in found}


def _parse(fields: dict[str, Any], place: str) -> tuple[DriftRow, str]:
    if missing := [f for f in _FIELDS if f not in fields]:
        raise ConfigError(
            f"{place}: a row needs {', '.join(_FIELDS)}; missing: {', '.join(missing)}",
            param="stream",
        )
    row = DriftRow(
        id=str(fields["id"]),
        time_s=float(fields["t_s"]),
        phase=int(fields["phase"]),
        prompt=tuple(fields["prompt"]),
        chosen=str(fields["chosen"]),
        rejected=str(fields["rejected"]),
    )
    return row, str(fields["phase_name"])
