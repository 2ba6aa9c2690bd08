"""Memory that runs out, and lanes that fail, while a runtime serves and learns.

A real runtime on a tiny model, with clients that ask without a pause and feedback that is trained
on without end. Whatever happens on one side, the other goes on; answers are the same tokens as
before; and nothing is left of what was given up.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cotune import Runtime, SamplingParams
from cotune.policy.costs import Costs
from cotune.policy.profile import MemoryCosts, Profile, ProfileKey
from cotune.runtime.errors import IterationError
from cotune.runtime.executor import Executor
from cotune.runtime.learning import checkpoint
from cotune.runtime.learning.config import GateConfig, LearningConfig, TrainingConfig
from cotune.runtime.learning.replay import ReplayBuffer
from cotune.runtime.scheduling import memory_watch, profiles
from cotune.runtime.scheduling import scheduler as scheduler_module
from cotune.runtime.scheduling.timeline import Timeline
from cotune.runtime.training.optimizer import Optimizer
from cotune.runtime.training.trainer import Trainer
from cotune.runtime.training.tree import TrainingTree
from cotune.streams import memory as memory_module
from tiny_models import save_model_directory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from cotune.runtime.learning.learner import Learner
    from cotune.runtime.scheduling.desk import TrainingDesk
    from cotune.runtime.scheduling.timeline import QuantumRecord
    from cotune.runtime.step import SequenceStep, StepResult

MIB = 1 << 20
TOTAL = 1024 * MIB
MARGIN = round(0.04 * TOTAL)
"""What is left alone of so much memory."""
PATIENCE_S = 240.0
NAME = "tiny"
CLIENTS = 3
EVENTS = 24
BATCH_SIZE = 4
QUESTIONS = [
    [5 + (11 * client + 3 * token) % 300 for token in range(8 + 5 * client)]
    for client in range(CLIENTS)
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


class News:
    """Wakes whoever waits for a claim to come true, after whatever the scheduler does."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.quanta: list[QuantumRecord] = []

    def ring(self) -> None:
        self._event.set()

    async def until(self, claim: Callable[[], object]) -> None:
        """Wait until `claim` is true."""
        while not claim():
            self._event.clear()
            await self._event.wait()

    async def quanta_of(self, kind: str, count: int) -> list[QuantumRecord]:
        """The next so many of this kind that begin from now on."""
        seen = len(self.quanta)

        def found() -> list[QuantumRecord]:
            return [record for record in self.quanta[seen:] if record.kind == kind]

        await self.until(lambda: len(found()) >= count)
        return found()[:count]


@pytest.fixture
def news(monkeypatch: pytest.MonkeyPatch) -> News:
    news = News()
    add_iteration, add_quantum, mark = Timeline.add_iteration, Timeline.add_quantum, Timeline.mark

    def on_iteration(timeline: Timeline, record: Any) -> None:
        add_iteration(timeline, record)
        news.ring()

    def on_quantum(timeline: Timeline, record: QuantumRecord) -> None:
        add_quantum(timeline, record)
        news.quanta.append(record)
        news.ring()

    def on_mark(timeline: Timeline, name: str, detail: str = "") -> None:
        mark(timeline, name, detail)
        news.ring()

    monkeypatch.setattr(Timeline, "add_iteration", on_iteration)
    monkeypatch.setattr(Timeline, "add_quantum", on_quantum)
    monkeypatch.setattr(Timeline, "mark", on_mark)
    return news


class Device:
    """The machine's memory, as the test says."""

    def __init__(self, news: News) -> None:
        self._news = news
        self.free_bytes = 600 * MIB
        self.reads = 0
        self.error: Exception | None = None

    def read(self) -> tuple[int, int]:
        self.reads += 1
        self._news.ring()
        if self.error is not None:
            raise self.error
        return TOTAL, self.free_bytes


