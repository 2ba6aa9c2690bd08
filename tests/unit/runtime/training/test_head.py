from __future__ import annotations

from typing import Any

import pytest
import torch

from cotune.runtime.training import head as head_module
from cotune.runtime.training.batches import Group, PackedGroups, pack
from cotune.runtime.training.head import ModelHead, PlainHead, completion_logps, find_head
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_config, tiny_model

WIDTH = 64


def _packed(*ends: int) -> PackedGroups:
    """`ends` stand at the end of the first completion."""
    ids = tuple(
        torch.randint(VOCAB_SIZE, (60,), generator=torch.Generator().manual_seed(5)).tolist()
    )
    return pack(
        [
            Group(prompt_ids=ids[:4], completions=((*ids[4:20], *ends), ids[20:27])),
            Group(prompt_ids=ids[27:28], completions=(ids[28:29],)),
        ]
    )


def _hidden(rows: int, seed: int, stops: tuple[int, ...] | None = None) -> torch.Tensor:
    width = WIDTH + (stops is not None)
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def _odd_model() -> Any:
    """A head that no closed form of ours covers."""
    import transformers

    class Odd(transformers.LlamaForCausalLM):  # type: ignore[misc]  # untyped
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = 5.0 * torch.sin(output.logits)
            return output

    torch.manual_seed(0)
    model = Odd(tiny_config("llama")).eval().requires_grad_(False)
    model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model


def _model(family: str) -> Any:
    if family == "odd":
        return _odd_model()
    model = tiny_model("llama" if family == "bias" else family)
    if family == "bias":
        generator = torch.Generator().manual_seed(1)
        model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCAB_SIZE, generator=generator))
        model.requires_grad_(False)
    return model


def _logits(causal: Any, stops: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor:
    """The model's own; what is added to the stop tokens is added by a hook on the output layer."""

    def shift(_layer: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        if stops is None:
            return output
        picked = torch.zeros(output.shape[-1]).index_fill(0, stops, 1.0)
        return output + hidden[:, -1:] * picked

    hook = causal.get_output_embeddings().register_forward_hook(shift)
    states = hidden if stops is None else hidden[:, :-1]
    logits = ModelHead(causal).logits(states)
    hook.remove()
    return logits


def _plain(
    causal: Any,
    stops: torch.Tensor | None,
    hidden: torch.Tensor,
    packed: PackedGroups,
    anchor: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All logits at once, by the model's own head, and autograd through them."""
    mine, theirs = (_logits(causal, stops, x[packed.rows]).log_softmax(1) for x in (hidden, anchor))
    token_logps = mine.gather(1, packed.targets.unsqueeze(1)).squeeze(1)
    token_kl = (theirs.exp() * (theirs - mine)).sum(1)
    zeros = torch.zeros(packed.completions)
    return (
        zeros.index_add(0, packed.completion_of, token_logps),
        zeros.index_add(0, packed.completion_of, token_kl),
    )


@pytest.mark.parametrize("chunk_bytes", [head_module.CHUNK_BYTES, 1])
@pytest.mark.parametrize("stops", [None, (3, 40)], ids=["", "stops"])
@pytest.mark.parametrize("family", [*FAMILIES, "bias", "odd"])
def test_values_and_gradients_equal_autograd_through_all_logits(
    monkeypatch: pytest.MonkeyPatch, family: str, stops: tuple[int, ...] | None, chunk_bytes: int
) -> None:
    """With stop tokens what is added to them comes in a column of its own, and so does its share
    of the gradient."""
    monkeypatch.setattr(head_module, "CHUNK_BYTES", chunk_bytes)  # 1: sixteen rows at a time
    causal, packed = _model(family), _packed(*stops or ())
    ids = None if stops is None else torch.tensor(stops)
    ours = _hidden(packed.tokens, 0, stops).requires_grad_()
    plain = ours.detach().clone().requires_grad_()
    anchor = (ours + 0.3 * _hidden(packed.tokens, 1, stops)).detach()
    logps, kl = completion_logps(ours, packed, find_head(causal, ids), anchor)
    expected_logps, expected_kl = _plain(_model(family), ids, plain, packed, anchor)
    assert kl is not None
    assert (kl > 0).all()
    torch.testing.assert_close(logps, expected_logps, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(kl, expected_kl, rtol=1e-4, atol=1e-5)
    weights = torch.tensor([0.3, -1.2, 2.0])
    ((logps * weights).sum() + (kl * weights.flip(0)).sum()).backward()
    ((expected_logps * weights).sum() + (expected_kl * weights.flip(0)).sum()).backward()
    assert ours.grad is not None
    assert plain.grad is not None
    assert (ours.grad - plain.grad).norm() < 1e-5 * plain.grad.norm()


@pytest.mark.parametrize("family", [*FAMILIES, "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stops", [None, (3, 40)], ids=["", "stops"])
def test_the_closed_form_is_used_for_every_family(
    family: str, dtype: torch.dtype, stops: tuple[int, ...] | None
) -> None:
    ids = None if stops is None else torch.tensor(stops)
    assert isinstance(find_head(_model(family).to(dtype), ids), PlainHead)


def test_a_head_that_is_not_the_closed_form_goes_the_models_own_way() -> None:
    assert isinstance(find_head(_odd_model()), ModelHead)


def test_a_very_unlikely_token_has_a_finite_log_probability() -> None:
    weight = torch.zeros(4, 2)
    weight[1] = 300.0
    packed = pack([Group(prompt_ids=(1,), completions=((0,),))])
    hidden = torch.ones(2, 2).requires_grad_()
    logps, _ = completion_logps(hidden, packed, PlainHead(weight, None, 1.0, 0.0))
    assert logps.item() == pytest.approx(-600.0)
    logps.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[0].tolist() == pytest.approx([-300.0, -300.0])


def test_without_gradient_no_directions_are_computed() -> None:
    packed = _packed()
    head = find_head(tiny_model("llama"))
    result = head.rows(
        _hidden(packed.tokens, 0)[packed.rows], packed.targets, None, needs_gradient=False
    )
    assert result.dlogps is None
    assert result.dkl is None
    logps, kl = completion_logps(_hidden(packed.tokens, 0), packed, head)
    assert not logps.requires_grad
    assert kl is None
