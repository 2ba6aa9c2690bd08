"""What the benchmark of memory makes of what it measured."""

from __future__ import annotations

import argparse
import json

import pytest

from cotune.runtime.errors import CotuneError
from cotune.tools import bench_memory
from cotune.tools.bench_memory import (
    STAGES,
    Needs,
    Reading,
    Row,
    account_of,
    rows_of,
    statement,
)

MIB = 1 << 20
BASE = 200 * MIB
NEEDS = Needs(
    masters=5 * MIB,
    gradients=5 * MIB,
    moments=10 * MIB,
    kept=20 * MIB,
    served=12 * MIB,
    activations=60 * MIB,
)

OFF = (300, 800, 810, 820, 820, 820, 830, 830)
#                   libraries: 50, trainer: 30; 240 more in the end
ON = (300, 805, 815, 825, 875, 905, 1060, 1070)


def rows(on: tuple[int, ...] = ON) -> list[Row]:
    return rows_of(readings(OFF), readings(on))


def readings(sizes: tuple[int, ...]) -> list[Reading]:
    return [
        Reading(
            stage=stage,
            held_bytes=size * MIB,
            rss_bytes=(size + 5) * MIB,
            peak_bytes=(size + size // 100 + 6) * MIB,
        )
        for stage, size in zip(STAGES, sizes, strict=True)
    ]


def test_stages_are_compared_one_by_one() -> None:
    found = rows()
    assert [row.stage for row in found] == list(STAGES)
    assert [row.added_bytes // MIB for row in found] == [0, 5, 5, 5, 55, 85, 230, 240]
    assert [row.added_peak_bytes // MIB for row in found] == [0, 5, 5, 5, 55, 86, 232, 242]
    with pytest.raises(ValueError, match="shorter"):
        rows_of(readings(OFF), readings(ON)[:-1])


def test_what_was_added_is_accounted_for() -> None:
    account = account_of(rows(), BASE, NEEDS)
    assert account.libraries == 50 * MIB
    assert account.trainer == 30 * MIB
    assert account.held == 240 * MIB
    assert account.peak == 242 * MIB
    assert NEEDS.lasting_bytes == 52 * MIB
    # More than the base weights was added, and yet there is no room for a copy of them.
    assert account.unexplained == (240 - 50 - 52) * MIB
    assert not account.has_second_copy


@pytest.mark.parametrize(
    ("stages", "name"), [((5, 6, 7), "with the trainer"), ((7,), "at the publication")]
)
def test_a_second_copy_shows_wherever_it_is_made(stages: tuple[int, ...], name: str) -> None:
    copied = tuple(size + 200 * (stage in stages) for stage, size in enumerate(ON))
    account = account_of(rows(copied), BASE, NEEDS)
    assert account.has_second_copy, name
    assert "A second copy of the base may be there." in statement(account)


def test_a_copy_that_is_given_back_later_shows_as_well() -> None:
    copied = tuple(size + 200 * (stage == 5) for stage, size in enumerate(ON))
    account = account_of(rows(copied), BASE, NEEDS)
    assert account.unexplained < BASE
    assert account.trainer == 230 * MIB
    assert account.has_second_copy


def test_the_statement_sets_what_was_added_beside_the_base_and_the_needs() -> None:
    text = statement(account_of(rows(), BASE, NEEDS))
    assert "holds 240.0 MiB more, beside base weights of 200.0 MiB" in text
    assert "At its peak it takes 242.0 MiB more" in text
    shares = {
        words[1].strip(): float(words[0])
        for line in text.splitlines()
        if len(words := line.split(" MiB  ", 1)) == 2
    }
    assert sum(shares.values()) == pytest.approx(240.0), "the lines add up to what was added"
    assert "There is no second copy of the base." in text


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_memory.add_arguments(parser)
    return parser.parse_args(flags)


@pytest.mark.parametrize("steps", ["0", "7", "-2"])
def test_an_odd_number_of_steps_is_refused(steps: str) -> None:
    with pytest.raises(CotuneError, match="use an even number"):
        bench_memory.run(parse("--steps", steps))


@pytest.mark.slow
def test_it_goes_through_all_stages_and_reports_them(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--shape small --dtype float32 --prompt 24 --completion 24 --steps 4 --pages 256"
    bench_memory.run(parse(*flags.split()))  # a small model's weights are lost in what varies
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["stage"] for row in result["stages"]] == list(STAGES)
    for row in result["stages"]:
        for side in ("off", "on"):
            assert row[side]["peak_bytes"] >= row[side]["rss_bytes"] > 0
    assert result["account"]["base"] == result["sizes"]["base_bytes"] > 0
    assert all(size > 0 for size in result["account"]["needs"].values())
