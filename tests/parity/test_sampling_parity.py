"""Sampling against transformers' logits processors, which are the field's reference.

Edits of logits are compared number by number. For the draws the processors give the exact
distribution: no draw may fall outside of it, and a chi-square test holds the frequencies of 20,000
draws against it (threshold at p = 3e-5; the draws are seeded, so the tests are deterministic).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cotune import SamplingParams
from cotune.runtime import sampling
from cotune.runtime.choosing import Chooser, TorchChooser
from cotune.runtime.choosing_cpu import CpuChooser
from cotune.runtime.sampling import Sampler, SamplingState

CPU = torch.device("cpu")
DRAWS = 20_000


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=["compiled", "torch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(sampling, "_chooser_for", lambda _, device: TorchChooser(device))
    return str(request.param)


def rows(count: int, width: int, *, scale: float = 2.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * scale


def reference(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The distribution of one row (V,) in float64."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p != 1.0:
        warpers.append(TopPLogitsWarper(params.top_p))
    scores: torch.Tensor = warpers(torch.zeros(1, 1, dtype=torch.long), logits.unsqueeze(0))
    return scores[0].double().softmax(-1)


def chi_square_limit(freedom: int, z: float = 4.0) -> float:
    """The quantile of chi-square at z standard deviations (Wilson and Hilferty 1931)."""
    return float(freedom * (1 - 2 / (9 * freedom) + z * (2 / (9 * freedom)) ** 0.5) ** 3)


def draw(logits: torch.Tensor, params: SamplingParams, count: int) -> np.ndarray[Any, Any]:
    """How often each token comes out of `count` draws with as many seeds."""
    sampler = Sampler(logits.shape[0], CPU)
    counts = np.zeros(logits.shape[0])
    batch = logits.expand(1000, -1).contiguous()
    for start in range(0, count, 1000):
        states = [
            SamplingState(params, (), [0] * (start // 1000), frozenset(), seed=start + i)
            for i in range(1000)
        ]
        counts += np.bincount(sampler.sample(batch, states).token_ids, minlength=len(counts))
    return counts


CASES: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 2.5},
    {"top_p": 0.95},
    {"top_p": 0.5},
    {"top_p": 0.05},
    {"temperature": 1.7, "top_p": 0.8},
    {"top_k": 2},
    {"top_k": 50},
    {"min_p": 0.1},
    {"top_k": 20, "top_p": 0.8, "temperature": 0.7},
    {"top_k": 30, "min_p": 0.05},
    {"top_p": 0.9, "min_p": 0.02, "top_k": 60, "temperature": 1.2},
)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("params", CASES, ids=str)
@pytest.mark.parametrize("scale", [0.3, 3.0], ids=["flat", "peaked"])
def test_draws_follow_the_distribution_of_transformers(
    params: dict[str, Any], scale: float
) -> None:
    resolved = SamplingParams(**params).resolve({})
    logits = rows(1, 200, scale=scale, seed=len(str(params)))[0]
    expected = reference(logits, resolved).numpy() * DRAWS
    counts = draw(logits, resolved, DRAWS)
    assert not counts[expected == 0].any(), "a token outside of the kept set was drawn"
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    if wanted[-1] < 5:  # too few to compare
        observed, wanted = observed[:-1], wanted[:-1]
    if len(wanted) > 1:
        statistic = ((observed - wanted) ** 2 / wanted).sum()
        assert statistic < chi_square_limit(len(wanted) - 1)
    else:
        assert counts.argmax() == expected.argmax()


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("params", CASES, ids=str)
def test_at_a_large_vocabulary_no_draw_leaves_the_kept_set(params: dict[str, Any]) -> None:
    resolved = SamplingParams(**params).resolve({})
    logits = rows(1, 5003, seed=3)[0]
    counts = draw(logits, resolved, 2000)
    assert not counts[reference(logits, resolved).numpy() == 0].any()


@pytest.fixture(params=["compiled", "torch"])
def chooser(request: pytest.FixtureRequest) -> Chooser:
    return CpuChooser(150) if request.param == "compiled" else TorchChooser(CPU)


def edited(
    chooser: Chooser, logits: torch.Tensor, prompt: list[int], output: list[int], **params: Any
) -> torch.Tensor:
    state = SamplingState(
        SamplingParams(temperature=0.0, **params).resolve({}),
        prompt,
        output,
        frozenset({2, 3}),
        seed=0,
    )
    return chooser.edit(logits, *state.edits(logits.shape[1]))


PROMPT, OUTPUT = [5, 6, 7, 5, 90], [7, 8, 8, 8, 149, 0]


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_equals_transformers(chooser: Chooser, penalty: float) -> None:
    logits = rows(1, 150)
    ids = torch.tensor([PROMPT + OUTPUT])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    found = edited(chooser, logits, PROMPT, OUTPUT, repetition_penalty=penalty)
    torch.testing.assert_close(found, expected, rtol=2e-7, atol=0)


def test_logit_bias_equals_transformers(chooser: Chooser) -> None:
    logits = rows(1, 150)
    bias = {3: -100.0, 7: 2.5, 149: 100.0}
    processor = SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})
    expected = processor(torch.tensor([PROMPT]), logits.clone())
    torch.testing.assert_close(edited(chooser, logits, PROMPT, [], logit_bias=bias), expected)


@pytest.mark.parametrize("generated", [0, 4, 5, 6])
def test_min_tokens_equals_transformers(chooser: Chooser, generated: int) -> None:
    logits = rows(1, 150)
    output = [9] * generated
    processor = MinNewTokensLengthLogitsProcessor(len(PROMPT), 5, [2, 3], device="cpu")
    expected = processor(torch.tensor([PROMPT + output]), logits.clone())
    assert torch.equal(edited(chooser, logits, PROMPT, output, min_tokens=5), expected)


def test_presence_and_frequency_penalties_follow_the_openai_formula(chooser: Chooser) -> None:
    """mu[j] -> mu[j] - c[j] * frequency - (c[j] > 0) * presence, c counting the output only."""
    logits = rows(1, 150)
    expected = logits.double()
    for token, count in Counter(OUTPUT).items():
        expected[0, token] -= count * 0.4 + 1.1
    found = edited(chooser, logits, PROMPT, OUTPUT, frequency_penalty=0.4, presence_penalty=1.1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)


def test_edits_come_in_the_order_bias_repetition_subtraction(chooser: Chooser) -> None:
    logits = rows(1, 150)
    expected = logits.clone()
    expected[0, 8] += 3.0
    expected = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([PROMPT + OUTPUT]), expected)
    expected[0, OUTPUT] -= 0.7
    found = edited(
        chooser, logits, PROMPT, OUTPUT,
        logit_bias={8: 3.0}, repetition_penalty=1.5, presence_penalty=0.7,
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=2e-7, atol=1e-6)
