"""What the test of crashes remembers of all lives, and what it holds each new one to.

`Ledger` is the feedback: what was sent and acknowledged, and by rules of its own what must and what
may stand after that. `Witness` is everything else: live versions, weights, checkpoints. Both raise
`AssertionError` at the first report that breaks a promise.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from cotune.runtime.learning.state_directory import StateDirectory
from cotune.runtime.learning.versions import VersionStore
from cotune.runtime.lora import read_lora
from crash_child import ADAPTER, digest_of
from tiny_models import with_peft_adapter

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

LOGP_TOLERANCE = 2e-3
"""Served and peft's log-probabilities of one token, float32: sums in another order."""


@dataclass
class Entry:
    """One event that was sent, perhaps several times, in `life` first and in `last_life` last."""

    body: Mapping[str, Any]
    life: int
    last_life: int
    is_acknowledged: bool = False
    is_refused: bool = False
    attempts: int = 0

    @property
    def is_uncertain(self) -> bool:
        """Whether it may be stored or not."""
        return not (self.is_acknowledged or self.is_refused)


class Ledger:
    """The feedback of all lives, by source and id, in the order in which it was sent."""

    def __init__(self) -> None:
        self._sources: dict[str, dict[str, Entry]] = {}
        self._forgetting: dict[str, int] = {}  # in which life that was asked for last
        self.resent = 0

    # -- what is reported

    def send(self, source: str, body: Mapping[str, Any], life: int) -> None:
        entries = self._sources.setdefault(source, {})
        entry = entries.setdefault(body["id"], Entry(body, life, life))
        assert entry.body == body
        entry.last_life = life
        entry.attempts += 1

    def acknowledge(self, source: str, event_id: str, *, duplicate: bool) -> None:
        entry = self._sources[source][event_id]
        where = f"{source}/{event_id}, attempt {entry.attempts}"
        if entry.is_acknowledged:
            assert duplicate, f"{where} was acknowledged before, and was stored a second time"
            self.resent += 1
        if duplicate:
            assert entry.attempts > 1, f"{where} is called a duplicate"
        entry.is_acknowledged, entry.is_refused = True, False

    def refuse(self, source: str, event_id: str, code: str) -> None:
        entry = self._sources[source][event_id]
        assert not entry.is_acknowledged, f"{source}/{event_id} was acknowledged; now: {code}"
        # Sent again after a crash, it may be about a response that is gone, or never was recorded.
        assert code in {"response_not_found", "withdrawn_too_often", "target_not_found"}, code
        entry.is_refused = True

    def begin_forgetting(self, source: str, life: int) -> None:
        self._forgetting[source] = life

    def end_forgetting(self, source: str) -> None:
        self._forgetting.pop(source, None)
        self._sources.pop(source, None)

    # -- what follows

    def has_in_flight(self, life: int) -> bool:
        """Whether a life has sent something that it got no answer to."""
        entries = [e for source in self._sources.values() for e in source.values()]
        return life in self._forgetting.values() or any(
            entry.is_uncertain and entry.last_life == life for entry in entries
        )

    def to_forget(self) -> list[str]:
        """Removals that have to be asked for again."""
        return sorted(self._forgetting)

    def to_resend(self, life: int) -> list[tuple[str, Mapping[str, Any]]]:
        """What was never answered, and whatever the life `life` has sent."""
        return [
            (source, entry.body)
            for source, entries in self._sources.items()
            if source not in self._forgetting
            for entry in entries.values()
            if entry.is_uncertain or (entry.is_acknowledged and entry.life == life)
        ]

    def check_export(self, rows: Iterable[tuple[str, str]]) -> None:
        """Hold the feedback that stands after a restart, as (source, id), to what was said."""
        found = Counter(rows)
        twice = [key for key, count in found.items() if count > 1]
        assert not twice, f"twice in the export: {twice}"
        known: set[tuple[str, str]] = set()
        for source, entries in self._sources.items():
            must, may = _standing(entries)
            mine = {event_id for name, event_id in found if name == source}
            if source in self._forgetting and not mine:
                continue
            assert must <= mine, f"{source} said these, and they are lost: {sorted(must - mine)}"
            assert mine <= may, f"{source} took these back, and they stand: {sorted(mine - may)}"
            known |= {(source, event_id) for event_id in mine}
        assert set(found) == known, f"nobody said, or is to know: {sorted(set(found) - known)}"

    def check_counts(self, counts: Mapping[str, int]) -> None:
        """Hold the numbers of stored events by type to it, once everything was sent again."""
        expected = Counter(
            entry.body["type"]
            for entries in self._sources.values()
            for entry in entries.values()
            if entry.is_acknowledged
        )
        assert counts == dict(expected)

    def __len__(self) -> int:
        return sum(len(entries) for entries in self._sources.values())


