"""The engine on an executor without a model; see `engine_fakes` for how it shows mistakes."""

from __future__ import annotations

import asyncio
import math
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cotune import (
    ContextLengthError,
    DrainingError,
    OverloadedError,
    RequestError,
    SamplingParams,
)
from cotune.policy import Costs, make_policy, packing
from cotune.policy.settings import PolicySettings
from cotune.policy.types import BATCH_STEP_S, IterationPlan, TrainingPlan
from cotune.runtime import engine as engine_module
from cotune.runtime.errors import IterationError
from cotune.runtime.scheduling.memory_watch import READ_INTERVAL_S
from cotune.runtime.sequence import Status
from cotune.runtime.training.safepoints import Safepoints
from cotune.streams.memory import MemoryReading
from engine_fakes import (
    EOS,
    Bench,
    FakeClock,
    GatedLane,
    collect,
    letters,
    reference,
    settle,
    supervised,
)
from schedule_fakes import OUTLOOK, FakeTrainer, Scripted, learn

if TYPE_CHECKING:
    from cotune.policy import Observation, Policy

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]


def tokens_of(prompt: list[int], **params: Any) -> list[int]:
    seed = params.pop("seed", 0)
    stream = params.pop("stream", 0)
    salt = params.pop("salt", 0)
    return reference(
        prompt, SamplingParams(**{"max_tokens": 8, **params}), seed=seed, stream=stream, salt=salt
    )


def find_seed(prompt: list[int], **params: Any) -> int:
    """A seed whose answer ends with `EOS` before its limit, after at least two tokens."""
    for seed in range(500):
        answer = tokens_of(prompt, seed=seed, **params)
        if answer[-1] == EOS and 2 < len(answer) < 8:
            return seed
    raise AssertionError("no such seed")


# -- answers -------------------------------------------------------------------------------------


async def test_a_prompt_is_answered_as_the_reference_says() -> None:
    async with Bench() as bench:
        response = await bench.stream(PROMPT)
    assert list(response.token_ids) == tokens_of(PROMPT)
    assert response.text == letters(response.token_ids)
    assert response.finish_reason == "length"
    assert response.prompt_token_ids == tuple(PROMPT)
    assert response.usage.prompt_tokens == 9
    assert response.usage.completion_tokens == 8


async def test_the_models_end_token_ends_the_answer_and_stays_out_of_the_text() -> None:
    seed = find_seed(PROMPT)
    async with Bench() as bench:
        response = await bench.stream(PROMPT, seed=seed)
        going_on = await bench.stream(PROMPT, seed=seed, ignore_eos=True)
    assert list(response.token_ids) == tokens_of(PROMPT, seed=seed)
    assert response.token_ids[-1] == EOS
    assert response.text == letters(response.token_ids[:-1])
    assert (response.finish_reason, response.stop_reason) == ("stop", None)
    assert len(going_on.token_ids) == 8


async def test_a_stop_token_ends_the_answer_and_is_named() -> None:
    stop = tokens_of(PROMPT)[3]
    async with Bench() as bench:
        response = await bench.stream(PROMPT, stop_token_ids=(stop,))
        kept = await bench.stream(PROMPT, stop_token_ids=(stop,), include_stop_str_in_output=True)
    assert response.token_ids[-1] == stop
    assert response.stop_reason == stop
    assert response.text == letters(response.token_ids[:-1])
    assert kept.text == letters(kept.token_ids)


async def test_a_stop_string_costs_one_token_that_nobody_sees_or_pays_for() -> None:
    answer = tokens_of(PROMPT)
    stop = letters(answer[2:4])
    async with Bench() as bench:
        response = await bench.stream(PROMPT, stop=(stop,))
        statistics = bench.engine.statistics()
    assert list(response.token_ids) == answer[:4]
    assert response.text == letters(answer[:2])
    assert (response.finish_reason, response.stop_reason) == ("stop", stop)
    assert response.usage.completion_tokens == 4
    assert len(response.timings.tbt_s) == 3
    assert statistics.generated_tokens == 4
    assert (
        len(bench.executor.history) == 5
    )  # four tokens, and the one in flight when the string was found


async def test_a_stop_string_found_after_the_last_iteration_still_counts() -> None:
    answer = tokens_of(PROMPT, max_tokens=4)
    async with Bench() as bench:
        response = await bench.stream(PROMPT, max_tokens=4, stop=(letters(answer[3:]),))
    assert (response.finish_reason, response.text) == ("stop", letters(answer[:3]))


async def test_the_token_after_a_stop_string_changes_nothing_even_if_it_is_the_last_one() -> None:
    lane = GatedLane()
    answer = tokens_of(PROMPT, ignore_eos=True)
    async with Bench(lane=lane) as bench:
        stop = letters(answer[2:4])
        async with bench.stream(PROMPT, ignore_eos=True, max_tokens=5, stop=(stop,)) as stream:
            for _ in range(5):
                await lane.step()
            (delta,) = stream.take_nowait()
            lane.open()
    assert (delta.finish_reason, delta.stop_reason) == ("stop", stop)
    assert list(delta.token_ids) == answer[:4]


async def test_min_tokens_holds_off_end_tokens_and_stop_strings() -> None:
    answer = tokens_of(PROMPT, ignore_eos=True)
    async with Bench() as bench:
        response = await bench.stream(
            PROMPT, ignore_eos=True, min_tokens=4, stop=(letters(answer[1:2]),)
        )
    assert len(response.token_ids) > 4


async def test_siblings_differ_and_share_the_full_pages_of_their_prompt() -> None:
    async with Bench(page_size=4) as bench:
        stream = bench.stream(PROMPT, n=3, seed=5)
        first = await stream
    assert first is stream.responses[0]
    for index, response in enumerate(stream.responses):
        assert list(response.token_ids) == tokens_of(PROMPT, seed=5, stream=index)
        assert response.id == f"{stream.request_id}:{index}"
    assert [r.usage.cached_tokens for r in stream.responses] == [0, 8, 8]
    assert stream.usage.prompt_tokens == 9
    assert stream.usage.completion_tokens == sum(len(r.token_ids) for r in stream.responses)
    assert len({r.token_ids for r in stream.responses}) == 3


