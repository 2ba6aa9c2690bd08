"""An executor without a model, whose answers show every mistake of the engine, and its lanes.

The next token of `FakeExecutor` is a hash of all tokens so far, *as read through the block table
from a KV array*, together with the adapter that computed each and the sequence's random key. A page
handed to two sequences, a stale prefix, a chunk at the wrong place, a slot with other weights: each
changes what is generated from there on. `reference` computes the same from the prompt alone.
"""

from __future__ import annotations

import asyncio
import math
import zlib
from array import array
from collections import deque
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cotune.cache.manager import KVCacheManager
from cotune.policy import Budgets, make_policy
from cotune.policy.costs import CostModel
from cotune.policy.memory import MemoryThreshold
from cotune.policy.profile import Profile, ProfileKey
from cotune.runtime.adapters import AdapterStore
from cotune.runtime.answer_text import AnswerText
from cotune.runtime.engine import Engine
from cotune.runtime.lora import LoraWeights
from cotune.runtime.randomness import stream_key
from cotune.runtime.scheduling.memory_watch import MemoryNeeds, MemoryWatch
from cotune.runtime.scheduling.scheduler import Scheduler
from cotune.runtime.scheduling.timeline import Timeline
from cotune.runtime.sequence import Request
from cotune.runtime.statistics import Listeners
from cotune.runtime.step import SequenceResult, SequenceStep, StepResult
from cotune.runtime.stream import ResponseStream
from cotune.runtime.types import BASE, AdapterVersion, SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Container, Iterable, Sequence

    from cotune.policy import Costs, IterationPlan, Observation, Policy, RequestClass
    from cotune.runtime.types import Response
    from cotune.streams.memory import MemoryReading

VOCAB = 64
EOS = 0


def next_token(tokens: Sequence[int], salts: Sequence[int], key: int) -> int:
    """What follows these tokens, computed by adapters with these salts. 1 in 64 is `EOS`."""
    data = array("Q", [*tokens, *salts, key, len(tokens)])
    return zlib.crc32(data.tobytes()) % VOCAB


def reference(
    prompt: Sequence[int], params: SamplingParams, *, seed: int = 0, stream: int = 0, salt: int = 0
) -> list[int]:
    """The answer that `FakeExecutor` must give, end-of-sequence token included."""
    key = stream_key(seed, stream)
    tokens = list(prompt)
    assert params.max_tokens is not None
    for _ in range(params.max_tokens):
        token = next_token(tokens, [salt] * len(tokens), key)
        if token == EOS and len(tokens) - len(prompt) < params.min_tokens:
            token = 1
        tokens.append(token)
        if token in params.stop_token_ids or (token == EOS and not params.ignore_eos):
            break
    return tokens[len(prompt) :]


def letters(token_ids: Sequence[int]) -> str:
    """The text of tokens: a letter each."""
    return "".join(chr(ord("A") + token) for token in token_ids)


class FakeDetokenizer:
    """A letter per token. Token ids in `explosive` cannot be made into text."""

    def __init__(self, explosive: Container[int] = ()) -> None:
        self._explosive = explosive

    def push(self, token_ids: Iterable[int]) -> str:
        ids = list(token_ids)
        if any(token in self._explosive for token in ids):
            raise ValueError("this text cannot be made")
        return letters(ids)

    def finish(self) -> str:
        return ""


class FakeExecutor:
    """Computes `next_token` through pages. See the module docstring.

    Attributes:
        failures: exceptions to raise, one per coming call to `execute`; None for a call that works.
        broken_keys: random keys of sequences that fail alone.
        history: the steps of every call.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.kv: list[list[tuple[int, int] | None]] = [[None] * page_size for _ in range(num_pages)]
        self.slots: dict[int, int] = {0: 0}
        self.failures: deque[BaseException | None] = deque()
        self.install_failures: deque[Exception | None] = deque()
        self.broken_keys: set[int] = set()
        self.history: list[tuple[SequenceStep, ...]] = []

    def execute(self, steps: Sequence[SequenceStep], /) -> StepResult:
        self.history.append(tuple(steps))
        sizes = [len(step.token_ids) for step in steps]
        assert steps
        assert sizes == sorted(sizes, key=lambda size: size != 1), "decodes come first"
        if self.failures and (failure := self.failures.popleft()) is not None:
            raise failure
        written: set[tuple[int, int]] = set()
        for step in steps:
            for offset, token in enumerate(step.token_ids):
                page, place = divmod(step.start + offset, self.page_size)
                at = (step.block_table[page], place)
                assert at not in written, "two sequences write one slot"
                written.add(at)
                self.kv[at[0]][at[1]] = (token, self.slots[step.adapter_slot])
        return StepResult([self._result(step) for step in steps], 0.001, 0.0001)

    def _result(self, step: SequenceStep) -> SequenceResult:
        end = step.start + len(step.token_ids)
        logprobs: tuple[TokenLogprob, ...] = ()
        if step.prompt_logprobs is not None:
            logprobs = tuple(
                TokenLogprob(token, -float(step.start + i), 1)
                for i, token in enumerate(step.prompt_targets)
            )
        if step.sampling is None:
            return SequenceResult(prompt_logprobs=logprobs)
        if step.sampling.key in self.broken_keys:
            return SequenceResult(error="the logits are not finite")
        entries = [
            self.kv[step.block_table[p // self.page_size]][p % self.page_size] for p in range(end)
        ]
        tokens = [-1 % 2**32 if entry is None else entry[0] for entry in entries]
        salts = [-1 % 2**32 if entry is None else entry[1] for entry in entries]
        token = next_token(tokens, salts, step.sampling.key)
        state = step.sampling
        if token == EOS and len(state.output_ids) < state.params.min_tokens:
            token = 1
        logprob = None
        if state.params.logprobs is not None:
            logprob = TokenLogprob(token, -0.5, 1)
        return SequenceResult(token, logprob, logprobs)

    def install_adapter(self, slot: int, weights: LoraWeights, /) -> None:
        if self.install_failures and (failure := self.install_failures.popleft()) is not None:
            raise failure
        self.slots[slot] = weights.rank

    def clear_adapter(self, slot: int, /) -> None:
        self.slots[slot] = 0

    def describe(self) -> dict[str, str]:
        return {"attention": "fake"}


class InlineLane:
    """Runs jobs on the loop's thread, after everything that is ready now has had its turn."""

    async def run(self, fn: Callable[..., Any], /, *args: Any) -> Any:
        await _turn()
        return fn(*args)


