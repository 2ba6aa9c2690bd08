"""What a version is asked for the gate, and what is not asked twice."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

from cotune.runtime.errors import ConfigError, IterationError
from cotune.runtime.learning.examiner import (
    CONTINUATION_TOKENS,
    CONTINUED,
    OPENING_TOKENS,
    PROBE_TOKENS,
    TOP,
    Examiner,
)
from cotune.runtime.learning.samples import PreferencePair, RatedCompletion
from cotune.runtime.types import BASE, AdapterVersion, TokenLogprob

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cotune.runtime.background import Background
    from cotune.runtime.learning.samples import Sample
    from cotune.runtime.types import Response

ONE, TWO, THREE = (AdapterVersion("tutor", number) for number in (1, 2, 3))
PROBE = [tuple(range(20, 20 + 10 * n)) for n in range(1, 12)]


class FakeAnswer:
    def __init__(self, token_ids: tuple[int, ...]) -> None:
        self.token_ids = token_ids


class FakeBackground:
    """Each token's log-probability is that of its id and its version; answers go in circles."""

    def __init__(self) -> None:
        self.scored: list[tuple[AdapterVersion, tuple[int, ...], tuple[int, ...]]] = []
        self.generated: list[tuple[AdapterVersion, tuple[int, ...], int]] = []
        self.tops: set[int] = set()
        self.failure: Exception | None = None

    async def score(
        self,
        version: AdapterVersion,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        *,
        top: int = 0,
    ) -> tuple[TokenLogprob, ...]:
        if self.failure is not None:
            raise self.failure
        self.scored.append((version, tuple(prompt_ids), tuple(completion_ids)))
        self.tops.add(top)
        half = ((1, math.log(0.5)), (2, math.log(0.25))) if top else ()
        return tuple(TokenLogprob(token, logp(version, token), 1, half) for token in completion_ids)

    async def generate(
        self, version: AdapterVersion, prompt_ids: Sequence[int], max_tokens: int
    ) -> Response:
        self.generated.append((version, tuple(prompt_ids), max_tokens))
        return FakeAnswer((1, 2, 3, 4) * 3)  # type: ignore[return-value]


def logp(version: AdapterVersion, token: int) -> float:
    return -(token + version.version / 8)


def pair(key: int) -> PreferencePair:
    return PreferencePair(
        key=key,
        adapter="tutor",
        source=f"source {key}",
        prompt_ids=(key, 2),
        chosen_ids=(3, 4, 5),
        rejected_ids=(6, 7),
        ref_chosen_logp=-1.5,
        ref_rejected_logp=-2.5,
    )


def rated(key: int) -> RatedCompletion:
    return RatedCompletion(
        key=key,
        adapter="tutor",
        source="local",
        prompt_ids=(key,),
        completion_ids=(9,),
        is_desirable=False,
        ref_logp=-0.5,
    )


@pytest.fixture
def background() -> FakeBackground:
    return FakeBackground()


@pytest.fixture
def examiner(background: FakeBackground) -> Examiner:
    asked: Background = background  # type: ignore[assignment]
    return Examiner(asked, PROBE)


async def test_samples_are_scored_under_the_version_beside_their_references(
    examiner: Examiner,
) -> None:
    found = await examiner.evaluate(ONE, [pair(1), rated(2), pair(3)])
    assert [score.key for score in found.pairs] == [1, 3]
    score = found.pairs[0]
    assert score.chosen_logp == pytest.approx(sum(logp(ONE, token) for token in (3, 4, 5)))
    assert score.rejected_logp == pytest.approx(sum(logp(ONE, token) for token in (6, 7)))
    assert (score.chosen_tokens, score.rejected_tokens) == (3, 2)
    assert (score.ref_chosen_logp, score.ref_rejected_logp) == (-1.5, -2.5)
    assert score.source == "source 1"
    (rating,) = found.rated
    assert (rating.key, rating.tokens, rating.is_desirable) == (2, 1, False)
    assert (rating.logp, rating.ref_logp) == (logp(ONE, 9), -0.5)


async def test_the_base_models_own_scores_are_the_references_and_cost_nothing(
    examiner: Examiner, background: FakeBackground
) -> None:
    await examiner.probe(BASE)
    background.scored.clear()
    found = await examiner.evaluate(BASE, [pair(1), rated(2)])
    assert (found.pairs[0].chosen_logp, found.pairs[0].rejected_logp) == (-1.5, -2.5)
    assert found.rated[0].logp == -0.5
    assert background.scored == []


