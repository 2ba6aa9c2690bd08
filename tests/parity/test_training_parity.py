"""Training against TRL 1.16, and against the papers' formulas in float64.

On the same weights, adapter and samples, our loss, rewards and LoRA gradients equal those of TRL's
DPOTrainer and KTOTrainer within 1e-5, relative, in float32 (a gradient: of its norm, matrix by
matrix). TRL pads and runs every sequence whole; ours is packed, shares prompts and comes in several
quanta. The second oracle is peft's model in float64, one sequence at a time, under the formula
written out again; it tells which of the two is off, should they ever differ.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cotune.runtime.learning.config import TrainingConfig
from cotune.runtime.learning.samples import PreferencePair, RatedCompletion, Sample
from cotune.runtime.training.safepoints import Safepoints
from cotune.runtime.training.trainer import StepReport, Trainer
from tiny_models import quiet_transformers, tiny_model, tiny_tokenizer
from training_samples import random_pair, random_rated, randomize_lora, with_references

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

# Each with the seed of an adapter under which KTO's reference point is above 0.
FAMILIES = {"llama": 24, "qwen3": 24, "gemma2": 22}
RTOL = 1e-5
RANK, ALPHA, BETA = 4, 8.0, 0.1

PAIR_LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss": "sigmoid"},
    "robust": {"loss": "robust", "label_smoothing": 0.15},
    "ipo": {"loss": "ipo"},
    "sigmoid_norm": {"loss": "sigmoid_norm"},
    "sigmoid+sft": {"loss": "sigmoid", "sft_weight": 0.4},
}
WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.75}


class Case:
    """A tiny model, its samples with references, and TRL's trainers of the same model."""

    def __init__(self, family: str, directory: Path) -> None:
        self.model = tiny_model(family)
        self._lora_seed = FAMILIES[family]
        pairs = with_references([random_pair(i) for i in range(5)], self.model)
        self.pairs = [s for s in pairs if isinstance(s, PreferencePair)]
        drawn = [random_rated(i, is_desirable=i % 3 != 1) for i in range(5)]
        rated = with_references(drawn, self.model)
        self.rated = [s for s in rated if isinstance(s, RatedCompletion)]
        self.dpo = trl_trainer("DPO", self.model, directory)
        self.kto = trl_trainer("KTO", self.model, directory, **WEIGHTS)
        self.float64 = peft_model(self.model, torch.float64)

    def ours(self, **settings: Any) -> Trainer:
        plain = {"sft_weight": 0.0, "weight_decay": 0.0, "quantum_tokens": 40}
        shape = {"lora_rank": RANK, "lora_alpha": ALPHA, "beta": BETA}
        config = TrainingConfig(**(plain | shape | settings))
        trainer = Trainer(
            self.model,
            config,
            safepoints=Safepoints(),
            base_name="tiny",
            max_length=64,
            stop_token_ids=(),
        )
        randomize_lora(trainer, self._lora_seed)
        return trainer


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp("trl"))


def lora_config() -> Any:
    import peft

    return peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def peft_model(model: Any, dtype: torch.dtype) -> Any:
    import peft

    with quiet_transformers():
        adapted = peft.get_peft_model(copy.deepcopy(model).to(dtype), lora_config())
    return adapted.to(dtype).eval()


def trl_trainer(kind: str, model: Any, directory: Path, **settings: Any) -> Any:
    """TRL's trainer around a copy of the model. Its data set is a formality: batches are given."""
    with quiet_transformers():
        import trl
        from datasets import Dataset

        row = {"prompt": "the cat", "chosen": " sat", "rejected": " ran"}
        if kind == "KTO":
            row = {"prompt": "the cat", "completion": " sat", "label": True}  # type: ignore[dict-item]
        config = getattr(trl, f"{kind}Config")(
            output_dir=str(directory / kind),
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=8,
            beta=BETA,
            disable_tqdm=True,
            **settings,
        )
        return getattr(trl, f"{kind}Trainer")(
            model=copy.deepcopy(model),
            args=config,
            train_dataset=Dataset.from_list([row] * 2),
            processing_class=tiny_tokenizer(),
            peft_config=lora_config(),
        )


# --- the same batch, three times ------------------------------------------------------------------


