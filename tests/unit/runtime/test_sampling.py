from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cotune import SamplingParams
from cotune.runtime import sampling
from cotune.runtime.choosing import TorchChooser
from cotune.runtime.choosing_cpu import CpuChooser
from cotune.runtime.sampling import Sampler, SamplingState
from cotune.runtime.types import TokenLogprob

V = 300  # not a multiple of the block
CPU = torch.device("cpu")
EOS = frozenset({2, 3})


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=["compiled", "torch"])
def sampler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Sampler:
    if request.param == "torch":
        monkeypatch.setattr(sampling, "_chooser_for", lambda _, device: TorchChooser(device))
    return Sampler(V, CPU)


def state(
    output: list[int] | None = None,
    prompt: tuple[int, ...] = (5, 6, 7, 5),
    stream: int = 0,
    seed: int = 0,
    **params: Any,
) -> SamplingState:
    return SamplingState(
        SamplingParams(**params).resolve({}),
        prompt,
        [] if output is None else output,
        EOS,
        stream,
        seed=seed,
    )


def logits(rows: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 2).to(dtype)


MIXED: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 7},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.5},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 1.0, "repetition_penalty": 1.3, "logprobs": 0},
    {"temperature": 0.0, "frequency_penalty": 0.5, "presence_penalty": -0.5},
    {"temperature": 1.0, "logit_bias": {9: 50.0}},
    {"temperature": 1.0, "min_tokens": 30, "stop_token_ids": (11,)},
    {"temperature": 1.0, "top_p": 0.1, "min_p": 0.01, "top_k": 100},
)


def generate(sampler: Sampler, states: list[SamplingState], steps: int) -> list[list[int]]:
    """A model whose logits depend on the sequence's own last token only."""
    table = logits(V, seed=1)
    for _ in range(steps):
        rows = [s.output_ids[-1] if s.output_ids else s.prompt_ids[-1] for s in states]
        out = sampler.sample(table[rows], states)
        assert out.errors == [None] * len(states)
        for s, token in zip(states, out.token_ids, strict=True):
            s.output_ids.append(token)  # type: ignore[attr-defined]  # the engine's list
    return [list(s.output_ids) for s in states]


