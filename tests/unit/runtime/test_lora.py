from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cotune.runtime.errors import AdapterLoadError
from cotune.runtime.lora import LoraPair, LoraWeights, read_lora
from tiny_models import ALL_LINEARS, FAMILIES, save_lora, tiny_model, with_peft_adapter

if TYPE_CHECKING:
    from collections.abc import Callable

Q0 = "model.layers.0.self_attn.q_proj"
Q1 = "model.layers.1.self_attn.q_proj"
MODEL = tiny_model("llama")


def key(module: str, matrix: str) -> str:
    return f"base_model.model.{module}.lora_{matrix}.weight"


def apply_by_hand(model: nn.Module, weights: LoraWeights) -> None:
    """y + B (A x), as the executor must apply what was read."""

    def add(pair: LoraPair) -> Callable[..., torch.Tensor]:
        return lambda _, inputs, output: output + (inputs[0] @ pair.a.T) @ pair.b.T

    for path, pair in weights.modules.items():
        model.get_submodule(path).register_forward_hook(add(pair))


def assert_equals_peft(model: Any, path: Path, weights: LoraWeights) -> None:
    """Every module, its A, its B times scaling and the logits are those that peft holds."""
    adapted = with_peft_adapter(model, path)
    theirs = {
        name: module
        for name, module in adapted.base_model.model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert theirs.keys() == weights.modules.keys()
    for name, module in theirs.items():
        a, b = weights.modules[name]
        assert torch.equal(a, module.lora_A["default"].weight), name
        expected = module.lora_B["default"].weight * module.scaling["default"]
        torch.testing.assert_close(b, expected, rtol=1e-6, atol=0)
        assert b.abs().max() > 0
    assert weights.rank == max(module.r["default"] for module in theirs.values())
    ids = torch.arange(5, 25)[None]
    ours = tiny_model(model.config.model_type)
    apply_by_hand(ours, weights)
    expected = adapted(ids).logits
    # Float32; the order of the products differs from peft's by where the scaling goes.
    torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected - model(ids).logits).abs().mean() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_what_peft_reads(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    path = save_lora(tmp_path / "a", model, rank=4)
    weights = read_lora(path, model, max_rank=8)
    assert len(weights.modules) == len(ALL_LINEARS) * model.config.num_hidden_layers
    assert_equals_peft(model, path, weights)


@pytest.mark.parametrize(
    ("rank", "lora_config"),
    [
        (3, {"lora_alpha": 5}),
        (8, {"lora_alpha": 16, "use_rslora": True}),
        (4, {"rank_pattern": {"q_proj": 7, r"layers\.[02]\.mlp\.\w+": 2}}),
        (4, {"alpha_pattern": {r"^model.layers.1.self_attn.q_proj": 3, "o_proj": 9}}),
        (
            4,
            {
                "use_rslora": True,
                "rank_pattern": {r".*\.0\.self_attn\.q_proj": 8, r"self_attn\..*": 2},
                "alpha_pattern": {"model.layers.0.mlp.up_proj": 1},
            },
        ),
        (4, {"layers_to_transform": [1]}),
        (4, {"exclude_modules": ["k_proj"]}),
        (4, {"init_lora_weights": "gaussian", "lora_dropout": 0.5}),
    ],
)
def test_every_way_to_scale_and_target_reads_what_peft_reads(
    tmp_path: Path, rank: int, lora_config: dict[str, Any]
) -> None:
    path = save_lora(tmp_path / "a", MODEL, rank=rank, **lora_config)
    assert_equals_peft(MODEL, path, read_lora(path, MODEL, max_rank=16))


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj", "v_proj"],
        ["q_proj", "lm_head"],
        r".*layers\.[01]\.self_attn\.(q|o)_proj",
        "all-linear",
    ],
)
def test_targets_may_be_names_a_pattern_or_all_linears(
    tmp_path: Path, targets: list[str] | str
) -> None:
    path = save_lora(tmp_path / "a", MODEL, targets=targets)
    assert_equals_peft(MODEL, path, read_lora(path, MODEL, max_rank=16))


