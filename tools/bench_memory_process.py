"""One runtime in a process of its own, led through stages over stdin and stdout.

    python -m cotune.tools.bench_memory_process SETTINGS

SETTINGS is JSON, made by `bench_memory`. For each line that it reads, the name of a stage, it goes
through that stage and says ``{"rss_bytes": ..., "peak_rss_bytes": ..., "held_bytes": ...}``; to
``describe`` it says the sizes of what it holds. It ends when stdin does.

Half of the steps' prompts train, over and over; feedback on others is held out and comes at last,
so that no candidate is made before the stage that is named after it. The gate's limits are wide:
what is measured here is what a publication takes, not whether it is deserved.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import importlib
import json
import os
import random
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .bench_memory import (
    ANSWERED,
    IMPORTS,
    PUBLISHED,
    SCORED,
    SERVING,
    TRAINED,
    TRAINER,
    TRAINING_IMPORTS,
)
from .bench_train_peers import memory

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from ..runtime.learning.config import LearningConfig
    from ..runtime.learning.learner import Learner
    from ..runtime.runtime import Runtime
    from ..runtime.types import Response

NAME: Final = "bench"
HELD_OUT: Final = 8
HELD_OUT_SHARE: Final = 0.2
DEADLINE_S: Final = 900.0
PATIENCE_S: Final = 0.05
"""Between two looks at how far learning is."""
LIKED: Final = "Certainly, with pleasure. "
"""What every answer should have been, again and again to its length: easy to learn."""


async def lead(settings: dict[str, Any]) -> None:
    """Go through the stages as they are asked for."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # stdout itself is left to the libraries
    async with AsyncExitStack() as stack:
        stages = _Stages(settings, stack)
        while word := (await asyncio.to_thread(sys.stdin.readline)).strip():
            if word == "describe":
                answer = await stages.describe()
            else:
                _forget_peak()
                await stages.perform(word)
                gc.collect()
                answer = memory()
                _return_unused()
                answer["held_bytes"] = memory()["rss_bytes"]
            out.write(json.dumps(answer) + "\n")
            out.flush()


