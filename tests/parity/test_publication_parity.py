"""Publishing while people are served: nobody fails, every answer is its version's, to the token.

Versions are random adapters, so that each answers in its own way, written and published as the
learner does it. The judges: the same version asked again afterwards, transformers with peft on the
published directory, and `KvWitness`, which sees at the device whose keys and values every sequence
reads.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cotune import BASE, AdapterVersion, Runtime, SamplingParams
from cotune.runtime.errors import ConflictError, NotFoundError
from cotune.runtime.executor import Executor
from cotune.runtime.learning.config import LearningConfig
from cotune.runtime.training.safepoints import Safepoints
from cotune.runtime.training.tree import StopLora, TrainingTree
from oracle import TOLERANCES, Oracle
from publications import Publications, manifest
from step_spy import StepSpy
from tiny_models import VOCAB_SIZE, save_model_directory, tiny_model, with_peft_adapter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from cotune import Response
    from cotune.runtime.learning.service import LearningService
    from cotune.runtime.lora import LoraWeights
    from cotune.runtime.step import SequenceStep, StepResult

PAGE = 16
NAME, TENANT = "tiny", "tutor"
SEED = 3


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", seed=SEED, head_dim=32)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model"
    return save_model_directory(path, "llama", seed=SEED, head_dim=32)


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Iterator[StepSpy]:
    spy = StepSpy(monkeypatch)
    yield spy
    spy.gate.set()


def runtime(directory: Path, state_dir: Path, *, warm: bool = True, **settings: Any) -> Runtime:
    """Serves `NAME` and the tenant; feedback is taken, nothing is trained on it."""
    learning = LearningConfig(
        enabled=True, state_dir=state_dir, adapters=(TENANT,), train=False, warm_prefixes=warm
    )
    settings = {"num_pages": 512, "max_num_batched_tokens": 256, "profile": "off", **settings}
    return Runtime(
        directory,
        "cpu",
        served_name=NAME,
        learning=learning,
        inference_threads=1,
        **settings,
    )


def learning_of(rt: Runtime) -> LearningService:
    learning = rt._served.learning
    assert learning is not None
    return learning


def random_ids(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCAB_SIZE, (count,), generator=generator).tolist()


def greedy(tokens: int = 16, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, logprobs=2, ignore_eos=True, **more)


class KvWitness:
    """Sees at the device whose KV is read: each token's must be of the weights that read it.

    It notes with which weights, after which token, every slot of every page was written, and looks
    at all that a sequence reads. Weights are told apart by their values, so that a version which
    left and came back from disk is the same one.

    Attributes:
        reads: token slots that were looked at.
        weights_seen: how many different adapters computed something, the base model included.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._of_slot: dict[int, int] = {0: 0}
        self._written: dict[tuple[int, int], tuple[int, int, int]] = {}
        self.reads = 0
        self._seen: set[int] = set()
        self.errors: list[str] = []
        execute, install = Executor.execute, Executor.install_adapter

        def install_adapter(executor: Executor, slot: int, weights: LoraWeights, /) -> None:
            install(executor, slot, weights)
            pairs = [weights.modules[path] for path in sorted(weights.modules)]
            self._of_slot[slot] = hash(tuple(float(pair.b.double().sum()) for pair in pairs))

        def spied(executor: Executor, steps: Sequence[SequenceStep], /) -> StepResult:
            for step in steps:
                self._look(step)
            return execute(executor, steps)

        monkeypatch.setattr(Executor, "install_adapter", install_adapter)
        monkeypatch.setattr(Executor, "execute", spied)

    @property
    def weights_seen(self) -> int:
        return len(self._seen)

    def _look(self, step: SequenceStep) -> None:
        weights = self._of_slot[step.adapter_slot]
        self._seen.add(weights)
        for offset, token in enumerate(step.token_ids):
            position = step.start + offset
            self._written[step.block_table[position // PAGE], position % PAGE] = (
                weights,
                position,
                token,
            )
        for position in range(step.start):
            page = step.block_table[position // PAGE]
            writer, where, _token = self._written[page, position % PAGE]
            self.reads += 1
            if (writer, where) != (weights, position):
                self.errors.append(f"page {page} was written by others and read at {position}")


# -- clients ---------------------------------------------------------------------------------------


@dataclass
class Client:
    """Asks one thing after another until it is told to stop.

    Attributes:
        model: what it asks for.
        prefix: what all its prompts begin with.
        params: of every second request; the others are greedy alone.
        found: the answers, each with the parameters that it was asked for with.
        straddled: answers that ended when another version was live than theirs.
    """

    number: int
    model: str
    prefix: list[int]
    params: SamplingParams
    found: list[tuple[SamplingParams, Response]] = field(default_factory=list)
    straddled: int = 0
    asked: int = 0

    async def run(self, rt: Runtime, stop: asyncio.Event, news: asyncio.Condition) -> None:
        while not stop.is_set():
            params = self.params if self.asked % 2 else greedy(12)
            tail = random_ids(1 + 5 * (self.asked % 4), seed=100 * self.number + self.asked)
            async with rt.complete([*self.prefix, *tail], params, model=self.model) as stream:
                self.asked += 1
                async with news:
                    news.notify_all()
                async for _ in stream:
                    pass
            live = learning_of(rt).publisher(self.model).live
            for response in stream.responses:
                self.found.append((params, response))
                self.straddled += response.adapter_version != live


async def serve_and_publish(
    rt: Runtime, clients: Sequence[Client], publications: Publications, rounds: int
) -> None:
    """Publish for both names, `rounds` times each, while all clients are being answered."""
    stop, news = asyncio.Event(), asyncio.Condition()
    unserved = 0
    async with asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(client.run(rt, stop, news))
        for turn in range(rounds):
            for name in (NAME, TENANT):
                asked = [client.asked for client in clients]

                def have_all_asked_since(asked: Sequence[int] = asked) -> bool:
                    pairs = zip(clients, asked, strict=True)
                    return all(client.asked > before for client, before in pairs)

                async with news:
                    await news.wait_for(have_all_asked_since)
                await publications.publish(name, seed=10 * turn + len(name))
                statistics = rt.statistics()
                unserved += not statistics.running + statistics.waiting
                rt._served.engine.check_integrity()
                check_pages_are_apart(rt)
        async with news:
            asked = [client.asked for client in clients]
            await news.wait_for(
                lambda: all(c.asked > n for c, n in zip(clients, asked, strict=True))
            )
        stop.set()
    # All six may just have got their last token and be about to ask again; not time after time.
    assert unserved < rounds


def check_pages_are_apart(rt: Runtime) -> None:
    """No page that a new sequence could be given belongs to two versions."""
    served = rt._served
    versions = [BASE, *(info.version for info in served.adapters.list())]
    pages = {version: served.cache.reachable_pages(version) for version in versions}
    for one, other in combinations(versions, 2):
        assert not pages[one] & pages[other], f"{one} and {other} share pages"


def stated(response: Response, model: str) -> str:
    """How to ask again for the version that answered."""
    return f"{model}@{response.adapter_version.version}"


async def test_every_answer_is_its_versions_while_versions_come_and_go(
    directory: Path, state_dir: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    witness = KvWitness(monkeypatch)
    long, short = random_ids(5 * PAGE, seed=1), random_ids(2 * PAGE, seed=2)
    siblings = SamplingParams(
        n=2, temperature=0.8, seed=7, max_tokens=10, logprobs=2, ignore_eos=True
    )
    clients = [
        Client(0, NAME, long, greedy(40)),
        Client(1, NAME, long, siblings),
        Client(2, NAME, short, greedy(24)),
        Client(3, NAME, [*long, *short], replace(siblings, seed=8)),
        Client(4, TENANT, long, greedy(32)),
        Client(5, TENANT, short, siblings),
    ]
    async with runtime(directory, state_dir) as rt:
        publications = Publications(rt, model)
        await serve_and_publish(rt, clients, publications, rounds=3)
        statistics = rt.statistics()
        assert statistics.failed_iterations == 0
        assert statistics.cache.hit_tokens > 0
        # Nobody's stream was cut short.
        answers = [(client, *pair) for client in clients for pair in client.found]
        for _client, params, response in answers:
            assert response.finish_reason == "length"
            assert len(response.token_ids) == params.max_tokens
        # Each said which version it is, all versions were asked, and some outlived their version.
        versions = {(client.model, r.adapter_version.version) for client, _, r in answers}
        assert versions == {(name, number) for name in (NAME, TENANT) for number in range(4)}
        assert sum(client.straddled for client in clients) > 0

        replays = await asyncio.gather(
            *(
                again(rt, response, params, stated(response, client.model))
                for client, params, response in answers
            )
        )
        for (_client, _params, response), replayed in zip(answers, replays, strict=True):
            assert replayed.adapter_version == response.adapter_version
        check_pages_are_apart(rt)
        rt._served.engine.check_integrity()
    assert witness.errors == []
    assert witness.reads > 10_000
    assert witness.weights_seen == 7

    oracles = {
        name: Oracle(with_peft_adapter(model, path), TOLERANCES[torch.float32])
        for name, path in publications.paths.items()
    }
    oracles["base"] = Oracle(model, TOLERANCES[torch.float32])
    judged: Counter[str] = Counter()
    tokens = compared = 0
    for (_client, params, response), replayed in zip(answers, replays, strict=True):
        name = str(response.adapter_version)
        # How many clients are answered at once is a matter of time, and with it the last digits.
        sure = oracles[name].check_choices(response, params)
        oracles[name].check_choices(replayed, params)
        assert replayed.token_ids[:sure] == response.token_ids[:sure]
        tokens += len(response.token_ids)
        compared += sure
        if params.temperature == 0.0:
            judged[name] += 1
            if judged[name] <= 3:  # `generate` takes its time
                assert params.max_tokens is not None
                oracles[name].check_greedy(response, params.max_tokens, ignore_eos=True)
    assert compared > 0.8 * tokens
    for name, oracle in oracles.items():
        assert judged[name], name
        oracle.check_decisive()


async def again(rt: Runtime, response: Response, params: SamplingParams, model: str) -> Response:
    """The same question to a version by its number."""
    async with rt.complete(response.prompt_token_ids, params, model=model) as stream:
        async for _ in stream:
            pass
    return stream.responses[response.index]


# -- one thing at a time ---------------------------------------------------------------------------


async def ask(
    rt: Runtime, prompt: Sequence[int], model: str | None = None, tokens: int = 16
) -> Response:
    return await rt.complete(prompt, greedy(tokens), model=model)


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
async def test_hot_prefixes_are_there_when_the_new_version_gets_its_first_request(
    directory: Path, state_dir: Path, model: Any, warm: bool
) -> None:
    prefix = random_ids(4 * PAGE, seed=1)
    once = random_ids(4 * PAGE, seed=2)
    async with runtime(directory, state_dir, warm=warm) as rt:
        publications = Publications(rt, model)
        await ask(rt, once)
        for turn in range(3):
            for tail in range(2):
                response = await ask(rt, [*prefix, *random_ids(9, seed=10 * turn + tail)])
                assert response.adapter_version.version == turn
                is_hot = warm and turn > 0
                expected = len(prefix) if is_hot or tail else 0
                assert response.usage.cached_tokens == expected
            await publications.publish(NAME, seed=turn)
        assert (await ask(rt, [*once, 7])).usage.cached_tokens == 0, "that was asked once"


async def test_a_rollback_is_one_call_and_holds_for_the_next_request(
    directory: Path, state_dir: Path, model: Any, spy: StepSpy
) -> None:
    prompt = random_ids(3 * PAGE, seed=1)
    async with runtime(directory, state_dir) as rt:
        publications = Publications(rt, model)
        wanted = {}
        for number in (1, 2):
            assert await publications.publish(NAME, seed=number) == number
            wanted[number] = (await ask(rt, prompt)).token_ids
        assert wanted[1] != wanted[2]
        async with rt.complete(prompt, greedy()) as running:
            await anext(running)
            spy.gate.clear()  # the device holds still until both are under way
            record = await rt.rollback(f"{NAME}@2")
            assert record is not None
            assert (record.number, record.is_live) == (1, True)
            async with rt.complete(prompt, greedy()) as following:
                spy.gate.set()
                async for _ in following:
                    pass
            async for _ in running:
                pass
        (before,), (after,) = running.responses, following.responses
        assert before.adapter_version == AdapterVersion(NAME, 2)
        assert before.token_ids == wanted[2]
        assert after.adapter_version == AdapterVersion(NAME, 1)
        assert after.token_ids == wanted[1]
        # What was live before had been kept, with its prefixes.
        assert after.usage.cached_tokens == len(prompt) - PAGE

        with pytest.raises(ConflictError, match="tiny@2 is not live, tiny@1 is"):
            await rt.rollback(f"{NAME}@2")
        assert await rt.rollback("1") is None
        assert (await ask(rt, prompt)).adapter_version == BASE
        # And forward again.
        record = await rt.promote("2")
        assert record is not None
        assert record.is_live
        assert (await ask(rt, prompt)).token_ids == wanted[2]


async def test_a_refused_version_goes_live_by_force_alone(
    directory: Path, state_dir: Path, model: Any
) -> None:
    prompt = random_ids(20, seed=1)
    async with runtime(directory, state_dir) as rt:
        publications = Publications(rt, model)
        number = await publications.write(NAME, seed=1, refused=True)
        with pytest.raises(ConflictError, match="not_better") as refusal:
            await rt.promote(f"{NAME}@{number}")
        assert refusal.value.code == "version_refused"
        assert (await ask(rt, prompt)).adapter_version == BASE
        pinned = await ask(rt, prompt, f"{NAME}@{number}")  # to look at it is allowed
        record = await rt.promote(f"{NAME}@{number}", force=True)
        assert record is not None
        assert (record.state, record.is_live) == ("refused", True)
        live = await ask(rt, prompt)
        assert live.adapter_version == pinned.adapter_version == AdapterVersion(NAME, number)
        assert live.token_ids == pinned.token_ids


async def test_an_old_version_comes_back_from_disk_with_its_tokens_and_a_working_cache(
    directory: Path, state_dir: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    witness = KvWitness(monkeypatch)
    prompt = random_ids(4 * PAGE + 3, seed=1)
    async with runtime(directory, state_dir) as rt:
        publications = Publications(rt, model)
        adapters = rt._served.adapters
        wanted = []
        for seed in range(4):
            await publications.publish(NAME, seed=seed)
            wanted.append(await ask(rt, prompt))
        old = AdapterVersion(NAME, 1)
        for _ in range(2):  # it leaves again, and comes back again
            assert old not in [info.version for info in adapters.list()]
            assert not rt._served.cache.reachable_pages(old)
            async with rt.complete(prompt, greedy(), model=str(old)) as first:
                await anext(first)
                second = await ask(rt, [*prompt, 7], str(old))
                async for _ in first:
                    pass
            (response,) = first.responses
            assert response.adapter_version == second.adapter_version == old
            assert response.token_ids == wanted[0].token_ids
            assert response.usage.cached_tokens == 0, "what it had was given up"
            assert second.usage.cached_tokens == 4 * PAGE
        assert (await ask(rt, prompt)).token_ids == wanted[-1].token_ids
        rt._served.engine.check_integrity()
        for missing in (f"{NAME}@5", f"{NAME}@{10**30}", f"{NAME}@", "nobody@1"):
            with pytest.raises(NotFoundError):
                await ask(rt, prompt, missing)
    assert witness.errors == []


async def test_tenants_are_served_and_published_each_for_itself(
    directory: Path, state_dir: Path, model: Any
) -> None:
    prompt = random_ids(3 * PAGE, seed=1)
    async with runtime(directory, state_dir) as rt:
        publications = Publications(rt, model)
        base = await ask(rt, prompt)
        assert base.adapter_version == (await ask(rt, prompt, TENANT)).adapter_version == BASE
        assert await publications.publish(TENANT, seed=1) == 1
        assert (await ask(rt, prompt)).token_ids == base.token_ids
        tutored = await ask(rt, prompt, TENANT)
        assert tutored.adapter_version == AdapterVersion(TENANT, 1)
        assert tutored.token_ids != base.token_ids
        assert await publications.publish(NAME, seed=2) == 1
        served = await ask(rt, prompt)
        assert served.adapter_version == AdapterVersion(NAME, 1)
        assert (await ask(rt, prompt, TENANT)).token_ids == tutored.token_ids
        assert {(a.adapter, a.live_version) for a in rt.learning().adapters} == {
            (NAME, 1),
            (TENANT, 1),
        }
        assert await rt.rollback(f"{TENANT}@1") is None
        assert (await ask(rt, prompt, TENANT)).token_ids == base.token_ids
        assert (await ask(rt, prompt)).token_ids == served.token_ids
        records = [(r.adapter, r.number, r.is_live) for r in await rt.adapters()]
        assert records == [(NAME, 1, True), (TENANT, 1, False)]


@pytest.mark.parametrize("stop", [None, StopLora(alpha=8.0, token_ids=(33, 171))])
async def test_what_training_writes_is_what_is_served_and_what_peft_reads(
    directory: Path, state_dir: Path, model: Any, stop: StopLora | None
) -> None:
    """The learner's own way: weights to a slot from memory, files for everybody else.

    What are taken for stop tokens here are two that the model often says.
    """
    prompt = random_ids(3 * PAGE, seed=1)
    tree = TrainingTree(
        model,
        rank=8,
        alpha=16.0,
        target_modules="all-linear",
        seed=5,
        safepoints=Safepoints(),
        stop=stop,
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in tree.named_lora().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    async with runtime(directory, state_dir) as rt:
        service = learning_of(rt)
        number = service.versions.next_number(NAME)
        path = service.versions.directory(NAME, number)
        candidate = rt._served.adapters.add(
            NAME, tree.weights(), path, number=number, make_live=False
        )
        service.versions.write(NAME, number, tree.save_adapter, manifest(), refused=False)
        publisher = service.publisher(NAME)
        assert await publisher.publish(candidate, "trained", changes=publisher.changes)
        rt._served.adapters.unpin(candidate)
        trained = await ask(rt, prompt)
    assert trained.adapter_version == candidate
    assert stop is None or set(stop.token_ids) & set(trained.token_ids)
    oracle = Oracle(with_peft_adapter(model, path), TOLERANCES[torch.float32])
    oracle.check_greedy(trained, 16, ignore_eos=True)
    oracle.check_decisive()
    assert trained.token_ids != tuple(Oracle(model, oracle.tolerance).generate(prompt, 16).tokens)
    async with runtime(directory, state_dir) as rt:  # a restart reads the files
        restarted = await ask(rt, prompt)
        assert restarted.adapter_version == candidate
        assert restarted.token_ids == trained.token_ids
