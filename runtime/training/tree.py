"""The module tree that trains: peft's, over the parameters that serve.

    serving tree ──┐
                   ├── base parameters, frozen, in memory once
    training tree ─┘── LoRA A and B of every adapted linear, float32, peft's names and files

The tree is a copy of the model's modules, not of its parameters, so what is changed here (LoRA,
attention, norms) changes for training alone. peft makes the LoRA modules and writes the adapter
files; the arithmetic in them is replaced by leaner steps of autograd with the same results.
"""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ConfigError
from ..lora import LoraPair, LoraWeights
from .attention import ATTENTION, AttentionPlan, training_attention
from .head import completion_logps, find_head
from .lean import make_lean
from .lora_linear import LoraLinear, WeightsChoice, WeightsName

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from .batches import PackedGroups
    from .safepoints import Safepoints


def lora_name(path: str, matrix: Literal["A", "B"]) -> str:
    """peft's name of a matrix of the linear at this path of the model."""
    return f"base_model.model.{path}.lora_{matrix}.default.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class StopLora:
    """When to end an answer, as LoRA of rank one on the output head: z = alpha (a h).

    B is fixed: one for each stop token, zero for all others, so that z is added to what the head
    says of them and A (1, D) alone is trained, from zero. Where an answer ends is said by one of
    its tokens, and adapters that move all tokens at once are slow to learn to end it sooner.

    Attributes:
        alpha: z is scaled by it, so it is how fast z is learned.
        token_ids: the tokens that end an answer.
    """

    alpha: float
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CompletionLogps:
    """What a forward says of the N completions of a batch.

    Attributes:
        logps: (N,) float32, summed over each completion's tokens; with gradient where enabled.
        counts: (N,) int64, its tokens.
        kl: (N,) float32, KL(anchor || trained) over the whole vocabulary, summed over its tokens;
            None unless asked for.
    """

    logps: torch.Tensor
    counts: torch.Tensor
    kl: torch.Tensor | None


