"""Everything that only a card can show, in one command, as figures.

    python -m cotune.tools.gpu_check --output gpu_check.json
    python -m cotune.tools.gpu_check --device cpu --quick --output dry_run.json

Sections, each on its own: one that fails is reported with its traceback, and the others run.

    environment   card, driver, torch, which kernels and which way of decoding were chosen
    attention     the paged attention kernel against plain torch: error and time by its settings
    parity        greedy tokens against transformers, with and without an adapter
    graphs        decode from CUDA graphs against kernel by kernel: logits, time per iteration
    overlap       decode with and without training beside it, training with and without decode,
                  and a trace in which kernels of both streams run at once
    publication   adapter versions that go live while clients stream
    memory        another process takes memory while requests run
    exhaustion    training that runs out of memory, injected and real, while decode goes on

The output holds one entry per section: `ok`, `seconds`, and its figures or its error. It is written
after every section, so that a run that is cut short leaves what it has. The trace lies beside it.
Sections that would begin after `--limit-s` are left out, and said to be.

Better is: `ok` everywhere; under overlap, `tbt_ratio` (p99 with training over p99 alone) and
`training_share` (training beside decode over training alone) as near to 1 as can be.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .bench_models import SHAPES
from .bench_report import environment, print_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .gpu_check_case import Check

NAME: Final = "gpu_check"
SECTIONS: Final = (
    "environment",
    "attention",
    "parity",
    "graphs",
    "overlap",
    "publication",
    "memory",
    "exhaustion",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    parser.add_argument(
        "--shape", choices=sorted(SHAPES), help="random model (large on a card, else small)"
    )
    parser.add_argument("--dtype", help="bfloat16, float16 or float32 (bfloat16 on a card)")
    parser.add_argument("--quick", action="store_true", help="a dry run: little of everything")
    parser.add_argument(
        "--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="which (all)"
    )
    parser.add_argument(
        "--limit-s", type=float, default=420.0, help="begin no section after this long (420)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the sections and print their figures. 0 if all that ran were in order."""
    import torch

    from ..streams.device import resolve_device
    from .gpu_check_case import Check
    from .gpu_check_sections import SECTION_FUNCTIONS

    device = resolve_device(args.device)
    is_card = device.type == "cuda"
    if not is_card:
        torch.set_num_threads(1)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="cotune-check-") as directory:
        check = Check(
            device=device,
            shape=args.shape or ("large" if is_card and not args.quick else "small"),
            dtype=args.dtype or ("bfloat16" if is_card else "float32"),
            is_quick=args.quick,
            directory=Path(directory),
            output=args.output.parent,
        )
        result = perform(
            check,
            {name: SECTION_FUNCTIONS[name] for name in args.sections},
            args.output,
            limit_s=args.limit_s,
        )
    print_json({"benchmark": NAME, **result})
    return 0 if all(entry["ok"] is not False for entry in result["sections"].values()) else 1


def perform(
    check: Check,
    sections: Mapping[str, Callable[[Check], dict[str, Any]]],
    output: Path,
    *,
    limit_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Run each section by itself, and write what there is after each.

    A section gives figures; `ok` among them is its own verdict (True where it gives none).
    """
    began_s = clock()
    found: dict[str, Any] = {}
    result = {
        "device": str(check.device),
        "shape": check.shape,
        "dtype": check.dtype,
        "quick": check.is_quick,
        "environment": environment(),
        "sections": found,
    }
    for name, section in sections.items():
        started_s = clock()
        if started_s - began_s >= limit_s:
            found[name] = {"ok": None, "seconds": 0.0, "skipped": f"{limit_s:g} s were used up"}
        else:
            entry: dict[str, Any]
            try:
                entry = {"ok": True, **section(check)}
            except Exception as error:  # noqa: BLE001 - reported; the others are to run
                entry = {
                    "ok": False,
                    "error": f"{type(error).__name__}: {error}",
                    "traceback": traceback.format_exc(),
                }
            found[name] = {**entry, "seconds": clock() - started_s}
        _show(name, found[name])
        output.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def _show(name: str, entry: Mapping[str, Any]) -> None:
    verdict = {True: "ok", False: "FAILED", None: "left out"}[entry["ok"]]
    print(f"{name:12} {verdict}  {entry['seconds']:.1f} s", flush=True)
    for key, value in entry.items():
        if key not in ("ok", "seconds", "traceback"):
            print(f"    {key}: {json.dumps(value)}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m cotune.tools.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
