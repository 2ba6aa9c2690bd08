"""Live memory of a device, as far as this process may use it.

    CUDA   the card's own counters (NVML), which see every process, plus what torch's caching
           allocator has reserved and not handed out
    CPU    the machine's available memory, or what the control groups (v1 or v2) leave, if less

A reading is cheap (tens of microseconds), makes no device wait and may be taken on any thread.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import psutil
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

CGROUP_ROOT = Path("/sys/fs/cgroup")

_NO_LIMIT_BYTES = 1 << 60
"""v1 writes "no limit" as the largest multiple of the page size; nothing real is that large."""


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """One reading, in bytes.

    Attributes:
        total_bytes: what there is: the card's memory, or the machine's or container's.
        free_bytes: what anybody here could still take from the system.
        allocator_unused_bytes: held by this process's caching allocator without being in use; it
            can be taken as well, by this process alone. 0 on the CPU.
    """

    total_bytes: int
    free_bytes: int
    allocator_unused_bytes: int

    @property
    def available_bytes(self) -> int:
        """What this process could still allocate."""
        return self.free_bytes + self.allocator_unused_bytes


@dataclass(frozen=True, slots=True)
class CgroupMemory:
    """The tightest limit that control groups put on this process, in bytes.

    Attributes:
        limit_bytes: the smallest limit on the way to the root.
        free_bytes: the smallest distance to a limit; the file cache that the kernel would give
            back first counts as free.
    """

    limit_bytes: int
    free_bytes: int


class MemoryProbe:
    """Reads the live memory of one device.

    Args:
        device: the CPU or one CUDA device.

    `source` says where readings come from ("nvml", "torch" or "system"). NVML knows nothing of
    CUDA_VISIBLE_DEVICES, so the card is found by its UUID; where that fails,
    `torch.cuda.mem_get_info` is used instead, and the reason is logged once. So it is when NVML
    fails later; it is not asked again then.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.source: str
        self._system: Callable[[], tuple[int, int]]
        if device.type == "cuda":
            try:
                self._system = _open_nvml(device)
                self.source = "nvml"
            except _NvmlUnavailableError as reason:
                self._do_without_nvml(reason)
        elif device.type == "cpu":
            self._system = _cpu_memory
            self.source = "system"
        else:
            raise ValueError(f"device is {str(device)!r}; memory can be read of 'cpu' and 'cuda'")

    def read(self) -> MemoryReading:
        """The memory as it is now."""
        try:
            total_bytes, free_bytes = self._system()
        except _NvmlUnavailableError as reason:
            self._do_without_nvml(reason)
            total_bytes, free_bytes = self._system()
        unused_bytes = 0
        if self.device.type == "cuda":
            stats = torch.cuda.memory_stats(self.device)
            unused_bytes = stats.get("reserved_bytes.all.current", 0) - stats.get(
                "allocated_bytes.all.current", 0
            )
        return MemoryReading(
            total_bytes=total_bytes,
            free_bytes=free_bytes,
            allocator_unused_bytes=max(0, unused_bytes),
        )

    def _do_without_nvml(self, reason: _NvmlUnavailableError) -> None:
        log.warning("memory of %s is read through torch, not NVML: %s", self.device, reason)
        self._system = self._torch_memory
        self.source = "torch"

    def _torch_memory(self) -> tuple[int, int]:
        free_bytes, total_bytes = torch.cuda.mem_get_info(self.device)
        return total_bytes, free_bytes


# -- CUDA ----------------------------------------------------------------------------------------


class _NvmlUnavailableError(Exception):
    """NVML cannot tell about this device; the message says why."""