class GatedLane:
    """Holds every job until the test lets it go; the job has been handed in meanwhile."""

    def __init__(self) -> None:
        self._gates: asyncio.Queue[asyncio.Future[None]] = asyncio.Queue()
        self._last: asyncio.Future[None] | None = None
        self._is_open = False

    def open(self) -> None:
        """Hold nothing any more."""
        self._is_open = True
        if self._last is not None and not self._last.done():
            self._last.set_result(None)

    @property
    def in_flight(self) -> bool:
        """Whether a job was handed in and not let go."""
        return self._last is not None and not self._last.done()

    async def run(self, fn: Callable[..., Any], /, *args: Any) -> Any:
        assert not self.in_flight, "the engine hands in one job at a time"
        gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._last = gate
        if self._is_open:
            await _turn()
            gate.set_result(None)
        else:
            self._gates.put_nowait(gate)
        cancelled: asyncio.CancelledError | None = None
        while not gate.done():  # like the real lane: what is in flight runs to its end
            try:
                await asyncio.shield(gate)
            except asyncio.CancelledError as error:
                cancelled = error
        result = fn(*args)
        if cancelled is not None:
            raise cancelled
        return result

    async def reached(self) -> asyncio.Future[None]:
        """Wait until the next job is in flight; set its result to let it go."""
        return await self._gates.get()

    async def step(self) -> None:
        """Let the next job go, and return when the engine has had its turn after it."""
        (await self.reached()).set_result(None)
        await settle()


@asynccontextmanager
async def supervised(*lanes: GatedLane, limit_s: float = 60.0) -> AsyncIterator[asyncio.TaskGroup]:
    """A task group for callers of these lanes. Its end opens them, so that no task waits on."""
    async with asyncio.timeout(limit_s), asyncio.TaskGroup() as group:
        try:
            yield group
        finally:
            for lane in lanes:
                lane.open()


async def _turn() -> None:
    """Let everything else that is ready run once."""
    loop = asyncio.get_running_loop()
    turn = loop.create_future()
    loop.call_soon(turn.set_result, None)
    await turn


async def settle(turns: int = 12) -> None:
    """Let chains of callbacks that need no thread run to their ends."""
    for _ in range(turns):
        await _turn()


