"""The kernels' attention beside torch's scaled_dot_product_attention.

    cotune bench attention

Decode: 16 sequences of 200 tokens on scattered pages; torch first gathers the pages. Prefill: one
prompt; torch gets keys and values as they are. One layer, shapes of the small and the medium model.
The two take turns; times are the least of all rounds. Better is: a higher ratio.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from .bench_models import SHAPES
from .bench_report import environment, print_json

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    import torch

NAME: Final = "attention"
HELP: Final = "paged attention beside torch's own"
_BATCH, _CONTEXT = 16, 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    parser.add_argument("--threads", type=int, default=1, help="intra-op threads on a CPU (1)")
    parser.add_argument("--repeats", type=int, default=50, help="rounds (50)")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark and print its figures."""
    import torch

    from ..streams.device import resolve_device

    torch.set_num_threads(args.threads)
    device = resolve_device(args.device)
    rows: list[dict[str, Any]] = []
    for shape, dtype in (("small", torch.float32), ("medium", torch.bfloat16)):
        for lengths in ([(_CONTEXT - 1, 1)] * _BATCH, *([(0, n)] for n in (16, 64, 256, 512))):
            with torch.inference_mode():
                name, ours, theirs = _compare(shape, dtype, lengths, device, args.repeats)
            what = f"{shape} {str(dtype).removeprefix('torch.')}, " + (
                f"decode {_BATCH} x {_CONTEXT}" if len(lengths) > 1 else f"prefill {lengths[0][1]}"
            )
            print(
                f"{what:36} {ours * 1e6:8.0f} us  torch {theirs * 1e6:8.0f} us  "
                f"x {theirs / ours:.1f}  ({name})"
            )
            rows.append({"case": what, "ours_s": ours, "torch_s": theirs, "kernels": name})
    print_json({"benchmark": NAME, "rows": rows, "environment": environment()})
    return 0


def _compare(
    shape: str,
    dtype: torch.dtype,
    lengths: list[tuple[int, int]],
    device: torch.device,
    repeats: int,
) -> tuple[str, float, float]:
    """The kernels' name, and the least seconds of ours and of torch's."""
    import torch
    import torch.nn.functional as F

    from ..runtime.kernels.choose import choose_kernels, scattered_batch
    from ..runtime.kernels.plain import HeadShape, LayerAttention

    model = SHAPES[shape]
    heads, kv_heads = model["num_attention_heads"], model["num_key_value_heads"]
    dim = model["hidden_size"] // heads
    layer = LayerAttention(index=0, scaling=dim**-0.5)
    kernels = choose_kernels(
        HeadShape(heads=heads, kv_heads=kv_heads, head_dim=dim), [layer], dtype=dtype, device=device
    )
    batch, pages = scattered_batch(lengths, kernels.page_size, device)
    kernels.allocate(pages)
    tokens = batch.rows.count
    new = torch.randn(3, tokens, kv_heads, dim, device=device).to(dtype)
    kernels.store(layer, new[0], new[1], batch)
    query = torch.randn(tokens, heads * dim, device=device).to(dtype)
    paged = torch.randn(2, pages, kernels.page_size, kv_heads, dim, device=device).to(dtype)
    blocks = batch.block_tables.long()

    def ours() -> torch.Tensor:
        return kernels.attend(layer, query, batch.rows, batch)

    def theirs() -> torch.Tensor:
        if len(lengths) > 1:
            key, value = (
                part[blocks].flatten(1, 2)[:, :_CONTEXT].transpose(1, 2) for part in paged
            )
            q = query.view(tokens, heads, 1, dim)
            return F.scaled_dot_product_attention(q, key, value, enable_gqa=True)
        key, value = (part.transpose(0, 1).unsqueeze(0) for part in new[:2])
        q = query.view(1, tokens, heads, dim).transpose(1, 2)
        return F.scaled_dot_product_attention(q, key, value, is_causal=True, enable_gqa=True)

    best = [float("inf")] * 2
    for _ in range(repeats):
        for index, function in enumerate((ours, theirs)):
            best[index] = min(best[index], _seconds(function, device))
    return kernels.name, best[0], best[1]


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    import torch

    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
