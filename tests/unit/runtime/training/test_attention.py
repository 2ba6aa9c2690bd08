from __future__ import annotations

import pytest
import torch

from cotune.runtime.training import attention
from cotune.runtime.training.attention import AttentionPlan, AttentionShape, attend
from cotune.runtime.training.batches import Group, pack

HEADS, KV_HEADS, WIDTH = 4, 2, 6


def _segments() -> attention.AttentionPlan:
    ids = tuple(range(1, 40))
    packed = pack(
        [
            Group(prompt_ids=ids[:11], completions=(ids[:5], ids[:9])),
            Group(prompt_ids=ids[:1], completions=(ids[:1],)),
            Group(prompt_ids=ids[:3], completions=(ids[:33],)),
        ]
    )
    return AttentionPlan(packed.segments)


def _inputs(
    rows: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> torch.Tensor:
        x = torch.randn(rows, heads, WIDTH, generator=generator, dtype=torch.float64)
        return x.to(dtype).requires_grad_()

    return draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)


def _plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shape: AttentionShape
) -> torch.Tensor:
    """The whole packed batch at once, under one mask of who sees whom."""
    rows = query.shape[0]
    seen = torch.zeros(rows, rows, dtype=torch.bool)
    for prefix, prefix_stop, start, stop in _segments()._segments:
        for row in range(start, stop):
            chain = [*range(prefix, prefix_stop), *range(start, row + 1)]
            seen[row, chain[-shape.window :] if shape.window else chain] = True
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, k) * shape.scaling
    if shape.softcap:
        scores = shape.softcap * torch.tanh(scores / shape.softcap)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=2)
    return torch.einsum("hqk,khd->qhd", weights, v)


SHAPES = [
    AttentionShape(0.4),
    AttentionShape(0.4, window=4),
    AttentionShape(0.4, window=1),
    AttentionShape(0.4, softcap=1.5),
    AttentionShape(0.4, window=7, softcap=1.5),
    AttentionShape(0.4, window=500),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_bytes", [attention.BLOCK_BYTES, 1])
def test_it_equals_one_masked_attention_in_both_directions(
    monkeypatch: pytest.MonkeyPatch, shape: AttentionShape, block_bytes: int
) -> None:
    monkeypatch.setattr(attention, "BLOCK_BYTES", block_bytes)  # 1: blocks of 16 queries
    plan = _segments()
    rows = plan._segments[-1].stop
    ours, plain = _inputs(rows), _inputs(rows)
    mixed = attend(*ours, plan, shape)
    expected = _plain(*plain, shape)
    torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=1e-12)
    dmixed = torch.linspace(-1.0, 2.0, mixed.numel(), dtype=torch.float64).view(mixed.shape)
    mixed.backward(dmixed)
    expected.backward(dmixed)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-11)


def test_small_blocks_cut_long_segments_and_skip_keys_outside_the_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "BLOCK_BYTES", 1)
    plan = _segments()
    like = torch.zeros(1)
    blocks = plan.blocks(2, 2, 8, like)
    last = plan._segments[-1]
    cut = [block for block in blocks if block.start >= last.start]
    assert [(block.start - last.start, block.stop - last.start) for block in cut] == [
        (0, 16),
        (16, 32),
        (32, 33),
    ]
    assert cut[0].prefix < cut[0].prefix_stop
    assert cut[1].prefix == cut[1].prefix_stop
    assert cut[1].own == last.start + 9  # the first query of the block sees itself and 7 before


def test_layers_of_one_kind_share_blocks_and_equal_blocks_share_masks() -> None:
    ids = tuple(range(1, 9))
    plan = AttentionPlan(
        pack([Group(prompt_ids=ids, completions=(ids, ids)) for _ in range(3)]).segments
    )
    like = torch.zeros(1)
    blocks = plan.blocks(2, 2, 0, like)
    assert plan.blocks(2, 2, 0, like) is blocks
    assert plan.blocks(2, 2, 4, like) is not blocks
    assert len({block.mask.data_ptr() for block in blocks}) == 2  # prompts; completions


def test_bfloat16_is_as_near_to_the_truth_as_its_rounding_allows() -> None:
    plan = _segments()
    rows = plan._segments[-1].stop
    ours = _inputs(rows, torch.bfloat16)
    q, k, v = (x.detach().double().requires_grad_() for x in ours)
    exact = (q, k, v)
    mixed, expected = attend(*ours, plan, SHAPES[0]), _plain(*exact, SHAPES[0])
    assert mixed.dtype is torch.bfloat16
    assert (mixed.double() - expected).norm() / expected.norm() < 1e-2
    mixed.sum().backward()
    expected.sum().backward()
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert (mine.grad.double() - theirs.grad).norm() < 2e-2 * theirs.grad.norm() + 1e-2


def test_what_is_kept_for_the_backward_grows_with_the_rows_alone() -> None:
    sizes: list[int] = []
    plan = _segments()
    ours = _inputs(plan._segments[-1].stop)

    def pack_tensor(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_tensor, lambda tensor: tensor):
        attend(*ours, plan, SHAPES[0])
    assert sizes == [x.numel() for x in ours]
