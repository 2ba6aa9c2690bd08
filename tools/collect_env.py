"""`cotune collect-env`: what a bug report or a benchmark table needs to know of this machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__

if TYPE_CHECKING:
    import argparse

DISTRIBUTIONS = (
    "torch",
    "transformers",
    "peft",
    "tokenizers",
    "safetensors",
    "numpy",
    "numba",
    "aiohttp",
    "uvloop",
    "orjson",
    "prometheus-client",
    "nvidia-ml-py",
    "psutil",
)
ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES",
    "GOMP_CPU_AFFINITY",
    "HF_HUB_OFFLINE",
    "KMP_AFFINITY",
    "LD_PRELOAD",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_NUM_THREADS",
)
DEMO_MODEL = Path(__file__).resolve().parent.parent / "runtime" / "demo_model"

Section = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``cotune collect-env``."""
    parser.description = (
        "Print what decides how cotune runs here: versions, processor features, threads, GPUs, "
        "memory and its limits. Nothing is sent anywhere, and no secret is printed."
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    report = collect()
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print("\n".join(to_lines(report)))
    return 0


def collect() -> dict[str, Section]:
    """The report, as sections of plain JSON values."""
    return {
        "cotune": {"version": __version__, "python": platform.python_version()},
        "libraries": {name: _version(name) for name in DISTRIBUTIONS},
        "system": {"platform": platform.platform(), "machine": platform.machine()},
        "cpu": _cpu(),
        "memory": _memory(),
        "torch": _torch(),
        "gpus": _gpus(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "demo model": _demo_model(DEMO_MODEL),
    }


def to_lines(report: dict[str, Section]) -> list[str]:
    """The report for people: one line per value, sizes in GiB."""
    lines: list[str] = []
    for title, section in report.items():
        lines.append(title)
        if not section:
            lines.append("  none")
        for name, value in section.items():
            lines.append(
                f"  {name.removesuffix('_bytes').replace('_', ' '):<22} {_text(name, value)}"
            )
    return lines


def _text(name: str, value: object) -> str:
    if value is None:
        return "none"
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{value / 2**30:.2f} GiB"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(key, item)}" for key, item in value.items())
    return str(value)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> Section:
    import psutil
    import torch

    from ..streams.device import describe_device

    description = describe_device(torch.device("cpu"))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": description.name,
        "logical_cores": os.cpu_count(),
        "physical_cores": psutil.cpu_count(logical=False),
        "usable_cores": usable,
        "features": list(description.features),
    }


def _memory() -> Section:
    import psutil
    import torch

    from ..streams.memory import MemoryProbe, read_cgroup_memory

    machine = psutil.virtual_memory()
    limits = read_cgroup_memory()
    reading = MemoryProbe(torch.device("cpu")).read()
    return {
        "machine_bytes": machine.total,
        "control_group_limit_bytes": limits.limit_bytes if limits else None,
        "available_bytes": reading.available_bytes,
        "swap_bytes": psutil.swap_memory().total,
    }


def _torch() -> Section:
    import torch

    return {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "cpu_kernels": torch.backends.cpu.get_cpu_capability(),
        "onednn": torch.backends.mkldnn.is_available(),
        "mkl": torch.backends.mkl.is_available(),
        "cuda": torch.version.cuda,
        "cuda_available": torch.cuda.is_available(),
    }


def _gpus() -> Section:
    import torch

    from ..streams.device import describe_device
    from ..streams.memory import MemoryProbe

    if not torch.cuda.is_available():
        return {}
    gpus: Section = {"driver": _driver()}
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        description = describe_device(device)
        probe = MemoryProbe(device)
        gpus[str(device)] = {
            "name": description.name,
            "capability": description.features[0],
            "multiprocessors": description.threads,
            "total_bytes": description.total_bytes,
            "free_bytes": probe.read().free_bytes,
            "memory_source": probe.source,
        }
    return gpus


def _driver() -> str | None:
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None


def _demo_model(path: Path) -> Section:
    files = [file for file in path.glob("*") if file.is_file()] if path.is_dir() else []
    return {
        "present": (path / "config.json").is_file() and any(path.glob("*.safetensors")),
        "files": len(files),
        "megabytes": round(sum(file.stat().st_size for file in files) / 1e6, 1),
    }
