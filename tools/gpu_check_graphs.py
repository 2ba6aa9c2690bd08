"""`gpu_check`, decodes that are replayed from CUDA graphs: graphs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from ..runtime.lora import read_lora
from ..runtime.sampling import SamplingState
from ..runtime.static_decode import relative_difference
from ..runtime.step import SequenceStep
from .gpu_check_batch import GREEDY, Batch, quantiles_ms, random_prompts

if TYPE_CHECKING:
    from ..runtime.executor import Executor
    from ..runtime.loading import LoadedModel
    from .gpu_check_case import Check


def check_graphs(check: Check) -> dict[str, Any]:
    """Decodes replayed and launched kernel by kernel, turn by turn."""
    loaded = check.load()
    most = check.amount(64, 8)
    executors = {
        name: check.executor(loaded, records=name == "replayed", seqs=most)
        for name in ("eager", "replayed")
    }
    weights = read_lora(check.adapter(), loaded.model, max_rank=64)
    for executor in executors.values():
        executor.install_adapter(1, weights)
    figures: dict[str, Any] = {}
    same = total = 0
    for count in sorted({1, 5, most // 2, most}):
        for slot in (0, 1):
            prompts = random_prompts(count, (16, 64), loaded.vocab_size, seed=count)
            seconds: dict[str, list[float]] = {name: [] for name in executors}
            batches = {
                name: Batch(executor, prompts, 256, [slot] * count)
                for name, executor in executors.items()
            }
            for batch in batches.values():
                batch.prefill()
                batch.decode(12)  # recordings with adapters are made while decoding
            for _ in range(check.amount(6, 2)):
                for name, batch in batches.items():
                    seconds[name] += batch.decode(check.amount(25, 4))
            pairs = zip(batches["eager"].outputs, batches["replayed"].outputs, strict=True)
            for one, other in pairs:
                same += one == other
                total += 1
            by_name = {name: quantiles_ms(values) for name, values in seconds.items()}
            ratio = by_name["eager"]["p50"] / by_name["replayed"]["p50"]
            words = f"batch {count}{' with adapters' if slot else ''}"
            figures[words] = {**by_name, "speedup_p50": ratio}
    found = executors["replayed"].recorded_decodes()
    figures["same_answers"] = f"{same} of {total} (others parted at a tie, or are wrong)"
    figures["logits_difference"] = _logits_difference(executors["replayed"], loaded)
    figures["recorded"] = None if found is None else dataclasses.asdict(found)
    figures["ok"] = (
        found is not None
        and found.failed == 0
        and found.replays > 0
        and figures["logits_difference"] is not None
        and figures["logits_difference"] <= 3e-2
    )
    return figures


@torch.inference_mode()
def _logits_difference(executor: Executor, loaded: LoadedModel) -> float | None:
    """Of one batch of decodes, replayed and by the packed forward, relative to their spread."""
    if executor._static is None:
        return None
    params = GREEDY.resolve({})
    prompts = random_prompts(5, (16, 64), loaded.vocab_size, seed=77)
    tables = [[6 * row + page for page in range(6)] for row in range(5)]
    steps = []
    for row, prompt in enumerate(prompts):
        executor.execute([SequenceStep(prompt[:-1], 0, tables[row])])
        state = SamplingState(params, prompt, [], frozenset(), seed=1)
        steps.append(SequenceStep(prompt[-1:], len(prompt) - 1, tables[row], 0, state))
    expected = executor._forward(executor._pack(steps)).clone()
    return relative_difference(executor._static(steps), expected)
