"""A process that serves and learns, made to be killed: see tests/faults/test_learning_crash.py.

    test ── orders, one JSON line each ──► nursery     imports everything once, then forks
      ▲                                       │
      └── reports, one JSON line each ────────┴─ life  one Runtime, until it is killed

The nursery has no thread but its first when it forks, and has computed nothing; it says how many
threads it has, so that this stays true. A life feeds its own runtime: chats, ratings, preferences,
edits, withdrawals, the removal of a visitor's data, rollbacks. It reports what it sends *before*
sending and each acknowledgement *after* getting it, so the reader knows what may be stored and what
must be.

A life may be told to die at a *point*: a place where something becomes durable, named by what is
going on and the call ("live/replace.before"), and how often it has to be reached. ``torn`` cuts the
file that is being written in half first, as if the process had died within the write.
"""

from __future__ import annotations

import asyncio
import contextvars
import faulthandler
import hashlib
import importlib
import inspect
import itertools
import logging
import os
import random
import select
import signal
import sqlite3
import threading
import traceback
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import orjson

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cotune.runtime.lora import LoraWeights
    from cotune.runtime.runtime import Runtime

ADAPTER = "tiny"
"""The served name: that of the model's directory."""
PATIENCE_S = 90.0
"""A life that is older says where each of its threads is, and ends."""
CHOSEN = "the cat sat on the mat"
PROBE = "the cat sat on the mat and the dog ran\n\nshe said hello to him in the garden\n"

_PRELOADED = (
    "transformers.models.llama.modeling_llama",
    "peft",
    "cotune.runtime.runtime",
    "cotune.runtime.executor",
    "cotune.runtime.loading",
    "cotune.runtime.tokenization",
    "cotune.runtime.choosing_cpu",
    "cotune.runtime.kernels.cpu",
    "cotune.runtime.learning.service",
    "cotune.runtime.training.trainer",
)


def digest_of(weights: LoraWeights) -> str:
    """What tells an adapter's weights from all others."""
    digest = hashlib.sha256()
    for name, (a, b) in sorted(weights.modules.items()):
        digest.update(name.encode())
        digest.update(a.contiguous().numpy().tobytes())
        digest.update(b.contiguous().numpy().tobytes())
    return digest.hexdigest()


# -- the nursery -----------------------------------------------------------------------------------


def nursery() -> None:
    """Carry out orders from standard input until it ends."""
    for module in _PRELOADED:
        importlib.import_module(module)
    report = Report(os.dup(1))
    os.dup2(2, 1)  # whatever prints has no place among the reports
    report("ready", threads=len(os.listdir("/proc/self/task")))
    while line := _read_line(0):
        order = orjson.loads(line)
        if order["do"] == "live":
            _raise_child(order, report)


def _raise_child(order: dict[str, Any], report: Report) -> None:
    """Fork a life and wait for its end, or for the order to end it."""
    pulse, held = os.pipe()  # the life holds it open, and never writes
    pid = os.fork()
    if pid == 0:
        os.close(pulse)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        _live(order, report)
    os.close(held)
    report("born", pid=pid)
    while True:
        ready, _, _ = select.select([pulse, 0], [], [])
        if pulse in ready:
            break
        line = _read_line(0)
        if not line or orjson.loads(line)["do"] == "kill":
            os.kill(pid, signal.SIGKILL)
            break
    _, status = os.waitpid(pid, 0)
    os.close(pulse)
    report.end_line()  # it may have died within one
    report("dead", status=os.waitstatus_to_exitcode(status))


def _read_line(descriptor: int) -> bytes:
    """The next line; empty at the end. Nothing beyond it is read, so that `select` sees it."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(descriptor, 1)
        if not byte:
            return b""
        line += byte
    return bytes(line)


class Report:
    """Writes reports, from any thread. A report is written before the next statement runs."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._turn = threading.Lock()

    def __call__(self, what: str, **fields: object) -> None:
        self._write(orjson.dumps({"what": what, **fields}) + b"\n")

    def end_line(self) -> None:
        """End a line that somebody may have left unfinished."""
        self._write(b"\n")

    def _write(self, data: bytes) -> None:
        with self._turn:
            while data:
                data = data[os.write(self._descriptor, data) :]


