"""The training tree against plain peft and transformers, one sequence at a time.

In float32 the two differ by rounding alone: sums are done in another order. Log-probabilities agree
to 1e-5 relative; so do LoRA gradients, by the norm of each matrix's difference.
"""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch

from cotune.runtime.training import attention, head
from cotune.runtime.training.batches import Group, pack
from cotune.runtime.training.safepoints import Safepoints
from cotune.runtime.training.tree import StopLora, TrainingTree, lora_name
from tiny_models import FAMILIES, VOCAB_SIZE, quiet_transformers, tiny_model

RANK, ALPHA = 4, 8.0
STOP = StopLora(alpha=3.0, token_ids=(3, 40))


def _groups(*ends: int) -> list[Group]:
    """Two completions, one and three; longer and shorter than the window of 24, down to 1.

    `ends` stand at the end of the first.
    """
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, VOCAB_SIZE, (count,), generator=generator).tolist())

    return [
        Group(prompt_ids=ids(30), completions=((*ids(12), *ends), ids(17))),
        Group(prompt_ids=ids(1), completions=(ids(1), ids(5), ids(2))),
        Group(prompt_ids=ids(9), completions=(ids(33),)),
    ]


def _pair(
    model: Any, targets: str = "all-linear", stop: StopLora | None = None
) -> tuple[TrainingTree, Any]:
    """The tree, and plain peft's model, under the same weights of size.

    With `stop` the head has, in plain peft's, an adapter of rank one whose B picks the tokens.
    """
    names: Any = targets if targets == "all-linear" else targets.split(",")
    patterns: dict[str, Any] = {}
    if stop is not None:
        names = [*names, "lm_head"]
        patterns = {"rank_pattern": {"lm_head": 1}, "alpha_pattern": {"lm_head": stop.alpha}}
    tree = TrainingTree(
        model,
        rank=RANK,
        alpha=ALPHA,
        target_modules=targets,
        seed=0,
        safepoints=Safepoints(),
        stop=stop,
    )
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=names, task_type="CAUSAL_LM", **patterns
    )
    with quiet_transformers():
        plain = peft.get_peft_model(copy.deepcopy(model), config).eval()
    theirs = dict(plain.named_parameters())
    if stop is not None:
        picks = theirs[lora_name("lm_head", "B")]
        with torch.no_grad():
            picks.zero_()[list(stop.token_ids)] = 1.0
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in tree.named_lora().items():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
            theirs[name].copy_(parameter)
    return tree, plain


def _plain_logps(plain: Any, groups: list[Group]) -> torch.Tensor:
    values = []
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor([group.prompt_ids + completion])
            logps = plain(input_ids=ids).logits[0].float().log_softmax(-1)
            at = torch.tensor(completion).unsqueeze(1)
            values.append(logps[len(group.prompt_ids) - 1 : -1].gather(1, at).sum())
    return torch.stack(values)


def _coefficients(count: int) -> torch.Tensor:
    return torch.linspace(-1.0, 1.5, count)


def _gradients(tree: TrainingTree, plain: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    theirs = dict(plain.named_parameters())
    pairs = [(p.grad, theirs[name].grad) for name, p in tree.named_lora().items()]
    assert pairs
    return [(a, b) for a, b in pairs if a is not None and b is not None]


@pytest.mark.parametrize(
    ("targets", "stop"),
    [("all-linear", None), ("q_proj,down_proj", None), ("q_proj,down_proj", STOP)],
    ids=["all-linear", "two", "two and stops"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_logps_and_gradients_equal_plain_peft(
    family: str, targets: str, stop: StopLora | None
) -> None:
    tree, plain = _pair(tiny_model(family), targets, stop)
    groups = _groups(*stop.token_ids if stop is not None else ())
    ours, theirs = tree.logps(pack(groups)).logps, _plain_logps(plain, groups)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0.0)
    weights = _coefficients(len(ours))
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    gradients = _gradients(tree, plain)
    assert len(gradients) == len(tree.named_lora())
    for mine, reference in gradients:
        assert (mine - reference).norm() < 1e-5 * reference.norm()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_blocks_and_chunks_do_not_change_the_result(
    monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(attention, "BLOCK_BYTES", 1)
    monkeypatch.setattr(head, "CHUNK_BYTES", 1)
    test_logps_and_gradients_equal_plain_peft(family, "all-linear", None)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_group_does_not_feel_what_is_packed_beside_it(family: str) -> None:
    tree, _ = _pair(tiny_model(family))
    groups = _groups()
    with torch.no_grad():
        together = tree.logps(pack(groups)).logps
        alone = torch.cat([tree.logps(pack([group])).logps for group in groups])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_no_further_from_the_truth_than_plain_peft_in_bfloat16(family: str) -> None:
    """The truth is the same bfloat16 weights in float32. A quarter more is chance."""
    model = tiny_model(family, torch.bfloat16)
    groups = _groups()
    tree, plain = _pair(model)
    _, truth = _pair(copy.deepcopy(model).float())
    ours, theirs = tree.logps(pack(groups)).logps, _plain_logps(plain, groups)
    exact = _plain_logps(truth, groups)
    assert (ours - exact).norm() < 1.25 * (theirs - exact).norm() + 0.01 * exact.norm()
    weights = _coefficients(len(ours))
    for values in (ours, theirs, exact):
        (values * weights).sum().backward()
    our_error = sum(float((a - b).square().sum()) for a, b in _gradients(tree, truth))
    true_gradients = dict(truth.named_parameters())
    their_error = sum(
        float((p.grad - true_gradients[name].grad).square().sum())
        for name, p in plain.named_parameters()
        if p.grad is not None
    )
    assert 0 < our_error < 1.25**2 * their_error
