"""Tiny random models, tokenizers and LoRA adapters, made in code and never downloaded.

    model = tiny_model("gemma2")                     # float32, seeded, about 200,000 parameters
    path = save_model_directory(tmp_path / "m", "qwen3", dtype=torch.bfloat16)
    save_lora(tmp_path / "a", model, rank=4, targets=["q_proj", "v_proj"], seed=1)

Transformers' own initialisation gives logits so flat that an argmax is decided by rounding and a
wrong page changes nothing visible. The one here gives every part of the network weight: logits of
standard deviation 2, norms and biases that are not trivial, attention that is not uniform, and
greedy answers that wander instead of repeating one token.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "olmo2", "granite")
"""Every family that the project promises to serve, by transformers' `model_type`."""

ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linears of a decoder layer; every family above has exactly these."""

VOCAB_SIZE = 384
EOS_TOKEN = "<|end|>"
PAD_TOKEN = "<|pad|>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")
EOS_ID, PAD_ID = 0, 1

# What differs from the common shape in tiny_config. The Gemmas tie their embeddings, and qwen2 does
# as its small checkpoints do; windows are shorter than the prompts that tests use.
_FAMILY_CONFIG: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 24},
    "mistral": {"sliding_window": 24, "head_dim": 16},
    "gemma2": {
        "num_hidden_layers": 4,
        "sliding_window": 24,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 10.0,
    },
    "gemma3_text": {
        "num_hidden_layers": 4,
        "sliding_window": 24,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "layer_types": [
            "sliding_attention",
            "sliding_attention",
            "full_attention",
            "sliding_attention",
        ],
    },
    "olmo2": {},
    "granite": {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
}

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_TOKENIZER_TEXT = (
    "the cat sat on the mat and the dog ran after the cat",
    "she said hello to him and he said hello to her in the garden",
    "one day a small bird flew over the river and into the old house",
    "what is the name of the river that runs through the town",
    "there was a time when the children would play in the street",
)


def tiny_config(family: str, **overrides: Any) -> Any:
    """A transformers config of that family: hidden 64, 3-4 layers, 4 query and 2 KV heads."""
    import transformers

    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "tie_word_embeddings": family.startswith("gemma"),
    }
    values |= _FAMILY_CONFIG[family]
    values |= overrides
    return transformers.AutoConfig.for_model(family, **values)


def tiny_model(
    family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> Any:
    """A causal LM of `tiny_config(family, **overrides)`, in eval mode and without gradients.

    The same arguments give the same weights: they are drawn in float32 from `seed` alone, then
    converted, whatever the process drew before.
    """
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(
            tiny_config(family, **overrides), dtype=torch.float32
        )
    randomize_weights(model, seed)
    model.generation_config.eos_token_id = EOS_ID
    model.generation_config.pad_token_id = PAD_ID
    return model.to(dtype).eval().requires_grad_(False)


@torch.no_grad()
def randomize_weights(model: Any, seed: int) -> None:
    """Redraw every parameter so that each one matters to the logits; see the module docstring."""
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: torch.Tensor, std: float, mean: torch.Tensor | float = 0.0) -> None:
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + mean)

    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    is_tied = head.weight is embedding.weight
    hidden = embedding.weight.shape[1]
    # The last norm hands rows of unit variance to the head, so this is the logits' deviation.
    head_std = 2.0 * getattr(model.config, "logits_scaling", 1.0) / math.sqrt(hidden)
    done: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in done:
                continue
            done.add(id(parameter))
            if parameter is head.weight:
                normal(parameter, head_std)
            elif module is embedding:
                normal(parameter, 1.0)
            elif isinstance(module, nn.Linear) and name == "weight":
                normal(parameter, 1.4 / math.sqrt(module.in_features))
            elif name == "bias":
                normal(parameter, 0.3)
            else:  # a norm's scale, around the value its family starts from (1, or Gemma's 0)
                normal(parameter, 0.15, mean=parameter.clone())
                if module is model.model.norm and is_tied:
                    # A tied head finds the input token in the residual stream and repeats it for
                    # ever. Half of the last scales turned to about -1 (Gemma's scale is 1 + this)
                    # make the head's view of a token unlike its embedding.
                    parameter[::2] -= 2.0


def tiny_tokenizer(vocab_size: int = VOCAB_SIZE) -> Any:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens with a chat template.

    Any text can be encoded and decoding gives it back; a character outside ASCII takes several
    tokens, so that half characters occur. Ids 0 to 4 are special: end, pad and the three roles.
    """
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _TOKENIZER_TEXT,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOS_TOKEN, PAD_TOKEN, *ROLE_TOKENS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        additional_special_tokens=list(ROLE_TOKENS),
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def save_model_directory(
    path: Path,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    max_shard_size: str = "1GB",
    generation_config: dict[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """Write `tiny_model(...)` and its tokenizer as an ordinary Hugging Face directory.

    Args:
        path: the directory to make.
        max_shard_size: split the weights into files of at most this size ("100KB").
        generation_config: entries that replace or add to those of ``generation_config.json``.
        overrides: config fields, as for `tiny_config`.

    Returns:
        `path`.
    """
    model = tiny_model(family, dtype, seed, **overrides)
    with quiet_transformers():
        model.save_pretrained(path, max_shard_size=max_shard_size)
        tiny_tokenizer().save_pretrained(path)
    if generation_config:
        file = path / "generation_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | generation_config))
    return path


def save_lora(
    path: Path,
    model: Any,
    rank: int = 4,
    targets: Sequence[str] | str = ALL_LINEARS,
    seed: int = 0,
    save_embedding_layers: bool = False,
    **lora_config: Any,
) -> Path:
    """Let peft make a LoRA adapter of `model` with random A and B, and save it as peft does.

    Args:
        path: the directory to make; it holds adapter_config.json and adapter_model.safetensors.
        model: the base model; it is copied, not changed.
        rank: R; `lora_config` may override it per module with rank_pattern.
        targets: names (or one regular expression) of the linears that get an adapter.
        save_embedding_layers: as peft's; True: with the base weights of the head, if that is named.
        lora_config: further fields of peft's LoraConfig; lora_alpha is 2 * rank unless given.

    Returns:
        `path`.
    """
    import peft

    lora_config.setdefault("lora_alpha", 2 * rank)
    config = peft.LoraConfig(
        r=rank,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
        **lora_config,
    )
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_A" in name or "lora_embedding_A" in name:
                    parameter.copy_(torch.randn(parameter.shape) / math.sqrt(parameter.shape[-1]))
                elif "lora_B" in name or "lora_embedding_B" in name:
                    parameter.copy_(torch.randn(parameter.shape) * 0.4 / math.sqrt(rank))
        adapted.save_pretrained(path, save_embedding_layers=save_embedding_layers)
    return path


def with_peft_adapter(model: Any, path: Path) -> Any:
    """The oracle for adapters: a copy of `model` under peft's own reading of the directory."""
    import peft

    with quiet_transformers():
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(path))
    return adapted.eval().requires_grad_(False)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, and warnings of the libraries that say nothing about us are not errors."""
    import transformers

    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
