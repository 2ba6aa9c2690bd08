"""Answers of the whole runtime against transformers and peft, through the public API.

Every family, in every situation that changes how its numbers are computed: alone, in a full batch,
chunked, shared, preempted, as siblings, under adapters. The judge is `oracle.Oracle`; what really
ran is read from `StepSpy` and the statistics, so that no test passes without its situation.

Tiny models, one Runtime per test (it starts in a tenth of a second). Prompts are random and have no
common pages unless a test builds them to.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cotune import BASE, AdapterVersion, NotFoundError, Runtime, SamplingParams
from cotune.runtime import decoder
from oracle import TOLERANCES, Oracle
from step_spy import StepSpy
from tiny_models import (
    ALL_LINEARS,
    FAMILIES,
    VOCAB_SIZE,
    save_lora,
    save_model_directory,
    tiny_model,
    with_peft_adapter,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from cotune import Delta, Response

PAGE = 16
LENGTHS = (1, 70, 16, 5, 47, 17, 90, 33, 64, 15)
"""Prompt lengths on and around the borders of pages, some beyond the windows of 24 tokens."""
ANSWER = 20
"""Tokens asked for unless a test needs others."""

# The adapters that tests use: rank, and the linears that have one.
ADAPTERS: dict[str, tuple[int, Sequence[str]]] = {
    "tutor": (12, ALL_LINEARS),
    "poet": (4, ("q_proj", "v_proj")),
    "new-poet": (8, ("k_proj", "o_proj", "down_proj")),
}


# -- whom we ask -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model to serve. Heads of 32 run on the compiled kernels, the families' own sizes do not."""

    family: str
    dtype: torch.dtype = torch.float32
    head_dim: int | None = 32

    def __str__(self) -> str:
        kernels = "plain" if self.head_dim is None else "compiled"
        return f"{self.family}-{str(self.dtype).removeprefix('torch.')}-{kernels}"


EVERY_FAMILY = [Case(family) for family in FAMILIES]
PLAIN = [Case("llama", head_dim=None), Case("gemma2", head_dim=None), Case("qwen3", head_dim=None)]
ROUNDED = [
    Case("llama", torch.bfloat16),
    Case("gemma3_text", torch.bfloat16),
    Case("olmo2", torch.bfloat16, head_dim=None),
    Case("mistral", torch.float16),
]
WINDOWED = [Case("mistral"), Case("gemma2"), Case("gemma3_text"), Case("gemma2", head_dim=None)]

every_case = pytest.mark.parametrize("case", [*EVERY_FAMILY, *PLAIN, *ROUNDED], ids=str)
exact_cases = pytest.mark.parametrize("case", [Case("llama"), *PLAIN[1:]], ids=str)


class Subject:
    """A model directory and its adapters, with an oracle for each."""

    def __init__(self, case: Case, path: Path) -> None:
        self.case = case
        self.path = path
        self._overrides: dict[str, Any] = (
            {} if case.head_dim is None else {"head_dim": case.head_dim}
        )
        save_model_directory(path / "model", case.family, case.dtype, 3, **self._overrides)
        self._oracles: dict[str | None, Oracle] = {}

    def make_model(self, **overrides: Any) -> Any:
        """The weights in the directory, under a config that may differ."""
        overrides = self._overrides | overrides
        return tiny_model(self.case.family, self.case.dtype, 3, **overrides)

    @cached_property
    def model(self) -> Any:
        """What transformers has of it."""
        return self.make_model()

    def adapter(self, name: str) -> Path:
        """The directory of one of `ADAPTERS`."""
        path = self.path / name
        if not path.exists():
            rank, targets = ADAPTERS[name]
            save_lora(path, self.model, rank, targets, seed=list(ADAPTERS).index(name))
        return path

    def oracle(self, name: str | None = None) -> Oracle:
        """Who judges answers of this adapter, or of the base model."""
        if name not in self._oracles:
            model = self.model
            if name is not None:
                model = with_peft_adapter(model, self.adapter(name))
            self._oracles[name] = Oracle(model, TOLERANCES[self.case.dtype])
        return self._oracles[name]

    def runtime(self, *adapters: str, **settings: Any) -> Runtime:
        """A runtime with these adapters, and pages enough unless a test says otherwise."""
        settings = {"num_pages": 128, "max_num_batched_tokens": 256, "profile": "off", **settings}
        return Runtime(
            self.path / "model",
            "cpu",
            adapters={name: self.adapter(name) for name in adapters},
            inference_threads=1,
            **settings,
        )

    def check(self, asks: Sequence[Ask], responses: Sequence[Response]) -> None:
        """Judge greedy answers, given what they were asked for, in the order of `answers`."""
        wanted = [ask for ask in asks for _ in range(ask.params.n)]
        for ask, response in zip(wanted, responses, strict=True):
            oracle = self.oracle(ask.weights or ask.model)
            assert ask.params.max_tokens is not None
            oracle.check_greedy(response, ask.params.max_tokens, ignore_eos=ask.params.ignore_eos)
            if ask.params.prompt_logprobs is not None:
                oracle.check_prompt(response, ask.params.prompt_logprobs)
        for name in {ask.weights or ask.model for ask in asks}:
            self.oracle(name).check_decisive()


