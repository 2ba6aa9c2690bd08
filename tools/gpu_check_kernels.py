"""`gpu_check`, what the card is and what it computes: environment, attention, parity."""

from __future__ import annotations

import copy
import dataclasses
import time
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from ..runtime.lora import read_lora
from ..streams.device import describe_device
from ..streams.memory import MemoryProbe
from .bench_models import SHAPES
from .gpu_check_batch import Batch, random_prompts

if TYPE_CHECKING:
    from collections.abc import Callable

    from .gpu_check_case import Check

TIE: Final = {"float32": 1e-3, "bfloat16": 0.12, "float16": 0.03}
"""How far below the best logit a chosen token may lie, as a share of the logits' spread: what
rounding does to two tokens that are equally likely."""


# -- environment -----------------------------------------------------------------------------------


def check_environment(check: Check) -> dict[str, Any]:
    """What there is, and what was chosen on it."""
    about = describe_device(check.device)
    reading = MemoryProbe(check.device)
    figures: dict[str, Any] = {
        "device": dataclasses.asdict(about),
        "memory_source": reading.source,
        "memory": dataclasses.asdict(reading.read()),
        "flash_attention": torch.nn.attention.current_flash_attention_impl() or "torch's own (2)",
    }
    if check.is_card:
        from torch.cuda import green_contexts

        figures["cuda"] = torch.version.cuda
        figures["green_contexts"] = bool(green_contexts.SUPPORTED)
        figures["allocator"] = torch.cuda.get_allocator_backend()
    began_s = time.perf_counter()
    loaded = check.load()
    loaded_s = time.perf_counter() - began_s
    executor = check.executor(loaded)
    figures["executor"] = executor.describe()
    figures["load_s"], figures["prepare_s"] = loaded_s, time.perf_counter() - began_s - loaded_s
    found = executor.recorded_decodes()
    figures["recorded_decodes"] = None if found is None else dataclasses.asdict(found)
    if check.is_card:
        about_executor = executor.describe()
        figures["ok"] = "paged" in about_executor["attention"] and found is not None
    return figures


# -- attention -------------------------------------------------------------------------------------


def check_attention(check: Check) -> dict[str, Any]:
    """The card's paged attention against plain torch, by number of splits."""
    from ..runtime.kernels.choose import choose_kernels, compare, scattered_batch
    from ..runtime.kernels.plain import HeadShape, LayerAttention, PlainKernels

    shape_of = SHAPES[check.shape]
    heads = shape_of["num_attention_heads"]
    shape = HeadShape(
        heads=heads,
        kv_heads=shape_of["num_key_value_heads"],
        head_dim=shape_of["hidden_size"] // heads,
    )
    layer = LayerAttention(index=0, scaling=shape.head_dim**-0.5)
    dtype = getattr(torch, check.dtype)
    chosen = choose_kernels(shape, [layer], dtype=dtype, device=check.device)
    figures: dict[str, Any] = {"chosen": chosen.name, "error": compare(chosen, layer)}
    if not check.is_card:
        return figures
    from ..runtime.kernels.cuda import CudaKernels
    from ..runtime.kernels.paged_triton import TritonKernels

    rows = []
    candidates: list[tuple[str, PlainKernels]] = []
    for splits in (1, None, 4):
        varlen = CudaKernels(shape, layers=1, dtype=dtype, device=check.device)
        varlen.num_splits = splits
        candidates.append((f"varlen_attn, num_splits={splits}", varlen))
    triton = TritonKernels(shape, layers=1, dtype=dtype, device=check.device)
    for name, kernels in (*candidates, ("Triton", triton)):
        entry: dict[str, Any] = {"kernels": name}
        try:
            entry["error"] = compare(kernels, layer)
            for count, context in ((1, 4000), (32, 1000), (128, 500)):
                batch, pages = scattered_batch(
                    [(context, 1)] * count, kernels.page_size, check.device
                )
                kernels.allocate(pages)
                query = torch.randn(count, heads * shape.head_dim, device=check.device).to(dtype)
                entry[f"ms_{count}x{context}"] = _time_on_card(
                    check.device, partial(kernels.attend, layer, query, batch.rows, batch)
                )
        except Exception as error:  # noqa: BLE001 - reported; the others are to run
            entry["refused"] = f"{type(error).__name__}: {error}".splitlines()[0]
        rows.append(entry)
    figures["by_kernels"] = rows
    figures["ok"] = "paged" in chosen.name
    return figures


def _time_on_card(device: torch.device, call: Callable[[], object], repeats: int = 50) -> float:
    """Milliseconds of one call, by events."""
    cuda: Any = torch.cuda
    for _ in range(3):
        call()
    began, ended = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    began.record()
    for _ in range(repeats):
        call()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / repeats


# -- parity ----------------------------------------------------------------------------------------


def check_parity(check: Check) -> dict[str, Any]:
    """Greedy tokens against transformers, packed with others, with and without an adapter."""
    import peft

    loaded = check.load()
    executor = check.executor(loaded)
    executor.install_adapter(1, read_lora(check.adapter(), loaded.model, max_rank=64))
    prompts = random_prompts(check.amount(8, 4), (20, 300), loaded.vocab_size, seed=1)
    slots = [row % 2 for row in range(len(prompts))]
    batch = Batch(executor, prompts, 64, slots)
    batch.prefill()
    batch.decode(check.amount(48, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        adapted: Any = peft.PeftModel.from_pretrained(
            copy.deepcopy(loaded.model), str(check.adapter())
        )
    same = total = 0
    worst = 0.0
    for prompt, output, slot in zip(prompts, batch.outputs, slots, strict=True):
        model: Any = adapted if slot else loaded.model
        ids = torch.tensor([[*prompt, *output[:-1]]], device=check.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float()
        chosen = logits.gather(1, torch.tensor(output, device=check.device)[:, None])[:, 0]
        gap = (logits.amax(1) - chosen) / logits.std(1)
        same += int((gap == 0).sum())
        total += len(output)
        worst = max(worst, float(gap.amax()))
    return {
        "tokens": total,
        "same_share": same / total,
        "worst_gap": worst,
        "tolerance": TIE[check.dtype],
        "decode": executor.describe()["decode"],
        "ok": worst <= TIE[check.dtype],
    }