def test_scaling_is_alpha_over_rank_or_over_its_root(tmp_path: Path) -> None:
    """The formula itself, beside peft's opinion of it."""
    for flag, scaling in ((False, 6 / 4), (True, 6 / math.sqrt(4))):
        path = save_lora(tmp_path / str(flag), MODEL, rank=4, lora_alpha=6, use_rslora=flag)
        stored = load_file(path / "adapter_model.safetensors")
        pair = read_lora(path, MODEL, max_rank=4).modules[Q0]
        assert torch.equal(pair.a, stored[key(Q0, "A")])
        torch.testing.assert_close(pair.b, stored[key(Q0, "B")] * scaling)


def test_weights_stored_in_16_bits_become_float32_as_in_peft(tmp_path: Path) -> None:
    path = save_lora(tmp_path / "a", MODEL)
    file = path / "adapter_model.safetensors"
    save_file({k: v.to(torch.bfloat16) for k, v in load_file(file).items()}, file)
    weights = read_lora(path, MODEL, max_rank=16)
    assert weights.modules[Q0].a.dtype == weights.modules[Q0].b.dtype == torch.float32
    assert_equals_peft(MODEL, path, weights)


def test_the_weights_cannot_be_changed_and_know_their_size(tmp_path: Path) -> None:
    weights = read_lora(
        save_lora(tmp_path / "a", MODEL, rank=2, targets=["q_proj"]), MODEL, max_rank=2
    )
    assert weights.nbytes == 3 * 4 * 2 * (64 + 64)
    with pytest.raises(TypeError):
        weights.modules[Q0] = weights.modules[Q0]  # type: ignore[index]


