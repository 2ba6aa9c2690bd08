"""Decisions only: what the next iteration holds. Standard library, no clock, no I/O."""

from __future__ import annotations

from .inference_only import InferenceOnly
from .types import (
    Budgets,
    Chunk,
    IterationPlan,
    Observation,
    Policy,
    RunningView,
    WaitingView,
    rank_s,
)

__all__ = [
    "POLICY_NAMES",
    "Budgets",
    "Chunk",
    "InferenceOnly",
    "IterationPlan",
    "Observation",
    "Policy",
    "RunningView",
    "WaitingView",
    "make_policy",
    "rank_s",
]

_POLICIES: dict[str, type[Policy]] = {"inference-only": InferenceOnly}
POLICY_NAMES = tuple(_POLICIES)
"""What `--policy` takes."""


def make_policy(name: str) -> Policy:
    """The policy of this name, one of `POLICY_NAMES`; raises KeyError for any other."""
    return _POLICIES[name]()
