"""The learner's decisions: when it trains, makes candidates, publishes, goes back and goes on.

Its trainer and examiner are fakes that count and obey; replay, versions, adapters and checkpoints
are the real ones. Verdicts are scripted.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from cotune.cache.manager import KVCacheManager
from cotune.runtime.adapters import AdapterStore
from cotune.runtime.errors import DrainingError, IterationError, StorageError
from cotune.runtime.learning import checkpoint
from cotune.runtime.learning import learner as module
from cotune.runtime.learning.config import GateConfig, LearningConfig, TrainingConfig
from cotune.runtime.learning.gate import Evaluation, ProbeScore, Reason, Verdict
from cotune.runtime.learning.learner import Learner
from cotune.runtime.learning.publisher import Publisher
from cotune.runtime.learning.samples import PreferencePair
from cotune.runtime.learning.state_directory import CHECKPOINT_FILE
from cotune.runtime.learning.versions import VersionStore
from cotune.runtime.lora import LoraPair, LoraWeights
from cotune.runtime.scheduling.memory_watch import COME_BACK_S, Stake, TrainerMemory
from cotune.runtime.training.trainer import Quantum, StepReport, TrainerState
from engine_fakes import InlineLane

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from cotune.runtime.learning.samples import Sample
    from cotune.runtime.scheduling.desk import Outlook

NAME = "main"
HELD = 1000
"""Bytes that a trainer holds, besides a byte for each tensor of a snapshot."""
PASSED = Verdict(passed=True, reasons=(), explanation="passed", metrics={"raw_win_rate": 0.9})
REFUSED = Verdict(passed=False, reasons=("probe_loss",), explanation="refused: it forgot")
UNDECIDED = Verdict(passed=False, reasons=("not_better",), explanation="not yet", is_undecided=True)


def pair(key: int, *, ready: bool = True) -> PreferencePair:
    logp = -1.0 if ready else None
    return PreferencePair(
        key=key,
        adapter=NAME,
        source=f"s{key % 4}",
        prompt_ids=(key, 1),
        chosen_ids=(2,),
        rejected_ids=(3,),
        ref_chosen_logp=logp,
        ref_rejected_logp=logp,
    )


class FakeStore:
    """Samples in memory, with the store's own way of telling about changes."""

    def __init__(self) -> None:
        self.training: dict[int, Sample] = {}
        self.held_out: dict[int, Sample] = {}
        self.unscored: dict[int, Sample] = {}
        self.refused: dict[int, str] = {}
        self.failures: deque[Exception] = deque()
        self.read_failures: deque[Exception] = deque()
        self.reads = 0
        self.may_read = asyncio.Event()
        self.may_read.set()
        self.changes = 0
        self._changed = asyncio.Event()

    def change(self) -> None:
        self.changes += 1
        self._changed.set()
        self._changed = asyncio.Event()

    def add(self, count: int, *, held_out: int = 0) -> None:
        start = len(self.training) + len(self.held_out) + len(self.unscored)
        for key in range(start + 1, start + count + 1):
            self.training[key] = pair(key)
        for key in range(start + count + 1, start + count + held_out + 1):
            self.held_out[key] = pair(key)
        self.change()

    async def wait_change(self, seen: int) -> int:
        while self.changes == seen:
            await self._changed.wait()
        return self.changes

    async def pending(self, _adapter: str, limit: int) -> tuple[Sample, ...]:
        return tuple(self.unscored.values())[:limit]

    async def set_reference(self, values: Sequence[tuple[int, float, float | None]]) -> None:
        if self.failures:
            raise self.failures.popleft()
        for key, first, second in values:
            sample = self.unscored.pop(key)
            assert isinstance(sample, PreferencePair)
            self.training[key] = replace(sample, ref_chosen_logp=first, ref_rejected_logp=second)
        self.change()

    async def refuse_sample(self, key: int, reason: str) -> None:
        self.refused[key] = reason
        for samples in (self.training, self.held_out, self.unscored):
            samples.pop(key, None)
        self.change()

    async def samples(self, _adapter: str, *, held_out: bool, limit: int) -> tuple[Sample, ...]:
        self.reads += 1
        await self.may_read.wait()
        if self.read_failures:
            raise self.read_failures.popleft()
        return tuple((self.held_out if held_out else self.training).values())[-limit:]

    async def states(self, _adapter: str) -> dict[str, int]:
        return {"ready": len(self.training), "held_out": len(self.held_out)}


class FakeExaminer:
    """Everything scores the same; the verdicts are scripted."""

    def __init__(self) -> None:
        self.evaluated: list[str] = []
        self.asked: list[tuple[str, tuple[int, ...], dict[int, tuple[float, ...]]]] = []
        self.failures: deque[Exception] = deque()
        self.unscorable: dict[int, list[Exception]] = {}
        self.before_answer: Any = None

    async def evaluate(
        self,
        version: Any,
        samples: Sequence[Sample],
        answers: dict[int, tuple[float, ...]] | None = None,
    ) -> Evaluation:
        self.evaluated.append(str(version))
        keys = tuple(sample.key for sample in samples)
        self.asked.append((str(version), keys, dict(answers or {})))
        if self.failures:
            raise self.failures.popleft()
        if self.before_answer is not None:
            await self.before_answer()
        return Evaluation(probe=ProbeScore(nll=1.0, entropy=1.0, repetition=0.0))

    async def probe(self, _version: Any) -> ProbeScore:
        return ProbeScore(nll=1.0, entropy=1.0, repetition=0.0)

    async def reference(self, sample: Sample) -> tuple[float, ...]:
        if failures := self.unscorable.get(sample.key):
            raise failures.pop()
        return (-float(sample.key), -2.0)

    def forget(self, *, keep: Any) -> None:
        pass


