"""Asks a version the questions that the gate judges by: held-out feedback, and ordinary text.

All of it goes through the serving engine, under the adapter slot that requests would use: what is
judged is what would be served, kernels, precision and all. It is background prefill, so requests go
first.

What was asked before is not asked again: the answers of the last two versions are kept, which are
the live one and the last candidate, and the base model's log-probabilities came with the feedback.
"""

from __future__ import annotations

import asyncio
import math
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..types import BASE
from .gate import Evaluation, PairScore, ProbeScore, RatedScore
from .probe import repetition
from .samples import PreferencePair

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..background import Background
    from ..types import AdapterVersion, TokenLogprob
    from .samples import Sample, TokenIds

PROBE_TOKENS = 96
"""Tokens of each probe text that are scored."""
CONTINUED = 8
"""Probe texts that are continued, to see whether it repeats itself."""
OPENING_TOKENS = 12
CONTINUATION_TOKENS = 48
TOP = 20
"""Alternatives from which the entropy is estimated; the rest counts as one more token."""
REMEMBERED = 2
"""Versions beside the base model whose answers are kept."""


class Examiner:
    """Evaluates versions of one adapter.

    Args:
        background: the way to the engine.
        probe: token ids of ordinary texts.
        max_length: most tokens of a text that are looked at.

    Raises:
        ConfigError: no text has two tokens, so that none can be predicted.
    """

    def __init__(
        self,
        background: Background,
        probe: Sequence[TokenIds],
        *,
        max_length: int = PROBE_TOKENS,
    ) -> None:
        self._background = background
        length = min(max_length, PROBE_TOKENS)
        self._probe = tuple(tuple(ids[:length]) for ids in probe if len(ids[:length]) > 1)
        if not self._probe:
            raise ConfigError(
                "learning.gate.probe_file: no paragraph is longer than one token; fill it with "
                "paragraphs, separated by empty lines",
                param="learning.gate.probe_file",
                code="invalid_config",
            )
        # By version, the one that was asked last at the end; then by sample.
        self._scores: dict[AdapterVersion, dict[int, tuple[float, ...]]] = {}
        self._probes: dict[AdapterVersion, ProbeScore] = {}

    async def evaluate(
        self,
        version: AdapterVersion,
        samples: Sequence[Sample],
        answers: Mapping[int, tuple[float, ...]] = MappingProxyType({}),
    ) -> Evaluation:
        """What `version` makes of the samples and of ordinary text.

        Args:
            version: held by the adapter store.
            samples: with their reference log-probabilities.
            answers: what to take for its answer, by sample: the log-probability of each completion.
        """
        known = {**self._scores.get(version, {}), **answers}
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._score(version, sample, known)) for sample in samples]
            probe = group.create_task(self.probe(version))
        self._remember(
            version,
            {
                sample.key: task.result()
                for sample, task in zip(samples, tasks, strict=True)
                if sample.key not in answers
            },
        )
        pairs: list[PairScore] = []
        rated: list[RatedScore] = []
        for sample, task in zip(samples, tasks, strict=True):
            logps = task.result()
            if isinstance(sample, PreferencePair):
                assert sample.ref_chosen_logp is not None
                assert sample.ref_rejected_logp is not None
                pairs.append(
                    PairScore(
                        key=sample.key,
                        source=sample.source,
                        chosen_logp=logps[0],
                        rejected_logp=logps[1],
                        chosen_tokens=len(sample.chosen_ids),
                        rejected_tokens=len(sample.rejected_ids),
                        ref_chosen_logp=sample.ref_chosen_logp,
                        ref_rejected_logp=sample.ref_rejected_logp,
                    )
                )
            else:
                assert sample.ref_logp is not None
                rated.append(
                    RatedScore(
                        key=sample.key,
                        source=sample.source,
                        logp=logps[0],
                        tokens=len(sample.completion_ids),
                        ref_logp=sample.ref_logp,
                        is_desirable=sample.is_desirable,
                    )
                )
        return Evaluation(pairs=tuple(pairs), rated=tuple(rated), probe=probe.result())

    async def reference(self, sample: Sample) -> tuple[float, ...]:
        """The base model's summed log-probability of each of the sample's completions."""
        # One after the other: the second finds the prompt in the cache.
        return tuple(
            [
                await self._sum(BASE, sample.prompt_ids, completion)
                for completion in _completions(sample)
            ]
        )

    def forget(self, keep: AdapterVersion) -> None:
        """Drop what is known of all versions but `keep` and the base model."""
        kept = (keep, BASE)
        self._scores = {key: value for key, value in self._scores.items() if key in kept}
        self._probes = {key: value for key, value in self._probes.items() if key in kept}

    def _remember(self, version: AdapterVersion, scores: dict[int, tuple[float, ...]]) -> None:
        """Keep what `version` answered about the samples of now, and little else."""
        if version == BASE:
            return
        self._scores.pop(version, None)
        self._scores[version] = scores
        for old in list(self._scores)[:-REMEMBERED]:
            del self._scores[old]
            self._probes.pop(old, None)

    async def probe(self, version: AdapterVersion) -> ProbeScore:
        """Loss, entropy and repetition of `version` on ordinary text."""
        known = self._probes.get(version)
        if known is not None:
            return known
        background = self._background
        async with asyncio.TaskGroup() as group:
            scores = [
                group.create_task(background.score(version, ids[:1], ids[1:], top=TOP))
                for ids in self._probe
            ]
            answers = [
                group.create_task(
                    background.generate(version, ids[:OPENING_TOKENS], CONTINUATION_TOKENS)
                )
                for ids in self._probe[:CONTINUED]
            ]
        tokens = [token for task in scores for token in task.result()]
        found = ProbeScore(
            nll=-sum(token.logprob for token in tokens) / len(tokens),
            entropy=sum(_entropy(token) for token in tokens) / len(tokens),
            repetition=sum(repetition(task.result().token_ids) for task in answers) / len(answers),
        )
        self._probes[version] = found
        return found

    async def _score(
        self, version: AdapterVersion, sample: Sample, known: Mapping[int, tuple[float, ...]]
    ) -> tuple[float, ...]:
        if version == BASE:
            if isinstance(sample, PreferencePair):
                assert sample.ref_chosen_logp is not None
                assert sample.ref_rejected_logp is not None
                return (sample.ref_chosen_logp, sample.ref_rejected_logp)
            assert sample.ref_logp is not None
            return (sample.ref_logp,)
        if sample.key in known:
            return known[sample.key]
        return tuple(
            [
                await self._sum(version, sample.prompt_ids, completion)
                for completion in _completions(sample)
            ]
        )

    async def _sum(
        self, version: AdapterVersion, prompt_ids: TokenIds, completion_ids: TokenIds
    ) -> float:
        tokens = await self._background.score(version, prompt_ids, completion_ids)
        return math.fsum(token.logprob for token in tokens)


def _completions(sample: Sample) -> tuple[TokenIds, ...]:
    if isinstance(sample, PreferencePair):
        return (sample.chosen_ids, sample.rejected_ids)
    return (sample.completion_ids,)


def _entropy(token: TokenLogprob) -> float:
    """Entropy in nats of the distribution that predicted `token`, from its likeliest tokens."""
    known = sum(math.exp(logp) for _, logp in token.top)
    rest = max(0.0, 1.0 - known)
    tail = -rest * math.log(rest) if rest > 0.0 else 0.0
    return tail - sum(math.exp(logp) * logp for _, logp in token.top if logp > -math.inf)
