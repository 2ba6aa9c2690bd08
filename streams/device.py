"""Which device and which dtype to compute with, and what to call them in a report."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes that weights are served in, by the names that settings use."""

CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "sve", "bf16")
"""The CPU features that decide which matrix kernels torch has (x86 names, then Arm's)."""


class DeviceError(ValueError):
    """The device or dtype asked for is not there; the message says what is."""


@dataclass(frozen=True, slots=True)
class DeviceDescription:
    """A device in words, for start-up lines and reports.

    Attributes:
        device: torch's name, "cpu" or "cuda:0".
        name: the maker's name of the processor or card.
        total_bytes: memory of a card; 0 on the CPU (see `MemoryProbe`, which knows the limits).
        features: what kernels depend on: CPU flags, or the compute capability as "sm_90".
        threads: intra-op threads of the calling thread on the CPU; multiprocessors of a card.
    """

    device: str
    name: str
    total_bytes: int
    features: tuple[str, ...]
    threads: int


def resolve_device(name: str) -> torch.device:
    """The device that a setting names.

    Args:
        name: "auto" (the first CUDA device if there is one, else the CPU), "cpu", "cuda" or
            "cuda:N", where N counts the devices that CUDA_VISIBLE_DEVICES leaves.

    Returns:
        A device with an index if it is CUDA.

    Raises:
        DeviceError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise DeviceError(f"device is {name!r}; use auto, cpu, cuda or cuda:N")
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = (
            "this build of torch has no CUDA"
            if torch.version.cuda is None
            else "torch finds no CUDA device (check the driver and CUDA_VISIBLE_DEVICES)"
        )
        raise DeviceError(f"device is {name!r}, but {why}; use auto or cpu")
    index, count = int(match[1] or 0), torch.cuda.device_count()
    if index >= count:
        names = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise DeviceError(f"device is {name!r}, but the devices visible here are {names}")
    return torch.device("cuda", index)


def resolve_dtype(
    name: str, *, device: torch.device, stored: torch.dtype | None = None
) -> torch.dtype:
    """The dtype to compute in.

    Args:
        name: "auto" or a key of `DTYPES`. "auto" is the dtype of the stored weights where that is
            one of `DTYPES`, otherwise float32.
        device: where it will run.
        stored: dtype of the weights on disk, if known.

    Raises:
        DeviceError: no such dtype, or this device cannot compute in it.
    """
    if name != "auto" and name not in DTYPES:
        raise DeviceError(f"dtype is {name!r}; use one of auto, {', '.join(DTYPES)}")
    dtype = DTYPES.get(name, stored)
    if dtype not in DTYPES.values():
        dtype = torch.float32
    assert dtype is not None
    if device.type == "cuda" and dtype is torch.bfloat16:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            asked = "the weights are stored in" if name == "auto" else "dtype is"
            raise DeviceError(
                f"{asked} bfloat16, which {torch.cuda.get_device_name(device)} (compute "
                f"capability {major}.{minor}) does not have; use float16 or float32"
            )
    return dtype


def describe_device(device: torch.device) -> DeviceDescription:
    """What `device` is, for people."""
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return DeviceDescription(
            device=str(device),
            name=card.name,
            total_bytes=card.total_memory,
            features=(f"sm_{card.major}{card.minor}",),
            threads=card.multi_processor_count,
        )
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        cpuinfo = ""
    name, flags = parse_cpuinfo(cpuinfo)
    return DeviceDescription(
        device="cpu",
        name=name or platform.processor() or platform.machine(),
        total_bytes=0,
        features=tuple(flag for flag in CPU_FLAGS if flag in flags),
        threads=torch.get_num_threads(),
    )


def parse_cpuinfo(text: str) -> tuple[str, frozenset[str]]:
    """The processor's name ("" if absent) and its flags, from the text of ``/proc/cpuinfo``."""
    name, flags = "", frozenset[str]()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        match key.strip():
            case "model name" if not name:
                name = value.strip()
            case "flags" | "Features" if not flags:
                flags = frozenset(value.split())
    return name, flags
