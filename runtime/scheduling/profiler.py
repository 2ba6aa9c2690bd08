"""Measures what iterations and quanta cost here, by running them.

    profile = await measure(loaded, executor, lane, key=key, effort=SHORT)

Iterations are synthetic: any token, on any pages, so they run where no request does: before the
engine starts, or in a process of their own. Each kind of iteration is timed as the engine times
its own, from handing it to the lane until its result is there. One run of each does not count (the
first of a shape makes its buffers and primitives), nor does the first of all, which may take
seconds, count against the budget; of the others the lower quartile does, for
whatever else the machine is busy with only ever adds. How far they scatter is the margin.

    kind            decodes x context, chunks of tokens after context
    ─────────────   ──────────────────────────────────────────────────────────────
    decodes         1 x 32 … 32 x 1024      base, per decode, per KV entry
    prefill         16 … 512 after 0        per token, per pair of query and key
    later chunk     64 after 512            pairs of query and key apart from tokens
    many chunks     4 of 16                 per chunk
    both            8 x 64 and 64 after 0   holds the sum against the parts
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar, TypeVarTuple

import torch

from ...policy.costs import IterationShape
from ...policy.profile import IterationPoint, MemoryCosts, Profile, QuantumPoint, fit_costs
from ..learning.samples import PreferencePair, RatedCompletion
from ..sampling import SamplingState
from ..step import SequenceStep
from ..types import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ...policy.profile import ProfileKey
    from ..learning.samples import Sample
    from ..loading import LoadedModel
    from ..training.trainer import Trainer

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

log = logging.getLogger(__name__)

ESSENTIAL = 3
"""Kinds of iterations that are measured whatever the budget: the first of the grid."""


MAX_MARGIN = 3.0
"""A larger one says that the machine was busy, not what iterations take."""


class ProfiledExecutor(Protocol):
    """What is measured: `Executor`."""

    @property
    def num_pages(self) -> int:
        """KV pages there are."""

    @property
    def page_size(self) -> int:
        """Tokens per page."""

    def execute(self, steps: Sequence[SequenceStep], /) -> object:
        """Run one iteration."""

    def describe(self) -> dict[str, str]:
        """What was chosen at start."""


class WorkLane(Protocol):
    """Where it runs: `Lane`."""

    @property
    def device(self) -> torch.device:
        """What it computes on."""

    async def run(self, fn: Callable[[*Ts], T], /, *args: *Ts) -> T:
        """Run `fn` on the lane's thread; resolves when the device has finished."""


Progress: TypeAlias = "Callable[[int, int, str], None]"
"""Told (kinds done, kinds in all, what is next)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured.

    Attributes:
        rounds: runs of each kind that count.
        budget_s: seconds after which nothing but the `ESSENTIAL` kinds is measured; a kind that
            would exceed them, by what is known so far, is left out.
        decodes: (sequences, context of each).
        prefills: (sequences, tokens of each, context of each).
        quantum_rows: rows of the quanta.
    """

    rounds: int
    budget_s: float
    decodes: tuple[tuple[int, int], ...]
    prefills: tuple[tuple[int, int, int], ...]
    quantum_rows: tuple[int, ...] = (96, 384)


