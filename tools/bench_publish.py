"""Publishing new adapter versions while clients stream: failures, pauses, and cold prefixes.

    cotune bench publish
    cotune bench publish --publications 5 --model path/to/model --dtype bfloat16

16 clients stream one answer after another; their prompts begin with one of a few shared prefixes,
some ask for two answers or for log-probabilities. Meanwhile versions are published, one after the
other, by turns with their hot prefixes prefilled first (warm) and without (cold). Before and after
each publication another client asks, three times in a row, a prompt that begins with a prefix that
was in use: its time to first token is what a user would see. The versions are random adapters; the
path from their directories to the requests is the one that learning uses.

Better is:
- `failed requests` and `other tokens` at 0. The latter are answers that a replay on their stated
  version did not give again, other than at a tie: two tokens equally likely but for rounding.
- `longest gap` around a publication no longer than what the same streams see at other times: a
  publication is no pause. A publication's surroundings are from its beginning, the prefilling
  included, to half a second after it. A cold one shows what the prefilling saves.
- `TTFT first after / before` at 1 with the warm-up; without it the first request computes the
  prefix. Single ones vary: a request may come early or late in an iteration that is under way.
"""

from __future__ import annotations

import asyncio
import copy
import random
import tempfile
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .bench_report import environment, print_json, show, spread
from .options import loop_factory

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from ..runtime.runtime import Runtime
    from ..runtime.types import Response, SamplingParams

NAME: Final = "publish"
HELP: Final = "publish adapter versions while clients stream"
ADAPTER: Final = "published"
AFTERMATH_S: Final = 0.5
PROBES: Final = 3
"""Requests before and after each publication."""
TIE: Final = 1e-3
"""Difference of log-probabilities below which rounding may choose, in float32."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--model", help="directory or hub id (the demo model)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    parser.add_argument("--threads", type=int, default=1, help="intra-op threads on a CPU (1)")
    parser.add_argument("--clients", type=int, default=16, help="streams at once (16)")
    parser.add_argument("--publications", type=int, default=20, help="warm ones; cold as well (20)")
    parser.add_argument(
        "--prefix", type=int, default=512, help="tokens of the longest prefix (512)"
    )
    parser.add_argument("--answers", type=int, default=8, help="between publications (8)")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (8)")
    parser.add_argument("--seed", type=int, default=0)


@dataclass(frozen=True, slots=True)
class Publication:
    """One, as it was measured. Times of `time.monotonic`; TTFTs in seconds."""

    is_warm: bool
    began_s: float
    live_s: float
    before_s: tuple[float, ...]
    after_s: tuple[float, ...]

    @property
    def first_ratio(self) -> float:
        """TTFT of the first request after it, over the median before."""
        return self.after_s[0] / spread(self.before_s)["median"]


@dataclass(slots=True)
class Log:
    """What the clients saw."""

    answers: list[tuple[SamplingParams, Response]] = field(default_factory=list)
    gaps: list[tuple[float, float]] = field(default_factory=list)
    """(when it ended, how long) of each time between tokens of one stream."""
    failures: list[str] = field(default_factory=list)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark and print its figures."""
    with (
        tempfile.TemporaryDirectory(prefix="cotune-bench-") as directory,
        asyncio.Runner(loop_factory=loop_factory()) as runner,
    ):
        result = runner.run(measure(args, Path(directory)))
    _print(result)
    result |= {"benchmark": NAME, "dtype": args.dtype, "environment": environment()}
    print_json(result)
    return 0 if not result["failed_requests"] and not result["other_tokens"] else 1


async def measure(args: argparse.Namespace, state_dir: Path) -> dict[str, Any]:
    """The figures of the benchmark, from JSON values; versions are kept in `state_dir`."""
    from ..runtime.learning.config import LearningConfig
    from ..runtime.runtime import Runtime

    learning = LearningConfig(enabled=True, state_dir=state_dir, adapters=(ADAPTER,), train=False)
    # A long queue: the replay asks everything at once.
    async with Runtime(
        args.model,
        args.device,
        dtype=args.dtype,
        inference_threads=args.threads,
        learning=learning,
        max_queue=100_000,
    ) as runtime:
        count = 2 * args.publications
        await asyncio.to_thread(_write_versions, runtime, count, args)
        log, began_s = Log(), time.monotonic()
        stage = _Stage(runtime, args, log)
        publications = await stage.perform(count)
        seconds = time.monotonic() - began_s
        replayed = await _replay(runtime, log.answers)
    tokens = sum(len(response.token_ids) for _, response in log.answers)
    return {
        "clients": args.clients,
        "publications": count,
        "seconds": seconds,
        "answers": len(log.answers),
        "tokens_per_s": tokens / seconds,
        "versions_that_answered": len({r.adapter_version for _, r in log.answers}),
        "failed_requests": len(log.failures),
        "failures": log.failures[:5],
        **replayed,
        **_gaps(log.gaps, publications),
        "ttft": {_word(warm): _ttfts(publications, warm) for warm in (True, False)},
    }


