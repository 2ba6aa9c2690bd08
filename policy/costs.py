"""What work costs here: latency of iterations and quanta, learned from each of them.

    profile ──► CostModel ◄── every iteration and quantum, as it ends
                    │
                  Costs ──► policy: how long would this take?

`IterationShape` says what an iteration holds, `Costs` are the frozen coefficients that a policy
asks, and `CostModel` is the one that keeps fitting them (see `latency_fit`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from .latency_fit import LatencyFit

if TYPE_CHECKING:
    from .profile import Profile

UNBOUNDED = 1 << 30
"""Tokens that fit where tokens cost nothing, as far as is known."""

FORWARD_ROW = 2.5
BACKWARD_ROW = 1.25
"""What a row of a forward that keeps its graph takes as a multiple of a prompt token, and a row of
its backward as a multiple of that, where neither was measured; a row of "kl" is taken for one of a
forward. (Measured on a CPU that serves prepacked bfloat16: 2.8, 1.15 and 0.94.)"""
UNKNOWN_MARGIN = 1.5
"""`Costs.margin` where nothing was measured yet."""


class IterationShape(NamedTuple):
    """What decides how long an iteration takes."""

    decodes: int = 0
    """Sequences that get one token."""
    decode_context: int = 0
    """KV entries that they read: the sum of their lengths."""
    prefill_tokens: int = 0
    """Prompt tokens that are computed."""
    prefill_attention: int = 0
    """Pairs of query and key among those; see `chunk_attention`."""
    chunks: int = 0
    """Sequences that these prompt tokens belong to."""

    def with_chunk(self, tokens: int, context: int) -> IterationShape:
        """The same with a chunk of `tokens` more, of a sequence that has `context` computed."""
        return IterationShape(
            self.decodes,
            self.decode_context,
            self.prefill_tokens + tokens,
            self.prefill_attention + chunk_attention(tokens, context),
            self.chunks + 1,
        )


def chunk_attention(tokens: int, context: int) -> int:
    """Pairs of query and key in a chunk of n tokens after c: n * c + n * (n + 1) / 2."""
    return tokens * context + tokens * (tokens + 1) // 2


class Costs(NamedTuple):
    """Frozen coefficients; asked by policies, thousands of times a second."""

    base_s: float
    """An iteration, whatever is in it."""
    per_decode_s: float
    per_context_s: float
    per_token_s: float
    per_attention_s: float
    per_chunk_s: float = 0.0
    margin: float = 1.0
    """What a prediction is multiplied with to hold in 95 of 100 iterations."""
    interference: float = 1.0
    """What an iteration takes more while a quantum runs beside it, as a factor of 1 or more."""
    quantum_interference: float = 1.0
    """The same for a quantum beside iterations."""
    per_row_s: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Seconds per row of a "kl", "forward" and "backward" quantum."""
    quantum_base_s: float = 0.0
    step_s: float = 0.0
    """An optimizer step."""
    quantum_margin: float = 1.0
    """`margin` for quanta."""

    def iteration_s(self, shape: IterationShape, *, beside_training: bool = False) -> float:
        """Expected seconds of an iteration; times `margin` it holds nearly always."""
        # The first six of self times `iteration_features(shape)`, written out: asked the most.
        seconds = (
            self.base_s
            + self.per_decode_s * shape.decodes
            + self.per_context_s * shape.decode_context
            + self.per_token_s * shape.prefill_tokens
            + self.per_attention_s * shape.prefill_attention
            + self.per_chunk_s * shape.chunks
        )
        return seconds * self.interference if beside_training else seconds

    def chunk_s(self, tokens: int, context: int) -> float:
        """What an iteration takes more for a chunk of so many prompt tokens after `context`."""
        return self.per_chunk_s + tokens * (
            self.per_token_s + self.per_attention_s * (context + (tokens + 1) / 2)
        )

    def quantum_s(self, kind: str, tokens: int, *, beside_serving: bool = False) -> float:
        """Expected seconds of a quantum."""
        if kind == "step":
            seconds = self.step_s
        else:
            seconds = self.quantum_base_s + self.per_row_s[_ROWS[kind]] * tokens
        return seconds * self.quantum_interference if beside_serving else seconds

    def prefill_tokens_within(
        self, seconds: float, shape: IterationShape, context: int, *, beside_training: bool = False
    ) -> int:
        """Most prompt tokens, of a sequence that has `context` tokens, that fit beside `shape`.

        Solves the quadratic in the chunk's length: `iteration_s` of the shape with that chunk is
        `seconds` at most. 0 where not one fits, `UNBOUNDED` where tokens cost nothing or `seconds`
        is infinite.
        """
        if beside_training:
            seconds /= self.interference
        left_s = seconds - self.iteration_s(shape) - self.per_chunk_s
        if left_s <= 0.0:
            return 0
        linear = self.per_token_s + self.per_attention_s * (context + 0.5)
        if linear <= 0.0 or left_s == math.inf:
            return UNBOUNDED
        # In this form nothing cancels where attention costs next to nothing.
        root = math.sqrt(linear * linear + 2.0 * self.per_attention_s * left_s)
        return int(min(2.0 * left_s / (linear + root), UNBOUNDED))

    def quantum_tokens_within(
        self, seconds: float, kind: str, *, beside_serving: bool = False
    ) -> int:
        """Most rows of a quantum of this kind that fit; `UNBOUNDED` where rows cost nothing.

        A step has no rows: `UNBOUNDED` if it fits, else 0.
        """
        if beside_serving:
            seconds /= self.quantum_interference
        if kind == "step":
            return UNBOUNDED if self.step_s <= seconds else 0
        left_s = seconds - self.quantum_base_s
        if left_s <= 0.0:
            return 0
        row_s = self.per_row_s[_ROWS[kind]]
        return int(min(left_s / row_s, UNBOUNDED)) if row_s > 0.0 else UNBOUNDED