class _Stages:
    """What happens in each stage. The runtime is closed by `stack`."""

    def __init__(self, settings: dict[str, Any], stack: AsyncExitStack) -> None:
        self._settings = settings
        self._stack = stack
        self._learns: bool = settings["learning"]
        self._runtime: Runtime
        draw = random.Random(0)
        self._training = [self._prompt(draw, False) for _ in range(2 * settings["pairs"])]
        self._held_out = [self._prompt(draw, True) for _ in range(HELD_OUT)]
        self._answers: dict[tuple[int, ...], Response] = {}

    async def perform(self, stage: str) -> None:
        """Go through one of `STAGES`, and wait until everything that it started has ended."""
        steps: dict[str, Callable[[], Awaitable[None]]] = {
            IMPORTS: self._import,
            SERVING: self._serve,
            ANSWERED: self._answer,
            SCORED: self._score,
            TRAINING_IMPORTS: self._import_training,
            TRAINER: self._make_trainer,
            TRAINED: self._train,
            PUBLISHED: self._publish,
        }
        await steps[stage]()

    async def _import(self) -> None:
        for name in ("torch", "transformers", "cotune.runtime.runtime"):
            importlib.import_module(name)

    async def _import_training(self) -> None:
        if self._learns:
            for name in ("peft", "cotune.runtime.training.trainer"):
                importlib.import_module(name)

    async def _make_trainer(self) -> None:
        if self._learns:  # otherwise it would be made for the first batch
            await self._learner._ready_trainer()

    async def _train(self) -> None:
        await self._answer()
        if self._learns:
            await self._edit(self._training)
            await self._wait_for(steps=self._settings["steps"], version=0)

    async def _publish(self) -> None:
        if self._learns:
            await self._edit(self._held_out)
            await self._wait_for(steps=0, version=1)
        await self._answer()  # under the new version
        await self._score()

    async def describe(self) -> dict[str, Any]:
        """Sizes in bytes."""
        from torch import nn

        described = self._runtime.describe()
        model = self._runtime._served.loaded.model
        linears = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
        is_prepacked = str(described["linears"]).startswith("prepacked")
        sizes: dict[str, Any] = {
            "base_bytes": sum(p.nbytes for p in model.parameters()),
            "linears": described["linears"],
            "prepacked_bytes": sum(weight.nbytes for weight in linears) if is_prepacked else 0,
            "kv_bytes": int(str(described["kv_bytes"])),
        }
        if self._learns:
            learner = self._learner
            sizes["needs"] = await learner._job("needs", _needs, learner, self._settings["pairs"])
        return sizes

    async def _serve(self) -> None:
        from ..runtime.runtime import Runtime

        settings = self._settings
        runtime = Runtime(
            settings["model"],
            "cpu",
            served_name=NAME,
            inference_threads=settings["threads"],
            num_pages=settings["pages"],
            learning=self._learning() if self._learns else False,
        )
        self._runtime = await self._stack.enter_async_context(runtime)
        self._touch_pages()

    def _touch_pages(self) -> None:
        """Make all KV pages resident; nobody uses them yet."""
        import torch

        executor: Any = self._runtime._served.executor
        with torch.inference_mode():
            for pages in (*executor._kernels.keys, *executor._kernels.values):
                pages.zero_()

    def _learning(self) -> LearningConfig:
        from ..runtime.learning.config import GateConfig, LearningConfig, TrainingConfig

        settings = self._settings
        return LearningConfig(
            enabled=True,
            state_dir=Path(settings["state_dir"]),
            training=TrainingConfig(
                batch_size=settings["pairs"],
                epochs=settings["steps"] // 2,
                replay_share=0.0,
                warmup_steps=0,
                threads=settings["threads"],
            ),
            gate=GateConfig(
                held_out_share=HELD_OUT_SHARE,
                min_held_out=HELD_OUT,
                candidate_steps=1,
                max_probe_increase=100.0,
                min_entropy_ratio=0.0,
                max_repetition=1.0,
                max_chosen_drop=100.0,
            ),
        )

    async def _answer(self) -> None:
        """Answer every prompt."""
        from ..runtime.types import SamplingParams

        params = SamplingParams(
            temperature=1.0, seed=0, max_tokens=self._settings["completion"], ignore_eos=True
        )
        prompts = [*self._training, *self._held_out]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._ask(prompt, params)) for prompt in prompts]
        self._answers = {prompt: task.result() for prompt, task in zip(prompts, tasks, strict=True)}

    async def _ask(self, prompt: tuple[int, ...], params: Any) -> Response:
        return await self._runtime.complete(prompt, params)

    async def _score(self) -> None:
        """What the gate asks of a version, here of the base model."""
        from ..runtime.learning.examiner import Examiner
        from ..runtime.learning.probe import read_probe
        from ..runtime.types import BASE

        runtime = self._runtime
        texts = [tuple(runtime.codec.encode(text)) for text in read_probe(None)]
        await Examiner(runtime._served.background, texts, max_length=runtime.max_model_len).probe(
            BASE
        )

    async def _edit(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Say what the answers should have been."""
        length = self._settings["completion"] - 1  # and the end of the turn
        liked = (LIKED * (length // len(LIKED) + 1))[:length]
        for prompt in prompts:
            response_id = self._answers[prompt].id
            await self._runtime.feedback(
                {"id": response_id, "type": "edit", "response_id": response_id, "text": liked}
            )

    async def _wait_for(self, *, steps: int, version: int) -> None:
        """Wait until so many steps have been taken and that version is live."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                (now,) = self._runtime.learning().adapters
                if now.steps >= steps and now.live_version >= version and now.phase == "idle":
                    return
                if now.phase == "stopped" or now.candidates_refused:
                    raise RuntimeError(f"learning went wrong: {now.phase}, {now.last_verdict}")
                await asyncio.sleep(PATIENCE_S)

    @property
    def _learner(self) -> Learner:
        learning = self._runtime._served.learning
        assert learning is not None
        return learning._learners[NAME]

    def _prompt(self, draw: random.Random, is_for_gate: bool) -> tuple[int, ...]:
        """A random prompt, on that side of the split."""
        from ..runtime.learning.samples import is_held_out

        while True:
            prompt = tuple(draw.randrange(8, 4096) for _ in range(self._settings["prompt"]))
            if is_held_out(NAME, prompt, HELD_OUT_SHARE) == is_for_gate:
                return prompt


def _needs(learner: Learner, pairs: int) -> dict[str, int]:
    """What training needs, in bytes; on the training lane, between two batches."""
    import torch

    trainer: Any = learner._trainer
    lora = sum(parameter.nbytes for parameter in trainer._parameters)
    assert learner._good is not None
    anchors = [linear._anchor or () for linear in trainer._tree._linears.values()]
    copies = {  # one that two of them hold counts once
        tensor.untyped_storage().data_ptr(): tensor.nbytes
        for tensors in (
            trainer._initial.values(),
            (trainer._anchor or {}).values(),
            learner._good.trainer.tensors.values(),
            *anchors,
        )
        for tensor in tensors
    }
    known = {
        parameter.untyped_storage().data_ptr()
        for parameter in (*trainer._model.parameters(), *trainer._parameters)
    }
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        trainer.begin(learner._held_out[:pairs])
        assert trainer.next_quantum().kind == "forward"
        trainer.run_quantum()
    trainer.abandon()
    return {
        "masters": lora,
        "gradients": lora,
        "moments": 2 * lora,
        "kept": sum(copies.values()),
        "served": 2 * lora + lora * trainer._model.dtype.itemsize // 4,  # stacked, in its dtype
        "activations": sum(saved.values()),
    }


def _return_unused() -> None:
    """Let the allocator give back to the system what was freed, where it can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _forget_peak() -> None:
    """Let the system count the peak from now on, where it can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return  # then it is the peak since the start


if __name__ == "__main__":
    asyncio.run(lead(json.loads(sys.argv[1])))
