"""Reading a model and its tokenizer from a Hugging Face directory or hub id.

    loaded = load_model("path/or/hub-id", device=torch.device("cpu"))
    loaded.model, loaded.tokenizer, loaded.max_model_len, loaded.eos_token_ids

Weights come from safetensors alone and code never from the checkpoint unless `trust_remote_code`
says so. Every reason not to serve a model is found here, before the server starts: files that are
missing or damaged, weights that do not match the architecture, a tokenizer that does not match the
embedding, and whatever `servable` finds in the architecture itself.
"""

from __future__ import annotations

import json
import logging
import math
import re
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from ..streams.device import DTYPES, DeviceError, resolve_dtype
from ..streams.memory import MemoryProbe
from .errors import ModelLoadError, RequestError
from .servable import check_config, check_model
from .types import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from .servable import AttentionLayer

logger = logging.getLogger(__name__)

DEMO_MODEL_PATH = Path(__file__).parent / "demo_model"
DEMO_MODEL_NAME = "cotune-demo"

_STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LoadedModel:
    """A model that can be served, and what its files say about serving it.

    Attributes:
        model: the transformers causal LM, on its device, in eval mode, without gradients.
        tokenizer: its transformers tokenizer.
        name: the id to serve it under unless another is given: the hub id, the directory's name,
            or ``cotune-demo``.
        path: the directory that it was read from.
        dtype: of its weights.
        vocab_size: V, the width of the logits. The tokenizer may know fewer tokens, never more.
        max_model_len: most tokens of prompt plus answer.
        eos_token_ids: tokens that end an answer; empty if the files name none.
        generation_defaults: `SamplingParams` field to value, from ``generation_config.json``.
        attention_layers: shape of each layer's attention, as observed in a test forward.
    """

    model: Any
    tokenizer: Any
    name: str
    path: Path
    dtype: torch.dtype
    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]
    generation_defaults: Mapping[str, Any]
    attention_layers: tuple[AttentionLayer, ...]


def load_model(
    source: str | Path | None,
    *,
    device: torch.device,
    dtype: str = "auto",
    max_model_len: int | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> LoadedModel:
    """Read a model for serving. Blocks for as long as the disk and the device need.

    Args:
        source: a directory, a hub id, or None for the demo model.
        device: where the weights go; they are read straight to it.
        dtype: "auto", "float32", "bfloat16" or "float16". "auto" is the checkpoint's own, with two
            exceptions: float64 becomes float32, and float16 becomes float32 on a CPU, where
            float16 is slow and overflows. Asking for float16 there is obeyed.
        max_model_len: most tokens of prompt plus answer; None for what the configuration allows,
            which it may not exceed.
        trust_remote_code: run Python code that the checkpoint brings along.
        revision: branch, tag or commit; for hub ids.

    Raises:
        ModelLoadError: naming the file or field, the value and the remedy.
    """
    name, path = _locate(source, revision, trust_remote_code)
    raw_config = _read_json(path / "config.json", "it is not a model directory")
    _check_directory(name, path, raw_config, trust_remote_code)
    limit = _context_limit(raw_config, max_model_len)
    defaults = _generation_defaults(path)
    stored = _check_weight_files(path)
    chosen = _choose_dtype(dtype, raw_config, stored, device)
    _check_memory(name, stored, chosen, device)
    with _quiet_transformers():
        config, model_class = _read_config(name, path, raw_config, trust_remote_code)
        check_config(name, config, model_class)
        tokenizer = _load_tokenizer(name, path, trust_remote_code)
        model = _load_weights(name, path, config, chosen, device, trust_remote_code)
        vocab_size = _check_vocabulary(name, model, tokenizer)
        if limit is None:
            limit = _limit_from_class(name, config, max_model_len)
        layers = check_model(name, model, vocab_size)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        path=path,
        dtype=chosen,
        vocab_size=vocab_size,
        max_model_len=limit,
        eos_token_ids=_eos_token_ids(model, tokenizer, vocab_size),
        generation_defaults=defaults,
        attention_layers=layers,
    )


