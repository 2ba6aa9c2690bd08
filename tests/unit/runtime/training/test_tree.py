from __future__ import annotations

import gc
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cotune.runtime.errors import ConfigError
from cotune.runtime.lora import read_lora
from cotune.runtime.training.batches import Group, PackedGroups, pack
from cotune.runtime.training.safepoints import Safepoints
from cotune.runtime.training.tree import StopLora, TrainingTree
from tiny_models import FAMILIES, tiny_model, with_peft_adapter

if TYPE_CHECKING:
    from pathlib import Path


def _tree(model: Any, targets: str = "all-linear", **options: Any) -> TrainingTree:
    options.setdefault("safepoints", Safepoints())
    options.setdefault("seed", 3)
    return TrainingTree(model, rank=4, alpha=8.0, target_modules=targets, **options)


def _fill(tree: TrainingTree, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tree.named_lora().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def _packed() -> PackedGroups:
    return pack(
        [
            Group(prompt_ids=(7, 8, 9), completions=((10, 11), (12, 13, 14))),
            Group(prompt_ids=(20,), completions=((21, 22),)),
        ]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_parameters_are_those_of_the_model_and_exist_once(family: str) -> None:
    model = tiny_model(family, torch.bfloat16)
    _fill(tree := _tree(model))
    theirs = {name: p.data_ptr() for name, p in model.named_parameters()}
    ours = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p.data_ptr()
        for name, p in tree._peft.named_parameters()
        if "lora_" not in name
    }
    assert ours == theirs
    logps = tree.logps(_packed()).logps  # nor does computing make one
    logps.sum().backward()
    del logps
    gc.collect()
    known = set(theirs.values()) | {p.data_ptr() for p in tree.named_lora().values()}
    shapes = {p.shape for p in model.parameters() if p.dim() == 2}
    copies = [
        thing
        for thing in gc.get_objects()
        if type(thing) in (torch.Tensor, torch.nn.Parameter)
        and thing.shape in shapes
        and thing.dtype is torch.bfloat16
        and thing.data_ptr() not in known
    ]
    assert copies == []


def test_the_model_itself_is_not_changed() -> None:
    model = tiny_model("llama")
    ids = torch.arange(5, 25).unsqueeze(0)
    modules = [(name, type(module)) for name, module in model.named_modules()]
    attention = model.config._attn_implementation
    before = model(input_ids=ids).logits
    _fill(tree := _tree(model))
    tree.logps(_packed()).logps.sum().backward()
    assert torch.equal(model(input_ids=ids).logits, before)
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert model.config._attn_implementation == attention
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_only_lora_is_trained_and_in_float32_even_over_bfloat16() -> None:
    tree = _tree(tiny_model("llama", torch.bfloat16), targets="q_proj, v_proj")
    lora = tree.named_lora()
    assert len(lora) == 3 * 2 * 2
    assert all(".lora_A.default." in name or ".lora_B.default." in name for name in lora)
    assert {p.dtype for p in lora.values()} == {torch.float32}
    _fill(tree)
    tree.logps(_packed()).logps.sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in lora.values())


