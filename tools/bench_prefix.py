"""How much sooner the first token comes when the prompt's beginning is cached.

    cotune bench prefix --shape medium --dtype bfloat16

Each round asks, one after the other: a prompt whose 512-token prefix was never seen (cold), and one
whose prefix was (warm); both end in 32 tokens of their own. Better is: a higher cold / warm ratio
of TTFT.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .bench_models import SHAPES, make_model
from .bench_report import environment, print_json, show, spread
from .options import loop_factory

if TYPE_CHECKING:
    import argparse

NAME: Final = "prefix"
HELP: Final = "time to first token with and without a cached prefix"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--shape", choices=sorted(SHAPES), default="medium", help="model (medium)")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    parser.add_argument("--threads", type=int, default=2, help="intra-op threads on a CPU (2)")
    parser.add_argument("--prefix", type=int, default=512, help="tokens shared (512)")
    parser.add_argument("--suffix", type=int, default=32, help="tokens of each prompt's own (32)")
    parser.add_argument("--repeats", type=int, default=10, help="rounds that count (10)")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark and print its figures."""
    with tempfile.TemporaryDirectory(prefix="cotune-bench-") as directory:
        model = make_model(Path(directory), args.shape, args.dtype)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            cold, warm = runner.run(_measure(args, model))
    ratio = [c / w for c, w in zip(cold, warm, strict=True)]
    print(f"{args.shape} {args.dtype}: prefix {args.prefix} + {args.suffix} tokens")
    print(f"  cold TTFT    {show([c * 1e3 for c in cold])} ms, median (min to max)")
    print(f"  warm TTFT    {show([w * 1e3 for w in warm])} ms")
    print(f"  cold / warm  {show(ratio)}")
    result: dict[str, Any] = {
        "benchmark": NAME,
        "shape": args.shape,
        "dtype": args.dtype,
        "cold_ttft_s": spread(cold),
        "warm_ttft_s": spread(warm),
        "ratio": spread(ratio),
        "environment": environment(),
    }
    print_json(result)
    return 0


async def _measure(args: argparse.Namespace, model: Path) -> tuple[list[float], list[float]]:
    from ..runtime.runtime import Runtime
    from ..runtime.types import SamplingParams

    draw = random.Random(args.seed)
    vocab_size = SHAPES[args.shape]["vocab_size"]

    def tokens(count: int) -> list[int]:
        return [draw.randrange(1, vocab_size) for _ in range(count)]

    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    async with Runtime(
        model, args.device, dtype=args.dtype, inference_threads=args.threads
    ) as runtime:

        async def ttft(prompt: list[int], cached: int) -> float:
            response = await runtime.complete(prompt, params)
            if response.usage.cached_tokens < cached or (
                not cached and response.usage.cached_tokens
            ):
                raise AssertionError(f"{response.usage.cached_tokens} tokens were cached")
            assert response.timings.ttft_s is not None
            return response.timings.ttft_s

        shared = tokens(args.prefix)
        await ttft(shared + tokens(args.suffix), 0)
        await ttft(shared + tokens(args.suffix), args.prefix - 64)  # warm-up of that path
        cold, warm = [], []
        for _ in range(args.repeats):
            cold.append(await ttft(tokens(args.prefix + args.suffix), 0))
            warm.append(await ttft(shared + tokens(args.suffix), args.prefix - 64))
    return cold, warm
