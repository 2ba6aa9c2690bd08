"""Where an iteration's time goes: forward, sampling, planning, committing, delivering.

    cotune bench overhead --shape small --dtype float32
    cotune bench overhead --shape medium --dtype bfloat16 --temperature 0.8

A steady batch of 16 streams is decoded and read. `overhead` is planning + sampling + committing +
delivering as a share of the iteration's wall time; delivering happens while the next forward runs,
so counting it in full is an upper bound. `hand-over` is the way to the lane's thread and back.
Better is: a smaller share.

With --profile the same batch is also run under cProfile, without the engine around it: which part
of the forward takes how much of the time. Profiling makes Python itself look dearer than it is.
"""

from __future__ import annotations

import asyncio
import cProfile
import pstats
import random
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .bench_models import SHAPES, make_model
from .bench_report import environment, print_json, show, spread
from .options import loop_factory

if TYPE_CHECKING:
    import argparse

NAME: Final = "overhead"
HELP: Final = "where an iteration's time goes"
_PARTS: Final = ("forward_s", "sample_s", "plan_s", "commit_s", "deliver_s")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small", help="model (small)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    parser.add_argument("--threads", type=int, default=2, help="intra-op threads on a CPU (2)")
    parser.add_argument("--batch", type=int, default=16, help="streams at once (16)")
    parser.add_argument("--tokens", type=int, default=200, help="tokens per stream (200)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens per prompt (128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="with a temperature (1)")
    parser.add_argument("--repeats", type=int, default=5, help="repeats that count (5)")
    parser.add_argument("--profile", action="store_true", help="also say what the forward does")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark and print its figures."""
    with tempfile.TemporaryDirectory(prefix="cotune-bench-") as directory:
        model = make_model(Path(directory), args.shape, args.dtype)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            rounds = runner.run(_measure(args, model))
        profile = _profile(args, model) if args.profile else {}
    shares = [r["overhead"] for r in rounds]
    print(f"{args.shape} {args.dtype}, batch {args.batch}, temperature {args.temperature:g}")
    iterations = [r["iteration_s"] * 1e3 for r in rounds]
    print(f"  iteration   {show(iterations, 3)} ms, median (min to max)")
    for part in (*_PARTS, "hand_over_s"):
        values = [r[part] * 1e6 for r in rounds]
        print(f"  {part[:-2].replace('_', '-'):11} {show(values, 0)} us")
    print(f"  overhead    {show([100 * s for s in shares], 1)} % of the iteration")
    for part, share in profile.items():
        print(f"  {100 * share:5.1f} %  {part}")
    result: dict[str, Any] = {
        "benchmark": NAME,
        "profile": profile,
        "shape": args.shape,
        "dtype": args.dtype,
        "batch": args.batch,
        "temperature": args.temperature,
        "overhead": spread(shares),
        "rounds": rounds,
        "environment": environment(),
    }
    print_json(result)
    return 0


async def _measure(args: argparse.Namespace, model: Path) -> list[dict[str, float]]:
    from ..runtime.runtime import Runtime
    from ..runtime.types import SamplingParams

    draw = random.Random(0)
    vocab_size = SHAPES[args.shape]["vocab_size"]
    params = SamplingParams(
        max_tokens=args.tokens, temperature=args.temperature, top_p=args.top_p, ignore_eos=True
    )
    rounds = []
    async with Runtime(
        model, args.device, dtype=args.dtype, inference_threads=args.threads
    ) as runtime:

        async def stream(started: asyncio.Barrier) -> None:
            prompt = [draw.randrange(1, vocab_size) for _ in range(args.prompt)]
            async with runtime.complete(prompt, params) as deltas:
                await anext(deltas)
                await started.wait()
                async for _ in deltas:
                    pass

        for turn in range(args.repeats + 1):
            started = asyncio.Barrier(args.batch + 1)
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(stream(started)) for _ in range(args.batch)]
                await started.wait()
                before, began = runtime.statistics(), time.monotonic()
                # The first to end leaves the batch; up to there it is steady.
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                after, seconds = runtime.statistics(), time.monotonic() - began
            count = after.iterations - before.iterations
            round_ = {
                part: (getattr(after, part) - getattr(before, part)) / count for part in _PARTS
            }
            device = (after.device_s - before.device_s) / count
            round_["hand_over_s"] = device - round_["forward_s"] - round_["sample_s"]
            round_["iteration_s"] = seconds / count
            overhead = sum(round_[part] for part in _PARTS if part != "forward_s")
            round_["overhead"] = overhead / round_["iteration_s"]
            if turn:
                rounds.append(round_)
    return rounds


# Where a function that cProfile names belongs; the first match counts.
_KINDS: Final = (
    ("mkldnn", "matrix products (oneDNN)"),
    ("'torch._C._nn.linear'", "matrix products"),
    ("compiled.py", "compiled kernels"),
    ("packing.py", "packing the batch"),
    ("choosing", "sampling"),
    ("sampling.py", "sampling"),
    ("torch.empty", "allocating outputs"),
)


def _profile(args: argparse.Namespace, model: Path) -> dict[str, float]:
    """Which share of the executor's own time goes where, over 200 iterations."""
    import torch

    from ..runtime.config import CacheConfig
    from ..runtime.executor import Executor
    from ..runtime.loading import load_model
    from ..runtime.sampling import SamplingState
    from ..runtime.step import SequenceStep
    from ..runtime.types import SamplingParams
    from ..streams.device import resolve_device

    torch.set_num_threads(args.threads)
    device = resolve_device(args.device)
    loaded = load_model(model, device=device, dtype=args.dtype)
    executor = Executor.create(
        loaded, device=device, cache=CacheConfig(), max_num_batched_tokens=512
    )
    context = args.prompt + args.tokens // 2
    pages = -(-(context + 1) // executor.page_size)
    params = SamplingParams(temperature=args.temperature, top_p=args.top_p).resolve({})
    steps = [
        SequenceStep(
            token_ids=[1],
            start=context,
            block_table=list(range(row * pages, (row + 1) * pages)),
            sampling=SamplingState(params, [1], [], frozenset(), row, seed=0),
        )
        for row in range(args.batch)
    ]
    for _ in range(20):
        executor.execute(steps)
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(200):
        executor.execute(steps)
    profiler.disable()
    spent: dict[str, float] = {}
    for (file, _line, name), (_, _, own, _, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        where = f"{file} {name}"
        kind = next((kind for mark, kind in _KINDS if mark in where), "the rest of Python")
        spent[kind] = spent.get(kind, 0.0) + own
    total = sum(spent.values())
    return {kind: own / total for kind, own in sorted(spent.items(), key=lambda item: -item[1])}