async def test_siblings_start_when_the_first_has_computed_the_prompt() -> None:
    lane = GatedLane()
    async with Bench(lane=lane, tokens=4) as bench:
        request = bench.request(PROMPT, n=2)
        bench.engine.submit(request)
        for _ in range(2):
            await lane.step()
            assert request.sequences[1].status is Status.HELD
        await lane.step()
        assert request.sequences[1].status is Status.RUNNING
        lane.open()


async def test_a_second_turn_finds_the_first_in_the_cache() -> None:
    async with Bench() as bench:
        first = await bench.stream(PROMPT)
        second = await bench.stream([*PROMPT, *first.token_ids, 7, 7])
    # 9 + 8 tokens, of which the last sampled one was never computed: 16 are in full pages
    assert second.usage.cached_tokens == 16
    assert list(second.token_ids) == tokens_of([*PROMPT, *first.token_ids, 7, 7])


async def test_without_sharing_nothing_is_cached() -> None:
    async with Bench(prefix_sharing=False) as bench:
        await bench.stream(PROMPT)
        again = await bench.stream(PROMPT, n=2)
        assert bench.engine.statistics().cache.cached_pages == 0
    assert again.usage.cached_tokens == 0


async def test_what_waits_for_pages_learns_that_its_prefix_is_cached_meanwhile() -> None:
    lane = GatedLane()
    shared = [*range(1, 13)]
    async with Bench(lane=lane, num_pages=8, max_model_len=32, page_size=4, tokens=40) as bench:
        bench.engine.submit(bench.request([40] * 9, max_tokens=6, ignore_eos=True))
        bench.engine.submit(bench.request([*shared, 1], max_tokens=3, ignore_eos=True))
        bench.engine.submit(bench.request([*shared, 2], max_tokens=1, ignore_eos=True))
        for _ in range(4):
            await lane.step()
        hints = [
            view.cached
            for observation in bench.policy.observations
            for view in observation.waiting
            if view.key == 2
        ]
        assert hints[0] == 0
        assert hints[-1] == 12
        lane.open()


async def test_pages_that_are_cached_for_oneself_are_not_room_for_more() -> None:
    """What a prefix locks is no longer evictable: admission must not count it twice."""
    lane = GatedLane()
    async with Bench(lane=lane, num_pages=8, max_model_len=32, page_size=4) as bench:
        version = bench.add_adapter("a", 9)
        prefix = [*range(1, 18)]
        bench.engine.submit(bench.request(prefix, version=version, max_tokens=1, ignore_eos=True))
        await lane.step()  # the installation
        await lane.step()
        assert bench.cache.statistics().cached_pages == 4
        running = bench.request([30] * 9, max_tokens=4, ignore_eos=True)
        waiting = bench.request(
            [*prefix, *range(20, 27)], version=version, max_tokens=5, ignore_eos=True
        )
        bench.engine.submit(running)
        await settle()
        bench.engine.submit(waiting)
        while not running.is_done:
            assert waiting.sequences[0].status is Status.WAITING
            await lane.step()
        lane.open()
        while not waiting.is_done:
            await settle()
        assert waiting.sequences[0].output == tokens_of(
            [*prefix, *range(20, 27)], max_tokens=5, ignore_eos=True, salt=9
        )


async def test_who_is_promised_pages_that_its_own_prefix_locks_keeps_nobody_from_running() -> None:
    """It goes first and would take the whole budget; but opening its prefix takes two pages of the
    three that are available, and it needs two more."""
    lane = GatedLane()
    bench = Bench(lane=lane, num_pages=6, page_size=16, tokens=16, planner=make_policy("cotune"))
    prefix = [*range(1, 33)]
    async with asyncio.timeout(60.0), bench:
        first = bench.request([*prefix, 40], max_tokens=1, ignore_eos=True)
        bench.engine.submit(first)
        while not first.is_done:
            await lane.step()
        running = bench.request([50] * 48, max_tokens=2, ignore_eos=True, priority=1)
        bench.engine.submit(running)
        gate = await lane.reached()
        urgent = bench.request([*prefix, *[60] * 18], max_tokens=2, ignore_eos=True, priority=-1)
        bench.engine.submit(urgent)
        assert bench.cache.statistics().cached_pages == 2
        gate.set_result(None)
        _ = await lane.reached()
        assert urgent.sequences[0].status is Status.WAITING
        assert [len(step.token_ids) for step in bench.executor.history[-1]] == [16]
        lane.open()
        while not (running.is_done and urgent.is_done):
            await settle()
    for request in (running, urgent):
        assert request.error is None
        assert request.sequences[0].output == tokens_of(
            [*request.prompt], max_tokens=2, ignore_eos=True
        )


