"""The cache of profiles: kept, found again, and never trusted blindly."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cotune.policy.costs import Costs, IterationShape
from cotune.policy.profile import IterationPoint, Profile, ProfileError, ProfileKey
from cotune.runtime.config import CacheConfig
from cotune.runtime.errors import ConfigError, StorageError
from cotune.runtime.executor import Executor
from cotune.runtime.loading import LoadedModel, load_model
from cotune.runtime.scheduling import profiles
from cotune.runtime.scheduling.profiles import load_or_measure
from cotune.streams.lane import Lane
from tiny_models import save_model_directory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CPU = torch.device("cpu")
KEY = ProfileKey(
    model="m", fingerprint="f", device="d", dtype="float32", threads=1, versions=(("torch", "2"),)
)
PROFILE = Profile(
    key=KEY,
    costs=Costs(2e-3, 1e-4, 0.0, 1e-5, 0.0),
    points=(IterationPoint(shape=IterationShape(1, 10), seconds=0.002),),
    created="2026-01-01T00:00:00+00:00",
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cotune" / "profiles"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory = save_model_directory(tmp_path_factory.mktemp("model") / "m", "llama", seed=3)
    return load_model(directory, device=CPU)


@pytest.fixture(scope="module")
def executor(loaded: LoadedModel) -> Executor:
    return Executor.create(
        loaded, device=CPU, cache=CacheConfig(num_pages=64), max_num_batched_tokens=64
    )


@pytest.fixture
def lane() -> Iterator[Lane]:
    with Lane("inference", device=CPU, threads=1) as lane:
        yield lane


def test_what_is_saved_is_found_under_its_key_alone(cache: Path) -> None:
    assert profiles.load(KEY) is None
    assert profiles.save(PROFILE) == cache / KEY.file_name
    assert profiles.load(KEY) == PROFILE
    assert profiles.load(replace(KEY, dtype="bfloat16")) is None
    assert [path.name for path in cache.iterdir()] == [KEY.file_name]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not JSON"),
        (b'{"format": 1', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b" " * ((1 << 22) + 1), "is larger than"),
        (b"{}", "format is None"),
        (json.dumps(PROFILE.to_dict()).replace("0.002", "1" + "0" * 400), "beyond all numbers"),
        (b'{"format": 1' + b"0" * 5000 + b"}", "is not JSON"),
        (json.dumps(replace(PROFILE, key=replace(KEY, device="other")).to_dict()), "key.device is"),
    ],
)
def test_a_damaged_or_foreign_file_is_set_aside_and_said_once(
    content: bytes | str, reason: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.mkdir(parents=True)
    path = cache / KEY.file_name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert profiles.load(KEY) is None
    assert profiles.load(KEY) is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert reason in caplog.text
    assert "measure again with `cotune profile`" in caplog.text
    assert not path.exists()
    assert path.with_name(path.name + ".refused").exists()
    assert profiles.save(PROFILE) == path
    assert profiles.load(KEY) == PROFILE


def test_a_cache_that_cannot_be_written_is_done_without(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise StorageError(f"cannot write {path}: disk full")

    monkeypatch.setattr(profiles, "write_file", refuse)
    assert profiles.save(PROFILE) is None
    assert "disk full" in caplog.text
    assert "set XDG_CACHE_HOME" in caplog.text


def test_a_cache_whose_place_is_a_file_is_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("in the way")
    assert profiles.load(KEY) is None
    assert profiles.save(PROFILE) is None
    assert "set XDG_CACHE_HOME" in caplog.text


def test_the_key_knows_the_model_the_device_and_what_computes(loaded: LoadedModel) -> None:
    key = profiles.key_of(loaded, device=CPU, dtype=loaded.dtype, threads=2)
    assert (key.model, key.dtype, key.threads) == ("m", "float32", 2)
    assert key.fingerprint
    assert key.device
    assert dict(key.versions)["torch"] == torch.__version__
    assert key == profiles.key_of(loaded, device=CPU, dtype=loaded.dtype, threads=2)
    assert key.differences(
        profiles.key_of(loaded, device=CPU, dtype=torch.bfloat16, threads=1)
    ) == ("dtype", "threads")


async def test_the_first_start_measures_and_the_second_reads(
    loaded: LoadedModel, executor: Executor, lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await load_or_measure(loaded, executor, lane, device=CPU, threads=1)
    assert first.points

    async def never(*args: Any, **kwargs: Any) -> Profile:
        raise AssertionError("it was measured a second time")

    monkeypatch.setattr(profiles, "measure", never)
    assert await load_or_measure(loaded, executor, lane, device=CPU, threads=1) == first


@pytest.mark.parametrize("is_kept_already", [False, True])
async def test_a_profile_that_knows_nothing_of_prefill_is_not_kept(
    is_kept_already: bool,
    loaded: LoadedModel,
    executor: Executor,
    lane: Lane,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    key = profiles.key_of(loaded, device=CPU, dtype=loaded.dtype, threads=1)
    decodes_only = replace(PROFILE, key=key)
    if is_kept_already:
        assert profiles.save(decodes_only) is not None

    async def measure(*args: Any, **kwargs: Any) -> Profile:
        return decodes_only

    with monkeypatch.context() as patched:
        patched.setattr(profiles, "measure", measure)
        found = await load_or_measure(loaded, executor, lane, device=CPU, threads=1)
    assert found == decodes_only
    assert "the profile is not kept" in caplog.text
    assert profiles.path_of(key).exists() is is_kept_already
    measured = await load_or_measure(loaded, executor, lane, device=CPU, threads=1)
    assert measured.knows_prefill
    assert profiles.load(key) == measured


async def test_a_file_that_is_named_is_used_in_the_place_of_the_cache(
    loaded: LoadedModel, executor: Executor, lane: Lane, tmp_path: Path
) -> None:
    kept = await load_or_measure(loaded, executor, lane, device=CPU, threads=1)
    named = replace(kept, costs=kept.costs._replace(base_s=1.0))
    file = tmp_path / "mine.json"
    profiles.write(named, file)
    found = await load_or_measure(loaded, executor, lane, device=CPU, threads=1, mode=str(file))
    assert found == named


async def test_a_file_of_other_threads_is_used_with_a_word(
    loaded: LoadedModel,
    executor: Executor,
    lane: Lane,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kept = await load_or_measure(loaded, executor, lane, device=CPU, threads=1)
    file = tmp_path / "mine.json"
    profiles.write(kept, file)
    found = await load_or_measure(loaded, executor, lane, device=CPU, threads=2, mode=str(file))
    assert found == kept
    assert "was measured with other threads" in caplog.text


async def test_a_file_that_cannot_be_used_is_refused_by_name(
    loaded: LoadedModel, executor: Executor, lane: Lane, tmp_path: Path
) -> None:
    async def refused(path: Path, message: str) -> None:
        with pytest.raises(ConfigError, match=message) as caught:
            await load_or_measure(loaded, executor, lane, device=CPU, threads=1, mode=str(path))
        assert caught.value.param == "schedule.profile"
        assert str(path) in caught.value.message

    await refused(tmp_path / "none.json", "is not there; `cotune profile --output` makes one")
    await refused(tmp_path, "cannot be used")
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{}")
    await refused(damaged, "format is None")
    foreign = tmp_path / "foreign.json"
    profiles.write(PROFILE, foreign)
    await refused(foreign, r"is of another fingerprint \('f', and this one is")


def test_reading_says_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text("{")
    with pytest.raises(ProfileError, match="profile is not JSON"):
        profiles.read(file)
