"""Reading a LoRA adapter from a PEFT directory: adapter_config.json and adapter_model.safetensors.

    y = W x + scaling * B (A x)          A (R, in), B (out, R); Hu et al. 2021, Eq. 3

The scaling (alpha / R, or alpha / sqrt(R) for rank-stabilised LoRA, Kalajdzievski 2023, Eq. 4) is
folded into B here, so that ranks and scalings may differ from module to module and the executor
sees only A and B. The files are read without peft; the tests compare with peft's own reading.

An adapter is refused, with the reason, if it is more than this formula (DoRA, biases, whole
modules, embeddings, other base weights) or if it does not fit the model. A setting that is on and
unknown here is refused too: it may change what the weights mean.
"""

from __future__ import annotations

import json
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .errors import AdapterLoadError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")
_COPY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.base_layer\.weight")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# How A and B were initialised does not matter once they are trained. Any other initialisation than
# these (pissa, olora, corda, loftq, lora_ga) changes the base weights as well.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")

# Fields that describe the training or the file and change nothing of the formula.
_IGNORED_FIELDS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",  # used with an initialisation that is refused below; so is loftq and lora_ga
    "ensure_weight_tying",  # used with modules that are refused below
    "eva_config",
    "fan_in_fan_out",  # concerns Conv1D; only nn.Linear is accepted
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",  # used with use_qalora only
    "revision",
    "runtime_config",
    "task_type",
}
_USED_FIELDS = {
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "use_rslora",
}
# Fields that must be off, and what they are when on.
_REFUSED_FIELDS = {
    "alora_invocation_tokens": "activated LoRA, which applies to part of the tokens",
    "arrow_config": "a router over several adapters",
    "layer_replication": "a model with repeated layers",
    "lora_bias": "a bias on B",
    "modules_to_save": "whole modules beside the low-rank ones",
    "target_parameters": "adapters of bare parameters",
    "trainable_token_indices": "changed embeddings of single tokens",
    "use_bdlora": "block-diagonal LoRA",
    "use_dora": "DoRA, which also rescales the base weights",
    "use_qalora": "QALoRA, which pools the inputs",
    "kasa_config": "KaSA, which also changes the base weights",
    "monteclora_config": "Monte Carlo LoRA",
    "velora_config": "VeLoRA",
}


class LoraPair(NamedTuple):
    """The adapter of one linear: float32 CPU tensors A (R, in) and B (out, R), scaling in B."""

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LoraWeights:
    """An adapter's weights, checked against the model that they are for.

    Attributes:
        rank: the largest R of its modules; each pair has its own, see `LoraPair`.
        modules: path of the linear in the model ("model.layers.0.self_attn.q_proj") to its pair.
            A linear that is absent is not adapted.
    """

    rank: int
    modules: Mapping[str, LoraPair]

    @property
    def nbytes(self) -> int:
        """Bytes of all A and B."""
        return sum(pair.a.nbytes + pair.b.nbytes for pair in self.modules.values())


def read_lora(path: str | Path, model: nn.Module, *, max_rank: int) -> LoraWeights:
    """Read a PEFT LoRA directory and check that `model` can wear it.

    Args:
        path: the directory.
        model: the transformers causal LM; only the shapes of its linears are looked at.
        max_rank: largest R accepted.

    Raises:
        AdapterLoadError: naming the file or field, the value and the remedy.
    """
    path = Path(path).expanduser()
    config, pairs = _read_plain(path)
    _compare_base(path, config, model)
    file = path / WEIGHTS_FILE
    _check_targets(path, config, pairs, _linears(model))
    _check_copies(file, model)
    for module, pair in pairs.items():
        rank = len(pair.a)
        if rank > max_rank:
            raise _error(
                f"{path / CONFIG_FILE}: {module} has rank {rank}, more than max_lora_rank "
                f"{max_rank}; raise --max-lora-rank to {rank}",
            )
        linear = _linear(file, module, model)
        _check_shape(file, module, "A", pair.a, (rank, linear.in_features))
        _check_shape(file, module, "B", pair.b, (linear.out_features, rank))
    return LoraWeights(max(len(pair.a) for pair in pairs.values()), MappingProxyType(pairs))


def read_pairs(path: str | Path) -> dict[str, LoraPair]:
    """Read a PEFT LoRA directory without a look at the model that it is for.

    Raises:
        AdapterLoadError: naming the file or field, the value and the remedy.
    """
    return _read_plain(Path(path).expanduser())[1]