async def test_a_preemption_that_frees_too_little_is_followed_by_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Most pages of the last in rank are in use by others, so that taking it out yields little."""
    monkeypatch.setattr(packing, "HEADROOM_TOKENS", 0)
    lane = GatedLane()
    prefix = [*range(1, 13)]
    async with Bench(lane=lane, num_pages=6, max_model_len=24, page_size=4) as bench:
        late = bench.request([*prefix, 13], max_tokens=8, ignore_eos=True)
        bench.engine.submit(late)
        await lane.step()
        early = [
            bench.request([*prefix, k, k, k], max_tokens=9, ignore_eos=True, priority=-1)
            for k in (14, 15)
        ]
        for request in early:
            bench.engine.submit(request)
        lane.open()
        while not all(request.is_done for request in (late, *early)):
            await settle()
        for request in (late, *early):
            assert request.sequences[0].output == tokens_of(
                [*request.prompt], max_tokens=request.max_tokens, ignore_eos=True
            )
        assert bench.engine.statistics().preemptions >= 2
        pages = [obs.available_pages for obs in bench.policy.observations]
        assert min(pages) == 0


async def test_prompt_logprobs_cover_the_whole_prompt_even_where_it_is_cached() -> None:
    async with Bench(tokens=4) as bench:
        await bench.stream(PROMPT)
        stream = bench.stream(PROMPT, prompt_logprobs=0, n=2)
        await stream
    assert stream.prompt_logprobs is not None
    assert stream.prompt_logprobs[0] is None
    assert [(e.token_id, e.logprob) for e in stream.prompt_logprobs[1:] if e] == [
        (token, -float(position)) for position, token in enumerate(PROMPT[1:])
    ]
    assert stream.responses[0].usage.cached_tokens == 0
    assert stream.responses[1].usage.cached_tokens == 8


async def test_a_prompt_alone_can_be_scored() -> None:
    async with Bench() as bench:
        response = await bench.stream(PROMPT, max_tokens=0, prompt_logprobs=0)
        one = await bench.stream([5], max_tokens=0, prompt_logprobs=0)
    assert response.token_ids == ()
    assert response.finish_reason == "length"
    assert response.prompt_logprobs is not None
    assert len(response.prompt_logprobs) == 9
    assert one.prompt_logprobs == (None,)


async def test_logprobs_come_with_their_tokens() -> None:
    async with Bench() as bench, bench.stream(PROMPT, logprobs=0) as stream:
        deltas = await collect(stream)
    for delta in deltas:
        assert delta.logprobs is not None
        assert [entry.token_id for entry in delta.logprobs] == list(delta.token_ids)
    assert stream.response.logprobs is not None
    assert len(stream.response.logprobs) == 8


# -- iterations ----------------------------------------------------------------------------------


async def test_a_long_prompt_does_not_keep_a_decode_waiting() -> None:
    lane = GatedLane()
    async with Bench(lane=lane, tokens=8, num_pages=128) as bench:
        bench.engine.submit(bench.request([1, 2], max_tokens=40, ignore_eos=True))
        await lane.step()
        bench.engine.submit(bench.request(range(1, 60)))
        for _ in range(8):
            await lane.step()
        lane.open()
    for steps in bench.executor.history[2:9]:
        sizes = [len(step.token_ids) for step in steps]
        assert sizes == [1, 7]


async def test_the_next_iteration_is_handed_over_before_the_reader_hears_of_the_last() -> None:
    lane = GatedLane()
    async with Bench(lane=lane) as bench:
        seen: list[bool] = []
        bench.recorder.on_first_token = lambda _: seen.append(lane.in_flight)  # type: ignore[method-assign]
        bench.engine.submit(bench.request(PROMPT))
        await lane.step()
        assert seen == [True]
        lane.open()


async def test_a_reader_is_woken_once_per_iteration_and_gets_all_siblings() -> None:
    lane = GatedLane()
    async with Bench(lane=lane) as bench, bench.stream(PROMPT, n=3) as stream:
        await lane.step()
        assert [delta.index for delta in stream.take_nowait()] == [0]
        await lane.step()
        assert [delta.index for delta in stream.take_nowait()] == [0, 1, 2]
        assert stream.take_nowait() == []
        lane.open()


async def test_what_a_slow_reader_has_not_fetched_is_joined() -> None:
    async with Bench() as bench, bench.stream(PROMPT) as stream:
        await stream
        deltas = stream.take_nowait()
    assert [list(delta.token_ids) for delta in deltas] == [tokens_of(PROMPT)]
    assert deltas[0].text == letters(tokens_of(PROMPT))
    assert deltas[0].finish_reason == "length"


async def test_deltas_joined_are_the_answer() -> None:
    seed = find_seed(PROMPT)
    async with Bench() as bench, bench.stream(PROMPT, seed=seed) as stream:
        deltas = await collect(stream)
    assert "".join(delta.text for delta in deltas) == stream.response.text
    assert [t for delta in deltas for t in delta.token_ids] == list(stream.response.token_ids)
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == "stop"


async def test_a_preempted_answer_goes_on_as_if_nothing_had_happened() -> None:
    async with Bench(num_pages=10, page_size=4, max_model_len=40) as bench:
        streams = [bench.stream([k, 2, 3, 4], max_tokens=24, ignore_eos=True) for k in range(4)]
        async with asyncio.TaskGroup() as group:
            for stream in streams:
                group.create_task(stream._collect())
        assert bench.engine.statistics().preemptions > 2
    for k, stream in enumerate(streams):
        expected = tokens_of([k, 2, 3, 4], max_tokens=24, ignore_eos=True)
        assert list(stream.response.token_ids) == expected


async def test_who_gave_way_has_the_time_of_a_first_token_to_come_back() -> None:
    lane = GatedLane()
    bench = Bench(lane=lane, num_pages=4, page_size=4, max_model_len=16, ttft_s=5.0, tbt_s=0.5)
    async with asyncio.timeout(60.0), bench:
        early = bench.request([1, 2, 3], max_tokens=13, ignore_eos=True)
        late = bench.request([4, 5, 6], max_tokens=13, ignore_eos=True)
        for request in (early, late):
            bench.engine.submit(request)
        sequence = late.sequences[0]
        while sequence.status is not Status.WAITING or not sequence.token_times:
            bench.clock.now_s += 0.1
            await lane.step()
        view = next(iter(bench.policy.observations[-1].waiting))
        assert view.key == sequence.key
        assert view.due_s == sequence.token_times[-1] + 5.0
        lane.open()


async def test_the_later_of_two_gives_way_and_the_first_never_does() -> None:
    lane = GatedLane()
    async with Bench(lane=lane, num_pages=4, page_size=4, max_model_len=16) as bench:
        early = bench.request([1, 2, 3], max_tokens=13, ignore_eos=True)
        late = bench.request([4, 5, 6], max_tokens=13, ignore_eos=True)
        bench.engine.submit(early)
        bench.engine.submit(late)
        states = set()
        while not early.is_done:
            await lane.step()
            states.add(late.sequences[0].status)
            if not early.is_done:
                assert early.sequences[0].status is Status.RUNNING
        assert Status.WAITING in states
        lane.open()


async def test_requests_start_in_order_of_priority_then_arrival() -> None:
    lane = GatedLane()
    async with Bench(lane=lane, sequences=1) as bench:
        order: list[str] = []
        requests = {
            name: bench.request(PROMPT, priority=priority, max_tokens=1, request_id=name)
            for name, priority in (("a", 0), ("b", 1), ("c", 0), ("d", -1))
        }
        for request in requests.values():
            bench.engine.submit(request)
        while len(order) < 4:
            await lane.step()
            order += [n for n, r in requests.items() if r.is_done and n not in order]
        assert order == ["d", "a", "c", "b"]


async def test_the_engine_sleeps_when_there_is_nothing_to_do() -> None:
    async with Bench() as bench:
        await bench.stream(PROMPT)
        plans = len(bench.policy.observations)
        await settle(50)
        assert len(bench.policy.observations) == plans


# -- what a policy sees and says -----------------------------------------------------------------


async def test_interactive_tokens_have_a_time_when_they_are_due_and_batch_ones_have_none() -> None:
    lane = GatedLane()
    async with asyncio.timeout(60.0), Bench(lane=lane, ttft_s=2.0, tbt_s=0.5) as bench:
        quick = bench.stream(PROMPT, arrival_s=90.0)
        slow = bench.stream(PROMPT, arrival_s=80.0, request_class="batch")
        async with quick, slow:
            gate = await lane.reached()
            first = bench.policy.observations[0]
            assert first.budgets.ttft_s == 2.0
            assert [(view.rank_s, view.due_s) for view in first.waiting] == [
                (90.0, 92.0),
                (80.0 + BATCH_STEP_S, math.inf),
            ]
            bench.clock.now_s = 103.0
            gate.set_result(None)
            gate = await lane.reached()
            seen = next(view for view in bench.policy.observations if view.running)
            assert [view.rank_s for view in seen.running] == [90.0, 80.0 + BATCH_STEP_S]
            assert [view.due_s for view in seen.running] == [103.5, math.inf]
            lane.open()
            for stream in (quick, slow):
                assert list((await stream).token_ids) == tokens_of(PROMPT)


async def test_a_batch_request_starts_behind_those_that_came_within_half_a_minute() -> None:
    lane = GatedLane()
    async with asyncio.timeout(60.0), Bench(lane=lane, sequences=1) as bench:
        first = bench.stream([1, 2])
        async with first, AsyncExitStack() as stack:
            gate = await lane.reached()
            others = [
                bench.stream([3, 4], arrival_s=80.0, request_class="batch"),
                bench.stream([5, 6], arrival_s=99.0),
                bench.stream([7, 8], arrival_s=60.0, request_class="batch"),
            ]
            for stream in others:
                _ = await stack.enter_async_context(stream)
            lane.open()
            for stream in (first, *others):
                await stream
            assert gate.done()
    ended = [response.prompt_token_ids for response in bench.recorder.finished]
    assert ended == [(1, 2), (7, 8), (5, 6), (3, 4)]


LONG = [*range(1, 42)]  # ten pages of 4, and one token


async def prompt_tokens_computed(planner: Policy) -> int:
    """Prompt tokens that are computed when two requests come with one long prompt."""
    async with asyncio.timeout(60.0), Bench(planner=planner, tokens=16) as bench:
        streams = [bench.stream(LONG), bench.stream(LONG)]
        async with streams[0], streams[1]:
            for stream in streams:
                assert list((await stream).token_ids) == tokens_of(LONG)
        return sum(
            len(step.token_ids)
            for steps in bench.executor.history
            for step in steps
            if step.start < len(LONG)
        )


async def test_a_long_prompt_that_is_being_computed_is_waited_for_and_computed_once() -> None:
    assert await prompt_tokens_computed(make_policy("cotune")) == len(LONG) + 1
    assert await prompt_tokens_computed(make_policy("inference-only")) > len(LONG) + 1


async def test_what_is_coming_of_a_prompt_is_whole_pages_of_the_same_version() -> None:
    lane = GatedLane()
    async with asyncio.timeout(60.0), Bench(lane=lane, tokens=16, sequences=8) as bench:
        tutor = bench.add_adapter("tutor", 7)
        first = bench.stream(LONG)
        async with first, AsyncExitStack() as stack:
            gate = await lane.reached()
            others = [
                bench.stream([*LONG[:34], 60, 61]),
                bench.stream([9, *LONG[1:5]]),
                bench.stream(LONG, version=tutor),
            ]
            for stream in others:
                _ = await stack.enter_async_context(stream)
            gate.set_result(None)
            gate = await lane.reached()
            waiting = bench.policy.observations[-1].waiting
            assert [(view.cached, view.coming) for view in waiting] == [(16, 32), (0, 0), (0, 0)]
            lane.open()
            for stream in (first, *others):
                await stream


async def test_nobody_waits_for_a_prefix_that_is_there_while_the_prompt_goes_on() -> None:
    lane = GatedLane()
    bench = Bench(
        lane=lane, num_pages=512, tokens=32, max_model_len=1024, planner=make_policy("cotune")
    )
    shared = [1 + i % 50 for i in range(64)]
    async with asyncio.timeout(60.0), bench:
        long = bench.request([*shared, *[51] * 800], max_tokens=1, request_class="batch")
        bench.engine.submit(long)
        gate = await lane.reached()
        short = bench.request([*shared, 60, 61, 62], max_tokens=1)
        bench.engine.submit(short)
        gate.set_result(None)
        gate = await lane.reached()
        assert [view.coming for view in bench.policy.observations[-1].waiting] == [64]
        for _ in range(3):
            gate.set_result(None)
            gate = await lane.reached()
        gate.set_result(None)
        await settle()
        assert short.is_done
        assert not long.is_done
        assert short.sequences[0].cached_tokens == 64
        lane.open()


async def test_an_interactive_request_does_not_wait_for_a_background_prompt() -> None:
    lane = GatedLane()
    bench = Bench(lane=lane, num_pages=512, tokens=64, max_model_len=1024)
    prompt = [1 + i % 50 for i in range(600)]
    async with asyncio.timeout(60.0), bench:
        for request in (bench.request(prompt, max_tokens=1), bench.request(prompt, max_tokens=1)):
            request.is_background = request.id == "r1"
            bench.engine.submit(request)
        seen = []
        for _ in range(3):
            await lane.step()
            seen += [view.coming for view in bench.policy.observations[-1].waiting]
        assert not any(seen)
        lane.open()


@pytest.mark.parametrize("policy", ["inference-only", "cotune"])
async def test_what_is_cached_is_known_of_those_behind_one_that_cannot_go(policy: str) -> None:
    """One waits for the only slot, with a prompt as long as the budget; sixteen overtake it."""
    lane = GatedLane()
    bench = Bench(
        lane=lane, num_pages=512, tokens=64, sequences=64, max_slots=1, planner=make_policy(policy)
    )
    shared = [1 + i % 50 for i in range(60)]
    async with asyncio.timeout(60.0), bench:
        first = bench.request([*shared, 55, 56], max_tokens=1)
        bench.engine.submit(first)
        await lane.step()
        one, two = (bench.add_adapter(name, salt) for name, salt in (("one", 3), ("two", 5)))
        bench.engine.submit(bench.request([9, 9, 9], version=one, max_tokens=99, ignore_eos=True))
        for _ in range(2):  # the installation, and the prompt
            await lane.step()
        bench.engine.submit(bench.request([7] * 200, version=two, max_tokens=1))
        others = [bench.request([*shared, 50, i + 1], max_tokens=1) for i in range(16)]
        for request in others:
            bench.engine.submit(request)
        for _ in range(3):
            await lane.step()
        assert all(request.is_done for request in others)
        lane.open()


async def test_nobody_waits_for_a_prompt_whose_request_was_left() -> None:
    lane = GatedLane()
    planner = make_policy("cotune")
    async with asyncio.timeout(60.0), Bench(lane=lane, tokens=16, planner=planner) as bench:
        second = bench.stream(LONG)
        async with AsyncExitStack() as stack:
            async with bench.stream(LONG):
                gate = await lane.reached()
                _ = await stack.enter_async_context(second)
                gate.set_result(None)
                _ = await lane.reached()
                assert bench.policy.observations[-1].waiting[0].coming == 40
            lane.open()
            assert list((await second).token_ids) == tokens_of(LONG)


# -- training ------------------------------------------------------------------------------------


class Training:
    """A desk of the bench's, whose quanta run on a lane that the test lets go."""

    def __init__(self, bench: Bench) -> None:
        self.lane = GatedLane()
        self.safepoints = Safepoints()
        lane: Any = self.lane
        self.desk = bench.scheduler.open_training(lane, self.safepoints)
        self.key = self.desk.enroll("tutor")

    @property
    def is_held(self) -> bool:
        return self.safepoints.statistics().is_held

    async def run_one(self) -> None:
        """Offer one quantum, and wait until it has run."""
        await self.desk.run(self.key, FakeTrainer(), OUTLOOK, is_begun=False)


