from __future__ import annotations

import argparse
import json

import pytest

from cotune.tools import bench_web


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    parser = argparse.ArgumentParser()
    bench_web.add_arguments(parser)
    return bench_web.run(parser.parse_args(argv)), capsys.readouterr().out


def test_it_counts_every_token_of_every_client(capsys: pytest.CaptureFixture[str]) -> None:
    status, output = run(capsys, "--clients", "3", "--tokens", "40", "--repeats", "2")
    assert status == 0
    result = json.loads(output.splitlines()[-1])
    assert result["clients"] == 3
    # A busy machine may join some tokens into one event, and never splits one.
    assert 0 < result["events_per_token"]["min"] <= result["events_per_token"]["max"] <= 1
    assert 0 < result["tokens_per_s"]["min"] <= result["tokens_per_s"]["median"]
    assert result["stalled_reader_throughput_ratio"]["median"] > 0
    assert "tokens/s" in output


def test_it_fails_below_what_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--clients", "1", "--tokens", "5", "--repeats", "1", "--require", "1e12")
    assert run(capsys, *arguments)[0] == 1


@pytest.mark.parametrize("flag", ["--clients", "--tokens", "--repeats"])
def test_nothing_cannot_be_measured(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, flag, "0")[0] == 2