# -- one life --------------------------------------------------------------------------------------


def _live(order: dict[str, Any], report: Report) -> NoReturn:
    """In the forked process, to its end."""
    status = 1
    try:
        faulthandler.dump_traceback_later(PATIENCE_S, exit=True)
        logging.basicConfig(level=logging.WARNING)
        logging.getLogger().addHandler(_ReportErrors(report))
        progress = Progress(**order["goal"])
        Saboteur(report, progress, **order["crash"]).take_positions()
        asyncio.run(Life(order, report, progress).run())
        report("closed")
        status = 0
    except BaseException:  # noqa: BLE001 - the end of the process
        report("failed", text=traceback.format_exc()[-3000:])
    finally:
        os._exit(status)


class _ReportErrors(logging.Handler):
    """What is logged as an error is one."""

    def __init__(self, report: Report) -> None:
        super().__init__(logging.ERROR)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        text = logging.Formatter().format(record)
        self._report("failed", text=text[-3000:])


class Progress:
    """Says when a life has made so many steps and published so many versions.

    Without numbers there is no goal, and it never has.
    """

    def __init__(self, steps: int | None, versions: int | None) -> None:
        self._steps = steps
        self._versions = versions
        self._loop: asyncio.AbstractEventLoop | None = None
        self.is_reached = asyncio.Event()
        self.has_goal = steps is not None

    def start(self) -> None:
        """On the event loop."""
        self._loop = asyncio.get_running_loop()
        self._look()

    def stepped(self) -> None:
        """An optimizer step was made; on any thread."""
        if self._steps is not None:
            self._steps -= 1
            self._look()

    def published(self) -> None:
        """A version went live; on any thread."""
        if self._versions is not None:
            self._versions -= 1
            self._look()

    def _look(self) -> None:
        if self._steps is None or self._versions is None or self._loop is None:
            return
        if self._steps <= 0 and self._versions <= 0:
            self._loop.call_soon_threadsafe(self.is_reached.set)


