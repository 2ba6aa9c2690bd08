"""One inference engine in a process of its own, driven over stdin and stdout, for comparisons.

    python tools/bench_peers.py cotune       MODEL_DIR DTYPE DEVICE THREADS [ADAPTER_DIR]
    python tools/bench_peers.py transformers MODEL_DIR DTYPE DEVICE THREADS
    python tools/bench_peers.py vllm         MODEL_DIR DTYPE DEVICE THREADS

It loads, prints ``{"ready": ...}``, then for each line ``[[prompt ids, output tokens], ...]`` runs
those requests at once, greedily and past any end of sequence, and prints
``{"seconds": ..., "tokens": ..., "outputs": [...]}``. Engines take turns in an interleaved
benchmark; one that is not asked sleeps.

This file is run by path and imports cotune by name, so that it also runs in an environment where
only the peer is installed.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
import time
from typing import Any, Protocol, TextIO

Requests = list[tuple[list[int], int]]


class Engine(Protocol):
    """What the loop below drives."""

    def generate(self, requests: Requests) -> list[list[int]]:
        """The output tokens of each request."""


class CotuneEngine:
    """cotune, embedded; "adapter" is used for every request where one is given."""

    def __init__(
        self, model: str, dtype: str, device: str, threads: int, adapter: str | None
    ) -> None:
        self._cotune: Any = importlib.import_module("cotune")
        settings: dict[str, Any] = {"dtype": dtype, "inference_threads": threads}
        if adapter is not None:
            settings["adapters"] = {"adapter": adapter}
        self._name = None if adapter is None else "adapter"
        self._runner = asyncio.Runner(loop_factory=_loop_factory())
        self._runtime = self._cotune.Runtime(model, device, **settings)
        self._runner.run(self._runtime.__aenter__())

    def generate(self, requests: Requests) -> list[list[int]]:
        """The output tokens of each request."""
        return self._runner.run(self._generate(requests))

    async def _generate(self, requests: Requests) -> list[list[int]]:
        async def one(prompt: list[int], tokens: int) -> list[int]:
            params = self._cotune.SamplingParams(
                max_tokens=tokens, temperature=0.0, ignore_eos=True
            )
            response = await self._runtime.complete(prompt, params, model=self._name)
            return list(response.token_ids)

        return list(await asyncio.gather(*(one(*request) for request in requests)))

    def describe(self) -> dict[str, Any]:
        """What the engine chose, and where its time went so far."""
        s = self._runtime.statistics()
        spent = {
            name: getattr(s, name)
            for name in (
                "iterations",
                "device_s",
                "forward_s",
                "sample_s",
                "plan_s",
                "commit_s",
                "deliver_s",
                "generated_tokens",
            )
        }
        return {"choices": {k: str(v) for k, v in self._runtime.describe().items()}, "spent": spent}


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


class TransformersEngine:
    """transformers' own continuous batching."""

    def __init__(self, model: str, dtype: str, device: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

        torch.set_num_threads(threads)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        self._manager = (
            loaded.to(device)
            .eval()
            .init_continuous_batching(
                generation_config=GenerationConfig(
                    max_new_tokens=16, do_sample=False, eos_token_id=-1, pad_token_id=0
                ),
                continuous_batching_config=ContinuousBatchingConfig(
                    num_blocks=256, page_size=64, max_batch_tokens=512, allow_block_sharing=False
                ),
            )
        )
        self._manager.start()

    def generate(self, requests: Requests) -> list[list[int]]:
        """The output tokens of each request."""
        order = {
            self._manager.add_request(prompt, max_new_tokens=tokens): index
            for index, (prompt, tokens) in enumerate(requests)
        }
        outputs: list[list[int]] = [[] for _ in requests]
        missing = len(requests)
        while missing:
            result = self._manager.get_result(timeout=60)
            if result is None:
                raise RuntimeError("transformers' continuous batching gave no result for 60 s")
            if result.is_finished():
                outputs[order[result.request_id]] = list(result.generated_tokens)
                missing -= 1
        return outputs


class VllmEngine:
    """vLLM, offline."""

    def __init__(self, model: str, dtype: str, threads: int) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{threads - 1}")
        from vllm import LLM

        self._llm: Any = LLM(
            model=model,
            dtype=dtype,
            max_model_len=2048,
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
            seed=0,
        )

    def generate(self, requests: Requests) -> list[list[int]]:
        """The output tokens of each request."""
        from vllm import SamplingParams

        results = self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in requests],
            [
                SamplingParams(
                    temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
                )
                for _, tokens in requests
            ],
            use_tqdm=False,
        )
        return [list(result.outputs[0].token_ids) for result in results]


def make_engine(
    name: str, model: str, dtype: str, device: str, threads: int, adapter: str | None
) -> Engine:
    """The engine of a name."""
    if name == "cotune":
        return CotuneEngine(model, dtype, device, threads, adapter)
    if name == "transformers":
        return TransformersEngine(model, dtype, device, threads)
    if name == "vllm":
        return VllmEngine(model, dtype, threads)
    raise SystemExit(f"no engine {name!r}; use cotune, transformers or vllm")


def _say(channel: TextIO, value: dict[str, Any]) -> None:
    channel.write(json.dumps(value) + "\n")
    channel.flush()


def main(argv: list[str]) -> int:
    """Run one engine until stdin ends."""
    # Libraries print to stdout as they please; ours is kept for answers.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    name, model, dtype, device, threads, *rest = argv
    engine = make_engine(name, model, dtype, device, int(threads), rest[0] if rest else None)
    engine.generate([([1, 2, 3], 4)])
    describe = getattr(engine, "describe", None)
    _say(channel, {"ready": name, "about": describe() if describe else {}})
    for line in sys.stdin:
        requests: Requests = [(list(prompt), int(tokens)) for prompt, tokens in json.loads(line)]
        began = time.perf_counter()
        outputs = engine.generate(requests)
        seconds = time.perf_counter() - began
        answer: dict[str, Any] = {
            "seconds": seconds,
            "tokens": sum(len(output) for output in outputs),
            "outputs": outputs,
        }
        if describe:
            answer["about"] = describe()
        _say(channel, answer)
    os._exit(0)  # engines differ in how long they take to stop, and in whether they do


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
