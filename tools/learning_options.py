"""The flags of learning: one table from flag to setting, so that none is without one or the other.

Nothing here imports torch.
"""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..runtime.learning.config import LOSSES, LearningConfig


class _Flag(NamedTuple):
    """`setting` is "group.field"; the default is the config's own."""

    flag: str
    setting: str
    type: Any
    metavar: str | None
    help: str
    choices: tuple[str, ...] | None = None


_FEEDBACK = (
    _Flag(
        "--response-retention-s",
        "feedback.response_retention_s",
        float,
        "S",
        "how long an answer can be rated",
    ),
    _Flag(
        "--max-responses",
        "feedback.max_responses",
        int,
        "N",
        "most answers that are kept for rating",
    ),
    _Flag(
        "--feedback-retention-s",
        "feedback.event_retention_s",
        float,
        "S",
        "how long feedback is kept",
    ),
    _Flag(
        "--feedback-quota",
        "feedback.quota_events",
        int,
        "N",
        "most events that one source may send within --feedback-quota-window-s",
    ),
    _Flag("--feedback-quota-window-s", "feedback.quota_window_s", float, "S", "see there"),
)
_TRAINING = (
    _Flag("--loss", "training.loss", str, None, "loss of preference pairs", LOSSES),
    _Flag("--beta", "training.beta", float, "B", "how firmly the reference is held to"),
    _Flag(
        "--label-smoothing",
        "training.label_smoothing",
        float,
        "SHARE",
        "share of labels that are believed to be wrong, below 0.5",
    ),
    _Flag("--sft-weight", "training.sft_weight", float, "W", "weight of likelihood of chosen"),
    _Flag("--kl-weight", "training.kl_weight", float, "W", "KL leash to the last version"),
    _Flag("--lora-rank", "training.lora_rank", int, "R", "rank of the adapter that is trained"),
    _Flag("--lora-alpha", "training.lora_alpha", float, "A", "its output is scaled by A / R"),
    _Flag(
        "--lora-targets",
        "training.target_modules",
        str,
        "NAMES",
        "which linear layers, separated by commas",
    ),
    _Flag("--learning-rate", "training.learning_rate", float, "LR", "of AdamW"),
    _Flag("--warmup-steps", "training.warmup_steps", int, "N", "steps until the full rate"),
    _Flag("--weight-decay", "training.weight_decay", float, "W", "of AdamW"),
    _Flag("--max-grad-norm", "training.max_grad_norm", float, "NORM", "gradients are clipped to"),
    _Flag("--batch-size", "training.batch_size", int, "N", "samples per optimizer step"),
    _Flag("--batch-wait-s", "training.batch_wait_s", float, "S", "how long a partial one waits"),
    _Flag(
        "--quantum-tokens",
        "training.quantum_tokens",
        int,
        "TOKENS",
        "most tokens of one forward or backward quantum",
    ),
    _Flag(
        "--max-training-length",
        "training.max_length",
        int,
        "TOKENS",
        "longer feedback is refused",
    ),
    _Flag("--epochs", "training.epochs", int, "N", "how often new feedback is trained on"),
    _Flag(
        "--replay-share",
        "training.replay_share",
        float,
        "SHARE",
        "share of a batch that is earlier feedback",
    ),
    _Flag(
        "--replay-half-life",
        "training.replay_half_life",
        int,
        "N",
        "replayed half as often when this many samples have come after",
    ),
    _Flag("--buffer-size", "training.buffer_size", int, "N", "most recent samples in use"),
    _Flag(
        "--training-threads",
        "training.threads",
        int,
        "N",
        "intra-op threads of the training lane on a CPU",
    ),
)
_GATE = (
    _Flag(
        "--held-out-share",
        "gate.held_out_share",
        float,
        "SHARE",
        "share of prompts that candidates are judged by, never trained on",
    ),
    _Flag(
        "--held-out-half-life",
        "gate.half_life",
        int,
        "N",
        "counts half as much when this many held-out samples have come after",
    ),
    _Flag("--min-held-out", "gate.min_held_out", int, "N", "fewer, and nothing is published"),
    _Flag("--max-held-out", "gate.max_held_out", int, "N", "most recent ones that are asked"),
    _Flag("--candidate-steps", "gate.candidate_steps", int, "N", "optimizer steps per candidate"),
    _Flag(
        "--gate-confidence-z",
        "gate.confidence_z",
        float,
        "Z",
        "standard errors by which a candidate must be better",
    ),
    _Flag(
        "--max-probe-increase",
        "gate.max_probe_increase",
        float,
        "NATS",
        "most that the loss on ordinary text may rise, per token",
    ),
    _Flag(
        "--probe-file",
        "gate.probe_file",
        Path,
        "FILE",
        "ordinary text for that, paragraphs separated by empty lines",
    ),
    _Flag("--keep-versions", "gate.keep_versions", int, "N", "versions kept on disk"),
)
_TITLES = {
    "feedback (with --learning)": _FEEDBACK,
    "training (with --learning)": _TRAINING,
    "the gate (with --learning)": _GATE,
}
FLAG_OF_LEARNING_SETTING = {
    flag.setting: flag.flag for flags in _TITLES.values() for flag in flags
} | {
    "learning.enabled": "--learning",
    "learning.state_dir": "--state-dir",
    "learning.adapters": "--learning-adapters",
    "feedback.record_responses": "--record-responses",
}
"""Which flag sets a setting of learning, for errors about the setting."""