def test_another_base_model_is_a_warning_only(
    adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_config(adapter, base_model_name_or_path="someone/other-model")
    model = tiny_model("llama")
    model.config._name_or_path = "me/this-model"
    with caplog.at_level(logging.WARNING):
        read_lora(adapter, model, max_rank=16)
    assert "someone/other-model" in caplog.text
    assert "me/this-model" in caplog.text
    caplog.clear()
    model.config._name_or_path = "/models/other-model"
    read_lora(adapter, model, max_rank=16)
    assert caplog.text == ""


# --- refusals -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lora(tmp_path_factory.mktemp("adapters") / "plain", MODEL, rank=4)


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    """A good adapter that the test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "adapter_config.json"
    value = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


def refusal(path: Path, model: nn.Module = MODEL, max_rank: int = 16) -> str:
    with pytest.raises(AdapterLoadError) as caught:
        read_lora(path, model, max_rank=max_rank)
    assert caught.value.param == "path"
    assert str(path) in caught.value.message
    return caught.value.message


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda path: edit_config(path, **changes)


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        file = path / "adapter_model.safetensors"
        values = load_file(file)
        edit(values)
        save_file(values, file)

    return apply


def put(name: str, value: torch.Tensor) -> Callable[[Path], None]:
    return tensors(lambda t: t.update({name: value}))


def delete(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def write(name: str, content: str) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        (path / name).write_text(content)

    return apply


def truncate(path: Path) -> None:
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickle_weights(path: Path) -> None:
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")


def with_nan(values: dict[str, torch.Tensor]) -> None:
    values[key(Q1, "B")][0, 0] = float("inf")


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        # the configuration's file
        (delete(CONFIG), ["there is no", CONFIG, "save_pretrained"]),
        (write(CONFIG, "{"), [CONFIG, "cannot be read", "get the file again"]),
        (write(CONFIG, "[]"), [CONFIG, "does not hold a JSON object"]),
        # its values
        (config(peft_type="LOHA"), [CONFIG, "peft_type is 'LOHA'", "only LORA"]),
        (config(peft_type=...), [CONFIG, "peft_type is None"]),
        (config(r=0), [CONFIG, "r is 0", "integer from 1"]),
        (config(r="8"), [CONFIG, "r is '8'"]),
        (config(r=...), [CONFIG, "r is None"]),
        (config(lora_alpha=...), [CONFIG, "lora_alpha is None", "above 0"]),
        (config(lora_alpha=0), [CONFIG, "lora_alpha is 0"]),
        (config(lora_alpha=float("nan")), [CONFIG, "lora_alpha is nan"]),
        (config(rank_pattern=[1]), [CONFIG, "rank_pattern is [1]"]),
        (config(rank_pattern={"q_proj": 0}), [CONFIG, "rank_pattern gives", Q0, "0"]),
        (config(alpha_pattern={"q_proj": "x"}), [CONFIG, "alpha_pattern gives", Q0, "'x'"]),
        (config(rank_pattern={"q_proj(": 4}), [CONFIG, "rank_pattern", "regular expression"]),
        (config(target_modules="q_proj("), [CONFIG, "target_modules", "regular expression"]),
        (config(target_modules=7), [CONFIG, "target_modules is 7"]),
        # more than plain LoRA
        (config(bias="all"), [CONFIG, "bias is 'all'", "bias='none'"]),
        (config(use_dora=True), [CONFIG, "use_dora is True", "DoRA", "merge the adapter"]),
        (config(lora_bias=True), [CONFIG, "lora_bias is True", "bias on B"]),
        (config(modules_to_save=["lm_head"]), [CONFIG, "modules_to_save is ['lm_head']"]),
        (config(layer_replication=[[0, 2], [1, 3]]), [CONFIG, "layer_replication", "repeated"]),
        (config(trainable_token_indices=[5]), [CONFIG, "trainable_token_indices", "embeddings"]),
        (config(target_parameters=["x"]), [CONFIG, "target_parameters", "bare parameters"]),
        (config(alora_invocation_tokens=[5]), [CONFIG, "alora_invocation_tokens", "activated"]),
        (config(use_qalora=True), [CONFIG, "use_qalora"]),
        (config(arrow_config={"top_k": 3}), [CONFIG, "arrow_config", "router"]),
        (
            config(init_lora_weights="pissa_niter_4"),
            [CONFIG, "'pissa_niter_4'", "base weights", "path_initial_model_for_weight_conversion"],
        ),
        (config(use_newfangled=True), [CONFIG, "use_newfangled is True", "not known here"]),
        # the weights' file
        (delete(WEIGHTS), ["there is no", WEIGHTS]),
        (pickle_weights, ["adapter_model.bin", "safe_serialization=True"]),
        (truncate, [WEIGHTS, "is damaged", "get the file again"]),
        (write(WEIGHTS, ""), [WEIGHTS, "is damaged"]),
        (tensors(lambda t: t.clear()), [WEIGHTS, "holds no weights"]),
        # its tensors
        (
            put("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(2, 2)),
            [WEIGHTS, "lora_embedding_A", "adapter of an embedding"],
        ),
        (
            put("base_model.model.model.embed_tokens.weight", torch.ones(2, 2)),
            [WEIGHTS, "a changed embedding"],
        ),
        (
            put(f"base_model.model.{Q0}.lora_magnitude_vector.weight", torch.ones(2)),
            [WEIGHTS, "a DoRA magnitude"],
        ),
        (put(f"base_model.model.{Q0}.lora_B.bias", torch.ones(64)), [WEIGHTS, "is a bias"]),
        (
            tensors(lambda t: t.pop(key(Q1, "A"))),
            [WEIGHTS, Q1, "has no lora_A", "save the adapter again"],
        ),
        (
            tensors(lambda t: (t.pop(key(Q1, "A")), t.pop(key(Q1, "B")))),
            [WEIGHTS, f"no weights for '{Q1}' (1 such)", "incomplete"],
        ),
        (config(target_modules=["q_proj"]), [WEIGHTS, "target_modules", "does not name"]),
        (
            put(key(Q1, "A"), torch.ones(4, 32)),
            [WEIGHTS, f"lora_A of {Q1}", "(4, 32)", "(4, 64)", "another model"],
        ),
        (
            put(key(Q1, "B"), torch.ones(32, 4)),
            [WEIGHTS, f"lora_B of {Q1}", "(32, 4)", "(64, 4)"],
        ),
        (config(r=8), [WEIGHTS, "lora_A", "(4, 96)", f"its rank in {CONFIG} is 8"]),
        (put(key(Q1, "B"), torch.ones(64)), [WEIGHTS, f"lora_B of {Q1}", "(64,)", "is 4"]),
        (
            put(key(Q1, "A"), torch.ones(4, 64, dtype=torch.int8)),
            [WEIGHTS, "torch.int8", "float32"],
        ),
        (tensors(with_nan), [WEIGHTS, f"lora_B of {Q1}", "not finite", "earlier checkpoint"]),
    ],
)
def test_an_adapter_that_is_not_plain_lora_is_refused_naming_file_field_and_remedy(
    adapter: Path, damage: Callable[[Path], None], expected: list[str]
) -> None:
    read_lora(adapter, MODEL, max_rank=16)
    damage(adapter)
    message = refusal(adapter)
    for text in expected:
        assert text in message


def test_no_directory_is_refused(tmp_path: Path) -> None:
    assert "there is no adapter directory" in refusal(tmp_path / "absent")


def test_a_rank_above_the_limit_is_refused_with_the_flag_to_raise(
    adapter: Path, tmp_path: Path
) -> None:
    message = refusal(adapter, max_rank=3)
    assert "rank 4, more than max_lora_rank 3; raise --max-lora-rank to 4" in message
    path = save_lora(tmp_path / "b", MODEL, rank=2, rank_pattern={"q_proj": 9})
    assert f"{Q0} has rank 9" in refusal(path, max_rank=8)


def test_an_adapter_of_another_size_of_model_is_refused_with_both_shapes(tmp_path: Path) -> None:
    path = save_lora(tmp_path / "a", tiny_model("llama", hidden_size=32), targets=["q_proj"])
    message = refusal(path)
    assert "(4, 32)" in message
    assert "(4, 64)" in message


def test_an_adapter_of_a_deeper_model_is_refused(tmp_path: Path) -> None:
    path = save_lora(tmp_path / "a", tiny_model("llama", num_hidden_layers=5))
    assert "no module 'model.layers.3." in refusal(path)


def test_an_adapter_of_an_embedding_is_refused(tmp_path: Path) -> None:
    path = save_lora(tmp_path / "a", MODEL, targets=["q_proj", "embed_tokens"])
    assert "embed" in refusal(path)


def test_a_copy_of_the_output_head_beside_its_adapter_must_be_the_model_s(tmp_path: Path) -> None:
    """peft saves it unless told otherwise, and would put it in the place of the base model's."""
    path = save_lora(tmp_path / "a", MODEL, targets=["lm_head"], save_embedding_layers=True)
    copied = "base_model.model.lm_head.base_layer.weight"
    assert_equals_peft(MODEL, path, weights := read_lora(path, MODEL, max_rank=8))
    tensors(lambda t: t.update({copied: t[copied].bfloat16()}))(path)  # rounded, but the same
    assert read_lora(path, MODEL, max_rank=8).modules.keys() == weights.modules.keys()
    tensors(lambda t: t[copied][7].mul_(1.5))(path)
    message = refusal(path)
    assert copied in message
    assert "save_embedding_layers=False" in message
    tensors(lambda t: t.update({copied: torch.ones(2, 2)}))(path)
    assert copied in refusal(path)


def test_an_adapter_of_something_else_than_a_linear_is_refused(adapter: Path) -> None:
    edit_config(adapter, target_modules=[*ALL_LINEARS, "norm"])
    tensors(
        lambda t: t.update(
            {
                key("model.norm", "A"): torch.ones(4, 64),
                key("model.norm", "B"): torch.ones(64, 4),
            }
        )
    )(adapter)
    assert "'model.norm' is LlamaRMSNorm, and only adapters of nn.Linear" in refusal(adapter)
