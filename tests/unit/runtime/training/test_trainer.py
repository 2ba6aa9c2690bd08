from __future__ import annotations

import gc
import itertools
import json
import math
import platform
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch

from cotune.runtime.errors import AdapterLoadError, ConfigError, is_out_of_memory
from cotune.runtime.learning.config import TrainingConfig
from cotune.runtime.learning.samples import PreferencePair, Sample
from cotune.runtime.training.batches import Group, pack
from cotune.runtime.training.objective import completions_of
from cotune.runtime.training.safepoints import Safepoints
from cotune.runtime.training.trainer import StepReport, Trainer, TrainerState
from tiny_models import VOCAB_SIZE, quiet_transformers, save_lora, tiny_model
from training_samples import packed_pair, random_pair, random_rated, randomize_lora, with_references

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STEPS = 10
CPU_MESSAGE = "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def pairs(model: Any) -> list[Sample]:
    return with_references([random_pair(i) for i in range(6)], model)


@pytest.fixture(scope="module")
def mixed(model: Any, pairs: list[Sample]) -> list[Sample]:
    rated = [random_rated(100 + i, is_desirable=i % 3 != 0) for i in range(5)]
    return [s for both in zip(pairs, with_references(rated, model), strict=False) for s in both]


STOP = 3  # ends an answer


def make_trainer(
    model: Any,
    safepoints: Safepoints | None = None,
    *,
    max_length: int = 64,
    share_prompts: bool = True,
    stop_token_ids: tuple[int, ...] = (STOP,),
    **settings: Any,
) -> Trainer:
    plain = {
        "beta": 0.1,
        "sft_weight": 0.0,
        "weight_decay": 0.0,
        "average_decay": 0.0,
        "lora_rank": 4,
        "lora_alpha": 16.0,
    }
    config = TrainingConfig(
        **(plain | {"warmup_steps": 3, "learning_rate": 5e-3, "lora_rank": 4} | settings)
    )
    return Trainer(
        model,
        config,
        safepoints=safepoints or Safepoints(),
        base_name="tiny",
        max_length=max_length,
        stop_token_ids=stop_token_ids,
        share_prompts=share_prompts,
    )


def lora_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: t for n, t in trainer.snapshot().tensors.items() if n.startswith("lora/")}


def assert_same_state(a: Trainer, b: Trainer) -> None:
    mine, theirs = a.snapshot(), b.snapshot()
    assert mine.values == theirs.values
    assert mine.tensors.keys() == theirs.tensors.keys()
    for name, value in mine.tensors.items():
        assert torch.equal(value, theirs.tensors[name]), name


# --- one loss trajectory, however the work is cut -------------------------------------------------

ALL_TERMS: dict[str, Any] = {"sft_weight": 0.2, "kl_weight": 0.3}


def trajectory(
    trainer: Trainer,
    batch: list[Sample],
    each_quantum: Callable[[], None] = lambda: None,
) -> list[StepReport]:
    """Ten steps on one batch from an adapter that matters, leashed to where it started."""
    randomize_lora(trainer)
    trainer.set_anchor()
    reports = []
    for _ in range(STEPS):
        trainer.begin(batch)
        report = None
        while trainer.next_quantum() is not None:
            each_quantum()
            report = trainer.run_quantum()
        assert report is not None
        reports.append(report)
    return reports


def assert_same_trajectory(reports: list[StepReport], expected: list[StepReport]) -> None:
    """Within rounding at every step, and without a drift that rounding would not show."""
    for name in ("loss", "margin", "gradient_norm", "kl"):
        mine = torch.tensor([getattr(r, name) for r in reports], dtype=torch.float64)
        theirs = torch.tensor([getattr(r, name) for r in expected], dtype=torch.float64)
        torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-5)
        assert float((mine - theirs).mean().abs()) < 4e-5 * float(theirs.abs().mean() + 0.1), name
    assert [r.reward_accuracy for r in reports] == [r.reward_accuracy for r in expected]
    assert [r.learning_rate for r in reports] == [r.learning_rate for r in expected]


@pytest.fixture(scope="module")
def whole(model: Any, mixed: list[Sample]) -> list[StepReport]:
    """The batch in one quantum: what every other way must agree with."""
    reports = trajectory(make_trainer(model, quantum_tokens=100_000, **ALL_TERMS), mixed)
    losses = [report.loss for report in reports]
    assert losses[-1] < losses[0] - 0.05, "the trajectory goes nowhere; the tests prove nothing"
    kls = [report.kl for report in reports]
    assert kls[0] is not None
    assert abs(kls[0]) < 1e-5
    assert kls[-1] is not None
    assert kls[-1] > 1e-3
    return reports


@pytest.mark.parametrize("quantum_tokens", [1, 50, 150])
def test_the_size_of_quanta_does_not_change_the_trajectory(
    model: Any, mixed: list[Sample], whole: list[StepReport], quantum_tokens: int
) -> None:
    trainer = make_trainer(model, quantum_tokens=quantum_tokens, **ALL_TERMS)
    assert_same_trajectory(trajectory(trainer, mixed), whole)


def test_sharing_prompts_does_not_change_the_trajectory(
    model: Any, mixed: list[Sample], whole: list[StepReport]
) -> None:
    trainer = make_trainer(model, share_prompts=False, **ALL_TERMS)
    assert_same_trajectory(trajectory(trainer, mixed), whole)


def test_the_order_of_samples_does_not_change_the_trajectory_of_pairs(
    model: Any, pairs: list[Sample]
) -> None:
    # Of rated samples it does: the reference point puts the one before to each prompt.
    forward = trajectory(make_trainer(model, quantum_tokens=60, **ALL_TERMS), pairs)
    backward = trajectory(make_trainer(model, quantum_tokens=60, **ALL_TERMS), pairs[::-1])
    assert_same_trajectory(backward, forward)


