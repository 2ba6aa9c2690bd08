"""Training steps per second and peak memory, beside TRL's DPOTrainer, in one interleaved run.

    cotune bench train
    cotune bench train --threads 1 --steps 3 --shape small

Each trainer runs in a process of its own and takes its turn, one optimizer step at a time, on the
same pairs, base model, LoRA and dtype; a slow moment of the machine meets them all. `trl` is the
DPOTrainer as it comes: activations checkpointed, the reference computed in each step. `trl-fast` is
it at its fastest: nothing checkpointed, the reference computed beforehand (cotune: on arrival).

Better is: a higher ratio of steps per second, a lower ratio of peak memory. Memory is the
process's greatest resident size, libraries included, and beside it the part that was not there
before the first step.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import CotuneError
from .bench_models import SHAPES, make_model
from .bench_report import environment, print_json, show, spread

if TYPE_CHECKING:
    import argparse

TRAINERS = ("cotune", "trl", "trl-fast")
_MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--shape", choices=sorted(SHAPES), default="medium", help="model (medium)")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=2, help="intra-op threads of each (2)")
    parser.add_argument("--pairs", type=int, default=4, help="pairs of a step (4)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt (128)")
    parser.add_argument("--completion", type=int, default=128, help="tokens of a completion (128)")
    parser.add_argument("--steps", type=int, default=5, help="steps that count (5)")
    parser.add_argument(
        "--trainers",
        nargs="+",
        choices=TRAINERS,
        default=list(TRAINERS),
        help="which to run (all; trl is installed with cotune[test])",
    )


def run(args: argparse.Namespace) -> int:
    """Run the benchmark and print its figures."""
    with tempfile.TemporaryDirectory(prefix="cotune-bench-") as directory:
        model = make_model(Path(directory), args.shape, args.dtype)
        file = Path(directory) / "pairs.json"
        file.write_text(json.dumps(_pairs(args)), encoding="utf-8")
        trainers: list[_Process] = []
        try:
            for name in args.trainers:
                trainers.append(_Process(name, model, args.threads, file))
                trainers[-1].ready()
            for turn in range(args.steps + 1):  # the first does not count
                for trainer in trainers:
                    trainer.step(counts=turn > 0)
        finally:
            for trainer in trainers:
                trainer.close()
    _print(args, trainers)
    return 0


class _Process:
    """A trainer's process and what it said."""

    def __init__(self, name: str, model: Path, threads: int, pairs: Path) -> None:
        self.name = name
        self.steps: list[dict[str, float]] = []
        self.before: dict[str, Any] = {}
        self.peak_bytes = 0
        # Libraries are talkative; it is shown when the process fails.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in close()
        script = Path(__file__).with_name("bench_train_peers.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), name, str(model), str(threads), str(pairs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
        )

    def ready(self) -> None:
        """Wait until it has loaded."""
        self.before = self._answer()

    def step(self, *, counts: bool) -> None:
        """Let it take one optimizer step."""
        assert self._process.stdin is not None, "it was opened as a pipe"
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.peak_bytes = int(answer["peak_rss_bytes"])
        if counts:
            self.steps.append(answer)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None, "it was opened as a pipe"
        self._process.stdin.close()
        self._process.wait(timeout=60)
        assert self._process.stdout is not None, "it was opened as a pipe"
        self._process.stdout.close()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None, "it was opened as a pipe"
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._log.seek(0)
            raise CotuneError(
                f"{self.name} ended with status {status} and said:\n{self._log.read()[-4000:]}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    @property
    def seconds(self) -> list[float]:
        """Of each step that counts."""
        return [step["seconds"] for step in self.steps]

    @property
    def working_bytes(self) -> int:
        """What the peak is above the size before the first step."""
        return self.peak_bytes - int(self.before["rss_bytes"])


def _pairs(args: argparse.Namespace) -> list[list[list[int]]]:
    draw = random.Random(0)
    vocab_size = SHAPES[args.shape]["vocab_size"]

    def tokens(count: int) -> list[int]:
        return [draw.randrange(2, vocab_size) for _ in range(count)]

    return [
        [tokens(args.prompt), *([*tokens(args.completion - 1), 0] for _ in range(2))]
        for _ in range(args.pairs)
    ]


def _print(args: argparse.Namespace, trainers: list[_Process]) -> None:
    print(
        f"{args.shape} {args.dtype}, {args.threads} threads, {args.pairs} pairs of "
        f"{args.prompt} + {args.completion} tokens, LoRA r=8 on all linears"
    )
    print(f"{'':10} {'s per step':>22} {'CPU s':>7} {'loss':>7} {'peak MiB':>9} {'of steps':>9}")
    for trainer in trainers:
        print(
            f"{trainer.name:10} {show(trainer.seconds):>22} "
            f"{statistics.median(s['cpu_seconds'] for s in trainer.steps):7.2f} "
            f"{trainer.steps[-1]['loss']:7.4f} {trainer.peak_bytes / _MIB:9.0f} "
            f"{trainer.working_bytes / _MIB:9.0f}"
        )
    ours = next((trainer for trainer in trainers if trainer.name == "cotune"), None)
    ratios: dict[str, dict[str, Any]] = {}
    for peer in trainers if ours is not None else []:
        if ours is None or peer is ours:
            continue
        # Steps that took their turn together are compared with each other.
        faster = [theirs / mine for theirs, mine in zip(peer.seconds, ours.seconds, strict=True)]
        less = ours.peak_bytes / peer.peak_bytes
        ratios[peer.name] = {"steps_per_s": spread(faster), "peak_memory": less}
        print(
            f"cotune / {peer.name}: {show(faster)} times the steps per second, "
            f"{less:.2f} of the peak memory"
        )
    print_json(
        {
            "benchmark": "train",
            "shape": args.shape,
            "dtype": args.dtype,
            "threads": args.threads,
            "pairs": args.pairs,
            "prompt_tokens": args.prompt,
            "completion_tokens": args.completion,
            "ratios": ratios,
            "trainers": {
                trainer.name: {
                    "seconds": trainer.seconds,
                    "cpu_seconds": [step["cpu_seconds"] for step in trainer.steps],
                    "losses": [step["loss"] for step in trainer.steps],
                    "peak_rss_bytes": trainer.peak_bytes,
                    "working_bytes": trainer.working_bytes,
                }
                for trainer in trainers
            },
            "environment": environment(),
        }
    )
