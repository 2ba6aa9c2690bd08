"""The policy that only serves: continuous batching with chunked prefill, first come first served.

It decides as `packing.pack_in_order` does, and leaves the training lane alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .packing import pack_in_order

if TYPE_CHECKING:
    from .types import IterationPlan, Observation


class InferenceOnly:
    """Serves and never trains."""

    def plan(self, observation: Observation) -> IterationPlan:
        """The next iteration; see `packing.pack_in_order`."""
        return pack_in_order(observation).plan()