class _Stage:
    """The clients, and the one who publishes among them."""

    def __init__(self, runtime: Runtime, args: argparse.Namespace, log: Log) -> None:
        self._runtime = runtime
        self._args = args
        self._log = log
        self._draw = random.Random(args.seed)
        self._prefixes = [self._tokens(args.prefix // part) for part in (1, 2, 4)]
        self._stops = False
        self._ended = 0
        self._news = asyncio.Condition()

    async def perform(self, count: int) -> list[Publication]:
        """Publish `count` versions while the clients stream."""
        publications = []
        async with asyncio.TaskGroup() as group:
            for number in range(self._args.clients):
                group.create_task(self._client(number))
            await self._answers(3 * self._args.clients)  # until it is as it will be
            for number in range(1, count + 1):
                publications.append(await self._publish(number, is_warm=number % 2 == 1))
                await self._answers(self._args.answers)
            self._stops = True
        return publications

    async def _publish(self, number: int, *, is_warm: bool) -> Publication:
        before_s = [await self._probe() for _ in range(PROBES)]
        began_s = time.monotonic()
        if is_warm:
            service = self._runtime._served.learning
            assert service is not None
            publisher = service.publisher(ADAPTER)
            async with publisher.held(number) as version:
                await publisher.publish(version, "benchmark", changes=publisher.changes)
        else:
            await self._runtime.promote(f"{ADAPTER}@{number}")
        live_s = time.monotonic()
        after_s = [await self._probe() for _ in range(PROBES)]
        return Publication(is_warm, began_s, live_s, tuple(before_s), tuple(after_s))

    async def _probe(self) -> float:
        """TTFT of the longest prefix with a new ending."""
        from ..runtime.types import SamplingParams

        prompt = [*self._prefixes[0], *self._tokens(16)]
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        response = await self._runtime.complete(prompt, params, model=ADAPTER)
        assert response.timings.ttft_s is not None
        return response.timings.ttft_s

    async def _client(self, number: int) -> None:
        from ..runtime.errors import CotuneError

        turn = 0
        while not self._stops:
            turn += 1
            prompt = [*self._prefixes[(number + turn) % 3], *self._tokens(8 + 2 * number)]
            params = _params(number, turn)
            try:
                await self._stream(prompt, params)
            except CotuneError as error:
                self._log.failures.append(f"client {number}: {error}")
            async with self._news:
                self._ended += 1
                self._news.notify_all()

    async def _stream(self, prompt: Sequence[int], params: SamplingParams) -> None:
        last_s: dict[int, float] = {}
        async with self._runtime.complete(prompt, params, model=ADAPTER) as stream:
            async for delta in stream:
                now_s = time.monotonic()
                if delta.index in last_s and delta.token_ids:
                    self._log.gaps.append((now_s, now_s - last_s[delta.index]))
                last_s[delta.index] = now_s
        for response in stream.responses:
            if response.finish_reason == "length" and len(response.token_ids) == params.max_tokens:
                self._log.answers.append((params, response))
            else:
                self._log.failures.append(f"{response.id}: ended by {response.finish_reason}")

    async def _answers(self, count: int) -> None:
        """Wait until so many more answers have ended."""
        async with self._news:
            wanted = self._ended + count
            await self._news.wait_for(lambda: self._ended >= wanted)

    def _tokens(self, count: int) -> list[int]:
        vocab_size = self._runtime._served.loaded.vocab_size
        return [self._draw.randrange(8, vocab_size) for _ in range(count)]


def _params(number: int, turn: int) -> SamplingParams:
    """What a client asks for in its next request; lengths differ, so that streams do not end
    together."""
    from ..runtime.types import SamplingParams

    return SamplingParams(
        n=2 if number % 8 == 7 else 1,
        temperature=0.0,
        max_tokens=24 + (7 * number + 11 * turn) % 40,
        ignore_eos=True,
        logprobs=2 if number % 4 == 3 else None,
    )


def _write_versions(runtime: Runtime, count: int, args: argparse.Namespace) -> None:
    """`count` random adapters, as version directories."""
    import peft
    import torch

    from ..runtime.learning.versions import Lineage, Manifest

    learning = runtime._served.learning
    assert learning is not None
    versions = learning.versions
    config = peft.LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    torch.manual_seed(args.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's advice is not for the people who run this
        adapted: Any = peft.get_peft_model(copy.deepcopy(runtime._served.loaded.model), config)
    for _ in range(count):
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape) * 0.02)

        def save(directory: Path) -> None:
            adapted.save_pretrained(str(directory), save_embedding_layers=False)

        versions.write(
            ADAPTER,
            versions.next_number(ADAPTER),
            save,
            Manifest(parent=0, lineage=Lineage()),
            refused=False,
        )


async def _replay(
    runtime: Runtime, answers: Sequence[tuple[SamplingParams, Response]]
) -> dict[str, Any]:
    """Ask everything again, each of the version that answered it."""
    same = ties = 0
    other: list[str] = []
    by_version: dict[int, list[tuple[SamplingParams, Response]]] = {}
    for params, response in answers:
        by_version.setdefault(response.adapter_version.version, []).append((params, response))
    for version, asked in sorted(by_version.items()):
        model = f"{ADAPTER}@{version}"
        replays = await asyncio.gather(
            *(_again(runtime, params, response, model) for params, response in asked)
        )
        for (_, response), replay in zip(asked, replays, strict=True):
            if replay == response.token_ids:
                same += 1
            elif await _is_tie(runtime, response, replay, model):
                ties += 1
            else:
                other.append(f"{response.id} on {model}")
    return {
        "same_tokens": same,
        "ties": ties,
        "other_tokens": len(other),
        "other": other[:5],
    }


async def _again(
    runtime: Runtime, params: SamplingParams, response: Response, model: str
) -> tuple[int, ...]:
    single = replace(params, n=1, logprobs=None)
    return (await runtime.complete(response.prompt_token_ids, single, model=model)).token_ids


async def _is_tie(
    runtime: Runtime, response: Response, replay: tuple[int, ...], model: str
) -> bool:
    """Whether the first tokens that differ are equally likely but for rounding."""
    pairs = zip(response.token_ids, replay, strict=True)
    place = next(i for i, (one, other) in enumerate(pairs) if one != other)
    prompt = [*response.prompt_token_ids, *response.token_ids[:place]]
    one, other = [
        (await runtime.score(prompt, [tokens[place]], model=model))[0]
        for tokens in (response.token_ids, replay)
    ]
    return abs(one - other) < TIE


def _gaps(
    gaps: Sequence[tuple[float, float]], publications: Sequence[Publication]
) -> dict[str, Any]:
    """Times between tokens in milliseconds: around publications, and otherwise."""
    found: dict[str, list[float]] = {"warm": [], "cold": [], "otherwise": []}
    probing: list[tuple[float, float, str]] = [
        (p.began_s, p.live_s + AFTERMATH_S, _word(p.is_warm)) for p in publications
    ]
    for ended_s, gap_s in gaps:
        began_s = ended_s - gap_s
        place = next(
            (word for start, end, word in probing if began_s <= end and ended_s >= start),
            "otherwise",
        )
        found[place].append(1e3 * gap_s)
    return {"gaps_ms": {place: _quantiles(values) for place, values in found.items() if values}}


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "count": len(ordered),
        "p50": ordered[len(ordered) // 2],
        "p99": ordered[int(0.99 * (len(ordered) - 1))],
        "max": ordered[-1],
    }


def _ttfts(publications: Sequence[Publication], is_warm: bool) -> dict[str, Any]:
    chosen = [p for p in publications if p.is_warm == is_warm]
    before = spread([1e3 * t for p in chosen for t in p.before_s])
    first_after = spread([1e3 * p.after_s[0] for p in chosen])
    return {
        "before_ms": before,
        "first_after_ms": first_after,
        "ratio": first_after["median"] / before["median"],
        "after_ms": spread([1e3 * t for p in chosen for t in p.after_s]),
        "first_ratio": spread([p.first_ratio for p in chosen]),
        "publication_ms": spread([1e3 * (p.live_s - p.began_s) for p in chosen]),
    }


def _word(is_warm: bool) -> str:
    return "warm" if is_warm else "cold"


def _print(result: dict[str, Any]) -> None:
    print(
        f"{result['clients']} clients, {result['publications']} publications, "
        f"{result['answers']} answers of {result['versions_that_answered']} versions in "
        f"{result['seconds']:.0f} s, {result['tokens_per_s']:.0f} tokens/s"
    )
    print(f"  failed requests   {result['failed_requests']}")
    print(
        f"  replayed          {result['same_tokens']} the same, {result['ties']} at a tie, "
        f"{result['other_tokens']} other tokens"
    )
    for place, gaps in result["gaps_ms"].items():
        where = place if place == "otherwise" else f"around {place} ones"
        print(
            f"  gaps {where:19} p50 {gaps['p50']:6.1f}  p99 {gaps['p99']:6.1f}  "
            f"longest {gaps['max']:6.1f} ms  ({gaps['count']:.0f})"
        )
    for word, ttft in result["ttft"].items():
        print(f"  TTFT {word}: before {_line(ttft['before_ms'])} ms, median (min to max)")
        print(f"             first after {_line(ttft['first_after_ms'])} ms")
        print(f"             first after / before {ttft['ratio']:.2f} (of the medians)")
        print(f"             of each publication  {_line(ttft['first_ratio'], 2)}")
        print(f"             publishing took {_line(ttft['publication_ms'])} ms")


def _line(s: dict[str, float], digits: int = 1) -> str:
    return show([s["min"], s["median"], s["max"]], digits)