async def test_without_requests_quanta_run_as_they_come_and_nobody_polls() -> None:
    async with asyncio.timeout(60.0), Bench(planner=make_policy("continuous")) as bench:
        training, trainer = Training(bench), FakeTrainer()
        async with supervised(training.lane) as group:
            task = group.create_task(learn(training.desk, training.key, trainer))
            for kind in ("forward", "backward", "step"):
                gate = await training.lane.reached()
                running = training.desk.view(0.0).running
                assert running is not None
                assert running.kind == kind
                plans = len(bench.policy.observations)
                await settle(50)
                assert len(bench.policy.observations) == plans
                gate.set_result(None)
        assert task.result()[-1] is not None
        await settle()
        plans = len(bench.policy.observations)
        await settle(50)
        assert len(bench.policy.observations) == plans
    assert bench.executor.history == []


async def test_serving_pauses_for_a_step_where_the_policy_says_so() -> None:
    lane = GatedLane()
    planner = make_policy("synchronous")
    async with asyncio.timeout(60.0), Bench(lane=lane, planner=planner) as bench:
        training, trainer = Training(bench), FakeTrainer()
        async with bench.stream(PROMPT) as stream, supervised(training.lane) as group:
            gate = await lane.reached()
            group.create_task(learn(training.desk, training.key, trainer))
            gate.set_result(None)
            # The batch begins beside an iteration, and then its quanta run one after the other.
            forward = await training.lane.reached()
            await settle()
            if lane.in_flight:
                await lane.step()
            computed = len(bench.executor.history)
            forward.set_result(None)
            for _ in range(2):
                gate = await training.lane.reached()
                await settle(50)
                assert not lane.in_flight
                gate.set_result(None)
            _ = await lane.reached()
            assert len(bench.executor.history) == computed
            assert [kind for kind, _ in trainer.ran] == ["forward", "backward", "step"]
            lane.open()
            assert list((await stream).token_ids) == tokens_of(PROMPT)
        assert bench.engine.statistics().schedule.pauses == 1


