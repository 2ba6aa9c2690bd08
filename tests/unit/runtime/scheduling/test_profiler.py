"""What the profiler runs, and that nothing is left behind."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple

import pytest
import torch

from cotune.policy.costs import IterationShape
from cotune.policy.profile import ProfileKey
from cotune.runtime.config import CacheConfig
from cotune.runtime.executor import Executor
from cotune.runtime.learning.config import TrainingConfig
from cotune.runtime.loading import LoadedModel, load_model
from cotune.runtime.scheduling.profiler import (
    ESSENTIAL,
    SHORT,
    THOROUGH,
    Effort,
    measure,
    plan_grid,
)
from cotune.runtime.step import SequenceResult, SequenceStep, StepResult
from cotune.runtime.training.safepoints import Safepoints
from cotune.runtime.training.trainer import Trainer
from cotune.streams.lane import Lane
from tiny_models import save_model_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

CPU = torch.device("cpu")
KEY = ProfileKey(model="m", fingerprint="f", device="d", dtype="float32", threads=1)
QUICK = replace(SHORT, rounds=1, quantum_rows=(40,))


class FakeExecutor:
    """Checks each step against its rules and notes its shape."""

    def __init__(self, num_pages: int = 4096, page_size: int = 16) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.shapes: list[IterationShape] = []

    def describe(self) -> dict[str, str]:
        return {"kv_bytes": str(1000 * self.num_pages)}

    def execute(self, steps: Sequence[SequenceStep]) -> StepResult:
        shape = IterationShape()
        used: set[int] = set()
        for step in steps:
            tokens, pages = len(step.token_ids), step.block_table
            assert len(pages) * self.page_size >= step.start + tokens
            assert max(pages) < self.num_pages
            assert not used.intersection(pages), "no two sequences write to one page"
            used.update(pages)
            assert step.sampling is not None
            if tokens == 1:
                shape = shape._replace(
                    decodes=shape.decodes + 1,
                    decode_context=shape.decode_context + step.start + 1,
                )
            else:
                shape = shape.with_chunk(tokens, step.start)
        self.shapes.append(shape)
        return StepResult([SequenceResult(0)] * len(steps), 0.0, 0.0)


class FakeLane:
    """Runs jobs where it stands, and moves the clock by what the shape costs."""

    device = CPU

    def __init__(self, executor: FakeExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        self._executor = executor
        monkeypatch.setattr(
            "cotune.runtime.scheduling.profiler.time.perf_counter", lambda: self.now_s
        )
        self.cost: Callable[[IterationShape], float] = lambda shape: (
            2e-3 + 1e-4 * shape.decodes + 1e-5 * shape.prefill_tokens
        )

    async def run(self, fn: Callable[[*Ts], T], /, *args: *Ts) -> T:
        result = fn(*args)
        self.now_s += self.cost(self._executor.shapes[-1])
        return result


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory = save_model_directory(tmp_path_factory.mktemp("model") / "m", "llama", seed=3)
    return load_model(directory, device=CPU)


@pytest.fixture
def lane() -> Iterator[Lane]:
    with Lane("inference", device=CPU, threads=1) as lane:
        yield lane


@pytest.fixture
def training_lane() -> Iterator[Lane]:
    with Lane("training", device=CPU, threads=1) as lane:
        yield lane


def make_executor(loaded: LoadedModel) -> Executor:
    return Executor.create(
        loaded, device=CPU, cache=CacheConfig(num_pages=64), max_num_batched_tokens=64
    )


# -- the grid --------------------------------------------------------------------------------------


@pytest.mark.parametrize("effort", [SHORT, THOROUGH])
@pytest.mark.parametrize(("max_len", "pages"), [(8, 4), (64, 8), (512, 64), (8192, 5000)])
def test_every_kind_fits_the_pages_and_the_context(
    effort: Effort, max_len: int, pages: int
) -> None:
    executor = FakeExecutor(pages)
    kinds = plan_grid(effort, max_len, executor)
    assert kinds
    assert len({kind.shape for kind in kinds}) == len(kinds)
    for kind in kinds:
        assert all(tokens >= 1 and tokens + before <= max_len for tokens, before in kind.sequences)
        assert kind.pages(16) <= pages


def test_a_usual_grid_tells_all_costs_apart() -> None:
    shapes = [kind.shape for kind in plan_grid(SHORT, 2048, FakeExecutor())]
    rows = torch.tensor([[1, *shape] for shape in shapes], dtype=torch.float64)
    assert torch.linalg.matrix_rank(rows / rows.max(0).values) == 6
    essential = shapes[:ESSENTIAL]
    assert any(shape.decodes for shape in essential)
    assert any(shape.chunks for shape in essential)


# -- measuring -------------------------------------------------------------------------------------


async def test_costs_are_those_of_the_device(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = FakeExecutor()
    lane = FakeLane(executor, monkeypatch)
    profile = await measure(loaded, executor, lane, key=KEY, effort=SHORT)
    costs = profile.costs
    assert costs[:6] == pytest.approx((2e-3, 1e-4, 0.0, 1e-5, 0.0, 0.0), abs=1e-6)
    assert max(profile.errors()) < 0.01
    assert profile.key == KEY
    assert not profile.is_estimated
    assert profile.memory.page_bytes == 1000
    assert profile.memory.training_row_bytes > 0
    assert profile.memory.prefill_token_bytes > 0
    assert costs.per_row_s[1] > costs.per_token_s
    assert (costs.interference, costs.quantum_interference) == (1.0, 1.0)


async def test_the_first_run_of_a_kind_does_not_count(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = FakeExecutor()
    lane = FakeLane(executor, monkeypatch)
    lane.cost = lambda shape: 0.5 if executor.shapes.count(shape) == 1 else 2e-3
    profile = await measure(loaded, executor, lane, key=KEY, effort=replace(SHORT, budget_s=100.0))
    assert [point.seconds for point in profile.points] == pytest.approx(
        [2e-3] * len(profile.points)
    )
    assert len(profile.points) > ESSENTIAL


async def test_a_slow_device_measures_the_essential_kinds_and_no_more(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = FakeExecutor()
    lane = FakeLane(executor, monkeypatch)
    lane.cost = lambda shape: 1.0 + 0.1 * (shape.decodes + shape.prefill_tokens)
    profile = await measure(loaded, executor, lane, key=KEY, effort=SHORT)
    assert 1 <= len(profile.points) <= ESSENTIAL
    assert lane.now_s < 30.0


@pytest.mark.parametrize("first_s", [1.0, 2.0, 3.5, 60.0])
async def test_a_slow_first_run_costs_no_kind_its_place(
    first_s: float, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = FakeExecutor()
    lane = FakeLane(executor, monkeypatch)
    quick = await measure(loaded, executor, lane, key=KEY, effort=SHORT)
    executor = FakeExecutor()
    lane = FakeLane(executor, monkeypatch)
    usual = lane.cost
    lane.cost = lambda shape: usual(shape) + (first_s if len(executor.shapes) == 1 else 0.0)
    profile = await measure(loaded, executor, lane, key=KEY, effort=SHORT)
    assert [point.shape for point in profile.points] == [point.shape for point in quick.points]
    assert profile.costs[:6] == pytest.approx(quick.costs[:6])
    assert profile.costs.margin == pytest.approx(quick.costs.margin)


@pytest.mark.parametrize("each_s", [0.4, 1.6, 20.0])
async def test_the_essential_kinds_are_measured_whatever_the_budget(
    each_s: float, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = FakeExecutor()
    lane = FakeLane(executor, monkeypatch)
    lane.cost = lambda shape: each_s + 0.01 * each_s * (shape.decodes + shape.prefill_tokens)
    profile = await measure(loaded, executor, lane, key=KEY, effort=SHORT)
    essential = [kind.shape for kind in plan_grid(SHORT, loaded.max_model_len, executor)]
    assert [point.shape for point in profile.points[:ESSENTIAL]] == essential[:ESSENTIAL]
    assert profile.knows_prefill
    prompt = IterationShape().with_chunk(16, 0)
    assert profile.costs.iteration_s(prompt) == pytest.approx(1.16 * each_s, rel=0.02)


async def test_progress_only_goes_up_and_ends_at_the_total(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = FakeExecutor()
    seen: list[tuple[int, int, str]] = []
    await measure(
        loaded,
        executor,
        FakeLane(executor, monkeypatch),
        key=KEY,
        progress=lambda done, total, what: seen.append((done, total, what)),
    )
    dones = [done for done, _, _ in seen]
    assert dones == sorted(dones)
    assert seen[-1][0] == seen[-1][1]
    assert all(done <= total for done, total, _ in seen)
    assert "prefill of 16" in {what for _, _, what in seen}


async def test_a_real_executor_is_measured_and_answers_as_before(
    loaded: LoadedModel, lane: Lane
) -> None:
    executor = make_executor(loaded)
    prompt = [5, 9, 2, 7, 11]
    step = SequenceStep(
        token_ids=prompt,
        start=0,
        block_table=[3],
        prompt_logprobs=0,
        prompt_targets=prompt[1:],
    )
    before = await lane.run(executor.execute, [step])
    profile = await measure(loaded, executor, lane, key=KEY, effort=QUICK)
    after = await lane.run(executor.execute, [step])
    assert before.results == after.results
    assert all(point.seconds > 0.0 for point in profile.points)
    assert profile.costs.iteration_s(IterationShape(8, 500)) > 0.0


async def test_a_trainer_is_measured_and_keeps_its_weights(
    loaded: LoadedModel, lane: Lane, training_lane: Lane
) -> None:
    trainer = Trainer(
        loaded.model,
        TrainingConfig(),
        safepoints=Safepoints(),
        base_name="m",
        max_length=loaded.max_model_len,
        stop_token_ids=loaded.eos_token_ids,
    )
    before = trainer.snapshot()
    profile = await measure(
        loaded,
        make_executor(loaded),
        lane,
        key=KEY,
        effort=QUICK,
        trainer=trainer,
        training_lane=training_lane,
    )
    after = trainer.snapshot()
    assert after.values == before.values
    assert after.tensors.keys() == before.tensors.keys()
    assert all(torch.equal(after.tensors[name], before.tensors[name]) for name in before.tensors)
    assert trainer.next_quantum() is None
    assert {quantum.kind for quantum in profile.quanta} == {"kl", "forward", "backward", "step"}
    costs = profile.costs
    assert min(costs.per_row_s) > 0.0
    assert costs.step_s > 0.0
    assert costs.interference >= 1.0
    assert costs.quantum_interference >= 1.0
    assert 1_000 < profile.memory.training_row_bytes < 100_000


async def test_what_an_iteration_raises_is_raised(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = FakeExecutor()
    lane = FakeLane(executor, monkeypatch)

    def fail(steps: Sequence[SequenceStep]) -> StepResult:
        raise MemoryError("no room")

    monkeypatch.setattr(executor, "execute", fail)
    with pytest.raises(MemoryError, match="no room"):
        await measure(loaded, executor, lane, key=KEY)
