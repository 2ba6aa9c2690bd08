"""Log-probabilities of completion tokens, without ever holding the logits of all rows.

The head runs over a few rows at a time. What is kept of a row for the backward is one vector, the
direction in which its hidden state moves the log-probability:

    logp(t) = l_t - logsumexp(l),   l = head(h)        d logp(t) / dh = (onehot(t) - softmax(l)) J

with J = dl/dh, the head's weight W (V, D) for a plain head. The backward is then one product per
row with a number and needs no second pass through the head. The divergence to the anchor,
KL(a || l) = sum_v a_v (log a_v - log softmax(l)_v), has the direction (softmax(l) - a) J.

Where the adapter also moves the stop tokens (`StopLora`), a hidden state has one column more: the
z that is added to what the head says of each of them, so that dz comes with dh.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from .batches import PackedGroups

CHUNK_BYTES = 8 << 20
"""Most bytes of float32 logits at a time."""

_ON_A_CARD = 16
"""Times as many there: each chunk reads the whole head, twice."""

# How far the closed form may be from the model's own logits, as a share of their norm.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


class RowResult(NamedTuple):
    """Of some rows: values (r,) float32, directions (r, D) in the dtype of the hidden states.

    Directions are None where no gradient was asked for; `kl` where no anchor was given.
    """

    logps: torch.Tensor
    kl: torch.Tensor | None
    dlogps: torch.Tensor | None
    dkl: torch.Tensor | None


class Head(Protocol):
    """From hidden states (r, D), after the last norm, to log-probabilities.

    With stop tokens they are (r, D + 1); see the module docstring.
    """

    @property
    def vocab_size(self) -> int:
        """V."""

    def rows(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        anchor: torch.Tensor | None,
        *,
        needs_gradient: bool,
    ) -> RowResult:
        """Results of rows and their targets (r,); `anchor` is the anchor's hidden states."""


