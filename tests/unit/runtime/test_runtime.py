"""The embedded API, on a tiny model and on the demo model."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from cotune import (
    BASE,
    AdapterLoadError,
    AdapterVersion,
    ConfigError,
    ContextLengthError,
    DrainingError,
    ModelLoadError,
    NotFoundError,
    RequestError,
    Runtime,
    RuntimeConfig,
    SamplingParams,
)
from cotune.runtime.config import ModelConfig, ScheduleConfig
from cotune.runtime.runtime import LARGE_TEXT_CHARS
from engine_fakes import Recorder, settle
from tiny_models import save_lora, save_model_directory, tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cotune.runtime.tokenization import TextCodec

MESSAGES: list[Any] = [{"role": "user", "content": "Hello"}]
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=400, ignore_eos=True)

EMBEDDED = """
from cotune import Runtime, SamplingParams

async with Runtime(model=None, device="auto") as rt:          # None: the demo model
    async with rt.chat([{"role": "user", "content": "Hello"}], SamplingParams(max_tokens=32)) as stream:
        async for delta in stream:
            print(delta.text, end="")
    r = stream.response      # id, text, token_ids, finish_reason, usage, adapter_version, timings (queue, ttft, tbt list)
    r2 = await rt.complete("Once upon a time", SamplingParams(max_tokens=16, temperature=0))
