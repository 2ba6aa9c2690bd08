"""Profiles on disk: one file for each model, device, dtype, number of threads and versions.

    $XDG_CACHE_HOME/cotune/profiles/cotune-demo-float32-0123456789abcdef.json

A file that is damaged, or is of something else than its name says, is set aside as
``NAME.refused`` and measured again; a cache that cannot be written is done without. Both are said
once, with the remedy, and neither keeps a runtime from starting.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...policy.profile import Profile, ProfileError, ProfileKey
from ...streams.device import describe_device
from ..errors import ConfigError, StorageError
from ..fingerprint import model_fingerprint
from ..learning.durable import make_directory, write_file
from .profiler import SHORT, measure

if TYPE_CHECKING:
    from ..loading import LoadedModel
    from .profiler import Effort, ProfiledExecutor, Progress, WorkLane

log = logging.getLogger(__name__)

REFUSED = ".refused"
"""What is appended to the name of a file that cannot be used."""
MAX_BYTES = 1 << 22
"""A larger file is no profile."""


def cache_directory() -> Path:
    """Where profiles are kept: ``~/.cache/cotune/profiles``, or below ``$XDG_CACHE_HOME``."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "cotune" / "profiles"


def key_of(
    loaded: LoadedModel, *, device: torch.device, dtype: torch.dtype, threads: int
) -> ProfileKey:
    """What a profile of this would be kept under. Reads some of the model's files: blocks.

    Args:
        loaded: the model.
        device: where it runs.
        dtype: of its weights there.
        threads: intra-op threads of the inference lane; it counts on a CPU alone.
    """
    return ProfileKey(
        model=loaded.name,
        fingerprint=model_fingerprint(loaded.path),
        device=describe_device(device).name,
        dtype=str(dtype).removeprefix("torch."),
        threads=threads if device.type == "cpu" else 0,
        versions=(("cotune", version("cotune")), ("torch", torch.__version__)),
    )


def path_of(key: ProfileKey) -> Path:
    """Where the profile of `key` is kept, whether or not it is there."""
    return cache_directory() / key.file_name


def load(key: ProfileKey) -> Profile | None:
    """The kept profile, or None where there is none that can be used. Blocks."""
    path = path_of(key)
    try:
        profile = read(path)
        if different := profile.key.differences(key):
            raise ProfileError(f"key.{different[0]}", "is another's than the file's name says")
    except FileNotFoundError:
        return None
    except (OSError, ProfileError) as error:
        _set_aside(path, error)
        return None
    return profile


def save(profile: Profile) -> Path | None:
    """Keep a profile; its path, or None where it could not be written. Blocks."""
    path = path_of(profile.key)
    try:
        make_directory(path.parent)
        write(profile, path)
    except StorageError as error:
        log.warning(
            "the profile is not kept, so the next start measures again: %s; set XDG_CACHE_HOME to "
            "a directory that can be written",
            error.message,
        )
        return None
    return path


def read(path: Path) -> Profile:
    """The profile in a file. Blocks.

    Raises:
        ProfileError: it holds none, or a damaged one; names the field and the remedy.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise ProfileError("profile", f"is larger than {MAX_BYTES} bytes")
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ProfileError("profile", f"is not JSON ({error})") from error
    except RecursionError as error:
        raise ProfileError("profile", "is not JSON that can be read (nested too deep)") from error
    return Profile.from_dict(data)


def write(profile: Profile, path: Path) -> None:
    """Put a profile into a file, atomically. Blocks.

    Raises:
        StorageError: the disk refuses it.
    """
    text = json.dumps(profile.to_dict(), indent=1, allow_nan=False)
    write_file(path, f"{text}\n".encode())


async def load_or_measure(
    loaded: LoadedModel,
    executor: ProfiledExecutor,
    lane: WorkLane,
    *,
    device: torch.device,
    threads: int,
    mode: str = "auto",
    effort: Effort = SHORT,
    progress: Progress | None = None,
) -> Profile:
    """The profile to begin with. To be called before the engine takes requests.

    Args:
        loaded: the model.
        executor: runs its iterations, on `lane`; its KV pages hold rubbish afterwards.
        lane: where it is measured, if it must be.
        device: what it runs on.
        threads: intra-op threads of `lane`.
        mode: "auto" for the kept one, or a new one that is then kept; else the file to read. One
            that knows nothing of prefill is not kept, and measured again.
        effort: how much to measure.
        progress: is told (kinds done, kinds in all, what is next).

    Raises:
        ConfigError: the file cannot be used; names it, the reason and the remedy.
    """
    key = await asyncio.to_thread(_key_of, loaded, device, threads)
    if mode != "auto":
        return await asyncio.to_thread(_read_for, key, mode)
    profile = await asyncio.to_thread(load, key)
    if profile is not None and profile.knows_prefill:
        return profile
    log.info("measuring what %s costs on this device, once", loaded.name)
    profile = await measure(loaded, executor, lane, key=key, effort=effort, progress=progress)
    if profile.knows_prefill:
        await asyncio.to_thread(save, profile)
    else:
        log.warning(
            "the profile is not kept: the KV pages hold no prompt that could be measured, so "
            "prompts look free until some were served; raise cache.num_pages"
        )
    return profile


def _key_of(loaded: LoadedModel, device: torch.device, threads: int) -> ProfileKey:
    return key_of(loaded, device=device, dtype=loaded.dtype, threads=threads)


def _read_for(key: ProfileKey, name: str) -> Profile:
    """The profile of a file that a user named; it must be of this model on this device."""
    path = Path(name).expanduser()
    try:
        profile = read(path)
    except FileNotFoundError as error:
        raise _wrong(path, "is not there; `cotune profile --output` makes one") from error
    except (OSError, ProfileError) as error:
        raise _wrong(path, f"cannot be used: {error}") from error
    different = profile.key.differences(key)
    for name in ("model", "fingerprint", "device", "dtype"):
        if name in different:
            raise _wrong(
                path,
                f"is of another {name} ({getattr(profile.key, name)!r}, and this one is "
                f"{getattr(key, name)!r}); make one here with `cotune profile --output`, or use "
                "schedule.profile auto",
            )
    if different:
        log.warning("%s was measured with other %s", path, " and ".join(different))
    return profile


def _wrong(path: Path, what: str) -> ConfigError:
    return ConfigError(
        f"schedule.profile: {path} {what}", param="schedule.profile", code="invalid_config"
    )


def _set_aside(path: Path, error: Exception) -> None:
    """Move a file that cannot be used out of the way, so that it is said once."""
    refused = path.with_name(path.name + REFUSED)
    try:
        os.replace(path, refused)
        where = f"it is now {refused.name}, to be looked at or deleted"
    except OSError as failed:
        where = f"it could not be moved ({failed.strerror}); delete it"
    log.warning("the profile %s is not used: %s; %s", path, error, where)
