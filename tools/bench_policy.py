"""How long each policy takes to decide.

    cotune bench policy
    cotune bench policy --tasks 4000 --policy cotune

Each scene is a state of the engine with so many tasks: a full queue behind running sequences, only
decodes, everyone late, and so on, with costs, targets, memory and two learners that offer quanta.
Every decision is timed by itself, by the clock and in this thread's own time on a core (`cpu`):
where they differ, another process had the core. The garbage collector is off meanwhile. Better is:
less, for a decision delays the iteration that it plans.
"""

from __future__ import annotations

import gc
import math
import random
import time
from typing import TYPE_CHECKING, Any, Final

from ..policy import (
    POLICY_NAMES,
    Budgets,
    Costs,
    MemoryView,
    Observation,
    RunningQuantum,
    RunningView,
    TrainingOffer,
    TrainingView,
    WaitingView,
    make_policy,
)
from ..runtime.errors import ConfigError
from .bench_report import machine, print_json

if TYPE_CHECKING:
    import argparse

NAME: Final = "policy"
HELP: Final = "how long each policy takes to decide"

COLUMNS: Final = ("p50", "p90", "p99", "max", "cpu_p99")
PAGE_SIZE: Final = 16
NOW_S: Final = 1000.0
TTFT_S: Final = 2.0
TBT_S: Final = 0.1
COSTS: Final = Costs(
    base_s=2e-3,
    per_decode_s=1e-4,
    per_context_s=1e-8,
    per_token_s=5e-5,
    per_attention_s=1e-9,
    per_chunk_s=1e-4,
    margin=1.2,
    interference=1.4,
    quantum_interference=1.4,
    per_row_s=(5e-5, 8e-5, 1.5e-4),
    quantum_base_s=1e-3,
    step_s=5e-3,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--tasks", type=int, default=1000, help="sequences per state (1000)")
    parser.add_argument("--repeats", type=int, default=500, help="decisions per state (500)")
    parser.add_argument("--policy", choices=POLICY_NAMES, help="only this one (all)")
    parser.add_argument("--seed", type=int, default=0, help="of the states (0)")


def run(args: argparse.Namespace) -> int:
    """Time decisions and print them."""
    for flag, count in (("--tasks", args.tasks), ("--repeats", args.repeats)):
        if count < 1:
            raise ConfigError(f"{flag} is {count}; use 1 or more")
    names = [args.policy] if args.policy else list(POLICY_NAMES)
    scenes = make_scenes(args.tasks, args.seed)
    rows: list[dict[str, Any]] = []
    print(
        f"{'policy':<15} {'state':<26} {'p50':>9} {'p90':>9} {'p99':>9} {'max':>9} {'cpu p99':>9}"
    )
    for name in names:
        for scene, seen in scenes.items():
            row = {"policy": name, "state": scene, **measure(name, seen, args.repeats)}
            rows.append(row)
            figures = " ".join(
                f"{row[key]:6.0f} us" for key in ("p50", "p90", "p99", "max", "cpu_p99")
            )
            print(f"{name:<15} {scene:<26} {figures}")
    worst = {name: max(row["p99"] for row in rows if row["policy"] == name) for name in names}
    worst_cpu = {
        name: max(row["cpu_p99"] for row in rows if row["policy"] == name) for name in names
    }
    print_json(
        {
            "benchmark": NAME,
            "tasks": args.tasks,
            "repeats": args.repeats,
            "worst_p99_us": worst,
            "worst_cpu_p99_us": worst_cpu,
            "states": rows,
            "environment": machine(),
        }
    )
    return 0


def measure(name: str, seen: Observation, repeats: int) -> dict[str, float]:
    """Percentiles of `repeats` decisions, in microseconds."""
    policy = make_policy(name)
    for _ in range(max(1, repeats // 10)):
        policy.plan(seen)
    taken: list[float] = []
    computed: list[float] = []
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(repeats):
            started_s, began_s = time.perf_counter(), time.thread_time()
            policy.plan(seen)
            computed.append((time.thread_time() - began_s) * 1e6)
            taken.append((time.perf_counter() - started_s) * 1e6)
    finally:
        if was_enabled:
            gc.enable()
    taken.sort()
    computed.sort()
    return {
        "p50": _percentile(taken, 0.5),
        "p90": _percentile(taken, 0.9),
        "p99": _percentile(taken, 0.99),
        "max": taken[-1],
        "cpu_p50": _percentile(computed, 0.5),
        "cpu_p99": _percentile(computed, 0.99),
    }


def _percentile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def make_scenes(tasks: int, seed: int) -> dict[str, Observation]:
    """States with as many sequences, by name."""
    draw = random.Random(seed)
    few, most = tasks // 4, tasks - tasks // 4
    running = _running(draw, few)
    prompts = tuple(_prefilling(draw, key) for key in range(few, few + 16))
    return {
        "queue": _seen(running, _waiting(draw, most)),
        "queue, prompts under way": _seen(running + prompts, _waiting(draw, most - 16)),
        "queue, no decodes": _seen((), _waiting(draw, tasks)),
        "queue of short prompts": _seen(running, _waiting(draw, most, longest=8)),
        "queue, all late": _seen(running, _waiting(draw, most, waited_s=30.0)),
        "queue, a third late": _seen(running, _waiting(draw, most, waited_s=3.0)),
        "queue, classes mixed": _seen(running, _waiting(draw, most, is_mixed=True)),
        "queue, adapters": _seen(running, _waiting(draw, most, adapters=12)),
        "queue, no memory": _seen(running, _waiting(draw, most), threshold=0),
        "all decode": _seen(_running(draw, tasks), ()),
        "a quantum on the lane": _seen(running, _waiting(draw, most), is_lane_busy=True),
    }


def _running(draw: random.Random, count: int) -> tuple[RunningView, ...]:
    views = []
    for key in range(count):
        known = draw.randint(20, 2000)
        pages = -(-known // PAGE_SIZE)
        due_s = NOW_S + draw.uniform(0.05, TBT_S)
        views.append(RunningView(key, known - 1, known, pages, pages, False, due_s, NOW_S - 60.0))
    return tuple(views)


def _prefilling(draw: random.Random, key: int) -> RunningView:
    known = draw.randint(200, 4000)
    pages = -(-known // PAGE_SIZE)
    due_s = NOW_S + draw.uniform(0.2, TTFT_S)
    return RunningView(key, known // 2, known, pages, pages, False, due_s, due_s - TTFT_S)


def _waiting(
    draw: random.Random,
    count: int,
    *,
    longest: int = 800,
    waited_s: float = 1.0,
    is_mixed: bool = False,
    adapters: int = 0,
) -> tuple[WaitingView, ...]:
    views = []
    for index in range(count):
        arrival_s = NOW_S - waited_s * (1.0 - index / count)
        known = draw.randint(1, longest)
        cached = draw.randint(0, (known - 1) // PAGE_SIZE) * PAGE_SIZE
        adapter = f"adapter {draw.randrange(adapters)}" if adapters else None
        is_batch = is_mixed and draw.random() < 0.5
        views.append(
            WaitingView(
                10_000 + index,
                arrival_s + (30.0 if is_batch else 0.0),
                known,
                cached,
                adapter,
                is_mixed and draw.random() < 0.1,
                math.inf if is_batch else arrival_s + TTFT_S,
            )
        )
    return tuple(sorted(views, key=lambda view: view.rank_s))


def _seen(
    running: tuple[RunningView, ...],
    waiting: tuple[WaitingView, ...],
    *,
    threshold: int = 8 << 30,
    is_lane_busy: bool = False,
) -> Observation:
    offers = tuple(
        TrainingOffer(key, "forward", 1024, 8, NOW_S - 1.0 - key, 0.6, 0.5, is_begun=False)
        for key in (0, 1)
    )
    quantum = RunningQuantum(2, "backward", 1024, NOW_S - 0.05, is_held=False)
    return Observation(
        now_s=NOW_S,
        budgets=Budgets(2048, 1024, PAGE_SIZE, 64, TTFT_S, TBT_S),
        available_pages=100_000,
        running=running,
        waiting=waiting,
        adapters_in_use=frozenset({"adapter 0", "adapter 1"}),
        free_adapter_slots=6,
        training=TrainingView(offers, quantum if is_lane_busy else None, 0.5, NOW_S - 0.1),
        costs=COSTS,
        memory=MemoryView(threshold, 24 << 30, 1 << 16, 50_000, 2e5, 1e5),
    )
