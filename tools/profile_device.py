"""`cotune profile`: measure what iterations and training cost here, and keep it for the next start.

A server measures a short profile when it starts for the first time, and goes on learning from each
iteration. This command measures more: more kinds of iterations, more runs of each, the quanta of
training, and what the two cost each other. `cotune serve` with the same model, dtype and threads
then begins with it.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.errors import ConfigError, StorageError
from .options import add_general_arguments, add_runtime_arguments, loop_factory, runtime_config
from .progress_bar import progress_bar

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    import torch

    from ..policy.costs import Costs
    from ..policy.profile import Profile, ProfileKey
    from ..runtime.config import RuntimeConfig
    from ..runtime.executor import Executor
    from ..runtime.loading import LoadedModel
    from ..runtime.scheduling.profiler import Effort, Progress
    from ..runtime.training.trainer import Trainer
    from ..streams.lane import Lane

EPILOG = """\
examples:
  cotune profile                              the demo model, unless it was measured before
  cotune profile path/to/model --thorough     minutes instead of seconds
  cotune profile --fresh --output mine.json   for cotune simulate --profile mine.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``cotune profile``."""
    parser.usage = "cotune profile [MODEL] [flags]"
    parser.epilog = EPILOG
    group = parser.add_argument_group("profile")
    group.add_argument(
        "--thorough", action="store_true", help="measure more kinds of work, and each more often"
    )
    group.add_argument(
        "--fresh", action="store_true", help="measure although there is a profile already"
    )
    group.add_argument("--output", type=Path, metavar="FILE", help="write the profile there, too")
    group.add_argument(
        "--note", default="", metavar="TEXT", help="what the profile says of itself to people"
    )
    add_runtime_arguments(parser, learning=True)
    add_general_arguments(parser, default_log_level="warning")


def run(args: argparse.Namespace) -> int:
    """Measure, or show what was measured before; the exit status."""
    config = runtime_config(args)
    output: Path | None = args.output
    if output is not None and not output.parent.is_dir():
        raise ConfigError(
            f"--output {output}: there is no directory {output.parent}; make it first",
            param="output",
        )
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_profile(args, config, output))


async def _profile(args: argparse.Namespace, config: RuntimeConfig, output: Path | None) -> int:
    import torch

    from ..runtime.runtime import inference_threads
    from ..runtime.scheduling import profiles
    from ..runtime.scheduling.profiler import STANDARD, THOROUGH
    from ..streams.device import DeviceError, resolve_device
    from ..streams.lane import Lane

    try:
        device = resolve_device(config.model.device)
    except DeviceError as error:
        raise ConfigError(str(error), param="model.device") from error
    threads = inference_threads(config, device) or torch.get_num_threads()
    with (
        Lane("inference", device=device, threads=threads, high_priority=True) as lane,
        Lane(
            "training",
            device=device,
            threads=config.learning.training.threads,
            sm_share=config.lanes.sm_share,
        ) as training_lane,
    ):
        loaded = await lane.run(_load, config, device)
        key = await asyncio.to_thread(_key, loaded, device, threads)
        path = profiles.path_of(key)
        kept = await asyncio.to_thread(profiles.load, key)
        if kept is not None and not (args.fresh or args.thorough):
            profile = kept
            print(f"measured {profile.created}, kept in {path}; --fresh measures again")
        else:
            effort = THOROUGH if args.thorough else STANDARD
            profile = await _measure(config, loaded, lane, training_lane, key, effort, args.note)
            saved = None
            if profile.knows_prefill:
                saved = await asyncio.to_thread(profiles.save, profile)
            else:
                print("not kept: too few prompts could be measured in time")
            if saved is not None:
                instead = " in the place of the one before" if kept is not None else ""
                print(f"kept in {saved}{instead}; the next start begins with it")
    if output is not None:
        await asyncio.to_thread(_write, profile, output)
        print(f"written to {output}")
    print_profile(profile)
    return 0


async def _measure(
    config: RuntimeConfig,
    loaded: LoadedModel,
    lane: Lane,
    training_lane: Lane,
    key: ProfileKey,
    effort: Effort,
    note: str,
) -> Profile:
    from dataclasses import replace

    from ..runtime.scheduling.profiler import measure

    with _progress() as progress:
        executor = await lane.run(_make_executor, config, loaded, lane.device)
        trainer = None
        if config.learning.enabled and config.learning.train:
            trainer = await training_lane.run(_make_trainer, config, loaded)
        profile = await measure(
            loaded,
            executor,
            lane,
            key=key,
            effort=effort,
            trainer=trainer,
            training_lane=training_lane,
            progress=progress,
        )
    return replace(profile, note=note)


def _load(config: RuntimeConfig, device: torch.device) -> LoadedModel:
    from ..runtime.loading import load_model

    model = config.model
    return load_model(
        model.source,
        device=device,
        dtype=model.dtype,
        max_model_len=model.max_model_len,
        trust_remote_code=model.trust_remote_code,
        revision=model.revision,
    )


def _key(loaded: LoadedModel, device: torch.device, threads: int) -> ProfileKey:
    from ..runtime.scheduling.profiles import key_of

    return key_of(loaded, device=device, dtype=loaded.dtype, threads=threads)


def _make_executor(config: RuntimeConfig, loaded: LoadedModel, device: torch.device) -> Executor:
    from ..runtime.executor import Executor

    return Executor.create(
        loaded,
        device=device,
        cache=config.cache,
        max_num_batched_tokens=config.schedule.token_budget(device.type),
        max_num_seqs=config.schedule.max_num_seqs,
        record_decodes=config.lanes.cuda_graphs,
    )


def _make_trainer(config: RuntimeConfig, loaded: LoadedModel) -> Trainer:
    from ..runtime.training.safepoints import Safepoints
    from ..runtime.training.trainer import Trainer

    return Trainer(
        loaded.model,
        config.learning.training,
        safepoints=Safepoints(),
        base_name=str(loaded.path),
        max_length=config.learning.training.max_length or loaded.max_model_len,
        stop_token_ids=loaded.eos_token_ids,
    )


def _write(profile: Profile, path: Path) -> None:
    from ..runtime.scheduling.profiles import write

    try:
        write(profile, path)
    except StorageError as error:
        raise ConfigError(f"--output: {error.message}", param="output") from error


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar, and what is measured now."""
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("measuring"), BarColumn(), TimeRemainingColumn())
    with progress_bar(*columns, TextColumn("{task.description}")) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        yield show