def _open_nvml(device: torch.device) -> Callable[[], tuple[int, int]]:
    """A function that reads (total, free) bytes of `device` from NVML.

    It raises `_NvmlUnavailableError` where NVML fails.

    NVML stays initialised until the process ends; its own reference count makes that safe for any
    number of probes.
    """
    import pynvml

    def read() -> tuple[int, int]:
        try:
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        except pynvml.NVMLError as error:  # the driver was updated, or the card fell off the bus
            raise _NvmlUnavailableError(str(error)) from error
        return int(memory.total), int(memory.free)

    try:
        pynvml.nvmlInit()
        handle = _find_card(pynvml, str(torch.cuda.get_device_properties(device).uuid))
        read()  # some cards are found but do not tell their memory
    except pynvml.NVMLError as error:
        raise _NvmlUnavailableError(str(error)) from error
    return read


def _find_card(nvml: Any, uuid: str) -> Any:
    """The NVML handle of the card, or of the part of a card (MIG), that has this UUID.

    Args:
        nvml: the module `pynvml`.
        uuid: as torch writes it, without NVML's prefix.
    """
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError_NotFound:
        return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")


# -- CPU -----------------------------------------------------------------------------------------


def _cpu_memory() -> tuple[int, int]:
    machine = psutil.virtual_memory()
    total_bytes, free_bytes = machine.total, machine.available
    limits = read_cgroup_memory()
    if limits is not None:
        total_bytes = min(total_bytes, limits.limit_bytes)
        free_bytes = min(free_bytes, limits.free_bytes)
    return total_bytes, free_bytes


def read_cgroup_memory(
    root: Path = CGROUP_ROOT, membership: Path = Path("/proc/self/cgroup")
) -> CgroupMemory | None:
    """The tightest memory limit on this process, or None where no control group has one.

    Args:
        root: where the control group file system is mounted.
        membership: the file that names this process's groups.
    """
    try:
        groups = parse_membership(membership.read_text(encoding="utf-8"))
    except OSError:  # not Linux, or no control groups
        return None
    found: CgroupMemory | None = None
    for directory, limit_name, usage_name, cache_name in _memory_groups(root, groups):
        try:
            limit_bytes = parse_limit((directory / limit_name).read_text(encoding="utf-8"))
            if limit_bytes is None:
                continue
            used_bytes = int((directory / usage_name).read_text(encoding="utf-8"))
            stat = parse_stat((directory / "memory.stat").read_text(encoding="utf-8"))
        except FileNotFoundError:  # the root group has no limit, or this level is not visible here
            continue
        used_bytes = max(0, used_bytes - stat.get(cache_name, 0))
        free_bytes = max(0, limit_bytes - used_bytes)
        found = CgroupMemory(
            limit_bytes=min(limit_bytes, found.limit_bytes) if found else limit_bytes,
            free_bytes=min(free_bytes, found.free_bytes) if found else free_bytes,
        )
    return found


def _memory_groups(
    root: Path, groups: dict[str, PurePosixPath]
) -> Iterator[tuple[Path, str, str, str]]:
    """Each level from this process's group up to the mount point, with its file names.

    Inside a container the group's path may be that of the host and not exist here; the mount point
    is then the container's own group.
    """
    v1, v2 = groups.get("memory"), groups.get("")
    if v1 is not None:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        mount, path = root / "memory", v1
    elif v2 is not None:
        names = ("memory.max", "memory.current", "inactive_file")
        mount, path = root, v2
    else:
        return
    for level in (path, *path.parents):
        yield (mount / level.relative_to("/"), *names)


def parse_membership(text: str) -> dict[str, PurePosixPath]:
    """Controller name to group, from ``/proc/self/cgroup``; version 2 is the controller ""."""
    groups: dict[str, PurePosixPath] = {}
    for line in text.splitlines():
        _hierarchy, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            groups[controller] = PurePosixPath("/") / path
    return groups


def parse_limit(text: str) -> int | None:
    """A limit in bytes; None for "max" and for the huge number that means the same in version 1."""
    text = text.strip()
    if text == "max":
        return None
    limit_bytes = int(text)
    return None if limit_bytes >= _NO_LIMIT_BYTES else limit_bytes


def parse_stat(text: str) -> dict[str, int]:
    """The counters of a ``memory.stat`` file."""
    return {name: int(value) for name, value in (line.split() for line in text.splitlines())}