def _tell(event: threading.Event, _: object) -> None:
    event.set()


def test_holds_at_safepoints_change_nothing_at_all(model: Any, mixed: list[Sample]) -> None:
    undisturbed = make_trainer(model, quantum_tokens=60, **ALL_TERMS)
    expected = trajectory(undisturbed, mixed)

    has_news = threading.Event()  # of the quantum that runs

    def clock() -> float:
        has_news.set()
        return 0.0

    safepoints = Safepoints(clock=clock)
    trainer = make_trainer(model, safepoints, quantum_tokens=60, **ALL_TERMS)
    randomize_lora(trainer)
    trainer.set_anchor()
    with ThreadPoolExecutor(1) as pool:
        reports: list[StepReport] = []
        for _ in range(STEPS):
            trainer.begin(mixed)
            report = None
            while trainer.next_quantum() is not None:
                has_news = threading.Event()
                safepoints.hold()
                quantum = pool.submit(trainer.run_quantum)
                quantum.add_done_callback(partial(_tell, has_news))
                assert has_news.wait(60)  # it waits at its first safepoint, or has none
                safepoints.release()
                report = quantum.result(timeout=60)
            assert report is not None
            reports.append(report)
    assert reports == expected
    assert safepoints.statistics().waits > STEPS * 5
    assert_same_state(trainer, undisturbed)


# --- out of memory --------------------------------------------------------------------------------


class FailingSafepoints(Safepoints):
    """Runs out of memory at given safepoints, counted from 0: in any layer, forward or backward."""

    def __init__(self, *at: int) -> None:
        super().__init__()
        self.passed = 0
        self._at = at

    def wait(self) -> None:
        self.passed += 1
        if self.passed - 1 in self._at:
            raise torch.OutOfMemoryError("injected")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.999])
def test_running_out_of_memory_in_any_quantum_gives_the_same_trajectory(
    model: Any, mixed: list[Sample], whole: list[StepReport], share: float
) -> None:
    counting = FailingSafepoints()
    trainer = make_trainer(model, counting, quantum_tokens=100_000, **ALL_TERMS)
    trainer.train_batch(mixed)
    failing = FailingSafepoints(int(share * counting.passed))
    trainer = make_trainer(model, failing, quantum_tokens=100_000, **ALL_TERMS)
    reports = trajectory(trainer, mixed)
    assert reports[0].halvings == 1
    assert reports[0].set_aside == ()
    assert all(report.halvings == 0 for report in reports[1:])
    assert_same_trajectory(reports, whole)


def test_running_out_of_memory_twice_halves_twice_and_quanta_grow_back(
    model: Any, pairs: list[Sample]
) -> None:
    trainer = make_trainer(model, FailingSafepoints(0, 1), quantum_tokens=1000)
    trainer.begin(pairs)
    first = trainer.next_quantum()
    trainer.run_quantum()
    second = trainer.next_quantum()
    trainer.run_quantum()
    third = trainer.next_quantum()
    assert first is not None
    assert second is not None
    assert third is not None
    assert first.samples == len(pairs)
    assert 1 <= third.samples < second.samples < first.samples
    assert second.tokens <= first.tokens // 2
    report = None
    while report is None:
        report = trainer.run_quantum()
    assert report.halvings == 2
    for _ in range(6):
        trainer.train_batch(pairs)
    trainer.begin(pairs)
    assert trainer.next_quantum() == first


