"""What every benchmark prints: the machine, spreads, and one JSON line last."""

from __future__ import annotations

import json
import os
import platform
import statistics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


def machine() -> dict[str, Any]:
    """The machine, for the record."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
    }


def environment() -> dict[str, Any]:
    """The machine, and what computes on it."""
    import torch
    import transformers

    return machine() | {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Least, median and greatest of some values."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def show(values: Sequence[float], digits: int = 2) -> str:
    """`spread` for people: median (min to max)."""
    s = spread(values)
    return f"{s['median']:.{digits}f} ({s['min']:.{digits}f} to {s['max']:.{digits}f})"


def print_json(result: dict[str, Any]) -> None:
    """The line for programs; the last one of a benchmark's output."""
    print(json.dumps(result))
