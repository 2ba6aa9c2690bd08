"""One trainer in a process of its own, driven over stdin and stdout, for comparisons.

    python tools/bench_train_peers.py TRAINER MODEL_DIR THREADS PAIRS_FILE

TRAINER is "cotune", or TRL's DPOTrainer as "trl" (its own defaults: activations checkpointed, the
reference computed in every step) or "trl-fast" (no checkpointing, the reference computed
beforehand). All train LoRA of rank 8 on all linears with AdamW on one batch, again and again. It
loads, prints ``{"ready": ...}``, and for each line that it reads takes one optimizer step and says
``{"seconds": ..., "cpu_seconds": ..., "loss": ..., "rss_bytes": ..., "peak_rss_bytes": ...}``.

PAIRS_FILE holds JSON: [[prompt ids, chosen ids, rejected ids], ...], all completions ending in 0.
This file is run by path, so that each trainer starts in a fresh interpreter and pays for its own
imports alone.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable

LEARNING_RATE = 1e-4
RANK, ALPHA, BETA = 8, 16.0, 0.1

Pairs = list[list[list[int]]]


class _Channel:
    """Reads what to do and says what was done; stdout itself is left to the libraries."""

    def __init__(self) -> None:
        self._out: TextIO = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._began = self._began_cpu = 0.0

    def say(self, value: dict[str, Any]) -> None:
        self._out.write(json.dumps(value) + "\n")
        self._out.flush()

    def begin(self) -> None:
        """Wait for the word to go on; raises SystemExit when there is none to come."""
        if not sys.stdin.readline():
            sys.exit(0)
        self._began, self._began_cpu = time.perf_counter(), time.process_time()

    def end(self, loss: float) -> None:
        self.say(
            {
                "seconds": time.perf_counter() - self._began,
                "cpu_seconds": time.process_time() - self._began_cpu,
                "loss": loss,
            }
            | memory()
        )


def memory() -> dict[str, int]:
    """What of this process is and was at most in memory, in bytes."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:  # not Linux: the peak alone, in bytes on macOS
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"rss_bytes": peak, "peak_rss_bytes": peak}
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return {
        name: int(lines[key].split()[0]) * 1024
        for name, key in (("rss_bytes", "VmRSS"), ("peak_rss_bytes", "VmHWM"))
    }


def _load(directory: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()


def run_cotune(directory: str, pairs: Pairs, channel: _Channel) -> None:
    """Steps of cotune's trainer; reference log-probabilities as the runtime has them on arrival."""
    import torch

    model = _load(directory).requires_grad_(False)

    def part(name: str) -> Any:
        return importlib.import_module(f"cotune.runtime.{name}")

    safepoints = part("training.safepoints").Safepoints()
    config = part("learning.config").TrainingConfig(
        learning_rate=LEARNING_RATE,
        warmup_steps=0,
        weight_decay=0.0,
        sft_weight=0.0,
        lora_rank=RANK,
        lora_alpha=ALPHA,
        beta=BETA,
        batch_size=len(pairs),
    )
    trainer = part("training.trainer").Trainer(
        model,
        config,
        safepoints=safepoints,
        base_name=directory,
        max_length=4096,
        stop_token_ids=(),
    )
    tree = part("training.tree").TrainingTree(
        model, rank=RANK, alpha=ALPHA, target_modules="all-linear", seed=0, safepoints=safepoints
    )
    batches = part("training.batches")
    groups = [
        batches.Group(prompt_ids=tuple(prompt), completions=(tuple(chosen), tuple(rejected)))
        for prompt, chosen, rejected in pairs
    ]
    with torch.no_grad():
        reference = [
            float(x)
            for group in groups
            for x in tree.logps(batches.pack([group]), weights="base").logps
        ]
    del tree
    samples = [
        part("learning.samples").PreferencePair(
            key=key,
            adapter="bench",
            source="bench",
            prompt_ids=group.prompt_ids,
            chosen_ids=group.completions[0],
            rejected_ids=group.completions[1],
            ref_chosen_logp=reference[2 * key],
            ref_rejected_logp=reference[2 * key + 1],
        )
        for key, group in enumerate(groups)
    ]
    channel.say({"ready": "cotune"} | memory())
    while True:
        channel.begin()
        report = trainer.train_batch(samples)
        channel.end(report.loss)


def run_trl(directory: str, pairs: Pairs, channel: _Channel, *, fast: bool) -> None:
    """Steps of TRL's DPOTrainer, stopped between two of them by a callback."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    model = _load(directory)
    # Token 17 is the word "17", so that TRL, which takes text, sees the same tokens.
    vocabulary = {str(token): token for token in range(1, model.config.vocab_size)}
    vocabulary["<end>"] = 0
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<end>"
    )

    def text(ids: list[int]) -> str:
        return "".join(f" {token}" if token else "<end>" for token in ids)

    class Steps(TrainerCallback):  # type: ignore[misc]  # untyped
        losses: tuple[float, ...] = ()

        def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
            channel.begin()

        def on_step_end(self, _args: Any, _state: Any, _control: Any, **_kwargs: Any) -> None:
            channel.end(self.losses[-1] if self.losses else float("nan"))

    steps = Steps()

    class Trainer(DPOTrainer):  # type: ignore[misc]  # untyped
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            result = super().compute_loss(*args, **kwargs)
            steps.losses = (float(result.detach()),)
            return result

    with tempfile.TemporaryDirectory(prefix="cotune-bench-") as output:
        trainer = Trainer(
            model=model,
            args=DPOConfig(
                output_dir=output,
                use_cpu=True,
                per_device_train_batch_size=len(pairs),
                max_steps=1_000_000,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                beta=BETA,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                **(
                    {"gradient_checkpointing": False, "precompute_ref_log_probs": True}
                    if fast
                    else {}
                ),
            ),
            train_dataset=Dataset.from_list(
                [
                    {"prompt": text(prompt), "chosen": text(chosen), "rejected": text(rejected)}
                    for prompt, chosen, rejected in pairs
                ]
            ),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=RANK,
                lora_alpha=ALPHA,
                lora_dropout=0.0,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
            callbacks=[steps],
        )
        rows = trainer.train_dataset
        seen = [[row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]] for row in rows]
        if seen != pairs:
            raise RuntimeError("TRL tokenized the pairs into other tokens than those it was given")
        channel.say({"ready": "trl"} | memory())
        trainer.train()


def main(argv: list[str]) -> int:
    """Run one trainer until stdin ends."""
    import torch

    channel = _Channel()
    name, directory, threads, file = argv
    torch.set_num_threads(int(threads))
    pairs: Pairs = json.loads(Path(file).read_text(encoding="utf-8"))
    trainers: dict[str, Callable[[], None]] = {
        "cotune": lambda: run_cotune(directory, pairs, channel),
        "trl": lambda: run_trl(directory, pairs, channel, fast=False),
        "trl-fast": lambda: run_trl(directory, pairs, channel, fast=True),
    }
    trainers[name]()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
