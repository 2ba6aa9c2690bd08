"""A base model is told from another by its config and its weights."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from cotune.runtime.errors import ConfigError
from cotune.runtime.fingerprint import model_fingerprint
from tiny_models import save_model_directory

if TYPE_CHECKING:
    from pathlib import Path


def test_a_single_changed_block_of_weights_changes_the_fingerprint(tmp_path: Path) -> None:
    directory = save_model_directory(tmp_path / "model", "llama", seed=3)
    copy = shutil.copytree(directory, tmp_path / "copy")
    original = model_fingerprint(directory)
    assert model_fingerprint(copy) == original
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    middle = len(data) // 2
    for place in (slice(-1, None), slice(middle, middle + 200_000)):
        changed = data.copy()
        changed[place] = bytes(byte ^ 1 for byte in changed[place])
        weights.write_bytes(changed)
        assert model_fingerprint(copy) != original
    weights.write_bytes(data)
    (copy / "config.json").write_text(json.dumps({"rope_theta": 1.0}))
    assert model_fingerprint(copy) != original


def test_a_model_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere cannot be read any more"):
        model_fingerprint(tmp_path / "nowhere")
