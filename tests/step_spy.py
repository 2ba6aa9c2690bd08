"""What really ran: the iterations that reached the device, and a gate in front of it.

A parity test shows something only if the case it is named after occurred. `StepSpy` notes every
iteration as the executor got it, so that a test can assert that prompts were cut, that sequences
were packed together, or which pages two of them read.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from cotune.runtime.executor import Executor

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

    from cotune.runtime.step import SequenceStep, StepResult


@dataclass(frozen=True, slots=True)
class Part:
    """One sequence's part in an iteration, with its block table as it was then."""

    start: int
    tokens: int
    slot: int
    pages: tuple[int, ...]
    samples: bool

    @property
    def is_decode(self) -> bool:
        """Whether it continues an answer (or, rarely, ends a prompt) by one token."""
        return self.tokens == 1 and self.start > 0


class StepSpy:
    """Notes what every `Executor` of this process runs, until monkeypatch undoes it.

    Attributes:
        iterations: what ran, in order; tests may clear it.
        gate: iterations wait for it. Cleared, it holds the device until it is set again; the event
            loop goes on meanwhile.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.iterations: list[list[Part]] = []
        self.gate = threading.Event()
        self.gate.set()
        execute = Executor.execute

        def spied(executor: Executor, steps: Sequence[SequenceStep]) -> StepResult:
            if not self.gate.wait(60.0):
                raise TimeoutError("a test closed the gate and never opened it")
            self.iterations.append(
                [
                    Part(
                        step.start,
                        len(step.token_ids),
                        step.adapter_slot,
                        tuple(step.block_table),
                        step.sampling is not None,
                    )
                    for step in steps
                ]
            )
            return execute(executor, steps)

        monkeypatch.setattr(Executor, "execute", spied)

    @property
    def widest(self) -> int:
        """Most sequences that were packed into one iteration."""
        return max(map(len, self.iterations))

    def has(self, *wanted: str) -> bool:
        """Whether some iteration held all of these kinds at once.

        Kinds: decode; chunk (part of a prompt, more to come); prefill (the end of a prompt).
        """
        return any(
            set(wanted) <= {_kind(part) for part in iteration} for iteration in self.iterations
        )

    def slots_together(self) -> set[int]:
        """The adapter slots of the iteration that held the most different ones."""
        return max(({part.slot for part in it} for it in self.iterations), key=len)

    def shared_pages(self) -> int:
        """Most leading pages that two sequences of one iteration had in common."""
        most = 0
        for iteration in self.iterations:
            tables = sorted(part.pages for part in iteration)
            for one, other in pairwise(tables):
                same = [a == b for a, b in zip(one, other, strict=False)]
                most = max(most, same.index(False) if False in same else len(same))
        return most


def _kind(part: Part) -> str:
    if not part.samples:
        return "chunk"
    return "decode" if part.is_decode else "prefill"
