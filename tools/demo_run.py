"""A run of `cotune train-demo`: data, tokenizer, the loop with its evaluations, the export."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer

from ..runtime.learning.durable import remove_leftovers, replacing
from . import demo_data
from .demo_recipe import (
    CHECKPOINT_FILE,
    TOKENIZER_FILE,
    TRUNK_FILE,
    ModelShape,
    Schedule,
    TrainingError,
    TrainSettings,
)
from .demo_training import (
    DemoTrainer,
    TrainingForward,
    evaluate,
    export,
    format_scores,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping
    from types import FrameType

    from .demo_recipe import Stage


def train_demo(args: argparse.Namespace) -> int:
    """Train as the options of `cotune train-demo` say; returns the exit status.

    Raises:
        ConfigError: the run cannot start as asked.
    """
    torch.set_num_threads(args.threads)
    shape = ModelShape(layers=args.layers, vocab_size=args.vocab_size)
    settings = TrainSettings(
        seed=args.seed,
        batch_tokens=args.batch_tokens,
        warmup_steps=args.warmup_steps,
        muon_lr=args.muon_lr,
        adam_lr=args.adam_lr,
    )
    _check_settings(settings)
    checkpoint = args.checkpoint_dir / CHECKPOINT_FILE
    if checkpoint.exists() and not (args.resume or args.export_only):
        raise TrainingError(
            f"{checkpoint} exists; pass --resume to go on, or another --checkpoint-dir"
        )
    if args.export_only:
        return _export_only(args, checkpoint)

    candidates = [args.data] if args.data is not None else [Path("../shared/data")]
    corpora = demo_data.load_corpora(demo_data.find_data(candidates))
    args.checkpoint_dir.mkdir(parents=True, exist_ok=True)
    remove_leftovers(args.checkpoint_dir)  # of a run that was killed
    tokenizer = _tokenizer(corpora, args.checkpoint_dir / TOKENIZER_FILE, shape.vocab_size)
    train = {n: demo_data.pack_documents(tokenizer, d) for n, d in corpora.train.items()}
    held_out = {n: demo_data.pack_documents(tokenizer, d) for n, d in corpora.held_out.items()}
    for name, packed in train.items():
        print(
            f"{name:<12} {len(packed):>7} documents {len(packed.tokens):>9} tokens,"
            f" held out {len(held_out[name]) if name in held_out else 0:>4} documents"
        )
    trainer = DemoTrainer(
        shape=shape,
        settings=settings,
        corpora=train,
        device=torch.device(args.device),
        compiled=args.compile,
    )
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {args.threads} threads, seed {args.seed}")
    schedule = Schedule(settings=settings, tokens=args.tokens, decay_fraction=args.decay_fraction)
    if args.resume:
        if not checkpoint.exists():
            raise TrainingError(f"nothing to resume: {checkpoint} does not exist; drop --resume")
        trainer.load(checkpoint)
        print(f"resumed at step {trainer.step}")
    trainer.check_schedule(schedule)
    return _train(args, trainer, schedule, tokenizer, held_out)


def _check_settings(settings: TrainSettings) -> None:
    for length in (*settings.stable_lengths, *settings.decay_lengths):
        if settings.batch_tokens % length:
            raise TrainingError(
                f"--batch-tokens {settings.batch_tokens} is not a multiple of the sequence length"
                f" {length}"
            )


def _tokenizer(corpora: demo_data.Corpora, path: Path, vocab_size: int) -> Tokenizer:
    """The run's tokenizer: trained once, then kept beside the checkpoint."""
    if not path.exists():
        tokenizer = demo_data.train_tokenizer(corpora, vocab_size=vocab_size)
        with replacing(path) as temporary:
            tokenizer.save(str(temporary))
    return Tokenizer.from_file(str(path))


def _export_only(args: argparse.Namespace, checkpoint: Path) -> int:
    if not checkpoint.exists():
        raise TrainingError(f"nothing to export: {checkpoint} does not exist")
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    tokenizer = Tokenizer.from_file(str(args.checkpoint_dir / TOKENIZER_FILE))
    export(ModelShape(**state["shape"]), state["model"], tokenizer, args.output)
    print(f"exported step {state['step']} to {args.output}")
    return 0


