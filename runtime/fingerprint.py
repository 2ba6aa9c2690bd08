"""What tells one base model from another without reading all of it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from .errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

FINGERPRINT_BYTES = 1 << 16
"""What is looked at in each of `FINGERPRINT_PLACES` of a file of weights."""
FINGERPRINT_PLACES = 8


def model_fingerprint(path: Path) -> str:
    """Of a model directory: its config, and samples of its weights. Reads some files: blocks.

    Raises:
        ConfigError: a file cannot be read any more.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        for file in sorted([path / "config.json", *path.glob("*.safetensors")]):
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}:".encode())
            with file.open("rb") as stream:
                for place in range(FINGERPRINT_PLACES):
                    last = max(size - FINGERPRINT_BYTES, 0)
                    stream.seek(last * place // (FINGERPRINT_PLACES - 1))
                    digest.update(stream.read(FINGERPRINT_BYTES))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read any more: {error}", param="model") from error
    return digest.hexdigest()
