"""Learning as `Runtime` sees it, on a tiny model: state, answers that are recorded, versions."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cotune import Runtime, SamplingParams
from cotune.runtime.errors import (
    ConfigError,
    LearningOffError,
    NotFoundError,
    RequestError,
    StorageError,
)
from cotune.runtime.learning.config import FeedbackConfig, GateConfig, LearningConfig
from cotune.runtime.learning.store import FeedbackStore
from publications import Publications
from tiny_models import save_model_directory, tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from cotune.runtime.learning.service import LearningService

NAME = "tiny"
PARAMS = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_directory(tmp_path_factory.mktemp("model") / "model", "llama", seed=3)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", seed=3)


@pytest.fixture
def config(tmp_path: Path) -> LearningConfig:
    return LearningConfig(
        enabled=True, state_dir=tmp_path / "state", adapters=("tutor",), train=False
    )


def runtime(directory: Path, config: LearningConfig, **settings: Any) -> Runtime:
    settings = {"num_pages": 64, "served_name": NAME, "inference_threads": 1, **settings}
    return Runtime(directory, "cpu", learning=config, **settings)


def service_of(rt: Runtime) -> LearningService:
    service = rt._served.learning
    assert service is not None
    return service


def rating(response_id: str, event_id: str = "e1") -> dict[str, object]:
    return {"id": event_id, "type": "rating", "response_id": response_id, "rating": 1}


# -- state -----------------------------------------------------------------------------------------


async def test_a_state_directory_belongs_to_one_runtime_at_a_time(
    directory: Path, config: LearningConfig
) -> None:
    async with runtime(directory, config) as rt:
        assert rt.describe()["state_dir"] == str(config.state_dir)
        with pytest.raises(ConfigError, match="used by another process") as error:
            await runtime(directory, config).__aenter__()
        assert error.value.param == "learning.state_dir"
        # The first one is none the worse for it, and another directory is free.
        assert (await rt.complete([5, 6], PARAMS)).finish_reason == "length"
        assert config.state_dir is not None
        elsewhere = replace(config, state_dir=config.state_dir.with_name("other"))
        async with runtime(directory, elsewhere):
            pass
    async with runtime(directory, config):  # it was given back
        pass


async def test_a_runtime_that_cannot_start_gives_the_directory_back(
    directory: Path, config: LearningConfig, tmp_path: Path
) -> None:
    broken = replace(config, gate=GateConfig(probe_file=tmp_path / "missing"))
    with pytest.raises(ConfigError, match=r"gate\.probe_file"):
        await runtime(directory, broken).__aenter__()
    short = tmp_path / "short.txt"
    short.write_text("a")
    with pytest.raises(ConfigError, match="no paragraph is longer than one token"):
        await runtime(directory, replace(config, gate=GateConfig(probe_file=short))).__aenter__()
    async with runtime(directory, config):
        pass


async def test_what_was_learned_with_another_base_model_is_refused(
    directory: Path, config: LearningConfig, tmp_path: Path
) -> None:
    async with runtime(directory, config):
        pass
    # A copy is the same model; one of other weights is not, though all its shapes are the same.
    same = shutil.copytree(directory, tmp_path / "copy")
    async with runtime(same, config):
        pass
    other = save_model_directory(tmp_path / "other", "llama", seed=4)
    with pytest.raises(ConfigError, match=r"with the base model 'model'.* not with this 'other'"):
        await runtime(other, config).__aenter__()


@pytest.mark.parametrize(
    ("adapters", "message"),
    [(("x@1",), "'x@1' cannot learn"), ((NAME,), "learns without being named")],
)
async def test_names_that_cannot_learn_are_refused_at_start(
    directory: Path, config: LearningConfig, adapters: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        await runtime(directory, replace(config, adapters=adapters)).__aenter__()
    assert error.value.param == "learning.adapters"


async def test_a_directorys_name_that_cannot_learn_is_refused_at_start(
    directory: Path, config: LearningConfig, tmp_path: Path
) -> None:
    named = shutil.copytree(directory, tmp_path / "a@b")
    with pytest.raises(ConfigError, match="'a@b' cannot learn") as error:
        await runtime(named, config, served_name=None).__aenter__()
    assert error.value.param == "model.served_name"


async def test_a_disk_that_fails_retention_does_not_stop_the_runtime(
    directory: Path,
    config: LearningConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tried = asyncio.Event()

    async def expire(_store: FeedbackStore, _now: object = None) -> int:
        tried.set()
        raise StorageError("the disk is full")

    monkeypatch.setattr(FeedbackStore, "expire", expire)
    async with runtime(directory, config) as rt:
        await tried.wait()
        assert (await rt.complete([5, 6], PARAMS)).finish_reason == "length"
    assert "what is past its retention is still there: the disk is full" in caplog.text


# -- answers ---------------------------------------------------------------------------------------


async def test_an_answer_can_be_rated_by_its_id_and_counts_for_the_adapter_that_gave_it(
    directory: Path, config: LearningConfig, model: Any
) -> None:
    async with runtime(directory, config) as rt:
        await Publications(rt, model).publish("tutor", seed=1)
        for number, name in enumerate((None, "tutor", "tutor@1", "tutor@0")):
            response = await rt.complete([5, 6, 7], PARAMS, model=name)
            ack = await rt.feedback(rating(response.id, f"e{number}"))
            assert (ack.id, ack.duplicate) == (f"e{number}", False)
            assert (await rt.feedback(rating(response.id, f"e{number}"))).duplicate
            assert response.model == (name or NAME)
        rows = [row async for row in rt.export_feedback("tutor")]
        assert [row["id"] for row in rows] == ["e1", "e2", "e3"]
        status = rt.learning()
        assert status.events == {"rating": 4}
        assert status.recorded_responses == 4
        assert status.duplicates == 4


async def test_each_of_several_answers_has_an_id_of_its_own(
    directory: Path, config: LearningConfig
) -> None:
    async with runtime(directory, config) as rt:
        params = replace(PARAMS, n=2, temperature=1.0, seed=3)
        async with rt.complete([5, 6, 7], params) as stream:
            async for _ in stream:
                pass
        first, second = stream.responses
        assert first.token_ids != second.token_ids
        event = {
            "id": "e1",
            "type": "preference",
            "chosen_id": second.id,
            "rejected_id": first.id,
        }
        assert not (await rt.feedback(event)).duplicate


async def test_what_is_not_to_be_recorded_is_not_known(
    directory: Path, config: LearningConfig
) -> None:
    async with runtime(directory, config) as rt:
        response = await rt.complete([5, 6, 7], PARAMS, record=False)
        with pytest.raises(NotFoundError) as error:
            await rt.feedback(rating(response.id))
        assert error.value.code == "response_not_found"
        assert rt.learning().refused_events == {"response_not_found": 1}
    quiet = replace(config, feedback=FeedbackConfig(record_responses=False))
    async with runtime(directory, quiet) as rt:
        response = await rt.complete([5, 6, 7], PARAMS, record=True)
        with pytest.raises(NotFoundError):
            await rt.feedback(rating(response.id))
        assert rt.learning().recorded_responses == 0


async def test_a_person_is_forgotten_with_what_was_answered(
    directory: Path, config: LearningConfig
) -> None:
    async with runtime(directory, config) as rt:
        response = await rt.complete([5, 6, 7], PARAMS, source="ann")
        other = await rt.complete([5, 6, 7], PARAMS, source="bob")
        await rt.feedback(rating(response.id), source="ann")
        assert await rt.forget("ann") == 1
        with pytest.raises(NotFoundError):
            await rt.feedback(rating(response.id, "e2"), source="ann")
        assert not (await rt.feedback(rating(other.id), source="bob")).duplicate


async def test_a_runtime_that_does_not_learn_says_so(directory: Path) -> None:
    async with Runtime(directory, "cpu", num_pages=64, inference_threads=1) as rt:
        assert not rt.learning().enabled
        for call in (rt.feedback(rating("x")), rt.adapters(), rt.promote("1"), rt.rollback("1")):
            with pytest.raises(LearningOffError, match="start it with learning=True"):
                await call


# -- versions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "version", ["", "x", "tiny@", "tiny@x", "tiny@-1", "-1", "1.0", "٣", "tiny@" + "9" * 5000]
)
async def test_what_names_no_version_is_refused(
    directory: Path, config: LearningConfig, version: str
) -> None:
    async with runtime(directory, config) as rt:
        for call in (rt.promote(version), rt.rollback(version)):
            with pytest.raises(RequestError) as error:
                await call
            assert error.value.code == "invalid_version"


async def test_unknown_versions_and_adapters_are_not_found(
    directory: Path, config: LearningConfig
) -> None:
    async with runtime(directory, config) as rt:
        for call in (rt.promote("7"), rt.promote("tutor@7", force=True), rt.rollback("tiny@7")):
            with pytest.raises(NotFoundError, match="no version 7; versions: none yet") as error:
                await call
            assert error.value.param == "version"
        for call in (rt.promote("nobody@1"), rt.rollback("nobody@1")):
            with pytest.raises(NotFoundError, match="'nobody' does not learn; these do: tiny"):
                await call
        with pytest.raises(NotFoundError):
            rt.export_feedback("nobody")
        for name in ("tiny@7", "tutor@" + "9" * 40, "nobody@1"):
            with pytest.raises(NotFoundError):
                await rt.complete([5, 6], PARAMS, model=name)


async def test_scores_are_those_of_the_version_that_is_named(
    directory: Path, config: LearningConfig, model: Any
) -> None:
    prompt, completion = [5, 6, 7, 8], [9, 10, 11]
    async with runtime(directory, config) as rt:
        publications = Publications(rt, model)
        base = await rt.score(prompt, completion)
        for seed in range(3):
            await publications.publish(NAME, seed=seed)
        scores = [await rt.score(prompt, completion, model=f"{NAME}@{n}") for n in range(4)]
        assert scores[0] == base
        assert scores[3] == await rt.score(prompt, completion)
        assert len({round(sum(found), 3) for found in scores}) == 4
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
    expected = [float(logits[3 + i, token]) for i, token in enumerate(completion)]
    assert base == pytest.approx(expected, abs=1e-4)


async def test_a_restart_serves_what_was_live(
    directory: Path, config: LearningConfig, model: Any
) -> None:
    async with runtime(directory, config) as rt:
        publications = Publications(rt, model)
        await publications.publish(NAME, seed=1)
        await publications.publish("tutor", seed=2)
        await publications.publish("tutor", seed=3)
        before = [await rt.complete([5, 6, 7], PARAMS, model=n) for n in (NAME, "tutor")]
    async with runtime(directory, config) as rt:
        after = [await rt.complete([5, 6, 7], PARAMS, model=n) for n in (NAME, "tutor")]
        assert [str(r.adapter_version) for r in after] == ["tiny@1", "tutor@2"]
        assert [r.token_ids for r in after] == [r.token_ids for r in before]
        by_name = {a.adapter: a.live_version for a in rt.learning().adapters}
        assert by_name == {NAME: 1, "tutor": 2}
        record = await rt.rollback("tutor@2")  # the way back survives as well
        assert record is not None
        assert record.number == 1
