"""One adapter's learning: from samples to candidates to versions, over and over.

    references   samples that have come ─► base log-probabilities (background prefill) ─► ready
    training     ready samples ─► batches ─► quanta on the training lane ─► a candidate
                 ─► examined in a slot of the engine ─► judged
                      passed     written, prefixes prefilled, live; the new last good state
                      undecided  training goes on from here, `gate.patience` times in a row at most
                      refused    written for inspection; training goes back to the last good state

A candidate is judged by held-out feedback and, since that is little, by new feedback as well:
what the weights in training made of each sample just before they were trained on it, against what
the live version makes of it (gate.py, "Progressive").

The last good state is that of the live version: adapter, optimizer and which samples were trained
on how often. After a refusal nothing is tried again before a whole batch of new feedback has come,
since the same samples would give the same candidate.

While memory stays short the trainer is set down: its state is written as for a restart, and what it
held is freed. It is taken up again when there is room and something to do, as after a restart: with
the same steps, and a fresh optimizer in the last good state. A batch under way begins again, and so
does an examination.

A learner that fails stops, says so in the log and in its status, and disturbs nobody.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

from ...streams.lane import LaneClosedError
from ..errors import (
    ConfigError,
    CotuneError,
    DrainingError,
    IterationError,
    StorageError,
    is_out_of_memory,
)
from ..scheduling.memory_watch import Stake
from ..types import BASE, AdapterVersion
from . import checkpoint
from .gate import choose_evidence, judge
from .replay import ReplayBuffer
from .status import AdapterLearning, one_reason
from .versions import Lineage, Manifest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

    from ..adapters import AdapterStore
    from ..scheduling.desk import TrainingDesk
    from ..scheduling.memory_watch import TrainerMemory
    from ..training.trainer import StepReport, Trainer, TrainerState
    from .config import LearningConfig
    from .examiner import Examiner
    from .gate import Verdict
    from .publisher import Publisher
    from .samples import Sample
    from .status import Phase
    from .store import FeedbackStore
    from .versions import VersionRecord, VersionStore

log = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

REFERENCE_BATCH = 16
"""Samples whose reference log-probabilities are written together."""
REFRESH_INTERVAL_S = 1.0
"""While it trains, a learner looks for new samples this often."""
KEEP_S = 60.0
"""A trainer whose state could not be written keeps its memory for this long."""


class _MemoryWantedError(Exception):
    """What was under way was dropped, since the trainer is to be set down."""


@dataclass(frozen=True, slots=True)
class _Good:
    """A state that training can go back to."""

    trainer: TrainerState
    buffer: dict[str, Any]


class Learner:
    """Learns from the feedback on the answers of one adapter.

    Args:
        adapter: its name.
        config: of learning.
        store: where samples come from.
        examiner: evaluates versions.
        publisher: changes what is live.
        versions: directories of versions.
        adapters: holds candidates while they are examined.
        desk: where quanta are offered; what else is for the training lane goes there as well.
        memory: says when the trainer's memory is wanted, and when it is there again.
        make_trainer: called on the lane, once there is something to train on.
        directory: for checkpoints.
        base: name and fingerprint of the base model.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        adapter: str,
        *,
        config: LearningConfig,
        store: FeedbackStore,
        examiner: Examiner,
        publisher: Publisher,
        versions: VersionStore,
        adapters: AdapterStore,
        desk: TrainingDesk,
        memory: TrainerMemory,
        make_trainer: Callable[[], Trainer],
        directory: Path,
        base: tuple[str, str],
        clock: Callable[[], float],
    ) -> None:
        self.adapter = adapter
        self.publisher = publisher
        self._config = config
        self._store = store
        self._examiner = examiner
        self._versions = versions
        self._adapters = adapters
        self._desk = desk
        self._desk_key = desk.enroll(adapter)
        self._memory = memory
        memory.enroll(self._desk_key, adapter, self)
        self._make_trainer = make_trainer
        self._directory = directory
        self._base = base
        self._clock = clock

        self._trainer: Trainer | None = None
        self._scope: asyncio.Timeout | None = None  # of what may be dropped for want of memory
        self._stake = Stake.NOTHING
        self._is_wanted = False  # the trainer's memory
        self._keeps_until_s = -math.inf
        self._down: dict[str, Any] | None = None  # the last good buffer, while it is set down
        self._is_behind = False  # the trainer has less than the checkpoint
        self._held_bytes = 0  # what it held then
        self._set_downs = 0
        self._buffer = ReplayBuffer(config.training, is_shared=config.gate.min_sources > 1)
        self._good: _Good | None = None
        self._changes = 0  # of the publisher, when `_good` was taken
        self._last_number = 0
        self._steps_since = 0  # optimizer steps since the last candidate or good state
        self._untested_since_s = 0.0  # when the first of them was taken
        self._seen = -1  # changes of the store that `_refresh` took in
        self._refreshed_s = 0.0
        self._undecided = 0  # candidates in a row, up to now
        # Since the last good state: log-probabilities of new samples, before they were trained on.
        self._progressive: dict[int, tuple[float, ...]] = {}
        self._wait_beyond: int | None = None  # after a refusal: newer samples than this are needed
        self._incomplete_since: float | None = None
        self._too_large: set[int] = set()  # samples that once did not fit into memory

        self._phase: Phase = "idle"
        self._states: dict[str, int] = {}
        self._held_out: tuple[Sample, ...] = ()
        self._report: StepReport | None = None
        self._steps = 0
        self._tokens = 0
        self._passed = 0
        self._refused: Counter[str] = Counter()
        self._undecided_reasons: Counter[str] = Counter()
        self._last_verdict: str | None = None
        self._live_record: VersionRecord | None = None
        self._live_since: datetime | None = None

    # -- the two tasks ---------------------------------------------------------------------------

    async def run(self) -> None:
        """Learn until cancelled. Training state is saved on the way out."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._compute_references())
                if self._config.train:
                    group.create_task(self._train())
        except* DrainingError:
            log.debug("learning of %s ends with the runtime", self.adapter)
        except* Exception:  # the boundary: a learner that fails must not stop the serving
            log.exception("learning of %s has stopped; serving goes on", self.adapter)
            self._phase = "stopped"
        finally:
            if self._phase != "stopped":
                self._phase = "idle"

    async def _compute_references(self) -> None:
        """Give every sample that comes in its reference log-probabilities."""
        seen = -1
        while True:
            seen = await self._store.wait_change(seen)
            try:
                while pending := await self._store.pending(self.adapter, REFERENCE_BATCH):
                    await self._reference(pending)
                    self._states = dict(await self._store.states(self.adapter))
                self._states = dict(await self._store.states(self.adapter))
            except StorageError as error:  # what is missing is tried again at the next change
                log.error("feedback for %s waits for the disk: %s", self.adapter, error)

    async def _reference(self, samples: Sequence[Sample]) -> None:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._score(sample)) for sample in samples]
        found: list[tuple[int, float, float | None]] = []
        for sample, task in zip(samples, tasks, strict=True):
            logps = task.result()
            if isinstance(logps, str):
                await self._store.refuse_sample(sample.key, logps)
            else:
                found.append((sample.key, logps[0], logps[1] if len(logps) > 1 else None))
        if found:
            await self._store.set_reference(found)

    async def _score(self, sample: Sample) -> tuple[float, ...] | str:
        """Its reference log-probabilities, or why there are none."""
        for is_last in (False, True):
            try:
                logps = await self._examiner.reference(sample)
            except DrainingError:
                raise
            except CotuneError as error:
                if isinstance(error, IterationError) and not is_last:
                    continue  # another request of that iteration may have been the reason
                log.warning("sample %d cannot be used: %s", sample.key, error)
                return error.code or "unscorable"
            else:
                return logps if all(math.isfinite(logp) for logp in logps) else "not_finite"
        raise AssertionError("the last try returns")

    async def _train(self) -> None:
        """Train, make candidates, publish."""
        await self._refresh()
        await self._resume()
        try:
            while True:
                if self.publisher.changes != self._changes:
                    await self._start_from_live()
                if self._is_wanted:
                    await self._set_down()
                try:
                    await self._go_on()
                except _MemoryWantedError:
                    self._is_wanted = True
        finally:
            if not self._is_behind:
                await self._save()

    async def _go_on(self) -> None:
        """A step or an examination, or wait for what makes one possible."""
        if self._down is not None and (self._may_train() or self._is_candidate_due()):
            await self._take_up(self._down)
            return
        if self._may_train():
            self._phase = "training"
            await self._step()
            if self._clock() - self._refreshed_s >= REFRESH_INTERVAL_S:
                await self._refresh()
        if self._is_candidate_due():
            await self._examine()
        elif not self._may_train():
            self._phase = "idle"
            await self._unless_wanted(Stake.NOTHING, self._wait_for_feedback())

    async def _wait_for_feedback(self) -> None:
        """Until the store has changed, or something else has waited long enough."""
        now_s = self._clock()
        waits_s = [math.inf]
        if self._incomplete_since is not None:
            waits_s.append(self._config.training.batch_wait_s - (now_s - self._incomplete_since))
        if self._steps_since and self._is_examinable:
            waits_s.append(self._config.gate.candidate_wait_s - (now_s - self._untested_since_s))
        patience_s = max(0.0, min(waits_s))
        try:
            async with asyncio.timeout(None if patience_s == math.inf else patience_s):
                await self._store.wait_change(self._seen)
        except TimeoutError:
            return
        await self._refresh()

    async def _refresh(self) -> None:
        """See what is in the store now."""
        self._refreshed_s = self._clock()
        seen = self._store.changes
        if seen == self._seen:
            return
        self._seen = seen  # also if it fails: it is tried again at the next change, not at once
        config = self._config
        name = self.adapter
        try:
            samples = await self._store.samples(
                name, held_out=False, limit=config.training.buffer_size
            )
            held_out = await self._store.samples(
                name, held_out=True, limit=config.training.buffer_size
            )
        except StorageError as error:
            log.error("new feedback for %s cannot be read: %s", name, error)
            return
        self._buffer.update(samples)
        self._held_out = choose_evidence(held_out, config.gate.max_held_out)

    def _may_train(self) -> bool:
        """Whether a batch is there, or part of one that has waited long enough."""
        buffer, training = self._buffer, self._config.training
        if self._wait_beyond is not None:
            fresh = buffer.newer_than(self._wait_beyond)
            if fresh < training.batch_size:
                return False
            self._wait_beyond = None
        if not buffer.owed_samples:
            self._incomplete_since = None
            return False
        if buffer.owed_samples >= training.batch_size or self._steps_since:
            self._incomplete_since = None
            return True
        now_s = self._clock()
        if self._incomplete_since is None:
            self._incomplete_since = now_s
        return now_s - self._incomplete_since >= training.batch_wait_s

    @property
    def _is_examinable(self) -> bool:
        return len(self._held_out) >= self._config.gate.min_held_out

    def _is_candidate_due(self) -> bool:
        """After enough steps, or after a while when there is nothing more to train on."""
        gate = self._config.gate
        if not self._steps_since or not self._is_examinable:
            return False
        if self._steps_since >= gate.candidate_steps:
            return True
        is_late = self._clock() - self._untested_since_s >= gate.candidate_wait_s
        return is_late and not self._buffer.owed_samples

    # -- training --------------------------------------------------------------------------------

    async def _step(self) -> None:
        """One optimizer step, quantum by quantum, each when the scheduler starts it."""
        trainer = await self._ready_trainer()
        before = self._buffer.state()
        outlook = self._buffer.outlook()
        batch = self._buffer.next_batch()
        report: StepReport | None = None
        is_done = False
        try:
            await self._job("begin", trainer.begin, batch)
            is_begun = False
            while trainer.next_quantum() is not None:
                report = await self._unless_wanted(
                    Stake.BATCH,
                    self._desk.run(self._desk_key, trainer, outlook, is_begun=is_begun),
                )
                is_begun = True
            is_done = True
        finally:
            if not is_done:
                self._buffer.restore(before)
                try:
                    await self._job("abandon", trainer.abandon)
                except LaneClosedError:  # its thread is gone, so this one may
                    trainer.abandon()
                    raise
        assert report is not None
        await self._refuse_unfit(report)
        if report.skipped is not None:
            return
        self._buffer.note_losses(report.sample_losses)
        self._note_progress(report)
        self._report = report
        self._steps += 1
        if not self._steps_since:
            self._untested_since_s = self._clock()
        self._steps_since += 1
        self._tokens += report.tokens
        if self._steps % self._config.training.checkpoint_steps == 0:
            await self._save()

    def _note_progress(self, report: StepReport) -> None:
        """Keep what was made of samples before anything of their prompts was trained on."""
        if self._config.gate.progressive:
            new = self._buffer.last_new
            self._progressive |= {key: logps for key, logps in report.sample_logps if key in new}

    async def _refuse_unfit(self, report: StepReport) -> None:
        """Take samples out that cannot be trained on.

        One that did not fit into memory gets a second try: others may have had the memory then.
        """
        unfit = dict(report.set_aside) | dict.fromkeys(report.not_finite, "not_finite")
        for key, reason in unfit.items():
            if reason == "out_of_memory" and key not in self._too_large:
                self._too_large.add(key)
                continue
            try:
                await self._store.refuse_sample(key, reason)
            except StorageError as error:  # it will be set aside again
                log.error("sample %d is not marked as %s: %s", key, reason, error)

    async def _job(self, kind: str, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run something that is no quantum on the training lane."""
        return await self._desk.job(self._desk_key, kind, fn, *args)

    async def _ready_trainer(self) -> Trainer:
        if self._trainer is None:
            self._trainer = await self._job("make", self._make_trainer)
            await self._start_from_live()
        return self._trainer

    async def _start_from_live(self) -> None:
        """Training goes on from the live version, with a fresh optimizer."""
        self._changes = self.publisher.changes
        await self._note_live()
        self._steps_since = 0
        self._undecided = 0
        if self._trainer is None:
            return
        live = self.publisher.live
        if live == BASE:
            await self._job("reset", self._trainer.reset)
            await self._job("anchor", self._trainer.clear_anchor)
        else:
            path = await asyncio.to_thread(self._versions.path, self.adapter, live.version)
            await self._job("load", self._trainer.load_adapter, path)
            await self._job("anchor", self._trainer.set_anchor)
        await self._take_good()

    async def _take_good(self) -> None:
        """The state of now is what training goes back to."""
        assert self._trainer is not None
        snapshot = await self._job("snapshot", self._trainer.snapshot)
        self._good = _Good(snapshot, self._buffer.state())
        self._progressive = {}

    # -- candidates ------------------------------------------------------------------------------

    async def _examine(self) -> None:
        """Make a candidate of what was trained, judge it, and act on it.

        Where the device or the disk fails at that, the candidate is dropped, and training goes on.
        """
        self._phase = "evaluating"
        try:
            await self._judge_candidate()
        except* (IterationError, StorageError) as failures:
            self._steps_since = 0
            self._refused["failed"] += 1
            self._last_verdict = f"a candidate was dropped: {failures.exceptions[0]}"
            log.error("%s: %s", self.adapter, self._last_verdict)

    async def _judge_candidate(self) -> None:
        trainer, publisher = self._trainer, self.publisher
        assert trainer is not None
        changes = publisher.changes
        samples = self._evidence()
        progressive = self._progressive
        number = max(
            await asyncio.to_thread(self._versions.next_number, self.adapter), self._last_number + 1
        )
        self._last_number = number
        weights = await self._job("weights", trainer.weights)
        path = self._versions.directory(self.adapter, number, refused=False)
        candidate = self._adapters.add(self.adapter, weights, path, number=number, make_live=False)
        try:
            live = publisher.live
            evaluation = await self._ask(self._examiner.evaluate(candidate, samples, progressive))
            verdict = judge(
                evaluation,
                await self._ask(self._examiner.evaluate(live, samples)),
                await self._ask(self._examiner.probe(BASE)),
                self._config.gate,
                self._config.training.beta,
                progressive=progressive.keys(),
            )
            self._steps_since = 0
            goes_on = verdict.is_undecided and self._undecided < self._config.gate.patience
            if verdict.is_undecided and not goes_on:
                verdict = replace(
                    verdict,
                    explanation=f"refused after {self._undecided} like it in a row: "
                    + verdict.explanation,
                )
            self._last_verdict = f"{candidate}: {verdict.explanation}"
            log.info("%s", self._last_verdict)
            if verdict.passed:
                await self._publish(trainer, candidate, verdict, changes)
            elif goes_on:
                self._undecided += 1
                self._undecided_reasons[one_reason(verdict.reasons)] += 1
            else:
                await self._refuse(trainer, candidate, verdict)
        finally:
            self._adapters.unpin(candidate)
        await self._save()

    def _evidence(self) -> tuple[Sample, ...]:
        """What a candidate is compared on, oldest first: held out, or asked in time."""
        known = self._progressive
        self._progressive = {key: known[key] for key in sorted(known) if key in self._buffer}
        new = choose_evidence(
            [self._buffer[key] for key in self._progressive], self._config.gate.max_held_out
        )
        return tuple(sorted([*self._held_out, *new], key=lambda sample: sample.key))

    async def _ask(self, questions: Awaitable[T]) -> T:
        """What the examiner finds, unless the trainer's memory is wanted before."""
        return await self._unless_wanted(Stake.EXAMINATION, questions)

    async def _publish(
        self,
        trainer: Trainer,
        candidate: AdapterVersion,
        verdict: Verdict,
        changes: int,
    ) -> None:
        self._phase = "publishing"
        await self._write(trainer, candidate, verdict, refused=False)
        if not await self.publisher.publish(candidate, verdict.explanation, changes=changes):
            log.info("%s is not published: another version went live meanwhile", candidate)
            return
        self._changes = self.publisher.changes
        self._passed += 1
        self._undecided = 0
        self._examiner.forget(keep=candidate)
        await self._note_live()
        await self._job("anchor", trainer.set_anchor)
        await self._take_good()
        await self._prune()

    async def _prune(self) -> None:
        """Remove old versions from the disk, but none that is still answering."""
        held = {
            info.version.version
            for info in self._adapters.list()
            if info.version.name == self.adapter
        }
        await asyncio.to_thread(
            self._versions.prune, self.adapter, self._config.gate.keep_versions, held
        )

    async def _refuse(self, trainer: Trainer, candidate: AdapterVersion, verdict: Verdict) -> None:
        await self._write(trainer, candidate, verdict, refused=True)
        self._refused[one_reason(verdict.reasons)] += 1
        self._undecided = 0
        self._wait_beyond = self._buffer.last_key
        assert self._good is not None
        await self._job("restore", trainer.restore, self._good.trainer)
        self._buffer.restore(self._good.buffer)
        self._progressive = {}
        await self._prune()

    async def _write(
        self, trainer: Trainer, candidate: AdapterVersion, verdict: Verdict, *, refused: bool
    ) -> None:
        """Put a candidate on disk, whole or not at all."""
        base_name, fingerprint = self._base
        manifest = Manifest(
            parent=self.publisher.live.version,
            created=datetime.now(UTC),
            metrics=verdict.metrics,
            reasons=verdict.reasons,
            explanation=verdict.explanation,
            lineage=Lineage(
                steps=self._steps,
                samples=len(self._buffer),
                tokens=self._tokens,
                last_sample_key=self._buffer.last_key,
                base_model=base_name,
                base_fingerprint=fingerprint,
            ),
        )

        def write() -> None:
            self._versions.write(
                self.adapter, candidate.version, trainer.save_adapter, manifest, refused=refused
            )

        await self._job("version", write)

    # -- giving memory up ------------------------------------------------------------------------

    @property
    def stake(self) -> Stake | None:
        """See `Holder`."""
        if self._trainer is None or self._scope is None or self._clock() < self._keeps_until_s:
            return None
        return self._stake

    def give_way(self) -> None:
        """See `Holder`."""
        assert self._scope is not None, "it has a stake"
        self._scope.reschedule(asyncio.get_running_loop().time())
        self._scope = None

    async def _unless_wanted(self, stake: Stake, work: Awaitable[T]) -> T:
        """Do this; where the trainer's memory is wanted meanwhile, drop it and raise.

        What waits for the desk is dropped before it has reached the lane: nobody asks for memory
        while a quantum runs.
        """
        scope = asyncio.timeout(None)
        try:
            async with scope:
                self._scope, self._stake = scope, stake
                try:
                    return await work
                finally:
                    self._scope = None
        except TimeoutError:
            if not scope.expired():
                raise
            raise _MemoryWantedError from None

    async def _set_down(self) -> None:
        """Write the training state to disk, and free what it takes in memory."""
        self._is_wanted = False
        self._seen = -1  # a refresh may have been dropped half way
        trainer, good = self._trainer, self._good
        assert trainer is not None
        assert good is not None
        if not await self._save():
            self._keeps_until_s = self._clock() + KEEP_S
            return
        self._held_bytes = trainer.held_bytes(good.trainer)
        self._trainer = self._good = None
        self._down = good.buffer
        del good
        await self._job("set down", trainer.close)
        self._set_downs += 1
        self._memory.set_down(self._desk_key, self._held_bytes)

    async def _take_up(self, good_buffer: dict[str, Any]) -> None:
        """When there is room again, go on as after a restart.

        Where that fails for want of memory, or the disk cannot be read, it is tried again later.
        """
        async with asyncio.TaskGroup() as group:
            freshener = group.create_task(self._stay_fresh())
            await self._memory.wait_room(self._desk_key)
            freshener.cancel()
        self._seen = -1
        await self._refresh()
        self._memory.take_up(self._desk_key)
        self._is_behind = True
        try:
            await self._resume()
            if self._trainer is None:  # the checkpoint was damaged since
                self._buffer.restore(good_buffer)
                await self._ready_trainer()
        except Exception as error:
            if not isinstance(error, StorageError) and not is_out_of_memory(error):
                raise
            log.error("training of %s cannot go on yet: %s", self.adapter, error)
            trainer, self._trainer, self._good = self._trainer, None, None
            if trainer is not None:
                await self._job("set down", trainer.close)
            self._memory.set_down(self._desk_key, self._held_bytes)
        else:
            self._down = None
            self._is_behind = False

    async def _stay_fresh(self) -> None:
        """Take in what comes to the store, for as long as nothing else does."""
        while True:
            await self._store.wait_change(self._seen)
            await self._refresh()

    # -- state across restarts -------------------------------------------------------------------

    async def _save(self) -> bool:
        """Write the training state to disk; whether it is there now."""
        trainer = self._trainer
        if trainer is None:
            return True
        assert self._good is not None
        state: dict[str, Any] = {
            "live": self.publisher.live.version,
            "steps": self._steps,
            "steps_since": self._steps_since,
            "tokens": self._tokens,
            "passed": self._passed,
            "refused": dict(self._refused),
            "undecided": self._undecided,
            "undecided_by_reason": dict(self._undecided_reasons),
            "wait_beyond": self._wait_beyond,
            "progressive": {str(key): list(found) for key, found in self._progressive.items()},
            "last_number": self._last_number,
            "last_verdict": self._last_verdict,
            "buffer": self._buffer.state(),
            "good_buffer": self._good.buffer,
        }

        def save() -> None:
            tensors, state["trainer"] = trainer.state_dict()
            checkpoint.save(self._directory, tensors, state)

        try:
            await self._job("checkpoint", save)
        except StorageError as error:
            log.error(
                "the training state of %s is not saved: %s; training goes on, and a restart would "
                "take up the checkpoint before",
                self.adapter,
                error,
            )
            return False
        return True

    async def _resume(self) -> None:
        """Take up what the last checkpoint holds, unless another version went live since."""
        await self._note_live()
        saved = await asyncio.to_thread(checkpoint.load, self._directory)
        if saved is None:
            return
        tensors, state = saved
        self._steps = state["steps"]
        self._tokens = state["tokens"]
        self._passed = state["passed"]
        self._refused = Counter(state["refused"])
        # A checkpoint of before these were counted has none.
        self._undecided_reasons = Counter(state.get("undecided_by_reason", {}))
        self._last_number = state["last_number"]
        self._last_verdict = state["last_verdict"]
        self._buffer.restore(state["good_buffer"])
        trainer = await self._ready_trainer()
        if state["live"] != self.publisher.live.version:
            return
        try:
            await self._job("restore", trainer.load_state_dict, tensors, state["trainer"])
        except ConfigError as error:
            log.warning("training of %s begins again at the live version: %s", self.adapter, error)
            return
        self._buffer.restore(state["buffer"])
        self._steps_since = state["steps_since"]
        self._untested_since_s = self._clock()
        self._undecided = state["undecided"]
        self._wait_beyond = state["wait_beyond"]
        # Nor has one of before these were kept.
        self._progressive = {
            int(key): tuple(found) for key, found in state.get("progressive", {}).items()
        }

    # -- evidence --------------------------------------------------------------------------------

    async def _note_live(self) -> None:
        """Look up what there is to tell of the live version."""
        number = self.publisher.live.version
        self._live_record, self._live_since = await asyncio.to_thread(self._look_up, number)

    def _look_up(self, number: int) -> tuple[VersionRecord | None, datetime | None]:
        if number == 0:
            return None, None
        history = self._versions.history(self.adapter)
        return self._versions.record(self.adapter, number), history[-1].at

    def status(self) -> AdapterLearning:
        """How it stands; no I/O."""
        states = dict(self._states)
        ready = states.pop("ready", 0)
        queued = min(ready, self._buffer.untouched)
        report = self._report
        metrics = self._live_record.metrics if self._live_record is not None else {}
        now = datetime.now(UTC)
        is_down = self._down is not None and self._phase != "stopped"
        return AdapterLearning(
            adapter=self.adapter,
            live_version=self.publisher.live.version,
            live_since=self._live_since,
            live_age_s=(now - self._live_since).total_seconds() if self._live_since else 0.0,
            phase="set_down" if is_down else self._phase,
            pairs={**states, "queued": queued, "trained": ready - queued},
            steps=self._steps,
            tokens_trained=self._tokens,
            loss=report.loss if report else None,
            margin=report.margin if report else None,
            reward_accuracy=report.reward_accuracy if report else None,
            gradient_norm=report.gradient_norm if report else None,
            learning_rate=report.learning_rate if report else None,
            candidates_passed=self._passed,
            candidates_refused=dict(self._refused),
            candidates_undecided=dict(self._undecided_reasons),
            win_rate=metrics.get("raw_win_rate"),
            base_win_rate=metrics.get("base_raw_win_rate"),
            last_verdict=self._last_verdict,
            set_downs=self._set_downs,
        )
