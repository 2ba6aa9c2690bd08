"""Resident memory of a runtime, stage by stage, with learning on and off.

    cotune bench memory
    cotune bench memory --shape small --dtype float32 --steps 4

Two runtimes serve the same model, each in a fresh process, and take their turn stage by stage:
load, answer, score, prepare to train, take feedback and train, publish. Both answer the same
requests and score the same texts, since matrix products keep code and workspace for every new
number of rows, and all KV pages are touched at the start: what remains between them is learning's.
"texts scored", in the process without learning, is what the gate's kind of forwards takes.

The claim under test: base weights exist once. Everything that learning adds is therefore libraries,
adapters and what a training step works with; a second copy of the base would show as at least the
size of its weights, and first of all in the stage "trainer made", where nothing else is large.

Sizes are resident memory as the system counts it, libraries included. `held` is what is in use at
the end of a stage, once the allocator has been asked to return what was freed; `peak` is the
greatest within the stage, what was freed and not returned included.

Better is: less added, and "the rest" of what is held far below the base weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from ..runtime.errors import CotuneError
from .bench_models import SHAPES, make_model
from .bench_report import environment, print_json

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence
    from types import TracebackType

IMPORTS: Final = "libraries imported"
SERVING: Final = "model loaded, serving"
ANSWERED: Final = "requests answered"
SCORED: Final = "texts scored"
TRAINING_IMPORTS: Final = "training's libraries"
TRAINER: Final = "trainer made"
TRAINED: Final = "feedback, steps taken"
PUBLISHED: Final = "version published"
STAGES: Final = (IMPORTS, SERVING, ANSWERED, SCORED, TRAINING_IMPORTS, TRAINER, TRAINED, PUBLISHED)
"""What the processes do, in order. Without learning the last four are answers and scores again, or
nothing."""

_MIB: Final = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--shape", choices=sorted(SHAPES), default="medium", help="model (medium)")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=1, help="intra-op threads of a lane (1)")
    parser.add_argument("--pairs", type=int, default=4, help="pairs of a step (4)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt (128)")
    parser.add_argument("--completion", type=int, default=128, help="tokens of a completion (128)")
    parser.add_argument(
        "--steps", type=int, default=10, help="optimizer steps, an even number (10)"
    )
    parser.add_argument("--pages", type=int, default=512, help="KV pages (512)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Memory of a process at the end of a stage, in bytes.

    Attributes:
        stage: one of `STAGES`.
        held_bytes: resident after the allocator has returned what it holds unused (with glibc).
        rss_bytes: resident before that.
        peak_bytes: most that was resident within the stage, where the system can tell (Linux);
            elsewhere since the start.
    """

    stage: str
    held_bytes: int
    rss_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A stage of both processes.

    Attributes:
        stage: one of `STAGES`.
        off, on: without and with learning.
        added_bytes: what is held more with learning; its change from one stage to the next is what
            the stage added.
        added_peak_bytes: the same of the peaks.
    """

    stage: str
    off: Reading
    on: Reading
    added_bytes: int
    added_peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What training needs, in bytes, from the shapes of the runtime's own trainer.

    Attributes:
        masters: the LoRA parameters, float32.
        gradients, moments: theirs, and AdamW's two of each.
        kept: copies to go back to: the initial weights, the last good state, the anchor.
        served: the published version in host memory, and in its slot.
        activations: what one forward quantum keeps for its backward.
    """

    masters: int
    gradients: int
    moments: int
    kept: int
    served: int
    activations: int

    @property
    def lasting_bytes(self) -> int:
        """All but the activations, which come and go."""
        return self.masters + self.gradients + self.moments + self.kept + self.served


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Where what learning added went, in bytes.

    Attributes:
        base: the base weights.
        libraries: what importing training's libraries added.
        trainer: what making the trainer added to that.
        held: all that learning had added at the end, as held.
        peak: the most that it had added to a stage's peak.
        needs: what training needs.
    """

    base: int
    libraries: int
    trainer: int
    held: int
    peak: int
    needs: Needs

    @property
    def unexplained(self) -> int:
        """What is held and is neither a library nor what training keeps."""
        return self.held - self.libraries - self.needs.lasting_bytes

    @property
    def has_second_copy(self) -> bool:
        """Whether a copy of the base weights could be in what was added."""
        return max(self.trainer, self.unexplained) >= self.base


def rows_of(off: Sequence[Reading], on: Sequence[Reading]) -> list[Row]:
    """Both processes side by side."""
    return [
        Row(
            stage=without.stage,
            off=without,
            on=with_it,
            added_bytes=with_it.held_bytes - without.held_bytes,
            added_peak_bytes=with_it.peak_bytes - without.peak_bytes,
        )
        for without, with_it in zip(off, on, strict=True)
    ]


def account_of(rows: Sequence[Row], base_bytes: int, needs: Needs) -> Account:
    """Sum up; `rows` has every one of `STAGES`."""
    added = {row.stage: row.added_bytes for row in rows}
    return Account(
        base=base_bytes,
        libraries=added[TRAINING_IMPORTS] - added[SCORED],
        trainer=added[TRAINER] - added[TRAINING_IMPORTS],
        held=added[PUBLISHED],
        peak=max(row.added_peak_bytes for row in rows),
        needs=needs,
    )


def statement(account: Account) -> str:
    """The account in words."""
    needs = account.needs
    verdict = (
        "A second copy of the base may be there."
        if account.has_second_copy
        else "There is no second copy of the base."
    )
    return (
        f"Learning holds {_mib(account.held)} MiB more, beside base weights of "
        f"{_mib(account.base)} MiB:\n"
        f"  {_mib(account.libraries):>7} MiB  libraries (peft)\n"
        f"  {_mib(needs.masters):>7} MiB  LoRA masters, float32\n"
        f"  {_mib(needs.gradients):>7} MiB  their gradients, while there are some\n"
        f"  {_mib(needs.moments):>7} MiB  their moments\n"
        f"  {_mib(needs.kept):>7} MiB  copies to go back to: initial, last good state, anchor\n"
        f"  {_mib(needs.served):>7} MiB  the published version, in memory and in its slot\n"
        f"  {_mib(account.unexplained):>7} MiB  the rest, not attributed\n"
        f"At its peak it takes {_mib(account.peak)} MiB more; one quantum's activations are "
        f"{_mib(needs.activations)} MiB of that.\n"
        f"A second copy of the base would be at least {_mib(account.base)} MiB. Making the trainer "
        f"added {_mib(account.trainer)} MiB. {verdict}"
    )


def run(args: argparse.Namespace) -> int:
    """Run the benchmark and print its figures. Status 1: a second copy may be there."""
    if args.steps < 2 or args.steps % 2:
        raise CotuneError(f"--steps is {args.steps}; use an even number, 2 or more")
    with tempfile.TemporaryDirectory(prefix="cotune-bench-") as directory:
        model = make_model(Path(directory), args.shape, args.dtype)
        readings: dict[str, list[Reading]] = {"off": [], "on": []}
        with _Process("off", model, args) as off, _Process("on", model, args) as on:
            for stage in STAGES:
                for process in (off, on):
                    readings[process.name].append(process.advance(stage))
            sizes, needs = off.describe(), on.describe()
    rows = rows_of(readings["off"], readings["on"])
    account = account_of(rows, sizes["base_bytes"], Needs(**needs["needs"]))
    _print(args, rows, sizes, account)
    return 1 if account.has_second_copy else 0


class _Process:
    """A runtime in a process of its own, learning "on" or "off". A context manager."""

    def __init__(self, name: str, model: Path, args: argparse.Namespace) -> None:
        self.name = name
        settings = {
            "learning": name == "on",
            "model": str(model),
            "state_dir": str(model.parent / "state"),
            **{key: getattr(args, key) for key in ("threads", "pairs", "prompt", "completion")},
            **{key: getattr(args, key) for key in ("steps", "pages")},
        }
        # Libraries are talkative; it is shown when the process fails.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cotune.tools.bench_memory_process", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(args.threads)},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._process.kill()
        self._process.communicate(timeout=60)
        self._log.close()

    def advance(self, stage: str) -> Reading:
        """Let it go through a stage."""
        answer = self._ask(stage)
        return Reading(
            stage=stage,
            held_bytes=answer["held_bytes"],
            rss_bytes=answer["rss_bytes"],
            peak_bytes=answer["peak_rss_bytes"],
        )

    def describe(self) -> dict[str, Any]:
        """What the runtime reports of its sizes."""
        return self._ask("describe")

    def _ask(self, word: str) -> dict[str, Any]:
        assert self._process.stdin is not None, "it was opened as a pipe"
        assert self._process.stdout is not None, "it was opened as a pipe"
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._log.seek(0)
            raise CotuneError(
                f"learning {self.name}: its process ended with status {status} and said:\n"
                f"{self._log.read()[-4000:]}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer


def _print(
    args: argparse.Namespace, rows: Sequence[Row], sizes: Mapping[str, Any], account: Account
) -> None:
    print(
        f"{args.shape} {args.dtype}, {args.threads} threads, {args.steps} steps of {args.pairs} "
        f"pairs of {args.prompt} + {args.completion} tokens, LoRA r=8 on all linears"
    )
    print(
        f"base weights {_mib(sizes['base_bytes'])} MiB, linears {sizes['linears']}: "
        f"{_mib(sizes['prepacked_bytes'])} MiB more; KV pages {_mib(sizes['kv_bytes'])} MiB"
    )
    print(f"{'MiB: held, peak':24} {'off':>9} {'':>8} {'on':>9} {'':>8} {'added':>9} {'':>8}")
    for row in rows:
        print(
            f"{row.stage:24} {_mib(row.off.held_bytes):>9} {_mib(row.off.peak_bytes):>8} "
            f"{_mib(row.on.held_bytes):>9} {_mib(row.on.peak_bytes):>8} "
            f"{_mib(row.added_bytes):>9} {_mib(row.added_peak_bytes):>8}"
        )
    print(statement(account))
    print_json(
        {
            "benchmark": "memory",
            "shape": args.shape,
            "dtype": args.dtype,
            "threads": args.threads,
            "steps": args.steps,
            "pairs": args.pairs,
            "prompt_tokens": args.prompt,
            "completion_tokens": args.completion,
            "sizes": dict(sizes),
            "stages": [asdict(row) for row in rows],
            "account": asdict(account)
            | {"unexplained": account.unexplained, "has_second_copy": account.has_second_copy},
            "environment": environment(),
        }
    )


def _mib(size: float) -> str:
    return f"{size / _MIB:.1f}"