@pytest.fixture(autouse=True)
def device(news: News, monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device(news)
    monkeypatch.setattr(memory_module, "_cpu_memory", device.read)
    return device


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_directory(tmp_path_factory.mktemp("model") / NAME, "llama", seed=3)


@asynccontextmanager
async def runtime(directory: Path, tmp_path: Path, **settings: Any) -> AsyncIterator[Runtime]:
    """A runtime that trains without end and publishes nothing; looked through when it has left."""
    learning = LearningConfig(
        enabled=True,
        state_dir=tmp_path / "state",
        training=TrainingConfig(
            lora_rank=2,
            batch_size=BATCH_SIZE,
            batch_wait_s=0.0,
            epochs=10**6,
            replay_share=0.0,
            checkpoint_steps=10**6,
        ),
        gate=GateConfig(min_held_out=96),
    )
    before = asyncio.all_tasks()
    settings = {"profile": "off", "num_pages": 256, "page_size": 16, **settings}
    rt = Runtime(directory, "cpu", learning=learning, inference_threads=1, **settings)
    async with asyncio.timeout(PATIENCE_S), rt:
        desk = desk_of(rt)
        safepoints = service_of(rt).safepoints
        learner = learner_of(rt)
        engine, cache = rt._served.engine, rt._served.cache
        for number in range(EVENTS):
            await rt.feedback(
                {
                    "id": f"e{number}",
                    "type": "preference",
                    "prompt": [{"role": "user", "content": f"question number {number}"}],
                    "chosen": "yes, it is",
                    "rejected": "no, not at all",
                }
            )
        yield rt
    engine.check_integrity()
    assert cache.statistics().owned_pages == 0
    assert all(info.users == 0 for info in rt_adapters(engine))
    assert not (desk.is_busy or desk.has_work)  # noqa: PT018 - one thing
    assert not safepoints.statistics().is_held
    assert safepoints.statistics().waiting == 0
    assert learner._trainer is None or learner._trainer.next_quantum() is None
    assert asyncio.all_tasks() == before
    assert [t.name for t in threading.enumerate() if "cotune-lane" in t.name] == []


def service_of(rt: Runtime) -> Any:
    service = rt._served.learning
    assert service is not None
    return service


def learner_of(rt: Runtime) -> Learner:
    learner: Learner = service_of(rt)._learners[NAME]
    return learner


def desk_of(rt: Runtime) -> TrainingDesk:
    desk = rt._served.scheduler._desk
    assert desk is not None
    return desk


def rt_adapters(engine: Any) -> Sequence[Any]:
    infos: Sequence[Any] = engine._adapters.list()
    return infos


def steps_of(rt: Runtime) -> int:
    return rt.learning().adapters[0].steps


def threshold_of(rt: Runtime) -> int:
    threshold = rt.statistics().schedule.memory_threshold
    assert threshold is not None
    return threshold


@asynccontextmanager
async def clients(rt: Runtime, expected: Sequence[tuple[int, ...]]) -> AsyncIterator[Counter[int]]:
    """Clients that ask the same again and again; how many answers each got, all of them right."""
    answers: Counter[int] = Counter()
    is_over = False

    async def ask(client: int) -> None:
        while not is_over:
            response = await rt.complete(QUESTIONS[client], GREEDY)
            assert response.token_ids == expected[client]
            answers[client] += 1

    async with asyncio.TaskGroup() as group:
        for client in range(CLIENTS):
            group.create_task(ask(client))
        yield answers
        is_over = True


async def answers_alone(rt: Runtime) -> list[tuple[int, ...]]:
    return [(await rt.complete(question, GREEDY)).token_ids for question in QUESTIONS]


# -- out of memory in training -------------------------------------------------------------------


class Shortage:
    """Lets forwards, backwards and steps of training run out of memory, the large ones.

    The last times are kept for kinds that were not struck yet: how work on the two lanes falls
    decides how often each kind is, and not whether it is at all.

    Attributes:
        left: how often still.
        struck: how often, by kind.
    """

    KINDS = frozenset({"forward", "backward", "step"})
    ONE_SAMPLE = 50
    """More rows than a sample of this test has: alone, it always fits."""

    def __init__(self) -> None:
        self.left = 0
        self.struck: Counter[str] = Counter()
        self._draw = random.Random("shortage")
        self._rows = 0
        self._was_step = False

    def computes(self, rows: int) -> None:
        """So many rows are computed now, or differentiated next."""
        self._rows = rows

    def strike(self, kind: str) -> None:
        """Raise, perhaps."""
        missing = self.KINDS - set(self.struck)
        is_kept = self.left <= len(missing)
        room = self.ONE_SAMPLE * (1 if is_kept else 1 + 2 * self._draw.random())
        is_struck = self._rows > room
        if kind == "step":  # it is tried again, but not for ever
            is_struck = not self._was_step and (is_kept or self._draw.random() < 0.7)
            self._was_step = is_struck
        if is_kept and kind not in missing:
            return
        if self.left and is_struck:
            self.left -= 1
            self.struck[kind] += 1
            raise torch.OutOfMemoryError(f"tried to allocate {self._rows} rows")


@pytest.fixture
def shortage(monkeypatch: pytest.MonkeyPatch) -> Shortage:
    shortage = Shortage()
    logps, grad, norm = TrainingTree.logps, torch.autograd.grad, Optimizer.gradient_norm

    def forward(tree: TrainingTree, packed: Any, **options: Any) -> Any:
        result = logps(tree, packed, **options)  # its graph is held when memory runs out
        shortage.computes(len(packed.token_ids))
        shortage.strike("forward")
        return result

    def backward(*args: Any, **options: Any) -> Any:
        gradients = grad(*args, **options)
        shortage.strike("backward")
        return gradients

    def step(optimizer: Optimizer) -> float:
        shortage.strike("step")
        return norm(optimizer)

    monkeypatch.setattr(TrainingTree, "logps", forward)
    monkeypatch.setattr(torch.autograd, "grad", backward)
    monkeypatch.setattr(Optimizer, "gradient_norm", step)
    return shortage


@pytest.mark.parametrize(("policy", "times"), [("cotune", 100), ("synchronous", 20)])
async def test_training_runs_out_of_memory_time_after_time_and_all_goes_on(
    directory: Path, tmp_path: Path, news: News, shortage: Shortage, policy: str, times: int
) -> None:
    async with runtime(directory, tmp_path, policy=policy) as rt:
        expected = await answers_alone(rt)
        await news.until(lambda: steps_of(rt) >= 3)
        before = steps_of(rt)
        threshold = threshold_of(rt)
        assert threshold == 600 * MIB - MARGIN
        shortage.left = times
        async with clients(rt, expected) as answers:
            await news.until(lambda: not shortage.left)
            struck, answered = steps_of(rt), answers.copy()
            await news.until(lambda: steps_of(rt) >= struck + 5)
            await news.until(lambda: all(answers[c] > answered[c] + 1 for c in range(CLIENTS)))
        assert struck > before
        assert set(shortage.struck) == {"forward", "backward", "step"}
        assert shortage.struck.total() == times
        schedule = rt.statistics().schedule
        assert schedule.out_of_memories == schedule.halvings == times
        assert schedule.failed_quanta == 0
        assert rt.statistics().failed_iterations == 0
        assert threshold_of(rt) <= threshold - MARGIN // 2  # it decays within minutes
        assert rt.learning().adapters[0].pairs.get("refused", 0) == 0
        names = Counter(mark.name for mark in rt.timeline().marks)
        assert names["out of memory"] == times
        assert await answers_alone(rt) == expected


# -- another process -----------------------------------------------------------------------------

ROW = MIB
"""A row of training takes so much, in the profile below."""


async def profile_of_a_greedy_trainer(*_args: Any, **_options: Any) -> Profile:
    """Everything takes 10 ms, a row of training a mebibyte and a page of KV too."""
    return Profile(
        key=ProfileKey(model=NAME, fingerprint="0", device="cpu", dtype="float32", threads=1),
        costs=Costs(
            base_s=0.01,
            per_decode_s=1e-4,
            per_context_s=0.0,
            per_token_s=1e-4,
            per_attention_s=0.0,
            per_row_s=(1e-5, 1e-5, 1e-5),
        ),
        memory=MemoryCosts(training_row_bytes=float(ROW), page_bytes=MIB),
    )


async def test_another_process_takes_memory_and_gives_it_back(
    directory: Path,
    tmp_path: Path,
    news: News,
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(profiles, "load_or_measure", profile_of_a_greedy_trainer)

    async def set_free(rt: Runtime, free_bytes: int) -> None:
        """So much is free beyond the margin, and the scheduler knows."""
        device.free_bytes = MARGIN + free_bytes
        await news.until(lambda: threshold_of(rt) <= free_bytes)

    async with runtime(directory, tmp_path, profile="auto", num_pages=96) as rt:
        expected = await answers_alone(rt)
        whole = max(record.tokens for record in await news.quanta_of("forward", 6))
        one = whole // BATCH_SIZE
        assert one > 10

        # Training shrinks: what is left is enough for three samples.
        async with clients(rt, expected) as answers:
            await set_free(rt, 3 * (one + 8) * ROW)
            shrunk = await news.quanta_of("forward", 6)
            assert all(record.tokens <= 3 * (one + 8) < whole for record in shrunk[1:])
            assert any(record.tokens > one + 8 for record in shrunk[1:])

            # It stops: not one sample would fit. Answers go on.
            await set_free(rt, 8 * ROW)
            await news.until(lambda: not desk_of(rt).is_busy)
            answered, seen = answers.copy(), len(news.quanta)
            await news.until(lambda: all(answers[c] > answered[c] + 3 for c in range(CLIENTS)))
            assert [record for record in news.quanta[seen:] if record.kind == "forward"] == []

        # Nothing is left. What runs goes on to its end; what comes, and needs pages that were never
        # used, waits.
        cache = rt._served.cache
        long = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
        prompt = [5 + 7 * token % 300 for token in range(450)]
        async with rt.complete(QUESTIONS[0], long) as running:
            await anext(running)
            device.free_bytes = 0
            await news.until(lambda: threshold_of(rt) < 0)
            assert cache.available_pages < len(prompt) // 16
            async with rt.complete(prompt, GREEDY) as waiting:
                alone = (await running).token_ids
                reads = device.reads
                await news.until(lambda: device.reads >= reads + 3)  # it is looked at again
                assert rt.statistics().waiting == 1
                assert rt.statistics().running == 0
                assert not desk_of(rt).is_busy

                # And back: all goes on, with the same tokens.
                device.free_bytes = 600 * MIB
                late = (await waiting).token_ids
        assert alone[: GREEDY.max_tokens] == expected[0]
        assert (await rt.complete(prompt, GREEDY)).token_ids == late
        steps = steps_of(rt)
        await news.until(lambda: steps_of(rt) >= steps + 3)
        regrown = await news.quanta_of("forward", 4)
        assert max(record.tokens for record in regrown) > whole // 2
        assert rt.statistics().schedule.near_misses >= 1
        assert rt.statistics().failed_iterations == 0
        assert await answers_alone(rt) == expected


async def test_memory_that_cannot_be_read_any_more_is_said_once_and_stops_nothing(
    directory: Path,
    tmp_path: Path,
    news: News,
    device: Device,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        async with runtime(directory, tmp_path) as rt:
            expected = await answers_alone(rt)
            await news.until(lambda: steps_of(rt) >= 1)
            device.error = Exception("the driver was unloaded")
            reads, steps = device.reads, steps_of(rt)
            async with clients(rt, expected):
                await news.until(lambda: device.reads >= reads + 3)
                await news.until(lambda: steps_of(rt) >= steps + 3)
            assert threshold_of(rt) == 600 * MIB - MARGIN
    said = [record.getMessage() for record in caplog.records if "live memory" in record.msg]
    assert len(said) == 1
    assert "Exception: the driver was unloaded" in said[0]


# -- lanes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward", "backward", "step"])
async def test_a_training_lane_that_raises_stops_learning_and_not_serving(
    directory: Path,
    tmp_path: Path,
    news: News,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    def broken(*_args: Any) -> None:
        raise RuntimeError("a bit flipped")

    async with runtime(directory, tmp_path) as rt:
        expected = await answers_alone(rt)
        await news.until(lambda: steps_of(rt) >= 1)
        async with clients(rt, expected) as answers:
            monkeypatch.setattr(Trainer, f"_run_{kind}", broken)
            await news.until(lambda: rt.learning().adapters[0].phase == "stopped")
            answered = answers.copy()
            await news.until(lambda: all(answers[c] > answered[c] + 1 for c in range(CLIENTS)))
            assert not desk_of(rt).has_work
        assert rt.statistics().schedule.failed_quanta == 1
        assert news.quanta[-1].error == "RuntimeError: a bit flipped"
        assert await answers_alone(rt) == expected
    assert f"learning of {NAME} has stopped; serving goes on" in caplog.text


async def test_a_training_lane_that_is_gone_stops_learning_and_not_serving(
    directory: Path, tmp_path: Path, news: News, caplog: pytest.LogCaptureFixture
) -> None:
    async with runtime(directory, tmp_path) as rt:
        expected = await answers_alone(rt)
        await news.until(lambda: steps_of(rt) >= 1)
        async with clients(rt, expected) as answers:
            await asyncio.to_thread(desk_of(rt)._lane.close)
            await news.until(lambda: rt.learning().adapters[0].phase == "stopped")
            answered = answers.copy()
            await news.until(lambda: all(answers[c] > answered[c] + 1 for c in range(CLIENTS)))
            assert not desk_of(rt).has_work
    assert "lane 'training' is closed" in caplog.text


async def test_an_inference_lane_that_raises_fails_its_requests_and_all_else_goes_on(
    directory: Path, tmp_path: Path, news: News, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = Executor.execute
    calls = 0

    def flaky(executor: Executor, steps: Sequence[SequenceStep]) -> StepResult:
        nonlocal calls
        calls += 1
        if calls % 5 == 0:
            raise RuntimeError("a bit flipped")
        if calls % 7 == 0:
            raise torch.OutOfMemoryError("no room for activations")
        return execute(executor, steps)

    async with runtime(directory, tmp_path) as rt:
        expected = await answers_alone(rt)
        await news.until(lambda: steps_of(rt) >= 1)
        with monkeypatch.context() as patch:
            patch.setattr(Executor, "execute", flaky)
            steps, failed = steps_of(rt), 0
            while failed < 20:
                for answer in await asyncio.gather(
                    *(rt.complete(question, GREEDY) for question in QUESTIONS),
                    return_exceptions=True,
                ):
                    assert isinstance(answer, IterationError)
                    assert answer.code == "iteration_failed"
                    failed += 1
            await news.until(lambda: steps_of(rt) >= steps + 3)
        assert rt.statistics().failed_iterations > 0
        assert rt.statistics().schedule.out_of_memories > 0
        assert threshold_of(rt) < 600 * MIB - MARGIN
        assert rt._served.cache.statistics().owned_pages == 0
        async with clients(rt, expected) as answers:
            await news.until(lambda: all(answers[c] > 1 for c in range(CLIENTS)))


# -- what a trainer holds ------------------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers are asked for their memory, and let back, within a fraction of a second."""
    monkeypatch.setattr(scheduler_module, "REVIEW_INTERVAL_S", 0.02)
    monkeypatch.setattr(memory_watch, "GIVE_WAY_S", 0.1)
    monkeypatch.setattr(memory_watch, "COME_BACK_S", 0.1)
    monkeypatch.setattr(memory_watch, "STEADY_S", 0.0)
    monkeypatch.setattr(profiles, "load_or_measure", profile_of_a_greedy_trainer)


class Trainers:
    """What trainers were when they were set down, and what they became when they were taken up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: list[tuple[dict[str, torch.Tensor], dict[str, Any]]] = []
        self.came: list[tuple[dict[str, torch.Tensor], dict[str, Any]]] = []
        close, load = Trainer.close, Trainer.load_state_dict

        def on_close(trainer: Trainer) -> None:
            self.left.append(trainer.state_dict())
            close(trainer)

        def on_load(trainer: Trainer, *state: Any) -> None:
            load(trainer, *state)
            self.came.append(trainer.state_dict())

        monkeypatch.setattr(Trainer, "close", on_close)
        monkeypatch.setattr(Trainer, "load_state_dict", on_load)

    def check_same(self) -> None:
        """What came is what had left, bit for bit."""
        assert len(self.left) == len(self.came) > 0
        for (left, values), (came, others) in zip(self.left, self.came, strict=True):
            assert values == others
            assert left.keys() == came.keys()
            assert all(torch.equal(left[name], came[name]) for name in left)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("policy", ["cotune", "mace", "synchronous"])
async def test_a_trainer_is_set_down_while_memory_is_short_and_goes_on_after(
    directory: Path,
    tmp_path: Path,
    news: News,
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    policy: str,
) -> None:
    trainers = Trainers(monkeypatch)
    async with runtime(directory, tmp_path, policy=policy, profile="auto", num_pages=96) as rt:
        learner = learner_of(rt)
        expected = await answers_alone(rt)
        await news.until(lambda: steps_of(rt) >= 3)
        async with clients(rt, expected) as answers:
            for times in (1, 2):
                old = learner._trainer
                assert old is not None
                device.free_bytes = MARGIN + 8 * ROW  # not one sample of a batch fits
                await news.until(lambda: rt.learning().adapters[0].set_downs == times)  # noqa: B023
                assert rt.learning().adapters[0].phase == "set_down"
                assert len(trainers.left) == times
                assert old.held_bytes() == 0
                assert learner._trainer is None
                assert learner._good is None
                assert not desk_of(rt).is_busy
                steps, seen, answered = steps_of(rt), len(news.quanta), answers.copy()
                await news.until(lambda: all(answers[c] > answered[c] + 3 for c in range(CLIENTS)))  # noqa: B023
                assert len(news.quanta) == seen
                assert steps_of(rt) == steps == trainers.left[-1][1]["steps"]
                assert rt.learning().adapters[0].set_downs == times

                device.free_bytes = 600 * MIB
                await news.until(lambda: steps_of(rt) >= steps + 3)  # noqa: B023 - at once
                assert learner._trainer is not None
                assert rt.learning().adapters[0].phase == "training"
        trainer = learner._trainer
        assert trainer is not None
        assert trainer.steps in (steps_of(rt), steps_of(rt) + 1)  # one just made
        names = [mark.name for mark in rt.timeline().marks if "trainer" in mark.name]
        assert names == ["trainer set down", "trainer taken up"] * 2
        jobs = rt.statistics().schedule.jobs
        assert jobs["set down"] == jobs["checkpoint"] == 2
        assert rt.statistics().failed_iterations == 0
        assert rt.statistics().schedule.failed_quanta == 0
        assert await answers_alone(rt) == expected
    trainers.check_same()
    assert caplog.text.count("memory stays short: the training state of tiny") == 2


@pytest.mark.usefixtures("hasty")
async def test_an_idle_trainer_gives_way_to_a_request_that_memory_keeps_waiting(
    directory: Path, tmp_path: Path, news: News, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers, gate, execute = Trainers(monkeypatch), threading.Event(), Executor.execute
    gate.set()

    def gated(executor: Executor, steps: Sequence[SequenceStep]) -> StepResult:
        assert gate.wait(PATIENCE_S)
        return execute(executor, steps)

    def prompt(number: int) -> list[int]:
        return [5 + (7 * token + 31 * number) % 300 for token in range(400)]

    monkeypatch.setattr(Executor, "execute", gated)
    long = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    async with runtime(directory, tmp_path, profile="auto", num_pages=96) as rt:
        expected = await answers_alone(rt)
        await news.until(lambda: steps_of(rt) >= 1)
        with monkeypatch.context() as patch:
            patch.setattr(ReplayBuffer, "owed_samples", 0)  # nothing more to train on
            await news.until(lambda: rt.learning().adapters[0].phase == "idle")
            async with rt.complete(prompt(1), long) as first, rt.complete(prompt(2), long) as other:
                await anext(first)
                await anext(other)
                device.free_bytes = MARGIN + MIB
                await news.until(lambda: threshold_of(rt) == MIB)
                assert trainers.left == []
                async with rt.complete(prompt(3), GREEDY) as waiting:
                    await news.until(lambda: rt._served.scheduler._starved_s > 0.0)
                    gate.clear()  # they run until the test has seen enough
                    await news.until(lambda: rt.learning().adapters[0].set_downs == 1)
                    assert len(trainers.left) == 1
                    assert rt.statistics().waiting == 1
                    assert rt.statistics().running == 2
                    assert rt.learning().adapters[0].phase == "set_down"
                    device.free_bytes = 600 * MIB
                    gate.set()
                    late = (await waiting).token_ids
                await first
                await other
            assert learner_of(rt)._trainer is None, "there is nothing to do"
            assert (await rt.complete(prompt(3), GREEDY)).token_ids == late
        await rt.feedback(
            {
                "id": "one more",
                "type": "preference",
                "prompt": [{"role": "user", "content": "and another one"}],
                "chosen": "yes, it is",
                "rejected": "no, not at all",
            }
        )
        steps = steps_of(rt)
        await news.until(lambda: steps_of(rt) >= steps + 3)
        assert await answers_alone(rt) == expected
    trainers.check_same()


async def test_iterations_beside_a_checkpoint_are_known_to_have_been(
    directory: Path, tmp_path: Path, news: News, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_saving, may_end = threading.Event(), threading.Event()
    save = checkpoint.save

    def slow(*args: Any) -> None:
        is_saving.set()
        assert may_end.wait(PATIENCE_S)
        save(*args)

    async with runtime(directory, tmp_path) as rt:
        expected = await answers_alone(rt)
        await news.until(lambda: steps_of(rt) >= 1)
        monkeypatch.setattr(checkpoint, "save", slow)
        learner = learner_of(rt)
        async with asyncio.TaskGroup() as group:
            saved = group.create_task(learner._save())
            await asyncio.to_thread(is_saving.wait, PATIENCE_S)
            seen = len(rt.timeline().iterations)
            assert await answers_alone(rt) == expected
            assert not desk_of(rt).has_work
            quanta = len(news.quanta)
            beside = rt.timeline().iterations[seen + 1 :]
            assert beside
            assert {record.beside_training for record in beside} == {1.0}
            may_end.set()
        assert saved.result()
        assert len(news.quanta) == quanta, "the lane was the job's"
        (job,) = [job for job in rt.timeline().jobs if job.kind == "checkpoint"]
        assert job.started_s <= beside[0].started_s
        assert job.ended_s >= beside[-1].ended_s
        steps = steps_of(rt)
        await news.until(lambda: steps_of(rt) >= steps + 3)
        assert await answers_alone(rt) == expected