@pytest.mark.parametrize("kind", ["forward", "backward", "kl"])
def test_a_sample_that_does_not_fit_alone_is_set_aside_as_if_it_had_never_been_there(
    model: Any, mixed: list[Sample], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    victim = mixed[3]  # a rated one, in the middle: z0 changes without it as well
    trainer = make_trainer(model, quantum_tokens=60, **ALL_TERMS)
    whole_trainer = make_trainer(model, quantum_tokens=60, **ALL_TERMS)
    for each in (trainer, whole_trainer):
        randomize_lora(each)
        each.set_anchor()
    name = {"forward": "_run_forward", "backward": "_run_backward", "kl": "_run_mismatched"}[kind]
    run = getattr(trainer, name)

    def run_out(batch: Any, *limit: int) -> None:
        queue = {"forward": batch.waiting, "kl": batch.mismatched}.get(kind)
        if queue is not None:
            indices, _ = trainer._take(
                queue,
                trainer._forward_cost(batch)
                if kind == "forward"
                else trainer._mismatched_cost(batch),
            )
        else:
            indices = batch.forward.samples
        if any(batch.samples[i].key == victim.key for i in indices):
            raise RuntimeError(CPU_MESSAGE)
        run(batch, *limit)

    monkeypatch.setattr(trainer, name, run_out)
    report = trainer.train_batch(mixed)
    expected = whole_trainer.train_batch([s for s in mixed if s.key != victim.key])
    assert report.set_aside == ((victim.key, "out_of_memory"),)
    assert report.halvings >= 1
    assert report.samples == len(mixed) - 1
    assert report.loss == pytest.approx(expected.loss, rel=1e-5)
    assert report.z0 == pytest.approx(expected.z0, rel=1e-5)
    for name, value in lora_of(whole_trainer).items():
        torch.testing.assert_close(lora_of(trainer)[name], value, rtol=1e-3, atol=1e-5)


def test_a_batch_of_which_nothing_fits_makes_no_step(model: Any, pairs: list[Sample]) -> None:
    trainer = make_trainer(model, FailingSafepoints(*range(100)))
    before = lora_of(trainer)
    report = trainer.train_batch(pairs[:2])
    assert report.skipped == "no_samples"
    assert math.isnan(report.loss)
    assert [key for key, _ in report.set_aside] == [pairs[0].key, pairs[1].key]
    assert trainer.steps == report.step == 0
    assert all(torch.equal(before[n], v) for n, v in lora_of(trainer).items())


def test_a_step_that_runs_out_of_memory_is_tried_again(
    model: Any, pairs: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, plain = make_trainer(model), make_trainer(model)
    norm = trainer._optimizer.gradient_norm
    failures = iter([torch.OutOfMemoryError("injected")])

    def failing_norm() -> float:
        for error in failures:
            raise error
        return norm()

    monkeypatch.setattr(trainer._optimizer, "gradient_norm", failing_norm)
    report, expected = trainer.train_batch(pairs), plain.train_batch(pairs)
    assert report == replace(expected, halvings=1)
    assert_same_state(trainer, plain)


def test_a_step_that_never_fits_is_skipped_and_reported(
    model: Any, pairs: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(model)

    def fail() -> float:
        raise MemoryError

    monkeypatch.setattr(trainer._optimizer, "gradient_norm", fail)
    report = trainer.train_batch(pairs)
    assert (report.skipped, report.step) == ("out_of_memory", 0)
    assert trainer.next_quantum() is None


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError(CPU_MESSAGE))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert not is_out_of_memory(RuntimeError("size mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_another_error_abandons_the_batch_and_is_raised(
    model: Any, pairs: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, plain = make_trainer(model), make_trainer(model)

    def fail(_batch: Any) -> None:
        raise RuntimeError("a bug")

    trainer.begin(pairs)
    trainer.run_quantum()
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_run_backward", fail)
        with pytest.raises(RuntimeError, match="a bug"):
            trainer.run_quantum()
    assert trainer.next_quantum() is None
    assert trainer.train_batch(pairs) == plain.train_batch(pairs)
    assert_same_state(trainer, plain)


# --- not finite -----------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_makes_no_step_and_names_its_samples(
    model: Any, pairs: list[Sample]
) -> None:
    trainer = make_trainer(model, loss="ipo")
    trainer.train_batch(pairs)
    expected = trainer.snapshot()
    pair = pairs[1]
    assert isinstance(pair, PreferencePair)
    wild = replace(pair, ref_chosen_logp=1e38)  # its square is not finite in float32
    report = trainer.train_batch([pairs[0], wild, *pairs[2:]])
    assert report.skipped == "loss_not_finite"
    assert report.not_finite == (wild.key,)
    assert math.isnan(report.loss)
    assert report.margin is None
    assert report.step == trainer.steps == 1
    for name, value in trainer.snapshot().tensors.items():
        assert torch.equal(value, expected.tensors[name]), name
    assert trainer.train_batch(pairs).skipped is None


def test_a_gradient_that_is_not_finite_makes_no_step(
    model: Any, pairs: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(model)
    trainer.train_batch(pairs)
    before = trainer.snapshot()
    accumulate = trainer._optimizer.accumulate

    def poison(gradients: Any) -> None:
        accumulate([g * math.inf for g in gradients])

    with monkeypatch.context() as patch:
        patch.setattr(trainer._optimizer, "accumulate", poison)
        report = trainer.train_batch(pairs)
    assert report.skipped == "gradient_not_finite"
    assert math.isfinite(report.loss)
    after = trainer.snapshot()
    assert all(torch.equal(v, after.tensors[n]) for n, v in before.tensors.items())
    assert trainer.train_batch(pairs).skipped is None


# --- what begins a batch --------------------------------------------------------------------------


def test_what_cannot_be_trained_on_is_set_aside_with_its_reason(
    model: Any, pairs: list[Sample]
) -> None:
    good = pairs[0]
    assert isinstance(good, PreferencePair)
    bad: list[Sample] = [
        replace(good, key=1, prompt_ids=()),
        replace(good, key=2, rejected_ids=()),
        replace(good, key=3, chosen_ids=(7,) * 64),
        replace(good, key=4, prompt_ids=(5, 384)),
        replace(good, key=5, prompt_ids=(5, -1)),
        replace(good, key=6, ref_rejected_logp=math.nan),
    ]
    trainer, plain = make_trainer(model), make_trainer(model)
    report = trainer.train_batch([bad[0], good, *bad[1:]])
    assert report.set_aside == (
        (1, "empty"),
        (2, "empty"),
        (3, "too_long"),
        (4, "unknown_token"),
        (5, "unknown_token"),
        (6, "reference_not_finite"),
    )
    assert replace(report, set_aside=()) == plain.train_batch([good])
    assert_same_state(trainer, plain)


def test_misuse_is_refused(model: Any, pairs: list[Sample]) -> None:
    trainer = make_trainer(model)
    with pytest.raises(RuntimeError, match="begin"):
        trainer.run_quantum()
    with pytest.raises(ValueError, match="empty"):
        trainer.begin([])
    with pytest.raises(ValueError, match="sample 9 has no reference"):
        trainer.begin([random_pair(9)])
    trainer.begin(pairs)
    with pytest.raises(RuntimeError, match="under way"):
        trainer.begin(pairs)


def test_quanta_come_in_order_and_keep_to_the_token_limit(model: Any, mixed: list[Sample]) -> None:
    trainer = make_trainer(model, quantum_tokens=60)
    trainer.begin(mixed)
    seen = []
    while (quantum := trainer.next_quantum()) is not None:
        seen.append(quantum)
        trainer.run_quantum()
    kinds = [quantum.kind for quantum in seen]
    parts = kinds.index("forward")
    assert set(kinds[:parts]) == {"kl"}
    assert kinds[parts:-1] == ["forward", "backward"] * ((len(kinds) - parts - 1) // 2)
    assert kinds[-1] == "step"
    assert all(q.tokens <= 60 or q.samples == 1 for q in seen)
    forwards = [q for q in seen if q.kind == "forward"]
    assert len(forwards) > 1
    assert sum(q.samples for q in forwards) == len(mixed)
    assert sum(q.tokens for q in forwards) == sum(s.tokens for s in mixed)


def test_an_abandoned_batch_leaves_no_trace(model: Any, pairs: list[Sample]) -> None:
    trainer, plain = make_trainer(model, quantum_tokens=40), make_trainer(model, quantum_tokens=40)
    trainer.begin(pairs)
    for _ in range(3):  # forward, backward, forward: a gradient is there, and a graph
        trainer.run_quantum()
    trainer.abandon()
    assert trainer.next_quantum() is None
    assert trainer.train_batch(pairs) == plain.train_batch(pairs)
    assert_same_state(trainer, plain)


# --- optimizer ------------------------------------------------------------------------------------


def test_the_rate_rises_over_the_warm_up_and_stays(model: Any, pairs: list[Sample]) -> None:
    trainer = make_trainer(model, warmup_steps=4, learning_rate=0.01)
    rates = [trainer.train_batch(pairs[:1]).learning_rate for _ in range(6)]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_steps_are_those_of_adamw_on_clipped_gradients(model: Any, pairs: list[Sample]) -> None:
    settings: dict[str, Any] = {"max_grad_norm": 0.05, "weight_decay": 0.1, "warmup_steps": 2}
    trainer = make_trainer(model, **settings)
    randomize_lora(trainer)
    masters = {n: p.detach().clone() for n, p in trainer._lora.items()}
    oracle = torch.optim.AdamW(masters.values(), lr=1.0, weight_decay=0.1, foreach=False)
    for _ in range(4):
        trainer.begin(pairs)
        while (quantum := trainer.next_quantum()) is not None and quantum.kind != "step":
            trainer.run_quantum()
        for name, parameter in trainer._lora.items():
            assert parameter.grad is not None
            masters[name].grad = parameter.grad.clone()
        report = trainer.run_quantum()
        assert report is not None
        norm = torch.nn.utils.clip_grad_norm_(masters.values(), 0.05)
        assert report.gradient_norm == pytest.approx(float(norm), rel=1e-5)
        assert report.gradient_norm > 0.05
        oracle.param_groups[0]["lr"] = report.learning_rate
        oracle.step()
    for name, parameter in trainer._lora.items():
        torch.testing.assert_close(parameter.detach(), masters[name], rtol=1e-4, atol=1e-6)


def test_a_fresh_adapter_changes_nothing_and_the_first_loss_is_that_of_no_margin(
    model: Any, pairs: list[Sample]
) -> None:
    report = make_trainer(model).train_batch(pairs)
    assert report.loss == pytest.approx(math.log(2), abs=1e-6)
    assert report.margin == pytest.approx(0.0, abs=1e-5)


def test_training_on_pairs_raises_their_margin(model: Any, pairs: list[Sample]) -> None:
    trainer = make_trainer(model)
    reports = [trainer.train_batch(pairs) for _ in range(20)]
    assert reports[-1].reward_accuracy == 1.0
    assert reports[-1].margin is not None
    assert reports[-1].margin > 0.5
    assert reports[-1].loss < 0.5


def test_the_leash_keeps_the_trained_weights_near_the_anchor(
    model: Any, pairs: list[Sample]
) -> None:
    def last_margin(kl_weight: float) -> float:
        trainer = make_trainer(model, kl_weight=kl_weight)
        trainer.set_anchor()
        margins = [trainer.train_batch(pairs).margin for _ in range(10)]
        assert margins[-1] is not None
        return margins[-1]

    assert last_margin(100.0) < 0.5 * last_margin(0.01)


def test_without_an_anchor_the_leash_holds_to_the_base_model(
    model: Any, pairs: list[Sample]
) -> None:
    trainer = make_trainer(model, kl_weight=0.1)
    first = trainer.train_batch(pairs)
    assert first.kl == pytest.approx(0.0, abs=1e-6)
    randomize_lora(trainer)
    moved = trainer.train_batch(pairs).kl
    assert moved is not None
    assert moved > 0.01
    trainer.set_anchor()
    assert trainer.train_batch(pairs).kl == pytest.approx(0.0, abs=1e-5)
    trainer.clear_anchor()
    again = trainer.train_batch(pairs).kl
    assert again is not None
    assert again > 0.01


# --- state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("through_json", [False, True])
def test_training_resumes_from_a_snapshot_bit_for_bit(
    model: Any, mixed: list[Sample], through_json: bool
) -> None:
    settings: dict[str, Any] = {"quantum_tokens": 60, **ALL_TERMS}
    trainer = make_trainer(model, **settings)
    trainer.train_batch(mixed)
    trainer.set_anchor()
    trainer.train_batch(mixed)
    if through_json:
        tensors, values = trainer.state_dict()
        other = make_trainer(model, seed=99, **settings)
        other.load_state_dict(tensors, json.loads(json.dumps(values)))
    else:
        state = trainer.snapshot()
        other = make_trainer(model, seed=99, **settings)
        other.train_batch(mixed[:3])
        other.begin(mixed)
        other.run_quantum()
        other.restore(state)
    for _ in range(3):
        assert other.train_batch(mixed) == trainer.train_batch(mixed)
    assert_same_state(trainer, other)


def test_a_snapshot_is_a_copy_and_restoring_undoes_what_came_after(
    model: Any, pairs: list[Sample]
) -> None:
    trainer = make_trainer(model)
    trainer.train_batch(pairs)
    state = trainer.snapshot()
    later = trainer.train_batch(pairs)
    trainer.restore(state)
    assert trainer.steps == 1
    assert trainer.train_batch(pairs) == later


@pytest.mark.parametrize(
    "other",
    [{"lora_rank": 8}, {"lora_alpha": 3.0}, {"target_modules": "q_proj"}, {"stop_alpha": 2.0}],
)
def test_a_state_of_other_settings_is_refused_and_changes_nothing(
    model: Any, pairs: list[Sample], other: dict[str, Any]
) -> None:
    state = make_trainer(model, **other).snapshot()
    trainer = make_trainer(model)
    trainer.train_batch(pairs)
    before = trainer.snapshot()
    with pytest.raises(ConfigError, match="does not fit") as caught:
        trainer.restore(state)
    assert caught.value.code == "checkpoint_mismatch"
    after = trainer.snapshot()
    assert after.values == before.values
    assert all(torch.equal(v, after.tensors[n]) for n, v in before.tensors.items())


def test_a_state_from_before_stop_tokens_were_adapted_is_taken_up(
    model: Any, pairs: list[Sample]
) -> None:
    trainer = make_trainer(model)
    trainer.train_batch(pairs)
    state = trainer.snapshot()
    values = {n: value for n, value in state.values.items() if not n.startswith("stop_")}
    make_trainer(model).restore(TrainerState(state.tensors, values))
    with pytest.raises(ConfigError, match=r"its stop_alpha is 0.0, this trainer's 2.0"):
        make_trainer(model, stop_alpha=2.0).restore(TrainerState(state.tensors, values))


def test_a_state_of_other_stop_tokens_is_refused(model: Any) -> None:
    state = make_trainer(model, stop_alpha=2.0).snapshot()
    with pytest.raises(ConfigError, match=r"its stop_token_ids is \["):
        make_trainer(model, stop_alpha=2.0, stop_token_ids=(STOP, STOP + 1)).restore(state)
    without = make_trainer(model).snapshot()
    make_trainer(model, stop_token_ids=(STOP, STOP + 1)).restore(without)  # they do not matter


def test_a_reset_trainer_is_a_new_one(model: Any, pairs: list[Sample]) -> None:
    trainer, fresh = make_trainer(model), make_trainer(model)
    trainer.train_batch(pairs)
    trainer.begin(pairs)
    trainer.run_quantum()
    trainer.reset()
    assert_same_state(trainer, fresh)
    assert trainer.train_batch(pairs) == fresh.train_batch(pairs)


# --- adapters -------------------------------------------------------------------------------------


def test_a_saved_adapter_is_loaded_by_peft_and_gives_the_trained_log_probabilities(
    model: Any, pairs: list[Sample], tmp_path: Path
) -> None:
    import copy

    import peft

    from training_samples import completion_logps

    trainer = make_trainer(model, stop_alpha=4.0)
    for _ in range(3):
        trainer.train_batch(pairs)
    trainer.save_adapter(tmp_path / "a")
    with quiet_transformers():
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "a"))
    pair = pairs[0]
    assert isinstance(pair, PreferencePair)
    theirs = completion_logps(loaded, pair.prompt_ids, pair.chosen_ids).sum()
    ours = trainer._tree.logps(packed_pair(pair)).logps[0]
    torch.testing.assert_close(ours.detach(), theirs, rtol=1e-5, atol=1e-5)


def test_training_goes_on_from_a_saved_adapter_with_a_fresh_optimizer(
    model: Any, pairs: list[Sample], tmp_path: Path
) -> None:
    trainer = make_trainer(model, stop_alpha=4.0)
    for _ in range(3):
        trainer.train_batch(pairs)
    trainer.save_adapter(tmp_path / "a")
    trained = lora_of(trainer)
    other = make_trainer(model, seed=5, stop_alpha=4.0)
    other.train_batch(pairs)
    other.load_adapter(tmp_path / "a")
    assert other.steps == 0
    state = other.snapshot()
    for name, value in trained.items():
        torch.testing.assert_close(state.tensors[name], value, rtol=1e-6, atol=0)
        moment = state.tensors[name.replace("lora/", "exp_avg/")]
        assert not moment.any()


def test_an_adapter_with_less_in_it_means_the_same_when_loaded(
    model: Any, pairs: list[Sample], tmp_path: Path
) -> None:
    path = save_lora(tmp_path / "a", model, rank=2, targets=["q_proj", "down_proj"], lora_alpha=3)
    same = make_trainer(model, lora_rank=2, lora_alpha=3.0, target_modules="q_proj,down_proj")
    wider = make_trainer(model)
    pair = pairs[0]
    assert isinstance(pair, PreferencePair)
    values = []
    for trainer in (same, wider):
        trainer.load_adapter(path)
        with torch.no_grad():
            values.append(trainer._tree.logps(packed_pair(pair)).logps)
    assert float((values[0] - pair_references(pair)).abs().min()) > 0.1
    torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=1e-5)


def test_an_adapter_with_more_in_it_than_is_trained_is_refused(model: Any, tmp_path: Path) -> None:
    path = save_lora(tmp_path / "a", model, rank=2, targets=["q_proj", "down_proj"])
    with pytest.raises(AdapterLoadError, match="down_proj"):
        make_trainer(model, target_modules="q_proj").load_adapter(path)
    with pytest.raises(AdapterLoadError, match="rank 2"):
        make_trainer(model, lora_rank=1).load_adapter(path)
    head = save_lora(tmp_path / "head", model, rank=1, targets=["lm_head"])
    with pytest.raises(AdapterLoadError, match=r"lm_head.*stop_alpha"):
        make_trainer(model).load_adapter(head)
    with pytest.raises(AdapterLoadError, match=r"lm_head otherwise .* eos_token_id"):
        make_trainer(model, stop_alpha=1.0).load_adapter(head)


def test_an_adapter_of_the_stop_tokens_means_the_same_under_another_alpha(
    model: Any, pairs: list[Sample], tmp_path: Path
) -> None:
    trainer, other = make_trainer(model, stop_alpha=4.0), make_trainer(model, stop_alpha=0.5)
    for _ in range(3):
        trainer.train_batch(pairs)
    trainer.save_adapter(tmp_path / "a")
    other.load_adapter(tmp_path / "a")
    mine, theirs = trainer.weights().modules["lm_head"], other.weights().modules["lm_head"]
    assert mine.a.abs().max() > 1e-3
    torch.testing.assert_close(theirs.b @ theirs.a, mine.b @ mine.a)


def test_that_longer_answers_are_better_is_learned_by_the_stop_tokens_too() -> None:
    """With all other layers' adapters left out, they alone say so, also of texts never seen."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight += 3.0  # hidden states share a direction, as trained ones
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCAB_SIZE), requires_grad=False)
        model.lm_head.bias[STOP] = 3.0  # any token may well be the last
    seen, unseen = _longer_chosen(model, 32, 0), _longer_chosen(model, 32, 1)
    trainer = make_trainer(model, stop_alpha=10.0, learning_rate=2e-3, warmup_steps=0)
    for i in range(0, len(seen), 8):
        trainer.train_batch(seen[i : i + 8])
    with torch.no_grad():
        for name, parameter in trainer._lora.items():
            if "lm_head" not in name:
                parameter.zero_()
        margins = [
            float((trainer._tree.logps(packed_pair(pair)).logps - pair_references(pair)).diff())
            for pair in unseen
        ]
    assert all(margin < 0 for margin in margins), margins


def _longer_chosen(model: Any, count: int, seed: int) -> list[PreferencePair]:
    """Random text, of which the longer is better, whatever it says."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(10, VOCAB_SIZE, (length,), generator=generator).tolist())

    pairs = [
        PreferencePair(
            key=key,
            adapter="tiny",
            source="local",
            prompt_ids=ids(6),
            chosen_ids=(*ids(14), STOP),
            rejected_ids=(*ids(7), STOP),
        )
        for key in range(1, count + 1)
    ]
    return [s for s in with_references(pairs, model) if isinstance(s, PreferencePair)]


# --- quanta that are cut at run time --------------------------------------------------------------


def test_a_cap_on_each_quantum_does_not_change_the_trajectory(
    model: Any, mixed: list[Sample], whole: list[StepReport]
) -> None:
    trainer = make_trainer(model, quantum_tokens=100_000, **ALL_TERMS)
    randomize_lora(trainer)
    trainer.set_anchor()
    caps = itertools.cycle((1, 200, 0, 70))
    reports = []
    for _ in range(STEPS):
        trainer.begin(mixed)
        report = None
        while report is None:
            report = trainer.run_quantum(next(caps))
        reports.append(report)
    assert_same_trajectory(reports, whole)


def test_a_cap_holds_for_one_quantum_and_what_was_shown_is_what_runs(
    model: Any, mixed: list[Sample]
) -> None:
    trainer = make_trainer(model, quantum_tokens=100_000)
    trainer.begin(mixed)
    whole_kl = trainer.next_quantum()
    assert whole_kl is not None
    capped_kl = trainer.next_quantum(1)
    assert capped_kl is not None
    assert (whole_kl.kind, capped_kl.kind) == ("kl", "kl")
    assert capped_kl.samples == 1 < whole_kl.samples
    trainer.run_quantum(1)
    rest = trainer.next_quantum()
    assert rest is not None
    assert rest.samples == whole_kl.samples - 1
    trainer.run_quantum()

    uncut = trainer.next_quantum()
    assert uncut is not None
    assert (uncut.kind, uncut.samples) == ("forward", len(mixed))
    cap = uncut.tokens // 2
    cut = trainer.next_quantum(cap)
    assert cut is not None
    assert 1 <= cut.samples < uncut.samples
    assert cut.tokens <= cap
    trainer.run_quantum(cap)
    backward = trainer.next_quantum(1)
    assert backward is not None
    assert (backward.kind, backward.samples, backward.tokens) == (
        "backward",
        cut.samples,
        cut.tokens,
    )


def test_a_cap_never_exceeds_what_is_configured(model: Any, pairs: list[Sample]) -> None:
    trainer = make_trainer(model, quantum_tokens=60)
    trainer.begin(pairs)
    assert trainer.next_quantum(100_000) == trainer.next_quantum()
    with pytest.raises(ValueError, match="max_tokens is -1"):
        trainer.next_quantum(-1)
    with pytest.raises(ValueError, match="max_tokens is -1"):
        trainer.run_quantum(-1)
    assert trainer.next_quantum() is not None


# --- what became of each sample -------------------------------------------------------------------


@pytest.mark.parametrize("quantum_tokens", [1, 100_000])
def test_the_losses_of_samples_are_those_of_each_alone_without_weights_and_further_terms(
    model: Any, mixed: list[Sample], quantum_tokens: int
) -> None:
    settings = ALL_TERMS | {"desirable_weight": 3.0, "undesirable_weight": 0.0}
    trainer = make_trainer(model, quantum_tokens=quantum_tokens, **settings)
    plain = make_trainer(model, quantum_tokens=quantum_tokens)
    for each in (trainer, plain):
        randomize_lora(each)
    report, alone = trainer.train_batch(mixed), plain.train_batch(mixed)
    assert {key for key, _ in report.sample_losses} == {sample.key for sample in mixed}
    losses, expected = dict(report.sample_losses), dict(alone.sample_losses)
    assert losses == pytest.approx(expected, rel=1e-5)
    # Without weights and terms the batch's loss is their mean.
    assert alone.loss == pytest.approx(sum(expected.values()) / len(mixed), rel=1e-5)
    assert len(set(losses.values())) == len(mixed)


def test_the_losses_of_fresh_samples_are_those_of_no_margin_and_no_ratio(
    model: Any, mixed: list[Sample]
) -> None:
    losses = dict(make_trainer(model).train_batch(mixed).sample_losses)
    for sample in mixed:
        expected = math.log(2) if isinstance(sample, PreferencePair) else 0.5
        assert losses[sample.key] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("quantum_tokens", [1, 100_000])
def test_what_was_made_of_samples_is_of_before_the_step(
    model: Any, mixed: list[Sample], quantum_tokens: int
) -> None:
    trainer = make_trainer(model, quantum_tokens=quantum_tokens, learning_rate=0.1)
    randomize_lora(trainer)
    before = {
        sample.key: [
            float(trainer._tree.logps(pack([group])).logps.detach()) for group in alone(sample)
        ]
        for sample in mixed
    }
    first, second = trainer.train_batch(mixed), trainer.train_batch(mixed)
    assert {key: list(found) for key, found in first.sample_logps} == {
        key: pytest.approx(found, rel=1e-5) for key, found in before.items()
    }
    changed = dict(second.sample_logps)
    assert all(changed[key] != found for key, found in first.sample_logps)


def alone(sample: Sample) -> list[Group]:
    """Each completion after its prompt."""
    return [
        Group(prompt_ids=sample.prompt_ids, completions=(completion,))
        for completion in completions_of(sample)
    ]


def test_a_loss_that_is_not_finite_gives_no_sample_losses(model: Any, pairs: list[Sample]) -> None:
    pair = pairs[1]
    assert isinstance(pair, PreferencePair)
    wild = replace(pair, ref_chosen_logp=1e38)
    assert make_trainer(model, loss="ipo").train_batch([pairs[0], wild]).sample_losses == ()


# --- the average of the weights -------------------------------------------------------------------


def published(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What a serving slot would get, by module and matrix."""
    modules = trainer.weights().modules
    return {f"{name}.{m}": getattr(pair, m) for name, pair in modules.items() for m in "ab"}


def raw(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The weights in training, likewise."""
    modules = trainer._tree.weights().modules
    return {f"{name}.{m}": getattr(pair, m) for name, pair in modules.items() for m in "ab"}


def test_what_is_published_is_the_corrected_exponential_average_of_the_weights_after_each_step(
    model: Any, pairs: list[Sample]
) -> None:
    decay = 0.7
    trainer, plain = make_trainer(model, average_decay=decay), make_trainer(model)
    steps: list[dict[str, torch.Tensor]] = []
    for n in range(1, 6):
        # Training itself is untouched by the average.
        assert trainer.train_batch(pairs) == plain.train_batch(pairs)
        steps.append(lora_of(plain))
        weights = [decay ** (n - i) for i in range(1, n + 1)]
        average = trainer.snapshot().tensors
        for name, last in steps[-1].items():
            stacked = torch.stack([step[name].double() for step in steps])
            expected = torch.einsum("n,n...->...", torch.tensor(weights).double(), stacked)
            expected /= sum(weights)
            mine = average[name.replace("lora/", "average/")]
            torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=1e-8)
            assert torch.equal(average[name], last)
    moved = [
        name
        for name, value in raw(trainer).items()
        if not torch.equal(published(trainer)[name], value)
    ]
    assert len(moved) > len(raw(trainer)) // 2


def test_without_averaging_the_last_step_is_published(model: Any, pairs: list[Sample]) -> None:
    trainer = make_trainer(model)
    for _ in range(2):
        trainer.train_batch(pairs)
    assert all(torch.equal(value, raw(trainer)[n]) for n, value in published(trainer).items())
    assert not any(name.startswith("average/") for name in trainer.snapshot().tensors)


def test_a_step_that_is_not_made_is_not_averaged(
    model: Any, pairs: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(model, average_decay=0.5)
    for _ in range(2):
        trainer.train_batch(pairs)
    before = published(trainer)
    with monkeypatch.context() as patch:
        patch.setattr(trainer._optimizer, "gradient_norm", lambda: math.inf)
        assert trainer.train_batch(pairs).skipped == "gradient_not_finite"
    assert all(torch.equal(value, before[name]) for name, value in published(trainer).items())


def test_the_average_is_what_is_saved_and_what_training_goes_on_from(
    model: Any, pairs: list[Sample], tmp_path: Path
) -> None:
    trainer = make_trainer(model, average_decay=0.8)
    for _ in range(4):
        trainer.train_batch(pairs)
    trainer.save_adapter(tmp_path / "a")
    other = make_trainer(model, seed=5, average_decay=0.8)
    other.train_batch(pairs)
    other.load_adapter(tmp_path / "a")
    for name, value in published(trainer).items():
        torch.testing.assert_close(published(other)[name], value, rtol=1e-6, atol=0)
        torch.testing.assert_close(raw(other)[name], value, rtol=1e-6, atol=0)
    other.train_batch(pairs)  # the average begins anew: after one step it is that step's weights
    assert all(torch.equal(value, raw(other)[n]) for n, value in published(other).items())


def test_a_reset_forgets_the_average(model: Any, pairs: list[Sample]) -> None:
    trainer, fresh = (make_trainer(model, average_decay=0.9) for _ in range(2))
    for _ in range(3):
        trainer.train_batch(pairs)
    trainer.reset()
    assert_same_state(trainer, fresh)
    assert not any(value.any() for name, value in published(trainer).items() if name.endswith("b"))


def test_the_leash_holds_to_the_average_that_was_published(model: Any, pairs: list[Sample]) -> None:
    trainer = make_trainer(model, average_decay=0.9, kl_weight=0.1)
    for _ in range(5):
        trainer.train_batch(pairs)
    average = trainer.weights()
    trainer.set_anchor()
    anchor = {n: v for n, v in trainer.snapshot().tensors.items() if n.startswith("anchor/")}
    for module, pair in average.modules.items():
        name = f"anchor/base_model.model.{module}.lora_A.default.weight"
        assert torch.equal(anchor[name], pair.a)
    first = pairs[0]
    assert isinstance(first, PreferencePair)
    packed = packed_pair(first)
    with torch.no_grad():
        held_to = trainer._tree.logps(packed, weights="anchor").logps
        trained = trainer._tree.logps(packed).logps
        averaged = make_trainer(model, kl_weight=0.1)
        averaged._load_lora({n.removeprefix("anchor/"): v for n, v in anchor.items()})
        expected = averaged._tree.logps(packed).logps
    torch.testing.assert_close(held_to, expected, rtol=1e-5, atol=1e-5)
    assert float((trained - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("through_json", [False, True])
def test_averaging_resumes_bit_for_bit(model: Any, mixed: list[Sample], through_json: bool) -> None:
    settings: dict[str, Any] = {"average_decay": 0.8, **ALL_TERMS}
    trainer = make_trainer(model, **settings)
    for _ in range(3):
        trainer.train_batch(mixed)
        trainer.set_anchor()
    other = make_trainer(model, seed=99, **settings)
    if through_json:
        tensors, values = trainer.state_dict()
        other.load_state_dict(tensors, json.loads(json.dumps(values)))
    else:
        state = trainer.snapshot()
        other.train_batch(mixed)
        other.restore(state)
    for _ in range(2):
        assert other.train_batch(mixed) == trainer.train_batch(mixed)
    assert_same_state(trainer, other)
    assert all(torch.equal(value, published(trainer)[n]) for n, value in published(other).items())


def test_a_state_from_before_averaging_is_taken_up_and_the_average_begins_there(
    model: Any, pairs: list[Sample]
) -> None:
    old = make_trainer(model)
    for _ in range(2):
        old.train_batch(pairs)
    trainer = make_trainer(model, average_decay=0.9)
    trainer.train_batch(pairs)
    trainer.restore(old.snapshot())
    assert all(torch.equal(value, published(old)[n]) for n, value in published(trainer).items())
    assert trainer.train_batch(pairs) == old.train_batch(pairs)
    assert all(torch.equal(value, published(old)[n]) for n, value in published(trainer).items())


def test_a_state_with_an_average_is_taken_up_where_none_is_wanted(
    model: Any, pairs: list[Sample]
) -> None:
    averaging, trainer = make_trainer(model, average_decay=0.9), make_trainer(model)
    for _ in range(3):
        averaging.train_batch(pairs)
    trainer.restore(averaging.snapshot())
    assert all(torch.equal(value, raw(averaging)[n]) for n, value in published(trainer).items())
    assert trainer.train_batch(pairs) == averaging.train_batch(pairs)


def test_weights_can_be_taken_while_a_batch_is_under_way(model: Any, pairs: list[Sample]) -> None:
    trainer, plain = (make_trainer(model, average_decay=0.9) for _ in range(2))
    for each in (trainer, plain):
        each.train_batch(pairs)
        each.train_batch(pairs)
    trainer.begin(pairs)
    trainer.run_quantum()
    before = published(trainer)
    trainer.set_anchor()
    report = None
    while report is None:
        report = trainer.run_quantum()
    assert report == plain.train_batch(pairs)
    assert any(not torch.equal(v, before[n]) for n, v in published(trainer).items())


# --- memory ---------------------------------------------------------------------------------------


def tensor_bytes() -> int:
    """What all tensors of this process take that Python knows of, each storage once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are asked for their class
        storages = [o.untyped_storage() for o in gc.get_objects() if type(o) in _TENSORS]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


_TENSORS = (torch.Tensor, torch.nn.Parameter)


@pytest.mark.parametrize("settings", [{}, {"average_decay": 0.9}, {"stop_alpha": 3.0}])
def test_it_knows_what_it_holds_and_lets_go_of_all_of_it(
    model: Any, mixed: list[Sample], settings: dict[str, Any]
) -> None:
    gc.collect()
    before = tensor_bytes()
    trainer = make_trainer(model, **settings)
    lora = sum(value.nbytes for value in lora_of(trainer).values())
    little = lora // 20  # rotary tables, step counts
    held = trainer.held_bytes()
    averages = int("average_decay" in settings)
    fixed = trainer._tree.fixed_bytes  # of the stop tokens
    assert (fixed > 0) == ("stop_alpha" in settings)
    assert held == fixed + (5 + averages) * lora  # weights, gradients, two moments, the initial
    assert held <= tensor_bytes() - before <= held + little
    trainer.train_batch(mixed)
    trainer.set_anchor()
    state = trainer.snapshot()
    held = trainer.held_bytes(state)
    assert held == 2 * fixed + (5 + 2 + 3 + 2 * averages) * lora  # the anchor has a fixed part too
    assert held <= tensor_bytes() - before <= held + little
    trainer.begin(mixed)
    trainer.run_quantum()
    del state
    trainer.close()
    assert tensor_bytes() - before <= little  # at once, although its modules are still there
    assert trainer.next_quantum() is None


def test_one_that_finds_no_memory_for_its_optimizer_leaves_nothing_behind(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(_optimizer: Any) -> None:
        raise torch.OutOfMemoryError("no room for moments")

    gc.collect()
    before = tensor_bytes()
    lora = sum(value.nbytes for value in lora_of(make_trainer(model)).values())
    gc.collect()
    monkeypatch.setattr(torch.optim.AdamW, "step", no_room)
    with pytest.raises(torch.OutOfMemoryError):
        make_trainer(model)
    assert tensor_bytes() - before < lora // 20


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other allocators have nothing that they are told"
)
def test_what_it_frees_goes_back_to_the_system(model: Any, mixed: list[Sample]) -> None:
    process = psutil.Process()

    def make() -> Trainer:
        trainer = make_trainer(model, lora_rank=2048)
        trainer.train_batch(mixed)
        return trainer

    make().close()  # from here on the allocator knows such sizes, and would keep them
    before = process.memory_info().rss
    trainer = make()
    held = trainer.held_bytes()
    assert held > 40 << 20
    assert process.memory_info().rss - before > 0.7 * held
    trainer.close()
    assert process.memory_info().rss - before < 0.3 * held


def pair_references(pair: PreferencePair) -> torch.Tensor:
    assert pair.ref_chosen_logp is not None
    assert pair.ref_rejected_logp is not None
    return torch.tensor([pair.ref_chosen_logp, pair.ref_rejected_logp])
