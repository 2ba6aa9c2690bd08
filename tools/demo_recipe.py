"""What defines a run of `cotune train-demo`: sizes of the model, settings, schedule. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..runtime.errors import ConfigError

CHECKPOINT_FILE = "checkpoint.pt"
TRUNK_FILE = "trunk.pt"
TOKENIZER_FILE = "tokenizer.json"


class TrainingError(ConfigError):
    """The run cannot start or go on as asked; the message names the option to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of the Llama model; the defaults are the demo model."""

    vocab_size: int = 4096
    hidden_size: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    ffn_size: int = 688
    max_positions: int = 2048
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """What defines a run besides its length; a resumed run must have the same values."""

    seed: int = 1
    batch_tokens: int = 8192
    """Tokens of one optimizer step; a multiple of every sequence length."""
    warmup_steps: int = 100
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    weight_decay: float = 0.05
    """Decoupled, of the hidden matrices."""
    grad_clip: float = 1.0
    stable_lengths: tuple[int, ...] = (512,)
    decay_lengths: tuple[int, ...] = (512, 1024, 512, 2048)
    """Sequence lengths, in turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What one optimizer step trains on, and how fast."""

    length: int
    scale: float
    """Factor on both learning rates, in (0, 1]."""
    is_decay: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Warm-up, stable, decay (Hu et al. 2024, MiniCPM, §4) for `tokens` tokens."""

    settings: TrainSettings
    tokens: int
    decay_fraction: float = 0.3
    """Part of the tokens over which the learning rate falls to zero."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return max(1, self.tokens // self.settings.batch_tokens)

    @property
    def decay_start(self) -> int:
        """The first step of the decay."""
        return self.total_steps - round(self.total_steps * self.decay_fraction)

    def stage(self, step: int) -> Stage:
        """The stage of step `step`, counted from 0."""
        is_decay = step >= self.decay_start
        scale = min(1.0, (step + 1) / max(1, self.settings.warmup_steps))
        if is_decay:
            scale *= (self.total_steps - step) / (self.total_steps - self.decay_start + 1)
            lengths = self.settings.decay_lengths
            return Stage(
                length=lengths[(step - self.decay_start) % len(lengths)], scale=scale, is_decay=True
            )
        lengths = self.settings.stable_lengths
        return Stage(length=lengths[step % len(lengths)], scale=scale, is_decay=False)
