"""The constants of the policies: every one a setting, none of them hidden in the code.

The paper publishes none of its constants; these are ours. `queue_use` and `late_step` were chosen
by replaying arrivals at 40 to 100 % of what a device can serve, in virtual time; what each of the
others trades is said beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

TrainingSignal: TypeAlias = Literal["learnability", "loss"]
"""What tells one batch from another: how much there is to learn from it, or its loss alone."""


class SettingError(ValueError):
    """A setting is out of range.

    Attributes:
        field: its name in `PolicySettings`.
        message: what is wrong with it, its value and the remedy.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySettings:
    """What the policies take into account, and how much. `validate` says what is in range.

    Priorities are in seconds of waiting: a task of priority 8 stands as one that has waited for 8
    seconds. The targets for TTFT and TBT are not here but in `Budgets`.
    """

    gamma: float = 5.0
    """Seconds of waiting that a batch's signal is worth, per nat of loss under `mace` and per unit
    of the bounded signal under `cotune`. 0: all batches count alike (the paper's ablation)."""
    delta_decode_s: float = 20.0
    """δ of a decode: the seconds of waiting that it begins with. Decodes run whatever it says; it
    decides how long training has to have waited before it may make one late."""
    delta_prefill_s: float = 10.0
    """δ of a prompt."""
    delta_training_s: float = 0.0
    """δ of a training quantum."""
    lambda_memory: float = 0.5
    """λ1: weight of the memory fit in the packing of `mace`."""
    lambda_latency: float = 0.5
    """λ2: weight of the latency fit in the packing of `mace`."""
    training_signal: TrainingSignal = "learnability"
    """What gamma weighs under `cotune`; `mace` takes the loss, as the paper does."""
    training_floor: float = 0.1
    """`cotune`: training goes on whatever the deadlines while it had less than this share of the
    recent past."""
    training_ceiling: float = 0.95
    """`cotune`: no quantum begins while anybody waits for an answer and training had more than this
    share of the recent past."""
    slack_use: float = 0.85
    """`cotune`: an iteration is made to take this share of the time to the nearest deadline, by a
    prediction that holds in 95 of 100. The rest is for the other 5. A prompt that would miss its
    own target takes all of it."""
    queue_use: float = 0.5
    """`cotune`: training waits when the prompts that are there, computed beside it, would take more
    than this share of the time that they have. The rest is for those who are still to come."""
    min_chunk_tokens: int = 16
    """`cotune`, `mace`: the smallest piece that a prompt is cut into, and what the first one gets
    however near a deadline is."""
    prefill_floor: float = 0.2
    """`cotune`: prompts may always take this much of the time of the decodes beside them. Where the
    decodes alone miss their target, prompts still move on."""
    iteration_ttft_share: float = 0.5
    """`cotune`: no iteration is made longer than this share of the TTFT target, for the sake of who
    comes just after it began."""
    late_step: float = 2.0
    """`cotune`: a prompt that will miss its target whatever is done stands behind those that can
    make it, as if it had come this many TTFT targets later."""
    prefix_patience_s: float = 5.0
    """`cotune`: without a target of its own, a request waits this long at most for a prefix that
    another is computing."""
    quantum_slack: float = 16.0
    """`cotune`: a quantum that begins while anybody waits for an answer is cut to so many times the
    TBT target. It gives way between layers, so it need not be shorter than the slack. Measured: at
    4, quanta of one sample trained half as much, and the many of them cost attainment as well."""
    packing_bins: int = 3
    """`mace`: iterations that are packed at once; the first is the one that runs."""
    packing_window: int = 128
    """`mace`: prompts that are looked at, those of the highest priority; bounds the decision."""
    periodic_window_s: float = 10.0
    """`periodic`: length of a window."""
    periodic_share: float = 0.5
    """`periodic`: share of each window, from its start, in which batches may begin."""

    def validate(self) -> None:
        """Raise `SettingError` at the first field that is out of range."""
        _at_least("gamma", self.gamma, 0.0, "0 leaves the signal out")
        for name in ("delta_decode_s", "delta_prefill_s", "delta_training_s"):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise SettingError(name, f"{value} is not a number of seconds; give a finite one")
        if not self.delta_decode_s >= self.delta_prefill_s >= self.delta_training_s:
            raise SettingError(
                "delta_prefill_s",
                f"{self.delta_prefill_s:g} must not be above delta_decode_s "
                f"({self.delta_decode_s:g}) nor below delta_training_s "
                f"({self.delta_training_s:g}): answers go before training; put them in that order",
            )
        _at_least("lambda_memory", self.lambda_memory, 0.0, "0 leaves memory out")
        _at_least("lambda_latency", self.lambda_latency, 0.0, "0 leaves latency out")
        if self.lambda_memory == self.lambda_latency == 0.0:
            raise SettingError(
                "lambda_memory",
                "it and lambda_latency are both 0, so that every place is as good as any other; "
                "raise one of them",
            )
        if self.training_signal not in get_args(TrainingSignal):
            raise SettingError(
                "training_signal",
                f"{self.training_signal!r} is unknown; use one of "
                f"{', '.join(get_args(TrainingSignal))}",
            )
        _share("training_floor", self.training_floor)
        _share("training_ceiling", self.training_ceiling)
        if self.training_floor > self.training_ceiling:
            raise SettingError(
                "training_floor",
                f"{self.training_floor:g} is above training_ceiling ({self.training_ceiling:g}); "
                "lower it or raise the ceiling",
            )
        _share("slack_use", self.slack_use, is_zero_allowed=False)
        _share("queue_use", self.queue_use, is_zero_allowed=False)
        _whole("min_chunk_tokens", self.min_chunk_tokens)
        _share("prefill_floor", self.prefill_floor)
        _share("iteration_ttft_share", self.iteration_ttft_share, is_zero_allowed=False)
        _at_least("late_step", self.late_step, 0.0, "0 keeps the order of arrival")
        _at_least("prefix_patience_s", self.prefix_patience_s, 0.0, "0 waits for no prefix")
        _at_least("quantum_slack", self.quantum_slack, 0.0, "0 cuts quanta to one sample each")
        _whole("packing_bins", self.packing_bins)
        _whole("packing_window", self.packing_window)
        if not (math.isfinite(self.periodic_window_s) and self.periodic_window_s > 0.0):
            raise SettingError(
                "periodic_window_s", f"{self.periodic_window_s} is out of range; use more than 0 s"
            )
        _share("periodic_share", self.periodic_share)


def _at_least(name: str, value: float, low: float, remark: str) -> None:
    if not (math.isfinite(value) and value >= low):
        raise SettingError(name, f"{value} is out of range; use {low:g} or more ({remark})")


def _share(name: str, value: float, *, is_zero_allowed: bool = True) -> None:
    if not (0.0 <= value <= 1.0) or (value == 0.0 and not is_zero_allowed):
        low = "0" if is_zero_allowed else "more than 0"
        raise SettingError(name, f"{value} is not a share; use {low} to 1")


def _whole(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingError(name, f"{value!r} is out of range; use a whole number of 1 or more")
