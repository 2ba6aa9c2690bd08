from __future__ import annotations

import json
from argparse import Namespace
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

import cotune
from cotune.streams import memory
from cotune.tools import collect_env

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_json_and_text_hold_the_same_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert collect_env.run(Namespace(json=True)) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cotune"]["version"] == cotune.__version__
    assert report["libraries"]["torch"] == torch.__version__
    assert report["torch"]["threads"] == torch.get_num_threads()
    assert report["memory"]["machine_bytes"] >= report["memory"]["available_bytes"] > 0
    assert report["cpu"]["usable_cores"] >= 1

    assert collect_env.run(Namespace(json=False)) == 0
    text = capsys.readouterr().out
    for title, section in report.items():
        assert f"\n{title}\n" in f"\n{text}"
        for name in section:
            assert name.removesuffix("_bytes").replace("_", " ") in text


def test_values_are_written_for_people() -> None:
    lines = collect_env.to_lines(
        {
            "one": {"size_bytes": 3 << 29, "is_on": True, "off": False, "nothing": None},
            "two": {"flags": ["a", "b"], "card": {"name": "x", "free_bytes": 1 << 30}},
            "three": {},
        }
    )
    assert [" ".join(line.split()) for line in lines] == [
        "one", "size 1.50 GiB", "is on yes", "off no", "nothing none",
        "two", "flags a b", "card name x, free_bytes 1.00 GiB",
        "three", "none",
    ]  # fmt: skip


def test_no_secret_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTUNE_API_KEY", "very-secret")
    monkeypatch.setenv("HF_TOKEN", "very-secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    report = collect_env.collect()
    assert report["environment"]["OMP_NUM_THREADS"] == "1"
    assert "very-secret" not in json.dumps(report)


def test_cards_are_reported_with_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(
        name="Some Card", total_memory=1 << 36, major=9, minor=0, multi_processor_count=132
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {})
    monkeypatch.setattr(memory, "_open_nvml", lambda device: lambda: (1 << 36, 1 << 35))
    gpus = collect_env.collect()["gpus"]
    assert list(gpus) == ["driver", "cuda:0", "cuda:1"]
    assert gpus["cuda:1"] == {
        "name": "Some Card",
        "capability": "sm_90",
        "multiprocessors": 132,
        "total_bytes": 1 << 36,
        "free_bytes": 1 << 35,
        "memory_source": "nvml",
    }


def test_the_demo_model_is_present_when_config_and_weights_are(tmp_path: Path) -> None:
    assert collect_env._demo_model(tmp_path / "missing") == {
        "present": False, "files": 0, "megabytes": 0.0,
    }  # fmt: skip
    (tmp_path / "config.json").write_text("{}")
    assert collect_env._demo_model(tmp_path)["present"] is False
    (tmp_path / "model.safetensors").write_bytes(bytes(1_500_000))
    assert collect_env._demo_model(tmp_path) == {"present": True, "files": 2, "megabytes": 1.5}
