"""The trainer: preference optimisation of one LoRA adapter, cut into quanta that can be scheduled.

    begin(batch) ─► kl … ─► forward, backward, forward, backward … ─► step ─► StepReport

A quantum covers a bounded number of tokens and is run by `run_quantum`; between two of them
anything may happen, and within one the training thread stops at the safepoints. The gradient of a
batch is the sum of its parts' (objective.py), so the step does not depend on how the batch was cut.
KTO's reference point z0 needs the whole batch before the first loss: the "kl" quanta compute it,
without gradient, from completion i - 1 put to prompt i, cyclically among the rated samples.

A quantum that runs out of memory is dropped and run again over half the tokens. A sample that does
not fit alone is set aside and the batch begins again without it, so that what is learned is exactly
what the batch without it would teach. Where the loss or the gradient is not finite no step is made.

What is published is not always what is trained: with `average_decay` the adapter that the trainer
gives away (`weights`, `save_adapter`, the anchor) is an average over the last steps (average.py).
"""

from __future__ import annotations

import ctypes
import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence  # noqa: TC003 - dataclass fields are inspected
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from ..errors import AdapterLoadError, ConfigError, is_out_of_memory
from ..learning.samples import PreferencePair, RatedCompletion, Sample
from ..lora import read_lora
from .average import WeightAverage
from .batches import Group, pack
from .losses import kto_reference_point
from .objective import BatchCounts, PartLoss, Tally, completions_of, part_loss
from .optimizer import Optimizer
from .tree import StopLora, TrainingTree, lora_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from ..learning.config import TrainingConfig
    from ..lora import LoraPair, LoraWeights
    from .safepoints import Safepoints

logger = logging.getLogger(__name__)

QuantumKind: TypeAlias = Literal["kl", "forward", "backward", "step"]

_STATE_FORMAT = 1
# Of states that were written before there were such values.
_STATE_DEFAULTS: Mapping[str, object] = {"stop_alpha": 0.0, "stop_token_ids": []}
_MAX_FAILED_STEPS = 3
# The rate that was measured to be right at a hidden size of 256. What a change of an adapter does
# to a layer's output grows with the layer's width (Yang et al. 2022, "Tensor Programs V").
_RATE_TIMES_WIDTH = 0.256


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantum:
    """What `run_quantum` does next.

    Attributes:
        kind: "kl" (KTO's reference point), "forward", "backward" or "step".
        samples: how many samples it covers; for a step, those of the batch.
        tokens: the rows it computes, which cost is proportional to; 0 for a step.
    """

    kind: QuantumKind
    samples: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one batch did.

    Attributes:
        step: optimizer steps taken so far, this one included.
        loss: of the batch, all terms; NaN if it was not finite or no sample was left.
        chosen_reward, rejected_reward: mean implicit rewards (beta included) of the pairs; in a
            batch without pairs, of what was liked and disliked; None if there is none.
        margin: the first minus the second.
        reward_accuracy: share of samples on the right side: chosen above rejected, liked above 0,
            disliked below. Like the rewards, None where the loss is NaN.
        gradient_norm: before clipping; NaN where it was not computed.
        learning_rate: of this step.
        tokens: of the forwards that were trained on: every prompt once.
        samples: that were trained on.
        halvings: quanta that ran out of memory.
        set_aside: (key, reason) of samples that were left out: "out_of_memory", "too_long",
            "empty", "unknown_token" or "reference_not_finite".
        kl: mean KL(anchor || trained) per completion token in nats; None unless `kl_weight` is on.
        z0: KTO's reference point; None without rated samples.
        skipped: why no step was made and the weights are as before: "no_samples",
            "loss_not_finite", "gradient_not_finite" or "out_of_memory"; None if it was made.
        not_finite: keys of the samples whose loss was not finite, where that was the reason.
        sample_losses: (key, loss) of each sample that was trained on, as it was before the step:
            of the pair or the rating alone, without weights, SFT and KL. Empty where the loss is
            NaN.
        sample_logps: (key, summed log-probability of each completion), likewise: what the weights
            in training made of a sample before this step taught them.
    """

    step: int
    loss: float
    chosen_reward: float | None
    rejected_reward: float | None
    margin: float | None
    reward_accuracy: float | None
    gradient_norm: float
    learning_rate: float
    tokens: int
    samples: int
    halvings: int = 0
    set_aside: tuple[tuple[int, str], ...] = ()
    kl: float | None = None
    z0: float | None = None
    skipped: str | None = None
    not_finite: tuple[int, ...] = ()
    sample_losses: tuple[tuple[int, float], ...] = ()
    sample_logps: tuple[tuple[int, tuple[float, ...]], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class TrainerState:
    """All that training goes on from, between two batches.

    Attributes:
        tensors: float32 copies on the CPU: "lora/NAME", "exp_avg/NAME", "exp_avg_sq/NAME" and,
            where an anchor is set, "anchor/NAME"; where weights are averaged, "average/NAME".
        values: what else there is, as JSON.
    """

    tensors: Mapping[str, torch.Tensor]
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class _Forward:
    """A part of the batch between its forward and its backward: it holds the graph."""

    samples: tuple[int, ...]
    part: PartLoss


@dataclass(slots=True, eq=False)
class _Batch:
    """The batch under way. Its samples are named by their index in it.

    Attributes:
        mismatched: rated samples whose part of z0 is due.
        ratios: the log-ratios that z0 is the mean of.
        waiting: samples whose forward is due.
        forward: what the next backward is of.
        tally: of what went backward.
        not_finite: keys of the samples that ended the batch early.
        failed_steps: how often the step ran out of memory.
    """

    samples: Sequence[Sample]
    counts: BatchCounts
    set_aside: list[tuple[int, str]]
    halvings: int
    rated: list[int]
    mismatched: deque[int]
    waiting: deque[int]
    ratios: list[float] = field(default_factory=list)
    forward: _Forward | None = None
    tally: Tally = field(default_factory=Tally)
    not_finite: tuple[int, ...] = ()
    failed_steps: int = 0

    @property
    def z0(self) -> float | None:
        """KTO's reference point, once all "kl" quanta have run; None without rated samples."""
        if not self.ratios:
            return None
        return float(kto_reference_point(torch.tensor(self.ratios)))


