"""The stacked matrices of a layer: written in place while they fit, moved when they do not."""

from __future__ import annotations

import torch

from cotune.runtime.kernels.adapters import NOBODY, AdapterTable
from cotune.runtime.kernels.batch import AdapterRouting
from cotune.runtime.kernels.plain import HeadShape, PlainKernels
from cotune.runtime.lora import LoraPair, LoraWeights

CPU = torch.device("cpu")
IN, OUT = 12, 20
KERNELS = PlainKernels(
    HeadShape(heads=1, kv_heads=1, head_dim=8), layers=1, dtype=torch.float32, device=CPU
)


def weights(rank: int, seed: int) -> LoraWeights:
    draw = torch.Generator().manual_seed(seed)
    pair = LoraPair(torch.randn(rank, IN, generator=draw), torch.randn(OUT, rank, generator=draw))
    return LoraWeights(rank=rank, modules={"layer": pair})


def table() -> AdapterTable:
    return AdapterTable([("other", 4), ("layer", OUT)], torch.float32, CPU)


def check(table: AdapterTable, slots: list[int], installed: dict[int, LoraWeights]) -> None:
    """Rows get what their own slot's matrices give, by the columns in use and by all of them."""
    x = torch.randn(len(slots), IN, generator=torch.Generator().manual_seed(9))
    expected = torch.ones(len(slots), 4 + OUT)
    for row, slot in enumerate(slots):
        if slot in installed:
            pair = installed[slot].modules["layer"]
            expected[row, 4:] += pair.b @ (pair.a @ x[row])
    for is_static in (False, True):
        y = torch.ones(len(slots), 4 + OUT)
        routing = AdapterRouting(torch.tensor(slots), 0, is_static=is_static)
        KERNELS.add_adapters(y, x, routing, table)
        assert torch.allclose(y, expected, atol=1e-4)


def test_rows_get_their_own_adapter_whatever_was_installed_before() -> None:
    t = table()
    installed: dict[int, LoraWeights] = {}
    check(t, [0, 1, 2], installed)
    for slot, rank in ((1, 3), (2, 8), (1, 8), (3, 1)):
        installed[slot] = weights(rank, seed=10 * slot + rank)
        t.install(slot, installed[slot])
        check(t, [0, 1, 2, 3, 1], installed)
    for slot in (2, 1, 3):
        t.clear(slot)
        del installed[slot]
        check(t, [0, 1, 2, 3], installed)


def test_storage_stays_where_it_is_while_it_suffices() -> None:
    t = table()
    t.install(1, weights(8, 1))
    assert t.storage is not None
    first, before = t.storage, t.generation
    addresses = [x.data_ptr() for x in (first.down, first.up, first.owner)]
    t.install(1, weights(8, 2))
    t.install(1, weights(4, 3))
    t.clear(1)
    t.install(2, weights(8, 4))
    assert t.generation == before
    assert t.storage is first
    assert [x.data_ptr() for x in (first.down, first.up, first.owner)] == addresses
    t.install(1, weights(1, 5))  # 4 columns more than there are
    assert t.generation == before + 1
    assert t.storage is not first
    assert len(t.storage.owner) == 16  # twice as many, so that it is long until the next time


def test_spare_columns_belong_to_nobody_and_are_zero() -> None:
    t = table()
    t.install(1, weights(8, 1))
    t.install(2, weights(8, 2))
    t.clear(1)
    assert t.storage is not None
    assert t.used is not None
    assert t.storage.owner.tolist() == [2] * 8 + [NOBODY] * 8
    assert t.used.owner.tolist() == [2] * 8
    assert not t.storage.down[8:].any()
    assert not t.storage.up[:, 8:].any()
    t.clear(2)
    assert t.used is None
    assert not t.storage.down.any()
