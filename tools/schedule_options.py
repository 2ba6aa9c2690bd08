"""The flags of scheduling: the policy, its targets and its constants, each with its setting.

The flag of a constant is its name in `PolicySettings`: ``gamma`` is ``--gamma``, ``slack_use`` is
``--slack-use``. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, get_args

from ..policy import POLICY_NAMES
from ..policy.settings import PolicySettings, TrainingSignal
from ..runtime.config import ScheduleConfig

if TYPE_CHECKING:
    import argparse

_CONSTANTS: Final = {
    "gamma": ("G", "seconds of waiting that a batch's signal is worth; 0 leaves it out"),
    "delta_decode_s": ("S", "seconds of waiting that a decode begins with"),
    "delta_prefill_s": ("S", "seconds of waiting that a prompt begins with"),
    "delta_training_s": ("S", "seconds of waiting that a training quantum begins with"),
    "lambda_memory": ("W", "mace: weight of the memory fit in its packing"),
    "lambda_latency": ("W", "mace: weight of the latency fit in its packing"),
    "training_signal": (None, "cotune: what tells one batch to train on from another"),
    "training_floor": ("SHARE", "cotune: training has at least this share, whatever the deadlines"),
    "training_ceiling": ("SHARE", "cotune: while anybody waits, training has at most this share"),
    "slack_use": ("SHARE", "cotune: share of the time to the nearest deadline that is made use of"),
    "min_chunk_tokens": ("TOKENS", "cotune, mace: smallest piece that a prompt is cut into"),
    "prefill_floor": ("SHARE", "cotune: prompts may always take this much of the decodes' time"),
    "iteration_ttft_share": ("SHARE", "cotune: longest iteration, of the TTFT target"),
    "late_step": ("N", "cotune: a prompt that is too late stands this many TTFT targets later"),
    "queue_use": ("SHARE", "cotune: training waits where prompts need more of their time"),
    "prefix_patience_s": ("S", "cotune: longest wait for a prefix that another is computing"),
    "quantum_slack": ("N", "cotune: longest quantum beside answers, in TBT targets"),
    "packing_bins": ("N", "mace: iterations that are packed at once"),
    "packing_window": ("N", "mace: prompts that are looked at"),
    "periodic_window_s": ("S", "periodic: length of a window"),
    "periodic_share": ("SHARE", "periodic: share of each window in which batches may begin"),
}
"""Field of `PolicySettings` to metavar and help."""
_CHOICES: Final = {"training_signal": get_args(TrainingSignal)}


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


FLAG_OF_SCHEDULE_SETTING: Final = {
    "schedule.policy": "--policy",
    "schedule.ttft_target_s": "--ttft-target-ms",
    "schedule.tbt_target_s": "--tbt-target-ms",
    "schedule.profile": "--profile",
} | {f"schedule.settings.{field}": _flag(field) for field in _CONSTANTS}
"""Which flag sets a setting of scheduling, for errors about the setting."""


def add_schedule_arguments(parser: argparse.ArgumentParser) -> None:
    """Add everything that `schedule_config` reads."""
    config = ScheduleConfig()
    scheduling = parser.add_argument_group("scheduling")
    scheduling.add_argument(
        "--policy",
        choices=POLICY_NAMES,
        default=config.policy,
        help="what plans the iterations (%(default)s)",
    )
    for name, text in (("ttft", "time to first token"), ("tbt", "time between tokens")):
        scheduling.add_argument(
            f"--{name}-target-ms",
            type=float,
            metavar="MS",
            help=f"target for the {text} of interactive requests (from the profile)",
        )
    scheduling.add_argument(
        "--profile",
        default=config.profile,
        metavar="WHAT",
        help="what work costs here: auto measures at the first start and keeps it, off learns "
        "while serving alone, FILE is one of `cotune profile --output` (%(default)s)",
    )
    constants = parser.add_argument_group("constants of the policies")
    for field, (metavar, text) in _CONSTANTS.items():
        value = getattr(config.settings, field)
        shown = f"{value:g}" if isinstance(value, float) else value
        constants.add_argument(
            _flag(field),
            type=type(value),
            default=value,
            metavar=metavar,
            choices=_CHOICES.get(field),
            help=f"{text} ({shown})",
        )


def schedule_config(args: argparse.Namespace, **others: Any) -> ScheduleConfig:
    """The settings from the flags of `add_schedule_arguments`; not validated yet.

    `others` are those that other flags set.
    """
    return ScheduleConfig(
        policy=args.policy,
        ttft_target_s=_seconds(args.ttft_target_ms),
        tbt_target_s=_seconds(args.tbt_target_ms),
        profile=args.profile,
        settings=replace(PolicySettings(), **{field: getattr(args, field) for field in _CONSTANTS}),
        **others,
    )


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3