def _standing(entries: Mapping[str, Entry]) -> tuple[set[str], set[str]]:
    """What must and what may stand of one source's events.

    Of those without an answer at most one is about another event (a source sends such ones alone),
    so what each may do, it does on its own.
    """
    certain = {key: entry for key, entry in entries.items() if entry.is_acknowledged}
    cases = [_resolve([entry.body for entry in certain.values()])]
    cases += [
        _resolve([e.body for key, e in entries.items() if key in certain or key == maybe])
        for maybe, entry in entries.items()
        if entry.is_uncertain
    ]
    return set.intersection(*cases), set.union(*cases)


def _resolve(bodies: list[Mapping[str, Any]]) -> set[str]:
    """The ids of those that stand: not taken back, and the last word on their subject."""
    newest_first = list(reversed(bodies))
    withdrawn: set[str] = set()
    standing: set[str] = set()
    settled: set[str] = set()
    for body in newest_first:  # whoever withdraws came later, so that is decided before
        if body["id"] in withdrawn or (subject := _subject(body)) in settled:
            continue
        settled.add(subject)
        if body["type"] == "withdraw":
            withdrawn.add(body["target"])
        else:
            standing.add(body["id"])
    return standing


def _subject(body: Mapping[str, Any]) -> str:
    match body:
        case {"type": "withdraw", "target": target}:
            return f"withdraw {target}"
        case {"type": "rating" | "edit" as kind, "response_id": response_id}:
            return f"{kind} {response_id}"
        case {"chosen_id": chosen, "rejected_id": rejected}:
            return f"preference {sorted((chosen, rejected))}"
        case {"prompt": prompt, "chosen": chosen, "rejected": rejected}:
            return f"preference {prompt} {sorted((chosen, rejected))}"
        case _:
            raise AssertionError(body)


@dataclass
class LifeSoFar:
    """What a life has reported."""

    is_up: bool = False
    has_recovered: bool = False
    is_closed: bool = False
    died_at: str | None = None
    spans: dict[int, str] = field(default_factory=dict)
    entered: Counter[str] = field(default_factory=Counter)
    rows: list[tuple[str, str]] = field(default_factory=list)
    live_since_up: set[int] = field(default_factory=set)
    is_operating: bool = False
    loaded_steps: int = 0
    resumed_at: int | None = None
    steps: int = 0


