"""The training state on disk, so that a restart goes on where the last checkpoint was.

One safetensors file: LoRA matrices, optimizer moments, and a JSON value in its metadata. It is
replaced atomically, so there is always one checkpoint, and it is whole. What the disk spoils later
is found by a checksum; then training begins at the live version again, which loses some steps and
nothing that was acknowledged. Everything here blocks.
"""

from __future__ import annotations

import json
import logging
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from ..errors import ConfigError
from .durable import make_directory, storage_errors, write_file
from .state_directory import CHECKPOINT_FILE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

log = logging.getLogger(__name__)

FORMAT = 1
DAMAGED_FILE = "training.damaged"


class Checkpoint(NamedTuple):
    """What was saved: CPU tensors by name, and a JSON value."""

    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


def save(directory: Path, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """Put a checkpoint in the place of the one before, atomically and durably.

    Args:
        directory: of one adapter's training; made if absent.
        tensors: any device and dtype; no two may share memory.
        state: a value that JSON can hold.

    Raises:
        StorageError: the disk is full or failing; the checkpoint before is still there.
    """
    copies = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {
        "format": str(FORMAT),
        "state": json.dumps(state),
        "checksum": str(_checksum(copies)),
    }
    data = save_tensors(copies, metadata)
    make_directory(directory)
    write_file(directory / CHECKPOINT_FILE, data)


def load(directory: Path) -> Checkpoint | None:
    """The last checkpoint, or None where there is none that is whole.

    A damaged file is logged and renamed, for inspection.

    Raises:
        ConfigError: a later version of cotune wrote it.
        StorageError: it is there and cannot be read.
    """
    file = directory / CHECKPOINT_FILE
    with storage_errors(file):
        try:
            data = file.read_bytes()
        except FileNotFoundError:
            return None
    try:
        return _parse(file, data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        log.error(
            "the checkpoint %s is damaged (%s); training begins again at the live version, and the "
            "file is kept as %s",
            file,
            error,
            DAMAGED_FILE,
        )
        with storage_errors(file):
            file.replace(directory / DAMAGED_FILE)
        return None


def _parse(file: Path, data: bytes) -> Checkpoint:
    # A safetensors file is the header's length (8 bytes), the header (JSON) and the tensors.
    end = 8 + int.from_bytes(data[:8], "little")
    if len(data) < 8 or end > len(data):
        raise ValueError("it is cut off")
    metadata = json.loads(data[8:end])["__metadata__"]
    if int(metadata["format"]) > FORMAT:
        raise ConfigError(
            f"{file} has format {metadata['format']}, and this cotune knows {FORMAT}; use the "
            "version of cotune that wrote it, or remove the file to begin training at the live "
            "version"
        )
    tensors = load_tensors(data)
    if _checksum(tensors) != int(metadata["checksum"]):
        raise ValueError("its checksum does not fit")
    return Checkpoint(tensors, json.loads(metadata["state"]))


def _checksum(tensors: Mapping[str, torch.Tensor]) -> int:
    """CRC-32 of names and bytes, in the order of the names."""
    checksum = 0
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(name.encode(), checksum)
        if tensor.numel():
            flat = tensor.reshape(-1).view(torch.uint8).numpy()
            checksum = zlib.crc32(flat.data, checksum)
    return checksum