def add_learning_arguments(parser: argparse.ArgumentParser, *, default: bool) -> None:
    """Add everything that `learning_config` reads; `default` says whether learning is on."""
    config = LearningConfig()
    learning = parser.add_argument_group("learning")
    learning.add_argument(
        "--learning",
        action=argparse.BooleanOptionalAction,
        default=default,
        help="take feedback, train an adapter on it and publish what is better "
        f"({'on' if default else 'off'})",
    )
    learning.add_argument(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="where feedback, versions and checkpoints live (~/.local/state/cotune/MODEL)",
    )
    learning.add_argument(
        "--learning-adapters",
        nargs="+",
        default=[],
        metavar="NAME",
        help="further models that learn, each from the feedback on its own answers (none)",
    )
    learning.add_argument(
        "--record-responses",
        action=argparse.BooleanOptionalAction,
        default=config.feedback.record_responses,
        help="keep answers so that they can be rated by id (on)",
    )
    learning.add_argument(
        "--training",
        action=argparse.BooleanOptionalAction,
        default=config.train,
        help="off: feedback is stored, and nothing is trained on it (on)",
    )
    for title, flags in _TITLES.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            value = _default(config, flag.setting)
            group.add_argument(
                flag.flag,
                dest=_dest(flag.setting),
                type=flag.type,
                default=value,
                metavar=flag.metavar,
                choices=flag.choices,
                help=f"{flag.help} ({_shown(flag.setting, value)})",
            )


def learning_config(args: argparse.Namespace) -> LearningConfig:
    """The settings from the flags of `add_learning_arguments`; not validated yet."""
    config = LearningConfig()
    changed = {}
    for name in ("feedback", "training", "gate"):
        group = getattr(config, name)
        given = {
            field.name: getattr(args, _dest(f"{name}.{field.name}"))
            for field in fields(group)
            if hasattr(args, _dest(f"{name}.{field.name}"))
        }
        changed[name] = replace(group, **given)
    changed["feedback"] = replace(changed["feedback"], record_responses=args.record_responses)
    return replace(
        config,
        enabled=args.learning,
        state_dir=args.state_dir,
        adapters=tuple(args.learning_adapters),
        train=args.training,
        **changed,
    )


def _dest(setting: str) -> str:
    return f"learning_{setting.replace('.', '_')}"


def _default(config: LearningConfig, setting: str) -> Any:
    group, field = setting.split(".")
    return getattr(getattr(config, group), field)


def _shown(setting: str, value: object) -> str:
    if value is None:
        return {
            "feedback.event_retention_s": "for ever",
            "training.max_length": "the context length",
            "gate.probe_file": "the one that comes with cotune",
        }[setting]
    return f"{value:g}" if isinstance(value, float) else str(value)