def hold_beside(observation: Observation) -> IterationPlan:
    """Serve in order; start what is offered, and let it wait, always."""
    plan = make_policy("inference-only").plan(observation)
    training = observation.training
    assert training is not None
    start = training.offers[0].key if training.offers and not training.running else None
    return replace(plan, training=TrainingPlan(start=start, hold=True))


async def test_a_quantum_that_is_held_goes_on_when_there_is_nothing_to_serve() -> None:
    lane = GatedLane()
    async with asyncio.timeout(60.0), Bench(lane=lane, planner=Scripted(hold_beside)) as bench:
        training = Training(bench)
        async with supervised(training.lane) as group:
            async with bench.stream(PROMPT) as stream:
                await lane.step()
                group.create_task(training.run_one())
                await lane.step()
                gate = await training.lane.reached()
                assert training.is_held
                lane.open()
                await stream
            await settle()
            assert training.desk.is_busy
            assert not training.is_held
            gate.set_result(None)


async def test_what_cannot_run_beside_a_quantum_waits_for_its_end() -> None:
    def plan(observation: Observation) -> IterationPlan:
        training = observation.training
        assert training is not None
        if training.running:
            return IterationPlan()
        if training.offers:
            return IterationPlan(training=TrainingPlan(start=training.offers[0].key))
        return make_policy("inference-only").plan(observation)

    async with asyncio.timeout(60.0), Bench(planner=Scripted(plan)) as bench:
        training = Training(bench)
        async with supervised(training.lane) as group:
            group.create_task(training.run_one())
            gate = await training.lane.reached()
            async with bench.stream(PROMPT) as stream:
                await settle(50)
                assert bench.executor.history == []
                gate.set_result(None)
                assert list((await stream).token_ids) == tokens_of(PROMPT)


