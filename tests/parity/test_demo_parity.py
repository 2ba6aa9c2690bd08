"""Answers of the shipped demo model through `Runtime.chat`, against transformers and peft.

The same judge as for the tiny models (`oracle.Oracle`), on trained weights, real text, a real chat
template and the settings that people get who change nothing.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cotune import AdapterVersion, Message, Runtime, SamplingParams
from cotune.runtime.loading import DEMO_MODEL_NAME, DEMO_MODEL_PATH
from oracle import TOLERANCES, Oracle, Tolerance
from step_spy import StepSpy
from tiny_models import quiet_transformers, save_lora, with_peft_adapter

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cotune import Response

pytestmark = pytest.mark.skipif(
    not (DEMO_MODEL_PATH / "config.json").exists(),
    reason="there is no demo model in runtime/demo_model; 'cotune train-demo' makes it",
)

PAGE = 16
ANSWER = 24
SYSTEM: Message = {
    "role": "system",
    "content": "You are a kind friend who answers in short and simple words. You like animals, "
    "stories and the sea, and you never say more than you know.",
}
QUESTIONS = (
    "Hello!",
    "Tell me a story about a dog.",
    "What is the sun?",
    "I went to the market this morning. I bought six apples, two loaves of bread and some fish "
    "for the cat. Then it began to rain, and I ran home. What did I buy for the cat?",
    "Why do birds fly south?",
    "Can you help me?",
)
# Trained logits lie closer together than those of the tiny models, and so do their roundings.
# Measured in bfloat16: at most 0.05, root mean square 0.02.
DEMO_TOLERANCES = {
    torch.float32: TOLERANCES[torch.float32],
    torch.bfloat16: Tolerance(logprob=0.2, rms=0.05, gap=0.25, decided=0.6),
}


class Demo:
    """The demo model in one dtype, and who judges it."""

    def __init__(self, dtype: torch.dtype, path: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.dtype = dtype
        with quiet_transformers():
            self.model: Any = AutoModelForCausalLM.from_pretrained(
                DEMO_MODEL_PATH, dtype=dtype
            ).eval()
            self.tokenizer: Any = AutoTokenizer.from_pretrained(DEMO_MODEL_PATH)
        self.oracle = Oracle(self.model, DEMO_TOLERANCES[dtype])
        self.adapter = save_lora(path / "adapter", self.model, 8, seed=1)
        # An adapter made of noise is as rough on the roundings as the tiny models are.
        adapted = with_peft_adapter(self.model, self.adapter)
        self.adapter_oracle = Oracle(adapted, TOLERANCES[dtype])

    def runtime(self, **settings: Any) -> Runtime:
        settings = {"num_pages": 128, "max_model_len": 512, **settings}
        dtype = str(self.dtype).removeprefix("torch.")
        return Runtime(device="cpu", dtype=dtype, inference_threads=1, profile="off", **settings)

    def check(self, responses: Sequence[Response], *, ignore_eos: bool = False) -> None:
        for response in responses:
            self.oracle.check_greedy(response, ANSWER, ignore_eos=ignore_eos)
        self.oracle.check_decisive()


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def demo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return Demo(request.param, tmp_path_factory.mktemp("demo"))


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> StepSpy:
    return StepSpy(monkeypatch)


def greedy(**more: Any) -> SamplingParams:
    """The model's own choice: its generation_config.json asks for a penalty."""
    return SamplingParams(
        temperature=0.0, repetition_penalty=1.0, max_tokens=ANSWER, logprobs=2, **more
    )


def user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


CHATS = [*map(user, QUESTIONS), *([SYSTEM, *user(question)] for question in QUESTIONS[:3])]


async def answers(
    rt: Runtime, chats: Sequence[list[Message]] = CHATS, **more: Any
) -> list[Response]:
    """To chats that arrive at once."""
    return await asyncio.gather(*(rt.chat(chat, greedy(**more)) for chat in chats))


async def test_alone_and_as_transformers_tokenizes(demo: Demo, spy: StepSpy) -> None:
    async with demo.runtime(enable_prefix_sharing=False) as rt:
        assert rt.describe()["forward"] == "lean decoder"
        assert rt.served_name == DEMO_MODEL_NAME
        found = [await rt.chat(chat, greedy()) for chat in CHATS]
    assert spy.widest == 1
    for chat, response in zip(CHATS, found, strict=True):
        ids = demo.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert list(response.prompt_token_ids) == ids
        text = demo.tokenizer.decode(response.token_ids, skip_special_tokens=True)
        assert response.text == text
    demo.check(found)