class Life:
    """Runs a runtime and is its clients."""

    def __init__(self, order: dict[str, Any], report: Report, progress: Progress) -> None:
        self._order = order
        self._report = report
        self._progress = progress
        self._name = f"life{order['number']}"
        self._random = random.Random(order["seed"])
        self._number = itertools.count()

    async def run(self) -> None:
        from cotune.runtime.learning.config import (
            FeedbackConfig,
            GateConfig,
            LearningConfig,
            TrainingConfig,
        )
        from cotune.runtime.runtime import Runtime

        model, state = Path(self._order["model"]), Path(self._order["state"])
        probe = model.with_name("probe.txt")
        learning = LearningConfig(
            enabled=True,
            state_dir=state,
            # So few responses are kept that old events are sent again when theirs are gone.
            feedback=FeedbackConfig(quota_events=10**6, max_responses=24),
            training=TrainingConfig(
                lora_rank=2,
                lora_alpha=4.0,
                target_modules="q_proj,v_proj",
                learning_rate=5e-3,
                warmup_steps=0,
                batch_size=4,
                batch_wait_s=0.02,
                epochs=2,
                buffer_size=64,
                checkpoint_steps=2,
            ),
            gate=GateConfig(
                held_out_share=0.4,
                max_held_out=12,
                min_held_out=2,
                candidate_steps=2,
                confidence_z=0.0,
                max_probe_increase=1e3,
                min_entropy_ratio=0.0,
                max_repetition=1.0,
                max_chosen_drop=1e3,
                probe_file=probe,
                keep_versions=2,
            ),
        )
        async with Runtime(
            model, "cpu", learning=learning, num_pages=256, page_size=16, max_num_seqs=16
        ) as rt:
            await self._take_stock(rt)
            await self._carry_on(rt)

    async def _take_stock(self, rt: Runtime) -> None:
        """Tell what is there after the start, and send again what the last life has sent."""
        from cotune.runtime.types import SamplingParams

        report = self._report
        report("up", live=rt.learning().adapters[0].live_version)
        async for row in rt.export_feedback():
            report("row", source=row["source"], id=row["id"], state=row["state"])
        report("exported")
        for source in self._order["forget"]:
            await self._forget(rt, source)
        for source, body in self._order["resend"]:
            await self._send(rt, source, body)
        report("counts", events=dict(rt.learning().events))
        greedy = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
        answer = await rt.chat([{"role": "user", "content": "hello"}], greedy, record=False)
        report("answered", version=answer.adapter_version.version)
        live = rt.learning().adapters[0].live_version
        prompt, completion = answer.prompt_token_ids, answer.token_ids
        logps = await rt.score(prompt, completion, model=f"{rt.served_name}@{live}")
        report("scored", version=live, prompt=prompt, completion=completion, logps=logps)
        report("recovered")

    async def _carry_on(self, rt: Runtime) -> None:
        """Feed the runtime until the goal is reached."""
        self._progress.start()
        reached = self._progress.is_reached
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._give_feedback(rt, source)) for source in ("ann", "bob")
            ]
            tasks.append(group.create_task(self._visit(rt)))
            if not self._progress.has_goal:  # what goes live then was published
                tasks.append(group.create_task(self._operate(rt)))
            await reached.wait()
            for task in tasks:
                task.cancel()

    # -- clients

    async def _give_feedback(self, rt: Runtime, source: str) -> None:
        """One person, one thing after the other; now and then three at once."""
        sent: list[dict[str, Any]] = []
        while True:
            match self._random.choice("tttttbrrpewwa"):
                case "t":
                    bodies = [self._text_preference()]
                case "b":
                    bodies = [self._text_preference() for _ in range(3)]
                case "r":
                    answer = await self._answer(rt, source, self._question())
                    rating = self._random.choice((1, -1))
                    bodies = [self._body("rating", response_id=answer.id, rating=rating)]
                case "p":
                    prompt = self._question()
                    first, second = [await self._answer(rt, source, prompt) for _ in range(2)]
                    if first.token_ids == second.token_ids:
                        continue
                    bodies = [self._body("preference", chosen_id=first.id, rejected_id=second.id)]
                case "e":
                    answer = await self._answer(rt, source, self._question())
                    bodies = [self._body("edit", response_id=answer.id, text=CHOSEN)]
                case "w" if sent:
                    # Another withdrawal may be what is withdrawn: then its target comes back.
                    bodies = [self._body("withdraw", target=self._random.choice(sent[-6:])["id"])]
                case "a" if sent:
                    bodies = [self._random.choice(sent)]
                case _:
                    continue
            async with asyncio.TaskGroup() as group:
                for body in bodies:
                    group.create_task(self._send(rt, source, body))
            sent += bodies
            await asyncio.sleep(self._random.uniform(0.0, 0.03))  # so that training has its turn

    async def _visit(self, rt: Runtime) -> None:
        """Somebody who says something and then wants to be forgotten."""
        for visit in itertools.count():
            source = f"{self._name}-visitor{visit}"
            for _ in range(2):
                await self._send(rt, source, self._text_preference())
            await asyncio.sleep(self._random.uniform(0.0, 0.3))
            await self._forget(rt, source)

    async def _operate(self, rt: Runtime) -> None:
        """Somebody who goes back to an earlier version now and then."""
        from cotune.runtime.errors import ConflictError, NotFoundError

        while True:
            await asyncio.sleep(self._random.uniform(0.5, 2.5))
            live = rt.learning().adapters[0].live_version
            others = [record.number for record in await rt.adapters() if not record.is_live]
            self._report("operating", is_on=True)
            try:
                if others and self._random.random() < 0.5:
                    await rt.promote(str(self._random.choice(others)), force=True)
                elif live:
                    await rt.rollback(f"{rt.served_name}@{live}")
            except (ConflictError, NotFoundError):
                pass  # another went live, or it was pruned, meanwhile
            self._report("operating", is_on=False)

    def _question(self) -> str:
        return f"what is {self._random.randrange(1000)}"

    async def _answer(self, rt: Runtime, source: str, prompt: str) -> Any:
        from cotune.runtime.types import SamplingParams

        params = SamplingParams(max_tokens=5, min_tokens=1, temperature=1.5)
        return await rt.chat([{"role": "user", "content": prompt}], params, source=source)

    def _text_preference(self) -> dict[str, Any]:
        prompt = f"say {self._random.randrange(10**6)}"
        rejected = " ".join(["hello"] * self._random.randint(1, 4))
        return self._body(
            "preference",
            prompt=[{"role": "user", "content": prompt}],
            chosen=CHOSEN,
            rejected=rejected,
        )

    def _body(self, kind: str, **fields: object) -> dict[str, Any]:
        return {"id": f"{self._name}-{next(self._number)}", "type": kind, **fields}

    async def _send(self, rt: Runtime, source: str, body: dict[str, Any]) -> None:
        from cotune.runtime.errors import CotuneError

        self._report("send", source=source, body=body)
        try:
            acknowledgement = await rt.feedback(body, source=source)
        except CotuneError as error:
            self._report("refused", source=source, id=body["id"], code=error.code)
        else:
            self._report(
                "ack", source=source, id=acknowledgement.id, duplicate=acknowledgement.duplicate
            )

    async def _forget(self, rt: Runtime, source: str) -> None:
        self._report("forgetting", source=source)
        await rt.forget(source)
        self._report("forgotten", source=source)