async def test_an_offer_that_waits_for_its_time_is_looked_at_again_then() -> None:
    settings = PolicySettings(periodic_window_s=0.02, periodic_share=0.5)
    planner = make_policy("periodic", settings)
    async with asyncio.timeout(60.0), Bench(planner=planner) as bench:
        bench.clock.now_s = 100.015  # in the second half of a window
        training = Training(bench)
        async with supervised(training.lane) as group:
            group.create_task(training.run_one())
            await settle()
            assert len(bench.policy.observations) == 1
            assert not training.desk.is_busy
            bench.clock.now_s = 100.025
            (await training.lane.reached()).set_result(None)
    assert len(bench.policy.observations) == 2


# -- deciding ahead ------------------------------------------------------------------------------

DEVICE = Costs(0.5, 0.25, 0.0, 0.125, 0.0)


async def test_an_iteration_is_decided_on_while_the_one_before_runs() -> None:
    lane = GatedLane()
    bench = Bench(lane=lane, costs=DEVICE, ttft_s=9.0, tbt_s=2.0)
    seen = bench.policy.observations
    async with asyncio.timeout(60.0), bench:
        async with bench.stream(PROMPT, max_tokens=6, ignore_eos=True) as stream:
            gate = await lane.reached()
            await settle()
            for known in range(11, 15):
                asked = len(seen)
                gate.set_result(None)
                gate = await lane.reached()
                await settle()
                # The prompt was computed, which is news, so the first was asked anew.
                assert len(seen) == asked + (2 if known == 11 else 1)
                assert seen[-1].now_s == 100.0 + 0.75
                (view,) = seen[-1].running
                assert (view.computed, view.known) == (known - 1, known)
                assert view.due_s == seen[-1].now_s + 2.0
            asked = len(seen)
            gate.set_result(None)
            gate = await lane.reached()
            await settle()
            assert len(seen) == asked  # it ends with this token: there is nothing to foresee
            gate.set_result(None)
            answer = await stream
        assert list(answer.token_ids) == tokens_of(PROMPT, max_tokens=6, ignore_eos=True)


async def test_who_comes_while_an_iteration_runs_is_in_the_next_although_that_was_decided() -> None:
    lane = GatedLane()
    bench = Bench(lane=lane, costs=DEVICE)
    async with asyncio.timeout(60.0), bench, bench.stream(PROMPT, ignore_eos=True) as first:
        (await lane.reached()).set_result(None)
        gate = await lane.reached()
        await settle()
        async with bench.stream([7, 8, 9]) as second:
            await settle()
            gate.set_result(None)
            gate = await lane.reached()
            lane.open()
            assert list((await second).token_ids) == tokens_of([7, 8, 9])
        assert list((await first).token_ids) == tokens_of(PROMPT, ignore_eos=True)
    assert [len(steps) for steps in bench.executor.history[:3]] == [1, 1, 2]


async def test_nobody_is_given_up_because_what_was_decided_ahead_leads_to_nothing() -> None:
    usual = make_policy("inference-only")
    bench = Bench(
        costs=DEVICE,
        planner=Scripted(
            lambda seen: IterationPlan() if seen.now_s > 100.0 else usual.plan(seen)  # clock: 100
        ),
    )
    async with asyncio.timeout(60.0), bench:
        answer = await bench.stream(PROMPT, ignore_eos=True)
    assert list(answer.token_ids) == tokens_of(PROMPT, ignore_eos=True)
    assert any(seen.now_s > 100.0 for seen in bench.policy.observations)


# -- memory --------------------------------------------------------------------------------------


class TightMemory:
    """A device of 1000 bytes, of which 40 are left alone; read anew each time it is looked at."""

    def __init__(self, free_bytes: int) -> None:
        self.free_bytes = free_bytes
        self.reads = asyncio.Semaphore(0)
        self.clock = FakeClock()

    def read(self) -> MemoryReading:
        self.reads.release()
        self.clock.now_s += 2 * READ_INTERVAL_S
        return MemoryReading(1000, self.free_bytes, 0)


@pytest.mark.parametrize("free_bytes", [0, 40 + 2 * 10])  # nothing; two pages, and it needs three
async def test_what_lacks_memory_waits_and_goes_on_when_it_is_there(
    free_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "MEMORY_WAIT_S", 0.002)
    memory = TightMemory(free_bytes)
    bench = Bench(read_memory=memory.read, page_bytes=10, clock=memory.clock)
    async with asyncio.timeout(60.0), bench, bench.stream(PROMPT) as stream:
        for _ in range(6):
            await memory.reads.acquire()
        assert bench.executor.history == []
        assert bench.engine.statistics().waiting == 1
        memory.free_bytes = 900
        assert list((await stream).token_ids) == tokens_of(PROMPT)


