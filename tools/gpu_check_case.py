"""What `gpu_check` checks: a random model on a device, and how much is done with it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..runtime.config import CacheConfig
from ..runtime.executor import Executor
from ..runtime.loading import LoadedModel, load_model
from ..streams.graphs import CallAgain
from .bench_models import make_adapter, make_model

if TYPE_CHECKING:
    from pathlib import Path

    import torch

MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Check:
    """What is checked, and how much of it.

    Attributes:
        device: the card, or the CPU for a dry run.
        shape: a key of `bench_models.SHAPES`.
        dtype: its name.
        is_quick: little of everything.
        directory: for models; thrown away at the end.
        output: where files for the reader go.
    """

    device: torch.device
    shape: str
    dtype: str
    is_quick: bool
    directory: Path
    output: Path

    @property
    def is_card(self) -> bool:
        """Whether this is not a dry run."""
        return self.device.type == "cuda"

    def amount(self, full: int, quick: int) -> int:
        """How much to do."""
        return quick if self.is_quick else full

    def model(self) -> Path:
        """The random model; made at the first call."""
        path = self.directory / f"{self.shape}-{self.dtype}"
        return path if path.exists() else make_model(self.directory, self.shape, self.dtype)

    def load(self) -> LoadedModel:
        """The random model on the device."""
        return load_model(self.model(), device=self.device, dtype=self.dtype)

    def executor(self, loaded: LoadedModel, *, records: bool = True, seqs: int = 64) -> Executor:
        """Ready to run; with few pages, so that several fit."""
        pages = -(-loaded.max_model_len // 16) + 64 * seqs  # on a CPU: 1,024 tokens of each
        cache = CacheConfig(memory_fraction=0.2) if self.is_card else CacheConfig(num_pages=pages)
        return Executor.create(
            loaded,
            device=self.device,
            cache=cache,
            max_num_batched_tokens=512,
            max_num_seqs=seqs,
            record_decodes=records,
            # A dry run goes through the same static slots; only the graph is missing.
            recorder=None if self.is_card or not records else CallAgain(),
        )

    def adapter(self) -> Path:
        """A random adapter of the model; made at the first call."""
        path = self.directory / "lora-r8"
        if path.exists():
            return path
        model = self.model()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's advice is not for the people who run this
            return make_adapter(self.directory, model, rank=8, head=True)
