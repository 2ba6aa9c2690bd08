"""A device in virtual time: how long iterations and quanta take, alone and beside each other.

    iteration  ├──────── slower ────────┤── alone ──┤
    quantum    ├──── slower ────────────┤ ended; the next one can start with the next plan

What takes time is what `Costs` says, and nothing sleeps. Beside each other, either takes as much
longer as the costs have it, for as long as the other is there.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Protocol

from ..policy.costs import IterationShape

if TYPE_CHECKING:
    from ..policy.costs import Costs
    from ..policy.types import TrainingPlan
    from .simulation_training import TrainingLane
    from .simulation_types import SimulationSettings


class LearningCosts(Protocol):
    """What a policy believes while it is learned: `cotune.policy.costs.CostModel`."""

    @property
    def costs(self) -> Costs:
        """As of now."""

    def observe_iteration(
        self, shape: IterationShape, seconds: float, *, beside_training: float
    ) -> None:
        """An iteration took so long."""

    def observe_quantum(
        self, kind: str, tokens: int, seconds: float, *, beside_serving: float
    ) -> None:
        """A quantum took so long."""


class SimulatedDevice:
    """The clock, the inference lane, and what passes on the training lane meanwhile.

    Args:
        costs: of the device.
        settings: what scatters and slows it.
        lane: the training lane; None: nothing learns.
        beliefs: what the policy is told of costs, learned on the way; None: the truth.

    Attributes:
        now_s: the virtual time.
        busy_s: in which the inference lane worked.
    """

    def __init__(
        self,
        costs: Costs,
        settings: SimulationSettings,
        lane: TrainingLane | None,
        beliefs: LearningCosts | None,
    ) -> None:
        self._costs = costs
        self._settings = settings
        self._lane = lane
        self._beliefs = beliefs
        self._random = random.Random(settings.seed)
        self.now_s = 0.0
        self.busy_s = 0.0

    @property
    def believed_costs(self) -> Costs:
        """What the policy is told: with what passes between two iterations."""
        costs = self._costs if self._beliefs is None else self._beliefs.costs
        if self._settings.overhead_s:
            costs = costs._replace(base_s=costs.base_s + self._settings.overhead_s)
        return costs

    @property
    def quantum_ends_s(self) -> float:
        """When what is on the training lane ends with nothing beside it; infinite: nothing will."""
        lane = self._lane
        if lane is None or not lane.is_active:
            return math.inf
        return self.now_s + lane.left_s(self._costs, beside_serving=False)

    def _slowdown(self) -> float:
        """How much slower than `costs` the device is now."""
        factor = 1.0
        for start_s, by in self._settings.slowdowns:
            if self.now_s >= start_s:
                factor = by
        return factor

    def _work_s(self, shape: IterationShape) -> float:
        """What an iteration takes alone."""
        seconds = self._costs.iteration_s(shape)
        if self._settings.noise:
            deviation = self._settings.noise
            seconds *= self._random.lognormvariate(-deviation * deviation / 2.0, deviation)
        return seconds * self._slowdown()

    # -- training --------------------------------------------------------------------------------

    def train(self, plan: TrainingPlan, *, beside_iteration: bool) -> None:
        """What a plan says. A quantum is held only beside an iteration, as the engine has it."""
        if self._lane is not None:
            self._lane.carry_out(
                plan,
                hold=plan.hold and beside_iteration,
                now_s=self.now_s,
                costs=self._costs,
                slowdown=self._slowdown(),
            )

    def _end_quantum(self, now_s: float, shared_s: float) -> None:
        """What is on the training lane ends, after so long beside serving at the last."""
        lane = self._lane
        assert lane is not None
        ended = lane.finish(now_s, shared_s)
        if self._beliefs is not None:
            self._beliefs.observe_quantum(
                ended.kind, ended.tokens, ended.seconds, beside_serving=ended.beside_serving
            )

    # -- time ------------------------------------------------------------------------------------

    def iterate(self, shape: IterationShape) -> None:
        """Run an iteration, with what is on the training lane beside it; it ends now."""
        started_s = self.now_s
        work_s = self._work_s(shape)
        lane = self._lane
        beside = 0.0
        if lane is None or not lane.is_active:
            self.now_s += work_s
        else:
            alone_s = self._costs.iteration_s(shape)
            slower = 1.0
            if alone_s > 0.0:
                slower = self._costs.iteration_s(shape, beside_training=True) / alone_s
            ends_s = started_s + work_s * slower
            quantum_ends_s = started_s + lane.left_s(self._costs, beside_serving=True)
            if quantum_ends_s > ends_s:
                lane.advance(ends_s - started_s, self._costs, beside_serving=True)
                self.now_s = ends_s
                beside = 1.0
            else:
                # The quantum ends within the iteration, the rest of which is undisturbed. The
                # next one can start with the next plan.
                shared_s = quantum_ends_s - started_s
                self._end_quantum(quantum_ends_s, shared_s)
                self.now_s = quantum_ends_s + (work_s - shared_s / slower)
                beside = shared_s / (self.now_s - started_s) if self.now_s > started_s else 1.0
        if self._beliefs is not None:
            seconds = self.now_s - started_s
            self._beliefs.observe_iteration(shape, seconds, beside_training=beside)
        self.busy_s += self.now_s - started_s

    def decode(self, sequences: int, context: int, count: int, until_s: float) -> list[float]:
        """Run decodes alone, one iteration after the other, with nothing on the training lane.

        Args:
            sequences: that decode.
            context: KV entries that the first iteration reads; each reads `sequences` more.
            count: most iterations.
            until_s: none begins at this time or later, but for the first.

        Returns: when each ended. What passes after the last has passed as well.
        """
        overhead_s = self._settings.overhead_s
        ends_s: list[float] = []
        now_s = self.now_s
        for _ in range(count):
            started_s = now_s
            self.now_s = now_s
            now_s += self._work_s(IterationShape(sequences, context, 0, 0, 0))
            ends_s.append(now_s)
            self.busy_s += now_s - started_s
            context += sequences
            if overhead_s:
                now_s += overhead_s
            if now_s >= until_s:
                break
        self.now_s = now_s
        return ends_s

    def pass_overhead(self) -> None:
        """What the event loop does between two iterations; the training lane goes on."""
        overhead_s = self._settings.overhead_s
        if overhead_s:
            self.wait_until(self.now_s + overhead_s)

    def wait_until(self, until_s: float) -> None:
        """Let time pass in which nothing is on the inference lane."""
        lane = self._lane
        if lane is not None and lane.is_active:
            ends_s = self.now_s + lane.left_s(self._costs, beside_serving=False)
            if ends_s <= until_s:
                self._end_quantum(ends_s, 0.0)
            else:
                lane.advance(until_s - self.now_s, self._costs, beside_serving=False)
        self.now_s = until_s
