"""Every setting of a runtime, as frozen values.

    RuntimeConfig
    ├── model      ModelConfig       which weights, where, in which dtype
    ├── cache      CacheConfig       KV pages
    ├── schedule   ScheduleConfig    what an iteration may hold, how long the queue may grow
    ├── adapters   AdapterConfig     LoRA adapters
    ├── lanes      LaneConfig        threads
    ├── learning   LearningConfig    feedback, training, the gate (learning/config.py)
    └── seed

A config holds what was asked for; what start-up finds out (page count, the context length of the
model) is never written back into it. `RuntimeConfig.validate` is called once, before anything is
started, and refuses with `ConfigError`: the field, its value, the remedy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping  # noqa: TC003 - annotations are inspected at run time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypedDict

from ..policy import POLICY_NAMES
from ..policy.settings import PolicySettings, SettingError
from .errors import ConfigError
from .learning.config import LearningConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_TOKEN_BUDGET = {"cpu": 512, "cuda": 2048}
"""Tokens per iteration where `schedule.max_num_batched_tokens` is None.

The budget bounds how long one iteration can keep the running streams waiting, so it wants to be the
smallest that already uses the device well. A CPU's matrix products stop gaining at about 64 rows
and 512 keeps the per-iteration overhead of a long prompt negligible; a GPU is bound by arithmetic
from a few hundred rows on and 2048 hides the time that launching the kernels takes.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which weights to serve, and how."""

    source: str | Path | None = None
    """A local directory or a hub id; None is the demo model that comes with the package."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    dtype: str = "auto"
    """auto (as the weights are stored), float32, bfloat16 or float16."""
    max_model_len: int | None = None
    """Most tokens of prompt plus answer (None: what the model was made for)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: such a model is refused."""
    revision: str | None = None
    """Branch, tag or commit of a hub id (None: its main branch)."""
    served_name: str | None = None
    """The name that requests use and answers carry (None: the directory's or the hub id)."""

    def validate(self) -> None:
        """Raise `ConfigError` at the first wrong field."""
        if self.source is not None and not str(self.source).strip():
            raise _wrong("model.source", self.source, "name a model directory or hub id")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise _wrong("model.device", self.device, "use auto, cpu, cuda or cuda:N")
        if self.dtype not in DTYPES:
            raise _wrong("model.dtype", self.dtype, f"use one of {', '.join(DTYPES)}")
        _check_int("model.max_model_len", self.max_model_len, 1, optional=True)
        if self.served_name is not None and not self.served_name.strip():
            raise _wrong("model.served_name", self.served_name, "give a name, or leave it out")
        if self.served_name is not None and "@" in self.served_name:
            raise _wrong(
                "model.served_name", self.served_name, "leave out '@', which marks versions"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """The KV pages. `num_pages` decides, else `kv_bytes`, else `memory_fraction`."""

    page_size: int | None = None
    """Tokens per page (None: what the attention backend does best)."""
    num_pages: int | None = None
    """Number of pages (None: from kv_bytes or memory_fraction)."""
    kv_bytes: int | None = None
    """Memory for all pages together, in bytes (None: from memory_fraction)."""
    memory_fraction: float | None = None
    """Share of the memory left after loading that pages may take (None: the device's default)."""
    enable_prefix_sharing: bool = True
    """Keep finished prompts' and answers' pages, and start from them where a prompt repeats."""

    def validate(self) -> None:
        """Raise `ConfigError` at the first wrong field."""
        _check_int("cache.page_size", self.page_size, 1, optional=True)
        _check_int("cache.num_pages", self.num_pages, 1, optional=True)
        _check_int("cache.kv_bytes", self.kv_bytes, 1, optional=True)
        fraction = self.memory_fraction
        if fraction is not None and not 0.0 < fraction <= 1.0:
            raise _wrong("cache.memory_fraction", fraction, "use a share above 0, at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """What one iteration may hold and how long the queue may grow."""

    policy: str = "cotune"
    """Which policy plans the iterations; `cotune.policy.POLICY_NAMES` lists them."""
    max_num_seqs: int = 256
    """Most sequences that run at once."""
    max_num_batched_tokens: int | None = None
    """Most tokens per iteration (None: 512 on a CPU, 2048 on a GPU); long prompts are cut to it."""
    max_queue: int = 1024
    """Most requests that wait; further ones are refused as overloaded."""
    stop_grace_s: float = 5.0
    """How long leaving the runtime lets running requests finish before they are aborted, in s."""
    ttft_target_s: float | None = None
    """Target for the time to first token of interactive requests, in s (None: from the profile)."""
    tbt_target_s: float | None = None
    """Target for the time between their tokens, in s (None: from the profile)."""
    profile: str = "auto"
    """What work costs here: "auto" (measured at the first start, then kept), "off" (learned while
    serving alone), or the file of `cotune profile --output`."""
    settings: PolicySettings = field(default_factory=PolicySettings)
    """The constants of the policies."""

    def validate(self) -> None:
        """Raise `ConfigError` at the first wrong field."""
        if self.policy not in POLICY_NAMES:
            raise _wrong("schedule.policy", self.policy, f"use one of {', '.join(POLICY_NAMES)}")
        _check_int("schedule.max_num_seqs", self.max_num_seqs, 1)
        _check_int("schedule.max_num_batched_tokens", self.max_num_batched_tokens, 1, optional=True)
        _check_int("schedule.max_queue", self.max_queue, 1)
        if not (math.isfinite(self.stop_grace_s) and self.stop_grace_s >= 0.0):
            raise _wrong("schedule.stop_grace_s", self.stop_grace_s, "use 0 s or more")
        for name in ("ttft_target_s", "tbt_target_s"):
            target_s = getattr(self, name)
            if target_s is not None and not (math.isfinite(target_s) and target_s > 0.0):
                raise _wrong(f"schedule.{name}", target_s, "use more than 0 s, or leave it unset")
        if not self.profile.strip():
            raise _wrong("schedule.profile", self.profile, 'use "auto", "off" or name a file')
        try:
            self.settings.validate()
        except SettingError as error:
            name = f"schedule.settings.{error.field}"
            raise ConfigError(
                f"{name}: {error.message}", param=name, code="invalid_config"
            ) from error

    def token_budget(self, device_type: str) -> int:
        """Most tokens per iteration on this kind of device ("cpu" or "cuda")."""
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        return DEVICE_TOKEN_BUDGET.get(device_type, DEVICE_TOKEN_BUDGET["cuda"])


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """LoRA adapters that are there from the start, and room for more."""

    modules: tuple[tuple[str, Path], ...] = ()
    """(name, directory in PEFT format) of each adapter to load at start."""
    max_loras: int = 8
    """Most adapter versions that one iteration can serve; 0 turns adapters off."""
    max_lora_rank: int = 64
    """Highest rank that is taken."""

    def validate(self) -> None:
        """Raise `ConfigError` at the first wrong field."""
        _check_int("adapters.max_loras", self.max_loras, 0)
        _check_int("adapters.max_lora_rank", self.max_lora_rank, 1)
        seen: set[str] = set()
        for name, _path in self.modules:
            if name in seen:
                raise _wrong("adapters.modules", name, "name each adapter once")
            seen.add(name)
        if self.modules and self.max_loras == 0:
            raise _wrong("adapters.max_loras", 0, "raise it: adapters.modules names some")


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneConfig:
    """The threads that device work runs on."""

    inference_threads: int | None = None
    """Intra-op threads of the inference lane on a CPU (None: torch's own choice, less those of the
    training lane where learning is on)."""
    cuda_graphs: bool = True
    """Whether decodes are recorded once and replayed as CUDA graphs. No effect on a CPU."""
    sm_share: float | None = None
    """Share of a card's multiprocessors that the training lane may use, above 0 and below 1 (None:
    all of them, at lower priority than inference). No effect on a CPU."""

    def validate(self) -> None:
        """Raise `ConfigError` at the first wrong field."""
        _check_int("lanes.inference_threads", self.inference_threads, 1, optional=True)
        if self.sm_share is not None and not 0.0 < self.sm_share < 1.0:
            raise _wrong(
                "lanes.sm_share",
                self.sm_share,
                "use a share above 0 and below 1, or leave it unset",
            )


class Shorthands(TypedDict, total=False):
    """The settings that `Runtime` takes by their last name; see the groups for their meaning.

    `adapters` maps names to directories; `learning` turns learning on or off, or is all of its
    settings; `state_dir` says where it keeps its state, and turns it on. The others are fields of
    the groups of `RuntimeConfig`.
    """

    dtype: str
    max_model_len: int | None
    trust_remote_code: bool
    revision: str | None
    served_name: str | None
    page_size: int | None
    num_pages: int | None
    kv_bytes: int | None
    memory_fraction: float | None
    enable_prefix_sharing: bool
    policy: str
    ttft_target_s: float | None
    tbt_target_s: float | None
    profile: str
    settings: PolicySettings
    max_num_seqs: int
    max_num_batched_tokens: int | None
    max_queue: int
    stop_grace_s: float
    adapters: Mapping[str, str | Path]
    max_loras: int
    max_lora_rank: int
    inference_threads: int | None
    cuda_graphs: bool
    sm_share: float | None
    learning: bool | LearningConfig
    state_dir: str | Path | None
    seed: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """All settings of a runtime."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Which weights to serve, and how."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """The KV pages."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """What one iteration may hold and how long the queue may grow."""
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    """LoRA adapters."""
    lanes: LaneConfig = field(default_factory=LaneConfig)
    """Threads."""
    learning: LearningConfig = field(default_factory=LearningConfig)
    """Learning from feedback."""
    seed: int | None = None
    """Requests without a seed draw theirs from this one, in order of arrival (None: random)."""

    def validate(self) -> None:
        """Raise `ConfigError` at the first wrong field of any group."""
        self.model.validate()
        self.cache.validate()
        self.schedule.validate()
        self.adapters.validate()
        self.lanes.validate()
        self.learning.validate()
        if self.learning.enabled and self.adapters.max_loras < 2:
            raise _wrong(
                "adapters.max_loras",
                self.adapters.max_loras,
                "use 2 or more: learning needs a slot for the live version and one for a candidate",
            )
        if self.learning.enabled and self.learning.training.lora_rank > self.adapters.max_lora_rank:
            raise _wrong(
                "learning.training.lora_rank",
                self.learning.training.lora_rank,
                f"use at most adapters.max_lora_rank, {self.adapters.max_lora_rank}",
            )
        _check_int("seed", self.seed, -(2**63), optional=True)

    def with_shorthands(self, values: Mapping[str, Any]) -> RuntimeConfig:
        """A copy in which settings are replaced by their last name.

        Args:
            values: as in `Shorthands`.

        Raises:
            ConfigError: a name is not a setting.
        """
        changes: dict[str, dict[str, Any]] = {}
        top: dict[str, Any] = {}
        learning = self.learning
        for name, value in values.items():
            if name == "adapters":
                modules = tuple((key, Path(path)) for key, path in value.items())
                changes.setdefault("adapters", {})["modules"] = modules
            elif name == "seed":
                top["seed"] = value
            elif name == "learning":
                learning = replace(learning, enabled=value) if isinstance(value, bool) else value
            elif name == "state_dir":
                if value is not None:
                    learning = replace(learning, enabled=True, state_dir=Path(value))
            elif name in _GROUP_OF:
                changes.setdefault(_GROUP_OF[name], {})[name] = value
            else:
                raise ConfigError(
                    f"there is no setting {name!r}; known: "
                    f"{', '.join(sorted((*_GROUP_OF, *_OTHER_SHORTHANDS)))}",
                    param=name,
                    code="unknown_setting",
                )
        for group, group_changes in changes.items():
            top[group] = replace(getattr(self, group), **group_changes)
        return replace(self, learning=learning, **top)


_OTHER_SHORTHANDS = ("adapters", "learning", "seed", "state_dir")
_GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "cache": CacheConfig,
    "schedule": ScheduleConfig,
    "adapters": AdapterConfig,
    "lanes": LaneConfig,
}
_GROUP_OF = {
    f.name: group for group, cls in _GROUPS.items() for f in fields(cls) if f.name != "modules"
}


def _check_int(name: str, value: object, low: int, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(name, value, "use an integer")
    if value < low:
        raise _wrong(name, value, f"use {low} or more")


def _wrong(name: str, value: object, remedy: str) -> ConfigError:
    return ConfigError(f"{name} is {value!r}; {remedy}", param=name, code="invalid_config")