# -- points to die at ------------------------------------------------------------------------------

_span: contextvars.ContextVar[str] = contextvars.ContextVar("span", default="")


class Saboteur:
    """Puts itself between the runtime and the disk, reports what goes on, and ends the process.

    Args:
        point: where (None: nowhere).
        hit: at which time that it comes by there, from 1.
    """

    def __init__(
        self, report: Report, progress: Progress, *, point: str | None, hit: int = 1
    ) -> None:
        self._report = report
        self._progress = progress
        self._point = point
        self._hits_left = hit
        self._turn = threading.Lock()
        self._paths: dict[int, Any] = {}
        self._numbers = itertools.count()

    def take_positions(self) -> None:
        """Once per process."""
        from cotune.runtime.adapters import AdapterStore
        from cotune.runtime.learning import checkpoint
        from cotune.runtime.learning.examiner import Examiner
        from cotune.runtime.learning.publisher import Publisher
        from cotune.runtime.learning.versions import VersionStore
        from cotune.runtime.training.trainer import Trainer

        watch = self._watch
        watch(VersionStore, "__init__", "open")
        watch(VersionStore, "next_number", "number")
        watch(VersionStore, "write", "write", number=lambda _, name, number, *rest, **named: number)
        watch(VersionStore, "set_live", "live", number=lambda _, name, number, why: number)
        watch(VersionStore, "prune", "prune")
        watch(Publisher, "publish", "publish")
        watch(AdapterStore, "set_live", "swap")
        watch(Examiner, "evaluate", "evaluate")
        watch(Trainer, "run_quantum", "train")
        watch(
            checkpoint,
            "save",
            "save",
            steps=lambda directory, tensors, state: state["steps"],
            trainer_steps=lambda directory, tensors, state: state["trainer"]["steps"],
            live=lambda directory, tensors, state: state["live"],
        )
        watch(checkpoint, "load", "load")
        self._after(Trainer, "run_quantum", self._note_step)
        self._after(VersionStore, "set_live", lambda *_: self._progress.published())
        self._after(checkpoint, "load", self._note_checkpoint)
        self._after(AdapterStore, "add", self._note_weights)
        for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir"):
            self._stand_at(name)
        self._remember_paths()
        vars(sqlite3)["connect"] = partial(sqlite3.connect, factory=_connection_of(self))

    def at(self, point: str, path: Any = None) -> None:
        """Called wherever a life may be ended; `path` is a file that is half-written then."""
        if point != self._point:
            return
        with self._turn:
            self._hits_left -= 1
            if self._hits_left:
                return
            if path is not None:
                os.truncate(path, os.path.getsize(path) // 2)
            self._report("died", point=point)
            os.kill(os.getpid(), signal.SIGKILL)
            threading.Event().wait()  # the signal ends this thread, too

    # -- what goes on

    @contextmanager
    def _within(self, span: str, fields: dict[str, object]) -> Iterator[None]:
        key = next(self._numbers)
        token = _span.set(span)
        is_done = False
        try:
            self._report("enter", span=span, key=key, **fields)
            self.at(f"{span}.enter")
            yield
            is_done = True
        finally:
            _span.reset(token)
            self._report("leave", span=span, key=key, is_done=is_done, **fields)
        self.at(f"{span}.leave")

    def _watch(self, owner: Any, name: str, span: str, **fields: Callable[..., object]) -> None:
        """Report calls of ``owner.name``, with `fields` of their arguments."""
        original = getattr(owner, name)

        @wraps(original)
        def call(*args: Any, **named: Any) -> Any:
            with self._within(span, {key: get(*args, **named) for key, get in fields.items()}):
                return original(*args, **named)

        @wraps(original)
        async def call_async(*args: Any, **named: Any) -> Any:
            with self._within(span, {key: get(*args, **named) for key, get in fields.items()}):
                return await original(*args, **named)

        setattr(owner, name, call_async if inspect.iscoroutinefunction(original) else call)

    def _after(self, owner: Any, name: str, note: Callable[..., None]) -> None:
        """Have `note` called with the outcome of ``owner.name``, then its arguments."""
        original = getattr(owner, name)

        @wraps(original)
        def call(*args: Any, **named: Any) -> Any:
            outcome = original(*args, **named)
            note(outcome, *args)
            return outcome

        setattr(owner, name, call)

    def _note_step(self, report: Any, *_: object) -> None:
        if report is not None:
            self._report("step", trainer_steps=report.step)
            self._progress.stepped()

    def _note_checkpoint(self, found: Any, *_: object) -> None:
        if found is None:
            self._report("loaded", checkpoint=None)
        else:
            state = found.state
            steps, trainer_steps = state["steps"], state["trainer"]["steps"]
            self._report("loaded", checkpoint=[steps, trainer_steps, state["live"]])

    def _note_weights(self, version: Any, _: object, name: str, weights: Any, *__: object) -> None:
        self._report("weights", number=version.version, digest=digest_of(weights))

    # -- the disk

    def _stand_at(self, name: str) -> None:
        """Before and after ``os.name``, within anything that is watched."""
        original = getattr(os, name)

        @wraps(original)
        def call(*args: Any, **named: Any) -> Any:
            if not (span := _span.get()):
                return original(*args, **named)
            if name == "fsync" and Path(path := self._paths.get(args[0], "")).is_file():
                self.at(f"{span}/fsync.torn", path)
            self.at(f"{span}/{name}.before")
            outcome = original(*args, **named)
            self.at(f"{span}/{name}.after")
            return outcome

        setattr(os, name, call)

    def _remember_paths(self) -> None:
        original = os.open

        @wraps(original)
        def call(path: Any, *args: Any, **named: Any) -> int:
            descriptor = original(path, *args, **named)
            if _span.get():
                self._paths[descriptor] = path
            return descriptor

        vars(os)["open"] = call


_WRITES = {
    "CREATE TABLE responses": "schema",
    "INSERT INTO events": "event",
    "DELETE FROM events": "removal",
    "INSERT INTO responses": "response",
    "UPDATE samples SET reference": "reference",
}


def _connection_of(saboteur: Saboteur) -> type[sqlite3.Connection]:
    """Connections that the saboteur watches commit."""

    class Connection(sqlite3.Connection):
        _writes: set[str]

        def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
            statement = sql.strip()
            if statement.startswith("BEGIN"):
                self._writes = set()
            for start, kind in _WRITES.items():
                if statement.startswith(start):
                    self._writes.add(kind)
            if statement != "COMMIT":
                return super().execute(sql, *args)
            for kind in sorted(self._writes):
                saboteur.at(f"commit[{kind}].before")
            cursor = super().execute(sql, *args)
            for kind in sorted(self._writes):
                saboteur.at(f"commit[{kind}].after")
            return cursor

    return Connection


if __name__ == "__main__":
    nursery()
