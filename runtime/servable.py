"""Whether a model can be served correctly: asked before its weights are read, and proved after.

The engine packs tokens of many sequences into one row and lets them meet in attention alone, whose
keys and values it keeps in pages. That is right for a model only if

- every layer's attention goes through transformers' attention interface, once per layer, and keys
  and values of all layers have one shape, that of a page;
- nothing else mixes tokens: no recurrence, no convolution over time, no cross-attention;
- attention is causal, and its mask is full, or a sliding window that the layer names.

`check_config` refuses what the configuration gives away, in milliseconds. `check_model` then runs
the loaded model on a few short prompts, once each as transformers does and once packed, and
refuses a model whose logits differ. A list of known architectures would be shorter to write and
wrong sooner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .errors import ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_PROBE = "cotune_probe"
# Many beginnings: a token that looks past the beginning of its sequence is what goes wrong.
_PROBE_LENGTHS = (2, 3, 2, 4, 2, 7)
_SERVED_LAYER_TYPES = {"full_attention", "sliding_attention"}
# How far packed and reference logits may be apart: the norm of their difference as a share of the
# norm of their spread. Rounding costs 5e-7, 1e-3 and 1e-2 (the tiny models of the tests); a layer
# that adds a fifth of the left neighbour to each token costs 0.12 and more.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}
# Keywords that attention layers pass along and that say nothing about the attention itself.
_HARMLESS_KEYWORDS = {
    "cache_position",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "max_length_k",
    "max_length_q",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "use_cache",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayer:
    """What one layer's attention looked like when it was called.

    Attributes:
        query_heads: H.
        kv_heads: K; a page of this layer holds keys and values of K heads.
        head_dim: D, the same for queries, keys and values.
        scaling: what the products of queries and keys are multiplied by.
        softcap: scores pass through ``softcap * tanh(score / softcap)``; None for not.
        sliding_window: tokens that a token sees, itself included; None for all before it.
    """

    query_heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    softcap: float | None
    sliding_window: int | None


def check_config(name: str, config: Any, model_class: Any) -> None:
    """Refuse a model that its configuration shows to be unservable.

    Args:
        name: the model, for the message.
        config: its transformers config.
        model_class: the class that AutoModelForCausalLM would make of it, or None if it has none.

    Raises:
        ModelLoadError: with the reason.
    """
    model_type = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise _refusal(name, f"{model_type!r} is an encoder-decoder", "use a decoder-only model")
    if config.get_text_config() is not config:
        raise _refusal(
            name,
            f"{model_type!r} is a composite of several models (text with images or sound)",
            "use the text-only checkpoint of that family",
        )
    if model_class is None:
        raise _refusal(
            name,
            f"transformers has no causal language model of type {model_type!r}",
            "use a text generation model",
        )
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = (
            quantization.get("quant_method")
            if isinstance(quantization, dict)
            else getattr(quantization, "quant_method", None)
        )
        raise _refusal(
            name,
            f"config.json: quantization_config says its weights are quantised ({method})",
            "use the checkpoint in float32, bfloat16 or float16",
        )
    if getattr(model_class, "_is_stateful", False):
        raise _refusal(
            name,
            f"{model_type!r} has recurrent or state-space layers, whose state cannot be paged",
            "use a model with attention in every layer",
        )
    if not (
        getattr(model_class, "_supports_attention_backend", False)
        and model_class._can_set_attn_implementation()
    ):
        raise _refusal(
            name,
            f"the attention of {model_type!r} does not go through transformers' attention "
            "interface, so it cannot read keys and values from pages",
            "use a model whose attention does, such as Llama, Qwen or Mistral",
        )
    if getattr(config, "add_cross_attention", False):
        raise _refusal(name, "config.json: add_cross_attention is true", "use a decoder-only model")
    other = sorted(set(getattr(config, "layer_types", None) or ()) - _SERVED_LAYER_TYPES)
    if other:
        raise _refusal(
            name,
            f"config.json: layer_types has {', '.join(map(repr, other))}; served are full "
            "attention and sliding windows",
            "use a model with those alone",
        )


@torch.no_grad()
def check_model(name: str, model: Any, vocab_size: int) -> tuple[AttentionLayer, ...]:
    """Run the model on a few short prompts, alone and packed, and refuse it if they disagree.

    Args:
        name: the model, for messages.
        model: a transformers causal LM on its device, in eval mode. Its attention implementation
            is changed meanwhile and put back.
        vocab_size: token ids below this are used.

    Returns:
        One entry per layer, in order.

    Raises:
        ModelLoadError: with the reason. Any error of the model's own forward becomes one.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(_PROBE, _probe_attention)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(vocab_size, (n,), generator=generator) for n in _PROBE_LENGTHS]
    probe = _Probe(_PROBE_LENGTHS, model.device)
    before = model.config._attn_implementation
    try:
        _use_attention(name, model, "eager")
        expected = torch.cat([_logits(model, [prompt]) for prompt in prompts])
        _use_attention(name, model, _PROBE)
        packed = _logits(model, prompts, **{_PROBE: probe})
    except ModelLoadError:
        raise
    except _UnservableAttentionError as error:
        raise _refusal(name, str(error), "use another model") from error
    except Exception as error:  # a model's forward may fail in any way; all refuse
        raise _refusal(
            name,
            f"a test forward over {sum(_PROBE_LENGTHS)} tokens failed: "
            f"{type(error).__name__}: {error}",
            "use another model",
        ) from error
    finally:
        model.set_attn_implementation(before)
    layers = _checked_layers(name, model.config, probe.layers)
    if not expected.isfinite().all():
        raise _refusal(
            name,
            f"its logits are not finite in {_dtype_name(model.dtype)}",
            "load it with dtype float32 or bfloat16"
            if model.dtype == torch.float16
            else "its weights are damaged; get them again",
        )
    distance = ((packed - expected).norm() / (expected - expected.mean()).norm()).item()
    if not distance <= _TOLERANCE[model.dtype]:
        raise _refusal(
            name,
            "prompts packed into one batch gave other logits than each alone (off by "
            f"{distance:.2g} of their spread): tokens meet outside causal attention",
            "use a model whose layers mix tokens in attention alone",
        )
    return layers