def _read_plain(path: Path) -> tuple[dict[str, Any], dict[str, LoraPair]]:
    """The configuration, and A and B by path of the linear; checked as far as they go alone."""
    if not path.is_dir():
        raise _error(f"there is no adapter directory {path}; check the path")
    config = _read_config(path / CONFIG_FILE)
    _check_config(path / CONFIG_FILE, config)
    matrices = _read_matrices(_weights_file(path))
    return config, {
        module: _pair(path, config, module, matrices[module]) for module in sorted(matrices)
    }


def _pair(
    path: Path, config: Mapping[str, Any], module: str, matrices: Mapping[str, torch.Tensor]
) -> LoraPair:
    """The adapter of one linear."""
    file = path / WEIGHTS_FILE
    if set(matrices) != {"A", "B"}:
        absent = "AB".replace(next(iter(matrices)), "")
        raise _error(f"{file}: {module} has no lora_{absent}; save the adapter again with peft")
    rank = _pattern_value(config.get("rank_pattern"), module, config["r"])
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise _error(
            f"{path / CONFIG_FILE}: rank_pattern gives {module} the rank {rank!r}; it must be "
            "an integer from 1"
        )
    alpha = _pattern_value(config.get("alpha_pattern"), module, config["lora_alpha"])
    if not _is_positive(alpha):
        raise _error(
            f"{path / CONFIG_FILE}: alpha_pattern gives {module} the alpha {alpha!r}; it must "
            "be a number above 0"
        )
    for matrix, tensor in matrices.items():
        if tensor.ndim != 2 or tensor.shape[matrix == "B"] != rank:
            raise _error(
                f"{file}: lora_{matrix} of {module} has shape {tuple(tensor.shape)}, but its rank "
                f"in {CONFIG_FILE} is {rank}; get both files again"
            )
        if not tensor.isfinite().all():
            raise _error(
                f"{file}: lora_{matrix} of {module} has values that are not finite; the "
                "training diverged: use an earlier checkpoint"
            )
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LoraPair(matrices["A"].float(), matrices["B"].float() * scaling)


# --- configuration --------------------------------------------------------------------------------


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise _error(
            f"there is no {file}; name the directory that peft's save_pretrained wrote"
        ) from error
    except (OSError, ValueError) as error:
        raise _error(f"{file} cannot be read: {error}; get the file again") from error
    if not isinstance(config, dict):
        raise _error(f"{file} does not hold a JSON object; get the file again")
    return config


def _check_config(file: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise _error(f"{file}: peft_type is {config.get('peft_type')!r}; only LORA is served")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise _error(f"{file}: r is {rank!r}; it must be an integer from 1")
    if not _is_positive(alpha):
        raise _error(f"{file}: lora_alpha is {alpha!r}; it must be a number above 0")
    targets = config.get("target_modules") or []
    if isinstance(targets, str):
        _check_pattern(file, "target_modules", targets)
    elif not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise _error(f"{file}: target_modules is {targets!r}; it must be names or one pattern")
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict):
            raise _error(f"{file}: {field} is {patterns!r}; it must map modules to numbers")
        for pattern in patterns:
            _check_pattern(file, field, pattern)
    if config.get("bias", "none") != "none":
        raise _error(
            f"{file}: bias is {config['bias']!r}: the adapter changes biases, which are shared "
            "with the base model; train it with bias='none'"
        )
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise _error(
            f"{file}: init_lora_weights is {init!r}, which changed the base weights before "
            "training; convert the adapter with save_pretrained(path_initial_model_for_"
            "weight_conversion=...)"
        )
    for field, meaning in _REFUSED_FIELDS.items():
        if config.get(field):
            raise _error(
                f"{file}: {field} is {config[field]!r}: {meaning}; only plain LoRA is served: "
                "train without it, or merge the adapter into its base model"
            )
    for field, value in config.items():
        is_known = field in _USED_FIELDS or field in _IGNORED_FIELDS or field in _REFUSED_FIELDS
        if value and not is_known:
            raise _error(
                f"{file}: {field} is {value!r}, which is not known here and may change what the "
                "weights mean; train without it, or remove the field if it does not"
            )