async def test_in_a_full_batch_of_mixed_lengths_with_chunked_prefill(
    demo: Demo, spy: StepSpy
) -> None:
    async with demo.runtime(max_num_seqs=5, max_num_batched_tokens=21) as rt:
        found = await answers(rt)
    assert spy.widest == 5
    assert spy.has("decode", "chunk")
    demo.check(found)


async def test_from_a_shared_system_prompt_and_in_a_conversation(demo: Demo, spy: StepSpy) -> None:
    async with demo.runtime() as rt:
        found = [await rt.chat(CHATS[-3], greedy())]
        found += await answers(rt, CHATS[-2:])
        assert spy.shared_pages() >= 2
        chat = list(CHATS[-3])
        for question in QUESTIONS[3:5]:
            chat += [{"role": "assistant", "content": found[-1].text}, *user(question)]
            found.append(await rt.chat(chat, greedy()))
    seen: list[list[int]] = []
    for response in found:
        prompt = list(response.prompt_token_ids)
        # Text that is tokenized again need not give the tokens that made it; what agrees is used.
        best = max((common(prompt[:-1], earlier) for earlier in seen), default=0)
        assert response.usage.cached_tokens == best // PAGE * PAGE
        seen.append([*prompt, *response.token_ids[:-1]])
    assert found[-1].usage.cached_tokens > found[-2].usage.cached_tokens >= 2 * PAGE
    demo.check(found)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens agree."""
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)


async def test_after_preemption(demo: Demo) -> None:
    async with demo.runtime(num_pages=12, max_model_len=192) as rt:
        found = await answers(rt, ignore_eos=True)
        statistics = rt.statistics()
    assert statistics.preemptions > 0
    assert statistics.cache.evicted_pages > 0
    demo.check(found, ignore_eos=True)


async def test_as_siblings(demo: Demo, spy: StepSpy) -> None:
    drawn = SamplingParams(n=4, seed=3, temperature=1.5, max_tokens=ANSWER, logprobs=2)
    async with demo.runtime() as rt:
        async with rt.chat(user(QUESTIONS[3]), greedy(n=2)) as alike:
            await alike
        async with rt.chat(user(QUESTIONS[3]), drawn) as different:
            await different
    pages = (len(alike.prompt_token_ids) - 1) // PAGE
    assert spy.widest == 4
    assert spy.shared_pages() >= pages > 1
    assert [r.usage.cached_tokens for r in alike.responses] == [0, pages * PAGE]
    assert len({response.token_ids for response in different.responses}) > 1
    for response in different.responses:
        demo.oracle.check(response)
    demo.check(alike.responses)


async def test_with_an_adapter_beside_the_base_model(demo: Demo, spy: StepSpy) -> None:
    async with demo.runtime(adapters={"noise": demo.adapter}) as rt:
        chats = CHATS[:4]
        adapted, base = await asyncio.gather(
            asyncio.gather(*(rt.chat(chat, greedy(), model="noise") for chat in chats)),
            answers(rt, chats),
        )
    assert spy.slots_together() == {0, 1}
    assert {response.adapter_version for response in adapted} == {AdapterVersion("noise", 1)}
    for response in adapted:
        demo.adapter_oracle.check_greedy(response, ANSWER)
    demo.adapter_oracle.check_decisive()
    demo.check(base)


async def test_with_the_penalty_that_its_generation_config_asks_for(demo: Demo) -> None:
    penalty = demo.model.generation_config.repetition_penalty
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER, logprobs=2)
    async with demo.runtime(max_num_batched_tokens=32) as rt:
        found = await asyncio.gather(*(rt.chat(chat, params) for chat in CHATS))
    compared = sum(
        demo.oracle.check_edited(response, ANSWER, repetition_penalty=penalty) for response in found
    )
    tokens = sum(len(response.token_ids) for response in found)
    assert compared > (0.9 if demo.dtype is torch.float32 else 0.05) * tokens
