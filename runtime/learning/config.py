"""Every setting of learning, as frozen values: part of `RuntimeConfig`.

LearningConfig
├── feedback   FeedbackConfig   what is recorded and kept, quotas
├── training   TrainingConfig   loss, LoRA, optimizer, quanta
└── gate       GateConfig       when a candidate may go live
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path  # noqa: TC003 - annotations are inspected at run time

from ..errors import ConfigError

LOSSES = ("sigmoid", "robust", "ipo", "sigmoid_norm")
SAMPLE_PRIORITIES = ("none", "learnability", "loss")


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedbackConfig:
    """What feedback is taken and how long it is kept."""

    record_responses: bool = True
    """Keep finished responses, so that feedback by their id works."""
    response_retention_s: float = 7 * 86400.0
    """How long a response can be rated, in seconds."""
    max_responses: int = 100_000
    """Most recorded responses; the oldest go first."""
    event_retention_s: float | None = None
    """How long events and what was made of them are kept, in seconds (None: for ever)."""
    quota_events: int = 600
    """Most events that one source may send within `quota_window_s`."""
    quota_window_s: float = 60.0
    """The window of the quota, in seconds."""
    max_pending: int = 4096
    """Most events that wait to be written; further ones are refused."""

    def validate(self) -> None:
        """Raise `ConfigError` at the first wrong field."""
        _check(
            "learning.feedback.response_retention_s", self.response_retention_s, 0.0, is_open=True
        )
        _check("learning.feedback.max_responses", self.max_responses, 1)
        if self.event_retention_s is not None:
            _check("learning.feedback.event_retention_s", self.event_retention_s, 0.0, is_open=True)
        _check("learning.feedback.quota_events", self.quota_events, 1)
        _check("learning.feedback.quota_window_s", self.quota_window_s, 0.0, is_open=True)
        _check("learning.feedback.max_pending", self.max_pending, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """How candidates are trained."""

    loss: str = "sigmoid"
    """Of preference pairs: sigmoid (DPO), robust, ipo or sigmoid_norm (length-normalised)."""
    beta: float = 0.5
    """DPO temperature: how firmly the reference is held to. 0.1 is made for long answers."""
    label_smoothing: float = 0.0
    """Share of labels that are believed to be wrong; [0, 0.5). Used by sigmoid and robust."""
    sft_weight: float = 0.1
    """Weight of the mean negative log-likelihood of chosen completions, per token."""
    kl_weight: float = 0.0
    """Weight of the KL divergence to the last published version, per completion token."""
    desirable_weight: float = 1.0
    """KTO: weight of completions rated +1."""
    undesirable_weight: float = 1.0
    """KTO: weight of completions rated -1."""
    lora_rank: int = 4
    """R of every adapted linear layer."""
    lora_alpha: float = 4.0
    """The adapter's output is scaled by alpha / R."""
    target_modules: str = "all-linear"
    """Which linear layers: "all-linear", or names separated by commas."""
    stop_alpha: float = 0.0
    """Train also when to end an answer, by rank one on the output head, scaled by this; 0: not.

    Not to be set back to 0 while a version that was trained with it is live.
    """
    learning_rate: float | None = None
    """Of AdamW, after the warm-up (None: 0.256 / the model's hidden size; 6e-5 for 4096)."""
    warmup_steps: int = 10
    """Optimizer steps over which the rate rises from 0."""
    weight_decay: float = 5.0
    """Of AdamW, decoupled: each step takes learning_rate times this share of the adapter away."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    average_decay: float = 0.0
    """Candidates are an average of the weights after each step; a step counts this times as much
    as the one after it; [0, 1). 0: the last step's weights."""
    batch_size: int = 16
    """Samples per optimizer step."""
    batch_wait_s: float = 5.0
    """How long an incomplete batch of new samples waits for more, in seconds."""
    checkpoint_steps: int = 20
    """Optimizer steps between checkpoints of the training state."""
    quantum_tokens: int = 1024
    """Most tokens of one forward or backward quantum; a longer sample is a quantum of its own."""
    max_length: int | None = None
    """Most tokens of prompt plus completion that are trained on (None: the context length)."""
    epochs: int = 6
    """How often a sample is trained on as new, before it is left to replay."""
    replay_share: float = 0.25
    """Share of a batch that comes from earlier feedback, against forgetting; [0, 1).

    It is the least: earlier feedback fills the places that new feedback leaves.
    """
    sample_priority: str = "none"
    """Which of the new samples go first beside the least trained: those from which there is most
    to learn (learnability), those with the highest loss (loss), or any (none)."""
    replay_half_life: int = 40
    """A sample is replayed half as often when this many have come after it."""
    buffer_size: int = 4096
    """Most recent samples that are trained on or replayed."""
    max_source_share: float = 0.5
    """Most that one source may fill of a batch while others have samples.

    With `gate.min_sources` above 1 a source is also trained on at most share / (1 - share) times as
    many samples as all others together have: at 0.5 as many as they.
    """
    seed: int = 0
    """Of the initial adapter and of the order of samples."""
    threads: int = 1
    """Intra-op threads of the training lane on a CPU."""

    def validate(self) -> None:
        """Raise `ConfigError` at the first wrong field."""
        if self.loss not in LOSSES:
            raise _wrong("learning.training.loss", self.loss, f"use one of {', '.join(LOSSES)}")
        _check("learning.training.beta", self.beta, 0.0, is_open=True)
        _check(
            "learning.training.label_smoothing", self.label_smoothing, 0.0, 0.5, is_open_above=True
        )
        for name in ("sft_weight", "kl_weight", "desirable_weight", "undesirable_weight"):
            _check(f"learning.training.{name}", getattr(self, name), 0.0)
        _check("learning.training.lora_rank", self.lora_rank, 1)
        _check("learning.training.lora_alpha", self.lora_alpha, 0.0, is_open=True)
        _check("learning.training.stop_alpha", self.stop_alpha, 0.0)
        if self.learning_rate is not None:
            _check("learning.training.learning_rate", self.learning_rate, 0.0, is_open=True)
        _check("learning.training.warmup_steps", self.warmup_steps, 0)
        _check("learning.training.weight_decay", self.weight_decay, 0.0)
        _check("learning.training.max_grad_norm", self.max_grad_norm, 0.0, is_open=True)
        _check("learning.training.average_decay", self.average_decay, 0.0, 1.0, is_open_above=True)
        _check("learning.training.batch_size", self.batch_size, 1)
        _check("learning.training.batch_wait_s", self.batch_wait_s, 0.0)
        _check("learning.training.checkpoint_steps", self.checkpoint_steps, 1)
        _check("learning.training.quantum_tokens", self.quantum_tokens, 1)
        if self.max_length is not None:
            _check("learning.training.max_length", self.max_length, 2)
        _check("learning.training.epochs", self.epochs, 1)
        _check("learning.training.replay_share", self.replay_share, 0.0, 1.0, is_open_above=True)
        _check("learning.training.replay_half_life", self.replay_half_life, 1)
        if self.sample_priority not in SAMPLE_PRIORITIES:
            raise _wrong(
                "learning.training.sample_priority",
                self.sample_priority,
                f"use one of {', '.join(SAMPLE_PRIORITIES)}",
            )
        _check("learning.training.buffer_size", self.buffer_size, 1)
        _check("learning.training.max_source_share", self.max_source_share, 0.0, 1.0, is_open=True)
        _check("learning.training.threads", self.threads, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateConfig:
    """When a candidate is made, and when it may go live."""

    held_out_share: float = 0.2
    """Share of prompts whose feedback is never trained on; (0, 1). Chosen by a stable hash."""
    max_held_out: int = 96
    """Most recent held-out samples that a candidate is compared on, and as many new ones."""
    half_life: int = 60
    """A sample, held out or new, counts half as much when this many have come after it."""
    progressive: bool = True
    """Compare also on new samples, by what was made of them before they were trained on."""
    min_held_out: int = 8
    """Fewer than these and nothing is published."""
    min_sources: int = 1
    """Fewer sources than these and nothing is published; 3 or more where strangers can write.

    Above 1 `training.max_source_share` also bounds what is trained on of one source in all.
    """
    candidate_steps: int = 20
    """Optimizer steps between candidates, while there is new feedback."""
    candidate_wait_s: float = 10.0
    """After this long, in seconds, a candidate is made of fewer when no feedback is left."""
    confidence_z: float = 1.0
    """Standard errors by which a candidate must beat the live version; 1.64 is 95 %, one-sided."""
    refusal_z: float = 1.0
    """Standard errors by which one that is refused at once is worse; between, it is undecided."""
    patience: int = 10
    """Undecided candidates in a row that are trained further; the next one is refused. 0: none."""
    max_probe_increase: float = 0.3
    """Most that the loss on held-out text may rise above the base model's, in nats per token."""
    min_entropy_ratio: float = 0.5
    """Least entropy of next tokens on that text, as a share of the base model's."""
    max_repetition: float = 0.3
    """Most repeated 4-grams in what it writes, beyond the base model's share."""
    max_chosen_drop: float = 3.0
    """Most that chosen completions may lose against the base model, in nats per token."""
    probe_file: Path | None = None
    """A text file, paragraphs separated by empty lines (None: the one that comes with cotune)."""
    keep_versions: int = 20
    """Published versions kept on disk beside the live one and what is pinned; refused ones too."""

    def validate(self) -> None:
        """Raise `ConfigError` at the first wrong field."""
        _check(
            "learning.gate.held_out_share",
            self.held_out_share,
            0.0,
            1.0,
            is_open=True,
            is_open_above=True,
        )
        _check("learning.gate.max_held_out", self.max_held_out, 1)
        _check("learning.gate.half_life", self.half_life, 1)
        _check("learning.gate.min_held_out", self.min_held_out, 1)
        if self.min_held_out > self.max_held_out:
            raise _wrong(
                "learning.gate.min_held_out",
                self.min_held_out,
                "use at most learning.gate.max_held_out",
            )
        _check("learning.gate.min_sources", self.min_sources, 1)
        _check("learning.gate.candidate_steps", self.candidate_steps, 1)
        _check("learning.gate.candidate_wait_s", self.candidate_wait_s, 0.0)
        for name in ("confidence_z", "refusal_z", "max_probe_increase", "max_chosen_drop"):
            _check(f"learning.gate.{name}", getattr(self, name), 0.0)
        _check("learning.gate.patience", self.patience, 0)
        _check("learning.gate.min_entropy_ratio", self.min_entropy_ratio, 0.0, 1.0)
        _check("learning.gate.max_repetition", self.max_repetition, 0.0, 1.0)
        _check("learning.gate.keep_versions", self.keep_versions, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningConfig:
    """Learning from feedback."""

    enabled: bool = False
    """Take feedback, train on it and publish what is better."""
    state_dir: Path | None = None
    """Where feedback, versions and checkpoints live (None: ~/.local/state/cotune/MODEL)."""
    adapters: tuple[str, ...] = ()
    """Further names that learn, each from the feedback on its own answers (tenants)."""
    feedback: FeedbackConfig = field(default_factory=FeedbackConfig)
    """What feedback is taken and how long it is kept."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How candidates are trained."""
    gate: GateConfig = field(default_factory=GateConfig)
    """When a candidate is made, and when it may go live."""
    train: bool = True
    """Off: feedback is stored, and nothing is trained on it."""
    warm_prefixes: bool = True
    """Prefill the prefixes that are in use under a new version before it goes live."""

    def validate(self) -> None:
        """Raise `ConfigError` at the first wrong field."""
        if len(set(self.adapters)) != len(self.adapters):
            raise _wrong("learning.adapters", self.adapters, "name each adapter once")
        self.feedback.validate()
        self.training.validate()
        self.gate.validate()


def _check(
    name: str,
    value: float,
    low: float,
    high: float = math.inf,
    *,
    is_open: bool = False,
    is_open_above: bool = False,
) -> None:
    """Refuse what is not within [low, high]; either end may be excluded."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and math.isfinite(value):
        above = value > low if is_open else value >= low
        below = value < high if is_open_above else value <= high
        if above and below:
            return
    low_text = f"above {low:g}" if is_open else f"{low:g} or more"
    high_text = "" if high == math.inf else f", {'below' if is_open_above else 'at most'} {high:g}"
    raise _wrong(name, value, f"use a number {low_text}{high_text}")


def _wrong(name: str, value: object, remedy: str) -> ConfigError:
    return ConfigError(f"{name} is {value!r}; {remedy}", param=name, code="invalid_config")