# -- what is printed -------------------------------------------------------------------------------


def print_profile(profile: Profile) -> None:
    """What costs what, for people."""
    key, memory = profile.key, profile.memory
    print(f"{key.model}, {key.dtype}, on {key.device}{_threads(key.threads)}")
    if profile.note:
        print(f"  {profile.note}")
    if profile.is_estimated:
        print("  estimated, not measured")
    print_rows(cost_rows(profile.costs))
    print_rows(
        [
            ("memory of a row of training", _bytes(memory.training_row_bytes)),
            ("of a token of an iteration", _bytes(memory.prefill_token_bytes)),
            ("of a KV page", _bytes(memory.page_bytes)),
        ]
    )
    if profile.points:
        errors = sorted(profile.errors())
        middle, worst = errors[len(errors) // 2], errors[-1]
        print(
            f"  {len(errors)} kinds of iterations; the costs miss them by "
            f"{100 * middle:.1f} % (median), {100 * worst:.1f} % at worst"
        )


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    """A table of two columns."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:{width}}  {value:>10}")


def cost_rows(costs: Costs) -> list[tuple[str, str]]:
    """Each cost with its name."""
    kl_s, forward_s, backward_s = costs.per_row_s
    return [
        ("an iteration, at least", _seconds(costs.base_s)),
        ("+ each decode", _seconds(costs.per_decode_s)),
        ("+ 1,000 KV entries that decodes read", _seconds(1000 * costs.per_context_s)),
        ("+ 100 prompt tokens", _seconds(100 * costs.per_token_s)),
        ("+ 1,000 of their KV entries", _seconds(100 * 1000 * costs.per_attention_s)),
        ("+ each chunk of a prompt", _seconds(costs.per_chunk_s)),
        ("holds in 95 of 100 times", f"{costs.margin:.2f}x"),
        ("with training beside it", f"{costs.interference:.2f}x"),
        ("a quantum, at least", _seconds(costs.quantum_base_s)),
        ("+ 100 rows forward", _seconds(100 * forward_s)),
        ("+ 100 rows backward", _seconds(100 * backward_s)),
        ("+ 100 rows of a reference point", _seconds(100 * kl_s)),
        ("with serving beside it", f"{costs.quantum_interference:.2f}x"),
        ("an optimizer step", _seconds(costs.step_s)),
    ]


def _seconds(value: float) -> str:
    """A duration in the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns" if value else "0"


def _bytes(value: float) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def _threads(count: int) -> str:
    return "" if count == 0 else f", {count} thread{'s' * (count > 1)}"