def test_greedy_takes_the_first_of_the_largest_logits(sampler: Sampler) -> None:
    rows = torch.zeros(3, V)
    rows[0, [40, 50]] = 1.0
    rows[1] = -5.0
    rows[2, V - 1] = 0.5
    states = [state(temperature=0.0) for _ in range(3)]
    assert sampler.sample(rows, states).token_ids == [40, 0, V - 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_float_dtype_is_taken_and_left_unchanged(sampler: Sampler, dtype: torch.dtype) -> None:
    rows = logits(len(MIXED), dtype=dtype)
    before = rows.clone()
    out = sampler.sample(rows, [state(**params) for params in MIXED])
    assert torch.equal(rows, before)
    assert out.token_ids[0] == int(rows[0].float().argmax())
    wide = sampler.sample(rows.float(), [state(**params) for params in MIXED])
    assert out == wide


def test_logits_may_be_a_strided_view(sampler: Sampler) -> None:
    wide = torch.cat((logits(12), logits(12, seed=9)), dim=1)
    view = wide[:, :V]
    states = [state(**params) for params in MIXED]
    assert sampler.sample(view, states) == sampler.sample(view.contiguous(), states)


def test_a_batch_of_none_is_no_work(sampler: Sampler) -> None:
    assert sampler.sample(torch.empty(0, V), []).token_ids == []


def test_rows_and_states_must_match(sampler: Sampler) -> None:
    with pytest.raises(ValueError, match=r"\(2, 300\) for 1 states"):
        sampler.sample(logits(2), [state()])


def test_unresolved_params_are_refused() -> None:
    with pytest.raises(ValueError, match="resolve"):
        SamplingState(SamplingParams(), (), [], EOS, seed=0)


def test_a_rows_choice_depends_on_its_own_row_alone(sampler: Sampler) -> None:
    """Bit for bit: every mode of sampling, alone and in batches of two orders."""
    alone = [generate(sampler, [state(seed=i, **p)], 40)[0] for i, p in enumerate(MIXED)]
    together = generate(sampler, [state(seed=i, **p) for i, p in enumerate(MIXED)], 40)
    assert together == alone
    backwards = [state(seed=i, **p) for i, p in reversed(list(enumerate(MIXED)))]
    assert generate(sampler, backwards, 40)[::-1] == alone


def test_a_preempted_request_goes_on_with_the_same_draws(sampler: Sampler) -> None:
    whole = generate(sampler, [state(seed=4, **p) for p in MIXED], 30)
    half = [s[:15] for s in whole]
    resumed = [state(list(out), seed=4, **p) for out, p in zip(half, MIXED, strict=True)]
    assert generate(sampler, resumed, 15) == whole


def test_seeds_and_siblings_draw_differently_and_reproducibly(sampler: Sampler) -> None:
    def texts() -> list[list[int]]:
        pairs = [(seed, stream) for seed in (1, 2) for stream in (0, 1)]
        return generate(sampler, [state(seed=s, stream=n, temperature=1.0) for s, n in pairs], 20)

    first = texts()
    assert first == texts()
    assert len({tuple(text) for text in first}) == 4


def test_the_compiled_and_the_torch_form_choose_alike() -> None:
    compiled, plain = CpuChooser(V), TorchChooser(CPU)
    for step in range(60):
        rows = logits(len(MIXED), seed=step) * (1 + step % 3)
        tokens: list[Any] = []
        for chooser in (compiled, plain):
            sampler = Sampler(V, CPU)
            sampler._chooser = chooser  # the two are held against each other
            out = sampler.sample(rows, [state([1] * step, seed=step, **p) for p in MIXED])
            tokens.append(out)
        first, second = tokens
        assert first.token_ids == second.token_ids
        for a, b in zip(first.logprobs, second.logprobs, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert (a.token_id, a.rank) == (b.token_id, b.rank)
                assert a.logprob == pytest.approx(b.logprob, abs=1e-5)
                assert [t for t, _ in a.top] == [t for t, _ in b.top]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("params", MIXED)
def test_a_row_that_is_not_finite_fails_alone(
    sampler: Sampler, params: dict[str, Any], value: float
) -> None:
    good = state(seed=1, temperature=1.0, top_p=0.9, logprobs=1)
    rows = logits(3)
    expected = sampler.sample(rows[[0, 2]], [good, good])
    rows[1, 77] = value
    out = sampler.sample(rows, [good, state(**params), good])
    assert out.token_ids == [expected.token_ids[0], -1, expected.token_ids[1]]
    assert out.logprobs == [expected.logprobs[0], None, expected.logprobs[1]]
    assert out.errors[0] is None
    assert out.errors[2] is None
    assert out.errors[1] is not None
    assert "not finite" in out.errors[1]
    assert "of 300" in out.errors[1]


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9}])
def test_a_row_with_nothing_to_choose_says_so(sampler: Sampler, params: dict[str, Any]) -> None:
    out = sampler.sample(torch.full((1, V), -torch.inf), [state(**params)])
    assert out.token_ids == [-1]
    assert "no token can be chosen" in (out.errors[0] or "")


@pytest.mark.parametrize("params", MIXED)
def test_tokens_at_minus_infinity_are_never_chosen(
    sampler: Sampler, params: dict[str, Any]
) -> None:
    rows = torch.full((200, V), -torch.inf)
    rows[:, [64, 130, 299]] = torch.tensor([1.0, 0.5, 0.9])
    params = {k: v for k, v in params.items() if k != "logit_bias"}
    out = sampler.sample(rows, [state(seed=i, **params) for i in range(200)])
    assert set(out.token_ids) <= {64, 130, 299}
    assert out.errors == [None] * 200


@pytest.mark.parametrize("temperature", [1e-5, 2e-5, 1e-3])
def test_a_tiny_temperature_takes_the_likeliest_token(sampler: Sampler, temperature: float) -> None:
    rows = logits(20)
    out = sampler.sample(rows, [state(seed=i, temperature=temperature) for i in range(20)])
    assert out.token_ids == rows.argmax(1).tolist()


def test_top_k_of_one_is_greedy_even_among_equals(sampler: Sampler) -> None:
    rows = torch.zeros(50, V)
    out = sampler.sample(rows, [state(seed=i, temperature=5.0, top_k=1) for i in range(50)])
    assert out.token_ids == [0] * 50


