"""The flags of learning: one table from flag to setting, so that none is without one or the other.

Nothing here imports torch.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..runtime.learning.config import LOSSES, SAMPLE_PRIORITIES, LearningConfig


class _Flag(NamedTuple):
    """`setting` is "learning.group.field"; the default is the config's own."""

    flag: str
    setting: str
    type: Any
    metavar: str | None
    help: str
    choices: tuple[str, ...] | None = None


_FEEDBACK = (
    _Flag(
        "--response-retention-s",
        "learning.feedback.response_retention_s",
        float,
        "S",
        "how long an answer can be rated",
    ),
    _Flag(
        "--max-responses",
        "learning.feedback.max_responses",
        int,
        "N",
        "most answers that are kept for rating",
    ),
    _Flag(
        "--feedback-retention-s",
        "learning.feedback.event_retention_s",
        float,
        "S",
        "how long feedback is kept",
    ),
    _Flag(
        "--feedback-quota",
        "learning.feedback.quota_events",
        int,
        "N",
        "most events that one source may send within --feedback-quota-window-s",
    ),
    _Flag(
        "--max-pending-feedback",
        "learning.feedback.max_pending",
        int,
        "N",
        "most events that wait for the disk; further ones are refused",
    ),
    _Flag("--feedback-quota-window-s", "learning.feedback.quota_window_s", float, "S", "see there"),
)
_TRAINING = (
    _Flag("--loss", "learning.training.loss", str, None, "loss of preference pairs", LOSSES),
    _Flag("--beta", "learning.training.beta", float, "B", "how firmly the reference is held to"),
    _Flag(
        "--label-smoothing",
        "learning.training.label_smoothing",
        float,
        "SHARE",
        "share of labels that are believed to be wrong, below 0.5",
    ),
    _Flag(
        "--sft-weight", "learning.training.sft_weight", float, "W", "weight of likelihood of chosen"
    ),
    _Flag("--kl-weight", "learning.training.kl_weight", float, "W", "KL leash to the last version"),
    _Flag(
        "--desirable-weight",
        "learning.training.desirable_weight",
        float,
        "W",
        "weight of answers that were liked",
    ),
    _Flag(
        "--undesirable-weight",
        "learning.training.undesirable_weight",
        float,
        "W",
        "weight of answers that were disliked",
    ),
    _Flag(
        "--lora-rank",
        "learning.training.lora_rank",
        int,
        "R",
        "rank of the adapter that is trained",
    ),
    _Flag(
        "--lora-alpha", "learning.training.lora_alpha", float, "A", "its output is scaled by A / R"
    ),
    _Flag(
        "--lora-targets",
        "learning.training.target_modules",
        str,
        "NAMES",
        "which linear layers, separated by commas",
    ),
    _Flag(
        "--stop-alpha",
        "learning.training.stop_alpha",
        float,
        "A",
        "train also when to end an answer, by rank one on the output head, scaled by A; 0: not",
    ),
    _Flag("--learning-rate", "learning.training.learning_rate", float, "LR", "of AdamW"),
    _Flag(
        "--warmup-steps", "learning.training.warmup_steps", int, "N", "steps until the full rate"
    ),
    _Flag("--weight-decay", "learning.training.weight_decay", float, "W", "of AdamW"),
    _Flag(
        "--max-grad-norm",
        "learning.training.max_grad_norm",
        float,
        "NORM",
        "gradients are clipped to",
    ),
    _Flag(
        "--average-decay",
        "learning.training.average_decay",
        float,
        "DECAY",
        "candidates average the steps' weights, each counting this times the next; 0: the last",
    ),
    _Flag("--batch-size", "learning.training.batch_size", int, "N", "samples per optimizer step"),
    _Flag(
        "--batch-wait-s",
        "learning.training.batch_wait_s",
        float,
        "S",
        "how long a partial one waits",
    ),
    _Flag(
        "--checkpoint-steps",
        "learning.training.checkpoint_steps",
        int,
        "N",
        "optimizer steps between checkpoints",
    ),
    _Flag(
        "--quantum-tokens",
        "learning.training.quantum_tokens",
        int,
        "TOKENS",
        "most tokens of one forward or backward quantum",
    ),
    _Flag(
        "--max-training-length",
        "learning.training.max_length",
        int,
        "TOKENS",
        "longer feedback is refused",
    ),
    _Flag("--epochs", "learning.training.epochs", int, "N", "how often new feedback is trained on"),
    _Flag(
        "--replay-share",
        "learning.training.replay_share",
        float,
        "SHARE",
        "share of a batch that is earlier feedback, at least: it fills what new leaves",
    ),
    _Flag(
        "--replay-half-life",
        "learning.training.replay_half_life",
        int,
        "N",
        "replayed half as often when this many samples have come after",
    ),
    _Flag(
        "--sample-priority",
        "learning.training.sample_priority",
        str,
        None,
        "which of the new feedback is trained on first",
        SAMPLE_PRIORITIES,
    ),
    _Flag("--buffer-size", "learning.training.buffer_size", int, "N", "most recent samples in use"),
    _Flag(
        "--max-source-share",
        "learning.training.max_source_share",
        float,
        "SHARE",
        "most that one source may fill of a batch while others have samples; with --min-sources "
        "also of all that is trained on",
    ),
    _Flag(
        "--training-seed",
        "learning.training.seed",
        int,
        "N",
        "of the initial adapter and the order of samples",
    ),
    _Flag(
        "--training-threads",
        "learning.training.threads",
        int,
        "N",
        "intra-op threads of the training lane on a CPU",
    ),
)
_GATE = (
    _Flag(
        "--held-out-share",
        "learning.gate.held_out_share",
        float,
        "SHARE",
        "share of prompts that candidates are judged by, never trained on",
    ),
    _Flag(
        "--held-out-half-life",
        "learning.gate.half_life",
        int,
        "N",
        "a sample counts half as much when this many have come after",
    ),
    _Flag(
        "--min-held-out", "learning.gate.min_held_out", int, "N", "fewer, and nothing is published"
    ),
    _Flag(
        "--min-sources",
        "learning.gate.min_sources",
        int,
        "N",
        "fewer sources, and nothing is published; 3 where strangers can write. More than 1: see "
        "also --max-source-share",
    ),
    _Flag(
        "--max-held-out",
        "learning.gate.max_held_out",
        int,
        "N",
        "most recent ones that are asked, and as many new ones",
    ),
    _Flag(
        "--candidate-steps",
        "learning.gate.candidate_steps",
        int,
        "N",
        "optimizer steps per candidate",
    ),
    _Flag(
        "--candidate-wait-s",
        "learning.gate.candidate_wait_s",
        float,
        "S",
        "when no feedback is left, a candidate is made of fewer after this",
    ),
    _Flag(
        "--gate-confidence-z",
        "learning.gate.confidence_z",
        float,
        "Z",
        "standard errors by which a candidate must be better",
    ),
    _Flag(
        "--gate-refusal-z",
        "learning.gate.refusal_z",
        float,
        "Z",
        "standard errors by which a worse one is refused at once; between, it is undecided",
    ),
    _Flag(
        "--gate-patience",
        "learning.gate.patience",
        int,
        "N",
        "undecided candidates in a row that are trained further; 0: they are refused",
    ),
    _Flag(
        "--max-probe-increase",
        "learning.gate.max_probe_increase",
        float,
        "NATS",
        "most that the loss on ordinary text may rise, per token",
    ),
    _Flag(
        "--min-entropy-ratio",
        "learning.gate.min_entropy_ratio",
        float,
        "SHARE",
        "least entropy on it, of the base model's",
    ),
    _Flag(
        "--max-repetition",
        "learning.gate.max_repetition",
        float,
        "SHARE",
        "most repeated 4-grams beyond the base model's",
    ),
    _Flag(
        "--max-chosen-drop",
        "learning.gate.max_chosen_drop",
        float,
        "NATS",
        "most that chosen answers may lose against the base model, per token",
    ),
    _Flag(
        "--probe-file",
        "learning.gate.probe_file",
        Path,
        "FILE",
        "ordinary text for that, paragraphs separated by empty lines",
    ),
    _Flag(
        "--keep-versions",
        "learning.gate.keep_versions",
        int,
        "N",
        "versions kept on disk, of each outcome",
    ),
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
    "learning.feedback.record_responses": "--record-responses",
    "learning.train": "--training",
    "learning.gate.progressive": "--progressive-validation",
    "learning.warm_prefixes": "--warm-prefixes",
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
        "--warm-prefixes",
        action=argparse.BooleanOptionalAction,
        default=config.warm_prefixes,
        help="prefill the prefixes in use under a new version before it goes live (on)",
    )
    learning.add_argument(
        "--training",
        action=argparse.BooleanOptionalAction,
        default=config.train,
        help="off: feedback is stored, and nothing is trained on it (on)",
    )
    learning.add_argument(
        "--progressive-validation",
        action=argparse.BooleanOptionalAction,
        default=config.gate.progressive,
        help="judge candidates by new feedback too, asked before it is trained on (on)",
    )
    for title, flags in _TITLES.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            value = _default(config, flag.setting)
            group.add_argument(
                flag.flag,
                type=flag.type,
                default=value,
                metavar=flag.metavar,
                choices=flag.choices,
                help=f"{flag.help} ({_shown(flag.setting, value)})",
            )


