from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cotune.streams import device as device_module
from cotune.streams.device import (
    DeviceError,
    describe_device,
    parse_cpuinfo,
    resolve_device,
    resolve_dtype,
)

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)

X86 = """\
processor\t: 0
model name\t: Some Processor 9000
flags\t\t: fpu avx2 avx512f avx512_bf16 rdtscp

processor\t: 1
model name\t: Another
flags\t\t: fpu
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd sve bf16\n"


@pytest.fixture
def cuda_devices(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """torch as it answers with some number of cards of some compute capability."""
    cards = SimpleNamespace(count=2, capability=(9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards.count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards.count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: cards.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card")
    return cards


def test_auto_is_the_first_card_or_else_the_cpu(cuda_devices: SimpleNamespace) -> None:
    assert resolve_device("auto") == torch.device("cuda", 0)
    cuda_devices.count = 0
    assert resolve_device("auto") == CPU


def test_a_name_is_the_device_it_names(cuda_devices: SimpleNamespace) -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device("cuda") == torch.device("cuda", 0)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cuda:x", "mps", "", "CPU"])
def test_a_word_that_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(DeviceError, match="use auto, cpu, cuda or cuda:N"):
        resolve_device(name)


def test_a_card_that_is_not_there_is_refused_with_those_that_are(
    cuda_devices: SimpleNamespace,
) -> None:
    with pytest.raises(DeviceError, match=r"'cuda:2'.*visible here are cuda:0 to cuda:1"):
        resolve_device("cuda:2")
    cuda_devices.count = 1
    with pytest.raises(DeviceError, match=r"visible here are cuda:0$"):
        resolve_device("cuda:1")


@pytest.mark.parametrize(
    ("built_with", "reason"),
    [(None, "this build of torch has no CUDA"), ("13.0", "torch finds no CUDA device")],
)
def test_without_cuda_the_reason_is_the_build_or_the_driver(
    cuda_devices: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    built_with: str | None,
    reason: str,
) -> None:
    cuda_devices.count = 0
    monkeypatch.setattr(torch.version, "cuda", built_with)
    with pytest.raises(DeviceError, match=f"device is 'cuda', but {reason}.*use auto or cpu"):
        resolve_device("cuda")


@pytest.mark.parametrize(
    ("name", "stored", "expected"),
    [
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", torch.float16, torch.float16),
        ("auto", torch.float64, torch.float32),
        ("auto", None, torch.float32),
        ("bfloat16", torch.float32, torch.bfloat16),
        ("float32", torch.bfloat16, torch.float32),
    ],
)
def test_auto_keeps_the_stored_dtype_and_a_name_overrides_it(
    name: str, stored: torch.dtype | None, expected: torch.dtype
) -> None:
    assert resolve_dtype(name, device=CPU, stored=stored) is expected


def test_an_unknown_dtype_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DeviceError, match="'int8'; use one of auto, float32, bfloat16, float16"):
        resolve_dtype("int8", device=CPU)


@pytest.mark.parametrize(
    ("name", "words"), [("auto", "stored in bfloat16"), ("bfloat16", "dtype is")]
)
def test_a_card_without_bfloat16_refuses_it_and_names_the_others(
    cuda_devices: SimpleNamespace, name: str, words: str
) -> None:
    cuda_devices.capability = (7, 5)
    with pytest.raises(DeviceError, match=f"{words}.*Some Card.*7.5.*use float16 or float32"):
        resolve_dtype(name, device=CUDA, stored=torch.bfloat16)
    cuda_devices.capability = (8, 0)
    assert resolve_dtype(name, device=CUDA, stored=torch.bfloat16) is torch.bfloat16


def test_cpuinfo_gives_the_first_processors_name_and_flags() -> None:
    name, flags = parse_cpuinfo(X86)
    assert name == "Some Processor 9000"
    assert {"avx2", "avx512f", "avx512_bf16"} <= flags
    assert parse_cpuinfo(ARM) == ("", frozenset({"fp", "asimd", "sve", "bf16"}))
    assert parse_cpuinfo("") == ("", frozenset())


def test_the_cpu_is_described_with_the_flags_that_kernels_depend_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_module, "parse_cpuinfo", lambda text: parse_cpuinfo(X86))
    description = describe_device(CPU)
    assert description.device == "cpu"
    assert description.name == "Some Processor 9000"
    assert description.features == ("avx2", "avx512f", "avx512_bf16")
    assert description.threads == torch.get_num_threads()


def test_a_card_is_described_with_its_memory_and_capability(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = SimpleNamespace(
        name="Some Card", total_memory=1 << 36, major=9, minor=0, multi_processor_count=132
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    description = describe_device(CUDA)
    assert description.name == "Some Card"
    assert description.total_bytes == 1 << 36
    assert description.features == ("sm_90",)
    assert description.threads == 132