async def test_an_answer_that_is_given_is_taken_and_neither_asked_nor_remembered(
    examiner: Examiner, background: FakeBackground
) -> None:
    await examiner.probe(ONE)
    background.scored.clear()
    found = await examiner.evaluate(
        ONE, [pair(1), pair(2), rated(3)], {1: (-7.0, -8.0), 3: (-9.0,)}
    )
    first, second = found.pairs
    assert (first.chosen_logp, first.rejected_logp) == (-7.0, -8.0)
    assert (first.chosen_tokens, first.rejected_tokens) == (3, 2)
    assert second.chosen_logp == pytest.approx(sum(logp(ONE, token) for token in (3, 4, 5)))
    assert found.rated[0].logp == -9.0
    assert {prompt for _, prompt, _ in background.scored} == {(2, 2)}
    background.scored.clear()
    found = await examiner.evaluate(ONE, [pair(1), pair(2)])
    assert found.pairs[0].chosen_logp == pytest.approx(sum(logp(ONE, token) for token in (3, 4, 5)))
    assert {prompt for _, prompt, _ in background.scored} == {(1, 2)}


async def test_references_are_the_base_models_log_probabilities(
    examiner: Examiner, background: FakeBackground
) -> None:
    assert await examiner.reference(pair(1)) == (-12.0, -13.0)
    assert await examiner.reference(rated(2)) == (-9.0,)
    assert {version for version, _, _ in background.scored} == {BASE}


async def test_the_probe_is_the_loss_and_entropy_of_texts_and_the_repetition_of_answers(
    examiner: Examiner, background: FakeBackground
) -> None:
    found = await examiner.probe(ONE)
    asked = [token for ids in PROBE for token in ids[1:PROBE_TOKENS]]
    assert found.nll == pytest.approx(-sum(logp(ONE, token) for token in asked) / len(asked))
    # Two alternatives are known; what is left of the probability counts as a third one.
    assert found.entropy == pytest.approx(math.log(2) / 2 + 2 * math.log(4) / 4)
    assert found.repetition == pytest.approx(1 - 4 / 9)
    assert background.tops == {TOP}
    assert background.generated == [
        (ONE, ids[:OPENING_TOKENS], CONTINUATION_TOKENS) for ids in PROBE[:CONTINUED]
    ]


async def test_the_last_two_versions_are_not_asked_again(
    examiner: Examiner, background: FakeBackground
) -> None:
    samples: list[Sample] = [pair(1), rated(2)]
    first = await examiner.evaluate(ONE, samples)
    await examiner.evaluate(TWO, samples)
    background.scored.clear()
    assert await examiner.evaluate(ONE, samples) == first
    assert background.scored == []
    # Only what is new is asked.
    await examiner.evaluate(ONE, [pair(1), pair(4)])
    assert {prompt for _, prompt, _ in background.scored} == {(4, 2)}
    # A third one takes the place of the one that was asked about longest ago.
    await examiner.evaluate(THREE, samples)
    background.scored.clear()
    await examiner.evaluate(ONE, [pair(1)])
    assert background.scored == []
    await examiner.evaluate(TWO, [pair(1)])
    assert background.scored != []


async def test_what_is_remembered_does_not_grow_with_candidates_and_samples(
    examiner: Examiner,
) -> None:
    for number in range(1, 30):
        version = AdapterVersion("tutor", number)
        await examiner.evaluate(version, [pair(key) for key in range(number, number + 5)])
        await examiner.evaluate(BASE, [pair(number)])
    assert len(examiner._scores) == 2
    assert all(len(scores) == 5 for scores in examiner._scores.values())
    assert len(examiner._probes) == 3


async def test_what_is_forgotten_is_asked_again_but_for_the_version_that_is_kept(
    examiner: Examiner, background: FakeBackground
) -> None:
    for version in (ONE, TWO, BASE):
        await examiner.evaluate(version, [pair(1)])
    examiner.forget(keep=TWO)
    background.scored.clear()
    for version in (TWO, BASE):
        await examiner.evaluate(version, [pair(1)])
    assert background.scored == []
    await examiner.evaluate(ONE, [pair(1)])
    assert background.scored != []


async def test_a_failure_is_not_remembered(examiner: Examiner, background: FakeBackground) -> None:
    background.failure = IterationError("the device failed")
    with pytest.raises(ExceptionGroup) as failure:
        await examiner.evaluate(ONE, [pair(1)])
    assert failure.group_contains(IterationError)
    background.failure = None
    assert len((await examiner.evaluate(ONE, [pair(1)])).pairs) == 1


async def test_texts_are_cut_to_what_the_model_can_read(background: FakeBackground) -> None:
    asked: Background = background  # type: ignore[assignment]
    await Examiner(asked, PROBE, max_length=40).probe(ONE)
    assert max(len(prompt) + len(rest) for _, prompt, rest in background.scored) == 40


@pytest.mark.parametrize("probe", [[], [(1,)], [(), (2,)]])
def test_a_probe_without_a_token_to_predict_is_refused(
    background: FakeBackground, probe: list[tuple[int, ...]]
) -> None:
    asked: Background = background  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"gate\.probe_file: no paragraph is longer than one"):
        Examiner(asked, probe)
