"""The command that measures, and the profiles that come with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cotune.tools
from cotune.policy.costs import Costs, IterationShape
from cotune.policy.profile import Profile
from cotune.runtime.scheduling.profiles import read
from cotune.tools.cli import main
from cotune.tools.profile_device import cost_rows
from tiny_models import save_model_directory

SHIPPED = sorted((Path(cotune.tools.__file__).parent / "device_profiles").glob("*.json"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cotune" / "profiles"


def test_it_measures_once_then_shows_what_it_kept(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model_directory(tmp_path / "tiny", "llama", seed=3)
    output = tmp_path / "mine.json"
    command = ["profile", str(model), "--threads", "1", "--output", str(output)]
    assert main([*command, "--note", "a tiny one"]) == 0
    first = capsys.readouterr().out
    (kept,) = cache.iterdir()
    assert f"kept in {kept}" in first
    assert "a tiny one" in first
    assert "an optimizer step" in first
    assert "with training beside it" in first
    profile = read(output)
    assert profile == read(kept)
    assert {quantum.kind for quantum in profile.quanta} == {"kl", "forward", "backward", "step"}
    assert profile.costs.interference >= 1.0

    assert main(command) == 0
    assert f"measured {profile.created}, kept in {kept}; --fresh measures again" in (
        capsys.readouterr().out
    )
    assert read(output) == profile

    assert main([*command, "--fresh", "--stop-alpha", "3"]) == 0
    assert len(read(kept).quanta) == len(profile.quanta)

    assert main([*command, "--fresh", "--no-learning"]) == 0
    assert f"kept in {kept} in the place of the one before" in capsys.readouterr().out
    assert read(kept).quanta == ()


def test_a_place_that_is_not_there_is_refused_before_anything_is_measured(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", "--output", str(tmp_path / "none" / "p.json")]) == 2
    assert "there is no directory" in capsys.readouterr().err
    assert not cache.exists()


def test_costs_are_shown_in_units_that_suit_them() -> None:
    costs = Costs(
        base_s=1.5,
        per_decode_s=5e-5,
        per_context_s=2e-8,
        per_token_s=4e-5,
        per_attention_s=0.0,
        margin=1.25,
        per_row_s=(1e-5, 2e-5, 3e-5),
    )
    rows = dict(cost_rows(costs))
    assert rows["an iteration, at least"] == "1.5 s"
    assert rows["+ each decode"] == "50 us"
    assert rows["+ 1,000 KV entries that decodes read"] == "20 us"
    assert rows["+ 100 prompt tokens"] == "4 ms"
    assert rows["+ 1,000 of their KV entries"] == "0"
    assert rows["holds in 95 of 100 times"] == "1.25x"
    assert rows["+ 100 rows backward"] == "3 ms"


def test_a_measured_and_an_estimated_profile_are_shipped() -> None:
    assert {path.stem for path in SHIPPED} >= {"demo", "agx-orin"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_profile_can_be_read_and_says_what_it_is(path: Path) -> None:
    profile: Profile = read(path)
    assert Profile.from_dict(json.loads(path.read_text())) == profile
    assert profile.note
    assert profile.is_estimated == (path.stem == "agx-orin")
    assert bool(profile.points) is not profile.is_estimated
    assert profile.is_estimated == ("ESTIMATED" in profile.note)
    costs = profile.costs
    assert min(costs.per_row_s) > 0.0
    assert costs.step_s > 0.0
    assert costs.interference > 1.0
    assert profile.memory.training_row_bytes > 0.0
    decodes_s = costs.iteration_s(IterationShape(8, 2048))
    prompt_s = costs.iteration_s(IterationShape().with_chunk(512, 0))
    assert decodes_s < prompt_s < 60.0