@pytest.fixture(scope="module")
def subject_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Subject]:
    """Subjects by case, made once: their oracles remember what they computed."""
    made: dict[Case, Subject] = {}

    def get(case: Case) -> Subject:
        if case not in made:
            made[case] = Subject(case, tmp_path_factory.mktemp(str(case)))
        return made[case]

    return get


@pytest.fixture
def subject(case: Case, subject_of: Callable[[Case], Subject]) -> Subject:
    return subject_of(case)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Iterator[StepSpy]:
    spy = StepSpy(monkeypatch)
    yield spy
    spy.gate.set()


# -- what we ask -----------------------------------------------------------------------------------


def greedy(tokens: int | None = ANSWER, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, logprobs=2, **more)


@dataclass(frozen=True)
class Ask:
    """A request.

    `weights` is the one of `ADAPTERS` that must answer, where it is not the one named like `model`.
    """

    prompt: list[int]
    params: SamplingParams = field(default_factory=greedy)
    model: str | None = None
    weights: str | None = None
    priority: int = 0


def random_prompts(lengths: Sequence[int], seed: int = 11) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


PROMPTS = random_prompts(LENGTHS)
# Answers of different lengths, so that sequences join and leave a batch at different times.
ASKS = [Ask(prompt, greedy(ANSWER - 3 * (i % 4))) for i, prompt in enumerate(PROMPTS)]
SYSTEM = PROMPTS[8][: 2 * PAGE]
MODELS = (None, "tutor", "poet")
ADAPTER_ASKS = [
    Ask(SYSTEM + prompt[:30], greedy(24, ignore_eos=True), model)
    for prompt, model in product(PROMPTS[1:3], MODELS)
]


async def answer(rt: Runtime, ask: Ask) -> tuple[Response, ...]:
    """All n answers, read as a stream; deltas and responses must tell the same."""
    pieces: dict[int, list[Delta]] = {index: [] for index in range(ask.params.n)}
    async with rt.complete(
        ask.prompt, ask.params, model=ask.model, priority=ask.priority
    ) as stream:
        async for delta in stream:
            pieces[delta.index].append(delta)
    for response in stream.responses:
        deltas = pieces[response.index]
        assert response.token_ids == tuple(t for delta in deltas for t in delta.token_ids)
        assert response.logprobs == tuple(p for delta in deltas for p in delta.logprobs or ())
        assert response.text == "".join(delta.text for delta in deltas)
        assert response.prompt_token_ids == tuple(ask.prompt)
    assert [response.index for response in stream.responses] == list(range(ask.params.n))
    return stream.responses


async def answers(rt: Runtime, asks: Sequence[Ask]) -> list[Response]:
    """The answers to requests that arrive at once, in their order; siblings one after the other."""
    found = await asyncio.gather(*(answer(rt, ask) for ask in asks))
    assert rt.statistics().failed_iterations == 0
    return [response for responses in found for response in responses]


# -- one model, many situations --------------------------------------------------------------------