def run_ours(
    trainer: Trainer, batch: Iterable[Sample]
) -> tuple[StepReport, dict[str, torch.Tensor]]:
    """The report of the step, and the gradients before it."""
    trainer.begin(list(batch))
    forwards = 0
    while (quantum := trainer.next_quantum()) is not None and quantum.kind != "step":
        forwards += quantum.kind == "forward"
        trainer.run_quantum()
    assert forwards > 1
    gradients = {n: p.grad.clone() for n, p in trainer._lora.items() if p.grad is not None}
    report = trainer.run_quantum()
    assert report is not None
    return report, gradients


def load_lora(model: Any, trainer: Trainer) -> dict[str, Any]:
    """Give peft's model our adapter; its parameters by name."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert parameters.keys() == trainer._lora.keys()
    for name, parameter in parameters.items():
        parameter.data.copy_(trainer._lora[name].detach())
        parameter.grad = None
    return parameters


def run_trl(trl_trainer: Any, ours: Trainer, rows: list[dict[str, Any]]) -> tuple[Any, Any, Any]:
    """TRL's loss, gradients and metrics."""
    parameters = load_lora(trl_trainer.model, ours)
    trl_trainer._metrics["train"].clear()
    trl_trainer._metrics["eval"].clear()
    with quiet_transformers():
        trl_trainer.model.train()
        loss = trl_trainer.compute_loss(trl_trainer.model, trl_trainer.data_collator(rows))
        loss.backward()
    metrics = {name: values[-1] for name, values in trl_trainer._metrics["train"].items()}
    return float(loss.detach()), {n: p.grad for n, p in parameters.items()}, metrics


def assert_same_gradients(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        expected = theirs[name].double()
        assert float(expected.norm()) > 1e-6, name
        error = float((gradient.double() - expected).norm() / expected.norm())
        assert error < RTOL, f"{name}: {error:.1e}"


def close(value: float) -> Any:
    return pytest.approx(value, rel=RTOL, abs=RTOL * BETA)


def pair_rows(pairs: Iterable[PreferencePair]) -> list[dict[str, Any]]:
    return [
        {
            "prompt_ids": list(pair.prompt_ids),
            "chosen_ids": list(pair.chosen_ids),
            "rejected_ids": list(pair.rejected_ids),
        }
        for pair in pairs
    ]


def rated_rows(rated: list[RatedCompletion]) -> list[dict[str, Any]]:
    return [
        {
            "prompt_ids": list(sample.prompt_ids),
            "completion_ids": list(sample.completion_ids),
            "KL_completion_ids": list(rated[i - 1].completion_ids),
            "label": sample.is_desirable,
        }
        for i, sample in enumerate(rated)
    ]


# --- pairs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_pairs_train_as_with_trl(case: Case, name: str) -> None:
    settings = PAIR_LOSSES[name]
    trainer = case.ours(**settings)
    case.dpo.loss_types = [settings["loss"]]
    case.dpo.loss_weights = [1.0]
    case.dpo.label_smoothing = settings.get("label_smoothing", 0.0)
    if "sft_weight" in settings:
        case.dpo.loss_types.append("sft")
        case.dpo.loss_weights.append(settings["sft_weight"])
    loss, gradients, metrics = run_trl(case.dpo, trainer, pair_rows(case.pairs))
    report, mine = run_ours(trainer, case.pairs)
    assert report.loss == close(loss)
    assert report.chosen_reward == close(metrics["rewards/chosen"])
    assert report.rejected_reward == close(metrics["rewards/rejected"])
    assert report.margin == close(metrics["rewards/margins"])
    assert report.reward_accuracy == pytest.approx(metrics["rewards/accuracies"])
    assert_same_gradients(mine, gradients)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_pairs_train_as_the_formula_in_float64_says(case: Case, name: str) -> None:
    settings = PAIR_LOSSES[name]
    trainer = case.ours(**settings)
    parameters = load_lora(case.float64, trainer)
    loss = float64_pair_loss(case.float64, case.pairs, **settings)
    loss.backward()
    report, mine = run_ours(trainer, case.pairs)
    assert report.loss == close(float(loss.detach()))
    assert_same_gradients(mine, {n: p.grad for n, p in parameters.items()})


def float64_pair_loss(
    model: Any,
    pairs: list[PreferencePair],
    *,
    loss: str,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
) -> torch.Tensor:
    losses, chosen_rows = [], []
    for pair in pairs:
        chosen = token_logps(model, pair.prompt_ids, pair.chosen_ids)
        rejected = token_logps(model, pair.prompt_ids, pair.rejected_ids)
        with model.disable_adapter(), torch.no_grad():
            ref_chosen = token_logps(model, pair.prompt_ids, pair.chosen_ids)
            ref_rejected = token_logps(model, pair.prompt_ids, pair.rejected_ids)
        total = (chosen - ref_chosen).sum() - (rejected - ref_rejected).sum()
        normed = (chosen - ref_chosen).mean() - (rejected - ref_rejected).mean()
        right, wrong = torch.sigmoid(BETA * total).log(), torch.sigmoid(-BETA * total).log()
        losses.append(
            {
                "sigmoid": -(1 - label_smoothing) * right - label_smoothing * wrong,
                "robust": (label_smoothing * wrong - (1 - label_smoothing) * right)
                / (1 - 2 * label_smoothing),
                "ipo": (normed - 1 / (2 * BETA)) ** 2,
                "sigmoid_norm": -torch.sigmoid(BETA * normed).log(),
            }[loss]
        )
        chosen_rows.append(chosen)
    return torch.stack(losses).mean() - sft_weight * torch.cat(chosen_rows).mean()


def token_logps(model: Any, prompt_ids: Any, completion_ids: Any) -> torch.Tensor:
    ids = torch.tensor([[*prompt_ids, *completion_ids]])
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(completion_ids)), torch.tensor(completion_ids)]


