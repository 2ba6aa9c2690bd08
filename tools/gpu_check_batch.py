"""Sequences that decode greedily on an executor, without an engine; used by `gpu_check`."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any, Final

from ..runtime.sampling import SamplingState
from ..runtime.step import SequenceStep
from ..runtime.types import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..runtime.executor import Executor

GREEDY: Final = SamplingParams(temperature=0.0, ignore_eos=True)


class Batch:
    """Sequences that decode greedily on pages of their own, step by step.

    Args:
        executor: used by whatever thread calls `prefill` and `decode`.
        prompts: token ids of each.
        room: most tokens of an answer.
        slots: adapter slot of each.
    """

    def __init__(
        self,
        executor: Executor,
        prompts: Sequence[Sequence[int]],
        room: int,
        slots: Sequence[int] | None = None,
    ) -> None:
        self._executor = executor
        self._prompts = [list(prompt) for prompt in prompts]
        self._slots = list(slots) if slots is not None else [0] * len(prompts)
        self.outputs: list[list[int]] = [[] for _ in prompts]
        params = GREEDY.resolve({})
        self._states = [
            SamplingState(params, prompt, output, frozenset(), seed=1)
            for prompt, output in zip(self._prompts, self.outputs, strict=True)
        ]
        self._tables: list[list[int]] = []
        used = 0
        for prompt in self._prompts:
            count = -(-(len(prompt) + room) // executor.page_size)
            self._tables.append(list(range(used, used + count)))
            used += count
        if used > executor.num_pages:
            raise RuntimeError(f"the check needs {used} pages, there are {executor.num_pages}")

    def prefill(self) -> None:
        """Compute the prompts, one per iteration, and the first token of each."""
        for row, prompt in enumerate(self._prompts):
            step = SequenceStep(prompt, 0, self._tables[row], self._slots[row], self._states[row])
            self._take(row, self._executor.execute([step]).results[0])

    def decode(self, steps: int = 1) -> list[float]:
        """So many tokens more for everyone; the seconds of each iteration."""
        seconds = []
        for _ in range(steps):
            began_s = time.perf_counter()
            batch = [
                SequenceStep(
                    self.outputs[row][-1:],
                    len(prompt) + len(self.outputs[row]) - 1,
                    self._tables[row],
                    self._slots[row],
                    self._states[row],
                )
                for row, prompt in enumerate(self._prompts)
            ]
            for row, result in enumerate(self._executor.execute(batch).results):
                self._take(row, result)
            seconds.append(time.perf_counter() - began_s)
        return seconds

    def _take(self, row: int, result: Any) -> None:
        if result.token_id is None:
            raise RuntimeError(f"sequence {row} gave no token: {result.error}")
        self.outputs[row].append(result.token_id)


def random_prompts(count: int, lengths: tuple[int, int], vocab: int, seed: int) -> list[list[int]]:
    """Random token ids; lengths uniform between the bounds."""
    draw = random.Random(seed)
    return [[draw.randrange(1, vocab) for _ in range(draw.randint(*lengths))] for _ in range(count)]


def quantiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 99 % quantile and count."""
    ordered = sorted(seconds)
    if not ordered:
        return {"n": 0}
    return {
        "p50": 1e3 * ordered[len(ordered) // 2],
        "p99": 1e3 * ordered[int(0.99 * (len(ordered) - 1))],
        "n": len(ordered),
    }
