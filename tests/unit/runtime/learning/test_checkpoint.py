"""The training state on disk."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cotune.runtime.errors import ConfigError, StorageError
from cotune.runtime.learning import checkpoint
from cotune.runtime.learning.checkpoint import DAMAGED_FILE
from cotune.runtime.learning.state_directory import CHECKPOINT_FILE

if TYPE_CHECKING:
    from pathlib import Path

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "moment": torch.randn(5, 2, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "step": torch.tensor(7.0),
    "empty": torch.zeros(0, 3),
    "transposed": torch.arange(6).reshape(2, 3).T,
}
STATE: dict[str, Any] = {"live": 3, "nested": {"keys": [1, 2], "text": "é"}, "none": None}


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "training" / "tutor", TENSORS, STATE)
    found = checkpoint.load(tmp_path / "training" / "tutor")
    assert found is not None
    tensors, state = found
    assert state == STATE
    assert set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_without_a_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path) is None
    assert checkpoint.load(tmp_path / "absent") is None


def test_the_last_one_saved_is_the_one_there_is(tmp_path: Path) -> None:
    for step in range(3):
        checkpoint.save(tmp_path, TENSORS, {"step": step})
    found = checkpoint.load(tmp_path)
    assert found is not None
    assert found.state == {"step": 2}
    assert [file.name for file in tmp_path.iterdir()] == [CHECKPOINT_FILE]


def test_what_is_loaded_may_be_changed_without_changing_the_file(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, TENSORS, STATE)
    for _ in range(2):
        found = checkpoint.load(tmp_path)
        assert found is not None
        assert torch.equal(found.tensors["a.weight"], TENSORS["a.weight"])
        found.tensors["a.weight"].zero_()


@pytest.mark.parametrize("place", [0, 7, 8, 20, 0.5, -1])
def test_a_changed_byte_is_found_wherever_it_is(
    tmp_path: Path, place: float, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint.save(tmp_path, TENSORS, STATE)
    file = tmp_path / CHECKPOINT_FILE
    data = bytearray(file.read_bytes())
    data[int(place * len(data)) if isinstance(place, float) else int(place)] ^= 0x55
    file.write_bytes(data)
    assert checkpoint.load(tmp_path) is None
    assert "is damaged" in caplog.text
    assert [found.name for found in tmp_path.iterdir()] == [DAMAGED_FILE]
    assert (tmp_path / DAMAGED_FILE).read_bytes() == data
    assert checkpoint.load(tmp_path) is None  # once set aside, it is not there


@pytest.mark.parametrize("length", [0, 5, 8, 100, -1])
def test_a_file_that_was_cut_off_is_set_aside(tmp_path: Path, length: int) -> None:
    checkpoint.save(tmp_path, TENSORS, STATE)
    file = tmp_path / CHECKPOINT_FILE
    file.write_bytes(file.read_bytes()[:length])
    assert checkpoint.load(tmp_path) is None
    assert (tmp_path / DAMAGED_FILE).exists()


def test_a_later_format_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 2)
        checkpoint.save(tmp_path, TENSORS, STATE)
    with pytest.raises(ConfigError, match="has format 2"):
        checkpoint.load(tmp_path)
    assert (tmp_path / CHECKPOINT_FILE).exists()


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_while_the_disk_refuses_the_checkpoint_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    checkpoint.save(tmp_path, TENSORS, {"step": 1})

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(StorageError, match="No space left"):
            checkpoint.save(tmp_path, TENSORS, {"step": 2})
    found = checkpoint.load(tmp_path)
    assert found is not None
    assert found.state == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == [CHECKPOINT_FILE]


def test_a_file_that_cannot_be_read_is_no_damaged_one(tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT_FILE).mkdir()
    with pytest.raises(StorageError):
        checkpoint.load(tmp_path)