SHORT = Effort(
    rounds=2,
    budget_s=1.5,
    decodes=((1, 32), (8, 64), (1, 512), (8, 256), (32, 64), (16, 256)),
    prefills=((1, 16, 0), (1, 64, 0), (1, 256, 0), (1, 64, 512), (4, 16, 0)),
)
"""For the first start: a quarter of a second for a model of ten million parameters on one core."""
STANDARD = replace(SHORT, rounds=7, budget_s=20.0)
THOROUGH = Effort(
    rounds=15,
    budget_s=240.0,
    decodes=tuple((n, c) for c in (32, 256, 1024) for n in (1, 2, 4, 8, 16, 32, 64, 128)),
    prefills=(
        *((1, n, 0) for n in (8, 16, 32, 64, 128, 256, 512)),
        *((1, n, c) for n in (16, 64, 256) for c in (256, 1024)),
        *((k, n, 0) for k in (2, 4, 8) for n in (16, 64)),
    ),
    quantum_rows=(64, 128, 256, 512, 1024),
)


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of iteration: sequences as (tokens computed now, tokens computed before)."""

    sequences: tuple[tuple[int, int], ...]
    shape: IterationShape

    @classmethod
    def of(cls, decodes: tuple[int, int], prefill: tuple[int, int, int]) -> _Kind:
        count, context = decodes
        shape = IterationShape(count, count * (context + 1))
        chunks, tokens, before = prefill
        for _ in range(chunks):
            shape = shape.with_chunk(tokens, before)
        return cls(((1, context),) * count + ((tokens, before),) * chunks, shape)

    @property
    def tokens(self) -> int:
        return self.shape.decodes + self.shape.prefill_tokens

    def pages(self, page_size: int) -> int:
        return sum(-(-(tokens + before) // page_size) for tokens, before in self.sequences)


async def measure(
    loaded: LoadedModel,
    executor: ProfiledExecutor,
    lane: WorkLane,
    *,
    key: ProfileKey,
    effort: Effort = SHORT,
    trainer: Trainer | None = None,
    training_lane: WorkLane | None = None,
    progress: Progress | None = None,
) -> Profile:
    """A profile of what runs on these lanes now.

    KV pages hold rubbish afterwards, which is what free pages may hold. A trainer has the weights
    and the optimizer that it had; without one, what training costs is derived from prefill, and
    neither kind of interference is known.

    Args:
        loaded: the model.
        executor: runs iterations, on `lane`.
        lane: nothing else may run there meanwhile.
        key: what the profile is of.
        effort: how much to measure.
        trainer: runs quanta, on `training_lane`; no batch may be under way.
        training_lane: required with `trainer`.
        progress: is told (kinds done, kinds in all, what is next).

    Raises whatever an iteration or a quantum raises.
    """
    kinds = plan_grid(effort, loaded.max_model_len, executor)
    total = len(kinds) * (1 + effort.rounds) + (0 if trainer is None else 3)
    report = progress or (lambda done, of, what: None)
    bench = _IterationBench(loaded, executor, lane)
    points, scatter, prefill_bytes = await _measure_grid(bench, kinds, effort, report, total)
    quanta: tuple[QuantumPoint, ...] = ()
    interference = quantum_interference = 1.0
    row_bytes = 0.0
    if trainer is not None:
        assert training_lane is not None, "quanta run on a lane"
        done = len(kinds) * (1 + effort.rounds)
        training = _QuantumBench(loaded, trainer, training_lane)
        state = await training_lane.run(trainer.snapshot)
        try:
            report(done, total, "training")
            quanta = await training.measure(effort)
            report(done + 1, total, "memory of training")
            row_bytes = await training.row_bytes(max(effort.quantum_rows))
            report(done + 2, total, "both at once")
            interference, quantum_interference = await _measure_interference(
                bench, _middle(kinds), training, effort
            )
        finally:
            await training_lane.run(trainer.restore, state)
    report(total, total, "")
    costs = fit_costs(points, quanta)
    costs = costs._replace(
        margin=min(max(costs.margin, scatter), MAX_MARGIN),
        interference=interference,
        quantum_interference=quantum_interference,
    )
    return Profile(
        key=key,
        costs=costs,
        memory=MemoryCosts(
            training_row_bytes=row_bytes or _guess_row_bytes(loaded),
            prefill_token_bytes=prefill_bytes or _guess_token_bytes(loaded),
            page_bytes=_page_bytes(executor),
        ),
        points=tuple(points),
        quanta=quanta,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def plan_grid(effort: Effort, max_model_len: int, executor: ProfiledExecutor) -> list[_Kind]:
    """The kinds of iterations that can run here, the essential and the small ones first.

    Contexts and chunks are cut to what the model takes; kinds that the pages do not hold are left
    out, the first excepted.
    """

    def cut(tokens: int, before: int) -> tuple[int, int]:
        tokens = max(1, min(tokens, max_model_len // 2))
        return tokens, min(before, max_model_len - tokens)

    kinds: dict[IterationShape, _Kind] = {}
    for count, context in effort.decodes:
        _, before = cut(1, context)
        kind = _Kind.of((count, before), (0, 0, 0))
        kinds.setdefault(kind.shape, kind)
    for count, length, context in effort.prefills:
        tokens, before = cut(length, context)
        kind = _Kind.of((0, 0), (count, tokens, before))
        kinds.setdefault(kind.shape, kind)
    tokens, before = cut(64, 64)
    kind = _Kind.of((8, before), (1, tokens, 0))
    kinds.setdefault(kind.shape, kind)
    ordered = list(kinds.values())
    first = [ordered[0], next(k for k in ordered if k.shape.chunks), *ordered[1:2]]
    rest = sorted((k for k in ordered if k not in first), key=lambda k: k.tokens)
    fitting = [k for k in (*first, *rest) if k.pages(executor.page_size) <= executor.num_pages]
    return fitting or [_Kind.of((1, 0), (0, 0, 0))]


class _IterationBench:
    """Times synthetic iterations."""

    def __init__(self, loaded: LoadedModel, executor: ProfiledExecutor, lane: WorkLane) -> None:
        self._executor = executor
        self._lane = lane
        self._vocab_size = loaded.vocab_size
        self._params = SamplingParams(temperature=0.0).resolve({})
        self._touched = 0  # pages, from the first on

    async def touch(self, kind: _Kind) -> None:
        """Write to the pages that it reads: memory that was never written reads as one page."""
        if not any(before for _, before in kind.sequences):
            return
        pages = kind.pages(self._executor.page_size)
        for start in range(self._touched, pages, 64):
            steps = [self._step(1, 0, [page]) for page in range(start, min(start + 64, pages))]
            await self._lane.run(self._executor.execute, steps)
        self._touched = max(self._touched, pages)

    async def run(self, kind: _Kind) -> float:
        """Seconds of one iteration, as the engine would see them."""
        steps = self.steps(kind)
        began_s = time.perf_counter()
        await self._lane.run(self._executor.execute, steps)
        return time.perf_counter() - began_s

    async def token_bytes(self, kind: _Kind) -> float:
        """Memory that each token of the iteration takes while it runs; 0 where nobody counts."""
        device = self._lane.device
        if device.type != "cuda":
            return 0.0
        steps = self.steps(kind)

        def peak() -> int:
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            self._executor.execute(steps)
            return torch.cuda.max_memory_allocated(device) - before

        return await self._lane.run(peak) / kind.tokens

    def steps(self, kind: _Kind) -> list[SequenceStep]:
        """The iteration, on pages from the first on."""
        size = self._executor.page_size
        steps, page = [], 0
        for tokens, before in kind.sequences:
            end = page + -(-(tokens + before) // size)
            steps.append(self._step(tokens, before, list(range(page, end))))
            page = end
        return steps

    def _step(self, tokens: int, before: int, pages: list[int]) -> SequenceStep:
        # Other tokens each time would cost the same: no kernel looks at their values.
        ids = [(7919 * (before + at) + 1) % self._vocab_size for at in range(tokens)]
        sampling = SamplingState(self._params, ids, [], frozenset(), 0, seed=0)
        return SequenceStep(token_ids=ids, start=before, block_table=pages, sampling=sampling)


def _typical(runs: Sequence[float]) -> float:
    """The lower quartile; of two the lower."""
    return sorted(runs)[len(runs) // 4]


async def _measure_grid(
    bench: _IterationBench,
    kinds: Sequence[_Kind],
    effort: Effort,
    report: Progress,
    total: int,
) -> tuple[list[IterationPoint], float, float]:
    """What each kind takes, how far single runs exceed that, and what a token takes in bytes."""
    await bench.run(kinds[0])  # loads libraries and fills caches: its time is nobody's
    began_s = time.perf_counter()
    seconds: dict[_Kind, list[float]] = {}
    token_s = 0.0  # of the dearest kind so far: what a larger one would take at least
    done = 0
    for turn in range(1 + effort.rounds):
        for index, kind in enumerate(kinds):
            left_s = effort.budget_s - (time.perf_counter() - began_s)
            is_due = left_s > (0.0 if turn else token_s * kind.tokens)
            # A run that warms up and one that counts.
            if is_due or (turn <= 1 and index < ESSENTIAL):
                report(done, total, _describe(kind.shape))
                if turn == 0:
                    await bench.touch(kind)
                taken_s = await bench.run(kind)
                if turn:
                    seconds.setdefault(kind, []).append(taken_s)
                else:
                    seconds[kind] = []
                    token_s = max(token_s, taken_s / max(kind.tokens, 16))
            done += 1
        if turn == 0:
            kinds = list(seconds)
            done = len(kinds)
    for kind, runs in seconds.items():
        if not runs:  # the budget was spent on warming up
            runs.append(await bench.run(kind))
    points = [
        IterationPoint(shape=kind.shape, seconds=_typical(runs)) for kind, runs in seconds.items()
    ]
    excess = sorted(
        taken / point.seconds
        for point, runs in zip(points, seconds.values(), strict=True)
        for taken in runs
    )
    scatter = excess[min(int(0.95 * len(excess)), len(excess) - 1)]
    largest = max(seconds, key=lambda kind: kind.shape.prefill_tokens)
    return points, scatter, await bench.token_bytes(largest)


def _middle(kinds: Sequence[_Kind]) -> _Kind:
    """A decode of a usual width, for what training does to it."""
    decodes = [kind for kind in kinds if not kind.shape.chunks]
    return min(decodes or kinds, key=lambda kind: abs(kind.shape.decodes - 8))


def _describe(shape: IterationShape) -> str:
    parts = []
    if shape.decodes:
        parts.append(f"{shape.decodes} decodes")
    if shape.chunks:
        parts.append(f"prefill of {shape.prefill_tokens}")
    return " + ".join(parts)


# -- training --------------------------------------------------------------------------------------


class _QuantumBench:
    """Times the quanta of made-up batches: pairs and rated completions, so that all kinds run."""

    def __init__(self, loaded: LoadedModel, trainer: Trainer, lane: WorkLane) -> None:
        self._loaded = loaded
        self._trainer = trainer
        self._lane = lane

    async def measure(self, effort: Effort) -> tuple[QuantumPoint, ...]:
        """What each kind and number of rows takes."""
        seconds: dict[tuple[str, int], list[float]] = {}
        rounds = max(2, effort.rounds // 3)
        for turn in range(1 + rounds):
            for rows in effort.quantum_rows:
                await self._lane.run(self._trainer.begin, self._batch(rows))
                while (quantum := self._trainer.next_quantum()) is not None:
                    began_s = time.perf_counter()
                    await self._lane.run(self._trainer.run_quantum)
                    taken_s = time.perf_counter() - began_s
                    if turn:
                        seconds.setdefault((quantum.kind, quantum.tokens), []).append(taken_s)
        return tuple(
            QuantumPoint(kind=kind, tokens=tokens, seconds=_typical(runs))
            for (kind, tokens), runs in sorted(seconds.items())
        )

    async def row_bytes(self, rows: int) -> float:
        """What a row keeps between its forward and its backward, at the peak."""
        trainer, device = self._trainer, self._lane.device

        def forward_and_backward() -> float:
            trainer.begin(self._batch(rows, rated=False))
            quantum = trainer.next_quantum()
            assert quantum is not None, "a batch has begun"
            assert quantum.kind == "forward", "there is nothing rated in it"
            try:
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                    before = torch.cuda.memory_allocated(device)
                    trainer.run_quantum()
                    trainer.run_quantum()
                    return (torch.cuda.max_memory_allocated(device) - before) / quantum.tokens
                return _saved_bytes(self._loaded.model, trainer.run_quantum) / quantum.tokens
            finally:
                trainer.abandon()

        return await self._lane.run(forward_and_backward)

    async def run_until(self, stop: asyncio.Event, rows: int) -> list[tuple[str, int, float]]:
        """Train until `stop` is set: (kind, rows, seconds) of each quantum that ended before."""
        runs: list[tuple[str, int, float]] = []
        while not stop.is_set():
            await self._lane.run(self._trainer.begin, self._batch(rows, rated=False))
            while (quantum := self._trainer.next_quantum()) is not None:
                began_s = time.perf_counter()
                await self._lane.run(self._trainer.run_quantum)
                if stop.is_set():
                    await self._lane.run(self._trainer.abandon)
                    break
                runs.append((quantum.kind, quantum.tokens, time.perf_counter() - began_s))
        return runs

    def _batch(self, rows: int, *, rated: bool = True) -> list[Sample]:
        """Samples of about `rows` rows together, each within what the model takes."""
        width = max(1, min(64, self._loaded.max_model_len // 4))
        count = max(1, rows // (3 * width))
        pairs: list[Sample] = [
            PreferencePair(
                key=index,
                adapter="profile",
                source="profile",
                prompt_ids=self._ids(index, width),
                chosen_ids=self._ids(index + 1, width),
                rejected_ids=self._ids(index + 2, width),
                ref_chosen_logp=-2.0 * width,
                ref_rejected_logp=-2.0 * width,
            )
            for index in range(count)
        ]
        if not rated:
            return pairs
        return pairs + [
            RatedCompletion(
                key=count + index,
                adapter="profile",
                source="profile",
                prompt_ids=self._ids(index, width),
                completion_ids=self._ids(index + 1, width),
                is_desirable=index % 2 == 0,
                ref_logp=-2.0 * width,
            )
            for index in range(2)
        ]

    def _ids(self, seed: int, count: int) -> tuple[int, ...]:
        return tuple(
            (7919 * (seed * count + at) + 1) % self._loaded.vocab_size for at in range(count)
        )


async def _measure_interference(
    bench: _IterationBench, kind: _Kind, training: _QuantumBench, effort: Effort
) -> tuple[float, float]:
    """What training costs iterations beside it, and the other way round, as factors."""
    count = 10 * effort.rounds
    rows = max(effort.quantum_rows)
    alone_s = _typical([await bench.run(kind) for _ in range(count)])
    quiet = await _train_for(training, rows, count * alone_s)
    beside: list[float] = []
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        busy = group.create_task(training.run_until(stop, rows))
        try:
            # As many again, and long enough for some batches to have been trained on.
            least_s = time.perf_counter() + sum(seconds for *_, seconds in quiet)
            while len(beside) < count or time.perf_counter() < least_s:
                beside.append(await bench.run(kind))
        finally:
            stop.set()
    usual = _by_kind(quiet)
    ratios = [
        taken / usual[kind] for kind, taken in _by_kind(busy.result()).items() if kind in usual
    ]
    return (
        max(1.0, _typical(beside) / alone_s),
        max(1.0, statistics.median(ratios)) if ratios else 1.0,
    )


async def _train_for(
    training: _QuantumBench, rows: int, seconds: float
) -> list[tuple[str, int, float]]:
    """Train with nothing beside it for so long."""
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, stop.set)
    return await training.run_until(stop, rows)


def _by_kind(runs: Sequence[tuple[str, int, float]]) -> dict[tuple[str, int], float]:
    found: dict[tuple[str, int], list[float]] = {}
    for kind, rows, seconds in runs:
        found.setdefault((kind, rows), []).append(seconds)
    return {kind: _typical(taken) for kind, taken in found.items()}


# -- memory ----------------------------------------------------------------------------------------


def _saved_bytes(model: Any, forward: Callable[[], object]) -> int:
    """Bytes that autograd keeps of `forward` for its backward, the weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(saved.values())