async def test_what_runs_goes_on_without_memory_and_what_comes_waits() -> None:
    memory, lane = TightMemory(900), GatedLane()
    bench = Bench(lane=lane, read_memory=memory.read, page_bytes=10, clock=memory.clock)
    first = bench.stream(PROMPT, max_tokens=24, ignore_eos=True)
    second = bench.stream([7, 8, 9], max_tokens=2)
    async with asyncio.timeout(60.0), bench, first:
        gate = await lane.reached()
        memory.free_bytes = 0
        async with second:
            for _ in range(22):
                bench.clock.now_s += 1.0
                gate.set_result(None)
                gate = await lane.reached()
                assert [len(step.token_ids) for step in bench.executor.history[-1]] in ([9], [1])
                assert bench.engine.statistics().waiting == 1
            memory.free_bytes = 900
            bench.clock.now_s += 1.0
            lane.open()
            assert list((await first).token_ids) == tokens_of(
                PROMPT, max_tokens=24, ignore_eos=True
            )
            assert list((await second).token_ids) == tokens_of([7, 8, 9], max_tokens=2)


# -- adapters ------------------------------------------------------------------------------------


async def test_each_request_is_answered_by_the_version_it_started_with() -> None:
    lane = GatedLane()
    async with Bench(lane=lane) as bench:
        one = bench.add_adapter("a", 11)
        first = bench.request(PROMPT, version=one)
        bench.engine.submit(first)
        await lane.step()
        await lane.step()
        two = bench.add_adapter("a", 22)
        second = bench.request(PROMPT, version=two)
        base = bench.request(PROMPT)
        bench.engine.submit(second)
        bench.engine.submit(base)
        lane.open()
        while bench.engine.statistics().running:
            await settle()
        answers = [request.sequences[0].response for request in (first, second, base)]
        expected = [tokens_of(PROMPT, salt=salt) for salt in (11, 22, 0)]
        assert [list(answer.token_ids) for answer in answers if answer] == expected
        # The first version was retired with its last user, and its prefixes with it.
        assert [info.version for info in bench.adapters.list()] == [two]
        assert bench.cache.reachable_pages(one) == frozenset()


async def test_more_adapters_than_slots_take_turns() -> None:
    async with Bench(max_slots=1) as bench:
        versions = [bench.add_adapter(name, salt) for name, salt in (("a", 1), ("b", 2), ("c", 3))]
        streams = [bench.stream(PROMPT, version=version) for version in versions * 2]
        async with asyncio.TaskGroup() as group:
            for stream in streams:
                group.create_task(stream._collect())
    for stream, salt in zip(streams, (1, 2, 3) * 2, strict=True):
        assert list(stream.response.token_ids) == tokens_of(PROMPT, salt=salt)


async def test_an_adapter_that_is_used_again_is_not_installed_again() -> None:
    async with Bench() as bench:
        version = bench.add_adapter("a", 4)
        await bench.stream(PROMPT, version=version)
        await bench.stream(PROMPT, version=version)
        assert bench.adapters.statistics().installs == 1


# -- refusals ------------------------------------------------------------------------------------


async def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    lane = GatedLane()
    async with Bench(lane=lane, sequences=1, max_queue=2) as bench:
        bench.engine.submit(bench.request(PROMPT))
        await settle()
        for _ in range(2):
            bench.engine.submit(bench.request(PROMPT))
        with pytest.raises(OverloadedError, match="max_queue") as caught:
            bench.engine.submit(bench.request(PROMPT))
        assert caught.value.retry_after_s >= 1.0
        lane.open()


async def test_the_time_to_come_back_follows_the_pace() -> None:
    lane = GatedLane()
    async with Bench(lane=lane, sequences=1, max_queue=4) as bench:
        for _ in range(4):
            bench.engine.submit(bench.request(PROMPT, max_tokens=1))
            await settle()
            bench.clock.now_s += 6.0
            await lane.step()
        bench.clock.now_s += 3600.0  # a quiet hour is no pace
        for _ in range(5):
            bench.engine.submit(bench.request(PROMPT, max_tokens=1))
            await settle()
        with pytest.raises(OverloadedError) as caught:
            bench.engine.check_room()
        assert caught.value.retry_after_s == pytest.approx(4 * 6.0 / 2)
        lane.open()


async def test_what_can_never_fit_is_refused_at_once() -> None:
    async with Bench(num_pages=4, page_size=4, max_model_len=1000) as bench:
        assert bench.engine.max_model_len == 16
        with pytest.raises(ContextLengthError, match=r"9 tokens \+ max_tokens 8 exceeds") as caught:
            bench.request(PROMPT)
        assert caught.value.param == "max_tokens"
        with pytest.raises(ContextLengthError, match="16") as caught:
            bench.request([1] * 16, max_tokens=None)
        assert caught.value.param == "prompt"
        response = await bench.stream(PROMPT, max_tokens=None, ignore_eos=True)
        assert len(response.token_ids) == 7  # the rest of the context


async def test_two_live_requests_cannot_have_one_id() -> None:
    async with Bench() as bench:
        bench.engine.submit(bench.request(PROMPT, request_id="x"))
        with pytest.raises(RequestError, match="'x'") as caught:
            bench.engine.submit(bench.request(PROMPT, request_id="x"))
        assert caught.value.param == "request_id"
        await bench.engine.drain(10.0)


# -- leaving and stopping ------------------------------------------------------------------------


async def test_leaving_the_block_frees_the_pages_within_an_iteration() -> None:
    lane = GatedLane()
    async with Bench(lane=lane) as bench:
        async with bench.stream(PROMPT, n=2) as stream:
            await lane.step()
            await lane.step()
            assert bench.cache.statistics().owned_pages > 0
        assert [response.finish_reason for response in stream.responses] == ["abort"] * 2
        await lane.step()  # what was in flight
        assert bench.cache.statistics().owned_pages == 0
        assert len(bench.executor.history) == 3
        assert [r.finish_reason for r in bench.recorder.finished] == ["abort", "abort"]


async def test_leaving_while_waiting_leaves_the_queue_at_once() -> None:
    lane = GatedLane()
    async with Bench(lane=lane, sequences=1) as bench:
        bench.engine.submit(bench.request(PROMPT))
        async with bench.stream(PROMPT, n=3):
            await settle()
            assert bench.engine.statistics().waiting == 3
        assert bench.engine.statistics().waiting == 0
        lane.open()


