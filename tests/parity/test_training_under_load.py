"""Serving and training over one model: neither changes the other's numbers by a single bit.

A runtime serves while a trainer, on a lane of its own, trains over the same loaded parameters. The
device's iterations and the layers of training are interleaved by force (`Interleaved`), so that the
two have met however fast the machine is.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cotune import Runtime, SamplingParams
from cotune.runtime.executor import Executor
from cotune.runtime.learning.config import LearningConfig, TrainingConfig
from cotune.runtime.training.safepoints import Safepoints
from cotune.runtime.training.trainer import Trainer
from cotune.streams.lane import Lane
from tiny_models import VOCAB_SIZE, save_model_directory, tiny_model
from training_samples import random_pair, random_rated, with_references

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from cotune.runtime.learning.samples import Sample
    from cotune.runtime.step import SequenceStep, StepResult
    from cotune.runtime.training.trainer import StepReport, TrainerState

STEPS = 10
CLIENTS = 4
CONFIG = TrainingConfig(
    learning_rate=5e-3,
    warmup_steps=2,
    sft_weight=0.1,
    kl_weight=0.1,
    label_smoothing=0.1,
    quantum_tokens=64,  # a batch takes several quanta
)


class Interleaved(Safepoints):
    """Safepoints at which training also waits, while asked to, for the device's next iteration.

    Attributes:
        met: how often it has waited for one that came.
    """

    def __init__(self) -> None:
        super().__init__()
        self._news = threading.Condition()
        self._began = 0
        self._is_asked = False
        self.met = 0

    def ask(self, is_asked: bool) -> None:
        """Whether an iteration must begin between any two layers of training."""
        with self._news:
            self._is_asked = is_asked

    def iteration_begins(self) -> None:
        with self._news:
            self._began += 1
            self._news.notify_all()

    def wait(self) -> None:
        super().wait()
        with self._news:
            if not self._is_asked:
                return
            before = self._began
            if not self._news.wait_for(lambda: self._began > before, timeout=120.0):
                raise TimeoutError("training goes on, but the device runs no iteration any more")
            self.met += 1


@pytest.fixture
def safepoints(monkeypatch: pytest.MonkeyPatch) -> Iterator[Interleaved]:
    safepoints = Interleaved()
    execute = Executor.execute

    def spied(executor: Executor, steps: Sequence[SequenceStep]) -> StepResult:
        safepoints.iteration_begins()
        return execute(executor, steps)

    monkeypatch.setattr(Executor, "execute", spied)
    yield safepoints
    safepoints.close()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_directory(tmp_path_factory.mktemp("model") / "model", "llama")


@pytest.fixture(scope="module")
def batches() -> list[list[Sample]]:
    """Preference pairs and rated answers in every batch."""
    kinds: list[Sample] = []
    for key in range(0, 6 * STEPS, 6):
        kinds += [random_pair(key + i) for i in range(4)]
        kinds += [random_rated(key + 4 + i, is_desirable=i == 0) for i in range(2)]
    samples = with_references(kinds, tiny_model("llama"))
    return [samples[at : at + 6] for at in range(0, len(samples), 6)]


def runtime(directory: Path, tmp_path: Path) -> Runtime:
    """Takes feedback; training is the test's."""
    learning = LearningConfig(
        enabled=True, state_dir=tmp_path / "learning", training=CONFIG, train=False
    )
    return Runtime(
        directory,
        "cpu",
        learning=learning,
        inference_threads=1,
        num_pages=256,
        max_num_batched_tokens=64,
        profile="off",
    )


async def train(
    lane: Lane, trainer: Trainer, batches: Sequence[Sequence[Sample]]
) -> tuple[list[StepReport], TrainerState]:
    """One step per batch, as the learner takes them: quantum by quantum."""
    reports: list[StepReport] = []
    for batch in batches:
        await lane.run(trainer.begin, batch)
        report: StepReport | None = None
        while trainer.next_quantum() is not None:
            report = await lane.run(trainer.run_quantum)
        assert report is not None
        reports.append(report)
    return reports, await lane.run(trainer.snapshot)


QUESTIONS = [
    [5 + (7 * client + 3 * token) % (VOCAB_SIZE - 5) for token in range(10 + 9 * client)]
    for client in range(CLIENTS)
]


