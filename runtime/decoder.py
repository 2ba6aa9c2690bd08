"""A lean packed forward for decoders of the Llama family and its relatives.

transformers' own modules spend more time in Python and small operators than in arithmetic when a
batch is small. For the families listed in `_RECIPES` this module takes the weights from the loaded
model and computes the same function with fused products and kernels. It is held against the
model's own logits at start (`forward.py`); a model that is not listed, or differs, is run through
its own modules instead (`module_forward.py`).

    pre        h += attention(norm(h));              h += mlp(norm(h))
    post       h += norm(attention(h));              h += norm(mlp(h))
    sandwich   h += norm(attention(norm(h)));        h += norm(mlp(norm(h)))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F

from .kernels.plain import Activation, HeadNorms, LayerAttention, RotaryTable
from .linear import FusedLinear

if TYPE_CHECKING:
    from .kernels.batch import PackedBatch
    from .kernels.plain import PlainKernels
    from .loading import LoadedModel
    from .lora import LoraWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    """How a family departs from Llama.

    `norm_offset` is added to every norm weight (Gemma stores w - 1). `full_norms` are RMS norms
    over all query and all key heads at once (OLMo 2) rather than per head (Qwen 3, Gemma 3).
    """

    placement: Literal["pre", "post", "sandwich"] = "pre"
    norm_offset: float = 0.0
    full_norms: bool = False


_RECIPES = {
    "llama": _Recipe(),
    "mistral": _Recipe(),
    "qwen2": _Recipe(),
    "qwen3": _Recipe(),
    "granite": _Recipe(),
    "olmo2": _Recipe(placement="post", full_norms=True),
    "gemma2": _Recipe(placement="sandwich", norm_offset=1.0),
    "gemma3_text": _Recipe(placement="sandwich", norm_offset=1.0),
}

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}

# Rotary tables of these kinds depend on the position alone, not on the length of the sequence.
_STATIC_ROPE = {"default", "linear", "llama3", "yarn"}


@dataclass(frozen=True, slots=True)
class _Norm:
    weight: torch.Tensor  # (W,) float32, offset included
    eps: float


@dataclass(frozen=True, slots=True)
class _Layer:
    attention: LayerAttention
    rotary: RotaryTable
    head_norms: HeadNorms | None
    query_norm: _Norm | None  # over all heads at once
    key_norm: _Norm | None
    qkv: FusedLinear
    out: FusedLinear
    gate_up: FusedLinear
    down: FusedLinear
    before_attention: _Norm | None
    after_attention: _Norm | None
    before_mlp: _Norm | None
    after_mlp: _Norm | None


class LeanDecoder:
    """The packed forward. Owns its fused weights and adapter tables; the kernels own the pages."""

    def __init__(
        self,
        kernels: PlainKernels,
        *,
        embedding: torch.Tensor,
        embedding_multiplier: torch.Tensor | None,
        layers: list[_Layer],
        final_norm: _Norm,
        head: FusedLinear,
        activation: Activation,
        residual_multiplier: float,
        logits_divisor: float,
        logits_softcap: float,
    ) -> None:
        self.kernels = kernels
        self._embedding = embedding
        self._embedding_multiplier = embedding_multiplier
        self._layers = layers
        self._final_norm = final_norm
        self._head = head
        self._activation = activation
        self._multiplier = residual_multiplier
        self._logits_divisor = logits_divisor
        self._logits_softcap = logits_softcap

    @classmethod
    def build(cls, loaded: LoadedModel, kernels: PlainKernels, *, prepack: bool) -> LeanDecoder:
        """Take the weights of a loaded model.

        Raises:
            UnlistedError: the model is not one that this module knows, and why.
        """
        return _build(cls, loaded, kernels, prepack)

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        """The logits (N, V) of the wanted rows; writes the KV of all rows."""
        residual = F.embedding(batch.token_ids, self._embedding)
        if self._embedding_multiplier is not None:
            residual = residual * self._embedding_multiplier
        delta: torch.Tensor | None = None  # what the last block adds to the residual, not yet added
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            x = self._enter(residual, delta, layer.before_attention)
            routing = batch.adapters
            qkv = layer.qkv(x, routing)
            self._rope_and_store(layer, qkv, batch)
            query = qkv[:, : self.kernels.shape.heads * self.kernels.shape.head_dim]
            rows = batch.rows
            if index == last and batch.wanted is not None:
                # From here on rows no longer meet: go on with those whose logits are wanted.
                residual, query = residual[batch.wanted], query[batch.wanted]
                rows, routing = batch.wanted_rows, batch.wanted_adapters
            mixed = self.kernels.attend(layer.attention, query, rows, batch)
            delta = self._leave(layer.out(mixed, routing), residual, layer.after_attention)
            x = self._enter(residual, delta, layer.before_mlp)
            gate_up = layer.gate_up(x, routing)
            down = layer.down(self.kernels.gated_activation(gate_up, self._activation), routing)
            delta = self._leave(down, residual, layer.after_mlp)
        x = self._enter(residual, delta, self._final_norm)
        routing = batch.adapters if batch.wanted is None else batch.wanted_adapters
        logits = self._head(x, routing)
        if self._logits_divisor != 1.0:
            logits = logits / self._logits_divisor
        if self._logits_softcap:
            logits = torch.tanh(logits / self._logits_softcap) * self._logits_softcap
        return logits

    def _enter(
        self, residual: torch.Tensor, delta: torch.Tensor | None, norm: _Norm | None
    ) -> torch.Tensor:
        """Add what is due to the residual, and normalise it for the next block."""
        if norm is None:
            if delta is not None:
                residual += delta * self._multiplier if self._multiplier != 1.0 else delta
            return residual
        if delta is None:
            return self.kernels.rms_norm(residual, norm.weight, norm.eps)
        return self.kernels.add_rms_norm(delta, residual, norm.weight, norm.eps, self._multiplier)

    def _leave(
        self, x: torch.Tensor, residual: torch.Tensor, norm: _Norm | None
    ) -> torch.Tensor | None:
        """A block's result: added to the residual now if it is normalised first, else later."""
        if norm is None:
            return x
        self.kernels.rms_norm_add(x, residual, norm.weight, norm.eps, self._multiplier)
        return None

    def _rope_and_store(self, layer: _Layer, qkv: torch.Tensor, batch: PackedBatch) -> None:
        if layer.query_norm is not None and layer.key_norm is not None:
            shape = self.kernels.shape
            queries = shape.heads * shape.head_dim
            keys = queries + shape.kv_heads * shape.head_dim
            for part, norm in (
                (qkv[:, :queries], layer.query_norm),
                (qkv[:, queries:keys], layer.key_norm),
            ):
                part.copy_(self.kernels.rms_norm(part, norm.weight, norm.eps))
        self.kernels.rope_and_store(layer.attention, qkv, batch, layer.rotary, layer.head_norms)

    def install_adapter(self, slot: int, weights: LoraWeights) -> None:
        """Copy an adapter's matrices into a slot (1 and up)."""
        for linear in self._linears():
            linear.adapters.install(slot, weights)

    def clear_adapter(self, slot: int) -> None:
        """Empty a slot."""
        for linear in self._linears():
            linear.adapters.clear(slot)

    @property
    def adapter_generation(self) -> int:
        """Changes whenever a layer's stacked adapter matrices have moved."""
        return sum(linear.adapters.generation for linear in self._linears())

    def can_record(self) -> bool:
        """Whether a forward over decodes only queues work for the device."""
        return all(self.kernels.can_record(layer.attention) for layer in self._layers)

    def _linears(self) -> list[FusedLinear]:
        own = [self._head]
        for layer in self._layers:
            own += [layer.qkv, layer.out, layer.gate_up, layer.down]
        return own