class FakeTrainer:
    """Weights that are the number of steps since they were new."""

    def __init__(self, before: FakeTrainer | None = None) -> None:
        self.value = 0.0
        self.batches: list[list[int]] = before.batches if before else []
        self.anchors: list[float | None] = []
        self.is_closed = False
        self._batch: Sequence[Sample] | None = None
        self.set_aside: tuple[tuple[int, str], ...] = ()

    def begin(self, batch: Sequence[Sample]) -> None:
        assert self._batch is None
        self._batch = batch

    def next_quantum(self, max_tokens: int = 0) -> Quantum | None:
        return None if self._batch is None else Quantum(kind="step", samples=1, tokens=1)

    def run_quantum(self, max_tokens: int = 0) -> StepReport:
        assert self._batch is not None
        self.batches.append([sample.key for sample in self._batch])
        logps = tuple((sample.key, (self.value, -1.0)) for sample in self._batch)
        self._batch = None
        self.value += 1.0
        set_aside, self.set_aside = self.set_aside, ()
        return StepReport(
            step=len(self.batches),
            loss=0.5,
            margin=0.1,
            reward_accuracy=0.6,
            chosen_reward=0.1,
            rejected_reward=0.0,
            gradient_norm=1.0,
            learning_rate=1e-3,
            tokens=10,
            samples=len(self.batches[-1]),
            halvings=0,
            set_aside=set_aside,
            kl=None,
            sample_logps=logps,
        )

    def abandon(self) -> None:
        self._batch = None

    def held_bytes(self, *states: TrainerState) -> int:
        return HELD + sum(len(state.tensors) for state in states)

    def close(self) -> None:
        assert self._batch is None
        self.is_closed = True

    def snapshot(self) -> TrainerState:
        assert not self.is_closed
        return TrainerState({"value": torch.tensor(self.value)}, {})

    def restore(self, state: TrainerState) -> None:
        self.value = float(state.tensors["value"])

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        assert not self.is_closed
        return {"value": torch.tensor(self.value)}, {"kind": "fake"}

    def load_state_dict(self, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        assert values == {"kind": "fake"}
        self.value = float(tensors["value"])

    def reset(self) -> None:
        self.value = 0.0

    def load_adapter(self, path: Path) -> None:
        self.value = float((path / "value").read_text())

    def save_adapter(self, path: Path) -> None:
        (path / "value").write_text(str(self.value))
        (path / "adapter_config.json").write_text("{}")
        save_file({"value": torch.tensor([self.value])}, path / "adapter_model.safetensors")

    def weights(self) -> LoraWeights:
        matrix = torch.full((1, 1), self.value)
        return LoraWeights(1, {"linear": LoraPair(matrix, matrix)})

    def set_anchor(self) -> None:
        self.anchors.append(self.value)

    def clear_anchor(self) -> None:
        self.anchors.append(None)


class _OpenDesk:
    """Every quantum runs at once, while nobody closes it, and so do jobs but the one `stuck`."""

    def __init__(self) -> None:
        self.lane = InlineLane()
        self.jobs: list[str] = []
        self.stuck: str | None = None
        self.is_open = asyncio.Event()
        self.is_open.set()

    def enroll(self, _name: str) -> int:
        return 0

    async def run(
        self, _key: int, trainer: FakeTrainer, _outlook: Outlook, *, is_begun: bool
    ) -> StepReport:
        await self.is_open.wait()
        return trainer.run_quantum()

    async def job(self, _key: int, kind: str, fn: Any, *args: Any) -> Any:
        self.jobs.append(kind)
        if kind == self.stuck:
            await asyncio.Event().wait()
        return await self.lane.run(fn, *args)


class _NoBackground:
    async def prefill(self, *_args: Any) -> None:
        raise AssertionError("nothing is warmed here")


@dataclass
class School:
    """A learner among fakes."""

    root: Path
    clock_s: float = 0.0
    config: LearningConfig = field(
        default_factory=lambda: LearningConfig(
            enabled=True,
            training=TrainingConfig(
                batch_size=4, epochs=1, replay_share=0.0, batch_wait_s=5.0, checkpoint_steps=1
            ),
            gate=GateConfig(candidate_steps=2, min_held_out=1, candidate_wait_s=10.0),
            warm_prefixes=False,
        )
    )

    def __post_init__(self) -> None:
        self.store = FakeStore()
        self.examiner = FakeExaminer()
        self.trainer = FakeTrainer()
        self.verdicts: deque[Verdict] = deque()
        self.cache = KVCacheManager(8, 4)
        self.adapters = AdapterStore(4, learned_names=(NAME,), on_retired=self.cache.drop_namespace)
        self.versions = VersionStore(self.root / "adapters")
        self.desk = _OpenDesk()
        self.marks: list[tuple[str, str]] = []
        self.memory = TrainerMemory(
            lambda: self.clock_s, lambda name, told: self.marks.append((name, told))
        )
        self.makes: deque[Exception | None] = deque()
        self.learner = self._make_learner()

    def make_trainer(self) -> FakeTrainer:
        if self.makes and (failure := self.makes.popleft()) is not None:
            raise failure
        if self.trainer.is_closed:
            self.trainer = FakeTrainer(self.trainer)
        return self.trainer

    def _make_learner(self) -> Learner:
        publisher = Publisher(
            NAME,
            versions=self.versions,
            adapters=self.adapters,
            cache=self.cache,
            background=_NoBackground(),  # type: ignore[arg-type]
            read=lambda path: LoraWeights(1, {}),
            warm=False,
        )
        return Learner(
            NAME,
            config=self.config,
            store=self.store,  # type: ignore[arg-type]
            examiner=self.examiner,  # type: ignore[arg-type]
            publisher=publisher,
            versions=self.versions,
            adapters=self.adapters,
            desk=self.desk,  # type: ignore[arg-type]
            memory=self.memory,
            make_trainer=self.make_trainer,  # type: ignore[arg-type]
            directory=self.root / "training",
            base=("base", "f00"),
            clock=lambda: self.clock_s,
        )

    def judge(self, *_args: Any, progressive: Any) -> Verdict:
        assert set(progressive) <= set(self.store.training)
        return self.verdicts.popleft()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Learner]:
        await self.learner.publisher.start()
        task = asyncio.ensure_future(self.learner.run())
        try:
            yield self.learner
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self.versions.close()

    async def until(self, condition: Any) -> None:
        """Let the learner go on until something holds."""
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110 - of fakes, which have no events for all of it
                await asyncio.sleep(0)

    async def idle(self) -> None:
        """Until it waits for feedback and will not go on by itself."""
        await self.until(lambda: self.learner._phase == "idle" and self.learner._seen >= 0)
        for _ in range(50):
            await asyncio.sleep(0.001)
        await self.until(lambda: self.learner._phase == "idle")