@pytest.mark.parametrize("params", [{"top_k": V}, {"top_k": 10**9}, {"top_k": -1}, {"top_p": 1.0}])
def test_a_limit_that_limits_nothing_changes_nothing(
    sampler: Sampler, params: dict[str, Any]
) -> None:
    plain = generate(sampler, [state(seed=3, temperature=1.0)], 30)
    assert generate(sampler, [state(seed=3, temperature=1.0, **params)], 30) == plain


def test_tokens_tied_at_a_threshold_are_all_kept(sampler: Sampler) -> None:
    rows = torch.full((3000, V), -10.0)
    rows[:, 100] = 1.0
    rows[:, [7, 150, 290]] = 0.0
    for params in ({"top_k": 2}, {"top_p": 0.5}):
        states = [state(seed=i, temperature=1.0, **params) for i in range(3000)]
        assert set(sampler.sample(rows, states).token_ids) == {100, 7, 150, 290}


def test_end_tokens_wait_for_min_tokens(sampler: Sampler) -> None:
    rows = torch.zeros(1, V)
    rows[0, 2], rows[0, 11], rows[0, 40] = 9.0, 8.0, 7.0
    output: list[int] = []
    s = state(output, temperature=0.0, min_tokens=2, stop_token_ids=(11,))
    for expected in (40, 40, 2, 2):
        assert sampler.sample(rows, [s]).token_ids == [expected]
        output.append(expected)


def test_min_tokens_gives_a_biased_end_token_its_bias_back(sampler: Sampler) -> None:
    rows = torch.zeros(1, V)
    rows[0, 40] = 7.0
    output: list[int] = []
    s = state(output, temperature=0.0, min_tokens=1, logit_bias={2: 10.0, 40: 1.0})
    for expected in (40, 2):
        assert sampler.sample(rows, [s]).token_ids == [expected]
        output.append(expected)


def test_bias_on_a_token_beyond_the_vocabulary_touches_no_other_row(sampler: Sampler) -> None:
    rows = logits(2)
    states = [state(temperature=0.0, logit_bias={V + 1: 100.0}), state(temperature=0.0)]
    assert sampler.sample(rows, states).token_ids == rows.argmax(1).tolist()


def test_hundreds_of_edited_tokens_are_kept_apart(sampler: Sampler) -> None:
    """More than the first allocation holds."""
    rows = torch.zeros(1, V)
    bias = {token: float(token % 7) for token in range(250)}
    out = sampler.sample(rows, [state(temperature=0.0, logit_bias={**bias, 249: 20.0})])
    assert out.token_ids == [249]


def test_penalties_follow_output_that_arrives_several_tokens_at_a_time(sampler: Sampler) -> None:
    output: list[int] = []
    growing = state(output, temperature=0.0, frequency_penalty=0.7, repetition_penalty=1.2)
    for step in range(1, 8):
        output += [step, step, 8]
        rows = logits(1, seed=step)
        fresh = state(list(output), temperature=0.0, frequency_penalty=0.7, repetition_penalty=1.2)
        a, b = growing.edits(V), fresh.edits(V)
        assert dict(zip(a[0].tolist(), a[1].T.tolist(), strict=True)) == dict(
            zip(b[0].tolist(), b[1].T.tolist(), strict=True)
        )
        assert sampler.sample(rows, [growing]) == sampler.sample(rows, [fresh])