class UnlistedError(Exception):
    """This module does not know the model; the message says what is unknown."""


def _build(
    cls: type[LeanDecoder], loaded: LoadedModel, kernels: PlainKernels, prepack: bool
) -> LeanDecoder:
    model: Any = loaded.model
    config = model.config
    recipe = _RECIPES.get(config.model_type)
    if recipe is None:
        raise UnlistedError(f"no recipe for the family {config.model_type!r}")
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    activation = _ACTIVATIONS.get(str(name))
    if activation is None:
        raise UnlistedError(f"no kernel for the activation {name!r}")

    def norm(module: Any, *, offset: float = recipe.norm_offset) -> _Norm:
        eps = getattr(module, "variance_epsilon", None)
        if eps is None:
            eps = module.eps
        weight = module.weight.detach().float()
        return _Norm((weight + offset).contiguous(), float(eps))

    def linear(prefix: str, owner: Any, *names: str) -> FusedLinear:
        return FusedLinear(
            [(f"{prefix}.{name}", getattr(owner, name)) for name in names],
            kernels=kernels,
            prepack=prepack,
        )

    base = model.model
    attentions = layer_attentions(loaded)
    tables = _rotary_tables(base, config, loaded.max_model_len, kernels.device)
    layers = []
    for index, block in enumerate(base.layers):
        attention, mlp = block.self_attn, block.mlp
        prefix = f"model.layers.{index}"
        head_norms = query_norm = key_norm = None
        if getattr(attention, "q_norm", None) is not None:
            query_norm, key_norm = norm(attention.q_norm), norm(attention.k_norm)
            if not recipe.full_norms:
                head_norms = HeadNorms(query_norm.weight, key_norm.weight, query_norm.eps)
                query_norm = key_norm = None
        pre = post = mid = end = None
        if recipe.placement == "pre":
            pre, mid = norm(block.input_layernorm), norm(block.post_attention_layernorm)
        elif recipe.placement == "post":
            post, end = (
                norm(block.post_attention_layernorm),
                norm(block.post_feedforward_layernorm),
            )
        else:
            pre, post = norm(block.input_layernorm), norm(block.post_attention_layernorm)
            mid, end = (
                norm(block.pre_feedforward_layernorm),
                norm(block.post_feedforward_layernorm),
            )
        layers.append(
            _Layer(
                attention=attentions[index],
                rotary=tables[index],
                head_norms=head_norms,
                query_norm=query_norm,
                key_norm=key_norm,
                qkv=linear(f"{prefix}.self_attn", attention, "q_proj", "k_proj", "v_proj"),
                out=linear(f"{prefix}.self_attn", attention, "o_proj"),
                gate_up=linear(f"{prefix}.mlp", mlp, "gate_proj", "up_proj"),
                down=linear(f"{prefix}.mlp", mlp, "down_proj"),
                before_attention=pre,
                after_attention=post,
                before_mlp=mid,
                after_mlp=end,
            )
        )
    return cls(
        kernels,
        embedding=base.embed_tokens.weight,
        embedding_multiplier=_embedding_multiplier(base, config),
        layers=layers,
        final_norm=norm(base.norm),
        head=FusedLinear([("lm_head", model.lm_head)], kernels=kernels, prepack=prepack),
        activation=activation,
        residual_multiplier=float(getattr(config, "residual_multiplier", 1.0)),
        logits_divisor=float(getattr(config, "logits_scaling", 1.0)),
        logits_softcap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
    )


