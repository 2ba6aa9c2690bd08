"""`cotune bench policy`: its states, its table and its JSON line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from cotune.policy import POLICY_NAMES
from cotune.tools.bench_policy import make_scenes, measure
from cotune.tools.cli import main

if TYPE_CHECKING:
    import pytest


def test_every_state_has_as_many_tasks_as_asked_for_in_order_of_rank() -> None:
    for name, seen in make_scenes(200, seed=3).items():
        assert len(seen.running) + len(seen.waiting) == 200, name
        ranks = [view.rank_s for view in seen.waiting]
        assert ranks == sorted(ranks), name


def test_the_same_seed_gives_the_same_states() -> None:
    assert make_scenes(60, seed=1) == make_scenes(60, seed=1)
    assert make_scenes(60, seed=1) != make_scenes(60, seed=2)


def test_percentiles_are_in_order_and_of_decisions() -> None:
    found = measure("cotune", make_scenes(60, seed=0)["queue"], 20)
    assert 0.0 < found["p50"] <= found["p90"] <= found["p99"] <= found["max"]
    assert 0.0 < found["cpu_p50"] <= found["cpu_p99"]


def test_it_prints_a_table_and_last_a_line_for_programs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["bench", "policy", "--tasks", "40", "--repeats", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result["tasks"] == 40
    assert set(result["worst_p99_us"]) == set(POLICY_NAMES)
    assert len(result["states"]) == len(lines) - 2
    for name in POLICY_NAMES:
        assert any(line.startswith(name) for line in lines)


def test_one_policy_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "policy", "--tasks", "20", "--repeats", "2", "--policy", "mace"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["worst_p99_us"]) == {"mace"}


def test_less_than_one_of_anything_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "policy", "--repeats", "0"]) == 2
    assert "--repeats is 0; use 1 or more" in capsys.readouterr().err
