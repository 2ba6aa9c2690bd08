"""Leaner forwards for a training tree's modules, each put in only where it is proved right.

A short forward runs through the tree as transformers wrote it, and what goes into and comes out of
every norm, attention and feed-forward module is noted. A module whose noted result the leaner form
reproduces gets that form; any other is left alone, which is slower and just as right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .attention import AttentionPlan, AttentionShape, attend
from .batches import Group, pack
from .gating import find_activation, gated
from .norm import find_norm
from .rotary import rotate

if TYPE_CHECKING:
    from collections.abc import Callable

# Most that a block's result may differ from the noted one, as a share of its norm: a rounding or
# two. A wrong formula is off by far more.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """What a module was given, and what it gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    @property
    def hidden(self) -> torch.Tensor:
        hidden: torch.Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return hidden


@torch.no_grad()
def make_lean(base: Any) -> frozenset[str]:
    """Replace the forwards of a base model's modules where that is right.

    Args:
        base: transformers' base model (without the head), whose attention is `training_attention`.

    Returns:
        The paths of the modules that compute in a leaner way now.
    """
    calls, shapes = _note_calls(base)
    lean: set[str] = set()
    for path, call in calls.items():
        module = base.get_submodule(path)
        if not _is_norm(module):
            continue
        norm = find_norm(module, call.hidden)
        if norm is not None:
            module.forward = norm.__call__
            lean.add(path)
    for path, call in calls.items():
        module = base.get_submodule(path)
        forward = _lean_attention(module, shapes.get(module)) or _lean_feed_forward(module)
        if forward is not None and _is_reproduced(forward, call):
            module.forward = forward
            lean.add(path)
    return frozenset(lean)


def _note_calls(base: Any) -> tuple[dict[str, _Call], dict[nn.Module, AttentionShape]]:
    vocabulary = base.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (24,), generator=generator).tolist()
    packed = pack(
        [
            Group(prompt_ids=tuple(ids[:9]), completions=(tuple(ids[9:14]), tuple(ids[14:21]))),
            Group(prompt_ids=tuple(ids[21:23]), completions=(tuple(ids[23:]),)),
        ],
        base.device,
    )
    calls: dict[str, _Call] = {}
    shapes: dict[nn.Module, AttentionShape] = {}
    handles = []
    for path, module in base.named_modules():
        if _is_norm(module) or _is_attention(module) or _is_feed_forward(module):

            def note(
                _module: nn.Module, args: Any, kwargs: Any, result: Any, path: str = path
            ) -> None:
                calls[path] = _Call(args, kwargs, result)

            handles.append(module.register_forward_hook(note, with_kwargs=True))
    try:
        base(
            input_ids=packed.token_ids.unsqueeze(0),
            position_ids=packed.positions.unsqueeze(0),
            use_cache=False,
            cotune_plan=AttentionPlan(packed.segments),
            cotune_shapes=shapes,
        )
    finally:
        for handle in handles:
            handle.remove()
    return calls, shapes


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm")


def _is_attention(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))


def _is_feed_forward(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))


def _is_reproduced(forward: Callable[..., Any], call: _Call) -> bool:
    ours, theirs = forward(*call.args, **call.kwargs), call.result
    if isinstance(theirs, tuple):
        ours, theirs = ours[0], theirs[0]
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    gap = (ours.double() - theirs.double()).norm() / theirs.double().norm()
    return bool(gap < _TOLERANCE.get(theirs.dtype, 0.0))


def _lean_attention(module: Any, shape: AttentionShape | None) -> Callable[..., Any] | None:
    """Projections, norms of queries and keys where there are some, rotation, attention."""
    width = getattr(module, "head_dim", None)
    if shape is None or not _is_attention(module) or not isinstance(width, int):
        return None
    norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]

    def project(linear: nn.Module, norm: Any, hidden: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = linear(hidden)
        if norm is not None and norm.weight.shape[0] != width:  # over all heads at once
            x = norm(x)
            norm = None
        x = x.unflatten(1, (-1, width))
        return x if norm is None else norm(x)

    def forward(
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        cotune_plan: AttentionPlan,
        **_ignored: Any,
    ) -> tuple[torch.Tensor, None]:
        x = hidden_states[0]
        cos, sin = (table[0, :, : width // 2] for table in position_embeddings)
        query = rotate(project(module.q_proj, norms[0], x), cos, sin)
        key = rotate(project(module.k_proj, norms[1], x), cos, sin)
        value = project(module.v_proj, None, x)
        mixed = attend(query, key, value, cotune_plan, shape)
        return module.o_proj(mixed.flatten(1)).unsqueeze(0), None

    return forward


def _lean_feed_forward(module: Any) -> Callable[..., Any] | None:
    if not _is_feed_forward(module):
        return None
    activation = find_activation(module.act_fn)
    if activation is None:
        return None

    def forward(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = module.down_proj(
            gated(module.gate_proj(x), module.up_proj(x), activation)
        )
        return y

    return forward