def layer_attentions(loaded: LoadedModel) -> list[LayerAttention]:
    """How each layer attends, as observed when the model was loaded."""
    return [
        LayerAttention(
            index=index,
            scaling=layer.scaling,
            softcap=layer.softcap or 0.0,
            window=layer.sliding_window or 0,
        )
        for index, layer in enumerate(loaded.attention_layers)
    ]


def _embedding_multiplier(base: Any, config: Any) -> torch.Tensor | None:
    """What the embeddings are multiplied by, rounded to the model's dtype where Gemma does so."""
    weight = base.embed_tokens.weight
    scale = getattr(base.embed_tokens, "embed_scale", None)
    if scale is None and config.model_type == "gemma2":  # in older transformers, in the model
        scale = config.hidden_size**0.5
    if scale is not None:
        return torch.as_tensor(scale, dtype=weight.dtype, device=weight.device)
    multiplier = float(getattr(config, "embedding_multiplier", 1.0))
    return None if multiplier == 1.0 else torch.tensor(multiplier, device=weight.device)


def _rotary_tables(
    base: Any, config: Any, positions: int, device: torch.device
) -> list[RotaryTable]:
    """Each layer's rotary table, asked of the model's own rotary module."""
    parameters = getattr(config, "rope_parameters", None) or {}
    per_type = {key: value for key, value in parameters.items() if isinstance(value, dict)}
    for rope in per_type.values() or [parameters]:
        kind = rope.get("rope_type", "default")
        if kind not in _STATIC_ROPE:
            raise UnlistedError(f"rotary embeddings of type {kind!r} change with the length")
        if float(rope.get("partial_rotary_factor", 1.0)) != 1.0:
            raise UnlistedError("rotary embeddings cover only part of each head")
    like = torch.zeros(1, dtype=torch.float32, device=device)
    at = torch.arange(positions, device=device).unsqueeze(0)
    known: dict[str | None, RotaryTable] = {}
    tables = []
    types = getattr(config, "layer_types", None) if per_type else None
    for index in range(config.num_hidden_layers):
        kind = types[index] if types else None
        if kind not in known:
            with torch.no_grad():
                cos, sin = base.rotary_emb(like, at, kind) if kind else base.rotary_emb(like, at)
            half = cos.shape[-1] // 2
            known[kind] = RotaryTable(
                cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()
            )
        tables.append(known[kind])
    return tables
