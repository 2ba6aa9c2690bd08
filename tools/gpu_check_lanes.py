"""`gpu_check`, both lanes at once: overlap, exhaustion."""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..runtime.learning.config import TrainingConfig
from ..runtime.learning.samples import PreferencePair
from ..runtime.training.safepoints import Safepoints
from ..streams.lane import Lane
from .gpu_check_batch import Batch, quantiles_ms, random_prompts
from .gpu_check_case import MIB
from .kernel_overlap import overlap_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..runtime.executor import Executor
    from ..runtime.loading import LoadedModel
    from ..runtime.training.trainer import StepReport, Trainer
    from .gpu_check_case import Check


@dataclass(frozen=True, slots=True)
class Lanes:
    """Both lanes, and what runs on them."""

    check: Check
    loaded: LoadedModel
    inference: Lane
    training: Lane
    trainer: Trainer

    def decoding(self, executor: Executor) -> Batch:
        """Sequences whose prompts are computed and which can go on for some hundred tokens."""
        count = self.check.amount(16, 4)
        prompts = random_prompts(count, (64, 200), self.loaded.vocab_size, seed=9)
        batch = Batch(executor, prompts, 700)
        self.inference.run_sync(batch.prefill)
        return batch


@contextlib.contextmanager
def open_lanes(check: Check, safepoints: Safepoints) -> Iterator[Lanes]:
    """Both lanes, with a model and its trainer."""
    loaded = check.load()
    with (
        Lane("inference", device=check.device, threads=1, high_priority=True) as inference,
        Lane("training", device=check.device, threads=1) as training,
    ):
        trainer = training.run_sync(_trainer, check, loaded, safepoints)
        yield Lanes(check, loaded, inference, training, trainer)


def _trainer(check: Check, loaded: LoadedModel, safepoints: Safepoints) -> Trainer:
    from ..runtime.training.trainer import Trainer

    return Trainer(
        loaded.model,
        TrainingConfig(quantum_tokens=check.amount(2048, 256)),
        safepoints=safepoints,
        base_name="check",
        max_length=loaded.max_model_len,
        stop_token_ids=loaded.eos_token_ids,
    )


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