class Trainer:
    """Owns the LoRA weights in training, their optimizer and the batch under way.

    Everything here runs on the training lane's thread. The model is not changed: the training tree
    is a second one over the same parameters.

    Args:
        model: the transformers causal LM that is served.
        config: loss, LoRA, optimizer and quanta.
        safepoints: where the thread waits while it is held.
        base_name: what saved adapters say they were trained on.
        max_length: most tokens of prompt plus one completion; longer samples are set aside.
        stop_token_ids: the tokens that end an answer, for `stop_alpha`.
        share_prompts: compute the prompt of a pair once. Off only to measure what it saves.
    """

    def __init__(
        self,
        model: Any,
        config: TrainingConfig,
        *,
        safepoints: Safepoints,
        base_name: str,
        max_length: int,
        stop_token_ids: Iterable[int],
        share_prompts: bool = True,
    ) -> None:
        self._model = model
        self._config = config
        self._base_name = base_name
        self._max_length = max_length
        self._share_prompts = share_prompts
        self._stop_token_ids = sorted(stop_token_ids) if config.stop_alpha else []
        self._tree = TrainingTree(
            model,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            target_modules=config.target_modules,
            seed=config.seed,
            safepoints=safepoints,
            base_name=base_name,
            stop=StopLora(alpha=config.stop_alpha, token_ids=tuple(self._stop_token_ids))
            if config.stop_alpha
            else None,
        )
        self._lora = self._tree.named_lora()
        self._parameters = list(self._lora.values())
        self._device = self._tree.device
        embeddings = model.get_input_embeddings()
        self._vocab_size = int(embeddings.num_embeddings)
        width = int(embeddings.embedding_dim)
        self._average: WeightAverage | None = None
        try:
            self._optimizer = Optimizer(
                self._lora,
                learning_rate=config.learning_rate or _RATE_TIMES_WIDTH / width,
                warmup_steps=config.warmup_steps,
                weight_decay=config.weight_decay,
                max_grad_norm=config.max_grad_norm,
            )
            if config.average_decay > 0:
                self._average = WeightAverage(self._lora, config.average_decay)
            self._initial = self._copy_lora()
        except BaseException:  # out of memory, say: what there is must not stay
            self._tree.close()
            raise
        self._anchor: dict[str, torch.Tensor] | None = None
        self._batch: _Batch | None = None
        self._limit_tokens = config.quantum_tokens
        self._out_of_memories = 0

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return self._optimizer.steps

    @property
    def out_of_memories(self) -> int:
        """Times that a quantum has run out of memory."""
        return self._out_of_memories

    def held_bytes(self, *states: TrainerState) -> int:
        """What it holds of its device's memory between two batches, these snapshots included.

        Weights, gradients, moments, the average and the anchor; on the CPU, where snapshots lie,
        the copies that it keeps there too.
        """
        copies = 4 if self._average is None else 5
        held = copies * sum(p.nbytes for p in self._parameters)
        held += self._tree.fixed_bytes + self._tree.anchor_bytes
        if self._device.type != "cpu":
            return held
        kept = (self._initial, self._anchor or {}, *(state.tensors for state in states))
        distinct = {id(tensor): tensor for part in kept for tensor in part.values()}
        return held + sum(tensor.nbytes for tensor in distinct.values())

    def close(self) -> None:
        """Let go of all memory, down to the device; drops the batch under way.

        Of no use afterwards.
        """
        self._batch = None
        self._optimizer.close()
        self._average, self._anchor, self._initial = None, None, {}
        self._parameters, self._lora = [], {}
        self._tree.close()
        _return_freed(self._device)

    # --- a batch ----------------------------------------------------------------------------------

    def begin(self, batch: Sequence[Sample]) -> None:
        """Take up a batch. What cannot be trained on is set aside at once, and reported.

        Raises:
            RuntimeError: another batch is under way.
            ValueError: the batch is empty, or a sample has no reference log-probabilities.
        """
        if self._batch is not None:
            raise RuntimeError("a batch is under way; run its quanta or abandon() it")
        if not batch:
            raise ValueError("the batch is empty; begin one of at least one sample")
        for sample in batch:
            if not sample.is_ready:
                raise ValueError(f"sample {sample.key} has no reference log-probabilities yet")
        reasons = [(sample, self._unfit(sample)) for sample in batch]
        fit = [sample for sample, reason in reasons if reason is None]
        set_aside = [(sample.key, reason) for sample, reason in reasons if reason is not None]
        self._begin(fit, set_aside, halvings=0)

    def next_quantum(self, max_tokens: int = 0) -> Quantum | None:
        """What `run_quantum` would do with this limit; None when no batch is under way.

        Args:
            max_tokens: most rows of this quantum, below what is configured; it holds one sample at
                least. 0: as configured. A backward is of what the forward before it computed, so
                it cannot be cut.
        """
        if max_tokens < 0:
            raise ValueError(f"max_tokens is {max_tokens}; give 1 or more, or 0 for no limit")
        batch = self._batch
        if batch is None:
            return None
        if batch.forward is not None:
            tokens = sum(batch.samples[i].tokens for i in batch.forward.samples)
            return Quantum(kind="backward", samples=len(batch.forward.samples), tokens=tokens)
        if batch.mismatched and not batch.not_finite:
            cost = self._mismatched_cost(batch)
            indices, tokens = self._take(batch.mismatched, cost, max_tokens)
            return Quantum(kind="kl", samples=len(indices), tokens=tokens)
        if batch.waiting and not batch.not_finite:
            indices, tokens = self._take(batch.waiting, self._forward_cost(batch), max_tokens)
            return Quantum(kind="forward", samples=len(indices), tokens=tokens)
        return Quantum(kind="step", samples=len(batch.samples), tokens=0)

    def run_quantum(self, max_tokens: int = 0) -> StepReport | None:
        """Run the next quantum; gives the report after the last one, the step.

        How a batch is cut does not change what it teaches. An exception other than running out of
        memory abandons the batch and is raised.

        Args:
            max_tokens: see `next_quantum`.

        Raises:
            RuntimeError: no batch is under way.
        """
        batch, quantum = self._batch, self.next_quantum(max_tokens)
        if batch is None or quantum is None:
            raise RuntimeError("no batch is under way; begin() one")
        try:
            match quantum.kind:
                case "kl":
                    self._run_mismatched(batch, max_tokens)
                case "forward":
                    self._run_forward(batch, max_tokens)
                case "backward":
                    self._run_backward(batch)
                case "step":
                    return self._run_step(batch)
        except BaseException as error:
            if not is_out_of_memory(error):
                self.abandon()
                raise
        else:
            return None
        # Outside of the handler: the traceback is gone, and with it the tensors that it held.
        self._halve(batch, quantum)
        return None

    def train_batch(self, batch: Sequence[Sample]) -> StepReport:
        """Run all quanta of a batch."""
        self.begin(batch)
        while (report := self.run_quantum()) is None:
            pass
        return report

    def abandon(self) -> None:
        """Drop the batch under way, if any: nothing of it is kept."""
        self._batch = None
        self._optimizer.clear()

    # --- weights ----------------------------------------------------------------------------------

    def weights(self) -> LoraWeights:
        """Copies of what would be published now, as a serving slot takes them."""
        return self._tree.weights(self._averaged)

    def save_adapter(self, path: Path) -> None:
        """Write what `weights` gives as a PEFT directory, which needs nothing of ours to load."""
        self._tree.save_adapter(path, self._averaged)

    def reset(self) -> None:
        """Start anew: the initial adapter, which changes nothing, and a fresh optimizer.

        The anchor stays; a batch under way is dropped.
        """
        self.abandon()
        self._load_lora(self._initial)
        self._optimizer.reset()
        if self._average is not None:
            self._average.reset()

    def load_adapter(self, path: Path) -> None:
        """Start from the weights of a PEFT directory, with a fresh optimizer.

        It may have fewer modules or a lower rank than is trained: what it lacks starts as in a new
        adapter, which changes nothing. The anchor stays; a batch under way is dropped.

        Raises:
            AdapterLoadError: it cannot be read, or has more than what is trained.
        """
        weights = read_lora(path, self._model, max_rank=self._config.lora_rank)
        values = dict(self._initial)
        scaling = self._config.lora_alpha / self._config.lora_rank
        for module, pair in weights.modules.items():
            name_a, name_b = lora_name(module, "A"), lora_name(module, "B")
            if name_a not in values:
                raise self._untrained(path, module)
            if module == self._tree.stop_path:
                values[name_a] = self._stop_vector(path, module, pair)
                continue
            rank = pair.a.shape[0]
            values[name_a], values[name_b] = values[name_a].clone(), values[name_b].clone()
            values[name_a][:rank] = pair.a
            values[name_b][:, :rank] = pair.b / scaling
        self.reset()
        self._load_lora(values)

    def _untrained(self, path: Path, module: str) -> AdapterLoadError:
        if self._model.get_submodule(module) is self._model.get_output_embeddings():
            why = (
                "learning.training.stop_alpha is 0; set it as it was, or roll back to a version "
                "before it was set"
            )
        else:
            targets = self._config.target_modules
            why = f"learning.training.target_modules ({targets!r}) does not name it; add it"
        return AdapterLoadError(
            f"{path} adapts {module}, which is not trained here: {why}",
            param="path",
            code="adapter_refused",
        )

    def _stop_vector(self, path: Path, module: str, pair: LoraPair) -> torch.Tensor:
        """A of an adapter of the stop tokens, under this trainer's alpha."""
        fixed = self._tree.stop_b
        scale = pair.b.max() / fixed.max()
        if len(pair.a) != 1 or not torch.allclose(pair.b, scale * fixed):
            raise AdapterLoadError(
                f"{path} adapts {module} otherwise than by one number for the tokens that end an "
                f"answer ({self._stop_token_ids}), which is all of it that is trained here; set "
                "the model's eos_token_id as it was, or roll back to a version without it",
                param="path",
                code="adapter_refused",
            )
        return pair.a * scale

    def set_anchor(self) -> None:
        """The KL leash holds from now on to what `weights` gives: it was published."""
        self._anchor = _copies(self._averaged or self._lora)
        self._tree.set_anchor(self._anchor)

    def clear_anchor(self) -> None:
        """The KL leash holds to the base model from now on."""
        self._tree.clear_anchor()
        self._anchor = None

    def snapshot(self) -> TrainerState:
        """Copies of weights, anchor and optimizer. A batch under way is no part of them."""
        tensors = {f"lora/{name}": value for name, value in self._copy_lora().items()}
        tensors |= self._optimizer.state()
        if self._anchor is not None:
            tensors |= {f"anchor/{name}": value for name, value in self._anchor.items()}
        values = self._identity() | {"steps": self.steps}
        if self._average is not None:
            values["averaged_steps"] = self._average.steps
            for name, value in _copies(self._average.values).items():
                tensors[f"average/{name}"] = value
        return TrainerState(tensors, values)

    def restore(self, state: TrainerState) -> None:
        """Go back to a snapshot, or on from a checkpoint; drops the batch under way.

        From one without an average, averaging begins anew; one that is not wanted is left out.

        Raises:
            ConfigError: it is of another adapter shape or format; nothing was changed.
        """
        self._check_state(state)
        self.abandon()
        tensors = state.tensors
        if anchor := _part(tensors, "anchor/"):
            self._anchor = _copies(anchor)
            self._tree.set_anchor(self._anchor)
        else:
            self.clear_anchor()
        self._load_lora(_part(tensors, "lora/"))
        self._optimizer.load(tensors, int(state.values["steps"]))
        if self._average is not None:
            average = _part(tensors, "average/")
            steps = int(state.values.get("averaged_steps", 0)) if average else 0
            self._average.load(average, steps)

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """`snapshot`, as a checkpoint file takes it: tensors, and values that JSON can hold."""
        state = self.snapshot()
        return dict(state.tensors), dict(state.values)

    def load_state_dict(
        self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]
    ) -> None:
        """`restore` from what `state_dict` gave. Raises as it does."""
        self.restore(TrainerState(tensors, values))

    # --- quanta -----------------------------------------------------------------------------------

    def _begin(
        self, samples: Sequence[Sample], set_aside: list[tuple[int, str]], *, halvings: int
    ) -> None:
        """Start, or start again without the samples that were set aside."""
        rated = [i for i, sample in enumerate(samples) if isinstance(sample, RatedCompletion)]
        self._optimizer.clear()
        self._batch = _Batch(
            samples=samples,
            counts=BatchCounts.of(samples),
            set_aside=set_aside,
            halvings=halvings,
            rated=rated,
            mismatched=deque(rated),
            waiting=deque(range(len(samples))),
        )

    def _run_mismatched(self, batch: _Batch, max_tokens: int) -> None:
        """Log-ratios of completions to other prompts than their own."""
        indices, _ = self._take(batch.mismatched, self._mismatched_cost(batch), max_tokens)
        packed = pack([self._mismatched(batch, i) for i in indices], self._device)
        with torch.no_grad():
            trained = self._tree.logps(packed, weights="trained").logps
            base = self._tree.logps(packed, weights="base").logps
        batch.ratios += (trained - base).tolist()
        _drop(batch.mismatched, len(indices))

    def _run_forward(self, batch: _Batch, max_tokens: int) -> None:
        """The objective on the next part of the batch, with its graph."""
        indices, _ = self._take(batch.waiting, self._forward_cost(batch), max_tokens)
        samples = [batch.samples[i] for i in indices]
        packed = pack([group for s in samples for group in self._groups(s)], self._device)
        with torch.enable_grad():
            completions = self._tree.logps(packed, kl_to_anchor=self._config.kl_weight > 0)
            part = part_loss(samples, completions, batch.counts, self._config, z0=batch.z0)
        if part.not_finite:
            batch.not_finite = part.not_finite
            return
        batch.forward = _Forward(indices, part)
        _drop(batch.waiting, len(indices))

    def _run_backward(self, batch: _Batch) -> None:
        """Add the part's gradient to the batch's: all of it, or nothing if memory runs out."""
        assert batch.forward is not None
        part = batch.forward.part
        gradients = torch.autograd.grad(part.loss, self._parameters, allow_unused=True)
        self._optimizer.accumulate(gradients)
        batch.tally += part.tally
        batch.forward = None

    def _run_step(self, batch: _Batch) -> StepReport:
        """Move the weights, unless something is not finite; ends the batch."""
        rate, norm, skipped = self._optimizer.learning_rate, math.nan, None
        if batch.not_finite:
            skipped = "loss_not_finite"
        elif not batch.samples:
            skipped = "no_samples"
        elif batch.failed_steps == _MAX_FAILED_STEPS:
            skipped = "out_of_memory"
        else:
            norm = self._optimizer.gradient_norm()
            if math.isfinite(norm):
                self._optimizer.step(norm)
                if self._average is not None:
                    self._average.update()
            else:
                skipped = "gradient_not_finite"
        if batch.halvings == 0:  # the memory was there: try larger quanta again
            self._limit_tokens = min(2 * self._limit_tokens, self._config.quantum_tokens)
        if skipped is not None:
            logger.warning("no step was made on a batch of %d: %s", len(batch.samples), skipped)
        self.abandon()
        is_whole = bool(batch.samples) and not batch.not_finite
        tally = batch.tally if is_whole else Tally(loss=math.nan)
        return StepReport(
            step=self.steps,
            loss=tally.loss,
            chosen_reward=tally.chosen_reward,
            rejected_reward=tally.rejected_reward,
            margin=tally.margin,
            reward_accuracy=tally.accuracy,
            gradient_norm=norm,
            learning_rate=rate,
            tokens=batch.counts.tokens,
            samples=batch.counts.samples,
            halvings=batch.halvings,
            set_aside=tuple(batch.set_aside),
            kl=tally.kl if is_whole and self._config.kl_weight > 0 else None,
            z0=batch.z0,
            skipped=skipped,
            not_finite=batch.not_finite,
            sample_losses=tally.losses,
            sample_logps=tally.logps,
        )

    def _halve(self, batch: _Batch, quantum: Quantum) -> None:
        """The quantum ran out of memory: plan it again, smaller, or without its only sample."""
        batch.halvings += 1
        self._out_of_memories += 1
        logger.info("a training quantum ran out of memory: %s", quantum)
        if quantum.kind == "step":  # it needs next to nothing, and changed nothing: try again
            batch.failed_steps += 1
            return
        if batch.forward is not None:
            batch.waiting.extendleft(reversed(batch.forward.samples))
            batch.forward = None
        if quantum.samples > 1:
            self._limit_tokens = max(1, quantum.tokens // 2)
            return
        index = batch.mismatched[0] if quantum.kind == "kl" else batch.waiting[0]
        set_aside = [*batch.set_aside, (batch.samples[index].key, "out_of_memory")]
        rest = [sample for i, sample in enumerate(batch.samples) if i != index]
        self._begin(rest, set_aside, halvings=batch.halvings)

    # --- parts of a batch -------------------------------------------------------------------------

    def _take(
        self, queue: Iterable[int], cost: Callable[[int], int], max_tokens: int = 0
    ) -> tuple[tuple[int, ...], int]:
        """The next samples, as many as the token limits allow but at least one; and their cost."""
        limit = min(self._limit_tokens, max_tokens) if max_tokens else self._limit_tokens
        taken: list[int] = []
        tokens = 0
        for index in queue:
            more = cost(index)
            if taken and tokens + more > limit:
                break
            taken.append(index)
            tokens += more
        return tuple(taken), tokens

    def _groups(self, sample: Sample) -> list[Group]:
        """How a sample is packed. Completions come in the order of `completions_of`."""
        completions = completions_of(sample)
        if self._share_prompts:
            return [Group(prompt_ids=sample.prompt_ids, completions=completions)]
        return [Group(prompt_ids=sample.prompt_ids, completions=(ids,)) for ids in completions]

    def _mismatched(self, batch: _Batch, index: int) -> Group:
        """This rated sample's prompt with the one before's completion, cut to `max_length`."""
        previous = batch.samples[batch.rated[batch.rated.index(index) - 1]]
        prompt_ids = batch.samples[index].prompt_ids
        (completion,) = completions_of(previous)
        return Group(
            prompt_ids=prompt_ids,
            completions=(completion[: self._max_length - len(prompt_ids)],),
        )

    def _mismatched_cost(self, batch: _Batch) -> Callable[[int], int]:
        """Rows of a "kl" quantum: one forward of the trained weights and one of the base model."""
        return lambda index: 2 * self._mismatched(batch, index).tokens

    def _forward_cost(self, batch: _Batch) -> Callable[[int], int]:
        """Rows of a forward: with a leash the anchor computes them as well."""
        passes = 2 if self._config.kl_weight > 0 else 1
        return lambda index: (
            passes * sum(group.tokens for group in self._groups(batch.samples[index]))
        )

    def _unfit(self, sample: Sample) -> str | None:
        """Why a sample cannot be trained on, or None."""
        completions = completions_of(sample)
        if not sample.prompt_ids or not all(completions):
            return "empty"
        if len(sample.prompt_ids) + max(map(len, completions)) > self._max_length:
            return "too_long"
        everything = (sample.prompt_ids, *completions)
        if min(map(min, everything)) < 0 or max(map(max, everything)) >= self._vocab_size:
            return "unknown_token"
        if not all(map(math.isfinite, _references(sample))):
            return "reference_not_finite"
        return None

    # --- state ------------------------------------------------------------------------------------

    @property
    def _averaged(self) -> Mapping[str, torch.Tensor] | None:
        """The average of the weights; None where they are published as they are."""
        return None if self._average is None else self._average.values

    def _copy_lora(self) -> dict[str, torch.Tensor]:
        return _copies(self._lora)

    @torch.no_grad()
    def _load_lora(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self._lora.items():
            parameter.copy_(tensors[name])

    def _identity(self) -> dict[str, Any]:
        """What a state must agree on with this trainer."""
        return {
            "format": _STATE_FORMAT,
            "base": self._base_name,
            "alpha": self._config.lora_alpha,
            "stop_alpha": self._config.stop_alpha,
            "stop_token_ids": self._stop_token_ids,
        }

    def _check_state(self, state: TrainerState) -> None:
        for name, mine in self._identity().items():
            theirs = state.values.get(name, _STATE_DEFAULTS.get(name))
            if theirs != mine:
                raise _mismatch(f"its {name} is {theirs!r}, this trainer's {mine!r}")
        steps = state.values.get("steps")
        if not isinstance(steps, int) or steps < 0:
            raise _mismatch(f"its steps are {steps!r}, which is no count")
        averaged = state.values.get("averaged_steps", 0)
        if not isinstance(averaged, int) or averaged < 0:
            raise _mismatch(f"its averaged_steps are {averaged!r}, which is no count")
        prefixes = ["lora/", "exp_avg/", "exp_avg_sq/"]
        prefixes += [p for p in ("anchor/", "average/") if _part(state.tensors, p)]
        expected = {p + name: value.shape for p in prefixes for name, value in self._lora.items()}
        found = {name: value.shape for name, value in state.tensors.items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                ours, theirs = expected.get(name), found.get(name)
                raise _mismatch(
                    f"its {name} has shape {theirs and tuple(theirs)}, this trainer's "
                    f"{ours and tuple(ours)}"
                )


def _return_freed(device: torch.device) -> None:
    """Give what was freed back to the device: allocators keep it for themselves."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)  # glibc's; measured without: of 264 MiB freed it kept all


def _references(sample: Sample) -> tuple[float, ...]:
    values: tuple[float | None, ...]
    if isinstance(sample, PreferencePair):
        values = sample.ref_chosen_logp, sample.ref_rejected_logp
    else:
        values = (sample.ref_logp,)
    return tuple(value for value in values if value is not None)


def _copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On the CPU."""
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}


def _part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Those whose names begin so, by the rest of their names."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _drop(queue: deque[int], count: int) -> None:
    for _ in range(count):
        queue.popleft()


def _mismatch(what: str) -> ConfigError:
    return ConfigError(
        f"this training state does not fit: {what}; use the settings that it was made with, or "
        "remove it to start anew",
        param="state",
        code="checkpoint_mismatch",
    )
