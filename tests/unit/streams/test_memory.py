from __future__ import annotations

import logging
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psutil
import pynvml
import pytest
import torch

from cotune.streams import memory
from cotune.streams.memory import (
    CgroupMemory,
    MemoryProbe,
    MemoryReading,
    parse_limit,
    parse_membership,
    parse_stat,
    read_cgroup_memory,
)

if TYPE_CHECKING:
    from collections.abc import Callable

GIB = 1 << 30
UUID = "0f2c9c3e-5d1b-11ee-8c99-0242ac120002"


# -- control groups ------------------------------------------------------------------------------

V2_MEMBERSHIP = "0::/system.slice/docker-1f.scope\n"
V1_MEMBERSHIP = """\
12:cpu,cpuacct:/docker/1f
4:memory:/docker/1f
0::/docker/1f
"""


def write_v2(directory: Path, limit: str, used: int, cache: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "memory.max").write_text(limit + "\n")
    (directory / "memory.current").write_text(f"{used}\n")
    (directory / "memory.stat").write_text(f"anon 5\nactive_file 7\ninactive_file {cache}\n")


def write_v1(directory: Path, limit: int, used: int, cache: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (directory / "memory.usage_in_bytes").write_text(f"{used}\n")
    (directory / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {cache}\n")


@pytest.fixture
def group(tmp_path: Path) -> Callable[[str], CgroupMemory | None]:
    """Reads the limits under `tmp_path` for a process with that membership text."""

    def read(membership: str) -> CgroupMemory | None:
        file = tmp_path / "membership"
        file.write_text(membership)
        return read_cgroup_memory(tmp_path, file)

    return read


def test_membership_names_each_controllers_group_and_version_2_as_the_empty_name() -> None:
    assert parse_membership(V1_MEMBERSHIP) == {
        "cpu": PurePosixPath("/docker/1f"),
        "cpuacct": PurePosixPath("/docker/1f"),
        "memory": PurePosixPath("/docker/1f"),
        "": PurePosixPath("/docker/1f"),
    }
    assert parse_membership("1:name=a:b:/odd:path\n") == {"name=a": PurePosixPath("/b:/odd:path")}


@pytest.mark.parametrize(
    ("text", "limit_bytes"),
    [
        ("max\n", None),
        ("9223372036854771712\n", None),
        ("536870912\n", 536870912),
        ("0\n", 0),
    ],
)
def test_both_versions_words_for_no_limit_are_none(text: str, limit_bytes: int | None) -> None:
    assert parse_limit(text) == limit_bytes


def test_stat_becomes_a_mapping() -> None:
    assert parse_stat("anon 12\ninactive_file 34\n") == {"anon": 12, "inactive_file": 34}


def test_version_2_counts_the_file_cache_as_free(
    tmp_path: Path, group: Callable[[str], CgroupMemory | None]
) -> None:
    write_v2(tmp_path / "system.slice/docker-1f.scope", str(4 * GIB), 3 * GIB, 1 * GIB)
    assert group(V2_MEMBERSHIP) == CgroupMemory(limit_bytes=4 * GIB, free_bytes=2 * GIB)


def test_the_tightest_level_counts_for_limit_and_free_separately(
    tmp_path: Path, group: Callable[[str], CgroupMemory | None]
) -> None:
    write_v2(tmp_path / "system.slice/docker-1f.scope", str(4 * GIB), 1 * GIB, 0)
    write_v2(tmp_path / "system.slice", str(8 * GIB), 7 * GIB, 0)
    assert group(V2_MEMBERSHIP) == CgroupMemory(limit_bytes=4 * GIB, free_bytes=1 * GIB)


def test_a_group_over_its_limit_has_nothing_free(
    tmp_path: Path, group: Callable[[str], CgroupMemory | None]
) -> None:
    write_v2(tmp_path / "system.slice/docker-1f.scope", str(GIB), 2 * GIB, 0)
    assert group(V2_MEMBERSHIP) == CgroupMemory(limit_bytes=GIB, free_bytes=0)


def test_a_container_finds_its_own_group_at_the_mount_point(
    tmp_path: Path, group: Callable[[str], CgroupMemory | None]
) -> None:
    write_v1(tmp_path / "memory", 2 * GIB, 1 * GIB, GIB // 2)
    expected = CgroupMemory(limit_bytes=2 * GIB, free_bytes=GIB + GIB // 2)
    assert group(V1_MEMBERSHIP) == expected


def test_version_1_wins_where_it_holds_the_memory_controller(
    tmp_path: Path, group: Callable[[str], CgroupMemory | None]
) -> None:
    write_v1(tmp_path / "memory/docker/1f", GIB, 0, 0)
    write_v2(tmp_path / "docker/1f", str(2 * GIB), 0, 0)
    assert group(V1_MEMBERSHIP) == CgroupMemory(limit_bytes=GIB, free_bytes=GIB)


@pytest.mark.parametrize("membership", ["0::/\n", "3:cpu:/\n", V1_MEMBERSHIP])
def test_without_a_limit_there_is_none(
    tmp_path: Path, group: Callable[[str], CgroupMemory | None], membership: str
) -> None:
    write_v2(tmp_path, "max", GIB, 0)
    assert group(membership) is None


def test_a_system_without_control_groups_has_no_limit(tmp_path: Path) -> None:
    assert read_cgroup_memory(tmp_path, tmp_path / "missing") is None


# -- the CPU -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (None, MemoryReading(16 * GIB, 6 * GIB, 0)),
        (CgroupMemory(4 * GIB, 1 * GIB), MemoryReading(4 * GIB, 1 * GIB, 0)),
        (CgroupMemory(64 * GIB, 60 * GIB), MemoryReading(16 * GIB, 6 * GIB, 0)),
        (CgroupMemory(8 * GIB, 7 * GIB), MemoryReading(8 * GIB, 6 * GIB, 0)),
    ],
)
def test_on_the_cpu_the_machine_or_the_limit_counts_whichever_is_less(
    monkeypatch: pytest.MonkeyPatch, limits: CgroupMemory | None, expected: MemoryReading
) -> None:
    machine = SimpleNamespace(total=16 * GIB, available=6 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    monkeypatch.setattr(memory, "read_cgroup_memory", lambda: limits)
    assert MemoryProbe(torch.device("cpu")).read() == expected


def test_this_machine_can_be_read() -> None:
    probe = MemoryProbe(torch.device("cpu"))
    reading = probe.read()
    assert probe.source == "system"
    assert 0 < reading.free_bytes <= reading.total_bytes <= psutil.virtual_memory().total
    assert reading.available_bytes == reading.free_bytes


def test_a_device_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="device is 'meta'"):
        MemoryProbe(torch.device("meta"))


# -- CUDA, with the libraries replaced -----------------------------------------------------------


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A card that NVML lists under a UUID; tests may take things away from it."""
    card = SimpleNamespace(nvml_uuid=f"GPU-{UUID}", is_driver_there=True, asked=[])

    def init() -> None:
        if not card.is_driver_there:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    def find(uuid: str) -> str:
        card.asked.append(uuid)
        if uuid != card.nvml_uuid:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return "handle"

    def info(handle: str) -> Any:
        assert handle == "handle"
        return SimpleNamespace(total=80 * GIB, free=30 * GIB, used=50 * GIB)

    monkeypatch.setattr(pynvml, "nvmlInit", init)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", find)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", info)
    properties = SimpleNamespace(uuid=UUID)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (29 * GIB, 79 * GIB))
    stats = {"reserved_bytes.all.current": 12 * GIB, "allocated_bytes.all.current": 9 * GIB}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    return card


def test_on_cuda_nvml_says_what_is_free_and_torch_what_it_holds_unused(
    card: SimpleNamespace,
) -> None:
    probe = MemoryProbe(torch.device("cuda", 0))
    assert probe.source == "nvml"
    assert probe.read() == MemoryReading(80 * GIB, 30 * GIB, 3 * GIB)
    assert probe.read().available_bytes == 33 * GIB


def test_a_part_of_a_card_is_found_under_its_own_uuid(card: SimpleNamespace) -> None:
    card.nvml_uuid = f"MIG-{UUID}"
    assert MemoryProbe(torch.device("cuda", 0)).source == "nvml"
    assert card.asked == [f"GPU-{UUID}", f"MIG-{UUID}"]


@pytest.mark.parametrize("missing", ["driver", "card"])
def test_without_nvml_torch_is_asked_and_that_is_said_once(
    card: SimpleNamespace, caplog: pytest.LogCaptureFixture, missing: str
) -> None:
    if missing == "driver":
        card.is_driver_there = False
    else:
        card.nvml_uuid = "GPU-of-somebody-else"
    with caplog.at_level(logging.WARNING):
        probe = MemoryProbe(torch.device("cuda", 1))
        for _ in range(3):
            assert probe.read() == MemoryReading(79 * GIB, 29 * GIB, 3 * GIB)
    assert probe.source == "torch"
    assert len(caplog.records) == 1
    assert "cuda:1 is read through torch, not NVML" in caplog.text


def test_when_nvml_fails_later_torch_is_asked_from_then_on_and_that_is_said_once(
    card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    probe = MemoryProbe(torch.device("cuda", 0))
    assert probe.read().free_bytes == 30 * GIB
    asked = []

    def fail(handle: str) -> Any:
        asked.append(handle)
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", fail)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert probe.read() == MemoryReading(79 * GIB, 29 * GIB, 3 * GIB)
    assert (probe.source, len(asked)) == ("torch", 1)
    assert len(caplog.records) == 1
    assert "cuda:0 is read through torch, not NVML: GPU is lost" in caplog.text


def test_a_card_that_torch_has_not_used_yet_has_nothing_unused(
    card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {})
    assert MemoryProbe(torch.device("cuda", 0)).read().allocator_unused_bytes == 0


@pytest.mark.gpu
def test_on_a_real_card_both_sources_agree() -> None:
    device = torch.device("cuda", 0)
    held = torch.empty(1 << 26, dtype=torch.uint8, device=device)
    probe = MemoryProbe(device)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    reading = probe.read()
    assert probe.source == "nvml"
    assert abs(reading.total_bytes - total_bytes) < GIB
    assert abs(reading.free_bytes - free_bytes) < GIB
    del held
    assert probe.read().allocator_unused_bytes >= reading.allocator_unused_bytes + (1 << 26)