QUANTUM_ROWS = ("kl", "forward", "backward")
"""The kinds of quanta that have rows, in the order of `Costs.per_row_s`."""
_ROWS = {kind: index for index, kind in enumerate(QUANTUM_ROWS)}


@dataclass(frozen=True, slots=True, kw_only=True)
class CostReport:
    """How well the model has been predicting. Errors are of predictions made before their work.

    Attributes:
        iterations: iterations it has learned from.
        quanta: the same for quanta.
        error_p50, error_p95: of recent iterations, |seconds - predicted| / seconds.
        bias: median of seconds / predicted, less 1; above 0, iterations take longer.
        quantum_error_p50, quantum_error_p95, quantum_bias: the same for quanta.
        margin: see `Costs.margin`.
        interference, quantum_interference: see `Costs`.
        is_stale: whether recent work takes 1.9 times what the profile says, or 1 / 1.9 of it: the
            device is shared, throttled, or not the one that was profiled.
        slowdown: median of recent seconds over what the profile says; 1.0 without a profile, and
            until a shift was found or `is_stale`.
        shifts: how often the device was found to have changed its speed.
    """

    iterations: int
    quanta: int
    error_p50: float
    error_p95: float
    bias: float
    quantum_error_p50: float
    quantum_error_p95: float
    quantum_bias: float
    margin: float
    interference: float
    quantum_interference: float
    is_stale: bool
    slowdown: float
    shifts: int


ITERATION_SCALES = (1.0, 8.0, 2048.0, 128.0, 16384.0, 2.0)
"""Usual values of the features of an iteration: what the fit measures them in."""
QUANTUM_SCALES = (1.0, 512.0, 512.0, 512.0, 1.0)
"""The same for quanta."""
_USUAL_ITERATIONS = (
    IterationShape(1, 128),
    IterationShape(4, 512),
    IterationShape(8, 4096),
    IterationShape(32, 8192),
    IterationShape().with_chunk(16, 0),
    IterationShape().with_chunk(128, 0),
    IterationShape().with_chunk(512, 0),
    IterationShape().with_chunk(128, 1024),
    IterationShape(8, 2048).with_chunk(64, 0).with_chunk(16, 128),
)
_USUAL_ROWS = (64, 256, 512)


def iteration_features(shape: IterationShape) -> tuple[int, ...]:
    """What the seconds of an iteration are linear in; coefficients as the first six of `Costs`."""
    return (1, *shape)


def quantum_features(kind: str, tokens: int) -> tuple[int, int, int, int, int]:
    """The same for a quantum: a base, rows of "kl", "forward" and "backward", a step."""
    if kind == "step":
        return 0, 0, 0, 0, 1
    row = _ROWS[kind]
    return 1, tokens * (row == 0), tokens * (row == 1), tokens * (row == 2), 0


