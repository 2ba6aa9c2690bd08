"""Random arrivals, departures, failures and publications against the engine, on very few pages.

Whatever happens to others, a request that finishes has the tokens that `reference` computes from
its prompt alone, and the books of engine, cache and adapter store agree after every operation.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from cotune.policy import Costs, packing
from cotune.runtime.errors import IterationError, NotFoundError
from cotune.runtime.randomness import stream_key
from cotune.runtime.types import BASE, AdapterVersion, Delta
from engine_fakes import Bench, GatedLane, letters, reference, settle

if TYPE_CHECKING:
    from cotune.runtime.sequence import Request

PREFIXES = ([5] * 9, [7, 8] * 10, list(range(1, 18)))
NAMES = ("tutor", "poet")
MAX_STEPS = 3000
COSTS = Costs(0.5, 0.25, 0.0, 0.125, 0.0)
"""Where they are known, iterations are decided on while the one before runs."""


@dataclass
class Live:
    """A request that was submitted, and what its reader has seen."""

    request: Request
    salt: int
    seed: int
    deltas: list[Delta] = field(default_factory=list)
    is_aborted: bool = False
    may_fail: bool = False


def expected(live: Live, index: int) -> tuple[list[int], str]:
    """Tokens and text of one answer, as the parameters ask for them."""
    params = live.request.params
    tokens = reference(live.request.prompt, params, seed=live.seed, stream=index, salt=live.salt)
    hides_last = tokens[-1] == 0 or tokens[-1] in params.stop_token_ids
    shown = letters(tokens[: len(tokens) - hides_last])
    for count in range(params.min_tokens + 1, len(shown) + 1):
        ends = [len(stop) for stop in params.stop if shown[:count].endswith(stop)]
        if ends:
            return tokens[:count], shown[: count - max(ends)]
    return tokens, shown


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        num_pages=st.integers(10, 18),
        tokens=st.integers(3, 40),
        sequences=st.integers(2, 6),
        prefix_sharing=st.sampled_from([True, True, False]),
        slots=st.integers(1, 2),
        headroom=st.sampled_from([0, 0, packing.HEADROOM_TOKENS]),
        costs=st.sampled_from([None, COSTS]),
    )
    def start(
        self,
        num_pages: int,
        tokens: int,
        sequences: int,
        prefix_sharing: bool,
        slots: int,
        headroom: int,
        costs: Costs | None,
    ) -> None:
        self.patch = pytest.MonkeyPatch()  # without headroom there are many more preemptions
        self.patch.setattr(packing, "HEADROOM_TOKENS", headroom)
        self.runner = asyncio.Runner()
        self.lives: list[Live] = []
        self.salts: dict[AdapterVersion, int] = {BASE: 0}
        self.lane = GatedLane()
        self.bench = self.runner.run(
            self._start(
                num_pages=num_pages,
                tokens=tokens,
                sequences=sequences,
                prefix_sharing=prefix_sharing,
                max_slots=slots,
                costs=costs,
            )
        )

    async def _start(self, **options: Any) -> Bench:
        bench = Bench(page_size=4, lane=self.lane, max_model_len=40, **options)
        self.task = asyncio.get_running_loop().create_task(bench.engine.run())
        return bench

    # -- what happens ----------------------------------------------------------------------------

    @rule(
        prefix=st.sampled_from(PREFIXES),
        cut=st.integers(1, 20),
        tail=st.lists(st.integers(1, 9), max_size=2),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        max_tokens=st.one_of(st.integers(1, 4), st.integers(10, 18)),
        seed=st.integers(0, 3),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
        model=st.sampled_from([None, None, *NAMES, "tutor@1"]),
        stop=st.sampled_from([(), (), ("A",), ("CD", "Q"), ("E", "F", "GHI")]),
        min_tokens=st.sampled_from([0, 0, 3]),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
        copies=st.sampled_from([1, 1, 2, 4]),
    )
    def submit(
        self,
        prefix: list[int],
        cut: int,
        tail: list[int],
        n: int,
        max_tokens: int,
        seed: int,
        priority: int,
        model: str | None,
        stop: tuple[str, ...],
        min_tokens: int,
        prompt_logprobs: int | None,
        copies: int,
    ) -> None:
        version = BASE
        if model is not None:
            try:
                version = self.bench.adapters.resolve(model)
            except NotFoundError:
                return
        for copy in range(copies):
            request = self.bench.request(
                prefix[:cut] + tail,
                version=version,
                priority=priority,
                seed=seed + copy,
                n=n,
                max_tokens=max_tokens,
                min_tokens=min(min_tokens, max_tokens),
                stop=stop,
                prompt_logprobs=prompt_logprobs,
            )
            self.bench.engine.submit(request)
            self.lives.append(Live(request, self.salts[version], seed + copy))
        self.runner.run(settle())

    @rule(count=st.integers(1, 12))
    def iterate(self, count: int) -> None:
        for _ in range(count):
            if self.bench.engine.statistics().running:
                self.runner.run(self.lane.step())

    @precondition(lambda self: any(not live.request.is_done for live in self.lives))
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        live = data.draw(st.sampled_from([live for live in self.lives if not live.request.is_done]))
        live.is_aborted = True
        self.bench.engine.abort(live.request)
        self.runner.run(settle())

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        live = data.draw(st.sampled_from(self.lives))
        self._read(live)

    @rule(name=st.sampled_from(NAMES))
    def publish(self, name: str) -> None:
        salt = 1 + len(self.salts)
        self.salts[self.bench.add_adapter(name, salt)] = salt

    @rule(name=st.sampled_from(NAMES))
    def unload(self, name: str) -> None:
        if any(info.is_live and info.version.name == name for info in self.bench.adapters.list()):
            self.bench.adapters.remove(name)

    @rule()
    def fail_an_iteration(self) -> None:
        """The one that comes next; which requests are in it is for the engine to know."""
        if self.bench.engine.statistics().running:
            for live in self.lives:
                live.may_fail |= any(seq.in_flight for seq in live.request.sequences)
            self.bench.executor.failures.append(RuntimeError("injected"))
            self.runner.run(self.lane.step())
            self.bench.executor.failures.clear()  # where the job was an installation

    @precondition(lambda self: any(not live.request.is_done for live in self.lives))
    @rule(data=st.data())
    def break_a_sequence(self, data: st.DataObject) -> None:
        live = data.draw(st.sampled_from([live for live in self.lives if not live.request.is_done]))
        key = stream_key(live.seed, 0)
        for other in self.lives:
            other.may_fail |= other.seed == live.seed  # keys are made of the seed
        self.bench.executor.broken_keys.add(key)
        self.iterate(1)
        self.bench.executor.broken_keys.clear()

    @rule(seconds=st.sampled_from([0.1, 1.0, 100.0]))
    def wait(self, seconds: float) -> None:
        self.bench.clock.now_s += seconds

    # -- what holds ------------------------------------------------------------------------------

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "bench"):
            assert not self.task.done(), "the engine has stopped"
            self.bench.engine.check_integrity()
            pages: dict[int, AdapterVersion] = {}
            for version in self.salts:
                for page in self.bench.cache.reachable_pages(version):
                    assert pages.setdefault(page, version) == version

    def _read(self, live: Live) -> None:
        while (delta := live.request.take()) is not None:
            live.deltas.append(delta)

    def _check(self, live: Live) -> None:
        """A request has ended: what the reader saw, and what the answers are."""
        self._read(live)
        assert live.request.is_done
        if live.request.error is not None:
            assert live.may_fail
            assert isinstance(live.request.error, IterationError)
            return
        for seq in live.request.sequences:
            response = seq.response
            assert response is not None
            seen = [delta for delta in live.deltas if delta.index == seq.index]
            tokens, text = expected(live, seq.index)
            if response.finish_reason == "abort":
                assert live.is_aborted
                assert list(response.token_ids) == tokens[: len(response.token_ids)]
                assert text.startswith(response.text)
                continue
            assert list(response.token_ids) == tokens
            assert response.text == text
            assert "".join(delta.text for delta in seen) == text
            assert [t for delta in seen for t in delta.token_ids] == tokens
            assert all(delta.token_ids or delta.finish_reason for delta in seen)
            assert [delta.finish_reason for delta in seen][-1] == response.finish_reason
            assert response.usage.completion_tokens == len(tokens)
            if live.request.params.prompt_logprobs is not None:
                assert response.prompt_logprobs is not None
                first, *others = response.prompt_logprobs
                assert first is None
                assert [entry and (entry.token_id, -entry.logprob) for entry in others] == [
                    (token, position) for position, token in enumerate(live.request.prompt[1:])
                ]

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        try:
            for _ in range(MAX_STEPS):
                if all(live.request.is_done for live in self.lives):
                    break
                self.runner.run(self.lane.step())
            else:
                raise AssertionError("requests wait for ever")
            while self.bench.engine.statistics().running:
                self.runner.run(self.lane.step())  # what was left while it was in flight
            for live in self.lives:
                self._check(live)
            self.bench.check_empty()
        finally:
            self.lane.open()
            self.bench.engine.stop()
            try:
                self.runner.run(asyncio.wait_for(self.task, 10.0))
            finally:
                self.runner.close()
                self.patch.undo()


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