class TrainingTree:
    """The second tree over a model's parameters, with one LoRA adapter.

    Everything here runs on one thread, that of the training lane.

    Attributes:
        stop_path: where in the model the output head is, if its stop tokens are adapted; else None.

    Args:
        model: a transformers causal LM, frozen; it is not changed.
        rank: R of every adapted linear. alpha: its output is scaled by alpha / rank.
        target_modules: "all-linear" (all but the output head) or names separated by commas.
        seed: of the initial A; B starts at zero, so that the adapter starts as nothing.
        safepoints: waited at before every decoder layer, forward and backward.
        base_name: what the adapter's files call the base model; by default the model's own name.
        stop: also train when to end an answer; None: do not.

    Raises:
        ConfigError: `target_modules` names no linear layer, or one that cannot be adapted; or
            `stop` is given for a model without stop tokens or with an unusual output head.
    """

    def __init__(
        self,
        model: Any,
        *,
        rank: int,
        alpha: float,
        target_modules: str,
        seed: int,
        safepoints: Safepoints,
        base_name: str | None = None,
        stop: StopLora | None = None,
    ) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION, training_attention)
        self._safepoints = safepoints
        config = _lora_config(model, rank, alpha, target_modules, stop)
        self._peft = _adapted_copy(model, config, seed)
        self._config = self._peft.peft_config["default"]
        self._config.base_model_name_or_path = base_name or model.config._name_or_path or None
        causal = self._peft.base_model.model
        causal.set_attn_implementation(ATTENTION)
        self._base = getattr(causal, causal.base_model_prefix)
        self._choice = WeightsChoice()
        self._linears = _replace_linears(causal, self._choice)
        self.stop_path: str | None = None
        self._stop: LoraLinear | None = None
        stops = None
        if stop is not None:
            self.stop_path = _head_path(model, stop)
            self._stop = self._linears[self.stop_path]
            stops = _fix_stop(self._stop, stop)
        self._head = find_head(causal, stops)
        self.lean_modules = make_lean(self._base)
        self._has_anchor = False
        self._add_safepoints()

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        device: torch.device = self._peft.device
        return device

    @property
    def fixed_bytes(self) -> int:
        """What the adapter's weights take that are not trained."""
        return 0 if self._stop is None else self._stop.b.nbytes

    @property
    def stop_b(self) -> torch.Tensor:
        """(V, 1) float32 on the CPU, alpha in it: the fixed B of the stop tokens' adapter."""
        assert self._stop is not None, "stop tokens are not adapted"
        return self._stop.b.detach().to("cpu") * self._stop.scaling

    def close(self) -> None:
        """Let go of the adapter's weights; of no use afterwards.

        Modules and hooks refer to each other, so they stay until Python's collector comes round.
        What takes memory is in tensors, which are let go here.
        """
        self.clear_anchor()
        for linear in self._linears.values():
            for parameter in (linear.a, linear.b):
                parameter.grad = None
                parameter.data = parameter.data.new_empty(0)

    def named_lora(self) -> dict[str, nn.Parameter]:
        """peft's names of the trainable parameters, A and B of every adapted linear, in float32.

        Of the stop tokens' adapter A alone; see `StopLora`.
        """
        return {
            name: parameter
            for name, parameter in self._peft.named_parameters()
            if parameter.requires_grad
        }

    def logps(
        self, packed: PackedGroups, *, weights: WeightsName = "trained", kl_to_anchor: bool = False
    ) -> CompletionLogps:
        """One forward. Gradients reach the LoRA parameters of "trained" alone.

        Args:
            packed: the batch, on the tree's device.
            weights: the adapter as trained, as it was when the anchor was set (the base model if
                none is set), or no adapter.
            kl_to_anchor: also compute the divergence; costs a second forward, without gradient.
        """
        anchor = None
        if kl_to_anchor:
            with torch.no_grad():
                anchor = self._hidden(packed, "anchor")
        with torch.set_grad_enabled(torch.is_grad_enabled() and weights == "trained"):
            hidden = self._hidden(packed, weights)
            logps, kl = completion_logps(hidden, packed, self._head, anchor)
        return CompletionLogps(logps=logps, counts=packed.counts, kl=kl)

    def set_anchor(self, lora: Mapping[str, torch.Tensor] | None = None) -> None:
        """Keep weights as those that `kl` measures from: the present ones, or `lora`.

        Here and below `lora` is by the names of `named_lora`, anywhere, and is copied.
        """
        self._has_anchor = True
        for path, linear in self._linears.items():
            linear.set_anchor(*_pair(path, linear, lora))

    @property
    def anchor_bytes(self) -> int:
        """What the anchor's weights take."""
        return sum(linear.anchor_bytes for linear in self._linears.values())

    def clear_anchor(self) -> None:
        """Measure from the base model again."""
        self._has_anchor = False
        for linear in self._linears.values():
            linear.clear_anchor()

    def weights(self, lora: Mapping[str, torch.Tensor] | None = None) -> LoraWeights:
        """Float32 copies on the CPU, as a serving slot takes them: alpha / R is in B.

        Of the present weights, or of `lora`.
        """
        modules = {}
        for path, linear in sorted(self._linears.items()):
            a, b = _pair(path, linear, lora)
            modules[path] = LoraPair(
                a.detach().to("cpu", torch.float32, copy=True),
                b.detach().to("cpu", torch.float32, copy=True) * linear.scaling,
            )
        return LoraWeights(self._config.r, modules)

    def save_adapter(self, path: Path, lora: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write a PEFT directory: adapter_config.json and adapter_model.safetensors.

        Of the present weights, or of `lora`.
        """
        state = {}
        for of, linear in self._linears.items():
            state[lora_name(of, "A")], state[lora_name(of, "B")] = _pair(of, linear, lora)
        # Without save_embedding_layers=False peft looks for the base model's config on the network.
        self._peft.save_pretrained(str(path), state_dict=state, save_embedding_layers=False)

    def _hidden(self, packed: PackedGroups, weights: WeightsName) -> torch.Tensor:
        """(T, D), after the last norm, or as the head takes it where stop tokens are adapted."""
        if weights == "anchor" and not self._has_anchor:
            weights = "base"
        self._choice.name = weights
        try:
            output = self._base(
                input_ids=packed.token_ids.unsqueeze(0),
                position_ids=packed.positions.unsqueeze(0),
                use_cache=False,
                cotune_plan=AttentionPlan(packed.segments),
            )
            hidden: torch.Tensor = output.last_hidden_state[0]
            if self._stop is None:
                return hidden
            if (adapter := self._stop.chosen) is None:
                shift = hidden.new_zeros(len(hidden), 1)
            else:
                shift = F.linear(hidden, adapter[0].to(hidden.dtype)) * self._stop.scaling
            return torch.cat((hidden, shift), dim=1)
        finally:
            self._choice.name = "trained"

    def _add_safepoints(self) -> None:
        def enter(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (self._safepoint(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": self._safepoint(kwargs["hidden_states"])}

        def leave(_layer: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
            if isinstance(output, tuple):
                return (self._safepoint(output[0]), *output[1:])
            return self._safepoint(output)

        layers = _decoder_layers(self._base)
        for layer in layers:
            layer.register_forward_pre_hook(enter, with_kwargs=True)
        layers[-1].register_forward_hook(leave)

    def _safepoint(self, hidden: torch.Tensor) -> torch.Tensor:
        passed: torch.Tensor = _Safepoint.apply(hidden, self._safepoints)  # type: ignore[no-untyped-call]
        return passed


class _Safepoint(torch.autograd.Function):
    """Nothing but a wait, in both directions."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, safepoints: Safepoints) -> torch.Tensor:
        ctx.safepoints = safepoints
        safepoints.wait()
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        ctx.safepoints.wait()
        return gradients[0], None


def _decoder_layers(base: Any) -> nn.ModuleList:
    """The list that the forward goes through, whatever the family calls it."""
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == base.config.num_hidden_layers:
            return module
    raise ConfigError(
        f"{type(base).__name__} has no list of {base.config.num_hidden_layers} decoder layers, so "
        "training could not give way between them; turn learning off for this model",
        code="invalid_config",
    )


def _lora_config(
    model: Any, rank: int, alpha: float, target_modules: str, stop: StopLora | None
) -> Any:
    """peft's description of the adapter."""
    import peft

    names = [name.strip() for name in target_modules.split(",") if name.strip()]
    is_all = names == ["all-linear"]
    if not is_all:
        _check_targets(model, names, target_modules)
    targets: Any = "all-linear" if is_all else names
    patterns: dict[str, Any] = {}
    if stop is not None:
        # peft's "all-linear" cannot be combined with a name.
        head_path = _head_path(model, stop)
        targets = [*(_linear_names(model) if is_all else names), head_path]
        key = re.escape(head_path)
        patterns = {"rank_pattern": {key: 1}, "alpha_pattern": {key: stop.alpha}}
    return peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=targets,
        task_type="CAUSAL_LM",
        **patterns,
    )