async def test_drain_refuses_new_requests_and_finishes_the_old() -> None:
    async with Bench() as bench, asyncio.TaskGroup() as group:
        stream = bench.stream(PROMPT)
        answer = group.create_task(stream._collect())
        await settle(1)
        await bench.engine.drain(10.0)
        assert len(answer.result().token_ids) == 8
        with pytest.raises(DrainingError) as caught:
            await bench.stream(PROMPT)
        assert caught.value.retry_after_s > 0


async def test_drain_fails_what_does_not_finish_in_time() -> None:
    lane = GatedLane()
    async with Bench(lane=lane) as bench, bench.stream(PROMPT) as stream:
        await lane.step()
        async with asyncio.TaskGroup() as group:
            draining = group.create_task(bench.engine.drain(0.0))
            in_flight = await lane.reached()
            with pytest.raises(DrainingError):
                await collect(stream)
            assert not draining.done()  # the pages are still in use
            in_flight.set_result(None)
        assert stream.responses[0].finish_reason == "error"
        with pytest.raises(DrainingError):
            _ = stream.response


async def test_drain_goes_on_without_a_device_that_never_answers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine_module, "STOP_LIMIT_S", 0.01)
    lane = GatedLane()
    async with Bench(lane=lane) as bench, bench.stream(PROMPT):
        in_flight = await lane.reached()
        await bench.engine.drain(0.0)
        assert "did not let go" in caplog.text
        in_flight.set_result(None)


async def test_stopping_takes_back_the_pages_of_those_who_have_left_as_well() -> None:
    lane = GatedLane()
    bench = Bench(lane=lane)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(bench.engine.run())
        async with bench.stream(PROMPT):
            in_flight = await lane.reached()
        task.cancel()
        await settle()
        in_flight.set_result(None)
    bench.check_empty()


async def test_stopping_in_the_middle_leaves_nothing() -> None:
    lane = GatedLane()
    bench = Bench(lane=lane)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(bench.engine.run())
        stream = bench.stream(PROMPT, n=2)
        async with stream:
            await lane.step()
            in_flight = await lane.reached()
            task.cancel()
            await settle()
            in_flight.set_result(None)
            with pytest.raises(IterationError, match="stopped"):
                await stream
    bench.check_empty()
    with pytest.raises(DrainingError):
        bench.engine.submit(bench.request(PROMPT))


# -- the stream ----------------------------------------------------------------------------------


async def test_a_stream_must_be_entered_and_only_once() -> None:
    async with Bench() as bench:
        stream = bench.stream(PROMPT)
        with pytest.raises(RuntimeError, match="async with"):
            await anext(stream)
        async with stream:
            pass
        with pytest.raises(RuntimeError, match="once"):
            async with stream:
                pass


async def test_a_response_is_there_when_the_answer_has_ended() -> None:
    async with Bench() as bench, bench.stream(PROMPT) as stream:
        with pytest.raises(RuntimeError, match="not ended"):
            _ = stream.response
        assert stream.responses == ()
        assert await stream is stream.response


async def test_two_tasks_may_wait_for_one_stream() -> None:
    async with Bench() as bench, bench.stream(PROMPT) as stream, asyncio.TaskGroup() as group:
        waits = [group.create_task(stream._collect()) for _ in range(2)]
        deltas = group.create_task(collect(stream))
    assert [task.result() for task in waits] == [stream.response] * 2
    assert [t for d in deltas.result() for t in d.token_ids] == tokens_of(PROMPT)


async def test_a_cancelled_reader_leaves_no_waiter_behind() -> None:
    lane = GatedLane()
    async with Bench(lane=lane) as bench, bench.stream(PROMPT) as stream:
        async with asyncio.TaskGroup() as group:
            reader = group.create_task(collect(stream))
            await settle()
            reader.cancel()
        assert stream._request is not None
        assert stream._request._waiters == []
        lane.open()


# -- evidence ------------------------------------------------------------------------------------


async def test_timings_are_those_of_the_clock() -> None:
    lane = GatedLane()
    async with Bench(lane=lane, sequences=1) as bench:
        bench.engine.submit(bench.request(PROMPT, max_tokens=1))
        await settle()
        request = bench.request(PROMPT, max_tokens=3, ignore_eos=True)
        bench.engine.submit(request)
        for _ in range(4):
            bench.clock.now_s += 2.0
            await lane.step()
        response = request.sequences[0].response
    assert response is not None
    assert response.timings.queue_s == pytest.approx(2.0)
    assert response.timings.ttft_s == pytest.approx(4.0)
    assert response.timings.tbt_s == pytest.approx((2.0, 2.0))
    assert response.timings.e2e_s == pytest.approx(8.0)
    assert bench.recorder.ttfts == pytest.approx([2.0, 4.0])
    assert bench.recorder.gaps == pytest.approx([2.0, 2.0])
    assert [r.finish_reason for r in bench.recorder.finished] == ["length", "length"]


async def test_a_listener_that_fails_hurts_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async with Bench() as bench:

        def explode(_: object) -> None:
            raise ValueError("listener")

        bench.recorder.on_first_token = explode  # type: ignore[method-assign]
        response = await bench.stream(PROMPT)
    assert len(response.token_ids) == 8
    assert "listener" in caplog.text


async def test_statistics_count_what_happened() -> None:
    async with Bench() as bench:
        stream = bench.stream(PROMPT, n=2, max_tokens=5, ignore_eos=True)
        await stream
        bench.engine.count_rejection("overloaded")
        statistics = bench.engine.statistics()
    assert statistics.prompt_tokens == 9
    assert statistics.generated_tokens == 10
    assert statistics.iterations == len(bench.executor.history)
    assert statistics.finished == 2
    assert statistics.rejected == 1
    assert bench.recorder.rejected == ["overloaded"]
    assert statistics.forward_s == pytest.approx(0.001 * statistics.iterations)