def guess_memory(loaded: LoadedModel, executor: ProfiledExecutor) -> MemoryCosts:
    """What work takes, from the widths of the model: for where nothing was measured."""
    return MemoryCosts(
        training_row_bytes=_guess_row_bytes(loaded),
        prefill_token_bytes=_guess_token_bytes(loaded),
        page_bytes=_page_bytes(executor),
    )


def _guess_token_bytes(loaded: LoadedModel) -> float:
    """What a token takes while its iteration runs, from the widths of the model.

    The residual stream, the normed copy, the projections and the two halves of the gated product
    of one layer are there at once; layers give theirs back.
    """
    hidden, ffn = _widths(loaded)
    return float(loaded.dtype.itemsize * (6 * hidden + 3 * ffn))


def _guess_row_bytes(loaded: LoadedModel) -> float:
    """What a row of training keeps, from the widths of the model.

    Each layer keeps the inputs of its norms and products, and the halves of the gated one.
    """
    hidden, ffn = _widths(loaded)
    layers = len(loaded.attention_layers)
    return float(loaded.dtype.itemsize * layers * (8 * hidden + 3 * ffn))


def _widths(loaded: LoadedModel) -> tuple[int, int]:
    hidden = int(loaded.model.get_input_embeddings().embedding_dim)
    config = loaded.model.config
    return hidden, int(getattr(config, "intermediate_size", None) or 4 * hidden)


def _page_bytes(executor: ProfiledExecutor) -> int:
    described = executor.describe()
    return int(described.get("kv_bytes", 0)) // max(executor.num_pages, 1)
