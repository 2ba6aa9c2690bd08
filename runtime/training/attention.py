"""Attention of a packed training batch: per segment, over its prompt's rows and its own.

Kept for the backward are queries, keys and values alone: no scores, and no copies of the prompt's
keys for each completion. Blocks of queries bound the memory of the scores, which are computed again
in the backward:

    S = cap(scaling q k^T) + mask      P = softmax(S)      o = P v

    dv = P^T do     dP = do v^T     dS = P * (dP - sum(P * dP))     dq = dS k     dk = dS^T q

The heads that share keys are rows of one product, so keys are never repeated for their queries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .batches import Segment

ATTENTION = "cotune_training"

BLOCK_BYTES = 8 << 20
"""Most bytes of float32 scores at a time, though never fewer than 16 queries."""

_ON_A_CARD = 8
"""Times as many there: each block costs some thirty launches."""


class AttentionShape(NamedTuple):
    """What a layer asks for: a factor on the scores, a sliding window, a soft cap (0: none)."""

    scaling: float
    window: int = 0
    softcap: float = 0.0


class Block(NamedTuple):
    """Queries [start, stop) and the keys that any of them sees: [prefix, prefix_stop), [own, stop).

    `mask` (G * queries, keys) is 0, or -inf where a key is not seen: for each of the G query heads
    that share a key head, one after the other.
    """

    start: int
    stop: int
    prefix: int
    prefix_stop: int
    own: int
    mask: torch.Tensor


class AttentionPlan:
    """The segments of one forward cut into blocks; made once per kind of layer, for all layers."""

    def __init__(self, segments: tuple[Segment, ...]) -> None:
        self._segments = segments
        self._known: dict[tuple[object, ...], tuple[Block, ...]] = {}

    def blocks(
        self, sharing: int, kv_heads: int, window: int, like: torch.Tensor
    ) -> tuple[Block, ...]:
        """The blocks for layers of `kv_heads` key heads, `sharing` query heads to each.

        Args:
            window: tokens that a token sees, itself included; 0 for all before it.
            like: the queries; masks are on their device, in the dtype of their scores.
        """
        dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
        key = (sharing, kv_heads, window, dtype, like.device)
        if key not in self._known:
            masks = _Masks(sharing, window, dtype, like.device)
            self._known[key] = tuple(self._cut(sharing * kv_heads, window, masks))
        return self._known[key]

    def _cut(self, heads: int, window: int, masks: _Masks) -> Iterator[Block]:
        for segment in self._segments:
            prefix_keys = segment.prefix_stop - segment.prefix
            keys = prefix_keys + segment.stop - segment.start
            most = BLOCK_BYTES * (_ON_A_CARD if masks.device.type == "cuda" else 1)
            size = max(16, most // (4 * heads * keys))
            for start in range(segment.start, segment.stop, size):
                stop = min(start + size, segment.stop)
                # Positions, counted from the first key of the prefix.
                first = prefix_keys + start - segment.start
                oldest = max(0, first - window + 1) if window else 0
                prefix = min(segment.prefix + oldest, segment.prefix_stop)
                own = segment.start + max(0, oldest - prefix_keys)
                mask = masks.get(stop - start, first + stop - start - oldest)
                yield Block(start, stop, prefix, segment.prefix_stop, own, mask)


class _Masks:
    """Masks by the numbers of queries and keys; blocks of one shape share theirs."""

    def __init__(self, sharing: int, window: int, dtype: torch.dtype, device: torch.device) -> None:
        self._sharing, self._window = sharing, window
        self._dtype, self.device = dtype, device
        self._known: dict[tuple[int, int], torch.Tensor] = {}

    def get(self, queries: int, keys: int) -> torch.Tensor:
        """(sharing * queries, keys): hidden is what is after a query, or before its window."""
        if (queries, keys) not in self._known:
            at = torch.arange(keys - queries, keys, device=self.device).unsqueeze(1)
            seen = torch.arange(keys, device=self.device).unsqueeze(0)
            hidden = seen > at
            if self._window:
                hidden |= seen <= at - self._window
            mask = torch.zeros(queries, keys, dtype=self._dtype, device=self.device)
            mask = mask.masked_fill_(hidden, float("-inf")).repeat(self._sharing, 1)
            self._known[queries, keys] = mask
        return self._known[queries, keys]


def training_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    cotune_plan: AttentionPlan,
    cotune_shapes: dict[Any, AttentionShape] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_ignored: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers' modules call.

    Args:
        query: (1, H, T, D), rotated. key, value: (1, K, T, D).
        cotune_shapes: takes down what this module asked for.

    Returns: ((1, T, H, D), None).
    """
    shape = AttentionShape(
        query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window or 0, softcap or 0.0
    )
    if cotune_shapes is not None:
        cotune_shapes[module] = shape
    mixed = attend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cotune_plan,
        shape,
    )
    return mixed.unsqueeze(0), None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: AttentionPlan,
    shape: AttentionShape,
) -> torch.Tensor:
    """Attention of all segments: (T, H, D) from queries of that shape, keys and values (T, K, D).

    Consecutive query heads share a key head, H / K of them.
    """
    mixed: torch.Tensor = _SegmentAttention.apply(query, key, value, plan, shape)  # type: ignore[no-untyped-call]
    return mixed


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        plan: AttentionPlan,
        shape: AttentionShape,
    ) -> torch.Tensor:
        rows, heads, _ = query.shape
        kv_heads = key.shape[1]
        blocks = plan.blocks(heads // kv_heads, kv_heads, shape.window, query)
        mixed = query.new_empty(rows, heads, value.shape[2])
        for block in blocks:
            q = _by_kv_head(query[block.start : block.stop], kv_heads)
            scores, _ = _scores(q, _keys(key, block), block, shape)
            weights = scores.softmax(dim=2).to(value.dtype)
            mixed[block.start : block.stop] = _by_row(weights @ _keys(value, block), heads)
        ctx.blocks, ctx.shape = blocks, shape
        ctx.save_for_backward(query, key, value)
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (dmixed,) = gradients
        query, key, value = ctx.saved_tensors
        heads, kv_heads = query.shape[1], key.shape[1]
        dquery = torch.empty_like(query, memory_format=torch.contiguous_format)
        dkey = torch.zeros_like(key, memory_format=torch.contiguous_format)
        dvalue = torch.zeros_like(value, memory_format=torch.contiguous_format)
        for block in ctx.blocks:
            rows = slice(block.start, block.stop)
            q = _by_kv_head(query[rows], kv_heads)
            k, v = _keys(key, block), _keys(value, block)
            do = _by_kv_head(dmixed[rows], kv_heads)
            scores, slope = _scores(q, k, block, ctx.shape)
            weights = scores.softmax(dim=2)
            _add_keys(dvalue, block, weights.to(do.dtype).transpose(1, 2) @ do)
            dweights = (do @ v.transpose(1, 2)).to(weights.dtype)
            dscores = torch._softmax_backward_data(dweights, weights, 2, weights.dtype)
            if slope is not None:
                dscores *= slope
            dscores = dscores.mul_(ctx.shape.scaling).to(q.dtype)
            dquery[rows] = _by_row(dscores @ k, heads)
            _add_keys(dkey, block, dscores.transpose(1, 2) @ q)
        return dquery, dkey, dvalue, None, None


def _scores(
    q: torch.Tensor, k: torch.Tensor, block: Block, shape: AttentionShape
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores (K, G n, m) in float32, -inf where hidden, and the slope of the soft cap, if any.

    The product is of float32, too: rounded to bfloat16, a score of 8 would be off by 0.03, and the
    weight of its key by as much. It costs a few hundredths of the step.
    """
    if q.dtype is not torch.float64:
        q, k = q.float(), k.float()
    k = k.transpose(1, 2)
    if not shape.softcap:
        return torch.baddbmm(block.mask, q, k, alpha=shape.scaling), None
    capped = torch.bmm(q, k).mul_(shape.scaling / shape.softcap).tanh_()
    slope = 1.0 - capped.square()
    return capped.mul_(shape.softcap).add_(block.mask), slope


def _by_kv_head(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(n, H, D) to (K, G n, D): one after the other, the G query heads that share a key head."""
    n, heads, width = x.shape
    return x.permute(1, 0, 2).reshape(kv_heads, heads // kv_heads * n, width)


def _by_row(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(K, G n, D) to (n, H, D), the way back; a view."""
    return x.reshape(heads, -1, x.shape[2]).transpose(0, 1)


def _keys(x: torch.Tensor, block: Block) -> torch.Tensor:
    """(T, K, D) to (K, m, D): the keys, or values, that the block sees."""
    own = x[block.own : block.stop]
    if block.prefix < block.prefix_stop:
        own = torch.cat((x[block.prefix : block.prefix_stop], own))
    return own.transpose(0, 1)


def _add_keys(total: torch.Tensor, block: Block, part: torch.Tensor) -> None:
    """Add (K, m, D) to the rows of (T, K, D) that it is the gradient of."""
    part = part.transpose(0, 1)
    split = block.prefix_stop - block.prefix
    if split:
        total[block.prefix : block.prefix_stop] += part[:split]
    total[block.own : block.stop] += part[split:]