class Witness:
    """What was seen of one state directory.

    Args:
        state: the directory.
        model: the base model, as transformers has it.
    """

    def __init__(self, state: Path, model: Any) -> None:
        self._state = StateDirectory(state)
        self._model = model
        self.ledger = Ledger()
        self.life = LifeSoFar()
        self.number = 0
        self._live = {0}  # more than one: a change was under way when a life ended
        self._weights: dict[int, str] = {}
        self._places: dict[int, str] = {}
        self._checkpoint: tuple[int, ...] | None = None
        self._checkpoint_under_way: tuple[int, ...] | None = None
        self._leftovers: list[Path] = []
        self._adapted: dict[int, Any] = {0: model}
        self.published = 0
        self.operated = 0
        self.steps = 0
        self.resumed = 0

    @property
    def versions(self) -> int:
        """How many versions were ever seen."""
        return len(self._weights)

    def begin(self) -> None:
        """A new life begins."""
        self.number += 1
        self.life = LifeSoFar()

    def take(self, report: Mapping[str, Any]) -> None:
        """Hold one report of a life to what is known."""
        life, ledger = self.life, self.ledger
        match report:
            case {"what": "failed", "text": text}:
                raise AssertionError(text)
            case {"what": "send", "source": source, "body": body}:
                ledger.send(source, body, self.number)
            case {"what": "ack", "source": source, "id": event_id, "duplicate": duplicate}:
                ledger.acknowledge(source, event_id, duplicate=duplicate)
            case {"what": "refused", "source": source, "id": event_id, "code": code}:
                ledger.refuse(source, event_id, code)
            case {"what": "forgetting", "source": source}:
                ledger.begin_forgetting(source, self.number)
            case {"what": "forgotten", "source": source}:
                ledger.end_forgetting(source)
            case {"what": "enter", "span": span, "key": key}:
                life.spans[key] = span
                life.entered[span] += 1
                self._enter(span, report)
            case {"what": "leave", "span": span, "key": key, "is_done": is_done}:
                del life.spans[key]
                self._leave(span, report, is_done=is_done)
            case {"what": "operating", "is_on": is_on}:
                life.is_operating = is_on
            case {"what": "weights", "number": number, "digest": digest}:
                self._see_weights(number, digest)
            case {"what": "step", "trainer_steps": trainer_steps}:
                self._step(trainer_steps)
            case {"what": "loaded", "checkpoint": checkpoint}:
                self._load(checkpoint)
            case {"what": "up", "live": live}:
                life.is_up = True
                assert live in life.live_since_up | self._live
                life.live_since_up |= {live, *self._live}
            case {"what": "row", "source": source, "id": event_id, "state": state}:
                assert state not in {"withdrawn", "superseded"}, report
                life.rows.append((source, event_id))
            case {"what": "exported"}:
                ledger.check_export(life.rows)
            case {"what": "counts", "events": events}:
                ledger.check_counts(events)
            case {"what": "answered", "version": version}:
                assert version in life.live_since_up, f"{version} answered: {life.live_since_up}"
            case {"what": "scored"}:
                self._check_scores(report)
            case {"what": "recovered"}:
                life.has_recovered = True
                left = [path for path in self._leftovers if path.exists()]
                assert not left, f"left by the life before: {left}"
            case {"what": "died", "point": point}:
                life.died_at = point
            case {"what": "closed"}:
                life.is_closed = True
            case {"what": "born"}:
                pass
            case _:
                raise AssertionError(report)

    # -- versions

    def _enter(self, span: str, report: Mapping[str, Any]) -> None:
        if span == "live":
            number = report["number"]
            assert self.life.is_operating or number > max(self._live), (
                f"version {number} goes live after {self._live} by itself"
            )
            self._live |= {number}
            self.life.live_since_up.add(number)
        elif span == "save":
            saved = (report["steps"], report["trainer_steps"], report["live"])
            made = saved[0] - self.life.loaded_steps
            # A step that is cancelled at the very end is made and not counted.
            assert self.life.steps - 1 <= made <= self.life.steps, (
                f"{saved} is saved after {self.life.steps} steps on {self.life.loaded_steps}"
            )
            self._checkpoint_under_way = saved

    def _leave(self, span: str, report: Mapping[str, Any], *, is_done: bool) -> None:
        if not is_done:
            return
        if span == "live":
            self._live = {report["number"]}
            self.published += not self.life.is_operating
            self.operated += self.life.is_operating
        elif span == "save":
            self._checkpoint, self._checkpoint_under_way = self._checkpoint_under_way, None

    def _see_weights(self, number: int, digest: str) -> None:
        known = self._weights.setdefault(number, digest)
        assert known == digest, f"version {number} names other weights than before"

    # -- training

    def _load(self, checkpoint: list[int] | None) -> None:
        found = None if checkpoint is None else tuple(checkpoint)
        possible = {self._checkpoint, self._checkpoint_under_way or self._checkpoint}
        assert found in possible, f"the checkpoint is {found}; saved was one of {possible}"
        self._checkpoint, self._checkpoint_under_way = found, None
        if found is not None:
            steps, trainer_steps, live = found
            self.life.loaded_steps = steps
            # Else another version went live since, and training begins anew from there.
            self.life.resumed_at = trainer_steps if {live} == self._live else None

    def _step(self, trainer_steps: int) -> None:
        life = self.life
        life.steps += 1
        self.steps += 1
        if life.steps == 1 and life.resumed_at is not None and not life.entered["live"]:
            assert trainer_steps == life.resumed_at + 1, "the optimizer does not go on"
            self.resumed += 1

    # -- between two lives

    def inspect(self) -> None:
        """Look at what a life has left behind, before the next one begins."""
        self._leftovers = sorted(self._state.path.rglob(".tmp-*"))
        places: dict[int, str] = {}
        root = self._state.adapters
        if not root.is_dir():
            return
        store = VersionStore(root, read_only=True)
        for record in store.records(ADAPTER):
            assert record.number not in places, record
            places[record.number] = record.path.parent.name
            weights = read_lora(record.path, self._model, max_rank=8)
            self._see_weights(record.number, digest_of(weights))
            before = self._places.setdefault(record.number, record.path.parent.name)
            assert before == record.path.parent.name, f"{record.path} was {before} before"
        on_disk = [p for p in root.glob("*/*/*") if p.is_dir() and p.name.isdigit()]
        assert sorted(int(path.name) for path in on_disk) == sorted(places), "not all are whole"
        live = store.live(ADAPTER)
        assert live in self._live, f"version {live} is live; it was one of {self._live}"
        assert live in places or live == 0, f"live version {live} is not on disk: {places}"
        self._live = {live}
        self._adapted = {0: self._model, live: self._with_adapter(store, live)}

    def _with_adapter(self, store: VersionStore, number: int) -> Any:
        """The model under peft's reading of a version, which is all that peft needs."""
        return (
            with_peft_adapter(self._model, store.path(ADAPTER, number)) if number else self._model
        )

    def _check_scores(self, report: Mapping[str, Any]) -> None:
        """What a version answers is what peft computes from its directory."""
        version, prompt, completion = report["version"], report["prompt"], report["completion"]
        model = self._adapted.get(version)
        if model is None:  # it went live a moment ago
            model = self._with_adapter(VersionStore(self._state.adapters, read_only=True), version)
        ids = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(
            torch.tensor(report["logps"]), expected, rtol=0.0, atol=LOGP_TOLERANCE
        )