@every_case
async def test_answers_alone_are_those_of_transformers(subject: Subject, spy: StepSpy) -> None:
    async with subject.runtime() as rt:
        description = rt.describe()
        assert description["forward"] == "lean decoder"
        assert ("compiled" in str(description["attention"])) == (subject.case.head_dim == 32)
        assert description["page_size"] == PAGE
        asks = [replace(ask, params=replace(ask.params, prompt_logprobs=2)) for ask in ASKS]
        found = [response for ask in asks for response in await answer(rt, ask)]
    assert spy.widest == 1
    assert not spy.has("chunk")
    assert {response.usage.cached_tokens for response in found} == {0}
    subject.check(asks, found)


@every_case
async def test_a_full_batch_of_mixed_lengths_changes_no_answer(
    subject: Subject, spy: StepSpy
) -> None:
    async with subject.runtime(max_num_seqs=6) as rt:
        found = await answers(rt, ASKS)
        statistics = rt.statistics()
    assert spy.widest == 6  # full, and the rest joined as others left
    assert spy.has("decode", "prefill")
    assert statistics.iterations < statistics.generated_tokens / 2
    subject.check(ASKS, found)


@every_case
async def test_chunked_prefill_changes_no_answer(subject: Subject, spy: StepSpy) -> None:
    budget = 7  # no divisor of the page size: chunks end anywhere
    async with subject.runtime(max_num_batched_tokens=budget) as rt:
        found = await answers(rt, ASKS)
    assert max(sum(part.tokens for part in it) for it in spy.iterations) == budget
    assert spy.has("decode", "chunk")
    assert len(spy.iterations) >= sum(LENGTHS) / budget
    ends = {(part.start + part.tokens) % PAGE for it in spy.iterations for part in it}
    assert ends == set(range(PAGE)), "chunks should end everywhere within a page"
    subject.check(ASKS, found)


@every_case
async def test_a_shared_prefix_is_computed_once_and_changes_no_answer(
    subject: Subject, spy: StepSpy
) -> None:
    system = PROMPTS[6][: 3 * PAGE]
    first, *others = asks = [
        Ask(system + tail, greedy(12)) for tail in random_prompts((1, 9, 16, 30), seed=12)
    ]
    async with subject.runtime() as rt:
        found = [*await answer(rt, first)]
        spy.iterations.clear()
        found += await answers(rt, others)
        # A prompt that ends with a page: that page is there, but its last token is needed.
        found += await answer(rt, others[1])
        statistics = rt.statistics()
    assert [response.usage.cached_tokens for response in found] == [0, *[3 * PAGE] * 4]
    assert spy.shared_pages() == 3
    assert min(part.start for it in spy.iterations for part in it) == 3 * PAGE
    assert statistics.cache.hit_tokens == 4 * 3 * PAGE
    subject.check([*asks, others[1]], found)


