"""Latency targets: those that were asked for, held against what the device can, or ones it can."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ...policy.costs import IterationShape
from ..errors import ConfigError

if TYPE_CHECKING:
    from ...policy.costs import Costs
    from ..config import ScheduleConfig

TYPICAL_DECODES = 16
TYPICAL_CONTEXT = 512
"""A busy iteration of a device with few users: so many decodes, each with so many tokens before."""
TBT_ITERATIONS = 4.0
"""The TBT target that nobody set: this many such iterations. Measured: under it, decodes have room
for prompts and training beside them, and readers see an even stream."""
TTFT_ITERATIONS = 10.0
"""The TTFT target that nobody set: this many iterations that are full of prompts."""
LEAST_CHUNK = 16
"""A TTFT target is unattainable if not even a prompt of so many tokens meets it, alone."""


def choose_targets(
    schedule: ScheduleConfig, costs: Costs | None, token_budget: int
) -> tuple[float, float]:
    """The TTFT and TBT targets of interactive requests, in seconds.

    What was not asked for follows from what work costs here; where that is not known (None), there
    is no target: infinity.

    Raises:
        ConfigError: a target cannot be met on this device even by a request that is alone.
    """
    ttft_s, tbt_s = schedule.ttft_target_s, schedule.tbt_target_s
    if costs is None:
        return (
            math.inf if ttft_s is None else ttft_s,
            math.inf if tbt_s is None else tbt_s,
        )
    if ttft_s is None:
        full = IterationShape().with_chunk(token_budget, 0)
        ttft_s = TTFT_ITERATIONS * costs.margin * costs.iteration_s(full)
    else:
        alone_s = costs.iteration_s(IterationShape().with_chunk(LEAST_CHUNK, 0))
        _check("schedule.ttft_target_s", ttft_s, alone_s, f"a prompt of {LEAST_CHUNK} tokens")
    if tbt_s is None:
        busy = IterationShape(TYPICAL_DECODES, TYPICAL_DECODES * TYPICAL_CONTEXT)
        tbt_s = TBT_ITERATIONS * costs.margin * costs.iteration_s(busy)
    else:
        _check("schedule.tbt_target_s", tbt_s, costs.iteration_s(IterationShape(1, 1)), "a decode")
    return ttft_s, tbt_s


def _check(name: str, target_s: float, alone_s: float, what: str) -> None:
    if target_s < alone_s:
        raise ConfigError(
            f"{name} is {target_s:g} s, but {what} alone takes {alone_s:.2g} s on this device; "
            "raise it, leave it unset, or use a smaller model or a faster device",
            param=name,
            code="unattainable_target",
        )
