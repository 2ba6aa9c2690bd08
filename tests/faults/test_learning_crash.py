"""kill -9 while feedback comes in, training runs and versions are published.

A process that does all three (tests/crash_child.py) is killed, started again on the same state and
killed again, many times over. After every start, what it acknowledged has to be there once, the
live version has to be one that it may be, readable by peft and answering as peft computes it, and
training has to go on from the last checkpoint (tests/crash_witness.py says what exactly).

Half of the kills come at named points, before, within and after the calls that make something
durable; the other half at random moments, counted from the start or from something that began.

The processes are forked by one that has imported everything, so that a start costs tenths of a
second. Eight kills are for every run; ``-m slow`` makes two hundred and prints what they hit.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

import crash_child
from crash_witness import Ledger, LifeSoFar, Witness
from tiny_models import save_model_directory, tiny_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="counts threads in /proc before it forks"
)

SILENCE_S = 2 * crash_child.PATIENCE_S
"""Without a report for so long, the processes are taken for stuck."""
OVERDUE_S = 8.0
"""A life that has not come to its point so long after its start is killed where it is, unless said
otherwise."""


@dataclass(frozen=True)
class Kill:
    """When a life ends: at a point, or `delay_s` after something began (its start, unless said)."""

    point: str | None = None
    hit: int = 1
    span: str | None = None
    entry: int = 1
    delay_s: float = 0.0


# Points, and up to which of its hits a kill may wait.
FEEDBACK_POINTS = {
    "commit[event].before": 25,
    "commit[event].after": 25,
    "commit[reference].before": 6,
    "commit[reference].after": 6,
    "commit[response].before": 6,
    "commit[removal].before": 1,
    "commit[removal].after": 1,
}
TRAINING_POINTS = {
    "train.enter": 9,
    "train.leave": 9,
    "save/fsync.torn": 2,
    "save/replace.before": 2,
    "save/replace.after": 2,
    "load.leave": 1,
}
EVALUATION_POINTS = {
    "number/fsync.torn": 1,
    "number/replace.before": 1,
    "number/replace.after": 1,
    "evaluate.enter": 3,
    "evaluate.leave": 3,
}
PUBLICATION_POINTS = {
    "write/mkdir.after": 1,
    "write/fsync.torn": 3,
    "write/rename.before": 2,
    "write/rename.after": 2,
    "publish.enter": 1,
    "live/fsync.torn": 2,
    "live/replace.before": 2,
    "live/replace.after": 2,
    "live.leave": 2,
    "swap.leave": 2,
    "prune/rename.before": 1,
    "prune/rename.after": 1,
    "prune/unlink.after": 2,
    "prune/rmdir.before": 1,
}
RECOVERY_POINTS = {"open/unlink.before": 1, "open/unlink.after": 1, "open/rmdir.before": 1}
"""Come by only where the life before has left something to clear away."""
LEAVING_POINTS = ("write/rename.before", "write/fsync.torn", "prune/unlink.after")
"""These leave something."""
FIRST_POINTS = {"commit[schema].before": 1, "commit[schema].after": 1, "open/mkdir.after": 1}
"""Come by only where there is no state yet."""

POINTS = FEEDBACK_POINTS | TRAINING_POINTS | EVALUATION_POINTS | PUBLICATION_POINTS
SPANS = ("train", "save", "evaluate", "write", "publish", "live", "prune")

PHASES = {
    "open": "start",
    "load": "start",
    "commit[schema]": "start",
    "commit[event]": "feedback",
    "commit[removal]": "feedback",
    "commit[reference]": "training",
    "commit[response]": "serving",
    "train": "training",
    "save": "training",
    "number": "evaluation",
    "evaluate": "evaluation",
    "write": "publication",
    "publish": "publication",
    "live": "publication",
    "swap": "publication",
    "prune": "publication",
}


class Nursery:
    """The process that forks lives; see tests/crash_child.py."""

    def __init__(self, errors: Path) -> None:
        self._errors = errors
        with errors.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, crash_child.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                bufsize=0,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._orders = self._process.stdin
        self._reports = self._process.stdout
        self._unread = b""
        self._is_torn = False

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        self._reports.close()  # nobody waits for a reader that has gone
        self._orders.close()  # it ends its child, if there is one, and itself
        with self._process:
            self._process.wait(timeout=SILENCE_S)

    def order(self, **order: object) -> None:
        line = json.dumps(order).encode() + b"\n"
        while line:
            line = line[self._orders.write(line) :]

    def report(self, timeout_s: float) -> dict[str, Any] | None:
        """The next report, or None if there is none for so long."""
        while True:
            line, end, rest = self._unread.partition(b"\n")
            if not end:
                ready, _, _ = select.select([self._reports], [], [], max(timeout_s, 0.0))
                if not ready:
                    return None
                data = os.read(self._reports.fileno(), 1 << 16)
                assert data, f"the nursery has died:\n{self.errors()}"
                self._unread += data
                continue
            self._unread = rest
            if not line:
                continue
            try:
                found: dict[str, Any] = json.loads(line)
            except ValueError:
                self._is_torn = True  # it was killed while it wrote this
                continue
            assert found["what"] == "dead" or not self._is_torn, line
            self._is_torn = False
            return found

    def errors(self) -> str:
        """What the processes wrote to standard error, its end."""
        return self._errors.read_text(errors="replace")[-6000:]


@dataclass(frozen=True)
class End:
    """How a life was ended: at a point (None: by the clock), and what was going on then."""

    point: str | None
    phases: frozenset[str]


class Scene:
    """A state directory, and the lives that are had on it, one after the other."""

    def __init__(
        self,
        nursery: Nursery,
        model: Path,
        state: Path,
        seed: int,
        *,
        overdue_s: float = OVERDUE_S,
    ) -> None:
        self._nursery = nursery
        self._overdue_s = overdue_s
        self._model = model
        self._state = state
        self._seed = seed
        self.witness = Witness(state, tiny_model("llama"))

    def kill(self, kill: Kill) -> End:
        """Have a life that is killed."""
        life = self._begin(
            crash={"point": kill.point, "hit": kill.hit}, goal={"steps": None, "versions": None}
        )
        due_s: float | None = None
        is_ordered = False
        while True:
            wait_s = SILENCE_S if due_s is None or is_ordered else due_s - time.monotonic()
            report = self._nursery.report(wait_s)
            now_s = time.monotonic()
            if report is not None:
                if report["what"] == "dead":
                    break
                self._take(report, kill)
                found_s = _due_s(kill, report, life, now_s, self._overdue_s)
                if found_s is not None:
                    due_s = found_s if due_s is None else min(due_s, found_s)
            elif due_s is None or is_ordered:
                pytest.fail(f"{kill}: it is stuck:\n{self._nursery.errors()}")
            if due_s is not None and now_s >= due_s and not is_ordered:
                self._nursery.order(do="kill")
                is_ordered = True
        assert report["status"] == -signal.SIGKILL, f"{kill}: {report}\n{self._nursery.errors()}"
        has_feedback = self.witness.ledger.has_in_flight(self.witness.number)
        end = End(life.died_at, _phases(life, has_feedback=has_feedback))
        self.witness.inspect()
        return end

    def finish(self, *, steps: int, versions: int) -> None:
        """Have a life that ends well, after so many optimizer steps and publications."""
        life = self._begin(crash={"point": None}, goal={"steps": steps, "versions": versions})
        while True:
            report = self._nursery.report(SILENCE_S)
            assert report is not None, f"it is stuck:\n{self._nursery.errors()}"
            if report["what"] == "dead":
                break
            self._take(report, None)
        assert report["status"] == 0, f"{report}\n{self._nursery.errors()}"
        assert life.is_closed
        assert life.steps >= steps
        self.witness.inspect()

    def _begin(self, **order: object) -> LifeSoFar:
        witness, ledger = self.witness, self.witness.ledger
        witness.begin()
        self._nursery.order(
            do="live",
            model=str(self._model),
            state=str(self._state),
            number=witness.number,
            seed=f"{self._seed}-{witness.number}",
            resend=ledger.to_resend(witness.number - 1),
            forget=ledger.to_forget(),
            **order,
        )
        return witness.life

    def _take(self, report: dict[str, Any], kill: Kill | None) -> None:
        try:
            self.witness.take(report)
        except AssertionError as error:
            error.add_note(f"in life {self.witness.number}, to end at {kill}, at {report}")
            raise


def _due_s(
    kill: Kill, report: dict[str, Any], life: LifeSoFar, now_s: float, overdue_s: float
) -> float | None:
    """When the clock is to end a life, as far as a report says anything about that."""
    match report:
        case {"what": "born"} if kill.point is None and kill.span is None:
            return now_s + kill.delay_s
        case {"what": "enter", "span": span} if span == kill.span:
            return now_s + kill.delay_s if life.entered[span] == kill.entry else None
        case {"what": "recovered"} if kill.point is not None or kill.span is not None:
            return now_s + overdue_s
        case _:
            return None


def _phases(life: LifeSoFar, *, has_feedback: bool) -> frozenset[str]:
    """What was going on when a life ended; "serving" if nothing else was."""
    names = [*life.spans.values(), *([life.died_at] if life.died_at else [])]
    found = {PHASES[re.split(r"/|\.(?:enter|leave|before|after)$", name)[0]] for name in names}
    if has_feedback:
        found.add("feedback")
    if not life.is_up:
        found.add("start")
    return frozenset(found or {"serving"})


class Plan:
    """Random kills, half of them at points: each point in its turn, in random order."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._deck: list[str] = []
        self._recovery_points = itertools.cycle(RECOVERY_POINTS)

    def kills(self, campaign: int, count: int) -> Iterator[Kill]:
        """`count` kills for one state directory."""
        firsts = sorted(FIRST_POINTS)
        follow_up = firsts[campaign] if campaign < len(firsts) else None
        for number in range(count):
            if follow_up is not None:
                kill = Kill(point=follow_up)
            elif number % 2:
                kill = self._at_a_point()
            else:
                kill = self._by_the_clock()
            yield kill
            follow_up = None
            if kill.point in LEAVING_POINTS:
                follow_up = next(self._recovery_points)

    def put_back(self, point: str) -> None:
        """No life came by this point in time; its turn comes again."""
        if point in POINTS:
            self._deck.insert(0, point)

    def _at_a_point(self) -> Kill:
        if not self._deck:
            self._deck = sorted(POINTS)
            self._random.shuffle(self._deck)
        point = self._deck.pop()
        return Kill(point=point, hit=self._random.randint(1, POINTS[point]))

    def _by_the_clock(self) -> Kill:
        if self._random.random() < 0.4:
            return Kill(delay_s=self._random.uniform(0.0, 3.0))
        return Kill(
            span=self._random.choice(SPANS),
            entry=self._random.randint(1, 3),
            delay_s=self._random.uniform(0.0, 0.03),
        )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_model_directory(tmp_path_factory.mktemp("model") / crash_child.ADAPTER)
    path.with_name("probe.txt").write_text(crash_child.PROBE)
    return path


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with Nursery(tmp_path_factory.mktemp("nursery") / "errors") as nursery:
        ready = nursery.report(SILENCE_S)
        # A thread would be gone in what is forked, with whatever it held.
        assert ready == {"what": "ready", "threads": 1}
        yield nursery