# --- where the files are -------------------------------------------------------------------------


def _locate(
    source: str | Path | None, revision: str | None, trust_remote_code: bool
) -> tuple[str, Path]:
    """The model's name and local directory; a hub id is downloaded if it is not cached."""
    if source is None:
        if not (DEMO_MODEL_PATH / "config.json").is_file():
            raise _error(
                "the demo model is not in this installation; make it with `cotune train-demo` or "
                "name a model directory or hub id",
                "model",
            )
        return DEMO_MODEL_NAME, DEMO_MODEL_PATH
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise _error(
                f"revision is {revision!r}, but {path} is a directory; revisions are for hub ids",
                "revision",
            )
        return path.resolve().name, path
    text = str(source)
    if path.is_file():
        raise _error(f"{path} is a file; name the model's directory", "model")
    if isinstance(source, Path) or not _HUB_ID.fullmatch(text) or text.startswith("."):
        raise _error(f"there is no directory {path}; check the path", "model")
    return text, _download(text, revision, trust_remote_code)


def _download(hub_id: str, revision: str | None, trust_remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    if trust_remote_code:
        patterns.append("*.py")
    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=patterns,
                # Other formats of the same weights lie in folders or under this name.
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except GatedRepoError as error:
        remedy = "accept its licence on its hub page and log in"
        raise _error(f"{hub_id!r} is a gated hub repository; {remedy}", "model") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        remedy = "check the name, or log in if it is private"
        raise _error(
            f"there is no directory and no hub repository {hub_id!r}; {remedy}", "model"
        ) from error
    except RevisionNotFoundError as error:
        raise _error(
            f"hub repository {hub_id!r} has no revision {revision!r}", "revision"
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise _error(
            f"there is no directory {hub_id!r}, and it cannot be fetched from the hub ({error}); "
            "check the path or the network, or name a local directory",
            "model",
        ) from error


def _read_json(file: Path, otherwise: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise _error(f"there is no {file}; {otherwise}", "model") from error
    except (OSError, ValueError) as error:
        raise _error(f"{file} cannot be read: {error}; get the file again", "model") from error
    if not isinstance(value, dict):
        raise _error(f"{file} does not hold a JSON object; get the file again", "model")
    return value


def _check_directory(
    name: str, path: Path, raw_config: dict[str, Any], trust_remote_code: bool
) -> None:
    from transformers import CONFIG_MAPPING

    if (path / "adapter_config.json").exists():
        raise _error(
            f"{path} holds adapter_config.json: it is a LoRA adapter, not a model; name its base "
            "model, and the adapter with --lora-modules NAME=PATH",
            "model",
        )
    if not any((path / file).is_file() for file in _TOKENIZER_FILES):
        raise _error(
            f"{path} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}); save the model's "
            "tokenizer there",
            "model",
        )
    model_type = raw_config.get("model_type")
    if not isinstance(model_type, str):
        raise _error(
            f"{path / 'config.json'} has no model_type; get the file again or add the field",
            "model",
        )
    if model_type not in CONFIG_MAPPING and not trust_remote_code:
        remedy = (
            "--trust-remote-code runs the Python code that the checkpoint brings, if you trust it"
            if "auto_map" in raw_config
            else "upgrade transformers if the architecture is new"
        )
        raise _error(
            f"model {name!r}: transformers does not know model_type {model_type!r}; {remedy}",
            "model",
        )


# --- weights --------------------------------------------------------------------------------------


def _check_weight_files(path: Path) -> Counter[torch.dtype]:
    """Open every weight file; return how many numbers are stored in each floating-point dtype.

    Opening reads the header and compares the file's length with it, so that a truncated file is
    found here, by name, and not as noise in the answers.
    """
    index = path / _INDEX_FILE
    if (path / _SINGLE_FILE).is_file():
        shards: dict[str, list[str]] = {_SINGLE_FILE: []}
    elif index.is_file():
        weight_map = _read_json(index, "").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise _error(f"{index} has no weight_map; get the file again", "model")
        shards = {}
        for key, file in weight_map.items():
            shards.setdefault(str(file), []).append(key)
        if missing := sorted(file for file in shards if not (path / file).is_file()):
            raise _error(
                f"{path} lacks {len(missing)} of {len(shards)} weight files: "
                f"{', '.join(missing[:4])}; get them again",
                "model",
            )
    elif other := sorted(file.name for file in path.glob("*.bin")):
        raise _error(
            f"{path} has weights in {other[0]} only; loading such files can run code, so they are "
            "not read: convert them to safetensors with save_pretrained",
            "model",
        )
    else:
        raise _error(
            f"{path} has no weights (neither {_SINGLE_FILE} nor {_INDEX_FILE}); get them again",
            "model",
        )
    stored: Counter[torch.dtype] = Counter()
    for file, expected in sorted(shards.items()):
        try:
            with safe_open(path / file, framework="pt") as tensors:
                keys = set(tensors.keys())
                for key in keys:
                    header = tensors.get_slice(key)
                    kind = _STORED_DTYPES.get(header.get_dtype())
                    if kind is not None:
                        stored[kind] += math.prod(header.get_shape())
        except (SafetensorError, OSError) as error:
            raise _error(
                f"{path / file} is damaged: {error}; get the file again", "model"
            ) from error
        if lacking := sorted(set(expected) - keys):
            raise _error(
                f"{path / file} lacks {lacking[0]!r}, which {_INDEX_FILE} says it holds; get both "
                "files again",
                "model",
            )
    return stored


def _choose_dtype(
    asked: str, raw_config: dict[str, Any], stored: Counter[torch.dtype], device: torch.device
) -> torch.dtype:
    """The dtype to load in; see `load_model`."""
    declared = raw_config.get("dtype", raw_config.get("torch_dtype"))
    checkpoint = DTYPES.get(declared) if isinstance(declared, str) else None
    if checkpoint is None and stored:
        checkpoint = stored.most_common(1)[0][0]
    is_cpu = device.type == "cpu"
    if asked == "auto" and is_cpu and checkpoint == torch.float16:
        logger.info("the checkpoint is in float16; on a CPU it is loaded in float32")
        checkpoint = torch.float32
    try:
        chosen = resolve_dtype(asked, device=device, stored=checkpoint)
    except DeviceError as error:
        raise _error(str(error), "dtype") from error
    if is_cpu and chosen == torch.float16:
        logger.warning("float16 on a CPU is slow and may overflow; prefer bfloat16 or float32")
    return chosen


def _check_memory(
    name: str, stored: Counter[torch.dtype], dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse weights that cannot fit: on a CPU the system would kill the process instead."""
    needed = stored.total() * dtype.itemsize
    available = MemoryProbe(device).read().available_bytes
    if needed > available:
        raise _error(
            f"model {name!r} needs {needed / 2**30:.1f} GiB for its weights in "
            f"{str(dtype).removeprefix('torch.')}, and {device} has {available / 2**30:.1f} GiB "
            "free; choose a smaller model or dtype, or free memory",
            "model",
        )


def _read_config(
    name: str, path: Path, raw_config: dict[str, Any], trust_remote_code: bool
) -> tuple[Any, Any]:
    """The transformers config and the class that AutoModelForCausalLM makes of it, or None."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    try:
        config = AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=trust_remote_code
        )
        remote = (raw_config.get("auto_map") or {}).get("AutoModelForCausalLM")
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        elif remote is not None and trust_remote_code:
            model_class = get_class_from_dynamic_module(remote, str(path), local_files_only=True)
        else:
            model_class = None
    except Exception as error:  # transformers and remote code raise anything
        raise _error(
            f"model {name!r}: {path / 'config.json'} is not usable: "
            f"{type(error).__name__}: {error}; get the file again",
            "model",
        ) from error
    return config, model_class


def _load_weights(
    name: str,
    path: Path,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool,
) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            device_map=None if device.type == "cpu" else {"": device},
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            # Reported below, with both shapes, instead of raised without them.
            ignore_mismatched_sizes=True,
        )
    except torch.OutOfMemoryError as error:
        raise _error(
            f"model {name!r} does not fit on {device} in {dtype}: {error}; choose a smaller model "
            "or another device",
            "model",
        ) from error
    except Exception as error:  # transformers and remote code raise anything
        raise _error(
            f"model {name!r} cannot be read from {path}: {type(error).__name__}: {error}",
            "model",
        ) from error
    for key, in_file, in_model in sorted(report["mismatched_keys"]):
        raise _error(
            f"model {name!r}: weight {key!r} has shape {tuple(in_file)} in the file and "
            f"{tuple(in_model)} by config.json; config and weights are of different models",
            "model",
        )
    # A missing weight would be drawn at random; an unexpected one means another architecture.
    for kind, keys, meaning in (
        ("lacks", report["missing_keys"], "they would be random"),
        ("has unknown", report["unexpected_keys"], "they would be ignored"),
    ):
        if keys:
            raise _error(
                f"model {name!r}: the checkpoint {kind} {len(keys)} weights of "
                f"{type(model).__name__} ({_some(sorted(keys))}); {meaning}, so it is not served: "
                "config and weights must be of one model",
                "model",
            )
    if report["error_msgs"]:
        raise _error(f"model {name!r}: {_some(report['error_msgs'])}", "model")
    return model.eval().requires_grad_(False)


def _some(items: Sequence[str]) -> str:
    rest = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return ", ".join(items[:3]) + rest


# --- tokenizer and vocabulary -------------------------------------------------------------------


def _load_tokenizer(name: str, path: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=trust_remote_code
        )
        probe = tokenizer("Hello", add_special_tokens=False)["input_ids"]
    except Exception as error:  # transformers and remote code raise anything
        raise _error(
            f"model {name!r}: the tokenizer in {path} cannot be read: "
            f"{type(error).__name__}: {error}; get its files again",
            "model",
        ) from error
    if not probe:
        raise _error(
            f"model {name!r}: the tokenizer in {path} turns text into no tokens; its vocabulary "
            "file is missing or empty: get its files again",
            "model",
        )
    return tokenizer


def _check_vocabulary(name: str, model: Any, tokenizer: Any) -> int:
    """The width of the logits, once it is known that every token of the tokenizer has a row."""
    rows = model.get_input_embeddings().weight.shape[0]
    head = model.get_output_embeddings()
    vocab_size: int = rows if head is None else head.weight.shape[0]
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= min(rows, vocab_size):
        raise _error(
            f"model {name!r}: the tokenizer has token {token!r} with id {largest}, but the "
            f"embedding has {rows} rows and the head {vocab_size}; use the tokenizer that the "
            "model was trained with, or resize the embedding",
            "model",
        )
    return vocab_size


# --- what the configuration says about serving --------------------------------------------------


def _context_limit(raw_config: dict[str, Any], asked: int | None) -> int | None:
    """`max_model_len` as asked for, or the most that the configuration allows.

    None if the configuration file does not say (the config class may have a default).

    Three kinds of rotary scaling need care. yarn states the length before scaling and a factor.
    longrope and dynamic change every token's rotation once *some* sequence of the batch is longer
    than the original length: one request would change another's answer, so they are served up to
    that length.
    """
    if asked is not None and (isinstance(asked, bool) or not isinstance(asked, int) or asked < 1):
        raise _error(f"max_model_len is {asked!r}; it must be an integer from 1", "max_model_len")
    declared = None
    for field in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len"):
        if isinstance(raw_config.get(field), int):
            declared = field
            break
    if declared is None:
        return None
    limit: int = raw_config[declared]
    why = f"config.json: {declared}"
    for rope in _rope_entries(raw_config):
        kind = rope.get("rope_type", rope.get("type"))
        original = rope.get(
            "original_max_position_embeddings", raw_config.get("original_max_position_embeddings")
        )
        if kind == "yarn" and original is not None:
            scaled = int(original * rope.get("factor", 1.0))
            if scaled > limit:
                limit, why = scaled, "config.json: yarn factor x original_max_position_embeddings"
        elif kind in ("longrope", "su") and original is not None and original < limit:
            limit = original
            why = (
                f"config.json: original_max_position_embeddings; with {kind} a longer sequence "
                "would change the answers of the others in its batch"
            )
    return _within(limit, why, asked)


def _rope_entries(raw_config: dict[str, Any]) -> list[dict[str, Any]]:
    """The rotary settings of the configuration: one dict, or one per type of layer."""
    for field in ("rope_parameters", "rope_scaling"):
        value = raw_config.get(field)
        if isinstance(value, dict):
            nested = [entry for entry in value.values() if isinstance(entry, dict)]
            return [value, *nested]
    return []


def _limit_from_class(name: str, config: Any, asked: int | None) -> int:
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int):
        return _within(limit, f"max_position_embeddings of {type(config).__name__}", asked)
    if asked is None:
        raise _error(
            f"model {name!r}: config.json does not say how long a sequence may be; set "
            "--max-model-len",
            "max_model_len",
        )
    return asked


def _within(limit: int, why: str, asked: int | None) -> int:
    if asked is not None and asked > limit:
        raise _error(
            f"max_model_len is {asked}, but the model allows {limit} ({why}); ask for at most "
            f"{limit}",
            "max_model_len",
        )
    return limit if asked is None else asked


def _generation_defaults(path: Path) -> dict[str, Any]:
    """The sampling defaults that ``generation_config.json`` states; none if there is no file."""
    file = path / "generation_config.json"
    if not file.exists():
        return {}
    raw = _read_json(file, "")
    defaults = {k: raw[k] for k in _SAMPLING_DEFAULTS if raw.get(k) is not None}
    try:
        SamplingParams(**defaults).validate()
    except RequestError as error:
        raise _error(f"{file}: {error.message}; correct the file", "model") from error
    return defaults


def _eos_token_ids(model: Any, tokenizer: Any, vocab_size: int) -> frozenset[int]:
    """Every token that some file of the checkpoint calls its end of sequence.

    Chat checkpoints often name one in each: the end of the document in config.json, the end of the
    turn in the tokenizer, both in generation_config.json.
    """
    named: set[int] = set()
    for value in (
        getattr(model.generation_config, "eos_token_id", None),
        getattr(model.config, "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        if value is not None:
            named.update([value] if isinstance(value, int) else value)
    known = frozenset(token for token in named if 0 <= token < vocab_size)
    if len(known) < len(named):
        logger.warning("ignoring end-of-sequence ids %s: not in the vocabulary", named - known)
    if not known:
        logger.warning("the model names no end-of-sequence token; answers end by length alone")
    return known


# --- plumbing -------------------------------------------------------------------------------------


def _error(message: str, param: str) -> ModelLoadError:
    return ModelLoadError(message, param=param)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' bars and chatter off the terminal; what it warns of goes to our log.

    What matters in its chatter (weights missing, code to run) is checked above and raised.
    """
    from transformers.utils import logging as hf_logging

    had_bars = hf_logging.is_progress_bar_enabled()
    verbosity = hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if had_bars:
            hf_logging.enable_progress_bar()
    for warning in caught:
        logger.debug("while loading: %s", warning.message)
