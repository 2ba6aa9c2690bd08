"""Random feedback against a plain model of the store.

The model is a list of events. From it alone it says, by the rules in the docstring of `store`, what
stands and what state each sample is in: it never updates a state, it derives them anew. The store
must agree after every step, and after it was closed and opened.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cotune.runtime.errors import ConflictError, NotFoundError
from cotune.runtime.learning.config import FeedbackConfig
from cotune.runtime.learning.events import (
    Edit,
    FeedbackEvent,
    Preference,
    Rating,
    Withdrawal,
    event_type,
    subject_of,
)
from cotune.runtime.learning.store import MAX_WITHDRAWAL_DEPTH, STATES, FeedbackStore
from feedback_values import ADAPTER, PROMPT, Clock, open_store, pair, rated, response

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from cotune.runtime.learning.store import NewSample

SOURCES = st.sampled_from(["ann", "bob", "eve"])
RESPONSES = st.sampled_from(["r1", "r2"])
RETENTION_S = 1000.0
CONFIG = FeedbackConfig(quota_events=10**6, event_retention_s=RETENTION_S, response_retention_s=1e9)


@dataclass(eq=False)
class Said:
    """An event as the model has it."""

    source: str
    event: FeedbackEvent
    created_s: float
    key: int
    mentions: set[str]
    target: Said | None = None
    sample: int | None = None  # its key
    is_held_out: bool = False
    is_refused: bool = False
    has_reference: bool = False


@dataclass
class Model:
    events: list[Said] = field(default_factory=list)
    responses: dict[str, str] = field(default_factory=dict)  # id to source
    last_key: int = 0
    last_sample: int = 0

    def find(self, source: str, event_id: str) -> Said | None:
        found = [e for e in self.events if (e.source, e.event.id) == (source, event_id)]
        return found[0] if found else None

    def states(self) -> dict[Said, str]:
        """Newest first, so that what could withdraw or replace an event is known before it."""
        states: dict[Said, str] = {}
        withdrawn: set[Said] = set()
        taken: set[tuple[str, str]] = set()
        for said in reversed(self.events):
            subject = (said.source, subject_of(said.event))
            if said in withdrawn:
                states[said] = "withdrawn"
            elif subject in taken:
                states[said] = "superseded"
            else:
                states[said] = "stands"
                taken.add(subject)
                if said.target is not None:
                    withdrawn.add(said.target)
        return states

    def sample_states(self) -> dict[int, str]:
        states = self.states()
        sums: Counter[str] = Counter()
        for said, state in states.items():
            if isinstance(said.event, Rating) and state == "stands":
                sums[said.event.response_id] += said.event.rating
        found: dict[int, str] = {}
        for said, state in states.items():
            if said.sample is None:
                continue
            event = said.event
            if state != "stands":
                found[said.sample] = state
            elif said.is_refused:
                found[said.sample] = "refused"
            elif isinstance(event, Rating) and event.rating * sums[event.response_id] <= 0:
                found[said.sample] = "contradictory"
            elif said.has_reference:
                found[said.sample] = "held_out" if said.is_held_out else "ready"
            else:
                found[said.sample] = "pending"
        return dict(sorted(found.items()))

    def remove(self, gone: set[Said], *, with_replaced: bool) -> int:
        """Remove events, withdrawals of them, and perhaps what they replaced or withdrew."""
        size = -1
        while len(gone) != size:
            size = len(gone)
            for said in self.events:
                if said.target in gone:
                    gone.add(said)
                if with_replaced and any(
                    said is other.target
                    or (
                        said.key < other.key
                        and said.source == other.source
                        and subject_of(said.event) == subject_of(other.event)
                    )
                    for other in gone
                ):
                    gone.add(said)
        self.events = [said for said in self.events if said not in gone]
        return len(gone)


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.clock = Clock()
        self.model = Model()
        self.names = 0
        self.store = self.open()

    def open(self) -> FeedbackStore:
        path = Path(self.folder.name) / "feedback.sqlite"
        store: FeedbackStore = self.run(open_store(path, CONFIG, self.clock).__aenter__())
        return store

    def run(self, call: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(call)

    def teardown(self) -> None:
        self.run(self.store.__aexit__(None, None, None))
        self.runner.close()
        self.folder.cleanup()

    def say(
        self, source: str, event: FeedbackEvent, sample: NewSample | None, *, late: bool
    ) -> None:
        samples = None if late else [] if sample is None else [sample]
        done = self.run(self.store.add(event, source=source, samples=samples))
        assert not done.duplicate
        self.model.last_key += 1
        said = Said(
            source=source,
            event=event,
            created_s=self.clock.now.timestamp(),
            key=self.model.last_key,
            mentions={
                self.model.responses[response_id]
                for name in ("response_id", "chosen_id", "rejected_id")
                if (response_id := getattr(event, name, None)) in self.model.responses
            },
        )
        if isinstance(event, Withdrawal):
            said.target = self.model.find(source, event.target)
        self.model.events.append(said)
        if late:
            (stored,) = (e for e in self.run(self.store.unprepared()) if e.event == event)
            assert (stored.key, stored.source) == (said.key, source)
            self.run(self.store.prepare(stored.key, [] if sample is None else [sample]))
        if sample is not None:
            self.model.last_sample += 1
            said.sample = self.model.last_sample
            said.is_held_out = sample.is_held_out

    def name(self) -> str:
        self.names += 1
        return f"e{self.names}"

    @rule(source=SOURCES, response_id=RESPONSES, value=st.sampled_from([1, -1]), late=st.booleans())
    def rate(self, source: str, response_id: str, value: Any, late: bool) -> None:
        event = Rating(id=self.name(), response_id=response_id, rating=value)
        self.say(source, event, rated(value > 0), late=late)

    @rule(source=SOURCES, is_turned=st.booleans(), held_out=st.booleans())
    def prefer(self, source: str, is_turned: bool, held_out: bool) -> None:
        first, second = ("b", "a") if is_turned else ("a", "b")
        event = Preference(id=self.name(), prompt=PROMPT, chosen=first, rejected=second)
        self.say(source, event, pair(held_out=held_out), late=False)

    @rule(source=SOURCES, is_turned=st.booleans())
    def prefer_response(self, source: str, is_turned: bool) -> None:
        first, second = ("r2", "r1") if is_turned else ("r1", "r2")
        event = Preference(id=self.name(), chosen_id=first, rejected_id=second)
        self.say(source, event, pair(), late=False)

    @rule(source=SOURCES, response_id=RESPONSES, has_sample=st.booleans())
    def edit(self, source: str, response_id: str, has_sample: bool) -> None:
        event = Edit(id=self.name(), response_id=response_id, text="better")
        self.say(source, event, pair() if has_sample else None, late=False)

    @rule(data=st.data(), is_recent=st.booleans())
    @precondition(lambda self: self.model.events)
    def withdraw(self, data: st.DataObject, is_recent: bool) -> None:
        target = self.model.events[-1] if is_recent else self.pick(data)
        event = Withdrawal(id=self.name(), target=target.event.id)
        depth, link = 0, target
        while isinstance(link.event, Withdrawal) and link.target in self.model.events:
            assert link.target is not None
            depth, link = depth + 1, link.target
        if depth >= MAX_WITHDRAWAL_DEPTH:
            with pytest.raises(ConflictError):
                self.run(self.store.add(event, source=target.source, samples=()))
        else:
            self.say(target.source, event, None, late=False)

    @rule(source=SOURCES)
    def withdraw_what_is_not_there(self, source: str) -> None:
        event = Withdrawal(id=self.name(), target="nothing")
        with pytest.raises(NotFoundError):
            self.run(self.store.add(event, source=source, samples=()))

    @rule(data=st.data())
    @precondition(lambda self: self.model.events)
    def send_again(self, data: st.DataObject) -> None:
        said = self.pick(data)
        seen = self.store.changes
        assert self.run(self.store.add(said.event, source=said.source, samples=[rated()])).duplicate
        assert self.store.changes == seen

    @rule(data=st.data())
    @precondition(lambda self: self.model.events)
    def use_an_id_again(self, data: st.DataObject) -> None:
        said = self.pick(data)
        event = Edit(id=said.event.id, response_id="r9", text="something else")
        with pytest.raises(ConflictError):
            self.run(self.store.add(event, source=said.source, samples=[pair()]))

    @rule(data=st.data(), is_finite=st.booleans())
    @precondition(lambda self: self.model.sample_states())
    def score(self, data: st.DataObject, is_finite: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.model.sample_states())))
        (said,) = (said for said in self.model.events if said.sample == key)
        if is_finite:
            said.has_reference = True
            second = None if isinstance(said.event, Rating) else -2.0
            self.run(self.store.set_reference([(key, -1.0, second)]))
        else:
            said.is_refused = True
            self.run(self.store.refuse_sample(key, "not finite"))

    @rule(response_id=RESPONSES, source=SOURCES)
    def record(self, response_id: str, source: str) -> None:
        self.store.record(response(response_id, source=source))
        self.model.responses.pop(response_id, None)
        self.model.responses[response_id] = source

    @rule(source=SOURCES)
    def forget(self, source: str) -> None:
        gone = {
            said for said in self.model.events if said.source == source or source in said.mentions
        }
        assert self.run(self.store.forget(source)) == self.model.remove(gone, with_replaced=False)
        self.model.responses = {
            name: asker for name, asker in self.model.responses.items() if asker != source
        }

    @rule(seconds=st.sampled_from([1.0, RETENTION_S / 4, RETENTION_S / 2]))
    def pass_time(self, seconds: float) -> None:
        self.clock.pass_s(seconds)
        before_s = self.clock.now.timestamp() - RETENTION_S
        gone = {said for said in self.model.events if said.created_s < before_s}
        assert self.run(self.store.expire()) == self.model.remove(gone, with_replaced=True)

    @rule()
    def reopen(self) -> None:
        self.run(self.store.__aexit__(None, None, None))
        self.store = self.open()

    @invariant()
    def it_agrees_with_the_model(self) -> None:
        self.run(self.compare())

    async def compare(self) -> None:
        expected = self.model.sample_states()
        counts = await self.store.states(ADAPTER)
        assert counts == {state: list(expected.values()).count(state) for state in STATES}
        assert [s.key for s in await self.store.pending(ADAPTER, 10**6)] == [
            key for key, state in expected.items() if state == "pending"
        ]
        for held_out, name in ((False, "ready"), (True, "held_out")):
            samples = await self.store.samples(ADAPTER, held_out=held_out, limit=10**6)
            assert [s.key for s in samples] == [
                key for key, state in expected.items() if state == name
            ]
            assert all(sample.is_ready for sample in samples)
        states = self.model.states()
        assert [(row["source"], row["id"]) async for row in self.store.export()] == [
            (said.source, said.event.id)
            for said in self.model.events
            if states[said] == "stands" and not isinstance(said.event, Withdrawal)
        ]
        stored = self.store.counts()
        assert stored.events == Counter(event_type(said.event) for said in self.model.events)
        assert stored.recorded_responses == len(self.model.responses)
        for name, source in self.model.responses.items():
            assert (await self.store.response(name)).source == source

    def pick(self, data: st.DataObject) -> Said:
        index = data.draw(st.integers(0, len(self.model.events) - 1))
        return self.model.events[index]


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
