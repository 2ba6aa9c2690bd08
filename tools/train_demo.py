"""Train the demo model: a small Llama chat model, from scratch, on public text.

    cotune train-demo --compile                              # under an hour on two idle CPU cores
    cotune train-demo --compile --tokens 30000000 --resume   # go on, and longer than first planned
    cotune train-demo --export-only                          # the last checkpoint as a model folder

The learning rate warms up, stays, and falls linearly to zero over the last part of the tokens
(WSD). Until that fall begins nothing depends on ``--tokens`` and ``--decay-fraction``, so a resumed
run may change both and still equals a run that had been started with the new numbers. The fall also
changes the text (mostly chat) and the sequence lengths (up to 2,048):

    step        0 ... warm-up ............ decay start ........... total
    rate        rises ... 1 .............. 1 .................... 0
    text        STABLE_WEIGHTS             DECAY_WEIGHTS
    rows of     512 tokens                 512, 1,024, 512, 2,048 in turn

Hidden matrices are trained by Muon (Jordan et al. 2024), embedding and norms by AdamW; weights are
float32, matrix products bfloat16.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..runtime.errors import ConfigError
from .demo_recipe import ModelShape, TrainSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``cotune train-demo``."""
    shape, settings = ModelShape(), TrainSettings()
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    files = parser.add_argument_group("files")
    files.add_argument(
        "--data",
        type=Path,
        help="folder with the training text (default: ../shared/data); when it is missing, the"
        " message lists the public data sets to fetch",
    )
    files.add_argument(
        "--output",
        type=Path,
        default=Path("runtime/demo_model"),
        help="folder for the finished model (default: %(default)s)",
    )
    files.add_argument(
        "--checkpoint-dir",
        type=Path,
        default=Path("demo_checkpoints"),
        help="folder for checkpoint.pt, for trunk.pt (as the decay begins, to redo it) and for the"
        " tokenizer (default: %(default)s)",
    )
    files.add_argument(
        "--resume",
        action="store_true",
        help="go on from the checkpoint; --tokens and --decay-fraction may change until the decay"
        " has begun",
    )
    files.add_argument(
        "--export-only",
        action="store_true",
        help="write the last checkpoint to --output and stop; safe while a run is going on",
    )
    run_options = parser.add_argument_group("length and cadence")
    run_options.add_argument(
        "--tokens", type=int, default=14_000_000, help="training tokens (default: %(default)s)"
    )
    run_options.add_argument(
        "--decay-fraction",
        type=float,
        default=0.3,
        help="part of the tokens over which the learning rate falls (default: %(default)s)",
    )
    run_options.add_argument(
        "--checkpoint-minutes",
        type=float,
        default=4.0,
        help="time between checkpoints; SIGTERM and Ctrl-C write one too (default: %(default)s)",
    )
    run_options.add_argument(
        "--eval-tokens",
        type=int,
        default=3_000_000,
        help="training tokens between held-out evaluations (default: %(default)s)",
    )
    run_options.add_argument(
        "--eval-size",
        type=int,
        default=8192,
        help="held-out tokens per corpus at each evaluation; the last one takes up to eight times"
        " as many (default: %(default)s)",
    )
    run_options.add_argument(
        "--max-steps", type=int, default=0, help="stop with a checkpoint after so many steps"
    )
    recipe = parser.add_argument_group("recipe (a resumed run must repeat it)")
    recipe.add_argument("--seed", type=int, default=settings.seed, help="default: %(default)s")
    recipe.add_argument(
        "--layers", type=int, default=shape.layers, help="decoder layers (default: %(default)s)"
    )
    recipe.add_argument(
        "--vocab-size", type=int, default=shape.vocab_size, help="default: %(default)s"
    )
    recipe.add_argument(
        "--batch-tokens",
        type=int,
        default=settings.batch_tokens,
        help="tokens per optimizer step (default: %(default)s)",
    )
    recipe.add_argument(
        "--warmup-steps", type=int, default=settings.warmup_steps, help="default: %(default)s"
    )
    recipe.add_argument(
        "--muon-lr", type=float, default=settings.muon_lr, help="default: %(default)s"
    )
    recipe.add_argument(
        "--adam-lr", type=float, default=settings.adam_lr, help="default: %(default)s"
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--threads", type=int, default=2, help="CPU threads (default: %(default)s)"
    )
    machine.add_argument(
        "--device", default="cpu", help="torch device, such as cpu or cuda (default: %(default)s)"
    )
    machine.add_argument(
        "--compile",
        action="store_true",
        help="fuse with torch.compile: a fifth faster, needs a C++ compiler",
    )


def run(args: argparse.Namespace) -> int:
    """Train as the options say.

    Returns the exit status: 0, 2 when the run cannot start, 143 or 130 when a signal stopped it.
    """
    from .demo_run import train_demo  # torch, which --help can do without

    try:
        return train_demo(args)
    except ConfigError as error:
        print(f"train-demo: {error}", file=sys.stderr)
        return 2


def main() -> int:
    """Run without the ``cotune`` command: ``python -m cotune.tools.train_demo``."""
    parser = argparse.ArgumentParser(prog="train-demo")
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    raise SystemExit(main())
