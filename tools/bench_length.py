"""Feedback that says nothing but "shorter", or "longer": do answers become so?

    cotune bench length --data ../shared/data
    cotune bench length --data ../shared/data --model path/to/model --stop-alphas 0 3 --pairs 40

People's answers are set against their own first sentence, so that all there is to learn is when to
end. Preferences for the one (shorter) or the other (longer) go to a runtime that learns, once for
each value of `--stop-alphas`; beside it only the epochs are set, and that it waits for nobody: no
more feedback comes. When it has done all that it can, other prompts are asked of the version that
is live, and the tokens of its answers are counted.

Better is an answer length further from the base model's, after the same feedback. The answers that
were cut off at `--max-tokens` would have been longer.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import statistics
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..runtime.errors import ConfigError, CotuneError
from .bench_report import environment, print_json
from .coserve_load import PREFERENCES_FILE, read_pairs
from .options import loop_factory, parse_positive
from .progress_bar import progress_bar

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from ..runtime.runtime import Runtime
    from ..runtime.types import Message

NAME: Final = "length"
HELP: Final = "feedback on nothing but the length of answers"
WISHES: Final = ("shorter", "longer")
LOOK_S: Final = 0.5
"""Between two looks at the learner."""
QUIET_LOOKS: Final = 6
"""It has nothing left when it was idle at so many in a row."""

# The end of a sentence that is long enough to be an answer.
_SENTENCE = re.compile(r"[^\n]{20,}?[.!?](?=\s)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--data", type=Path, required=True, help=f"folder that holds {PREFERENCES_FILE}"
    )
    parser.add_argument("--model", help="directory or hub id (the demo model)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    parser.add_argument(
        "--stop-alphas", type=float, nargs="+", default=[0.0, 3.0, 10.0], help="values (0 3 10)"
    )
    parser.add_argument("--pairs", type=parse_positive, default=80, help="preferences given (80)")
    parser.add_argument("--prompts", type=parse_positive, default=40, help="asked afterwards (40)")
    parser.add_argument("--epochs", type=parse_positive, default=2, help="of training on them (2)")
    parser.add_argument("--max-tokens", type=parse_positive, default=150, help="of an answer (150)")
    parser.add_argument(
        "--max-chars", type=parse_positive, default=600, help="of an answer in a pair (600)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of training and of answers (0)")


@dataclass(frozen=True, slots=True)
class Answer:
    """Somebody's answer, and how it begins."""

    prompt: list[Message]
    whole: str
    first_sentence: str

    def preference(self, wish: str, number: int) -> dict[str, Any]:
        """The frame of a preference for the shorter or the longer."""
        chosen, rejected = self.first_sentence, self.whole
        if wish == "longer":
            chosen, rejected = rejected, chosen
        return {
            "id": f"{wish}-{number}",
            "type": "preference",
            "prompt": self.prompt,
            "chosen": chosen,
            "rejected": rejected,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Of the answers of one version, in tokens."""

    wish: str
    stop_alpha: float
    version: int
    steps: int
    mean: float
    median: float
    cut_off: float


def run(args: argparse.Namespace) -> int:
    """Run the benchmark and print its figures."""
    wanted = args.pairs + args.prompts
    path = args.data / PREFERENCES_FILE
    answers = list(itertools.islice(choose_answers(read_pairs(path), args.max_chars), wanted))
    if len(answers) < wanted:
        raise ConfigError(
            f"{path} has {len(answers)} answers to fit, and --pairs and --prompts ask for "
            f"{wanted}; ask for fewer, or raise --max-chars",
            param="data",
        )
    told, asked = answers[: args.pairs], answers[args.pairs : wanted]
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        found = runner.run(measure(args, told, asked))
    print(
        f"{len(told)} preferences; answers to {len(asked)} other prompts, in tokens, at most "
        f"{args.max_tokens}"
    )
    print(
        f"{'wish':8} {'stop alpha':>10} {'version':>8} {'steps':>6} {'mean':>6} {'median':>7} cut"
    )
    for row in found:
        print(
            f"{row.wish:8} {row.stop_alpha:10g} {row.version:8} {row.steps:6} {row.mean:6.1f} "
            f"{row.median:7.1f} {row.cut_off:4.0%}"
        )
    result = {"benchmark": NAME, "pairs": args.pairs, "prompts": args.prompts}
    print_json(result | {"rows": [asdict(row) for row in found], "environment": environment()})
    return 0


def choose_answers(rows: Iterable[Mapping[str, Any]], max_chars: int) -> Iterator[Answer]:
    """The better answers that go on long after their first sentence, one for each prompt."""
    seen = set()
    for row in rows:
        whole = row["chosen"].strip()
        sentence = _SENTENCE.match(whole)
        prompt = json.dumps(row["prompt"])
        if sentence is None or prompt in seen or not 3 * sentence.end() < len(whole):
            continue
        if len(whole) <= max_chars and len(prompt) <= max_chars:
            seen.add(prompt)
            yield Answer(row["prompt"], whole, sentence.group())


async def measure(
    args: argparse.Namespace, told: Sequence[Answer], asked: Sequence[Answer]
) -> list[Lengths]:
    """The base model's answers, then those after each wish under each alpha."""
    rows: list[Lengths] = []
    cases = list(itertools.product(WISHES, args.stop_alphas))
    with progress_bar() as bar:
        task = bar.add_task("", total=len(cases))
        for wish, alpha in cases:
            bar.update(task, description=f"{wish}, stop alpha {alpha:g}")
            with tempfile.TemporaryDirectory(prefix="cotune-bench-") as directory:
                state_dir = Path(directory)
                rows += await _measure_one(args, wish, alpha, told, asked, state_dir, not rows)
            bar.advance(task)
    return rows


async def _measure_one(
    args: argparse.Namespace,
    wish: str,
    alpha: float,
    told: Sequence[Answer],
    asked: Sequence[Answer],
    state_dir: Path,
    is_first: bool,
) -> list[Lengths]:
    from ..runtime.learning.config import LearningConfig
    from ..runtime.runtime import Runtime

    config = LearningConfig(enabled=True, state_dir=state_dir)
    training = replace(
        config.training, stop_alpha=alpha, epochs=args.epochs, batch_wait_s=LOOK_S, seed=args.seed
    )
    config = replace(config, training=training, gate=replace(config.gate, candidate_wait_s=LOOK_S))
    rows: list[Lengths] = []
    async with Runtime(args.model, args.device, learning=config) as runtime:
        if is_first:
            rows.append(await _ask(args, runtime, asked, "none", 0.0))
        for number, answer in enumerate(told):
            await runtime.feedback(answer.preference(wish, number))
        await _until_learned(runtime, len(told))
        rows.append(await _ask(args, runtime, asked, wish, alpha))
    return rows


async def _until_learned(runtime: Runtime, told: int) -> None:
    """Until the learner has had all feedback, and what it made of it was judged."""
    quiet = 0
    while quiet < QUIET_LOOKS:
        await asyncio.sleep(LOOK_S)
        status = runtime.learning().adapters[0]
        if status.phase == "stopped":
            raise CotuneError("learning has stopped after an error; the log has it")
        is_idle = status.phase == "idle" and not status.pairs.get("pending", 0)
        quiet = quiet + 1 if is_idle and sum(status.pairs.values()) >= told else 0


async def _ask(
    args: argparse.Namespace, runtime: Runtime, asked: Sequence[Answer], wish: str, alpha: float
) -> Lengths:
    from ..runtime.types import SamplingParams

    params = SamplingParams(max_tokens=args.max_tokens, temperature=0.8, seed=args.seed)
    responses = await asyncio.gather(*(runtime.chat(a.prompt, params) for a in asked))
    counts = [len(response.token_ids) for response in responses]
    status = runtime.learning().adapters[0]
    return Lengths(
        wish=wish,
        stop_alpha=alpha,
        version=status.live_version,
        steps=status.steps,
        mean=statistics.mean(counts),
        median=statistics.median(counts),
        cut_off=statistics.mean(response.finish_reason == "length" for response in responses),
    )