def test_an_adapter_starts_as_nothing_and_the_seed_decides_how() -> None:
    model = tiny_model("qwen3")
    first, second, other = _tree(model, seed=1), _tree(model, seed=1), _tree(model, seed=2)
    state = torch.random.get_rng_state()
    _tree(model, seed=9)
    assert torch.equal(torch.random.get_rng_state(), state)
    packed = _packed()
    assert torch.equal(first.logps(packed).logps, first.logps(packed, weights="base").logps)
    a, b, c = (
        torch.cat([p.detach().flatten() for p in tree.named_lora().values()])
        for tree in (first, second, other)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_the_anchor_keeps_the_weights_of_when_it_was_set() -> None:
    tree = _tree(tiny_model("gemma2"))
    packed = _packed()
    base = tree.logps(packed, weights="base").logps
    assert torch.equal(tree.logps(packed, weights="anchor").logps, base)
    _fill(tree, seed=1)
    then = tree.logps(packed).logps.detach()
    tree.set_anchor()
    _fill(tree, seed=2)
    assert torch.equal(tree.logps(packed, weights="anchor").logps, then)
    assert not torch.allclose(tree.logps(packed).logps, then)
    tree.clear_anchor()
    assert torch.equal(tree.logps(packed, weights="anchor").logps, base)


def test_the_divergence_from_the_anchor_is_zero_at_it_and_positive_away_from_it() -> None:
    tree = _tree(tiny_model("granite"))
    packed = _packed()
    _fill(tree, seed=1)
    tree.set_anchor()
    at = tree.logps(packed, kl_to_anchor=True)
    assert at.kl is not None
    assert at.kl.tolist() == pytest.approx([0.0] * 3, abs=1e-5)
    _fill(tree, seed=2)
    away = tree.logps(packed, kl_to_anchor=True)
    assert away.kl is not None
    assert (away.kl > 0.01).all()
    away.kl.sum().backward()
    assert all(p.grad is not None for p in tree.named_lora().values())
    assert tree.logps(packed).kl is None


@pytest.mark.parametrize("weights", ["base", "anchor"])
def test_weights_that_are_not_trained_carry_no_gradient(weights: Any) -> None:
    tree = _tree(tiny_model("llama"))
    _fill(tree)
    tree.set_anchor()
    assert not tree.logps(_packed(), weights=weights).logps.requires_grad
    assert tree.logps(_packed()).logps.requires_grad
    with torch.no_grad():
        assert not tree.logps(_packed()).logps.requires_grad


def test_counts_are_the_tokens_of_each_completion() -> None:
    assert _tree(tiny_model("llama")).logps(_packed()).counts.tolist() == [2, 3, 2]


STOP = StopLora(alpha=6.0, token_ids=(4, 22))


@pytest.mark.parametrize("stop", [None, STOP], ids=["", "stops"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_is_read_by_peft_and_by_serving_as_the_same_weights(
    tmp_path: Path, family: str, stop: StopLora | None
) -> None:
    model = tiny_model(family)
    tree = _tree(model, base_name="some/base", stop=stop)
    _fill(tree)
    tree.save_adapter(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert config["lora_alpha"] == 8.0
    read, given = read_lora(tmp_path / "a", model, max_rank=4), tree.weights()
    assert read.rank == given.rank == 4
    assert list(read.modules) == list(given.modules)
    for path, pair in given.modules.items():
        torch.testing.assert_close(read.modules[path].a, pair.a, rtol=0, atol=0)
        torch.testing.assert_close(read.modules[path].b, pair.b, rtol=0, atol=0)
    ids = [7, 8, 9, 10, 11]
    logits = with_peft_adapter(model, tmp_path / "a")(input_ids=torch.tensor([ids])).logits[0]
    logps = logits.log_softmax(-1)
    expected = logps[2, 10] + logps[3, 11]
    assert tree.logps(_packed()).logps[0].item() == pytest.approx(expected.item(), rel=1e-5)
    # So are other weights than the present ones, as an average is.
    copies = {name: p.detach().clone() for name, p in tree.named_lora().items()}
    _fill(tree, seed=2)
    tree.save_adapter(tmp_path / "b", copies)
    for path, pair in read_lora(tmp_path / "b", model, max_rank=4).modules.items():
        torch.testing.assert_close(pair.a, given.modules[path].a, rtol=0, atol=0)
        torch.testing.assert_close(pair.b, given.modules[path].b, rtol=0, atol=0)


def test_of_the_stop_tokens_adapter_one_vector_is_trained_which_starts_as_nothing() -> None:
    model = tiny_model("llama")
    plain, tree = _tree(model), _tree(model, stop=STOP)
    (name,) = tree.named_lora().keys() - plain.named_lora().keys()
    assert name.endswith("lm_head.lora_A.default.weight")
    assert tree.named_lora()[name].shape == (1, model.config.hidden_size)
    assert torch.equal(tree.logps(_packed()).logps, plain.logps(_packed()).logps)
    with torch.no_grad():
        tree.named_lora()[name].fill_(0.1)
    pair = tree.weights().modules["lm_head"]
    assert pair.b.flatten().nonzero().flatten().tolist() == [4, 22]
    assert pair.b[[4, 22], 0].tolist() == [6.0, 6.0]


@pytest.mark.parametrize("weights", ["anchor", "base"])
def test_the_stop_tokens_are_adapted_in_the_weights_asked_for(weights: Any) -> None:
    model = tiny_model("llama")
    tree = _tree(model, stop=STOP)
    _fill(tree, seed=1)
    with torch.no_grad():
        expected = tree.logps(_packed()).logps if weights == "anchor" else None
        if expected is None:
            expected = _tree(model).logps(_packed()).logps
        tree.set_anchor()
        _fill(tree, seed=2)
        assert not torch.allclose(tree.logps(_packed()).logps, expected, atol=0.1)
        torch.testing.assert_close(tree.logps(_packed(), weights=weights).logps, expected)


@pytest.mark.parametrize("head", [None, torch.nn.Identity()], ids=["no stop tokens", "no linear"])
def test_stop_tokens_that_cannot_be_adapted_are_refused(head: Any) -> None:
    model = tiny_model("llama")
    if head is not None:
        model.lm_head = head
    stop = StopLora(alpha=6.0, token_ids=() if head is None else (4,))
    with pytest.raises(ConfigError, match="set it to 0") as caught:
        _tree(model, stop=stop)
    assert caught.value.param == "learning.training.stop_alpha"


def test_weights_are_copies() -> None:
    tree = _tree(tiny_model("llama"))
    _fill(tree, seed=1)
    weights = tree.weights()
    before = {path: pair.b.clone() for path, pair in weights.modules.items()}
    _fill(tree, seed=2)
    assert all(torch.equal(weights.modules[path].b, b) for path, b in before.items())


class _CountingSafepoints(Safepoints):
    def __init__(self) -> None:
        super().__init__()
        self.passed = 0

    def wait(self) -> None:
        self.passed += 1
        super().wait()


def test_safepoints_are_passed_before_every_layer_forward_and_backward() -> None:
    safepoints = _CountingSafepoints()
    model = tiny_model("llama")
    tree = _tree(model, safepoints=safepoints)
    _fill(tree)
    safepoints.passed = 0
    logps = tree.logps(_packed()).logps
    layers = model.config.num_hidden_layers
    assert safepoints.passed == layers + 1
    logps.sum().backward()
    # Into the last layer and between any two; the first has nothing below it.
    assert safepoints.passed == 2 * layers + 1


def test_a_held_safepoint_stops_the_training_thread_until_it_is_released() -> None:
    is_waiting = threading.Event()

    def clock() -> float:
        is_waiting.set()  # who waits reads it first when it begins to
        return 0.0

    safepoints = Safepoints(clock=clock)
    tree = _tree(tiny_model("llama"), safepoints=safepoints)
    safepoints.hold()
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(tree.logps, _packed())
        assert is_waiting.wait(60)
        assert not training.done()
        assert safepoints.statistics().waiting == safepoints.statistics().waits == 1
        safepoints.release()
        training.result(timeout=60)
    assert safepoints.statistics().waiting == 0


@pytest.mark.parametrize("targets", ["lm_head", "q_proj,nothing", "", "self_attn", "embed_tokens"])
def test_targets_that_are_no_adaptable_linears_are_refused(targets: str) -> None:
    with pytest.raises(ConfigError, match=r"training\.target_modules.*q_proj") as caught:
        _tree(tiny_model("llama"), targets=targets)
    assert caught.value.param == "learning.training.target_modules"
