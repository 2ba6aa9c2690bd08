"""The runtime's own prompts: through the engine, behind the requests, out of their statistics."""

from __future__ import annotations

import asyncio

import pytest

from cotune.runtime.background import Background
from cotune.runtime.errors import ContextLengthError, DrainingError, OverloadedError
from cotune.runtime.types import BASE
from engine_fakes import Bench, GatedLane


async def test_scoring_reads_the_prompt_from_the_cache_and_computes_the_completion() -> None:
    async with Bench(page_size=4) as bench:
        background = Background(bench.engine, bench.clock)
        prompt, first, second = list(range(1, 18)), [30, 31, 32], [40, 41]
        scores = await background.score(BASE, prompt, first)
        assert len(scores) == 3
        assert [score.token_id for score in scores] == first
        bench.executor.history.clear()
        assert len(await background.score(BASE, prompt, second)) == 2
        # 4 pages of 4 tokens are cached; position 16 predicts the first token of the completion.
        computed = [token for steps in bench.executor.history for token in steps[0].token_ids]
        assert computed == [prompt[16], *second]


async def test_the_same_completion_scores_the_same_with_a_cold_and_a_warm_prompt() -> None:
    async with Bench(page_size=4) as bench:
        background = Background(bench.engine, bench.clock)
        prompt, completion = list(range(1, 16)), [30, 31, 32, 33]
        cold = await background.score(BASE, prompt, completion)
        warm = await background.score(BASE, prompt, completion)
        assert cold == warm


async def test_background_work_is_in_no_statistics_of_requests() -> None:
    async with Bench() as bench:
        background = Background(bench.engine, bench.clock)
        await background.score(BASE, [1, 2, 3], [4, 5])
        await background.prefill(BASE, range(1, 12))
        assert (await background.generate(BASE, [1, 2, 3], 4)).finish_reason in ("stop", "length")
        statistics = bench.engine.statistics()
        assert statistics.finished == statistics.prompt_tokens == statistics.generated_tokens == 0
        assert bench.recorder.finished == []
        assert bench.recorder.ttfts == []


async def test_background_work_takes_no_place_in_the_queue() -> None:
    lane = GatedLane()
    async with Bench(lane=lane, max_queue=1, sequences=1) as bench:
        background = Background(bench.engine, bench.clock)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(background.score(BASE, [1, 2, 3], [4]))
            gate = await lane.reached()
            async with bench.stream([1, 2], max_tokens=1) as stream:
                with pytest.raises(OverloadedError):
                    _ = await bench.stream([3, 4]).__aenter__()
                gate.set_result(None)
                lane.open()
                assert (await stream).usage.completion_tokens == 1
        assert len(task.result()) == 1


async def test_a_prefix_that_was_prefilled_is_found_by_the_next_request() -> None:
    async with Bench(page_size=4) as bench:
        background = Background(bench.engine, bench.clock)
        await background.prefill(BASE, range(1, 13))
        response = await bench.stream([*range(1, 13), 20, 21], max_tokens=1)
        assert response.usage.cached_tokens == 12


async def test_a_drain_ends_background_work_at_once_and_takes_no_more() -> None:
    lane = GatedLane()
    async with Bench(lane=lane) as bench:
        background = Background(bench.engine, bench.clock)
        task = asyncio.ensure_future(background.score(BASE, [1, 2, 3], [4]))
        gate = await lane.reached()
        drain = asyncio.ensure_future(bench.engine.drain(60.0))
        with pytest.raises(DrainingError):
            await task
        gate.set_result(None)
        lane.open()
        await drain
        with pytest.raises(DrainingError):
            await background.prefill(BASE, [1, 2])


async def test_what_exceeds_the_context_is_refused_with_both_lengths() -> None:
    async with Bench(max_model_len=16) as bench:
        background = Background(bench.engine, bench.clock)
        with pytest.raises(ContextLengthError, match="prompt 12 tokens \\+ completion 5"):
            await background.score(BASE, range(1, 13), range(1, 6))


async def test_leaving_gives_the_pages_back() -> None:
    lane = GatedLane()
    async with Bench(lane=lane) as bench:
        background = Background(bench.engine, bench.clock)
        task = asyncio.ensure_future(background.score(BASE, [1, 2, 3], [4]))
        gate = await lane.reached()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.set_result(None)
        lane.open()