class CheckingPolicy:
    """Plans like another policy and checks the engine's books before every plan."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.check: Callable[[], None] = lambda: None
        self.observations: list[Observation] = []

    def plan(self, observation: Observation) -> IterationPlan:
        self.check()
        self.observations.append(observation)
        plan = self._policy.plan(observation)
        assert plan.tokens <= observation.budgets.tokens
        return plan


class Recorder:
    """A listener that keeps what it was told."""

    def __init__(self) -> None:
        self.finished: list[Response] = []
        self.ttfts: list[float] = []
        self.gaps: list[float] = []
        self.rejected: list[str] = []

    def on_finished(self, response: Response, /) -> None:
        self.finished.append(response)

    def on_first_token(self, ttft_s: float, /) -> None:
        self.ttfts.append(ttft_s)

    def on_token_gap(self, gap_s: float, /) -> None:
        self.gaps.append(gap_s)

    def on_rejected(self, reason: str, /) -> None:
        self.rejected.append(reason)


class FakeClock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def profile_of(costs: Costs) -> Profile:
    """As if they had been measured."""
    key = ProfileKey(model="fake", fingerprint="f", device="none", dtype="int8", threads=1)
    return Profile(key=key, costs=costs, created="2026-01-01T00:00:00+00:00")


@dataclass
class Bench:
    """An engine on a fake executor. A context manager that runs it, and checks it at the end."""

    num_pages: int = 64
    page_size: int = 4
    tokens: int = 64
    sequences: int = 32
    max_queue: int = 1024
    max_model_len: int = 256
    max_slots: int = 2
    prefix_sharing: bool = True
    lane: Any = field(default_factory=InlineLane)
    clock: FakeClock = field(default_factory=FakeClock)
    explosive: Container[int] = ()
    planner: Policy = field(default_factory=lambda: make_policy("inference-only"))
    ttft_s: float = math.inf
    tbt_s: float = math.inf
    read_memory: Callable[[], MemoryReading] | None = None
    page_bytes: int = 0
    costs: Costs | None = None
    """What work costs here; where nothing is known, nothing is decided ahead."""

    def __post_init__(self) -> None:
        self.executor = FakeExecutor(self.num_pages, self.page_size)
        self.cache = KVCacheManager(self.num_pages, self.page_size, self.prefix_sharing)
        self.adapters = AdapterStore(
            self.max_slots,
            on_retired=self.cache.drop_namespace,
            on_returned=self.cache.revive_namespace,
        )
        self.policy = CheckingPolicy(self.planner)
        memory = None
        if self.read_memory is not None:
            memory = MemoryWatch(
                self.read_memory,
                MemoryThreshold(self.read_memory().total_bytes),
                MemoryNeeds(page=self.page_bytes),
                self.cache,
                lambda: None,
            )
        self.scheduler = Scheduler(
            "checking",
            self.policy,
            Budgets(
                self.tokens, self.sequences, self.page_size, ttft_s=self.ttft_s, tbt_s=self.tbt_s
            ),
            costs=CostModel(None if self.costs is None else profile_of(self.costs)),
            timeline=Timeline(clock=self.clock),
            memory=memory,
            clock=self.clock,
        )
        self.recorder = Recorder()
        listeners = Listeners()
        listeners.add(self.recorder)
        self.engine = Engine(
            executor=self.executor,
            lane=self.lane,
            cache=self.cache,
            adapters=self.adapters,
            scheduler=self.scheduler,
            max_model_len=self.max_model_len,
            max_queue=self.max_queue,
            make_text=lambda _prompt, params: AnswerText(FakeDetokenizer(self.explosive), params),
            eos_token_ids=frozenset({EOS}),
            listeners=listeners,
            clock=self.clock,
        )
        self.policy.check = self.engine.check_integrity
        self._ids = 0
        self._task: asyncio.Task[None] | None = None
        self._group = asyncio.TaskGroup()

    async def __aenter__(self) -> Bench:
        await self._group.__aenter__()
        self._task = self._group.create_task(self.engine.run())
        return self

    async def __aexit__(self, *details: Any) -> None:
        if details[0] is not None and isinstance(self.lane, GatedLane):
            self.lane.open()  # or a test that failed would hang
        await self.engine.drain(60.0)
        self.engine.stop()
        await self._group.__aexit__(None, None, None)
        if details[0] is None:
            self.check_empty()

    def check_empty(self) -> None:
        """Nothing is left: no page, slot, pin, sequence or held sibling."""
        self.engine.check_integrity()
        statistics = self.engine.statistics()
        assert statistics.running == statistics.waiting == 0
        assert statistics.cache.owned_pages == 0
        assert statistics.cache.free_pages + statistics.cache.cached_pages == self.num_pages
        assert all(info.users == 0 for info in self.adapters.list())
        assert self.engine._fresh == []

    def add_adapter(self, name: str, salt: int) -> AdapterVersion:
        """Publish fake weights; `salt` is what they do to the output."""
        return self.adapters.add(name, LoraWeights(salt, {}), Path(name))

    def request(
        self,
        prompt: Sequence[int],
        *,
        version: AdapterVersion = BASE,
        priority: int = 0,
        seed: int = 0,
        request_id: str | None = None,
        arrival_s: float | None = None,
        request_class: RequestClass = "interactive",
        **params: Any,
    ) -> Request:
        """A request that was not submitted yet."""
        self._ids += 1
        resolved = SamplingParams(**{"max_tokens": 8, **params}).resolve({})
        return Request(
            request_id=request_id or f"r{self._ids}",
            prompt=tuple(prompt),
            params=resolved,
            max_tokens=self.engine.limit_tokens(len(prompt), resolved),
            seed=seed,
            version=version,
            model="fake",
            priority=priority,
            arrival_s=self.clock.now_s if arrival_s is None else arrival_s,
            request_class=request_class,
        )

    def stream(self, prompt: Sequence[int], **options: Any) -> ResponseStream:
        """A stream as callers get it."""
        request = self.request(prompt, **options)

        async def admit(_request_id: str) -> tuple[Engine, Request]:
            self.engine.submit(request)
            return self.engine, request

        return ResponseStream(request.id, admit)


async def collect(stream: AsyncIterator[Any]) -> list[Any]:
    """Everything that an iterator gives."""
    return [item async for item in stream]
