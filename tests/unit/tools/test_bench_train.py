from __future__ import annotations

import argparse
import json
import math
import tempfile
from typing import TYPE_CHECKING

import pytest

from cotune.tools import bench_train

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    "trainers", [["cotune"], pytest.param(["cotune", "trl"], marks=pytest.mark.slow)]
)
def test_it_reports_time_memory_and_losses_of_every_trainer(
    trainers: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # it is remembered
    parser = argparse.ArgumentParser()
    bench_train.add_arguments(parser)
    flags = "--shape small --threads 1 --steps 2 --pairs 2 --prompt 6 --completion 5 --trainers"
    assert bench_train.run(parser.parse_args([*flags.split(), *trainers])) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result["trainers"]) == trainers
    for trainer in result["trainers"].values():
        assert len(trainer["seconds"]) == 2
        assert trainer["peak_rss_bytes"] > trainer["working_bytes"] > 0
        # The first step, which does not count, started at log 2; the adapter learns from there.
        assert trainer["losses"][-1] < trainer["losses"][0] < math.log(2)
    assert list(result["ratios"]) == trainers[1:]
    assert list(tmp_path.glob("cotune-*")) == []