class _UnservableAttentionError(Exception):
    """Raised inside the forward by the probing attention; the message is the reason."""


class _Probe:
    """The packed batch's mask, and what each layer's attention was called with."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        sequence = torch.repeat_interleave(torch.tensor(lengths)).to(device)
        index = torch.arange(len(sequence), device=device)
        self.distance = index[:, None] - index[None, :]
        self.is_visible = (sequence[:, None] == sequence[None, :]) & (self.distance >= 0)
        self.layers: dict[int, AttentionLayer] = {}


def _probe_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    cotune_probe: _Probe | None = None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """Plain causal attention over a packed row; refuses calls that paged attention cannot answer.

    query is (1, H, T, D), key and value (1, K, T, D); the result (1, T, H, D).
    """
    layer = getattr(module, "layer_idx", None)
    where = f"the attention of layer {layer}"
    if not isinstance(layer, int):
        raise _UnservableAttentionError(f"{type(module).__name__} does not say which layer it is")
    if cotune_probe is None:
        raise _UnservableAttentionError(f"{where} is not handed the batch's keyword arguments")
    if layer in cotune_probe.layers:
        raise _UnservableAttentionError(f"{where} is called more than once per forward")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise _UnservableAttentionError(f"{where} is not causal")
    if attention_mask is not None:
        raise _UnservableAttentionError(f"{where} brings a mask of its own")
    unknown = sorted(
        name
        for name, value in keywords.items()
        if value is not None and name not in _HARMLESS_KEYWORDS
    )
    if unknown:
        raise _UnservableAttentionError(f"{where} needs {', '.join(unknown)}, which is not served")
    if not query.shape[3] == key.shape[3] == value.shape[3] or key.shape[1] != value.shape[1]:
        raise _UnservableAttentionError(
            f"{where} has {key.shape[1]} key heads of {key.shape[3]} and {value.shape[1]} value "
            f"heads of {value.shape[3]}; a page holds keys and values of one shape"
        )
    tokens = len(cotune_probe.distance)
    if query.shape[0] != 1 or query.shape[2] != tokens or key.shape[2] != tokens:
        raise _UnservableAttentionError(f"{where} does not get one row per token")
    scaling = query.shape[3] ** -0.5 if scaling is None else float(scaling)
    cotune_probe.layers[layer] = AttentionLayer(
        query_heads=query.shape[1],
        kv_heads=key.shape[1],
        head_dim=key.shape[3],
        scaling=scaling,
        softcap=softcap,
        sliding_window=sliding_window,
    )
    groups = query.shape[1] // key.shape[1]
    q = query[0].float()
    k = key[0].float().repeat_interleave(groups, dim=0)
    v = value[0].float().repeat_interleave(groups, dim=0)
    scores = q @ k.mT * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    is_visible = cotune_probe.is_visible
    if sliding_window is not None:
        is_visible = is_visible & (cotune_probe.distance < sliding_window)
    scores = scores.masked_fill(~is_visible, float("-inf"))
    out = scores.softmax(dim=-1) @ v
    return out.transpose(0, 1)[None].to(query.dtype).contiguous(), None


def _logits(model: Any, prompts: Iterable[torch.Tensor], **keywords: Any) -> torch.Tensor:
    """Float32 logits (T, V) of the prompts packed into one row."""
    prompts = list(prompts)
    positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts])
    output = model(
        input_ids=torch.cat(prompts)[None].to(model.device),
        position_ids=positions[None].to(model.device),
        use_cache=False,
        **keywords,
    )
    logits: torch.Tensor = output.logits[0]
    return logits.float()


def _use_attention(name: str, model: Any, implementation: str) -> None:
    model.set_attn_implementation(implementation)
    if model.config._attn_implementation != implementation:
        raise _refusal(
            name,
            f"{type(model).__name__} does not let its attention be replaced",
            "use a model whose attention goes through transformers' attention interface",
        )


def _checked_layers(
    name: str, config: Any, seen: dict[int, AttentionLayer]
) -> tuple[AttentionLayer, ...]:
    """The layers in order, if attention was called for all of them and with the right window."""
    count = config.num_hidden_layers
    if set(seen) != set(range(count)):
        missing = sorted(set(range(count)) - set(seen))
        raise _refusal(
            name,
            f"{len(seen)} of {count} layers called attention (not layers "
            f"{', '.join(map(str, missing[:8]))})",
            "use a model with attention in every layer",
        )
    shapes = [(seen[i].query_heads, seen[i].kv_heads, seen[i].head_dim) for i in range(count)]
    for layer, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise _refusal(
                name,
                f"layer {layer} has (query heads, KV heads, head size) {shape} and layer 0 "
                f"{shapes[0]}; the pages of all layers have one shape",
                "use a model whose layers are alike",
            )
    # A prompt shorter than the window cannot show that a layer forgot its window or names another
    # one than the mask that transformers builds from the configuration.
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * count
    for layer, kind in enumerate(kinds):
        expected = window if kind == "sliding_attention" else None
        if seen[layer].sliding_window != expected:
            raise _refusal(
                name,
                f"config.json gives layer {layer} ({kind}) the window {expected}, but its "
                f"attention says sliding_window={seen[layer].sliding_window}",
                "use another model",
            )
    return tuple(seen[layer] for layer in range(count))


def _refusal(name: str, reason: str, remedy: str) -> ModelLoadError:
    return ModelLoadError(
        f"model {name!r} cannot be served: {reason}; {remedy}", param="model", code="model_refused"
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
