"""`gpu_check`, a whole runtime with clients: publication, memory."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from ..runtime.learning.config import LearningConfig
from ..streams.memory import MemoryProbe
from . import bench_publish
from .gpu_check_batch import GREEDY, random_prompts
from .gpu_check_case import MIB

if TYPE_CHECKING:
    from .gpu_check_case import Check


# -- publication -----------------------------------------------------------------------------------


def check_publication(check: Check) -> dict[str, Any]:
    """Versions of the demo model's adapter that go live while clients stream."""
    parser = argparse.ArgumentParser()
    bench_publish.add_arguments(parser)
    asked = ["--device", str(check.device), "--dtype", check.dtype]
    asked += ["--publications", str(check.amount(4, 1)), "--clients", str(check.amount(8, 2))]
    asked += ["--prefix", str(check.amount(512, 64)), "--answers", str(check.amount(8, 2))]
    directory = check.directory / "publication"
    figures = asyncio.run(bench_publish.measure(parser.parse_args(asked), directory))
    # Rounding may part two answers in half precision, where a tie is wider than the benchmark's.
    is_exact = check.dtype == "float32"
    figures["ok"] = figures["failed_requests"] == 0 and (
        not is_exact or figures["other_tokens"] == 0
    )
    return figures


# -- memory ----------------------------------------------------------------------------------------


_HOG: Final = """
import sys
size, device = int(sys.argv[1]), sys.argv[2]
if device == "cpu":
    taken = bytearray(size)
    taken[::4096] = b"x" * len(taken[::4096])
else:
    import torch
    torch.cuda.init()  # its context takes some hundred MB by itself
    size = max(0, torch.cuda.mem_get_info(device)[0] - size)
    taken = torch.zeros(size, dtype=torch.uint8, device=device)
    torch.cuda.synchronize()
print("taken", size, flush=True)
sys.stdin.readline()
"""


def check_memory(check: Check) -> dict[str, Any]:
    """Another process takes memory while requests run; then it gives it back."""
    return asyncio.run(_memory(check))


async def _memory(check: Check) -> dict[str, Any]:
    from ..runtime.runtime import Runtime

    probe = MemoryProbe(check.device)
    learning = LearningConfig(enabled=True, state_dir=check.directory / "memory")
    figures: dict[str, Any] = {"source": probe.source}
    async with Runtime(
        None,
        str(check.device),
        dtype=check.dtype,
        learning=learning,
        memory_fraction=0.1,
        inference_threads=1,
    ) as runtime:
        figures["before"] = await _readings(check, runtime, probe)
        # All but a little on a card, so that the threshold must give way; next to nothing in a dry
        # run, where the memory is everybody's.
        size = (512 if check.is_card else 256) * MIB
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            _HOG,
            str(size),
            str(check.device),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert process.stdout is not None
            async with asyncio.timeout(90):
                said = await process.stdout.readline()
            if not said.startswith(b"taken"):
                raise RuntimeError("the other process could not take the memory")
            figures["taken_bytes"] = int(said.split()[1])
            figures["during"] = await _readings(check, runtime, probe)
        finally:
            await process.communicate(b"\n")
        figures["after"] = await _readings(check, runtime, probe)
    fell = figures["before"]["available_bytes"] - figures["during"]["available_bytes"]
    figures["fell_by_bytes"] = fell
    served = all(figures[when]["answers"] == 8 for when in ("before", "during", "after"))
    # A dry run shares its memory with everything else on the machine.
    figures["ok"] = served and (not check.is_card or fell > 0.5 * figures["taken_bytes"])
    return figures


async def _readings(check: Check, runtime: Any, probe: MemoryProbe) -> dict[str, Any]:
    """Answer eight requests; what is available meanwhile."""
    prompts = random_prompts(8, (16, 64), runtime._served.loaded.vocab_size, seed=4)
    params = dataclasses.replace(GREEDY, max_tokens=check.amount(64, 8))
    began_s = time.perf_counter()
    answers = await asyncio.gather(*(runtime.complete(prompt, params) for prompt in prompts))
    seconds = time.perf_counter() - began_s
    schedule = runtime.statistics().schedule
    return {
        "answers": sum(len(answer.token_ids) == params.max_tokens for answer in answers),
        "tokens_per_s": sum(len(answer.token_ids) for answer in answers) / seconds,
        "available_bytes": probe.read().available_bytes,
        "memory_threshold": schedule.memory_threshold,
        "near_misses": schedule.near_misses,
        "out_of_memories": schedule.out_of_memories,
    }