def learning_config(args: argparse.Namespace) -> LearningConfig:
    """The settings from the flags of `add_learning_arguments`; not validated yet."""
    config = LearningConfig()
    given: dict[str, dict[str, Any]] = {
        "feedback": {"record_responses": args.record_responses},
        "training": {},
        "gate": {"progressive": args.progressive_validation},
    }
    for flag in (flag for flags in _TITLES.values() for flag in flags):
        _, group, field = flag.setting.split(".")
        given[group][field] = getattr(args, flag.flag.removeprefix("--").replace("-", "_"))
    changed = {group: replace(getattr(config, group), **values) for group, values in given.items()}
    return replace(
        config,
        enabled=args.learning,
        state_dir=args.state_dir,
        adapters=tuple(args.learning_adapters),
        train=args.training,
        warm_prefixes=args.warm_prefixes,
        **changed,
    )


def _default(config: LearningConfig, setting: str) -> Any:
    _, group, field = setting.split(".")
    return getattr(getattr(config, group), field)


def _shown(setting: str, value: object) -> str:
    if value is None:
        return {
            "learning.feedback.event_retention_s": "for ever",
            "learning.training.learning_rate": "0.256 / the model's hidden size",
            "learning.training.max_length": "the context length",
            "learning.gate.probe_file": "the one that comes with cotune",
        }[setting]
    return f"{value:g}" if isinstance(value, float) else str(value)