@pytest.fixture
def school(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> School:
    made = School(tmp_path)
    monkeypatch.setattr(module, "judge", made.judge)
    return made


async def test_a_candidate_that_passes_goes_live_and_is_what_training_goes_back_to(
    school: School,
) -> None:
    school.verdicts += [PASSED, REFUSED]
    async with school.running() as learner:
        school.store.add(8, held_out=2)
        await school.until(lambda: learner.publisher.live.version == 1)
        assert school.trainer.value == 2.0
        school.store.add(8)
        await school.until(lambda: learner.status().candidates_refused)
        await school.idle()
    assert len(school.trainer.batches) == 4
    assert school.trainer.value == 2.0, "training went back to the state that was published"
    assert school.versions.live(NAME) == 1
    states = {record.number: record.state for record in school.versions.records(NAME)}
    assert states == {1: "published", 2: "refused"}
    assert learner.status().candidates_passed == 1
    assert learner.status().candidates_refused == {"probe_loss": 1}
    assert learner.status().win_rate == 0.9


async def test_a_candidate_counts_once_however_many_reasons_there_are(school: School) -> None:
    both: tuple[Reason, ...] = ("too_few_held_out", "not_better")
    school.verdicts += [replace(UNDECIDED, reasons=both), replace(REFUSED, reasons=both)]
    async with school.running() as learner:
        school.store.add(16, held_out=2)
        await school.until(lambda: learner.status().candidates_refused)
    assert learner.status().candidates_undecided == {"not_better+too_few_held_out": 1}
    assert learner.status().candidates_refused == {"not_better+too_few_held_out": 1}


async def test_old_refused_versions_go_when_others_are_refused(school: School) -> None:
    school.config = replace(school.config, gate=replace(school.config.gate, keep_versions=1))
    school.learner = school._make_learner()
    school.verdicts += [REFUSED, REFUSED, REFUSED]
    async with school.running() as learner:
        for refusals in (1, 2, 3):
            school.store.add(8, held_out=2)
            await school.until(
                lambda n=refusals: learner.status().candidates_refused == {"probe_loss": n}
            )
            await school.idle()
    # The last one was still in its slot, and so counts apart.
    assert [record.number for record in school.versions.records(NAME)] == [2, 3]


async def test_after_a_refusal_nothing_is_tried_again_before_new_feedback_comes(
    school: School,
) -> None:
    school.verdicts += [REFUSED, PASSED]
    async with school.running() as learner:
        school.store.add(8, held_out=2)
        await school.until(lambda: learner.status().candidates_refused)
        await school.idle()
        assert len(school.trainer.batches) == 2
        school.store.add(3)  # less than a batch
        await school.idle()
        assert len(school.trainer.batches) == 2
        school.store.add(1)
        await school.until(lambda: learner.publisher.live.version == 2)
    # What the refused candidate had learned from is trained on again.
    again = {key for batch in school.trainer.batches[2:] for key in batch}
    assert len(again & set(range(1, 9))) >= 4


async def test_an_undecided_candidate_is_trained_further_and_not_written(school: School) -> None:
    school.verdicts += [UNDECIDED, PASSED]
    async with school.running() as learner:
        school.store.add(16, held_out=2)
        await school.until(lambda: learner.publisher.live.version)
    assert school.trainer.value == 4.0
    assert [record.number for record in school.versions.records(NAME)] == [2]
    assert learner.status().candidates_refused == {}
    assert learner.status().candidates_undecided == {"not_better": 1}


def with_patience(school: School, patience: int) -> None:
    school.config = replace(school.config, gate=replace(school.config.gate, patience=patience))
    school.learner = school._make_learner()


@pytest.mark.parametrize("patience", [0, 1, 3])
async def test_when_patience_runs_out_the_next_undecided_candidate_is_refused(
    school: School, patience: int
) -> None:
    with_patience(school, patience)
    school.verdicts += [UNDECIDED] * (patience + 1)
    async with school.running() as learner:
        school.store.add(8 * (patience + 1), held_out=2)
        await school.until(lambda: learner.status().candidates_refused)
        await school.idle()
    status = learner.status()
    assert status.candidates_refused == {"not_better": 1}
    assert status.candidates_undecided == ({"not_better": patience} if patience else {})
    assert school.trainer.value == 0.0, "training went back to the last good state"
    (kept,) = school.versions.records(NAME)
    assert (kept.number, kept.state) == (patience + 1, "refused")
    assert kept.explanation == f"refused after {patience} like it in a row: not yet"
    assert status.last_verdict == f"{NAME}@{kept.number}: {kept.explanation}"


@pytest.mark.parametrize("between", [PASSED, REFUSED])
async def test_only_undecided_candidates_in_a_row_use_patience_up(
    school: School, between: Verdict
) -> None:
    with_patience(school, 2)
    school.verdicts += [UNDECIDED, UNDECIDED, between, UNDECIDED, UNDECIDED]
    async with school.running() as learner:
        school.store.add(80, held_out=2)
        await school.until(lambda: len(school.examiner.evaluated) >= 6)
        school.store.add(8)  # after a refusal nothing is tried again before there is more
        await school.until(lambda: not school.verdicts)
        before = learner.status()
    assert before.candidates_undecided == {"not_better": 4}
    assert sum(before.candidates_refused.values()) == (between is REFUSED)


async def test_undecided_candidates_are_counted_across_a_restart_in_between(
    school: School,
) -> None:
    """Two before it, one after: the fourth in a row is one too many for a patience of three."""
    with_patience(school, 3)
    school.verdicts += [UNDECIDED, UNDECIDED]
    async with school.running():
        school.store.add(16, held_out=2)
        await school.until(lambda: not school.verdicts)
        await school.idle()
    again = School(school.root)
    again.store = school.store
    with_patience(again, 3)
    school.verdicts = again.verdicts  # what `judge` takes from
    again.verdicts += [UNDECIDED, UNDECIDED]
    async with again.running() as restarted:
        await again.idle()
        assert again.trainer.value == 4.0, "training goes on from what was left undecided"
        assert restarted.status().candidates_undecided == {"not_better": 2}
        again.store.add(8)
        await again.until(lambda: len(again.verdicts) == 1)
        await again.idle()
        assert again.trainer.value == 6.0
        assert restarted.status().candidates_undecided == {"not_better": 3}
        again.store.add(8)
        await again.until(lambda: restarted.status().candidates_refused)
        await again.idle()
    assert again.trainer.value == 0.0, "back at the live version, which is the base model"
    assert restarted.status().candidates_refused == {"not_better": 1}
    assert [record.state for record in again.versions.records(NAME)] == ["refused"]


async def test_a_checkpoint_of_before_undecided_candidates_were_counted_is_taken_up(
    school: School,
) -> None:
    school.verdicts += [UNDECIDED]
    async with school.running():
        school.store.add(8, held_out=2)
        await school.until(lambda: not school.verdicts)
        await school.idle()
    directory = school.root / "training"
    saved = checkpoint.load(directory)
    assert saved is not None
    assert saved.state.pop("undecided_by_reason") == {"not_better": 1}
    checkpoint.save(directory, saved.tensors, saved.state)
    again = School(school.root)
    again.store = school.store
    async with again.running() as restarted:
        await again.idle()
        assert again.trainer.value == 2.0
        assert restarted.status().candidates_undecided == {}


async def test_candidates_are_judged_by_new_feedback_as_it_was_before_it_was_trained_on(
    school: School,
) -> None:
    school.verdicts += [UNDECIDED, PASSED, REFUSED]
    async with school.running() as learner:
        school.store.add(16, held_out=2)
        await school.until(lambda: learner.publisher.live.version == 2)
        school.store.add(8)
        await school.until(lambda: learner.status().candidates_refused)
    first, second, third = (
        entry for entry in school.examiner.asked if not entry[0].endswith("@0") and entry[2]
    )
    # Two steps of four: of what the weights made of each batch before its own step.
    batches = school.trainer.batches
    by_step = {key: float(step) for step, batch in enumerate(batches) for key in batch}
    held_out = (17, 18)
    for (_, keys, answers), steps in ((first, (0, 1)), (second, (0, 1, 2, 3)), (third, (4, 5))):
        new = {key for key, step in by_step.items() if step in steps}
        assert set(keys) == new | set(held_out)
        assert list(keys) == sorted(keys), "oldest first"
        assert answers == {key: (by_step[key], -1.0) for key in new}
    # The live version is asked about the same samples, and told nothing.
    assert [entry[1] for entry in school.examiner.asked if not entry[2]] == [
        entry[1] for entry in (first, second, third)
    ]


async def test_after_a_refusal_the_same_feedback_is_new_again(school: School) -> None:
    school.verdicts += [REFUSED, PASSED]
    async with school.running() as learner:
        school.store.add(8, held_out=2)
        await school.until(lambda: learner.status().candidates_refused)
        school.store.add(4)
        await school.until(lambda: learner.publisher.live.version == 2)
    _, (_, _, answers) = (entry for entry in school.examiner.asked if entry[2])
    assert {value for value, _ in answers.values()} == {0.0, 1.0}, "of the weights gone back to"


async def test_new_feedback_that_was_withdrawn_judges_nobody(school: School) -> None:
    school.verdicts += [UNDECIDED, PASSED]
    async with school.running() as learner:
        school.store.add(8, held_out=2)
        await school.until(lambda: learner.status().candidates_undecided)
        gone = school.trainer.batches[0][0]
        del school.store.training[gone]
        school.store.add(8)
        await school.until(lambda: learner.publisher.live.version)
    *_, (_, keys, _) = school.examiner.asked
    assert gone not in keys
    assert set(school.trainer.batches[0]) - {gone} < set(keys)


async def test_by_held_out_feedback_alone_if_so_configured(school: School) -> None:
    school.config = replace(school.config, gate=replace(school.config.gate, progressive=False))
    school.learner = school._make_learner()
    school.verdicts += [PASSED]
    async with school.running() as learner:
        school.store.add(8, held_out=2)
        await school.until(lambda: learner.publisher.live.version)
    assert [entry[1:] for entry in school.examiner.asked] == [((9, 10), {})] * 2


async def test_what_was_made_of_new_feedback_outlasts_a_restart(school: School) -> None:
    school.verdicts += [UNDECIDED]
    async with school.running() as learner:
        school.store.add(8, held_out=2)
        await school.until(lambda: learner.status().candidates_undecided)
        await school.idle()
    again = School(school.root)
    again.store = school.store
    again.learner = again._make_learner()
    school.verdicts += [PASSED]
    async with again.running() as restarted:
        again.store.add(8)
        await again.until(lambda: restarted.publisher.live.version)
    (_, keys, answers), _ = again.examiner.asked
    assert set(range(1, 9)) < set(answers)
    assert set(answers) | {9, 10} == set(keys)


async def test_too_little_held_out_feedback_makes_no_candidate(school: School) -> None:
    async with school.running() as learner:
        school.store.add(16)
        await school.until(lambda: len(school.trainer.batches) == 4)
        await school.idle()
    assert school.examiner.evaluated == []
    assert learner.publisher.live.version == 0


async def test_part_of_a_batch_waits_for_more_and_is_then_trained_on(school: School) -> None:
    school.config = replace(
        school.config, training=replace(school.config.training, batch_wait_s=0.02)
    )
    school.learner = school._make_learner()
    async with school.running():
        school.store.add(3)
        await school.idle()
        assert school.trainer.batches == []
        school.clock_s += 0.03
        await school.until(lambda: school.trainer.batches)
    assert sorted(school.trainer.batches[0]) == [1, 2, 3]


async def test_what_trickles_in_is_examined_after_a_while(school: School) -> None:
    school.verdicts += [PASSED]
    school.config = replace(
        school.config, gate=replace(school.config.gate, candidate_steps=99, candidate_wait_s=0.02)
    )
    school.learner = school._make_learner()
    async with school.running() as learner:
        school.store.add(4, held_out=2)
        await school.until(lambda: len(school.trainer.batches) == 1)
        await school.idle()
        assert school.examiner.evaluated == []
        school.clock_s += 0.03
        await school.until(lambda: learner.publisher.live.version == 1)


async def test_a_promotion_during_an_examination_wins_over_the_candidate(school: School) -> None:
    school.verdicts += [PASSED, PASSED]
    async with school.running() as learner:
        school.store.add(8, held_out=2)
        await school.until(lambda: learner.publisher.live.version == 1)

        async def promote() -> None:
            school.examiner.before_answer = None
            await learner.publisher.promote(0, force=False)

        school.examiner.before_answer = promote
        school.store.add(8)
        await school.until(lambda: len(school.versions.records(NAME)) == 2)
        await school.idle()
        assert learner.publisher.live.version == 0
        assert school.versions.live(NAME) == 0
        assert school.trainer.value == 0.0, "training begins again at what is live"


async def test_a_device_that_fails_drops_the_candidate_and_training_goes_on(school: School) -> None:
    school.examiner.failures.append(IterationError("the device failed"))
    school.verdicts += [PASSED]
    async with school.running() as learner:
        school.store.add(8, held_out=2)
        await school.until(lambda: learner.status().candidates_refused)
        assert learner.status().candidates_refused == {"failed": 1}
        assert learner.publisher.live.version == 0
        school.store.add(8)
        await school.until(lambda: learner.publisher.live.version)
    assert [info.version.version for info in school.adapters.list()] == [2]


async def test_references_are_computed_for_what_comes_and_what_has_none_is_refused(
    school: School,
) -> None:
    async with school.running():
        school.store.unscored = {1: pair(1, ready=False), 2: pair(2, ready=False)}
        bad = IterationError("the logits are not finite", code="step_failed")
        school.examiner.unscorable = {1: [bad, bad], 2: [bad]}  # 2 met it in an iteration with 1
        school.store.change()
        await school.until(lambda: not school.store.unscored)
    assert school.store.refused == {1: "step_failed"}
    (sample,) = school.store.training.values()
    assert sample.is_ready


async def test_a_full_disk_delays_references_until_the_next_change(school: School) -> None:
    async with school.running() as learner:
        school.store.unscored = {1: pair(1, ready=False)}
        school.store.failures.append(StorageError("disk full"))
        school.store.change()
        await school.until(lambda: not school.store.failures)
        assert school.store.unscored
        school.store.change()
        await school.until(lambda: not school.store.unscored)
        assert learner.status().phase != "stopped"


async def test_a_disk_that_cannot_be_read_is_asked_again_at_the_next_change(school: School) -> None:
    async with school.running():
        await school.idle()
        before = school.store.reads
        school.store.read_failures += [StorageError("the disk fails")] * 100
        school.store.add(4)
        await school.idle()
        assert 1 <= school.store.reads - before < 5, "it does not ask over and over"
        school.store.read_failures.clear()
        school.store.change()
        await school.until(lambda: school.trainer.batches)


async def test_samples_that_cannot_be_trained_on_are_not_offered_again(school: School) -> None:
    school.trainer.set_aside = ((1, "too_long"), (2, "out_of_memory"))
    async with school.running():
        school.store.add(4)
        await school.until(lambda: school.store.refused)
        assert school.store.refused == {1: "too_long"}, "memory may be free the next time"
        school.trainer.set_aside = ((2, "out_of_memory"),)
        school.store.add(4)
        await school.until(lambda: len(school.store.refused) == 2)
    assert school.store.refused[2] == "out_of_memory"


async def test_the_end_of_the_runtime_is_no_failure_of_the_learner(school: School) -> None:
    school.examiner.failures.append(DrainingError("shutting down"))
    async with school.running() as learner:
        school.store.add(8, held_out=2)
        await school.until(lambda: not school.examiner.failures)
        await school.until(lambda: learner.status().phase == "idle")


async def test_a_learner_that_fails_says_so_and_raises_nothing(
    school: School, caplog: pytest.LogCaptureFixture
) -> None:
    school.examiner.failures.append(ValueError("a mistake of ours"))
    async with school.running() as learner:
        school.store.add(8, held_out=2)
        await school.until(lambda: learner.status().phase == "stopped")
    assert "serving goes on" in caplog.text


async def test_a_restart_goes_on_where_the_last_checkpoint_was(school: School) -> None:
    school.verdicts += [PASSED]
    async with school.running() as learner:
        school.store.add(12, held_out=2)  # three batches: a candidate, and one step beyond it
        await school.until(lambda: len(school.trainer.batches) == 3)
        await school.idle()
        before = learner.status()
    again = School(school.root)
    again.store = school.store
    again.learner = again._make_learner()
    async with again.running() as restarted:
        await again.idle()
        assert restarted.publisher.live.version == 1
        assert again.trainer.value == 3.0
        after = restarted.status()
        assert again.trainer.batches == [], "nothing is trained on twice"
    assert (after.steps, after.tokens_trained, after.candidates_passed) == (
        before.steps,
        before.tokens_trained,
        before.candidates_passed,
    )
    assert after.win_rate == 0.9


async def test_a_checkpoint_of_before_a_promotion_gives_way_to_the_live_version(
    school: School,
) -> None:
    school.verdicts += [PASSED]
    async with school.running():
        school.store.add(12, held_out=2)
        await school.until(lambda: len(school.trainer.batches) == 3)
        await school.idle()
    offline = VersionStore(school.root / "adapters")
    offline.set_live(NAME, 0, "by hand, while nothing ran")
    offline.close()
    again = School(school.root)
    again.store = school.store
    again.learner = again._make_learner()
    async with again.running() as restarted:
        await again.idle()
        assert restarted.publisher.live.version == 0
    # It began at the base model, with what the version that was live had not been trained on.
    assert again.trainer.anchors[0] is None
    assert again.trainer.value == len(again.trainer.batches) == 1.0


# -- memory --------------------------------------------------------------------------------------


@dataclass
class Shortage:
    """Memory of a school, as the test says: each look is half a second after the one before."""

    school: School

    def __post_init__(self) -> None:
        self.threshold = 10 * HELD

    def look(self, **changes: Any) -> None:
        self.school.clock_s += 0.5
        now: dict[str, Any] = {"is_serving_short": False, "needs": {}, "quiet_s": 99.0}
        self.school.memory.review(
            self.school.clock_s, **{**now, "threshold": self.threshold, **changes}
        )

    async def until(self, condition: Any) -> None:
        """Look again and again until something holds."""
        async with asyncio.timeout(20):
            while not condition():
                self.look()
                await asyncio.sleep(0)

    async def strike(self) -> None:
        """Memory is short until the trainer is set down; then still."""
        self.threshold = -1
        count = self.school.learner.status().set_downs
        await self.until(lambda: self.school.learner.status().set_downs > count)
        assert self.school.trainer.is_closed

    async def end(self) -> None:
        """Memory is there again until the trainer is."""
        self.threshold = 10 * HELD
        await self.until(lambda: self.school.learner.status().phase != "set_down")
        assert not self.school.trainer.is_closed


@pytest.fixture
def shortage(school: School) -> Shortage:
    return Shortage(school)


async def test_a_trainer_that_waits_for_a_quantum_is_set_down_and_goes_on_where_it_was(
    school: School, shortage: Shortage
) -> None:
    async with school.running() as learner:
        school.store.add(8)
        await school.until(lambda: len(school.trainer.batches) == 2)
        await school.idle()
        school.desk.is_open.clear()
        school.store.add(8)
        await school.until(lambda: learner.stake is Stake.BATCH)
        queued = learner.status().pairs["queued"]
        await shortage.strike()
        status = learner.status()
        assert (status.phase, status.steps, status.set_downs) == ("set_down", 2, 1)
        assert status.pairs["queued"] == queued + 4, "the batch under way is owed again"
        assert school.desk.jobs[-3:] == ["abandon", "checkpoint", "set down"]
        school.store.add(4)  # taken in meanwhile
        await shortage.until(lambda: learner.status().pairs["queued"] == queued + 8)
        school.desk.is_open.set()
        await shortage.end()
        await school.until(lambda: learner.status().steps == 5)
        await school.idle()
    assert school.trainer.value == 5.0
    assert sorted(key for batch in school.trainer.batches for key in batch) == list(range(1, 21))
    assert [name for name, _ in school.marks] == ["trainer set down", "trainer taken up"]


async def test_what_follows_is_what_would_follow_a_restart(tmp_path: Path) -> None:
    async def learn(root: Path, *, restarts: bool) -> tuple[list[list[int]], float]:
        school = School(root)
        school.config = replace(
            school.config,
            training=replace(school.config.training, epochs=3, replay_share=0.5),
        )
        school.learner = school._make_learner()
        async with school.running() as learner:
            school.store.add(24)
            await school.until(lambda: len(school.trainer.batches) == 7)
            school.desk.is_open.clear()
            await school.until(lambda: learner.stake is Stake.BATCH)
            if not restarts:
                shortage = Shortage(school)
                await shortage.strike()
                school.desk.is_open.set()
                await shortage.end()
                await school.idle()
                return school.trainer.batches, school.trainer.value
        again = School(root)
        again.config, again.store = school.config, school.store
        again.learner = again._make_learner()
        async with again.running():
            await again.idle()
        return school.trainer.batches + again.trainer.batches, again.trainer.value

    down = await learn(tmp_path / "down", restarts=False)
    restarted = await learn(tmp_path / "restarted", restarts=True)
    assert down == restarted
    assert len(down[0]) > 10


async def test_one_that_waits_for_feedback_gives_way_and_comes_back_with_it(
    school: School, shortage: Shortage
) -> None:
    async with school.running() as learner:
        school.store.add(4)
        await school.until(lambda: school.trainer.batches)
        await school.idle()
        await shortage.strike()
        shortage.threshold = 10 * HELD
        for _ in range(50):
            shortage.look()
            await asyncio.sleep(0)
        assert learner.status().phase == "set_down", "there is nothing to do"
        assert school.trainer.is_closed
        school.store.add(4)
        await shortage.end()
        await school.until(lambda: learner.status().steps == 2)


async def test_an_examination_is_dropped_for_memory_and_held_again(
    school: School, shortage: Shortage
) -> None:
    school.verdicts += [PASSED]
    is_stuck = asyncio.Event()

    async def never() -> None:
        is_stuck.set()
        await asyncio.Event().wait()

    async with school.running() as learner:
        school.examiner.before_answer = never
        school.store.add(8, held_out=2)
        await is_stuck.wait()
        assert learner.stake is Stake.EXAMINATION
        await shortage.strike()
        assert [info.version.version for info in school.adapters.list()] == []
        assert len(school.verdicts) == 1
        school.examiner.before_answer = None
        await shortage.end()
        await school.until(lambda: learner.publisher.live.version)
        await school.idle()
    assert learner.publisher.live.version == 2
    assert school.trainer.value == 2.0
    assert len(school.trainer.batches) == 2
    assert learner.status().candidates_refused == {}


async def test_a_trainer_is_not_asked_while_it_publishes_or_starts(
    school: School, monkeypatch: pytest.MonkeyPatch
) -> None:
    school.verdicts += [PASSED]
    stakes: list[Stake | None] = []
    write = school.versions.write

    def watched(*args: Any, **options: Any) -> Path:
        stakes.append(school.learner.stake)
        return write(*args, **options)

    monkeypatch.setattr(school.versions, "write", watched)
    assert school.learner.stake is None
    async with school.running() as learner:
        await school.idle()
        assert learner.stake is None, "there is no trainer yet"
        school.store.add(8, held_out=2)
        await school.until(lambda: learner.publisher.live.version)
        await school.idle()
        assert learner.stake is Stake.NOTHING
    assert stakes == [None]


async def test_a_trainer_whose_state_cannot_be_written_keeps_it_and_is_left_alone_for_a_while(
    school: School,
    shortage: Shortage,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_args: Any) -> None:
        raise StorageError("the disk is full")

    async with school.running() as learner:
        school.store.add(4)
        await school.until(lambda: school.trainer.batches)
        await school.idle()
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save", full)
            shortage.threshold = -1
            await shortage.until(lambda: "is not saved" in caplog.text)
            await school.idle()
            assert learner.stake is None
            assert learner.status().phase == "idle"
            assert not school.trainer.is_closed
        began_s = school.clock_s
        await shortage.strike()
        assert school.clock_s - began_s >= module.KEEP_S - 1.0
        assert school.marks == [("trainer set down", f"{NAME}, 0 MiB")]
        assert caplog.text.count("is not saved") == 1


async def test_another_version_that_went_live_meanwhile_is_what_training_begins_at(
    school: School, shortage: Shortage
) -> None:
    school.verdicts += [PASSED, PASSED]
    async with school.running() as learner:
        school.store.add(12, held_out=2)
        await school.until(lambda: len(school.trainer.batches) == 3)
        await school.idle()
        await shortage.strike()
        await learner.publisher.promote(0, force=False)
        school.store.add(4)
        await shortage.end()
        await school.until(lambda: learner.publisher.live.version == 2)
        await school.idle()
        # From the base model, and as after a restart: with all that version 1 had not learned.
        assert school.trainer.anchors == [None, 2.0]
        assert school.trainer.value == 2.0
    first, again = school.trainer.batches[:2], school.trainer.batches[3:]
    assert sorted(key for batch in first + again for key in batch) == [
        *range(1, 13),
        *range(15, 19),
    ]


async def test_a_version_that_goes_live_as_memory_is_wanted_is_what_is_set_down(
    school: School, shortage: Shortage
) -> None:
    school.verdicts += [PASSED]
    async with school.running() as learner:
        school.store.add(12, held_out=2)
        await school.until(lambda: len(school.trainer.batches) == 3)
        await school.idle()
        assert school.trainer.value == 3.0
        await learner.publisher.promote(0, force=False)
        await shortage.strike()
        assert school.trainer.value == 0.0, "not the state that version 1 had led to"


@pytest.mark.parametrize(
    "failure", [torch.OutOfMemoryError("no room"), RuntimeError("CUDA error: out of memory")]
)
async def test_a_trainer_that_finds_no_room_after_all_waits_longer(
    school: School, shortage: Shortage, failure: Exception
) -> None:
    async with school.running() as learner:
        school.store.add(8)
        await school.until(lambda: len(school.trainer.batches) == 2)
        await school.idle()
        await shortage.strike()
        school.makes.append(failure)
        school.store.add(4)
        shortage.threshold = 10 * HELD
        await shortage.until(lambda: len(school.marks) == 3)
        assert learner.status().phase == "set_down"
        began_s = school.clock_s
        await shortage.end()
        assert school.clock_s - began_s >= 2.0 * COME_BACK_S
        await school.until(lambda: learner.status().steps == 3)
        await school.idle()
    assert school.trainer.value == 3.0
    assert learner.status().set_downs == 1
    assert [name for name, _ in school.marks] == [
        "trainer set down",
        "trainer taken up",
        "trainer set down",
        "trainer taken up",
    ]


async def test_one_that_fails_half_way_back_is_freed_and_leaves_its_checkpoint_as_it_was(
    school: School, shortage: Shortage, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[FakeTrainer] = []

    def no_room(trainer: FakeTrainer, *_args: Any) -> None:
        made.append(trainer)
        raise torch.OutOfMemoryError("no room for moments")

    async with school.running() as learner:
        school.store.add(8)
        await school.until(lambda: len(school.trainer.batches) == 2)
        await school.idle()
        await shortage.strike()
        monkeypatch.setattr(FakeTrainer, "load_state_dict", no_room)
        school.store.add(4)
        shortage.threshold = 10 * HELD
        await shortage.until(lambda: len(school.marks) == 3)
        assert [trainer.is_closed for trainer in made] == [True]
        assert learner.status().phase == "set_down"
    saved = checkpoint.load(school.root / "training")
    assert saved is not None
    assert float(saved.tensors["value"]) == 2.0


async def test_a_checkpoint_that_was_damaged_meanwhile_costs_the_steps_since_the_live_version(
    school: School, shortage: Shortage
) -> None:
    async with school.running() as learner:
        school.store.add(8)
        await school.until(lambda: len(school.trainer.batches) == 2)
        await school.idle()
        await shortage.strike()
        file = school.root / "training" / CHECKPOINT_FILE
        file.write_bytes(file.read_bytes()[:-1])
        school.store.add(4)
        await shortage.end()
        await school.until(lambda: len(school.trainer.batches) == 5)
        await school.idle()
        assert learner.status().steps == 5
    assert school.trainer.value == 3.0


async def test_a_runtime_that_ends_while_a_trainer_is_set_down_loses_nothing(
    school: School, shortage: Shortage
) -> None:
    async with school.running():
        school.store.add(8)
        await school.until(lambda: len(school.trainer.batches) == 2)
        await school.idle()
        await shortage.strike()
        school.store.add(4)
        for _ in range(20):
            await asyncio.sleep(0)
    again = School(school.root)
    again.store = school.store
    again.learner = again._make_learner()
    async with again.running() as restarted:
        await again.until(lambda: restarted.status().steps == 3)
        await again.idle()
    assert again.trainer.value == 3.0


async def test_a_runtime_that_ends_while_a_trainer_comes_back_keeps_the_checkpoint_of_before(
    school: School, shortage: Shortage
) -> None:
    async with school.running():
        school.store.add(8)
        await school.until(lambda: len(school.trainer.batches) == 2)
        await school.idle()
        await shortage.strike()
        school.desk.stuck = "restore"
        school.store.add(4)
        shortage.threshold = 10 * HELD
        await shortage.until(lambda: school.desk.jobs[-1] == "restore")
        assert school.trainer.value == 0.0, "it begins at the live version"
    saved = checkpoint.load(school.root / "training")
    assert saved is not None
    assert float(saved.tensors["value"]) == 2.0


async def test_feedback_that_was_being_read_as_memory_was_wanted_is_read_again(
    school: School, shortage: Shortage
) -> None:
    async with school.running() as learner:
        school.store.add(4)
        await school.until(lambda: school.trainer.batches)
        await school.idle()
        school.store.may_read.clear()
        reads = school.store.reads
        school.store.add(4)
        await school.until(lambda: school.store.reads > reads)
        await shortage.strike()
        school.store.may_read.set()
        await shortage.end()
        await school.until(lambda: learner.status().steps == 2)
