"""What the benchmark of publications makes of what it measured."""

from __future__ import annotations

import pytest

from cotune.tools.bench_publish import AFTERMATH_S, Publication, _gaps, _ttfts

WARM = Publication(True, 10.0, 11.0, (0.02, 0.01, 0.04), (0.03, 0.01, 0.01))
COLD = Publication(False, 20.0, 20.1, (0.02, 0.02, 0.02), (0.2, 0.02, 0.02))


def test_a_gap_belongs_to_the_publication_that_it_overlaps() -> None:
    gaps = [
        (9.99, 0.01),  # ended before it began
        (10.01, 0.02),  # under way when it began
        (11.0 + AFTERMATH_S + 0.2, 0.3),  # began in its aftermath
        (20.1, 5.0),
        (30.0, 0.04),
    ]
    found = _gaps(gaps, [WARM, COLD])["gaps_ms"]
    assert {place: entry["count"] for place, entry in found.items()} == {
        "warm": 2,
        "cold": 1,
        "otherwise": 2,
    }
    assert found["warm"]["max"] == pytest.approx(300.0)
    assert found["otherwise"]["max"] == pytest.approx(40.0)


def test_the_first_request_after_it_is_compared_with_those_before() -> None:
    warm, cold = (_ttfts([WARM, COLD], is_warm) for is_warm in (True, False))
    assert warm["ratio"] == pytest.approx(1.5)
    assert warm["first_ratio"]["max"] == pytest.approx(1.5)
    assert warm["publication_ms"]["median"] == pytest.approx(1000.0)
    assert cold["ratio"] == pytest.approx(10.0)