def test_logprobs_are_of_the_models_own_distribution(sampler: Sampler) -> None:
    rows = logits(4)
    exact = rows.double().log_softmax(-1)
    params: dict[str, Any] = {"temperature": 3.0, "top_k": 50, "logit_bias": {9: 100.0}}
    states = [state(seed=i, logprobs=k, **params) for i, k in enumerate((0, 1, 5, 20))]
    out = sampler.sample(rows, states)
    assert out.token_ids == [9] * 4
    for row, (found, k) in enumerate(zip(out.logprobs, (0, 1, 5, 20), strict=True)):
        assert found is not None
        assert found.token_id == 9
        assert found.logprob == pytest.approx(float(exact[row, 9]), abs=1e-5)
        assert found.rank == int((exact[row] > exact[row, 9]).sum()) + 1
        best = exact[row].topk(k)
        assert [token for token, _ in found.top] == best.indices.tolist()
        assert [p for _, p in found.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_rows_without_logprobs_report_none(sampler: Sampler) -> None:
    out = sampler.sample(logits(3), [state(), state(logprobs=2), state()])
    assert [found is not None for found in out.logprobs] == [False, True, False]


def test_equal_alternatives_come_in_order_of_their_ids(sampler: Sampler) -> None:
    rows = torch.zeros(1, V)
    rows[0, 200] = 1.0
    found = sampler.sample(rows, [state(temperature=0.0, logprobs=1)]).logprobs[0]
    assert found is not None
    assert found.top[0][0] == 200
    compiled = CpuChooser(V).token_logprobs(rows, [0], [4])[0]
    assert [token for token, _ in compiled.top] == [200, 0, 1, 2]
    assert compiled.rank == 2


def test_prompt_logprobs_do_not_depend_on_how_they_are_chunked(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, targets = logits(23, dtype=torch.bfloat16), list(range(0, 230, 10))
    whole = sampler.prompt_logprobs(rows, targets, 2)
    monkeypatch.setattr(sampling, "_PROMPT_LOGPROB_ELEMENTS", 5 * V)
    assert sampler.prompt_logprobs(rows, targets, 2) == whole
    exact = rows.double().log_softmax(-1)
    assert [found.token_id for found in whole] == targets
    for row, found in enumerate(whole):
        assert found.logprob == pytest.approx(float(exact[row, targets[row]]), abs=1e-5)
        assert len(found.top) == 2
    assert sampler.prompt_logprobs(rows[:0], [], 2) == ()


def test_prompt_logprobs_of_broken_rows_are_nan_and_leave_the_others(sampler: Sampler) -> None:
    rows = logits(3)
    expected = sampler.prompt_logprobs(rows, [1, 2, 3], 2)
    rows[1, 5] = torch.nan
    found = sampler.prompt_logprobs(rows, [1, 2, 3], 2)
    assert (found[0], found[2]) == (expected[0], expected[2])
    assert np.isnan(found[1].logprob)
    assert isinstance(found[1], TokenLogprob)


def test_the_batch_may_change_between_calls(sampler: Sampler) -> None:
    """What is remembered of a batch must not outlive it."""
    rows = logits(2)
    greedy, biased = state(temperature=0.0), state(temperature=0.0, logit_bias={4: 99.0})
    best = rows.argmax(1).tolist()
    batch = [greedy, biased]
    assert sampler.sample(rows, batch).token_ids == [best[0], 4]
    batch.reverse()
    assert sampler.sample(rows, batch).token_ids == [4, best[1]]
    assert sampler.sample(rows[:1], (greedy,)).token_ids == best[:1]


@pytest.mark.parametrize(
    ("params", "token", "expected"),
    [
        ({}, 2, "eos"),
        ({}, 3, "eos"),
        ({}, 11, None),
        ({"stop_token_ids": (11,)}, 11, 11),
        ({"stop_token_ids": (2,)}, 2, "eos"),
        ({"ignore_eos": True}, 2, None),
        ({"ignore_eos": True, "stop_token_ids": (2, 11)}, 2, 2),
        ({"min_tokens": 3}, 2, "eos"),
        ({"min_tokens": 4}, 2, None),
        ({"min_tokens": 4, "stop_token_ids": (11,)}, 11, None),
    ],
)
def test_what_ends_an_answer(params: dict[str, Any], token: int, expected: object) -> None:
    assert state([9, 9, 9], **params).stop_kind(token) == expected


@pytest.mark.gpu
def test_a_gpu_chooses_what_the_cpu_chooses() -> None:
    device = torch.device("cuda")
    here, there = Sampler(V, CPU), Sampler(V, device)
    for step in range(20):
        rows = logits(len(MIXED), seed=step)
        batches = [[state([1] * step, seed=step, **p) for p in MIXED] for _ in range(2)]
        expected, found = here.sample(rows, batches[0]), there.sample(rows.to(device), batches[1])
        assert found.token_ids == expected.token_ids
        assert found.errors == expected.errors