def _check_pattern(file: Path, field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise _error(
            f"{file}: {field} has {pattern!r}, which is no regular expression ({error}); correct it"
        ) from error


def _compare_base(path: Path, config: dict[str, Any], model: nn.Module) -> None:
    """Log a warning if the adapter names another base; a name alone proves nothing."""
    theirs = config.get("base_model_name_or_path")
    ours = getattr(getattr(model, "config", None), "_name_or_path", None)
    if theirs and ours and Path(theirs).name.lower() != Path(ours).name.lower():
        logger.warning("adapter %s was trained on %r; it is put on %r", path, theirs, ours)


def _pattern_value(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The first entry whose key, a regular expression, matches the path or its end, as in peft."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _is_positive(value: object) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value > 0
    )


# --- weights --------------------------------------------------------------------------------------


def _weights_file(path: Path) -> Path:
    file = path / WEIGHTS_FILE
    if file.is_file():
        return file
    if (path / "adapter_model.bin").exists():
        raise _error(
            f"{path} has its weights in adapter_model.bin; loading such files can run code, so "
            "they are not read: save the adapter again with safe_serialization=True"
        )
    raise _error(f"there is no {file}; get the file again")


def _read_matrices(file: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Module path to {"A": ..., "B": ...}; refuses a file that holds anything else."""
    matrices: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                match = _KEY.fullmatch(key)
                if match is None and _COPY.fullmatch(key):
                    continue  # peft saves one beside an adapter of the head; see `_check_copies`
                if match is None:
                    raise _error(f"{file}: {key!r} is {_describe(key)}; only plain LoRA is served")
                tensor = tensors.get_tensor(key)
                if tensor.dtype not in _DTYPES:
                    raise _error(f"{file}: {key!r} is stored as {tensor.dtype}; save it in float32")
                matrices.setdefault(match["module"], {})[match["matrix"]] = tensor
    except (SafetensorError, OSError) as error:
        raise _error(f"{file} is damaged: {error}; get the file again") from error
    if not matrices:
        raise _error(f"{file} holds no weights; save the adapter again with peft")
    return matrices


def _check_copies(file: Path, model: nn.Module) -> None:
    """Base weights that lie beside the adapter must be the model's: they are not served."""
    with safe_open(file, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 - not a mapping
            if match := _COPY.fullmatch(key):
                ours = _linear(file, match["module"], model).weight.detach().cpu()
                theirs = tensors.get_tensor(key)
                # One of the two may have been rounded to the dtype of the other.
                if not (
                    torch.equal(ours.to(theirs.dtype), theirs)
                    or torch.equal(ours, theirs.to(ours.dtype))
                ):
                    raise _error(
                        f"{file}: {key!r} is a copy of base weights that are not the model's; the "
                        "adapter was trained on other ones: serve it on those, or save it with "
                        "save_embedding_layers=False if they should not matter"
                    )


def _describe(key: str) -> str:
    for part, meaning in (
        ("lora_embedding_", "an adapter of an embedding"),
        ("lora_magnitude_vector", "a DoRA magnitude"),
        (".bias", "a bias"),
        ("embed_tokens", "a changed embedding"),
        ("lm_head", "a changed output head"),
    ):
        if part in key:
            return meaning
    return "no A or B of a linear"


def _linears(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _linear(file: Path, path: str, model: nn.Module) -> nn.Linear:
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise _error(
            f"{file}: the model has no module {path!r}; the adapter is for another architecture"
        ) from error
    if not isinstance(module, nn.Linear):
        raise _error(
            f"{file}: {path!r} is {type(module).__name__}, and only adapters of nn.Linear are "
            "served; train without that target"
        )
    return module


def _check_shape(
    file: Path, module: str, matrix: str, tensor: torch.Tensor, expected: tuple[int, int]
) -> None:
    if tuple(tensor.shape) != expected:
        raise _error(
            f"{file}: lora_{matrix} of {module} has shape {tuple(tensor.shape)}, but the model "
            f"calls for {expected}; the adapter is for another model"
        )


def _check_targets(
    path: Path, config: dict[str, Any], found: Mapping[str, object], linears: set[str]
) -> None:
    """The weights must be those of `target_modules`: fewer is a damaged adapter, more is ignored
    by peft, so that the adapter would act differently here."""
    targets = config.get("target_modules")
    if not targets or targets == "all-linear":
        return
    if extra := sorted(module for module in found if not _is_target(module, targets)):
        raise _error(
            f"{path / WEIGHTS_FILE} has weights for {extra[0]!r}, which target_modules in "
            f"{CONFIG_FILE} does not name; save the adapter again with peft"
        )
    if any(
        config.get(field) for field in ("exclude_modules", "layers_to_transform", "layers_pattern")
    ):
        return
    lacking = sorted(m for m in linears if _is_target(m, targets) and m not in found)
    if lacking:
        raise _error(
            f"{path / WEIGHTS_FILE} has no weights for {lacking[0]!r} ({len(lacking)} such), which "
            f"target_modules in {CONFIG_FILE} names; the adapter is incomplete: get it again"
        )


def _is_target(module: str, targets: str | Sequence[str]) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _error(message: str) -> AdapterLoadError:
    return AdapterLoadError(message, param="path", code="adapter_refused")