def _adapted_copy(model: Any, config: Any, seed: int) -> Any:
    """peft's model around a second tree over the same parameters."""
    import peft

    tree = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's advice is not for the people who run this
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(tree, config)
    return adapted.eval()


def _linear_names(model: Any) -> list[str]:
    """The last part of the paths of all linears but the output head."""
    head = model.get_output_embeddings()
    return sorted(
        {
            path.rpartition(".")[2]
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }
    )


def _head_path(model: Any, stop: StopLora) -> str:
    """Where the output head is in the model."""
    head = model.get_output_embeddings()
    if not stop.token_ids or not isinstance(head, nn.Linear):
        what = "no tokens that end an answer" if isinstance(head, nn.Linear) else "no linear head"
        raise ConfigError(
            f"learning.training.stop_alpha is {stop.alpha}, and {type(model).__name__} has {what}; "
            "set it to 0",
            param="learning.training.stop_alpha",
            code="invalid_config",
        )
    return str(next(path for path, module in model.named_modules() if module is head))


@torch.no_grad()
def _fix_stop(linear: LoraLinear, stop: StopLora) -> torch.Tensor:
    """A from zero, and B as `StopLora` says; gives its token ids on the model's device."""
    ids = torch.tensor(sorted(stop.token_ids), device=linear.b.device)
    linear.a.zero_()
    linear.b.zero_()[ids] = 1.0
    linear.b.requires_grad_(False)
    return ids


def _check_targets(model: Any, names: list[str], given: str) -> None:
    head = model.get_output_embeddings()
    modules = list(model.named_modules())
    linears = _linear_names(model)
    for name in names or [""]:
        found = [m for path, m in modules if name and (path == name or path.endswith(f".{name}"))]
        if not found or any(m is head or not isinstance(m, nn.Linear) for m in found):
            raise ConfigError(
                f"learning.training.target_modules is {given!r}, and {name!r} is no linear layer "
                f'that can be adapted; use "all-linear" or some of {", ".join(linears)}',
                param="learning.training.target_modules",
                code="invalid_config",
            )


def _pair(
    path: str, linear: LoraLinear, lora: Mapping[str, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of a linear: those in training, or those of `lora`, which has no fixed ones."""
    if lora is None:
        return linear.a, linear.b
    b = lora[lora_name(path, "B")] if linear.b.requires_grad else linear.b
    return lora[lora_name(path, "A")], b


def _replace_linears(causal: Any, choice: WeightsChoice) -> dict[str, LoraLinear]:
    """Let peft's linears compute in one step; by their path in the model."""
    from peft.tuners.lora import Linear

    linears: dict[str, LoraLinear] = {}
    for path, module in causal.named_modules():
        if isinstance(module, Linear):
            linears[path] = LoraLinear(module, choice)
            module.forward = linears[path].__call__
    return linears