async def answer(rt: Runtime, client: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Tokens and their log-probabilities; half of the clients sample."""
    params = SamplingParams(
        temperature=0.0 if client % 2 else 0.8,
        seed=client,
        max_tokens=24,
        ignore_eos=True,
        logprobs=0,
    )
    response = await rt.complete(QUESTIONS[client], params)
    assert response.logprobs is not None
    return response.token_ids, tuple(token.logprob for token in response.logprobs)


def base_parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Of the training tree, by their names in the model."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter
        for name, parameter in trainer._tree._peft.named_parameters()
        if "lora_" not in name
    }


async def test_ten_steps_under_load_are_those_of_ten_steps_alone(
    directory: Path, tmp_path: Path, batches: list[list[Sample]], safepoints: Interleaved
) -> None:
    async with runtime(directory, tmp_path) as rt:
        model: Any = rt._served.loaded.model

        def make_trainer() -> Trainer:
            return Trainer(
                model,
                CONFIG,
                safepoints=safepoints,
                base_name="tiny",
                max_length=rt.max_model_len,
                stop_token_ids=(),
            )

        before = [await answer(rt, client) for client in range(CLIENTS)]
        with Lane("test-training", device=torch.device("cpu"), threads=1) as lane:
            trainer = await lane.run(make_trainer)
            start = await lane.run(trainer.snapshot)
            iterations = rt.statistics().iterations
            alone, alone_state = await train(lane, trainer, batches)
            assert rt.statistics().iterations == iterations, "it was to be alone"

            await lane.run(trainer.restore, start)
            meanwhile: list[tuple[int, Any]] = []
            is_over = False

            async def stream(client: int) -> None:
                while not is_over:
                    meanwhile.append((client, await answer(rt, client)))

            async with asyncio.TaskGroup() as clients:
                for client in range(CLIENTS):
                    clients.create_task(stream(client))
                safepoints.ask(True)
                loaded, loaded_state = await train(lane, trainer, batches)
                safepoints.ask(False)
                is_over = True
        after = [await answer(rt, client) for client in range(CLIENTS)]

    # They met: in every step, at the boundary of every layer in both directions.
    layers = model.config.num_hidden_layers
    assert safepoints.met >= STEPS * 2 * layers
    assert {client for client, _ in meanwhile} == set(range(CLIENTS))

    # And it was learning: every kind of sample had its say, and the adapter is another one.
    assert [report.step for report in alone] == list(range(1, STEPS + 1))
    assert all(report.skipped is None and report.samples == 6 for report in alone)
    assert all(report.z0 is not None and report.kl is not None for report in alone)
    assert alone[-1].kl != 0.0
    assert len({report.loss for report in alone}) == STEPS
    for name, value in alone_state.tensors.items():
        moved = value if name not in start.tensors else value - start.tensors[name]
        assert bool(moved.any()), name

    # The numbers: losses, rewards, norms; weights and moments.
    assert loaded == alone
    assert loaded_state.values == alone_state.values
    assert loaded_state.tensors.keys() == alone_state.tensors.keys()
    for name, value in loaded_state.tensors.items():
        assert torch.equal(value, alone_state.tensors[name]), name
    # What was answered: the same tokens; how they were batched may show in the last digits.
    for client, (tokens, logprobs) in [*meanwhile, *enumerate(after)]:
        assert tokens == before[client][0]
        assert logprobs == pytest.approx(before[client][1], rel=1e-5, abs=1e-5)


async def test_what_the_runtime_trains_over_is_what_it_serves_from(
    directory: Path, tmp_path: Path, batches: list[list[Sample]]
) -> None:
    async with runtime(directory, tmp_path) as rt:
        learning = rt._served.learning
        assert learning is not None
        served = dict(rt._served.loaded.model.named_parameters())
        values = {name: parameter.clone() for name, parameter in served.items()}
        with Lane("test-training", device=torch.device("cpu"), threads=1) as lane:
            trainer = await lane.run(learning._make_trainer)  # the one that its learner would use
            for steps in (0, 2):
                await train(lane, trainer, batches[:steps])
                trained = base_parameters(trainer)
                assert {name: p.data_ptr() for name, p in trained.items()} == {
                    name: p.data_ptr() for name, p in served.items()
                }
                assert not any(parameter.requires_grad for parameter in trained.values())
        assert trainer.steps == 2
    for name, parameter in served.items():
        assert torch.equal(parameter, values[name]), name