def test_eight_kills_lose_nothing_that_was_acknowledged(
    nursery: Nursery, model: Path, tmp_path: Path
) -> None:
    # Each has to come to its point, however slow the machine is.
    overdue_s = crash_child.PATIENCE_S
    scene = Scene(nursery, model, tmp_path / "state", seed=0, overdue_s=overdue_s)
    ends = [
        scene.kill(kill)
        for kill in (
            Kill(point="commit[schema].after"),
            Kill(point="commit[event].after", hit=20),
            Kill(span="publish", entry=1, delay_s=0.01),
            Kill(point="write/rename.before"),
            Kill(point="open/unlink.after"),
            Kill(point="live/replace.after"),
            Kill(point="save/fsync.torn"),
            Kill(delay_s=1.5),
        )
    ]
    scene.finish(steps=3, versions=1)
    scene.finish(steps=1, versions=0)  # it goes on from where that one stopped
    assert [end.point for end in ends if end.point is not None] == [
        "commit[schema].after",
        "commit[event].after",
        "write/rename.before",
        "open/unlink.after",
        "live/replace.after",
        "save/fsync.torn",
    ]
    witness = scene.witness
    assert witness.published > 0
    assert witness.resumed > 0
    assert witness.ledger.resent > 20


CAMPAIGNS = 8
KILLS = 25


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_two_hundred_kills_lose_nothing_that_was_acknowledged(
    nursery: Nursery, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight state directories from their very beginning, 25 kills each."""

    def say(line: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n{line}\n")
            sys.stdout.flush()

    faulthandler.cancel_dump_traceback_later()  # it has a timeout of its own
    started_s = time.monotonic()
    totals: Counter[str] = Counter()
    phases: Counter[str] = Counter()
    points: Counter[str] = Counter()
    plan = Plan(seed=1)
    for campaign in range(CAMPAIGNS):
        scene = Scene(nursery, model, tmp_path / f"state{campaign}", seed=campaign)
        for kill in plan.kills(campaign, KILLS):
            end = scene.kill(kill)
            phases.update(end.phases)
            if end.point is not None:
                points[end.point] += 1
            elif kill.point is not None:
                plan.put_back(kill.point)
            totals["kills"] += 1
        scene.finish(steps=3, versions=1)
        scene.finish(steps=0, versions=0)
        witness = scene.witness
        totals += Counter(
            events=len(witness.ledger),
            resent=witness.ledger.resent,
            steps=witness.steps,
            versions=witness.versions,
            published=witness.published,
            operated=witness.operated,
            resumed=witness.resumed,
        )
        counts = ", ".join(f"{count} {name}" for name, count in totals.items())
        during = ", ".join(f"{name} {count}" for name, count in phases.most_common())
        say(f"{time.monotonic() - started_s:.0f} s: {counts}; during {during}")
    say(f"{sum(points.values())} at points: {dict(sorted(points.items()))}")
    assert totals["kills"] == CAMPAIGNS * KILLS
    assert sum(points.values()) >= CAMPAIGNS * KILLS // 3
    for phase in ("start", "feedback", "training", "evaluation", "publication"):
        assert phases[phase] >= 15, phases
    everywhere = POINTS | RECOVERY_POINTS | FIRST_POINTS
    assert set(points) == everywhere.keys(), f"never reached: {everywhere.keys() - points.keys()}"


# -- the witness is awake --------------------------------------------------------------------------


PAIR = {"type": "preference", "prompt": [{"role": "user", "content": "?"}], "rejected": "no"}


def event(number: int) -> dict[str, Any]:
    return PAIR | {"id": f"e{number}", "chosen": f"yes {number}"}


def ledger_of(*bodies: dict[str, Any]) -> Ledger:
    """One that has seen these acknowledged."""
    ledger = Ledger()
    for body in bodies:
        ledger.send("ann", body, life=1)
        ledger.acknowledge("ann", body["id"], duplicate=False)
    return ledger


def test_a_lost_a_doubled_and_an_unknown_event_are_noticed() -> None:
    ledger = ledger_of(event(1), event(2))
    ledger.check_export([("ann", "e2"), ("ann", "e1")])
    with pytest.raises(AssertionError, match=r"they are lost: \['e2'\]"):
        ledger.check_export([("ann", "e1")])
    with pytest.raises(AssertionError, match="twice"):
        ledger.check_export([("ann", "e1"), ("ann", "e2"), ("ann", "e1")])
    with pytest.raises(AssertionError, match="nobody said"):
        ledger.check_export([("ann", "e1"), ("ann", "e2"), ("bob", "e1")])
    with pytest.raises(AssertionError):
        ledger.check_counts({"preference": 1})
    with pytest.raises(AssertionError, match="stored a second time"):
        ledger.acknowledge("ann", "e1", duplicate=False)
    ledger.send("ann", event(3), life=1)
    with pytest.raises(AssertionError, match="called a duplicate"):
        ledger.acknowledge("ann", "e3", duplicate=True)


def test_what_was_taken_back_does_not_stand_until_that_is_taken_back_too() -> None:
    back = {"id": "w1", "type": "withdraw", "target": "e1"}
    ledger = ledger_of(event(1), event(2), back)
    ledger.check_export([("ann", "e2")])
    with pytest.raises(AssertionError, match=r"they stand: \['e1'\]"):
        ledger.check_export([("ann", "e1"), ("ann", "e2")])
    ledger.send("ann", {"id": "w2", "type": "withdraw", "target": "w1"}, life=1)
    ledger.check_export([("ann", "e2")])  # it may have arrived, or not
    ledger.check_export([("ann", "e1"), ("ann", "e2")])
    ledger.acknowledge("ann", "w2", duplicate=False)
    with pytest.raises(AssertionError, match=r"they are lost: \['e1'\]"):
        ledger.check_export([("ann", "e2")])


def test_a_removal_that_was_under_way_is_whole_or_has_not_begun() -> None:
    ledger = ledger_of(event(1), event(2))
    ledger.begin_forgetting("ann", life=1)
    ledger.check_export([])
    ledger.check_export([("ann", "e1"), ("ann", "e2")])
    with pytest.raises(AssertionError, match="they are lost"):
        ledger.check_export([("ann", "e1")])
    ledger.end_forgetting("ann")
    with pytest.raises(AssertionError, match="or is to know"):
        ledger.check_export([("ann", "e1")])


def test_a_version_that_changes_or_goes_back_by_itself_is_noticed(tmp_path: Path) -> None:
    witness = Witness(tmp_path, None)
    witness.begin()

    def goes_live(number: int) -> None:
        for what in ("enter", "leave"):
            witness.take(
                {"what": what, "span": "live", "key": number, "number": number, "is_done": True}
            )

    goes_live(3)
    with pytest.raises(AssertionError, match="goes live after"):
        goes_live(2)
    witness.take({"what": "operating", "is_on": True})
    witness.life.spans.clear()
    goes_live(2)
    witness.take({"what": "weights", "number": 2, "digest": "a"})
    with pytest.raises(AssertionError, match="other weights"):
        witness.take({"what": "weights", "number": 2, "digest": "b"})
    witness.begin()
    with pytest.raises(AssertionError):
        witness.take({"what": "up", "live": 3})


def test_a_checkpoint_that_is_lost_or_old_is_noticed(tmp_path: Path) -> None:
    witness = Witness(tmp_path, None)
    witness.begin()
    witness.take({"what": "loaded", "checkpoint": None})
    for steps in (1, 2):
        witness.take({"what": "step", "trainer_steps": steps})
        saved = {"span": "save", "key": steps, "steps": steps, "trainer_steps": steps, "live": 0}
        witness.take({"what": "enter", **saved})
        if steps == 1:
            witness.take({"what": "leave", "is_done": True, **saved})
    witness.begin()  # it died within the second save, so either may be there
    for wrong in (None, [3, 3, 0]):
        with pytest.raises(AssertionError, match="the checkpoint is"):
            witness.take({"what": "loaded", "checkpoint": wrong})
    witness.take({"what": "loaded", "checkpoint": [2, 2, 0]})
    with pytest.raises(AssertionError, match="does not go on"):
        witness.take({"what": "step", "trainer_steps": 1})
