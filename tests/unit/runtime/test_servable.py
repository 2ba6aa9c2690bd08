from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from cotune.runtime.errors import ModelLoadError
from cotune.runtime.servable import AttentionLayer, check_config, check_model
from tiny_models import FAMILIES, randomize_weights, tiny_config, tiny_model

VOCAB = 384


def model_class(config: Any) -> Any:
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def small_config(model_type: str, **overrides: Any) -> Any:
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return transformers.AutoConfig.for_model(model_type, **(values | overrides))


def small_model(config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_promised_family_passes_in_every_dtype(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype)
    check_config(family, model.config, type(model))
    layers = check_model(family, model, VOCAB)
    assert len(layers) == model.config.num_hidden_layers
    assert {(layer.query_heads, layer.kv_heads) for layer in layers} == {(4, 2)}


def test_the_layers_report_how_they_attend() -> None:
    layers = check_model("m", tiny_model("gemma3_text"), VOCAB)
    assert [layer.sliding_window for layer in layers] == [24, 24, None, 24]
    layers = check_model("m", tiny_model("qwen3"), VOCAB)
    assert layers[0] == AttentionLayer(
        query_heads=4,
        kv_heads=2,
        head_dim=24,
        scaling=24**-0.5,
        softcap=None,
        sliding_window=None,
    )
    assert check_model("m", tiny_model("granite"), VOCAB)[0].scaling == 0.3
    assert check_model("m", tiny_model("gemma2"), VOCAB)[0].softcap == 5.0


@pytest.mark.parametrize("passes", [True, False])
def test_the_attention_implementation_is_put_back(passes: bool) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("sdpa")
    if passes:
        check_model("m", model, VOCAB)
    else:
        model.model.layers[0] = TokenShift(model.model.layers[0])
        with pytest.raises(ModelLoadError):
            check_model("m", model, VOCAB)
    assert model.config._attn_implementation == "sdpa"


class TokenShift(nn.Module):
    """Adds each token's left neighbour, as convolutions over time and token shifts do."""

    def __init__(self, layer: Any, share: float = 0.2) -> None:
        super().__init__()
        self.layer = layer
        self.share = share

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        shifted = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], dim=1)
        out: torch.Tensor = self.layer(hidden + self.share * shifted, *args, **kwargs)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_that_mixes_tokens_outside_attention_is_refused(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype)
    model.model.layers[1] = TokenShift(model.model.layers[1])
    with pytest.raises(ModelLoadError, match="tokens meet outside causal attention"):
        check_model("m", model, VOCAB)


def test_a_layer_without_attention_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(ModelLoadError, match=r"2 of 3 layers called attention \(not layers 1\)"):
        check_model("m", model, VOCAB)


def test_logits_that_are_not_finite_are_refused_with_another_dtype_as_the_remedy() -> None:
    model = tiny_model("llama", torch.float16)
    model.lm_head.weight.fill_(6e4)
    with pytest.raises(ModelLoadError, match="not finite in float16; load it with dtype float32"):
        check_model("m", model, VOCAB)
    model = tiny_model("llama")
    model.lm_head.weight[3] = float("nan")
    with pytest.raises(ModelLoadError, match="not finite in float32; its weights are damaged"):
        check_model("m", model, VOCAB)


def test_a_layer_that_does_not_name_its_window_is_refused() -> None:
    model = tiny_model("gemma3_text")
    model.model.layers[1].self_attn.sliding_window = None
    with pytest.raises(ModelLoadError, match=r"layer 1 \(sliding_attention\) the window 24"):
        check_model("m", model, VOCAB)


def test_a_window_other_than_the_configured_one_is_refused() -> None:
    model = tiny_model("gemma3_text")
    model.model.layers[1].self_attn.sliding_window = 25
    with pytest.raises(ModelLoadError, match="sliding_window=25"):
        check_model("m", model, VOCAB)


def test_layers_of_different_shape_are_refused() -> None:
    config = small_config("gemma4_text", num_key_value_heads=2, head_dim=16, global_head_dim=32)
    with pytest.raises(ModelLoadError, match=r"layer 1 .*\(4, 2, 32\) and layer 0 \(4, 2, 16\)"):
        check_model("m", small_model(config), VOCAB)


def test_bidirectional_attention_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="attention of layer 0 is not causal"):
        check_model("m", small_model(small_config("bert", is_decoder=False)), VOCAB)


def test_attention_with_sinks_is_refused() -> None:
    config = small_config("gpt_oss", head_dim=16, num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(ModelLoadError, match="needs s_aux, which is not served"):
        check_model("m", small_model(config), VOCAB)


def test_keys_and_values_of_different_size_are_refused() -> None:
    config = small_config(
        "deepseek_v3",
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=2,
    )
    with pytest.raises(ModelLoadError, match="4 key heads of 24 and 4 value heads of 16"):
        check_model("m", small_model(config), VOCAB)


def test_a_forward_that_fails_is_refused_with_its_error() -> None:
    model = tiny_model("llama")

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("by zero")

    model.model.layers[2].forward = broken
    with pytest.raises(ModelLoadError, match="test forward over 20 tokens failed: ZeroDivision"):
        check_model("m", model, VOCAB)


@pytest.mark.parametrize(
    ("model_type", "overrides", "reason"),
    [
        ("t5", {}, "'t5' is an encoder-decoder"),
        ("gemma3", {}, "composite of several models"),
        ("vit", {}, "no causal language model of type 'vit'"),
        ("mamba", {}, "recurrent or state-space layers"),
        ("bloom", {}, "does not go through transformers' attention interface"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "layer_types has 'conv'"),
        ("llama4_text", {}, "layer_types has 'chunked_attention'"),
        ("llama", {"add_cross_attention": True}, "add_cross_attention is true"),
        (
            "llama",
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            r"quantization_config says its weights are quantised \(gptq\)",
        ),
    ],
)
def test_what_the_configuration_gives_away_is_refused_before_loading(
    model_type: str, overrides: dict[str, Any], reason: str
) -> None:
    config = (
        transformers.AutoConfig.for_model(model_type)
        if model_type in ("t5", "gemma3", "vit", "mamba", "bloom")
        else small_config(model_type, **overrides)
    )
    with pytest.raises(ModelLoadError, match=reason) as caught:
        check_config("my-model", config, model_class(config))
    assert "'my-model'" in caught.value.message
    assert "; use " in caught.value.message
    assert caught.value.param == "model"


def test_the_random_weights_of_the_tests_are_not_degenerate() -> None:
    """The other tests lean on this: a mistake in any layer must show in the logits."""
    for family in FAMILIES:
        model = tiny_model(family)
        ids = torch.arange(5, 65)[None]
        logits = model(ids).logits[0]
        assert 1.0 < logits.std() < 3.0, family
        changed = ids.clone()
        changed[0, 50] = 300
        assert (model(changed).logits[0, -1] - logits[-1]).abs().max() > 0.05, family
        answer = model.generate(ids, max_new_tokens=24, do_sample=False)[0, 60:]
        assert len(set(answer.tolist())) >= min(10, len(answer)), family


def test_the_same_seed_gives_the_same_model_and_another_seed_another() -> None:
    def weight(seed: int) -> torch.Tensor:
        model = tiny_model("llama", seed=seed)
        tensor: torch.Tensor = model.lm_head.weight
        return tensor

    assert torch.equal(weight(1), weight(1))
    assert not torch.equal(weight(1), weight(2))
    model = transformers.AutoModelForCausalLM.from_config(tiny_config("llama"))
    randomize_weights(model, 1)
    assert torch.equal(model.lm_head.weight, weight(1))