# --- rated completions ----------------------------------------------------------------------------


def test_rated_completions_train_as_with_trl(case: Case) -> None:
    trainer = case.ours(**WEIGHTS)
    loss, gradients, metrics = run_trl(case.kto, trainer, rated_rows(case.rated))
    report, mine = run_ours(trainer, case.rated)
    assert metrics["kl"] > 0.1  # else it is cut off at 0 and compares nothing
    assert report.z0 == pytest.approx(metrics["kl"], rel=RTOL, abs=1e-5)
    assert report.loss == close(loss)
    assert report.chosen_reward == close(metrics["rewards/chosen"])
    assert report.rejected_reward == close(metrics["rewards/rejected"])
    assert report.margin == close(metrics["rewards/margins"])
    assert_same_gradients(mine, gradients)


def test_rated_completions_and_mixed_batches_train_as_the_formula_in_float64_says(
    case: Case,
) -> None:
    trainer = case.ours(**WEIGHTS, sft_weight=0.3)
    model = case.float64
    parameters = load_lora(model, trainer)
    rated_loss, z0 = float64_kto_loss(model, case.rated)
    pairs = case.pairs[:3]
    pairs_loss = float64_pair_loss(model, pairs, loss="sigmoid", sft_weight=0.3)
    n, total = len(pairs), len(pairs) + len(case.rated)
    loss = pairs_loss * n / total + rated_loss * (total - n) / total
    loss.backward()
    mixed: list[Sample] = [*case.rated[:2], *pairs, *case.rated[2:]]
    report, mine = run_ours(trainer, mixed)
    assert report.z0 == pytest.approx(z0, rel=RTOL, abs=1e-5)
    assert report.loss == close(float(loss.detach()))
    assert_same_gradients(mine, {n: p.grad for n, p in parameters.items()})


def float64_kto_loss(model: Any, rated: list[RatedCompletion]) -> tuple[torch.Tensor, float]:
    def ratio(prompt_ids: Any, completion_ids: Any) -> torch.Tensor:
        with model.disable_adapter(), torch.no_grad():
            reference = token_logps(model, prompt_ids, completion_ids)
        return (token_logps(model, prompt_ids, completion_ids) - reference).sum()

    with torch.no_grad():
        others = [ratio(s.prompt_ids, rated[i - 1].completion_ids) for i, s in enumerate(rated)]
        z0 = torch.stack(others).mean().clamp(min=0)
    losses = []
    for sample in rated:
        z = BETA * (ratio(sample.prompt_ids, sample.completion_ids) - z0)
        if sample.is_desirable:
            losses.append(WEIGHTS["desirable_weight"] * (1 - torch.sigmoid(z)))
        else:
            losses.append(WEIGHTS["undesirable_weight"] * (1 - torch.sigmoid(-z)))
    return torch.stack(losses).mean(), float(z0)
