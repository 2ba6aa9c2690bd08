"""What goes wrong fails what it belongs to and nothing else, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cotune import BASE, DrainingError, IterationError, SamplingParams
from cotune.runtime.randomness import stream_key
from cotune.streams.lane import Lane
from engine_fakes import Bench, GatedLane, collect, reference, settle

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cotune import Delta
    from cotune.policy import IterationPlan, Observation
    from cotune.runtime.step import SequenceStep, StepResult

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]
MAX_TURNS = 60


def tokens_of(prompt: list[int], **params: Any) -> list[int]:
    seed, salt = params.pop("seed", 0), params.pop("salt", 0)
    return reference(prompt, SamplingParams(**{"max_tokens": 8, **params}), seed=seed, salt=salt)


async def test_a_failed_iteration_fails_its_requests_and_not_those_that_wait() -> None:
    lane = GatedLane()
    async with Bench(lane=lane, sequences=2) as bench:
        bench.executor.failures.extend([None, None, RuntimeError("the device is on fire")])
        doomed = [bench.stream(PROMPT), bench.stream([7, 8, 9], n=2)]
        lucky = bench.stream([1, 2, 3, 4])
        async with doomed[0], doomed[1], lucky:
            lane.open()
            response = await lucky
            for stream in doomed:
                with pytest.raises(IterationError, match="on fire") as caught:
                    await collect(stream)
                assert caught.value.code == "iteration_failed"
                assert isinstance(caught.value.__cause__, RuntimeError)
        assert bench.engine.statistics().failed_iterations == 1
    assert list(response.token_ids) == tokens_of([1, 2, 3, 4])
    assert [r.finish_reason for r in bench.recorder.finished] == ["error"] * 3 + ["stop"]


async def test_tokens_from_before_the_failure_reach_the_reader() -> None:
    async with Bench() as bench:
        bench.executor.failures.extend([None, None, None, RuntimeError("late")])
        async with bench.stream(PROMPT) as stream:
            deltas: list[Delta] = []

            async def read() -> None:
                async for delta in stream:
                    deltas.append(delta)  # noqa: PERF401 - looked at after the error

            with pytest.raises(IterationError):
                await read()
    tokens = [token for delta in deltas for token in delta.token_ids]
    assert tokens == tokens_of(PROMPT)[: len(tokens)]
    assert len(tokens) >= 2


async def test_what_a_failed_iteration_computed_is_not_found_by_others() -> None:
    async with Bench() as bench:
        bench.executor.failures.append(RuntimeError("half written"))
        with pytest.raises(IterationError):
            await bench.stream(PROMPT)
        assert bench.cache.statistics().cached_pages == 0
        response = await bench.stream(PROMPT)
    assert response.usage.cached_tokens == 0
    assert list(response.token_ids) == tokens_of(PROMPT)


async def test_a_prompt_that_failed_half_way_is_found_as_far_as_it_was_computed() -> None:
    prompt = [*range(1, 20)]
    async with Bench(tokens=7, page_size=4) as bench:
        bench.executor.failures.extend([None, RuntimeError("the second chunk")])
        with pytest.raises(IterationError):
            await bench.stream(prompt)  # 7 tokens are computed: one page of 4, and 3 more
        assert bench.cache.look_up(BASE, prompt).tokens == 4
        response = await bench.stream(prompt)
    assert response.usage.cached_tokens == 4
    assert list(response.token_ids) == tokens_of(prompt)


async def test_an_executor_that_fails_again_and_again_is_asked_again_and_again() -> None:
    async with Bench() as bench:
        for _ in range(50):
            bench.executor.failures.append(RuntimeError("again"))
            with pytest.raises(IterationError):
                await bench.stream(PROMPT, n=2)
        assert list((await bench.stream(PROMPT)).token_ids) == tokens_of(PROMPT)
        assert bench.cache.statistics().owned_pages == 0


async def test_a_result_of_the_wrong_length_is_a_failed_iteration() -> None:
    async with Bench() as bench:
        execute = bench.executor.execute

        def truncated(steps: Sequence[SequenceStep], /) -> StepResult:
            bench.executor.execute = execute  # type: ignore[method-assign]
            result = execute(steps)
            return type(result)(result.results[:-1], result.forward_s, result.sample_s)

        bench.executor.execute = truncated  # type: ignore[method-assign]
        with pytest.raises(IterationError, match="0 results for 1"):
            await bench.stream(PROMPT)
        assert list((await bench.stream(PROMPT)).token_ids) == tokens_of(PROMPT)


async def test_a_sequence_that_fails_alone_fails_its_request_alone() -> None:
    async with Bench() as bench:
        bench.executor.broken_keys.add(stream_key(3, 1))
        broken = bench.stream(PROMPT, n=2, seed=3)
        fine = [bench.stream([k, 2, 3], seed=4) for k in range(3)]
        async with asyncio.TaskGroup() as group:
            answers = [group.create_task(stream._collect()) for stream in fine]
            with pytest.raises(IterationError, match="not finite") as caught:
                await broken
    assert caught.value.code == "step_failed"
    for k, answer in enumerate(answers):
        assert list(answer.result().token_ids) == tokens_of([k, 2, 3], seed=4)


async def test_an_adapter_that_cannot_be_installed_fails_its_own_requests() -> None:
    lane = GatedLane()
    async with Bench(lane=lane) as bench:
        good, bad = bench.add_adapter("good", 5), bench.add_adapter("bad", 6)
        bench.executor.install_failures.extend([torch.OutOfMemoryError("no room"), None])
        doomed = [bench.stream(PROMPT, version=bad), bench.stream([1, 2], version=bad, n=2)]
        fine = [bench.stream(PROMPT, version=good), bench.stream(PROMPT)]
        async with doomed[0], doomed[1], fine[0], fine[1]:
            lane.open()
            for stream in doomed:
                with pytest.raises(IterationError, match=r"bad@1.*no room"):
                    await stream
            assert list((await fine[0]).token_ids) == tokens_of(PROMPT, salt=5)
            assert list((await fine[1]).token_ids) == tokens_of(PROMPT)
        again = await bench.stream(PROMPT, version=bad)
    assert list(again.token_ids) == tokens_of(PROMPT, salt=6)


async def test_a_reader_that_leaves_during_an_installation_leaves_nothing() -> None:
    lane = GatedLane()
    async with Bench(lane=lane) as bench:
        version = bench.add_adapter("a", 5)
        async with bench.stream(PROMPT, version=version):
            await settle()
        await lane.step()
        assert bench.cache.statistics().owned_pages == 0
        assert bench.executor.history == []


async def test_text_that_cannot_be_made_fails_its_request_alone() -> None:
    token = tokens_of(PROMPT)[2]
    assert token not in tokens_of([1, 2, 3])
    async with Bench(explosive={token}) as bench, asyncio.TaskGroup() as group:
        fine = group.create_task(bench.stream([1, 2, 3])._collect())
        with pytest.raises(IterationError, match="cannot be made") as caught:
            await bench.stream(PROMPT)
    assert caught.value.code == "text_failed"
    assert list(fine.result().token_ids) == tokens_of([1, 2, 3])


async def test_cancelling_a_reader_at_every_await_leaks_nothing() -> None:
    async def read(bench: Bench) -> None:
        async with bench.stream(PROMPT, n=2, stop=("Zz",)) as stream:
            async for _ in stream:
                pass

    finished = 0
    for turns in range(MAX_TURNS):
        async with Bench(num_pages=8, max_model_len=32) as bench:
            async with asyncio.TaskGroup() as group:
                reader = group.create_task(read(bench))
                await settle(turns)
                finished += reader.done()
                reader.cancel()
            await settle()
            assert bench.cache.statistics().owned_pages == 0  # within an iteration
    assert 0 < finished < MAX_TURNS


async def test_cancelling_the_engine_at_every_await_fails_its_requests_and_leaks_nothing() -> None:
    ended: set[str] = set()
    for turns in range(1, MAX_TURNS):
        bench = Bench(num_pages=8, max_model_len=32)
        engine = asyncio.ensure_future(bench.engine.run())
        stream = bench.stream(PROMPT, n=2)
        async with stream:
            await settle(turns)
            engine.cancel()
            with pytest.raises(asyncio.CancelledError):
                await engine
            try:
                await stream
                ended.add("answered")
            except IterationError as error:
                ended.add(error.code or "")
        bench.check_empty()
    assert ended == {"answered", "stopped"}


async def test_a_broken_policy_stops_the_engine_and_says_so_to_everyone() -> None:
    bench = Bench()

    class Broken:
        def plan(self, observation: Observation) -> IterationPlan:
            raise ZeroDivisionError("planning")

    bench.scheduler._policy = Broken()
    stream = bench.stream(PROMPT)

    async def ask() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(bench.engine.run())
            async with stream:
                await stream

    with pytest.raises(ExceptionGroup) as caught:
        await ask()
    assert caught.group_contains(ZeroDivisionError)
    with pytest.raises(IterationError, match="stopped"):
        _ = stream.response
    bench.check_empty()


async def test_pages_that_run_out_under_many_sequences_are_shared_out_in_turns() -> None:
    async with Bench(num_pages=12, page_size=2, max_model_len=24, tokens=5) as bench:
        streams = [
            bench.stream([k + 1, 2, 3, 4], max_tokens=18, ignore_eos=True, n=1 + k % 3, seed=k)
            for k in range(12)
        ]
        async with asyncio.TaskGroup() as group:
            for stream in streams:
                group.create_task(stream._collect())
        assert bench.engine.statistics().preemptions > 10
    for k, stream in enumerate(streams):
        for index, response in enumerate(stream.responses):
            expected = reference(
                [k + 1, 2, 3, 4],
                SamplingParams(max_tokens=18, ignore_eos=True),
                seed=k,
                stream=index,
            )
            assert list(response.token_ids) == expected


async def test_the_loop_goes_on_while_the_device_works() -> None:
    """On a real lane: the executor waits for the loop, which a blocked loop would never answer."""
    with Lane("test", device=torch.device("cpu"), threads=1) as lane:
        async with Bench(lane=lane) as bench:
            loop = asyncio.get_running_loop()
            execute = bench.executor.execute
            turns = 0

            def answered_by_the_loop(steps: Sequence[SequenceStep], /) -> StepResult:
                nonlocal turns
                seen = threading.Event()
                loop.call_soon_threadsafe(seen.set)
                assert seen.wait(30.0), "the event loop is blocked"
                turns += 1
                return execute(steps)

            bench.executor.execute = answered_by_the_loop  # type: ignore[method-assign]
            response = await bench.stream(PROMPT, ignore_eos=True)
    assert turns >= 8
    assert list(response.token_ids) == tokens_of(PROMPT, ignore_eos=True)


async def test_draining_under_load_answers_or_refuses_everyone() -> None:
    async with Bench(sequences=3) as bench:
        outcomes: list[str] = []

        async def ask(k: int) -> None:
            await settle(k)
            try:
                response = await bench.stream([k + 1, 2, 3])
            except DrainingError:
                outcomes.append("refused")
            else:
                assert list(response.token_ids) == tokens_of([k + 1, 2, 3])
                outcomes.append("answered")

        async with asyncio.TaskGroup() as group:
            for k in range(30):
                group.create_task(ask(k))
            await settle(15)
            await bench.engine.drain(60.0)
    assert len(outcomes) == 30
    assert set(outcomes) == {"answered", "refused"}
