"""The packed forward against transformers, and adapters against peft, family by family."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cotune.runtime.config import CacheConfig
from cotune.runtime.executor import Executor
from cotune.runtime.loading import LoadedModel, load_model
from cotune.runtime.lora import read_lora
from cotune.runtime.step import SequenceStep
from tiny_models import FAMILIES, save_lora, save_model_directory, with_peft_adapter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from cotune.runtime.types import TokenLogprob

CPU = torch.device("cpu")
# Log-probabilities, absolute, float32. Lower precisions are held to transformers' own error, below.
TOLERANCE = 2e-4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(
    path: Path, family: str, dtype: torch.dtype, **overrides: Any
) -> tuple[LoadedModel, Executor]:
    directory = save_model_directory(path / "model", family, dtype, 3, **overrides)
    loaded = load_model(directory, device=CPU)
    executor = Executor.create(
        loaded,
        device=CPU,
        cache=CacheConfig(num_pages=64),
        max_num_batched_tokens=64,
    )
    return loaded, executor


def prompts(vocab_size: int, lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(2, vocab_size, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def reference(model: Any, ids: list[int]) -> torch.Tensor:
    """Log-probability of each next token of `ids` (len - 1,), by transformers."""
    logits: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def run(
    executor: Executor, sequences: list[list[int]], chunks: list[list[int]], slots: Sequence[int]
) -> list[torch.Tensor]:
    """Log-probabilities of all sequences, computed in packed iterations.

    `chunks[i]` are the chunk lengths of sequence i; iteration j packs everybody's j-th chunk.
    Pages are interleaved between the sequences.
    """
    size = executor.page_size
    count = len(sequences)
    tables = [
        [row + count * page for page in range(-(-len(ids) // size))]
        for row, ids in enumerate(sequences)
    ]
    found: list[list[TokenLogprob]] = [[] for _ in sequences]
    done = [0] * count
    for turn in range(max(len(chunk) for chunk in chunks)):
        steps, rows = [], []
        for row, ids in enumerate(sequences):
            if turn >= len(chunks[row]):
                continue
            end = done[row] + chunks[row][turn]
            steps.append(
                SequenceStep(
                    token_ids=ids[done[row] : end],
                    start=done[row],
                    block_table=tables[row],
                    adapter_slot=slots[row],
                    prompt_logprobs=0,
                    prompt_targets=ids[done[row] + 1 : end + 1],
                )
            )
            rows.append(row)
            done[row] = end
        for row, result in zip(rows, executor.execute(steps).results, strict=True):
            found[row].extend(result.prompt_logprobs)
    return [torch.tensor([entry.logprob for entry in row]) for row in found]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    difference = (actual - expected).abs().max()
    assert difference < TOLERANCE, difference


LENGTHS = (33, 1 + 16, 5, 48)
CHUNKS = {
    "whole": [[33], [17], [5], [48]],
    "chunked": [[7, 16, 10], [16, 1], [1, 1, 3], [30, 1, 1, 16]],
}


@pytest.mark.parametrize("head_dim", [None, 32], ids=["plain-kernels", "compiled-kernels"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_log_probabilities_equal_transformers_packed_and_chunked(
    tmp_path: Path, family: str, dtype: torch.dtype, head_dim: int | None
) -> None:
    overrides = {} if head_dim is None else {"head_dim": head_dim}
    loaded, executor = build(tmp_path, family, dtype, **overrides)
    about = executor.describe()
    assert about["forward"] == "lean decoder"
    assert ("compiled" in about["attention"]) == (head_dim is not None)
    sequences = prompts(loaded.vocab_size, LENGTHS)
    expected = [reference(loaded.model, ids) for ids in sequences]
    if dtype is torch.float32:
        for chunks in CHUNKS.values():
            for actual, wanted in zip(
                run(executor, sequences, chunks, [0] * 4), expected, strict=True
            ):
                assert_close(actual, wanted)
        return
    # Two correct orders of the same sums differ by rounding; what can be asked is that ours is no
    # further from the exact values than transformers in the same dtype is.
    exact = [reference(copy.deepcopy(loaded.model).float(), ids) for ids in sequences]
    theirs = (torch.cat(expected) - torch.cat(exact)).square().mean().sqrt()
    for chunks in CHUNKS.values():
        actual = torch.cat(run(executor, sequences, chunks, [0] * 4))
        ours = (actual - torch.cat(exact)).square().mean().sqrt()
        assert ours < 1.3 * theirs, (ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_has_its_own_adapter_as_peft_computes_it(tmp_path: Path, family: str) -> None:
    loaded, executor = build(tmp_path, family, torch.float32)
    targets = {
        1: (["q_proj", "v_proj"], 4),
        2: (["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 8),
        3: (["o_proj", "down_proj", "lm_head"], 2),
    }
    sequences = prompts(loaded.vocab_size, (33, 17, 5, 48, 20))
    slots = [1, 0, 2, 3, 2]
    wanted = {0: loaded.model}
    for slot, (names, rank) in targets.items():
        path = tmp_path / f"adapter{slot}"
        save_lora(path, loaded.model, rank, names, slot)
        executor.install_adapter(slot, read_lora(path, loaded.model, max_rank=64))
        wanted[slot] = with_peft_adapter(loaded.model, path)
    expected = [reference(wanted[slot], ids) for slot, ids in zip(slots, sequences, strict=True)]
    base = [reference(loaded.model, ids) for ids in sequences]
    assert all(
        (a - b).abs().max() > 0.05 for a, b, s in zip(expected, base, slots, strict=True) if s
    ), "the adapters must matter for this test to mean anything"
    chunks = [[16, 17], [17], [5], [1, 47], [20]]
    for actual, want in zip(run(executor, sequences, chunks, slots), expected, strict=True):
        assert_close(actual, want)
    # Everybody on one adapter takes another path; so does a slot that was cleared.
    alone = run(executor, [sequences[2]], [[5]], [2])[0]
    assert_close(alone, expected[2])
    executor.clear_adapter(2)
    cleared = run(executor, [sequences[2]], [[5]], [0])[0]
    assert_close(cleared, base[2])


def test_a_high_slot_that_leaves_some_layers_alone_changes_only_the_others(tmp_path: Path) -> None:
    loaded, executor = build(tmp_path, "llama", torch.float32, head_dim=32)
    wanted = {0: loaded.model}
    for slot, names in {1: ["q_proj", "o_proj", "down_proj"], 200: ["v_proj"]}.items():
        path = save_lora(tmp_path / f"adapter{slot}", loaded.model, 4, names, slot)
        executor.install_adapter(slot, read_lora(path, loaded.model, max_rank=64))
        wanted[slot] = with_peft_adapter(loaded.model, path)
    sequences = prompts(loaded.vocab_size, (33, 17, 5))
    slots = [200, 1, 0]
    for actual, ids, slot in zip(
        run(executor, sequences, [[33], [17], [5]], slots), sequences, slots, strict=True
    ):
        assert_close(actual, reference(wanted[slot], ids))


def test_a_family_without_a_recipe_runs_through_its_own_modules(tmp_path: Path) -> None:
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    torch.manual_seed(0)
    config = SmolLM3Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=384,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = SmolLM3ForCausalLM(config).eval()
    from tiny_models import randomize_weights, tiny_tokenizer

    randomize_weights(model, 5)
    directory = tmp_path / "model"
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    loaded = load_model(directory, device=CPU)
    executor = Executor.create(
        loaded,
        device=CPU,
        cache=CacheConfig(num_pages=64),
        max_num_batched_tokens=64,
    )
    assert executor.describe()["forward"].startswith("model's modules")
    save_lora(tmp_path / "adapter", loaded.model, 4, ["q_proj", "up_proj", "lm_head"], 1)
    executor.install_adapter(1, read_lora(tmp_path / "adapter", loaded.model, max_rank=64))
    adapted = with_peft_adapter(loaded.model, tmp_path / "adapter")
    sequences = prompts(loaded.vocab_size, LENGTHS)
    slots = [0, 1, 0, 1]
    for actual, ids, slot in zip(
        run(executor, sequences, CHUNKS["chunked"], slots), sequences, slots, strict=True
    ):
        assert_close(actual, reference(adapted if slot else loaded.model, ids))


def test_a_context_shorter_than_an_iteration_is_never_left(tmp_path: Path) -> None:
    directory = save_model_directory(tmp_path / "model", "llama", torch.float32, 3, head_dim=32)
    loaded = load_model(directory, device=CPU, max_model_len=20)
    executor = Executor.create(
        loaded, device=CPU, cache=CacheConfig(num_pages=8), max_num_batched_tokens=64
    )
    ids = prompts(loaded.vocab_size, (20,))[0]
    actual = run(executor, [ids], [[20]], [0])[0]
    assert_close(actual, reference(loaded.model, ids))
