"""The sections of `gpu_check`: each takes a `Check` and gives figures as JSON values.

They are independent: each loads what it needs and lets go of it. Times are in milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import dataclasses
import gzip
import json
import random
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from ..runtime.config import CacheConfig
from ..runtime.executor import Executor
from ..runtime.learning.config import LearningConfig, TrainingConfig
from ..runtime.learning.samples import PreferencePair
from ..runtime.loading import LoadedModel, load_model
from ..runtime.lora import read_lora
from ..runtime.sampling import SamplingState
from ..runtime.static_decode import relative_difference
from ..runtime.step import SequenceStep
from ..runtime.training.safepoints import Safepoints
from ..runtime.types import SamplingParams
from ..streams.device import describe_device
from ..streams.graphs import CallAgain
from ..streams.lane import Lane
from ..streams.memory import MemoryProbe
from . import bench_publish
from .bench_models import SHAPES, make_adapter, make_model
from .kernel_overlap import overlap_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from ..runtime.training.trainer import StepReport, Trainer

_MIB: Final = 1 << 20
GREEDY: Final = SamplingParams(temperature=0.0, ignore_eos=True)
TIE: Final = {"float32": 1e-3, "bfloat16": 0.12, "float16": 0.03}
"""How far below the best logit a chosen token may lie, as a share of the logits' spread: what
rounding does to two tokens that are equally likely."""


@dataclass(frozen=True, slots=True)
class Check:
    """What is checked, and how much of it.

    Attributes:
        device: the card, or the CPU for a dry run.
        shape: a key of `bench_models.SHAPES`.
        dtype: its name.
        is_quick: little of everything.
        directory: for models; thrown away at the end.
        output: where files for the reader go.
    """

    device: torch.device
    shape: str
    dtype: str
    is_quick: bool
    directory: Path
    output: Path

    @property
    def is_card(self) -> bool:
        """Whether this is not a dry run."""
        return self.device.type == "cuda"

    def amount(self, full: int, quick: int) -> int:
        """How much to do."""
        return quick if self.is_quick else full

    def model(self) -> Path:
        """The random model; made at the first call."""
        path = self.directory / f"{self.shape}-{self.dtype}"
        return path if path.exists() else make_model(self.directory, self.shape, self.dtype)

    def load(self) -> LoadedModel:
        """The random model on the device."""
        return load_model(self.model(), device=self.device, dtype=self.dtype)

    def executor(self, loaded: LoadedModel, *, records: bool = True, seqs: int = 64) -> Executor:
        """Ready to run; with few pages, so that several fit."""
        pages = -(-loaded.max_model_len // 16) + 64 * seqs  # on a CPU: 1,024 tokens of each
        cache = CacheConfig(memory_fraction=0.2) if self.is_card else CacheConfig(num_pages=pages)
        return Executor.create(
            loaded,
            device=self.device,
            cache=cache,
            max_num_batched_tokens=512,
            max_num_seqs=seqs,
            record_decodes=records,
            # A dry run goes through the same static slots; only the graph is missing.
            recorder=None if self.is_card or not records else CallAgain(),
        )

    def adapter(self) -> Path:
        """A random adapter of the model; made at the first call."""
        path = self.directory / "lora-r8"
        if path.exists():
            return path
        model = self.model()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's advice is not for the people who run this
            return make_adapter(self.directory, model, rank=8)


# -- helpers ---------------------------------------------------------------------------------------


class Batch:
    """Sequences that decode greedily on pages of their own, step by step.

    Args:
        executor: used by whatever thread calls `prefill` and `decode`.
        prompts: token ids of each.
        room: most tokens of an answer.
        slots: adapter slot of each.
    """

    def __init__(
        self,
        executor: Executor,
        prompts: Sequence[Sequence[int]],
        room: int,
        slots: Sequence[int] | None = None,
    ) -> None:
        self._executor = executor
        self._prompts = [list(prompt) for prompt in prompts]
        self._slots = list(slots) if slots is not None else [0] * len(prompts)
        self.outputs: list[list[int]] = [[] for _ in prompts]
        params = GREEDY.resolve({})
        self._states = [
            SamplingState(params, prompt, output, frozenset(), seed=1)
            for prompt, output in zip(self._prompts, self.outputs, strict=True)
        ]
        self._tables: list[list[int]] = []
        used = 0
        for prompt in self._prompts:
            count = -(-(len(prompt) + room) // executor.page_size)
            self._tables.append(list(range(used, used + count)))
            used += count
        if used > executor.num_pages:
            raise RuntimeError(f"the check needs {used} pages, there are {executor.num_pages}")

    def prefill(self) -> None:
        """Compute the prompts, one per iteration, and the first token of each."""
        for row, prompt in enumerate(self._prompts):
            step = SequenceStep(prompt, 0, self._tables[row], self._slots[row], self._states[row])
            self._take(row, self._executor.execute([step]).results[0])

    def decode(self, steps: int = 1) -> list[float]:
        """So many tokens more for everyone; the seconds of each iteration."""
        seconds = []
        for _ in range(steps):
            began_s = time.perf_counter()
            batch = [
                SequenceStep(
                    self.outputs[row][-1:],
                    len(prompt) + len(self.outputs[row]) - 1,
                    self._tables[row],
                    self._slots[row],
                    self._states[row],
                )
                for row, prompt in enumerate(self._prompts)
            ]
            for row, result in enumerate(self._executor.execute(batch).results):
                self._take(row, result)
            seconds.append(time.perf_counter() - began_s)
        return seconds

    def _take(self, row: int, result: Any) -> None:
        if result.token_id is None:
            raise RuntimeError(f"sequence {row} gave no token: {result.error}")
        self.outputs[row].append(result.token_id)


def random_prompts(count: int, lengths: tuple[int, int], vocab: int, seed: int) -> list[list[int]]:
    """Random token ids; lengths uniform between the bounds."""
    draw = random.Random(seed)
    return [[draw.randrange(1, vocab) for _ in range(draw.randint(*lengths))] for _ in range(count)]


def quantiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 99 % quantile and count."""
    ordered = sorted(seconds)
    if not ordered:
        return {"n": 0}
    return {
        "p50": 1e3 * ordered[len(ordered) // 2],
        "p99": 1e3 * ordered[int(0.99 * (len(ordered) - 1))],
        "n": len(ordered),
    }


def _forget(check: Check) -> None:
    """Give memory back before the next section."""
    if check.is_card:
        torch.cuda.synchronize(check.device)
        torch.cuda.empty_cache()


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
        figures["ok"] = "varlen" in about_executor["attention"] and found is not None
    return figures


# -- attention -------------------------------------------------------------------------------------


def check_attention(check: Check) -> dict[str, Any]:
    """The card's paged attention against plain torch, by number of splits."""
    from ..runtime.kernels.choose import choose_kernels, compare, scattered_batch
    from ..runtime.kernels.plain import HeadShape, LayerAttention

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

    rows = []
    for splits in (1, None, 4):
        kernels = CudaKernels(shape, layers=1, dtype=dtype, device=check.device)
        kernels.num_splits = splits
        entry: dict[str, Any] = {"num_splits": splits}
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
        except RuntimeError as error:
            entry["refused"] = str(error).splitlines()[0]
        rows.append(entry)
    figures["by_splits"] = rows
    figures["ok"] = chosen.name == CudaKernels.name
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


# -- graphs ----------------------------------------------------------------------------------------


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
    figures["logits_difference"] = _logits_difference(executors, loaded)
    figures["recorded"] = None if found is None else dataclasses.asdict(found)
    figures["ok"] = (
        found is not None
        and found.failed == 0
        and found.replays > 0
        and figures["logits_difference"] <= 3e-2
    )
    return figures


def _logits_difference(executors: dict[str, Executor], loaded: LoadedModel) -> float:
    """Of the log-probabilities of one batch of decodes through both, relative to their spread."""
    found: list[torch.Tensor] = []
    params = dataclasses.replace(GREEDY, logprobs=20).resolve({})
    prompts = random_prompts(5, (16, 64), loaded.vocab_size, seed=77)
    for executor in executors.values():
        rows = []
        tables = [[6 * row + page for page in range(6)] for row in range(5)]
        for row, prompt in enumerate(prompts):
            executor.execute([SequenceStep(prompt[:-1], 0, tables[row])])
        steps = [
            SequenceStep(
                prompt[-1:],
                len(prompt) - 1,
                tables[row],
                0,
                SamplingState(params, prompt, [], frozenset(), seed=1),
            )
            for row, prompt in enumerate(prompts)
        ]
        for result in executor.execute(steps).results:
            if result.logprob is None:
                raise RuntimeError("log-probabilities were asked for and did not come")
            rows.append([value for _, value in sorted(result.logprob.top)])
        found.append(torch.tensor(rows))
    return relative_difference(found[1], found[0])


# -- overlap ---------------------------------------------------------------------------------------


def _pairs(count: int, tokens: int, vocab: int, seed: int) -> list[PreferencePair]:
    draw = random.Random(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(1, vocab) for _ in range(length))

    return [
        PreferencePair(
            key=key,
            adapter="check",
            source="local",
            prompt_ids=ids(tokens // 2),
            chosen_ids=ids(tokens // 4),
            rejected_ids=ids(tokens // 4),
            ref_chosen_logp=-10.0 * tokens / 4,
            ref_rejected_logp=-10.0 * tokens / 4,
        )
        for key in range(count)
    ]


def _trainer(check: Check, loaded: LoadedModel, safepoints: Safepoints) -> Trainer:
    from ..runtime.training.trainer import Trainer

    return Trainer(
        loaded.model,
        TrainingConfig(quantum_tokens=check.amount(2048, 256)),
        safepoints=safepoints,
        base_name="check",
        max_length=loaded.max_model_len,
    )


class Training:
    """Steps on a lane of its own until told to stop; runs beside whatever else there is."""

    def __init__(self, check: Check, trainer: Trainer, lane: Lane, vocab: int) -> None:
        self._trainer = trainer
        self._lane = lane
        tokens = check.amount(512, 64)
        self._batch = _pairs(check.amount(8, 2), tokens, vocab, seed=3)
        self._stop = threading.Event()
        self.reports: list[StepReport] = []
        self.tokens = 0
        self.seconds = 0.0

    def step(self) -> None:
        """One optimizer step, quantum by quantum; blocks."""
        self._lane.run_sync(self._trainer.begin, self._batch)
        report = None
        while not self._stop.is_set():
            quantum = self._trainer.next_quantum()
            if quantum is None:
                break
            report = self._lane.run_sync(self._trainer.run_quantum)
            if quantum.kind == "backward":
                self.tokens += quantum.tokens
            if report is not None:
                self.reports.append(report)
        if report is None:
            self._lane.run_sync(self._trainer.abandon)

    def run(self) -> None:
        """Steps until `stop`; on a thread of its own."""
        began_s = time.perf_counter()
        while not self._stop.is_set():
            self.step()
        self.seconds = time.perf_counter() - began_s

    def stop(self) -> None:
        """End with the quantum under way."""
        self._stop.set()

    @property
    def tokens_per_s(self) -> float:
        """Rows that went forward and backward."""
        return self.tokens / self.seconds if self.seconds else 0.0


def check_overlap(check: Check) -> dict[str, Any]:
    """Decode and training, each alone and both at once; a trace of both."""
    figures: dict[str, Any] = {}
    loaded = check.load()
    with (
        Lane("inference", device=check.device, threads=1, high_priority=True) as inference,
        Lane("training", device=check.device, threads=1) as training_lane,
    ):
        safepoints = Safepoints()
        trainer = training_lane.run_sync(_trainer, check, loaded, safepoints)
        ways = ("replayed", "eager") if check.is_card else ("eager",)
        for way in ways:
            executor = inference.run_sync(
                partial(check.executor, loaded, records=way == "replayed", seqs=16)
            )
            figures[way] = _overlap(check, inference, training_lane, trainer, executor, loaded)
            if way == ways[0]:
                figures["trace"] = _trace(
                    check, inference, training_lane, trainer, executor, loaded
                )
            del executor
            inference.run_sync(_forget, check)
    trace = figures["trace"]
    figures["ok"] = trace["overlap"] is not None and trace["overlap"]["both_us"] > 0
    return figures


def _decoding(check: Check, executor: Executor, vocab: int) -> Batch:
    count = check.amount(16, 4)
    return Batch(executor, random_prompts(count, (64, 200), vocab, seed=9), 700)


def _overlap(
    check: Check,
    inference: Lane,
    training_lane: Lane,
    trainer: Trainer,
    executor: Executor,
    loaded: LoadedModel,
) -> dict[str, Any]:
    vocab = loaded.vocab_size
    batch = _decoding(check, executor, vocab)
    inference.run_sync(batch.prefill)
    inference.run_sync(batch.decode, 10)
    alone = Training(check, trainer, training_lane, vocab)
    alone.step()  # warms up
    alone.tokens = 0
    began_s = time.perf_counter()
    for _ in range(check.amount(6, 1)):
        alone.step()
    alone.seconds = time.perf_counter() - began_s
    gaps: dict[str, list[float]] = {"alone": [], "beside_training": []}
    beside = Training(check, trainer, training_lane, vocab)
    count = check.amount(150, 10)
    for _ in range(count):
        gaps["alone"] += inference.run_sync(batch.decode, 1)
    thread = threading.Thread(target=beside.run, name="cotune-check-training")
    thread.start()
    try:
        until_s = time.perf_counter() + check.amount(8, 1)
        while time.perf_counter() < until_s or len(gaps["beside_training"]) < count:
            gaps["beside_training"] += inference.run_sync(batch.decode, 1)
            if len(batch.outputs[0]) > 690:
                batch = _decoding(check, executor, vocab)
                inference.run_sync(batch.prefill)
    finally:
        beside.stop()
        thread.join()
    tbt = {name: quantiles_ms(values) for name, values in gaps.items()}
    return {
        "tbt_ms": tbt,
        "tbt_ratio": tbt["beside_training"]["p99"] / tbt["alone"]["p99"],
        "training_alone_tokens_per_s": alone.tokens_per_s,
        "training_beside_tokens_per_s": beside.tokens_per_s,
        "training_share": beside.tokens_per_s / alone.tokens_per_s,
        "decode_share": tbt["alone"]["p50"] / tbt["beside_training"]["p50"],
    }


def _trace(
    check: Check,
    inference: Lane,
    training_lane: Lane,
    trainer: Trainer,
    executor: Executor,
    loaded: LoadedModel,
) -> dict[str, Any]:
    """Some iterations and a training step at once, as the profiler saw them."""
    from torch.profiler import ProfilerActivity, profile

    batch = _decoding(check, executor, loaded.vocab_size)
    inference.run_sync(batch.prefill)
    inference.run_sync(batch.decode, 3)
    training = Training(check, trainer, training_lane, loaded.vocab_size)
    activities = [ProfilerActivity.CUDA] if check.is_card else [ProfilerActivity.CPU]
    thread = threading.Thread(target=training.run, name="cotune-check-training")
    config = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with profile(activities=activities, experimental_config=config) as profiler:
        thread.start()
        try:
            inference.run_sync(batch.decode, check.amount(60, 20))
        finally:
            training.stop()
            thread.join()
    path = check.output / "gpu_check_trace.json"
    profiler.export_chrome_trace(str(path))
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    packed = path.with_suffix(".json.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    found = overlap_of(events)
    return {
        "file": packed.name,
        "events": len(events),
        "overlap": None if found is None else found.to_dict(),
    }


# -- publication -----------------------------------------------------------------------------------


def check_publication(check: Check) -> dict[str, Any]:
    """Versions of the demo model's adapter that go live while clients stream."""
    parser = argparse.ArgumentParser()
    bench_publish.add_arguments(parser)
    asked = ["--device", str(check.device), "--dtype", check.dtype]
    asked += ["--publications", str(check.amount(4, 1)), "--clients", str(check.amount(8, 2))]
    asked += ["--prefix", str(check.amount(512, 64)), "--answers", str(check.amount(8, 2))]
    directory = check.directory / "publication"
    figures = asyncio.run(bench_publish._measure(parser.parse_args(asked), directory))
    # Rounding may part two answers in half precision, where a tie is wider than the benchmark's.
    is_exact = check.dtype == "float32"
    figures["ok"] = figures["failed_requests"] == 0 and (
        not is_exact or figures["other_tokens"] == 0
    )
    return figures


# -- memory ----------------------------------------------------------------------------------------

_HOG: Final = """
import sys
size, device = int(sys.argv[1]), sys.argv[2]
if device == "cpu":
    taken = bytearray(size)
    taken[::4096] = b"x" * len(taken[::4096])
else:
    import torch
    taken = torch.zeros(size, dtype=torch.uint8, device=device)
    torch.cuda.synchronize()
print("taken", flush=True)
sys.stdin.readline()
"""


def check_memory(check: Check) -> dict[str, Any]:
    """Another process takes memory while requests run; then it gives it back."""
    return asyncio.run(_memory(check))


async def _memory(check: Check) -> dict[str, Any]:
    from ..runtime.runtime import Runtime

    probe = MemoryProbe(check.device)
    learning = LearningConfig(enabled=True, state_dir=check.directory / "memory")
    figures: dict[str, Any] = {"source": probe.source}
    async with Runtime(
        None,
        str(check.device),
        dtype=check.dtype,
        learning=learning,
        memory_fraction=0.1,
        inference_threads=1,
    ) as runtime:
        figures["before"] = await _readings(check, runtime, probe)
        free = probe.read().free_bytes
        # All but a little on a card, so that the threshold must give way; next to nothing in a dry
        # run, where the memory is everybody's.
        size = max(0, free - 512 * _MIB) if check.is_card else 256 * _MIB
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            _HOG,
            str(size),
            str(check.device),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert process.stdout is not None
            async with asyncio.timeout(90):
                said = await process.stdout.readline()
            if said.strip() != b"taken":
                raise RuntimeError(f"the other process could not take {size >> 20} MB")
            figures["taken_bytes"] = size
            figures["during"] = await _readings(check, runtime, probe)
        finally:
            await process.communicate(b"\n")
        figures["after"] = await _readings(check, runtime, probe)
    fell = figures["before"]["available_bytes"] - figures["during"]["available_bytes"]
    figures["fell_by_bytes"] = fell
    served = all(figures[when]["answers"] == 8 for when in ("before", "during", "after"))
    # A dry run shares its memory with everything else on the machine.
    figures["ok"] = served and (not check.is_card or fell > 0.5 * figures["taken_bytes"])
    return figures


async def _readings(check: Check, runtime: Any, probe: MemoryProbe) -> dict[str, Any]:
    """Answer eight requests; what is available meanwhile."""
    prompts = random_prompts(8, (16, 64), runtime._served.loaded.vocab_size, seed=4)
    params = dataclasses.replace(GREEDY, max_tokens=check.amount(64, 8))
    began_s = time.perf_counter()
    answers = await asyncio.gather(*(runtime.complete(prompt, params) for prompt in prompts))
    seconds = time.perf_counter() - began_s
    schedule = runtime.statistics().schedule
    return {
        "answers": sum(len(answer.token_ids) == params.max_tokens for answer in answers),
        "tokens_per_s": sum(len(answer.token_ids) for answer in answers) / seconds,
        "available_bytes": probe.read().available_bytes,
        "memory_threshold": schedule.memory_threshold,
        "near_misses": schedule.near_misses,
        "out_of_memories": schedule.out_of_memories,
    }


# -- exhaustion ------------------------------------------------------------------------------------


class Exhausted(Safepoints):
    """Safepoints at which training runs out of memory, as often as it is told to.

    Attributes:
        raised: how often it did.
    """

    def __init__(self) -> None:
        super().__init__()
        self._due = 0
        self.raised = 0

    def exhaust(self, times: int) -> None:
        """Raise at the next so many safepoints, each in a quantum of its own."""
        self._due = times

    def wait(self) -> None:
        """A safepoint."""
        super().wait()
        if self._due:
            self._due -= 1
            self.raised += 1
            raise torch.OutOfMemoryError("injected: CUDA out of memory")


def check_exhaustion(check: Check) -> dict[str, Any]:
    """Training runs out of memory again and again; decode goes on, and nothing is kept."""
    loaded = check.load()
    figures: dict[str, Any] = {}
    with (
        Lane("inference", device=check.device, threads=1, high_priority=True) as inference,
        Lane("training", device=check.device, threads=1) as training_lane,
    ):
        executor = inference.run_sync(lambda: check.executor(loaded, seqs=16))
        safepoints = Exhausted()
        trainer = training_lane.run_sync(_trainer, check, loaded, safepoints)
        batch = _decoding(check, executor, loaded.vocab_size)
        inference.run_sync(batch.prefill)
        training = Training(check, trainer, training_lane, loaded.vocab_size)
        training.step()
        held = _allocated(check)
        decoded: list[float] = []
        for _ in range(check.amount(20, 2)):
            safepoints.exhaust(1)
            thread = threading.Thread(target=training.step, name="cotune-check-training")
            thread.start()
            decoded += inference.run_sync(batch.decode, 5)
            thread.join()
        figures["injected"] = safepoints.raised
        figures["halvings"] = sum(report.halvings for report in training.reports)
        figures["steps"] = len(training.reports)
        figures["skipped_steps"] = sum(r.skipped is not None for r in training.reports)
        figures["tbt_ms"] = quantiles_ms(decoded)
        figures["kept_bytes"] = _allocated(check) - held
        figures["ok"] = (
            safepoints.raised == check.amount(20, 2)
            and len(training.reports) == 1 + check.amount(20, 2)
            and figures["kept_bytes"] < 64 * _MIB
        )
        if check.is_card:
            figures["real"] = _exhaust_for_real(check, inference, training, batch)
            figures["ok"] = figures["ok"] and figures["real"]["decoded"] == 20
    return figures


def _exhaust_for_real(
    check: Check, inference: Lane, training: Training, batch: Batch
) -> dict[str, Any]:
    """A step while next to nothing is free."""
    torch.cuda.empty_cache()
    free, _total = torch.cuda.mem_get_info(check.device)
    hog = torch.empty(max(0, free - 96 * _MIB), dtype=torch.uint8, device=check.device)
    before = len(training.reports)
    thread = threading.Thread(target=training.step, name="cotune-check-training")
    try:
        thread.start()
        decoded = inference.run_sync(batch.decode, 20)
    finally:
        thread.join()
        del hog
    reports = training.reports[before:]
    training.step()
    return {
        "left_bytes": 96 * _MIB,
        "decoded": len(decoded),
        "halvings": sum(report.halvings for report in reports),
        "set_aside": sum(len(report.set_aside) for report in reports),
        "skipped": [report.skipped for report in reports],
        "recovered": training.reports[-1].skipped is None,
    }


def _allocated(check: Check) -> int:
    return torch.cuda.memory_allocated(check.device) if check.is_card else 0


SECTION_FUNCTIONS: Final[dict[str, Callable[[Check], dict[str, Any]]]] = {
    "environment": check_environment,
    "attention": check_attention,
    "parity": check_parity,
    "graphs": check_graphs,
    "overlap": check_overlap,
    "publication": check_publication,
    "memory": check_memory,
    "exhaustion": check_exhaustion,
}
