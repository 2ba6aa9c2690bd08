from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer

from cotune.runtime.training.optimizer import Optimizer
from tiny_models import tiny_model

RATE, WARMUP, DECAY, MAX_NORM, STEPS = 3e-2, 4, 0.5, 1.0, 12


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's way in
@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_a_and_b_move_as_with_pefts_lora_plus(ratio: float) -> None:
    """Clipping and warm-up are ours and torch's; the optimizer beside them is peft's."""
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    mine = get_peft_model(tiny_model("llama"), config)
    theirs = copy.deepcopy(mine)
    names = [name for name, p in mine.named_parameters() if p.requires_grad]
    parameters, expected = dict(mine.named_parameters()), dict(theirs.named_parameters())
    shares = {name: 1.0 / ratio for name in names if "lora_A" in name}
    assert 0 < len(shares) < len(names)
    optimizer = Optimizer(
        {name: parameters[name] for name in names},
        learning_rate=RATE,
        warmup_steps=WARMUP,
        weight_decay=DECAY,
        max_grad_norm=MAX_NORM,
        rate_shares=shares,
    )
    oracle = create_loraplus_optimizer(
        theirs,
        torch.optim.AdamW,
        lr=RATE / ratio,
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=DECAY,
    )
    full = [group["lr"] for group in oracle.param_groups]
    generator = torch.Generator().manual_seed(5)
    for step in range(STEPS):
        size = 0.01 if step % 2 else 1.0  # clipped and not
        gradients = [
            size * torch.randn(parameters[name].shape, generator=generator) for name in names
        ]
        optimizer.accumulate(gradients)
        optimizer.step(optimizer.gradient_norm())
        optimizer.clear()
        for name, gradient in zip(names, gradients, strict=True):
            expected[name].grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_([expected[name] for name in names], MAX_NORM)
        for group, rate in zip(oracle.param_groups, full, strict=True):
            group["lr"] = rate * min(1.0, (step + 1) / WARMUP)
        oracle.step()
    for name in names:
        torch.testing.assert_close(parameters[name], expected[name], rtol=1e-5, atol=1e-6)


def test_a_share_of_nothing_leaves_a_parameter_as_it_was_drawn() -> None:
    still, moving = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = Optimizer(
        {"still": still, "moving": moving},
        learning_rate=0.1,
        warmup_steps=0,
        weight_decay=1.0,
        max_grad_norm=1.0,
        rate_shares={"still": 0.0},
    )
    for _ in range(3):
        optimizer.accumulate([torch.ones(3), torch.ones(3)])
        optimizer.step(optimizer.gradient_norm())
    assert torch.equal(still, torch.ones(3))
    assert (moving < 1.0).all()
