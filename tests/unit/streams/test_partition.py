"""Shares of multiprocessors, and what happens where a card cannot be divided."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.cuda import green_contexts

from cotune.streams.lane import Lane
from cotune.streams.partition import GRANULE, multiprocessors_for, open_partition

CARD = torch.device("cuda", 1)


def test_a_share_is_a_multiple_of_what_can_be_dealt_and_leaves_some_for_others() -> None:
    assert multiprocessors_for(0.25, 132) == 32
    assert multiprocessors_for(0.001, 132) == GRANULE
    assert multiprocessors_for(0.999, 132) == 120
    for total in (16, 84, 108, 114, 132, 144):
        for percent in range(1, 100):
            count = multiprocessors_for(percent / 100, total)
            assert count % GRANULE == 0
            assert GRANULE <= count <= total - GRANULE


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"lanes\.sm_share is .*; use a share above 0"):
        multiprocessors_for(share, 132)


def test_a_card_too_small_to_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"8 multiprocessors, .* too few to divide"):
        multiprocessors_for(0.5, 8)


class FakeContext:
    """Stands in for torch's green context."""

    asked: dict[str, Any]

    @staticmethod
    def create(**asked: Any) -> FakeContext:
        context = FakeContext()
        context.asked = asked
        return context

    def Stream(self) -> str:
        return "a stream"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(multi_processor_count=132),
    )


@pytest.mark.usefixtures("card")
def test_a_partition_is_a_green_context_of_that_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(green_contexts, "GreenContext", FakeContext)
    found = open_partition(CARD, 0.5)
    assert found is not None
    assert (found.stream, found.multiprocessors) == ("a stream", 64)
    assert found.context.asked == {"num_sms": 64, "device_id": 1}


@pytest.mark.usefixtures("card")
def test_without_green_contexts_the_share_is_ignored_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("driver too old")

    monkeypatch.setattr(FakeContext, "create", refuse)
    monkeypatch.setattr(green_contexts, "GreenContext", FakeContext)
    assert open_partition(CARD, 0.5) is None
    assert "lanes.sm_share is ignored" in caplog.text
    assert "driver too old" in caplog.text


def test_a_lane_refuses_a_share_that_is_none_and_ignores_one_on_the_cpu() -> None:
    with pytest.raises(ValueError, match=r"sm_share of lane 'x' is 1\.5; it must be above 0"):
        Lane("x", device=torch.device("cpu"), sm_share=1.5)
    with Lane("x", device=torch.device("cpu"), sm_share=0.5) as lane:
        assert lane.run_sync(len, "abc") == 3