"""  # noqa: E501 - as the README has it


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_directory(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("loras")
    return [save_lora(folder / f"l{seed}", tiny_model("llama"), seed=seed) for seed in (1, 2)]


def runtime(model: Path, **settings: Any) -> Runtime:
    return Runtime(
        model,
        "cpu",
        **{"inference_threads": 1, "kv_bytes": 1 << 23, "stop_grace_s": 30.0, **settings},
    )


def lanes() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "cotune-lane" in thread.name]


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_the_snippet_of_the_readme_works_as_it_stands(
    run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    body = "".join(f"    {line}\n" for line in EMBEDDED.splitlines())
    names: dict[str, Any] = {}
    exec(f"async def main():\n{body}    return r, r2", names)
    r, r2 = run(names["main"]())
    assert capsys.readouterr().out == r.text
    assert r.text
    assert r.id.startswith("chatcmpl-")
    assert r2.id.startswith("cmpl-")
    assert 0 < len(r2.token_ids) <= 16
    assert r.adapter_version == BASE
    assert r.timings.ttft_s > r.timings.queue_s >= 0.0
    assert len(r.timings.tbt_s) == r.usage.completion_tokens - 1
    assert lanes() == []


async def test_several_runtimes_live_in_one_process(model: Path) -> None:
    async with runtime(model) as one, runtime(model, served_name="two") as two:
        answers = await asyncio.gather(
            *(rt.chat(MESSAGES, GREEDY) for rt in (one, two) for _ in range(4))
        )
        assert len({answer.token_ids for answer in answers}) == 1
        assert [answer.model for answer in answers] == ["tiny"] * 4 + ["two"] * 4
        assert len(lanes()) == 2
    assert lanes() == []


async def test_token_ids_are_a_prompt_as_well(model: Path) -> None:
    async with runtime(model) as rt:
        ids = rt.codec.encode("Once upon a time")
        by_text = await rt.complete("Once upon a time", GREEDY)
        by_ids = await rt.complete(ids, GREEDY)
    assert by_text.token_ids == by_ids.token_ids
    assert by_text.prompt_token_ids == tuple(ids)


@pytest.mark.parametrize(
    ("call", "error", "param"),
    [
        ({"prompt": ""}, RequestError, "prompt"),
        ({"prompt": []}, RequestError, "prompt"),
        ({"prompt": [1, -1]}, RequestError, "prompt.1"),
        ({"prompt": [10**9]}, RequestError, "prompt.0"),
        ({"prompt": [True]}, RequestError, "prompt.0"),
        ({"prompt": [1.5]}, RequestError, "prompt.0"),
        ({"prompt": b"bytes"}, RequestError, "prompt"),
        ({"prompt": 7}, RequestError, "prompt"),
        ({"prompt": [5] * 10_000}, ContextLengthError, "prompt"),
        ({"params": SamplingParams(max_tokens=10**6)}, ContextLengthError, "max_tokens"),
        ({"params": SamplingParams(temperature=-1.0)}, RequestError, "temperature"),
        ({"params": SamplingParams(logit_bias={10**6: 1.0})}, RequestError, "logit_bias.1000000"),
        ({"model": "nobody"}, NotFoundError, "model"),
        ({"model": "tiny@2"}, NotFoundError, "model"),
        ({"priority": 1.5}, RequestError, "priority"),
        ({"priority": 2**40}, RequestError, "priority"),
        ({"request_id": ""}, RequestError, "request_id"),
        ({"request_id": "x" * 1000}, RequestError, "request_id"),
    ],
)
async def test_a_wrong_request_is_refused_on_entering(
    shared: Runtime, call: dict[str, Any], error: type[RequestError], param: str
) -> None:
    recorder = Recorder()
    shared.add_listener(recorder)
    stream = shared.complete(**{"prompt": "Hi", **call})
    with pytest.raises(error) as caught:
        async with stream:
            raise AssertionError("it was admitted")
    shared.remove_listener(recorder)
    assert caught.value.param == param
    assert len(recorder.rejected) == 1
    assert shared.statistics().running == 0


@pytest.fixture
async def shared(model: Path) -> Any:
    async with runtime(model) as rt:
        yield rt


async def test_an_unknown_model_is_refused_with_the_known_ones(shared: Runtime) -> None:
    with pytest.raises(NotFoundError, match=r"'nobody'.*tiny") as caught:
        await shared.chat(MESSAGES, model="nobody")
    assert caught.value.code == "model_not_found"


async def test_a_malformed_message_is_refused_by_its_path(shared: Runtime) -> None:
    for messages in ([{"role": "nobody", "content": "x"}], 7, [7], [{"role": "user"}]):
        with pytest.raises(RequestError) as caught:
            await shared.chat(messages)  # type: ignore[arg-type]
        assert str(caught.value.param).startswith("messages")


async def test_a_large_text_is_tokenized_off_the_loop(
    shared: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    codec: TextCodec = shared.codec
    encode = codec.encode

    def spy(text: str, **options: Any) -> list[int]:
        threads.append(threading.get_ident())
        return encode(text, **options)[:5]

    monkeypatch.setattr(codec, "encode", spy)
    here = threading.get_ident()
    await shared.complete("x" * LARGE_TEXT_CHARS, GREEDY)
    await shared.complete("x" * (LARGE_TEXT_CHARS + 1), GREEDY)
    long: Any = [{"role": "user", "content": [{"type": "text", "text": "x" * 20_000}]}]
    await shared.chat(long, GREEDY)
    assert [thread == here for thread in threads] == [True, False, False]


async def test_the_models_defaults_fill_what_the_caller_leaves_open(tmp_path: Path) -> None:
    path = save_model_directory(tmp_path / "m", generation_config={"temperature": 0.0, "top_k": 1})
    async with runtime(path) as rt:
        answers = [await rt.chat(MESSAGES, SamplingParams(max_tokens=5)) for _ in range(3)]
        greedy = await rt.chat(MESSAGES, SamplingParams(max_tokens=5, temperature=0.0))
    assert {answer.token_ids for answer in answers} == {greedy.token_ids}


async def test_a_seeded_runtime_repeats_itself(model: Path) -> None:
    answers = []
    for seed in (7, 7, 8):
        async with runtime(model, seed=seed) as rt:
            params = SamplingParams(max_tokens=8, temperature=2.0, ignore_eos=True)
            answers.append([(await rt.chat(MESSAGES, params)).token_ids for _ in range(2)])
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]
    assert answers[0][0] != answers[0][1]


# -- adapters ------------------------------------------------------------------------------------


async def test_an_adapter_is_a_model_with_a_parent(model: Path, loras: list[Path]) -> None:
    async with runtime(model, adapters={"tutor": loras[0]}) as rt:
        base, tutor = rt.model_names()
        assert (base.id, base.parent, base.root) == ("tiny", None, str(model))
        assert (tutor.id, tutor.parent, tutor.root) == ("tutor", "tiny", str(loras[0]))
        plain = await rt.chat(MESSAGES, GREEDY)
        taught = await rt.chat(MESSAGES, GREEDY, model="tutor")
    assert taught.adapter_version == AdapterVersion("tutor", 1)
    assert taught.model == "tutor"
    assert taught.usage.cached_tokens == 0
    assert plain.token_ids != taught.token_ids


async def test_new_versions_go_live_for_new_requests_only(model: Path, loras: list[Path]) -> None:
    async with runtime(model) as rt:
        one = await rt.load_adapter("tutor", loras[0])
        async with rt.chat(MESSAGES, ENDLESS, model="tutor") as running:
            await anext(running)
            two = await rt.load_adapter("tutor", loras[1])
            assert (one.version, two.version) == (1, 2)
            new = await rt.chat(MESSAGES, GREEDY, model="tutor")
            assert new.adapter_version == two
            pinned = await rt.chat(MESSAGES, GREEDY, model="tutor@1")
            assert pinned.adapter_version == running.adapter_version == one
        await rt.unload_adapter("tutor")
        with pytest.raises(NotFoundError):
            await rt.chat(MESSAGES, model="tutor")
        with pytest.raises(NotFoundError):
            await rt.unload_adapter("tutor")
        assert [info.id for info in rt.model_names()] == ["tiny"]
    assert new.token_ids != pinned.token_ids


async def test_a_wrong_adapter_is_refused_and_the_runtime_goes_on(
    shared: Runtime, tmp_path: Path, loras: list[Path]
) -> None:
    with pytest.raises(AdapterLoadError):
        await shared.load_adapter("tutor", tmp_path)
    with pytest.raises(AdapterLoadError, match="base model"):
        await shared.load_adapter("tiny", loras[0])
    assert (await shared.chat(MESSAGES, GREEDY)).token_ids


# -- starting and stopping -----------------------------------------------------------------------


async def test_what_cannot_be_started_leaves_nothing(model: Path, tmp_path: Path) -> None:
    wrong: list[tuple[Runtime, type[ConfigError]]] = [
        (Runtime(tmp_path / "absent", "cpu"), ModelLoadError),
        (Runtime(model, "cuda:77"), ConfigError),
        (Runtime(model, "cpu", dtype="int8"), ConfigError),
        (runtime(model, adapters={"a": tmp_path}), AdapterLoadError),
        (runtime(model, num_pages=1), ConfigError),
    ]
    for rt, error in wrong:
        with pytest.raises(error):
            async with rt:
                raise AssertionError("it started")
        assert not rt.is_ready
    assert lanes() == []


async def test_cancelling_the_start_leaves_nothing(model: Path) -> None:
    async def start() -> None:
        async with runtime(model):
            raise AssertionError("it started")

    async with asyncio.TaskGroup() as group:
        starting = group.create_task(start())
        await settle()
        starting.cancel()
    assert starting.cancelled()
    assert lanes() == []


async def test_an_error_in_the_block_comes_out_as_it_is(model: Path) -> None:
    async def block() -> None:
        async with runtime(model) as rt, rt.chat(MESSAGES, ENDLESS) as stream:
            await anext(stream)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await block()
    assert lanes() == []


async def test_leaving_lets_running_requests_finish(model: Path) -> None:
    async with asyncio.TaskGroup() as group:
        async with runtime(model) as rt:
            running = group.create_task(_answer(rt, GREEDY))
            await settle()
        assert not rt.is_ready
    assert len(running.result().token_ids) == 6


async def test_leaving_cuts_off_what_takes_too_long(model: Path) -> None:
    async with asyncio.TaskGroup() as group, runtime(model, stop_grace_s=0.0) as rt:
        running = group.create_task(_refused(rt, ENDLESS))
        while not rt.statistics().running:
            await settle()
    assert running.result().code == "draining"
    assert lanes() == []


async def test_after_draining_nothing_is_taken_any_more(model: Path) -> None:
    async with runtime(model) as rt:
        assert rt.is_ready
        await rt.drain(10.0)
        assert not rt.is_ready
        with pytest.raises(DrainingError):
            await rt.chat(MESSAGES)


async def _answer(rt: Runtime, params: SamplingParams) -> Any:
    return await rt.chat(MESSAGES, params)


async def _refused(rt: Runtime, params: SamplingParams) -> DrainingError:
    with pytest.raises(DrainingError) as caught:
        await rt.chat(MESSAGES, params)
    return caught.value


async def test_an_engine_that_breaks_ends_the_block_with_its_error(model: Path) -> None:
    class Broken:
        def plan(self, observation: object) -> Any:
            raise LookupError("planning")

    async def block() -> None:
        async with runtime(model) as rt:
            rt._served.scheduler._policy = Broken()
            await rt.chat(MESSAGES)

    with pytest.raises(ExceptionGroup) as caught:
        await block()
    assert caught.group_contains(LookupError)
    assert lanes() == []


async def test_a_runtime_is_used_inside_its_block_and_once(model: Path) -> None:
    rt = runtime(model)
    with pytest.raises(RuntimeError, match="async with"):
        await rt.chat(MESSAGES)
    async with rt:
        pass
    with pytest.raises(RuntimeError, match="once"):
        async with rt:
            pass
    with pytest.raises(RuntimeError, match="async with"):
        rt.statistics()


def test_what_is_given_beside_a_config_takes_its_place() -> None:
    config = RuntimeConfig(
        model=ModelConfig(source="a", device="cuda"), schedule=ScheduleConfig(max_num_seqs=3)
    )
    rt = Runtime("b", config=config, dtype="float32")
    assert rt.config.model == ModelConfig(source="b", device="cuda", dtype="float32")
    assert rt.config.schedule.max_num_seqs == 3
    with pytest.raises(ConfigError, match="nonsense"):
        Runtime(nonsense=1)  # type: ignore[call-arg]


async def test_a_description_names_what_was_chosen(shared: Runtime, model: Path) -> None:
    described = shared.describe()
    assert described["model"] == "tiny"
    assert described["path"] == str(model)
    assert described["device"] == "cpu"
    assert described["policy"] == "cotune"
    assert described["max_num_batched_tokens"] == 512
    assert {"attention", "page_size", "num_pages", "max_model_len"} <= set(described)
