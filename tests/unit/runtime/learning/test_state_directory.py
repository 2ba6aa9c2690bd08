"""Where state is, whose it is, and that nobody else writes there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cotune.runtime.errors import ConfigError, StorageError
from cotune.runtime.learning.state_directory import BASE_FILE, StateDirectory, file_name


def test_paths_are_below_the_directory(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    assert state.feedback == tmp_path / "feedback.sqlite"
    assert state.adapters == tmp_path / "adapters"
    assert state.training("tutor") == tmp_path / "training" / "tutor"


def test_a_tilde_is_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert StateDirectory(Path("~/state")).path == tmp_path / "state"


def test_by_default_state_is_below_the_xdg_state_home_or_the_home_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    expected = tmp_path / "xdg" / "cotune" / "org%2Fmodel"
    assert StateDirectory.default("org/model").path == expected
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert StateDirectory.default("m").path == tmp_path / ".local" / "state" / "cotune" / "m"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tutor", "tutor"),
        ("a.b-c_D7", "a.b-c_D7"),
        ("a/b", "a%2Fb"),
        ("..", "%2E%2E"),
        ("a b%", "a%20b%25"),
        ("ü", "%C3%BC"),
    ],
)
def test_any_name_is_a_file_name(name: str, expected: str) -> None:
    assert file_name(name) == expected


def test_no_name_leads_out_of_the_directory(tmp_path: Path) -> None:
    training = tmp_path / "training"
    for name in ("..", ".", "../../x", "/etc", "\\..", "..%2F"):
        assert StateDirectory(tmp_path).training(name).resolve().parent == training


def test_a_directory_belongs_to_the_base_model_that_came_first(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path / "deep" / "state")
    state.claim("llama", "abc")
    state.claim("llama", "abc")
    state.claim("renamed", "abc")  # the same weights
    with pytest.raises(ConfigError) as error:
        state.claim("llama", "def")
    assert error.value.code == "other_base_model"
    assert error.value.param == "learning.state_dir"
    for part in (str(state.path), "'llama'", "abc", "def", "use another learning.state_dir"):
        assert part in error.value.message
    assert json.loads((state.path / BASE_FILE).read_text())["fingerprint"] == "abc"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "llama"}', "\x00"])
def test_a_damaged_note_is_refused_with_a_remedy(tmp_path: Path, content: str) -> None:
    (tmp_path / BASE_FILE).write_text(content)
    with pytest.raises(ConfigError, match=r"is damaged .* remove it if"):
        StateDirectory(tmp_path).claim("llama", "abc")


def test_a_directory_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        StateDirectory(tmp_path / "file" / "state").claim("llama", "abc")


def test_claiming_clears_away_what_an_interrupted_process_left(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    kept = state.training("tutor") / "training.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"whole")
    for left in (kept.with_name(".tmp-training.safetensors-0a1b"), tmp_path / ".tmp-base.json-2c"):
        left.write_bytes(b"hal")
    state.claim("llama", "abc")
    assert not list(tmp_path.rglob(".tmp-*"))
    assert kept.read_bytes() == b"whole"