class Training:
    """Optimizer steps on the training lane, of the same batch again and again.

    Attributes:
        reports: of the steps that were finished.
        tokens: rows that went forward and backward.
        seconds: that `running` took.
    """

    def __init__(self, lanes: Lanes) -> None:
        check = lanes.check
        self._trainer = lanes.trainer
        self._lane = lanes.training
        self._batch = _pairs(
            check.amount(8, 2), check.amount(512, 64), lanes.loaded.vocab_size, seed=3
        )
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

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """One step beside the block; leaving waits for its end."""
        thread = threading.Thread(target=self.step, name="cotune-check-training")
        thread.start()
        try:
            yield
        finally:
            thread.join()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Steps beside the block, which end with the quantum under way when it does."""
        thread = threading.Thread(target=self._run, name="cotune-check-training")
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _run(self) -> None:
        began_s = time.perf_counter()
        while not self._stop.is_set():
            self.step()
        self.seconds = time.perf_counter() - began_s

    @property
    def tokens_per_s(self) -> float:
        """Rows that went forward and backward."""
        return self.tokens / self.seconds if self.seconds else 0.0


# -- overlap ---------------------------------------------------------------------------------------


def check_overlap(check: Check) -> dict[str, Any]:
    """Decode and training, each alone and both at once; a trace of both."""
    figures: dict[str, Any] = {}
    with open_lanes(check, Safepoints()) as lanes:
        ways = ("replayed", "eager") if check.is_card else ("eager",)
        for way in ways:
            executor = lanes.inference.run_sync(
                partial(check.executor, lanes.loaded, records=way == "replayed", seqs=16)
            )
            figures[way] = _overlap(lanes, executor)
            if way == ways[0]:
                figures["trace"] = _trace(lanes, executor)
            del executor
            lanes.inference.run_sync(_forget, check)
    trace = figures["trace"]
    figures["ok"] = trace["overlap"] is not None and trace["overlap"]["both_us"] > 0
    return figures


def _overlap(lanes: Lanes, executor: Executor) -> dict[str, Any]:
    check, inference = lanes.check, lanes.inference
    batch = lanes.decoding(executor)
    inference.run_sync(batch.decode, 10)
    alone = Training(lanes)
    alone.step()  # warms up
    alone.tokens = 0
    began_s = time.perf_counter()
    for _ in range(check.amount(6, 1)):
        alone.step()
    alone.seconds = time.perf_counter() - began_s
    gaps: dict[str, list[float]] = {"alone": [], "beside_training": []}
    count = check.amount(150, 10)
    for _ in range(count):
        gaps["alone"] += inference.run_sync(batch.decode, 1)
    beside = Training(lanes)
    with beside.running():
        until_s = time.perf_counter() + check.amount(8, 1)
        while time.perf_counter() < until_s or len(gaps["beside_training"]) < count:
            gaps["beside_training"] += inference.run_sync(batch.decode, 1)
            if len(batch.outputs[0]) > 690:
                batch = lanes.decoding(executor)
    tbt = {name: quantiles_ms(values) for name, values in gaps.items()}
    return {
        "tbt_ms": tbt,
        "tbt_ratio": tbt["beside_training"]["p99"] / tbt["alone"]["p99"],
        "training_alone_tokens_per_s": alone.tokens_per_s,
        "training_beside_tokens_per_s": beside.tokens_per_s,
        "training_share": beside.tokens_per_s / alone.tokens_per_s,
        "decode_share": tbt["alone"]["p50"] / tbt["beside_training"]["p50"],
    }


def _trace(lanes: Lanes, executor: Executor) -> dict[str, Any]:
    """Some iterations and a training step at once, as the profiler saw them."""
    from torch.profiler import ProfilerActivity, profile

    check, inference = lanes.check, lanes.inference
    batch = lanes.decoding(executor)
    inference.run_sync(batch.decode, 3)
    training = Training(lanes)
    activities = [ProfilerActivity.CUDA] if check.is_card else [ProfilerActivity.CPU]
    config = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with (
        profile(activities=activities, experimental_config=config) as profiler,
        training.running(),
    ):
        inference.run_sync(batch.decode, check.amount(60, 20))
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
    figures: dict[str, Any] = {}
    safepoints = Exhausted()
    with open_lanes(check, safepoints) as lanes:
        inference = lanes.inference
        executor = inference.run_sync(lambda: check.executor(lanes.loaded, seqs=16))
        batch = lanes.decoding(executor)
        training = Training(lanes)
        training.step()
        held = _allocated(check)
        decoded: list[float] = []
        for _ in range(check.amount(20, 2)):
            safepoints.exhaust(1)
            with training.stepping():
                decoded += inference.run_sync(batch.decode, 5)
        figures["injected"] = safepoints.raised
        figures["halvings"] = sum(report.halvings for report in training.reports)
        figures["steps"] = len(training.reports)
        figures["skipped_steps"] = sum(r.skipped is not None for r in training.reports)
        figures["tbt_ms"] = quantiles_ms(decoded)
        figures["kept_bytes"] = _allocated(check) - held
        figures["ok"] = (
            safepoints.raised == check.amount(20, 2)
            and len(training.reports) == 1 + check.amount(20, 2)
            and figures["kept_bytes"] < 64 * MIB
        )
        if check.is_card:
            figures["real"] = _exhaust_for_real(lanes, training, batch)
            figures["ok"] = figures["ok"] and figures["real"]["decoded"] == 20
    return figures


def _exhaust_for_real(lanes: Lanes, training: Training, batch: Batch) -> dict[str, Any]:
    """A step while next to nothing is free."""
    device = lanes.check.device
    torch.cuda.empty_cache()
    # Takes again what it needs, before there is nothing left.
    lanes.inference.run_sync(batch.decode, 2)
    free, _total = torch.cuda.mem_get_info(device)
    hog = torch.empty(max(0, free - 96 * MIB), dtype=torch.uint8, device=device)
    before = len(training.reports)
    try:
        with training.stepping():
            decoded = lanes.inference.run_sync(batch.decode, 20)
    finally:
        del hog
    reports = training.reports[before:]
    training.step()
    return {
        "left_bytes": 96 * MIB,
        "decoded": len(decoded),
        "halvings": sum(report.halvings for report in reports),
        "set_aside": sum(len(report.set_aside) for report in reports),
        "skipped": [report.skipped for report in reports],
        "recovered": training.reports[-1].skipped is None,
    }


# -- memory of the card ----------------------------------------------------------------------------


def _allocated(check: Check) -> int:
    return torch.cuda.memory_allocated(check.device) if check.is_card else 0


def _forget(check: Check) -> None:
    """Give memory back before the next executor."""
    if check.is_card:
        torch.cuda.synchronize(check.device)
        torch.cuda.empty_cache()
