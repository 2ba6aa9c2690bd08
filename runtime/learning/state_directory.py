"""The directory that a learning runtime keeps everything in, and the base model it belongs to.

STATE/
├── base.json             the base model that all of it is about
├── feedback.sqlite       events, samples, recorded responses
├── adapters/             versions (`versions.VersionStore`), and the lock of who learns here
└── training/NAME/        checkpoints of the training state
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from urllib.parse import unquote

from safetensors import SafetensorError, safe_open

from ..errors import ConfigError
from .durable import make_directory, remove_leftovers, write_file
from .status import Candidates

log = logging.getLogger(__name__)

BASE_FILE = "base.json"
CHECKPOINT_FILE = "training.safetensors"


class StateDirectory:
    """Paths of what is kept for one served model."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser()
        self.feedback = self.path / "feedback.sqlite"
        self.adapters = self.path / "adapters"
        self._training = self.path / "training"

    def claim(self, name: str, fingerprint: str) -> None:
        """Note which base model this is about; to be called by the one who holds the lock.

        What an interrupted process left half-written is cleared away first.

        Adapters, log-probabilities and tokens mean nothing to another one, even of the same shape.

        Args:
            name: the base model's, for people.
            fingerprint: what tells it from others of that name.

        Raises:
            ConfigError: it is about another base model, or the note is damaged.
            StorageError: the disk is full or failing.
        """
        self._clear_leftovers()
        file = self.path / BASE_FILE
        if not file.exists():
            make_directory(self.path)
            note = {"format": 1, "name": name, "fingerprint": fingerprint}
            write_file(file, json.dumps(note, indent=1).encode())
            return
        try:
            note = json.loads(file.read_bytes())
            known_name, known = str(note["name"]), str(note["fingerprint"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{file} is damaged ({error!r}); remove it if {self.path} is about the model "
                f"{name!r}, or use another learning.state_dir",
                param="learning.state_dir",
                code="invalid_state_dir",
            ) from error
        if known != fingerprint:
            raise ConfigError(
                f"{self.path} holds what was learned with the base model {known_name!r} "
                f"(fingerprint {known}), not with this {name!r} ({fingerprint}); serve that model, "
                "or use another learning.state_dir",
                param="learning.state_dir",
                code="other_base_model",
            )

    @classmethod
    def default(cls, served_name: str) -> StateDirectory:
        """Where state is kept unless told otherwise: ``~/.local/state/cotune/NAME``."""
        home = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
        return cls(Path(home) / "cotune" / file_name(served_name))

    def training(self, adapter: str) -> Path:
        """Where the checkpoints of an adapter's training are."""
        return self._training / file_name(adapter)

    def candidates(self) -> dict[str, Candidates]:
        """How many candidates each adapter had, as its last checkpoint has it; beside a server too.

        An adapter whose checkpoint is damaged is left out, and the log says so.
        """
        found = {}
        for file in sorted(self._training.glob(f"*/{CHECKPOINT_FILE}")):
            try:
                with safe_open(file, framework="np") as checkpoint:  # its header; no torch
                    state = json.loads(checkpoint.metadata()["state"])
                tally = Candidates(
                    state["passed"], state["refused"], state.get("undecided_by_reason", {})
                )
            except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
                log.warning("the checkpoint %s cannot be read: %s", file, error)
            else:
                found[unquote(file.parent.name)] = tally
        return found

    def _clear_leftovers(self) -> None:
        """Remove what an interrupted process left here; `VersionStore` sees to its own."""
        places = (self.path, *self._training.glob("*"))
        for place in places:
            if place.is_dir() and (names := remove_leftovers(place)):
                log.info("cleared away in %s: %s", place, ", ".join(names))


def file_name(name: str) -> str:
    """`name` as a file name: what is not a letter, digit, ``-``, ``_`` or ``.`` becomes ``%XX``."""
    quoted = re.sub(
        r"[^A-Za-z0-9_.-]", lambda match: "".join(f"%{b:02X}" for b in match[0].encode()), name
    )
    return quoted if quoted.strip(".") else quoted.replace(".", "%2E")