def _train(
    args: argparse.Namespace,
    trainer: DemoTrainer,
    schedule: Schedule,
    tokenizer: Tokenizer,
    held_out: Mapping[str, demo_data.PackedDocuments],
) -> int:
    """The loop: steps, evaluations, checkpoints; exports at the end."""
    checkpoint = args.checkpoint_dir / CHECKPOINT_FILE
    batch_tokens = trainer.settings.batch_tokens
    byte_lengths = torch.from_numpy(demo_data.token_byte_lengths(tokenizer))
    # Evaluation is rare: not worth compiling again for.
    eager = TrainingForward(trainer.model, trainer.shape, trainer.dtype)
    received: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {s: signal.signal(s, on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
    progress = Progress(
        total_tokens=schedule.total_steps * batch_tokens, done_tokens=trainer.step * batch_tokens
    )

    def report(max_tokens: int) -> None:
        scores = evaluate(
            eager,
            held_out,
            byte_lengths,
            length=min(512, trainer.shape.max_positions),
            max_tokens=max_tokens,
            device=trainer.device,
        )
        progress.print(f"step {trainer.step}\n{format_scores(scores)}")

    saved_s = time.monotonic()
    steps_here = 0
    try:
        while trainer.step < schedule.total_steps:
            if trainer.step == schedule.decay_start and trainer.decay is None:
                trainer.save(args.checkpoint_dir / TRUNK_FILE)
            stage = schedule.stage(trainer.step)
            loss = trainer.train_step(schedule)
            steps_here += 1
            done = trainer.step * batch_tokens
            progress.update(done, batch_tokens, loss, stage)
            stop = bool(received) or (args.max_steps and steps_here >= args.max_steps)
            due = time.monotonic() - saved_s >= args.checkpoint_minutes * 60
            if stop or due or trainer.step == schedule.total_steps:
                trainer.save(checkpoint)
                saved_s = time.monotonic()
            if stop and trainer.step < schedule.total_steps:
                progress.print(f"stopped at step {trainer.step}; go on with --resume")
                return 128 + received[0] if received else 0
            if done // args.eval_tokens != (done - batch_tokens) // args.eval_tokens:
                report(args.eval_size)
        report(8 * args.eval_size)
        progress.print("epochs, stable: " + _format_epochs(trainer.stable_mixer.epochs()))
        progress.print("epochs, decay:  " + _format_epochs(trainer.decay_mixer.epochs()))
        export(trainer.shape, trainer.model.state_dict(), tokenizer, args.output)
        progress.print(f"exported step {trainer.step} to {args.output}")
        return 0
    finally:
        progress.close()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _format_epochs(epochs: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {count:.2f}" for name, count in epochs.items())


class Progress:
    """A bar on a terminal, a line every half minute elsewhere; with tokens/s and the time left."""

    def __init__(self, *, total_tokens: int, done_tokens: int, interval_s: float = 30.0) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._console = Console()
        self._total = total_tokens
        self._interval_s = interval_s
        self._last_s = time.monotonic()
        self._line_s = self._last_s - interval_s
        self._rate = 0.0
        self._bar: RichProgress | None = None
        if self._console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}")
            )
            self._bar.start()
            self._task = self._bar.add_task(
                "training", total=total_tokens, completed=done_tokens, note=""
            )

    def update(self, done_tokens: int, step_tokens: int, loss: float, stage: Stage) -> None:
        """Report one step."""
        now_s = time.monotonic()
        rate = step_tokens / max(1e-9, now_s - self._last_s)
        self._rate = rate if self._rate == 0.0 else 0.95 * self._rate + 0.05 * rate
        self._last_s = now_s
        left_s = (self._total - done_tokens) / max(1e-9, self._rate)
        note = (
            f"{done_tokens / 1e6:.2f}/{self._total / 1e6:.2f} M tokens  loss {loss:.3f}"
            f"  rate {stage.scale:.3f}{' (decay)' if stage.is_decay else ''}"
            f"  {self._rate:,.0f} tokens/s  {left_s / 60:.0f} min left"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=done_tokens, note=note)
        elif now_s - self._line_s >= self._interval_s or done_tokens >= self._total:
            self._line_s = now_s
            print(note, flush=True)

    def print(self, text: str) -> None:
        """Print above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
