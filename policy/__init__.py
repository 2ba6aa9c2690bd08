"""Decisions only: what the next iteration holds. Standard library, no clock, no I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .baselines import Continuous, Periodic, Synchronous
from .costs import Costs, IterationShape
from .cotune import Cotune
from .inference_only import InferenceOnly
from .mace import Mace
from .settings import PolicySettings, SettingError
from .types import (
    Budgets,
    Chunk,
    IterationPlan,
    MemoryView,
    Observation,
    Policy,
    RequestClass,
    RunningQuantum,
    RunningView,
    TrainingOffer,
    TrainingPlan,
    TrainingView,
    WaitingView,
    rank_s,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "POLICY_NAMES",
    "Budgets",
    "Chunk",
    "Continuous",
    "Costs",
    "Cotune",
    "InferenceOnly",
    "IterationPlan",
    "IterationShape",
    "Mace",
    "MemoryView",
    "Observation",
    "Periodic",
    "Policy",
    "PolicySettings",
    "RequestClass",
    "RunningQuantum",
    "RunningView",
    "SettingError",
    "Synchronous",
    "TrainingOffer",
    "TrainingPlan",
    "TrainingView",
    "WaitingView",
    "make_policy",
    "rank_s",
]

_POLICIES: dict[str, Callable[[PolicySettings], Policy]] = {
    "cotune": Cotune,
    "mace": Mace,
    "inference-only": lambda _: InferenceOnly(),
    "periodic": Periodic,
    "synchronous": lambda _: Synchronous(),
    "continuous": lambda _: Continuous(),
}
POLICY_NAMES = tuple(_POLICIES)
"""What `--policy` takes."""


def make_policy(name: str, settings: PolicySettings | None = None) -> Policy:
    """The policy of this name, one of `POLICY_NAMES`, with these settings (None: the defaults).

    Raises:
        KeyError: there is no policy of this name.
        SettingError: a setting is out of range.
    """
    make = _POLICIES[name]
    settings = settings if settings is not None else PolicySettings()
    settings.validate()
    return make(settings)
