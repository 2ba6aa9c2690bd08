"""Simulated runs, one after the other: what they are made of, the bar, what reports begin with."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from ..policy import make_policy
from ..policy.settings import PolicySettings, SettingError
from ..runtime.errors import ConfigError
from .progress_bar import progress_bar
from .simulation import Simulation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..policy.costs import CostModel, Costs, IterationShape
    from ..policy.types import Policy
    from .coserve_log import LoggedSample
    from .simulation_types import SimulationResult, SimulationSettings
    from .traces import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Everything but the policy."""

    trace: Trace
    samples: tuple[LoggedSample, ...]
    costs: Costs
    settings: SimulationSettings

    @property
    def visits(self) -> float:
        """Rows to train for each row of a sample."""
        training = self.settings.training
        return 1.0 if training is None else training.epochs / (1.0 - training.replay_share)


def build_policy(name: str, overrides: dict[str, Any]) -> Policy:
    """A policy of this name with some of its settings changed.

    Raises:
        ConfigError: a setting is unknown or out of range.
    """
    known = [each.name for each in fields(PolicySettings)]
    if unknown := sorted(overrides.keys() - set(known)):
        raise ConfigError(
            f"{', '.join(unknown)}: no such setting of a policy; use some of {', '.join(known)}"
        )
    try:
        settings = replace(PolicySettings(), **overrides)
        settings.validate()
    except SettingError as error:
        raise ConfigError(f"setting {error}") from error
    return make_policy(name, settings)


class Witness:
    """Costs that are learned, or not, and how well each iteration was predicted before it ran."""

    def __init__(self, model: CostModel | None, costs: Costs) -> None:
        self._model = model
        self._costs = costs
        self.clock: Callable[[], float] = lambda: 0.0
        self._errors: list[tuple[float, float]] = []

    @property
    def costs(self) -> Costs:
        """What the policy is told."""
        return self._costs if self._model is None else self._model.costs

    def observe_iteration(
        self, shape: IterationShape, seconds: float, *, beside_training: float
    ) -> None:
        """See `LearningCosts`."""
        costs = self.costs
        predicted_s = costs.iteration_s(shape)
        predicted_s *= 1.0 + (costs.interference - 1.0) * beside_training
        self._errors.append((self.clock(), abs(predicted_s - seconds) / seconds))
        if self._model is not None:
            self._model.observe_iteration(shape, seconds, beside_training=beside_training)

    def observe_quantum(
        self, kind: str, tokens: int, seconds: float, *, beside_serving: float
    ) -> None:
        """See `LearningCosts`."""
        if self._model is not None and seconds > 0.0:
            self._model.observe_quantum(kind, tokens, seconds, beside_serving=beside_serving)

    def errors_after(self, start_s: float) -> list[float]:
        """|predicted - measured| / measured of the iterations that ended after this."""
        return [error for at_s, error in self._errors if at_s > start_s]


def simulate(
    world: World,
    policy: str,
    overrides: dict[str, Any],
    *,
    witness: Witness | None = None,
    progress: Callable[[float], None] | None = None,
) -> SimulationResult:
    """One run of one policy."""
    simulation = Simulation(
        world.trace.requests,
        build_policy(policy, overrides),
        world.costs,
        world.settings,
        samples=world.samples,
        beliefs=witness,
        progress=progress,
    )
    if witness is not None:
        witness.clock = lambda: simulation.now_s
    return simulation.run()


@contextmanager
def time_bars(until_s: float) -> Iterator[Callable[[str], Callable[[float], None]]]:
    """Bars that show virtual time, one for each run."""
    with progress_bar() as bar:

        def start(name: str) -> Callable[[float], None]:
            task = bar.add_task(name, total=until_s)
            return lambda now_s: bar.update(task, completed=now_s)

        yield start


def heading(world: World) -> str:
    """What was simulated, in a line."""
    budgets = world.settings.budgets
    return (
        f"{world.trace.name}: {len(world.trace.requests)} requests in "
        f"{world.trace.duration_s:.0f} s, {len(world.samples)} training samples; targets: first "
        f"token {1000 * budgets.ttft_s:.4g} ms, between tokens {1000 * budgets.tbt_s:.4g} ms"
    )


def described(world: World) -> dict[str, Any]:
    """What was simulated, as JSON has it."""
    settings = asdict(world.settings)
    settings["budgets"] = world.settings.budgets._asdict()
    return {
        "trace": {
            "name": world.trace.name,
            "requests": len(world.trace.requests),
            "duration_s": world.trace.duration_s,
            "samples": len(world.samples),
            "notes": list(world.trace.notes),
        },
        "settings": settings,
    }