class CostModel:
    """Learns `Costs` from what happens. Owned by whoever runs iterations; not thread-safe.

    Args:
        profile: where to begin; None to learn all of it while serving.

    Observing takes some tens of microseconds, asking for `costs` less than one.
    """

    def __init__(self, profile: Profile | None = None) -> None:
        costs = profile.costs if profile is not None else None
        self._iterations = LatencyFit(
            ITERATION_SCALES,
            believed=None if costs is None else costs[:6],
            seeds=[iteration_features(shape) for shape in _USUAL_ITERATIONS],
            interference=1.0 if costs is None else costs.interference,
            margin=UNKNOWN_MARGIN if costs is None else costs.margin,
        )
        rows_s = (0.0, 0.0, 0.0) if costs is None else costs.per_row_s
        is_measured = costs is not None and any(rows_s)
        self._quanta = LatencyFit(
            QUANTUM_SCALES,
            believed=(costs.quantum_base_s, *rows_s, costs.step_s)
            if costs is not None and is_measured
            else None,
            seeds=[
                *(quantum_features(kind, rows) for kind in QUANTUM_ROWS for rows in _USUAL_ROWS),
                quantum_features("step", 0),
            ],
            interference=1.0 if costs is None else costs.quantum_interference,
            margin=UNKNOWN_MARGIN if costs is None or not is_measured else costs.quantum_margin,
        )
        self._costs: Costs | None = None

    @property
    def is_known(self) -> bool:
        """Whether there is anything behind `costs`: a profile, or an iteration at least."""
        return any(self._iterations.coefficients)

    @property
    def costs(self) -> Costs:
        """What is known now; the same object until something more is observed.

        Rows of quanta that were never seen are taken from those that were, or from prompt tokens,
        so that no work looks free.
        """
        if self._costs is None:
            iterations, quanta = self._iterations, self._quanta
            base_s, decode_s, context_s, token_s, attention_s, chunk_s = iterations.coefficients
            quantum_base_s, kl_s, forward_s, backward_s, step_s = quanta.coefficients
            self._costs = Costs(
                base_s=base_s,
                per_decode_s=decode_s,
                per_context_s=context_s,
                per_token_s=token_s,
                per_attention_s=attention_s,
                per_chunk_s=chunk_s,
                margin=iterations.margin,
                interference=iterations.interference,
                quantum_interference=quanta.interference,
                per_row_s=complete_rows((kl_s, forward_s, backward_s), token_s),
                quantum_base_s=quantum_base_s,
                step_s=step_s,
                quantum_margin=quanta.margin,
            )
        return self._costs

    def observe_iteration(
        self, shape: IterationShape, seconds: float, *, beside_training: float
    ) -> None:
        """An iteration has ended.

        Args:
            shape: what it held.
            seconds: from handing it to the lane until its result was there.
            beside_training: the share of that in which a quantum ran and was not held, 0 to 1.
        """
        self._iterations.observe(iteration_features(shape), seconds, beside_training)
        self._costs = None

    def observe_quantum(
        self, kind: str, tokens: int, seconds: float, *, beside_serving: float
    ) -> None:
        """A quantum has ended.

        Args:
            kind: "kl", "forward", "backward" or "step".
            tokens: rows that it computed.
            seconds: that it ran, without the time that it was held.
            beside_serving: the share of that in which an iteration ran, 0 to 1.
        """
        self._quanta.observe(quantum_features(kind, tokens), seconds, beside_serving)
        self._costs = None

    @property
    def is_stale(self) -> bool:
        """Whether recent work is far from what the profile says; see `CostReport`."""
        return self._iterations.is_stale

    def report(self) -> CostReport:
        """How well predictions held."""
        iterations, quanta = self._iterations, self._quanta
        return CostReport(
            iterations=iterations.observations,
            quanta=quanta.observations,
            error_p50=iterations.error(0.5),
            error_p95=iterations.error(0.95),
            bias=iterations.bias,
            quantum_error_p50=quanta.error(0.5),
            quantum_error_p95=quanta.error(0.95),
            quantum_bias=quanta.bias,
            margin=iterations.margin,
            interference=iterations.interference,
            quantum_interference=quanta.interference,
            is_stale=iterations.is_stale,
            slowdown=iterations.slowdown,
            shifts=iterations.shifts,
        )


def complete_rows(rows_s: tuple[float, float, float], token_s: float) -> tuple[float, float, float]:
    """Seconds per row of "kl", "forward" and "backward", where some are not known (0).

    Args:
        rows_s: what is known.
        token_s: seconds per prompt token.
    """
    kl_s, forward_s, backward_s = rows_s
    if forward_s <= 0.0:
        forward_s = backward_s / BACKWARD_ROW or kl_s or token_s * FORWARD_ROW
    return kl_s or forward_s, forward_s, backward_s or forward_s * BACKWARD_ROW
