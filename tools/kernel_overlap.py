"""How much of the time the kernels of two streams ran at once, from a profiler's trace.

    stream 20    ████ ███  ████      inference
    stream 24  ██████████ ███████    training
    both         ████ ███  ████      the overlapped time

The trace is that of `torch.profiler` (Chrome trace events). On CUDA the lanes are streams and the
work their kernels; in a dry run on a CPU the lanes are threads and the work torch's operators.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Overlap:
    """The two busiest lanes of a trace; times in microseconds.

    Attributes:
        first, second: how the trace calls the lanes, the busier one first.
        events: kernels (or operators) of both.
        first_us, second_us: when at least one of the lane's ran.
        both_us: when one of each ran.
        share: `both_us` as a share of the less busy lane's time.
    """

    first: str
    second: str
    events: int
    first_us: float
    second_us: float
    both_us: float
    share: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def overlap_of(events: Iterable[Mapping[str, Any]]) -> Overlap | None:
    """The overlap of the two busiest lanes; None where fewer than two lanes worked.

    Kernels count where there are any, else operators.
    """
    kernels: dict[str, list[Interval]] = defaultdict(list)
    operators: dict[str, list[Interval]] = defaultdict(list)
    for event in events:
        if event.get("ph") != "X":
            continue
        began = float(event["ts"])
        span = (began, began + float(event["dur"]))
        if event.get("cat") == "kernel":
            kernels[f"stream {event['args']['stream']}"].append(span)
        elif event.get("cat") == "cpu_op":
            operators[f"thread {event['tid']}"].append(span)
    lanes = kernels or operators
    merged = {name: merge(spans) for name, spans in lanes.items()}
    ranked = sorted(merged, key=lambda name: -total(merged[name]))
    if len(ranked) < 2:
        return None
    first, second = ranked[:2]
    both = total(intersect(merged[first], merged[second]))
    second_us = total(merged[second])
    return Overlap(
        first=first,
        second=second,
        events=len(lanes[first]) + len(lanes[second]),
        first_us=total(merged[first]),
        second_us=second_us,
        both_us=both,
        share=both / second_us if second_us else 0.0,
    )


def merge(spans: Iterable[Interval]) -> list[Interval]:
    """The union of intervals: ascending, and none touches another."""
    found: list[Interval] = []
    for low, high in sorted(spans):
        if found and low <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], high))
        else:
            found.append((low, high))
    return found


def intersect(some: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """What lies in both of two merged lists of intervals."""
    found: list[Interval] = []
    i = j = 0
    while i < len(some) and j < len(others):
        low, high = max(some[i][0], others[j][0]), min(some[i][1], others[j][1])
        if low < high:
            found.append((low, high))
        if some[i][1] < others[j][1]:
            i += 1
        else:
            j += 1
    return found


def total(spans: Iterable[Interval]) -> float:
    """The length of all of them."""
    return sum(high - low for low, high in spans)
