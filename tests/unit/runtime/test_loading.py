from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cotune.runtime import loading
from cotune.runtime.errors import ModelLoadError
from cotune.runtime.loading import LoadedModel, load_model
from cotune.streams.memory import MemoryProbe, MemoryReading
from tiny_models import (
    EOS_ID,
    FAMILIES,
    VOCAB_SIZE,
    quiet_transformers,
    save_lora,
    save_model_directory,
    tiny_model,
    tiny_tokenizer,
)

if TYPE_CHECKING:
    from collections.abc import Callable

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory that tests must not change."""
    return save_model_directory(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def broken(llama: Path, tmp_path: Path) -> Path:
    """A copy of it that tests may change."""
    return Path(shutil.copytree(llama, tmp_path / "broken"))


def load(path: Path | str, **options: Any) -> LoadedModel:
    return load_model(path, device=CPU, **options)


def refusal(path: Path | str | None, **options: Any) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load_model(path, device=CPU, **options)
    assert caught.value.param is not None
    return caught.value.message


def edit_json(file: Path, **changes: Any) -> None:
    value = json.loads(file.read_text())
    value |= changes
    file.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


# --- what loads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_with_the_weights_that_were_saved(tmp_path: Path, family: str) -> None:
    path = save_model_directory(tmp_path / "model", family, seed=3)
    loaded = load(path)
    ids = torch.arange(5, 25)[None]
    assert torch.equal(loaded.model(ids).logits, tiny_model(family, seed=3)(ids).logits)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.tokenizer.decode(loaded.tokenizer("naïve 🙂")["input_ids"]) == "naïve 🙂"
    assert loaded.name == "model"
    assert loaded.path == path
    assert loaded.vocab_size == VOCAB_SIZE
    assert loaded.max_model_len == 512
    assert len(loaded.attention_layers) == loaded.model.config.num_hidden_layers


def test_a_sharded_checkpoint_loads_like_a_single_file(llama: Path, tmp_path: Path) -> None:
    path = save_model_directory(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    one, many = load(llama).model.state_dict(), load(path).model.state_dict()
    assert one.keys() == many.keys()
    assert all(torch.equal(one[key], many[key]) for key in one)


def test_a_path_may_be_a_string_and_relative(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(llama)
    assert load(".").name == "tiny-llama"
    monkeypatch.chdir(llama.parent)
    assert load("tiny-llama").name == "tiny-llama"


def test_none_is_the_demo_model(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "DEMO_MODEL_PATH", llama)
    assert load_model(None, device=CPU).name == "cotune-demo"


def test_without_a_demo_model_none_says_how_to_make_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "DEMO_MODEL_PATH", tmp_path / "absent")
    assert "make it with `cotune train-demo`" in refusal(None)


@pytest.mark.parametrize(
    ("saved", "asked", "expected"),
    [
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float32, "auto", torch.float32),
        (torch.float16, "auto", torch.float32),  # on a CPU
        (torch.float64, "auto", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "float16", torch.float16),
    ],
)
def test_the_dtype_is_the_checkpoints_unless_asked(
    tmp_path: Path, saved: torch.dtype, asked: str, expected: torch.dtype
) -> None:
    loaded = load(save_model_directory(tmp_path / "m", dtype=saved), dtype=asked)
    assert loaded.dtype == expected
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {expected}


def test_a_configuration_without_a_dtype_leaves_it_to_the_weights(tmp_path: Path) -> None:
    path = save_model_directory(tmp_path / "m", dtype=torch.bfloat16)
    edit_json(path / "config.json", dtype=..., torch_dtype=...)
    assert load(path).dtype == torch.bfloat16


def test_loading_leaves_the_logging_of_transformers_as_it_was(llama: Path) -> None:
    hf_logging = transformers.utils.logging
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    load(llama)
    assert hf_logging.get_verbosity() == verbosity
    assert hf_logging.is_progress_bar_enabled() == bars


def test_loading_writes_nothing_to_the_terminal(
    llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    load(llama)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


# --- generation defaults and the end of a sequence ------------------------------------------------


def test_generation_config_gives_the_sampling_defaults(tmp_path: Path) -> None:
    path = save_model_directory(
        tmp_path / "m",
        generation_config={"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": None},
    )
    assert load(path).generation_defaults == {"temperature": 0.6, "top_p": 0.9, "top_k": 20}


def test_without_generation_config_there_are_no_defaults(broken: Path) -> None:
    (broken / "generation_config.json").unlink()
    loaded = load(broken)
    assert loaded.generation_defaults == {}
    assert loaded.eos_token_ids == {EOS_ID}


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", "hot"), ("top_p", 1.5), ("top_k", 2.5)]
)
def test_a_wrong_sampling_default_is_refused_by_name(
    broken: Path, field: str, value: object
) -> None:
    edit_json(broken / "generation_config.json", **{field: value})
    message = refusal(broken)
    assert "generation_config.json" in message
    assert field in message
    assert str(value) in message


def test_every_file_may_name_tokens_that_end_the_answer(broken: Path) -> None:
    edit_json(broken / "generation_config.json", eos_token_id=[7, 8])
    edit_json(broken / "config.json", eos_token_id=9)
    assert load(broken).eos_token_ids == {7, 8, 9, EOS_ID}  # EOS_ID is the tokenizer's


def test_end_tokens_outside_the_vocabulary_are_left_out_with_a_warning(
    broken: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_json(broken / "generation_config.json", eos_token_id=[7, 5000])
    with caplog.at_level(logging.WARNING):
        assert load(broken).eos_token_ids == {7, EOS_ID}
    assert "5000" in caplog.text


# --- context length -------------------------------------------------------------------------------


def test_max_model_len_may_be_lower_than_the_model_allows(llama: Path) -> None:
    assert load(llama, max_model_len=100).max_model_len == 100
    assert load(llama, max_model_len=512).max_model_len == 512


@pytest.mark.parametrize("asked", [513, 10**9])
def test_max_model_len_beyond_the_model_is_refused(llama: Path, asked: int) -> None:
    message = refusal(llama, max_model_len=asked)
    assert f"max_model_len is {asked}" in message
    assert "max_position_embeddings" in message
    assert "at most 512" in message


@pytest.mark.parametrize("asked", [0, -1, 1.5, True])
def test_max_model_len_must_be_a_positive_integer(llama: Path, asked: Any) -> None:
    assert f"max_model_len is {asked!r}" in refusal(llama, max_model_len=asked)


def rope(**entries: Any) -> dict[str, Any]:
    return {"rope_theta": 10000.0, **entries}


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({"rope_parameters": rope(rope_type="default")}, 512),
        # The factor is in max_position_embeddings already.
        (
            {
                "rope_parameters": rope(
                    rope_type="llama3",
                    factor=8.0,
                    low_freq_factor=1.0,
                    high_freq_factor=4.0,
                    original_max_position_embeddings=64,
                )
            },
            512,
        ),
        ({"rope_parameters": rope(rope_type="linear", factor=4.0)}, 512),
        # yarn: stated beside the original length, or in max_position_embeddings.
        (
            {
                "rope_parameters": rope(
                    rope_type="yarn", factor=4.0, original_max_position_embeddings=512
                )
            },
            2048,
        ),
        (
            {
                "rope_parameters": rope(
                    rope_type="yarn", factor=4.0, original_max_position_embeddings=128
                )
            },
            512,
        ),
        # Beyond these, one sequence's length would change the others' rotation.
        ({"rope_parameters": rope(rope_type="dynamic", factor=4.0)}, 512),
        (
            {
                "rope_parameters": rope(
                    rope_type="longrope",
                    short_factor=[1.0] * 8,
                    long_factor=[2.0] * 8,
                    original_max_position_embeddings=128,
                )
            },
            128,
        ),
    ],
)
def test_rope_scaling_decides_the_context_length(
    broken: Path, settings: dict[str, Any], limit: int
) -> None:
    edit_json(broken / "config.json", **settings)
    assert load(broken).max_model_len == limit
    assert f"allows {limit}" in refusal(broken, max_model_len=limit + 1)


def test_the_old_spelling_of_rope_scaling_is_understood(broken: Path) -> None:
    edit_json(
        broken / "config.json",
        rope_parameters=...,
        rope_scaling={"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512},
    )
    assert load(broken).max_model_len == 1024


def test_a_length_left_out_of_the_configuration_is_the_architectures(broken: Path) -> None:
    edit_json(broken / "config.json", max_position_embeddings=...)
    default = transformers.LlamaConfig().max_position_embeddings
    assert load(broken).max_model_len == default
    assert f"allows {default}" in refusal(broken, max_model_len=default + 1)


# --- refusals -------------------------------------------------------------------------------------


def test_an_unknown_dtype_is_refused(llama: Path) -> None:
    assert "dtype is 'int8'; use one of auto, float32" in refusal(llama, dtype="int8")


def test_weights_that_do_not_fit_into_memory_are_refused_before_they_are_read(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = sum(parameter.nbytes for parameter in tiny_model("llama").parameters())
    available = weights // 2

    def read(_: MemoryProbe) -> MemoryReading:
        return MemoryReading(total_bytes=2**30, free_bytes=available, allocator_unused_bytes=0)

    monkeypatch.setattr(MemoryProbe, "read", read)
    message = refusal(llama)
    assert "for its weights in float32, and cpu has 0.0 GiB free" in message
    assert "smaller model or dtype" in message
    assert load(llama, dtype="bfloat16").dtype == torch.bfloat16  # half the bytes just fit


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/dir", Path("nowhere"), "a/b/c", "a b"])
def test_a_path_that_does_not_exist_is_refused(source: str | Path) -> None:
    assert "there is no directory" in refusal(source)


def test_a_hub_id_that_cannot_be_fetched_is_refused_with_both_remedies() -> None:
    message = refusal("no-such-owner/no-such-model")  # the suite runs with the hub offline
    assert "'no-such-owner/no-such-model'" in message
    assert "check the path or the network" in message


def test_a_hub_id_is_fetched_without_code_and_other_formats(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options))
        return str(llama)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load("owner/model", revision="v1").name == "owner/model"
    repo_id, options = asked[0]
    assert repo_id == "owner/model"
    assert options["revision"] == "v1"
    assert "*.safetensors" in options["allow_patterns"]
    assert not {"*.py", "*.bin", "*.pt"} & set(options["allow_patterns"])


def test_a_revision_of_a_directory_is_refused(llama: Path) -> None:
    assert "revision is 'main', but" in refusal(llama, revision="main")


def test_a_file_in_place_of_a_directory_is_refused(llama: Path) -> None:
    assert "is a file" in refusal(llama / "config.json")


def delete(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def write(name: str, content: str) -> Callable[[Path], None]:
    return lambda path: _write(path / name, content)


def _write(file: Path, content: str) -> None:
    file.write_text(content)


def truncate(share: float) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        file = path / "model.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * share)])

    return apply


def pickle_weights(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def delete_tokenizer(path: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (path / file).unlink()


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda path: edit_json(path / "config.json", **changes)


def edit_weights(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        edit(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    return apply


def add_tokens(path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(20)])
    with quiet_transformers():
        tokenizer.save_pretrained(path)


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (delete("config.json"), ["config.json", "not a model directory"]),
        (write("config.json", "{"), ["config.json cannot be read", "get the file again"]),
        (write("config.json", "[]"), ["config.json does not hold a JSON object"]),
        (config(model_type=...), ["config.json has no model_type"]),
        (config(model_type="new-arch"), ["model_type 'new-arch'", "upgrade transformers"]),
        (
            config(model_type="new-arch", auto_map={"AutoConfig": "c.C"}),
            ["model_type 'new-arch'", "--trust-remote-code"],
        ),
        (config(num_attention_heads="four"), ["config.json is not usable", "num_attention_heads"]),
        (config(model_type="t5"), ["encoder-decoder"]),
        (delete_tokenizer, ["has no tokenizer", "tokenizer.json", "save the model's tokenizer"]),
        (write("tokenizer.json", "{"), ["the tokenizer in", "cannot be read"]),
        (add_tokens, ["'<extra19>' with id 395", "384 rows", "resize the embedding"]),
        (delete("model.safetensors"), ["has no weights", "model.safetensors.index.json"]),
        (pickle_weights, ["pytorch_model.bin", "convert them to safetensors"]),
        (truncate(0.9), ["model.safetensors is damaged", "get the file again"]),
        (truncate(0.0), ["model.safetensors is damaged"]),
        (write("model.safetensors", "not tensors at all"), ["model.safetensors is damaged"]),
        (edit_weights(lambda t: t.pop(UP)), ["lacks 1 weights", UP, "would be random"]),
        (
            edit_weights(lambda t: t.update(extra=torch.ones(2))),
            ["unknown 1 weights", "extra", "would be ignored"],
        ),
        (
            edit_weights(lambda t: t.update({UP: torch.ones(8, 64)})),
            [UP, "(8, 64) in the file", "(96, 64) by config.json"],
        ),
        (
            edit_weights(lambda t: t.update({UP: t[UP] * float("nan")})),
            ["logits are not finite", "weights are damaged"],
        ),
        (write("generation_config.json", "{"), ["generation_config.json cannot be read"]),
    ],
)
def test_a_damaged_directory_is_refused_naming_file_and_remedy(
    broken: Path, damage: Callable[[Path], None], expected: list[str]
) -> None:
    damage(broken)
    message = refusal(broken)
    for text in expected:
        assert text in message


def test_missing_shards_are_named(tmp_path: Path) -> None:
    path = save_model_directory(tmp_path / "m", max_shard_size="100KB")
    shards = sorted(path.glob("*.safetensors"))
    shards[1].unlink()
    message = refusal(path)
    assert f"lacks 1 of {len(shards)} weight files: {shards[1].name}" in message


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    path = save_model_directory(tmp_path / "m", max_shard_size="100KB")
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    assert f"{shard} is damaged" in refusal(path)


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path) -> None:
    path = save_model_directory(tmp_path / "m", max_shard_size="100KB")
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = sorted(path.glob("*.safetensors"))[0].name
    index.write_text(json.dumps(content))
    assert "lacks 'ghost', which model.safetensors.index.json says it holds" in refusal(path)
    index.write_text(json.dumps({"metadata": {}}))
    assert "has no weight_map" in refusal(path)


def test_an_adapter_in_place_of_a_model_is_refused(llama: Path, broken: Path) -> None:
    adapter = save_lora(broken.parent / "adapter", tiny_model("llama"))
    assert "there is no" in refusal(adapter)
    shutil.copy(adapter / "adapter_config.json", broken)
    message = refusal(broken)
    assert "it is a LoRA adapter, not a model" in message
    assert "--lora-modules" in message


def test_code_of_the_checkpoint_does_not_run_unless_trusted(
    broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("sys.path", list(sys.path))
    (broken / "remote.py").write_text(
        "from pathlib import Path\n"
        "import transformers\n"
        f"Path({str(broken / 'ran')!r}).touch()\n"
        "class RemoteConfig(transformers.LlamaConfig):\n"
        "    model_type = 'remote-llama'\n"
        "class RemoteForCausalLM(transformers.LlamaForCausalLM):\n"
        "    config_class = RemoteConfig\n"
    )
    edit_json(
        broken / "config.json",
        model_type="remote-llama",
        architectures=["RemoteForCausalLM"],
        auto_map={
            "AutoConfig": "remote.RemoteConfig",
            "AutoModelForCausalLM": "remote.RemoteForCausalLM",
        },
    )
    assert "--trust-remote-code" in refusal(broken)
    assert not (broken / "ran").exists()
    loaded = load(broken, trust_remote_code=True)
    assert (broken / "ran").exists()
    assert type(loaded.model).__name__ == "RemoteForCausalLM"


def test_a_refusal_names_the_model(tmp_path: Path) -> None:
    path = save_model_directory(tmp_path / "my-model")
    edit_json(path / "config.json", quantization_config={"quant_method": "awq"})
    message = refusal(path)
    assert "'my-model' cannot be served" in message
    assert "quantised (awq)" in message
    assert "float32, bfloat16 or float16" in message


@pytest.mark.gpu
def test_weights_go_straight_to_a_gpu(llama: Path) -> None:
    loaded = load_model(llama, device=torch.device("cuda"))
    assert {parameter.device.type for parameter in loaded.model.parameters()} == {"cuda"}
    assert {buffer.device.type for buffer in loaded.model.buffers()} <= {"cuda"}