@every_case
async def test_a_conversation_goes_on_from_the_pages_of_its_earlier_answers(
    subject: Subject,
) -> None:
    prompt = PROMPTS[7]
    asks: list[Ask] = []
    found: list[Response] = []
    async with subject.runtime() as rt:
        for said in random_prompts((0, 13, 5), seed=13):
            asks.append(Ask(prompt + said, greedy(ignore_eos=True)))
            found += await answer(rt, asks[-1])
            prompt = asks[-1].prompt + list(found[-1].token_ids)
    # All that was computed before: prompt and answer, but for the answer's last token.
    known = [0, *(response.usage.total_tokens - 1 for response in found[:-1])]
    cached = [response.usage.cached_tokens for response in found]
    assert cached == [tokens // PAGE * PAGE for tokens in known]
    assert all(
        later > earlier.usage.prompt_tokens
        for later, earlier in zip(cached[1:], found[:-1], strict=True)
    ), "pages of the answers should be among them"
    subject.check(asks, found)


@pytest.mark.parametrize("sharing", [True, False], ids=["sharing", "no-sharing"])
@every_case
async def test_answers_survive_preemption_and_eviction(
    subject: Subject, spy: StepSpy, sharing: bool
) -> None:
    asks = [replace(ask, params=greedy(ANSWER, ignore_eos=True)) for ask in ASKS]
    async with subject.runtime(
        num_pages=12, max_model_len=160, enable_prefix_sharing=sharing
    ) as rt:
        found = await answers(rt, asks)
        statistics = rt.statistics()
    assert statistics.preemptions > 0
    assert (statistics.cache.evicted_pages > 0) == sharing
    # Whoever gave way in the middle of an answer read its prompt and its own words again.
    assert sum(part.tokens for it in spy.iterations for part in it) > sum(LENGTHS) + sum(
        len(response.token_ids) - 1 for response in found
    )
    subject.check(asks, found)


@every_case
async def test_siblings_share_the_prompt_and_each_answers_as_if_alone(
    subject: Subject, spy: StepSpy
) -> None:
    alike = Ask(PROMPTS[4], greedy(n=3))  # 47 tokens: two full pages, and a part of one
    drawn = Ask(PROMPTS[1], SamplingParams(n=3, seed=5, max_tokens=ANSWER, logprobs=2))
    async with subject.runtime() as rt:
        alike_found = await answer(rt, alike)
        drawn_found = await answer(rt, drawn)
    assert spy.widest == 3
    assert spy.shared_pages() == len(drawn.prompt) // PAGE
    assert [r.usage.cached_tokens for r in alike_found] == [0, 2 * PAGE, 2 * PAGE]
    assert len({response.token_ids for response in drawn_found}) == 3
    subject.check([alike], alike_found)
    for response in drawn_found:
        subject.oracle().check(response)


@every_case
async def test_prompt_log_probabilities_in_chunks_are_those_of_transformers(
    subject: Subject, spy: StepSpy
) -> None:
    asks = [replace(ask, params=replace(ask.params, prompt_logprobs=3)) for ask in ASKS[:5]]
    asks.append(Ask(PROMPTS[5], greedy(prompt_logprobs=3, n=2)))
    async with subject.runtime(max_num_batched_tokens=7) as rt:
        await answer(rt, ASKS[1])  # its pages are cached now, and must not be used for these
        spy.iterations.clear()
        found = await answers(rt, asks)
        assert spy.has("chunk", "decode")
        only_read = await rt.complete(
            PROMPTS[7], SamplingParams(max_tokens=0, prompt_logprobs=3, temperature=0)
        )
    assert [response.usage.cached_tokens for response in found[:-1]] == [0] * 6
    assert only_read.token_ids == ()
    assert only_read.finish_reason == "length"
    subject.oracle().check_prompt(only_read, 3)
    subject.check(asks, found)


# -- adapters --------------------------------------------------------------------------------------


@every_case
async def test_base_and_adapters_of_two_ranks_answer_in_one_batch_as_peft_does(
    subject: Subject, spy: StepSpy
) -> None:
    async with subject.runtime("tutor", "poet") as rt:
        found = await answers(rt, ADAPTER_ASKS)
        served_name = rt.served_name
    assert spy.widest == len(ADAPTER_ASKS)
    assert spy.slots_together() == {0, 1, 2}
    assert len({response.token_ids for response in found}) == len(found), "adapters must matter"
    for ask, response in zip(ADAPTER_ASKS, found, strict=True):
        assert response.model == (ask.model or served_name)
        assert response.adapter_version == (AdapterVersion(ask.model, 1) if ask.model else BASE)
    subject.check(ADAPTER_ASKS, found)


@every_case
async def test_adapters_under_pressure_answer_as_peft_does(subject: Subject, spy: StepSpy) -> None:
    await check_under_pressure(subject, spy, "lean decoder")


async def check_under_pressure(subject: Subject, spy: StepSpy, forward: str) -> None:
    """One slot for two adapters, few pages, short chunks, siblings and prefixes, all at once.

    Answers have their full length, so that every model meets the same schedule.
    """
    asks = [
        *ADAPTER_ASKS,
        Ask(PROMPTS[4], greedy(30, n=2, prompt_logprobs=1, ignore_eos=True), "poet", priority=-1),
        Ask(SYSTEM + PROMPTS[7], greedy(30, n=2, ignore_eos=True), priority=1),
    ]
    async with subject.runtime(
        "tutor", "poet", max_loras=1, num_pages=10, max_model_len=112, max_num_batched_tokens=11
    ) as rt:
        assert str(rt.describe()["forward"]).startswith(forward)
        found = await answers(rt, asks)
        statistics = rt.statistics()
    assert statistics.preemptions > 0
    assert statistics.cache.evicted_pages > 0
    assert statistics.cache.hit_tokens > 0
    assert spy.has("decode", "chunk")
    assert spy.slots_together() == {0, 1}
    subject.check(asks, found)


@every_case
async def test_kv_is_never_shared_across_adapter_versions(subject: Subject) -> None:
    prompt = ADAPTER_ASKS[0].prompt  # 62 tokens
    async with subject.runtime("tutor", "poet") as rt:

        async def twice(model: str | None, weights: str | None, version: AdapterVersion) -> int:
            """Ask for the same under one version; the pages that this leaves in the trie."""
            ask = Ask(prompt, greedy(24, ignore_eos=True), model, weights)
            (cold,), (warm,) = await answer(rt, ask), await answer(rt, ask)
            assert cold.adapter_version == warm.adapter_version == version
            assert cold.usage.cached_tokens == 0
            assert warm.usage.cached_tokens == 3 * PAGE
            subject.check([ask, ask], [cold, warm])
            return (cold.usage.total_tokens - 1) // PAGE

        base = await twice(None, None, BASE)
        tutor = await twice("tutor", "tutor", AdapterVersion("tutor", 1))
        poet = await twice("poet", "poet", AdapterVersion("poet", 1))
        assert rt.statistics().cache.cached_pages == base + tutor + poet
        new = await rt.load_adapter("poet", subject.adapter("new-poet"))
        assert new == AdapterVersion("poet", 2)
        assert rt.statistics().cache.cached_pages == base + tutor, "nobody can use the others"
        await twice("poet", "new-poet", new)
        with pytest.raises(NotFoundError):
            await rt.complete(prompt, greedy(), model="poet@1")
        await rt.unload_adapter("tutor")
        await rt.unload_adapter("poet")
        assert rt.statistics().cache.cached_pages == base
        (again,) = await answer(rt, Ask(prompt, greedy(24, ignore_eos=True)))
        assert again.usage.cached_tokens == 3 * PAGE


@exact_cases
async def test_adapters_loaded_while_others_stream_disturb_nobody(
    subject: Subject, spy: StepSpy
) -> None:
    prompt, params = ADAPTER_ASKS[0].prompt, greedy(24, ignore_eos=True)
    early = [Ask(prompt, params), Ask(prompt, params, "poet")]
    late = [
        Ask(prompt, params, "tutor"),
        Ask(prompt, params, "poet", weights="new-poet"),
        Ask(prompt, params, "poet@2", weights="new-poet"),
    ]
    async with subject.runtime("poet") as rt, AsyncExitStack() as stack:

        async def begin(asks: Sequence[Ask]) -> list[Any]:
            return [
                await stack.enter_async_context(rt.complete(a.prompt, a.params, model=a.model))
                for a in asks
            ]

        streams = await begin(early)
        for stream in streams:
            await anext(stream)
        spy.gate.clear()  # the device stands still in the middle of two answers
        await rt.load_adapter("tutor", subject.adapter("tutor"))
        await rt.load_adapter("poet", subject.adapter("new-poet"))
        streams += await begin(late)
        used = [stream.usage.completion_tokens for stream in streams]
        spy.gate.set()
        found = [await stream for stream in streams]
        assert rt.statistics().failed_iterations == 0
    assert all(0 < tokens < 24 for tokens in used[:2])
    assert used[2:] == [0, 0, 0]
    assert spy.slots_together() == {0, 1, 2, 3}
    versions = [str(response.adapter_version) for response in found]
    assert versions == ["base", "poet@1", "tutor@1", "poet@2", "poet@2"]
    subject.check(early + late, found)


# -- what only some models have, or few need to show -----------------------------------------------


@pytest.mark.parametrize("case", WINDOWED, ids=str)
async def test_sliding_windows_hold_in_chunks_and_over_cached_prefixes(subject: Subject) -> None:
    prompt = PROMPTS[6]  # 90 tokens, windows of 24
    unlimited = Oracle(subject.make_model(sliding_window=4096), TOLERANCES[torch.float32])
    difference = (unlimited.logprobs(prompt) - subject.oracle().logprobs(prompt)).abs()
    assert float(difference[:24].max()) < 1e-4
    assert float(difference[24:].amax(-1).min()) > 0.05, "the windows must matter everywhere"
    asks = [Ask(prompt, greedy(40)), Ask(prompt[:80] + prompt[:9], greedy(40))]
    for budget in (5, 48, 256):
        async with subject.runtime(max_num_batched_tokens=budget) as rt:
            found = [response for ask in asks for response in await answer(rt, ask)]
        assert found[1].usage.cached_tokens == 80  # most of it is behind the windows already
        subject.check(asks, found)


@pytest.mark.parametrize("case", [*EVERY_FAMILY, ROUNDED[0]], ids=str)
async def test_the_models_own_modules_answer_alike_where_there_is_no_recipe(
    subject: Subject, spy: StepSpy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(decoder._RECIPES, subject.case.family)
    await check_under_pressure(subject, spy, "model's modules")


@exact_cases
async def test_an_answer_may_fill_the_context_to_its_last_token(subject: Subject) -> None:
    asks = [Ask(PROMPTS[6], greedy(None, ignore_eos=True)), ASKS[4]]  # 90 and 47 tokens
    async with subject.runtime(num_pages=6, max_model_len=6 * PAGE) as rt:
        long, short = await answers(rt, asks)
    assert long.usage.total_tokens == 6 * PAGE  # every position, and every page
    assert long.finish_reason == "length"
    room = 6 * PAGE - len(PROMPTS[6])
    subject.check([Ask(PROMPTS[6], greedy(room, ignore_eos=True)), asks[1]], [long, short])


@exact_cases
async def test_seeded_draws_do_not_depend_on_what_else_runs(subject: Subject, spy: StepSpy) -> None:
    params = SamplingParams(
        n=2,
        max_tokens=30,
        logprobs=2,
        temperature=0.9,
        top_p=0.95,
        top_k=60,
        repetition_penalty=1.2,
        frequency_penalty=0.3,
    )
    asks = [Ask(prompt, replace(params, seed=seed)) for seed, prompt in enumerate(PROMPTS[1:8])]
    async with subject.runtime(enable_prefix_sharing=False) as rt:
        alone = [response for ask in asks for response in await answer(rt, ask)]
    assert spy.widest == 2
    async with subject.runtime(num_pages=16, max_model_len=160, max_num_batched_tokens=19) as rt:
        await answer(rt, ASKS[1])
        crowded = (await answers(rt, asks + ASKS))[: len(alone)]
        statistics = rt.statistics()
    assert statistics.preemptions > 0
    assert spy.has("decode", "chunk")
    assert spy.widest > 4
    assert any(response.usage.cached_tokens for response in crowded)
    assert [response.token_ids for response in crowded] == [r.token_ids for r in alone]
    assert [response.text for response in crowded] == [response.text for response in alone]
    assert len({response.token_ids for response in alone}) == len(alone)
    for response in crowded:
        subject.oracle().check(response)


@exact_cases
async def test_penalties_remember_the_answer_across_preemption(subject: Subject) -> None:
    tokens, penalty = 40, 1.3
    asks = [Ask(p, greedy(tokens, repetition_penalty=penalty)) for p in PROMPTS[1:8]]
    async with subject.runtime(num_pages=12, max_model_len=160, max_num_batched_tokens=32) as rt:
        found = await answers(rt, asks)
        assert rt.statistics().preemptions > 0
    oracle = subject.oracle()
    compared = changed = 0
    for response in found:
        compared += oracle.check_edited(response, tokens, repetition_penalty=penalty)
        plain = oracle.generate(response.prompt_token_ids, ANSWER).tokens
        changed += list(response.token_ids[:ANSWER]) != plain
    assert compared > 0.8 * sum(len(response.token_ids) for response in found)
    assert changed >= 4, "the penalty must matter"
