from __future__ import annotations

import pytest

from cotune import RequestError, SamplingParams


@pytest.mark.parametrize(
    ("params", "param"),
    [
        (SamplingParams(n=0), "n"),
        (SamplingParams(max_tokens=0), "max_tokens"),
        (SamplingParams(max_tokens=4, min_tokens=5), "min_tokens"),
        (SamplingParams(temperature=-0.1), "temperature"),
        (SamplingParams(temperature=float("nan")), "temperature"),
        (SamplingParams(top_p=0.0), "top_p"),
        (SamplingParams(top_k=-2), "top_k"),
        (SamplingParams(seed=2**64), "seed"),
        (SamplingParams(stop=("",)), "stop.0"),
        (SamplingParams(stop=("x",) * 65), "stop"),
        (SamplingParams(stop_token_ids=(5000,)), "stop_token_ids.0"),
        (SamplingParams(logit_bias={1: 101.0}), "logit_bias.1"),
        (SamplingParams(logprobs=21), "logprobs"),
    ],
)
def test_a_bad_field_is_named(params: SamplingParams, param: str) -> None:
    with pytest.raises(RequestError) as error:
        params.validate(vocab_size=4096)
    assert error.value.param == param


def test_resolve_takes_the_models_defaults_only_where_the_caller_was_silent() -> None:
    params = SamplingParams(temperature=0.0).resolve({"temperature": 0.7, "top_p": 0.9, "foo": 1})
    assert (params.temperature, params.top_p, params.top_k) == (0.0, 0.9, 0)
