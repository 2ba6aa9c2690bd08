"""The sections of `gpu_check`: each takes a `Check` and gives figures as JSON values.

They are independent: each loads what it needs and lets go of it. Times are in milliseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from .gpu_check_graphs import check_graphs
from .gpu_check_kernels import check_attention, check_environment, check_parity
from .gpu_check_lanes import check_exhaustion, check_overlap
from .gpu_check_runtime import check_memory, check_publication

if TYPE_CHECKING:
    from collections.abc import Callable

    from .gpu_check_case import Check

SECTION_FUNCTIONS: Final[dict[str, Callable[[Check], dict[str, Any]]]] = {
    "environment": check_environment,
    "attention": check_attention,
    "parity": check_parity,
    "graphs": check_graphs,
    "overlap": check_overlap,
    "publication": check_publication,
    "memory": check_memory,
    "exhaustion": check_exhaustion,
}