@dataclass(frozen=True, slots=True, eq=False)
class PlainHead:
    """logits = cap((x W^T + bias) / divisor), cap(z) = softcap * tanh(z / softcap), in float32.

    Attributes:
        weight: (V, D). bias: (V,) or None.
        softcap: 0 for none.
        stops: (S,) int64, the stop tokens that the last column is added to; None for none.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    divisor: float
    softcap: float
    stops: torch.Tensor | None = None

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.weight.shape[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(r, V) float32."""
        states, shift = _split(hidden, self.stops)
        logits = F.linear(states, self.weight, self.bias).float()
        if shift is not None:
            logits[:, self.stops] += shift
        if self.divisor != 1.0:
            logits = logits.div_(self.divisor)
        if self.softcap:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def rows(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        anchor: torch.Tensor | None,
        *,
        needs_gradient: bool,
    ) -> RowResult:
        """See `Head.rows`."""
        logits = self.logits(hidden)
        slope = 1.0 - (logits / self.softcap).square_() if needs_gradient and self.softcap else None
        at = targets.unsqueeze(1)
        probabilities, total = _softmax(logits)
        logps = (logits.gather(1, at) - total).squeeze(1)
        kl = dlogps = dkl = None
        if anchor is not None:
            theirs = self.logits(anchor)
            weights, their_total = _softmax(theirs)
            gaps = theirs.sub_(logits).sub_(their_total - total)
            kl = gaps.mul_(weights).sum(dim=1)
            if needs_gradient:
                dkl = self._direction(weights.neg_().add_(probabilities), slope, hidden.dtype)
        if needs_gradient:
            gradient = probabilities.neg_()
            gradient.scatter_add_(1, at, torch.ones_like(at, dtype=gradient.dtype))
            dlogps = self._direction(gradient, slope, hidden.dtype)
        return RowResult(logps, kl, dlogps, dkl)

    def _direction(
        self, gradient: torch.Tensor, slope: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        if slope is not None:
            gradient *= slope
        direction = gradient.to(dtype) @ self.weight
        if self.stops is not None:
            of_shift = gradient[:, self.stops].sum(dim=1, keepdim=True)
            direction = torch.cat((direction, of_shift.to(dtype)), dim=1)
        return direction.div_(self.divisor) if self.divisor != 1.0 else direction


def _split(
    hidden: torch.Tensor, stops: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hidden states (r, D), and what is added to the stop tokens (r, 1), if anything is."""
    if stops is None:
        return hidden, None
    # Contiguous: rows that begin at odd addresses keep matrix products off a card's fast kernels.
    return hidden[:, :-1].contiguous(), hidden[:, -1:]


def _softmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities (r, V) and logsumexp (r, 1).

    The likeliest token has l = max and p = exp(max - logsumexp), so the sum needs no pass of
    exponentials of its own: logsumexp = max - log(max p), and max p is never below 1 / V.
    """
    probabilities = logits.softmax(dim=1)
    largest = probabilities.amax(dim=1, keepdim=True)
    return probabilities, logits.amax(dim=1, keepdim=True) - largest.log()


class ModelHead:
    """The model's own way from hidden states to logits, whatever it is; slower.

    Args:
        causal: the causal LM; its base model is left out of the calls.
        stops: see `PlainHead`. With them the output layer is from now on called through this.
    """

    def __init__(self, causal: Any, stops: torch.Tensor | None = None) -> None:
        self._stops = stops
        self._shift: torch.Tensor | None = None
        if stops is not None:
            module = causal.get_output_embeddings()
            self._layer = _plain_layer(module).forward
            module.forward = self._shifted
        self._shell = copy.copy(causal)
        self._shell.__dict__["_modules"] = dict(causal._modules)
        self._shell._modules[causal.base_model_prefix] = _Given()
        self.vocab_size = int(causal.get_output_embeddings().weight.shape[0])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(r, V) float32."""
        states, self._shift = _split(hidden, self._stops)
        try:
            output = self._shell(inputs_embeds=states.unsqueeze(0), use_cache=False)
        finally:
            self._shift = None  # a view of all the states, which must not stay
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def rows(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        anchor: torch.Tensor | None,
        *,
        needs_gradient: bool,
    ) -> RowResult:
        """See `Head.rows`. Rows do not meet here, so the gradient of a sum is that of each."""
        with torch.set_grad_enabled(needs_gradient):
            hidden = hidden.detach().requires_grad_(needs_gradient)
            mine = self.logits(hidden).log_softmax(dim=1)
            logps = mine.gather(1, targets.unsqueeze(1)).squeeze(1)
            kl = None
            if anchor is not None:
                with torch.no_grad():
                    theirs = self.logits(anchor).log_softmax(dim=1)
                kl = F.kl_div(mine, theirs, reduction="none", log_target=True).sum(dim=1)
            dlogps = dkl = None
            if needs_gradient:
                (dlogps,) = torch.autograd.grad(logps.sum(), hidden, retain_graph=kl is not None)
                if kl is not None:
                    (dkl,) = torch.autograd.grad(kl.sum(), hidden)
        return RowResult(logps.detach(), None if kl is None else kl.detach(), dlogps, dkl)

    def _shifted(self, states: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._layer(states)
        if self._shift is None or self._stops is None:
            return logits
        return logits.index_add(-1, self._stops, self._shift.expand(-1, len(self._stops))[None])


class _Given(nn.Module):
    """In place of the base model: the hidden states are what is passed as embeddings."""

    def forward(self, *, inputs_embeds: torch.Tensor, **_ignored: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)


@torch.no_grad()
def find_head(causal: Any, stops: torch.Tensor | None = None) -> Head:
    """The fast closed form where the model's own logits prove it, else the model's own way."""
    config, module = causal.config, _plain_layer(causal.get_output_embeddings())
    own = ModelHead(causal, stops)
    if not isinstance(module, nn.Linear):
        return own
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies, Granite divides
    plain = PlainHead(
        module.weight,
        module.bias,
        float(getattr(config, "logits_scaling", None) or 1.0) / scale,
        float(getattr(config, "final_logit_softcapping", None) or 0.0),
        stops,
    )
    weight = module.weight
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(24, weight.shape[1] + (stops is not None), generator=generator)
    # Large and small, so that a cap or an offset shows.
    probe *= torch.tensor([0.1, 1.0, 10.0]).repeat_interleave(8).unsqueeze(1)
    probe = probe.to(weight)
    theirs, ours = own.logits(probe), plain.logits(probe)
    gap = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
    is_proved = bool((gap < _TOLERANCE.get(weight.dtype, 0.0)).all())
    return plain if is_proved else own


def _plain_layer(module: Any) -> Any:
    """The output layer without the adapter that peft put around it."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def completion_logps(
    hidden: torch.Tensor,
    packed: PackedGroups,
    head: Head,
    anchor: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities of whole completions, and their divergence from the anchor.

    Args:
        hidden: (T, D), after the last norm, or as `head` takes it; gradients flow to it.
        packed: the batch.
        head: of the model.
        anchor: likewise, the anchor's hidden states, if the divergence is wanted.

    Returns:
        (N,) float32 summed over each completion's tokens, and the same of KL(anchor || trained).
    """
    logps, kl = _CompletionLogps.apply(hidden, packed, head, anchor)  # type: ignore[no-untyped-call]
    return logps, kl


class _CompletionLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        packed: PackedGroups,
        head: Head,
        anchor: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        needs_gradient = bool(ctx.needs_input_grad[0])
        most = CHUNK_BYTES * (_ON_A_CARD if hidden.is_cuda else 1)
        chunk = max(16, most // (4 * head.vocab_size))
        results = [
            head.rows(
                hidden[rows],
                targets,
                None if anchor is None else anchor[rows],
                needs_gradient=needs_gradient,
            )
            for rows, targets in zip(
                packed.rows.split(chunk), packed.targets.split(chunk), strict=True
            )
        ]

        def total(values: list[torch.Tensor]) -> torch.Tensor:
            sums = torch.zeros(packed.completions, dtype=torch.float32, device=hidden.device)
            return sums.index_add_(0, packed.completion_of, torch.cat(values))

        logps = total([r.logps for r in results])
        kl = None if anchor is None else total([r.kl for r in results if r.kl is not None])
        ctx.shape = hidden.shape
        if needs_gradient:
            directions = [torch.cat([r.dlogps for r in results if r.dlogps is not None])]
            if anchor is not None:
                directions.append(torch.cat([r.dkl for r in results if r.dkl is not None]))
            ctx.save_for_backward(packed.rows, packed.completion_of, *directions)
        return logps, kl

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        rows, completion_of, *directions = ctx.saved_tensors
        dhidden = directions[0].new_zeros(ctx.shape)
        for gradient, direction in zip(gradients, directions, strict=False):
            if gradient is not None:
                scale = gradient[completion_of].to(direction.dtype).unsqueeze(1)
                dhidden.index_add_(0, rows, direction * scale)
        return dhidden, None, None, None
