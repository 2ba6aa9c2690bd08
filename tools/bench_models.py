"""The random-weight models that the benchmarks run on, made in code in the ordinary format.

    small     Llama, hidden  256,  6 layers,  8 heads / 4 KV heads, ffn  688, vocabulary  4,096
    medium    Llama, hidden  768, 12 layers, 12 heads / 4 KV heads, ffn 2048, vocabulary 16,384
    large     Llama, hidden 2048, 16 layers, 32 heads / 8 KV heads, ffn 8192, vocabulary 128,256

`large` has the shape of Llama 3.2 1B and is meant for a GPU.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

SHAPES: dict[str, dict[str, int]] = {
    "small": {
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 688,
        "vocab_size": 4096,
    },
    "medium": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 2048,
        "vocab_size": 16384,
    },
    "large": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128256,
    },
}


def make_model(directory: Path, shape: str, dtype: str, *, seed: int = 0) -> Path:
    """Write a random-weight Llama of one of `SHAPES`, with a byte-level tokenizer.

    Returns: the model's directory, `directory`/`shape`-`dtype`.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    target = directory / f"{shape}-{dtype}"
    torch.manual_seed(seed)
    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(target)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": 0} | {letter: i + 1 for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(target)
    return target


@dataclass(frozen=True, slots=True)
class Work:
    """One request of a benchmark: its prompt, and how many tokens to generate."""

    prompt: tuple[int, ...]
    output_tokens: int


def mixed_requests(
    count: int,
    *,
    prompt_tokens: tuple[int, int],
    output_tokens: tuple[int, int],
    vocab_size: int,
    seed: int,
) -> list[Work]:
    """Requests of random tokens, lengths uniform between the bounds, the same for a seed."""
    draw = random.Random(seed)
    return [
        Work(
            tuple(draw.randrange(1, vocab_size) for _ in range(draw.randint(*prompt_tokens))),
            draw.randint(*output_tokens),
        )
        for _ in range(count)
    ]


def make_adapter(
    directory: Path, model_path: Path, *, rank: int, head: bool = False, seed: int = 0
) -> Path:
    """Write a PEFT LoRA directory with random A and B on all linear layers of a `make_model`.

    With `head` on the output head too.
    """
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(model_path)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=r".*_proj|lm_head" if head else "all-linear",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    adapted: Any = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.01)
    target = directory / f"lora-r{rank}"
    adapted.save_pretrained(target)
    return target
