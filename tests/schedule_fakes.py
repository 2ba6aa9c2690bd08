"""Training without a model, for tests of whoever decides when it runs.

`FakeTrainer` has quanta that were written down, `learn` offers them at a desk as a learner does,
and `Scripted` is a policy that does what a test says.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from cotune.runtime.scheduling.desk import Outlook
from cotune.runtime.training.trainer import Quantum, StepReport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from cotune.policy import IterationPlan, Observation
    from cotune.policy.types import QuantumKind
    from cotune.runtime.scheduling.desk import TrainingDesk

OUTLOOK = Outlook(loss=0.6, signal=0.25)
BATCH: tuple[tuple[QuantumKind, int], ...] = (("forward", 40), ("backward", 40), ("step", 0))
"""One batch of one sample."""


class FakeTrainer:
    """Runs the quanta that it is made with.

    Attributes:
        quanta: (kind, rows) of those that are still to come.
        ran: (kind, max_tokens) of those that ran.
        failures: what the coming runs raise; None for one that works. One that fails stays next.
        out_of_memories: as `Trainer` counts them. A `MemoryError` among the failures is taken as
            `Trainer` takes it: counted, and the quantum is to be run again.
    """

    def __init__(self, quanta: Iterable[tuple[QuantumKind, int]] = BATCH) -> None:
        self.quanta = deque(quanta)
        self.ran: list[tuple[str, int]] = []
        self.failures: deque[Exception | None] = deque()
        self.out_of_memories = 0

    def next_quantum(self, max_tokens: int = 0) -> Quantum | None:
        if not self.quanta:
            return None
        kind, tokens = self.quanta[0]
        return Quantum(kind=kind, samples=1, tokens=min(tokens, max_tokens or tokens))

    def run_quantum(self, max_tokens: int = 0) -> StepReport | None:
        if self.failures and (failure := self.failures.popleft()) is not None:
            if not isinstance(failure, MemoryError):
                raise failure
            self.out_of_memories += 1
            return None
        kind, tokens = self.quanta.popleft()
        self.ran.append((kind, max_tokens))
        return report(tokens) if kind == "step" else None


def report(tokens: int = 0) -> StepReport:
    """That of a step."""
    return StepReport(
        step=1,
        loss=0.5,
        chosen_reward=0.1,
        rejected_reward=0.0,
        margin=0.1,
        reward_accuracy=1.0,
        gradient_norm=1.0,
        learning_rate=1e-3,
        tokens=tokens,
        samples=1,
        halvings=0,
        set_aside=(),
        kl=None,
    )


async def learn(desk: TrainingDesk, key: int, trainer: FakeTrainer) -> list[StepReport | None]:
    """Offer every quantum, as a learner does; what they gave."""
    reports: list[StepReport | None] = []
    is_begun = False
    while trainer.next_quantum() is not None:
        reports.append(await desk.run(key, trainer, OUTLOOK, is_begun=is_begun))
        is_begun = not (reports and reports[-1] is not None)
    return reports


class Scripted:
    """Asks a function."""

    def __init__(self, decide: Callable[[Observation], IterationPlan]) -> None:
        self.decide = decide

    def plan(self, observation: Observation) -> IterationPlan:
        return self.decide(observation)
