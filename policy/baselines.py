"""What others do, to compare with: three ways to train beside serving without looking at deadlines.

All serve as `inference-only` does, first come first served, and differ in when a quantum starts:

    periodic       in the first part of each window of time (windowed retraining, as Ekya)
    synchronous    at once, and everyone waits until the step is done (stop the world)
    continuous     at once, beside whatever runs (train whenever there is data)

None of them cuts a quantum for latency or tells one to wait. Memory binds them as everyone.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .packing import Room, pack_in_order
from .priority import first_come
from .types import IterationPlan, TrainingPlan

if TYPE_CHECKING:
    from .settings import PolicySettings
    from .types import Observation


class Continuous:
    """Starts whatever is offered as soon as the lane is free."""

    def plan(self, observation: Observation) -> IterationPlan:
        """The next iteration, and the next quantum."""
        room = pack_in_order(observation)
        training = observation.training
        if training is None or training.running is not None:
            return room.plan()
        return room.plan(room.start_quantum(first_come(training.offers)))


class Periodic:
    """Begins batches in the first part of each window only; one that has begun is finished."""

    def __init__(self, settings: PolicySettings) -> None:
        self._window_s = settings.periodic_window_s
        self._share = settings.periodic_share

    def plan(self, observation: Observation) -> IterationPlan:
        """The next iteration, and the next quantum if it is time for one."""
        room = pack_in_order(observation)
        training = observation.training
        if training is None or training.running is not None or not training.offers:
            return room.plan()
        now_s = observation.now_s
        begun_s = math.floor(now_s / self._window_s) * self._window_s
        offers = first_come(training.offers)
        if now_s - begun_s >= self._share * self._window_s:
            offers = [offer for offer in offers if offer.is_begun]
            if not offers:
                again_s = max(0.0, begun_s + self._window_s - now_s)
                return room.plan(TrainingPlan(again_s=again_s if self._share > 0.0 else None))
        return room.plan(room.start_quantum(offers))


class Synchronous:
    """Stops the world for training: once a batch has begun, nothing is served until its step.

    A batch begins beside an iteration. So there is one between any two steps at least, and nobody
    waits for longer than a step.
    """

    def plan(self, observation: Observation) -> IterationPlan:
        """A pause while a batch is under way, else the next iteration."""
        training = observation.training
        if training is None:
            return pack_in_order(observation).plan()
        has_sequences = bool(observation.running or observation.waiting)
        if training.running is not None:
            return IterationPlan(is_pause=has_sequences)
        offers = first_come(training.offers)
        begun = [offer for offer in offers if offer.is_begun]
        if begun:
            started = Room(observation).start_quantum(begun)
            if started.start is not None:
                return IterationPlan(training=started, is_pause=has_sequences)
        room = pack_in_order(observation)
        return room.plan(room.start_quantum(offers))
