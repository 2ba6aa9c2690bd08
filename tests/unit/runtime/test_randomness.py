from __future__ import annotations

import numpy as np
import pytest

from cotune import SamplingParams
from cotune.runtime.choosing_cpu import uniform
from cotune.runtime.randomness import SeedSource, mix64, stream_key, uniforms

# The first outputs of splitmix64 from state 0, as its authors' C code prints them.
SPLITMIX64 = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC)


def test_the_sequence_is_splitmix64() -> None:
    keys, positions = np.zeros(4, np.uint64), np.arange(1, 5)
    assert uniforms(keys, positions, 0).tolist() == [(x >> 16) / 2**48 for x in SPLITMIX64]


def test_the_compiled_form_gives_the_same_numbers() -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 2**64, 200, np.uint64)
    positions = rng.integers(0, 2**31, 200, np.int64)
    for attempt in (0, 1, 7):
        compiled = [uniform(k, p, attempt) for k, p in zip(keys, positions, strict=True)]
        assert uniforms(keys, positions, attempt).tolist() == compiled


@pytest.mark.parametrize("axis", ["position", "stream", "seed", "attempt"])
def test_numbers_are_even_and_independent_along_every_axis(axis: str) -> None:
    count = 20_000
    steps = np.arange(count)
    zeros = np.zeros(count, np.int64)
    if axis == "position":
        numbers = uniforms(np.full(count, stream_key(1, 0), np.uint64), steps, 0)
    elif axis == "stream":
        keys = np.array([stream_key(1, i) for i in range(count)], np.uint64)
        numbers = uniforms(keys, zeros, 0)
    elif axis == "seed":
        keys = np.array([stream_key(i, 0) for i in range(count)], np.uint64)
        numbers = uniforms(keys, zeros, 0)
    else:
        key = np.array([stream_key(1, 0)], np.uint64)
        numbers = np.array([uniforms(key, zeros[:1], i)[0] for i in range(count)])
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    tolerance = 5 / np.sqrt(count)
    assert abs(numbers.mean() - 0.5) < tolerance * np.sqrt(1 / 12)
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < tolerance
    histogram = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((histogram - count / 20) ** 2 / (count / 20)).sum() < 60  # 19 degrees of freedom


def test_seeds_that_differ_by_sign_or_sibling_start_elsewhere() -> None:
    keys = {stream_key(seed, stream) for seed in range(-100, 100) for stream in range(50)}
    assert len(keys) == 200 * 50


def test_mixing_loses_nothing() -> None:
    assert len({mix64(x) for x in range(10_000)}) == 10_000


def test_a_requests_own_seed_is_kept() -> None:
    assert SeedSource(1).resolve(SamplingParams(seed=-7)) == -7


def test_requests_without_seed_get_different_ones_that_the_runtimes_seed_reproduces() -> None:
    first, second, other = SeedSource(5), SeedSource(5), SeedSource(6)
    params = SamplingParams()
    seeds = [first.resolve(params) for _ in range(100)]
    assert len(set(seeds)) == 100
    assert seeds == [second.resolve(params) for _ in range(100)]
    assert seeds != [other.resolve(params) for _ in range(100)]


def test_without_a_runtime_seed_every_runtime_differs() -> None:
    assert SeedSource().resolve(SamplingParams()) != SeedSource().resolve(SamplingParams())


def test_a_seeded_request_does_not_shift_the_seeds_of_others() -> None:
    first, second = SeedSource(5), SeedSource(5)
    second.resolve(SamplingParams(seed=3))
    assert first.resolve(SamplingParams()) == second.resolve(SamplingParams())
