"""The flags that several commands share, the config file that can hold them, and what they become.

A value comes from the command line, else from the file of ``--config``, else from the flag's
default. Names and meanings are vLLM's where it has the flag. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import tomllib
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.config import (
    DTYPES,
    AdapterConfig,
    CacheConfig,
    LaneConfig,
    ModelConfig,
    RuntimeConfig,
    ScheduleConfig,
)
from ..runtime.errors import ConfigError
from .learning_options import FLAG_OF_LEARNING_SETTING, add_learning_arguments, learning_config
from .schedule_options import FLAG_OF_SCHEDULE_SETTING, add_schedule_arguments, schedule_config

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Mapping, Sequence

LOG_LEVELS = ("debug", "info", "warning", "error")
API_KEY_VARIABLE = "COTUNE_API_KEY"

FLAG_OF_SETTING = {
    "model.source": "MODEL",
    "model.device": "--device",
    "model.dtype": "--dtype",
    "model.max_model_len": "--max-model-len",
    "model.trust_remote_code": "--trust-remote-code",
    "model.revision": "--revision",
    "model.served_name": "--served-model-name",
    "cache.page_size": "--block-size",
    "cache.num_pages": "--num-gpu-blocks-override",
    "cache.kv_bytes": "--kv-cache-memory-bytes",
    "cache.memory_fraction": "--kv-memory-fraction",
    "cache.enable_prefix_sharing": "--enable-prefix-caching",
    "schedule.max_num_seqs": "--max-num-seqs",
    "schedule.max_num_batched_tokens": "--max-num-batched-tokens",
    "schedule.max_queue": "--max-queue",
    "adapters.modules": "--lora-modules",
    "adapters.max_loras": "--max-loras",
    "adapters.max_lora_rank": "--max-lora-rank",
    "lanes.inference_threads": "--threads",
    "lanes.cuda_graphs": "--enforce-eager",
    "lanes.sm_share": "--training-sm-share",
    "seed": "--seed",
    "host": "--host",
    "port": "--port",
    "api_key": "--api-key",
    "allowed_origins": "--allowed-origins",
    "max_body_bytes": "--max-body-bytes",
    "max_messages": "--max-messages",
    "max_n": "--max-n",
    "shutdown_timeout_s": "--shutdown-timeout",
    **FLAG_OF_SCHEDULE_SETTING,
    **FLAG_OF_LEARNING_SETTING,
}
"""Which flag sets a setting, so that an error about the setting can name the flag."""


# -- kinds of values -----------------------------------------------------------------------------

_SUFFIXES = {
    "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
    "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40,
}  # fmt: skip


def parse_count(text: str) -> int:
    """A whole number with an optional suffix: k, m, g, t are decimal, K, M, G, T binary.

    >>> parse_count("4k"), parse_count("4K"), parse_count("1.5g")
    (4000, 4096, 1500000000)
    """
    text = text.strip()
    factor = _SUFFIXES.get(text[-1:], 1)
    try:
        value = Decimal(text if factor == 1 else text[:-1]) * factor
    except InvalidOperation:
        value = Decimal("nan")
    if not value.is_finite() or value != value.to_integral_value():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number such as 4096, 4K (4096) or 4k (4000)"
        )
    return int(value)


def parse_positive(text: str) -> int:
    """A whole number from 1, for what there must be one of at least."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def parse_lora_module(text: str) -> tuple[str, Path]:
    """``name=path``, or vLLM's JSON form ``{"name": ..., "path": ...}``."""
    if text.lstrip().startswith("{"):
        try:
            fields = json.loads(text)
            return str(fields["name"]), Path(str(fields["path"]))
        except (ValueError, KeyError) as error:
            raise argparse.ArgumentTypeError(
                f'{text!r} is not name=path or {{"name": ..., "path": ...}}'
            ) from error
    name, separator, path = text.partition("=")
    if not (separator and name and path):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not name=path (put MODEL before --lora-modules)"
        )
    return name, Path(path).expanduser()


class _Collect(argparse.Action):
    """Several values, the flag repeated or not; any of them replaces what the file had."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        assert isinstance(values, list)
        before = getattr(namespace, self.dest)
        is_first = before is self.default
        setattr(namespace, self.dest, values if is_first else [*before, *values])


# -- flags ---------------------------------------------------------------------------------------


def add_runtime_arguments(parser: argparse.ArgumentParser, *, learning: bool = False) -> None:
    """Add everything that `runtime_config` reads: MODEL and the flags of a runtime.

    `learning` says whether learning is on unless a flag says otherwise.
    """
    schedule, adapters = ScheduleConfig(), AdapterConfig()
    model = parser.add_argument_group("model")
    model.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a model directory or hub id (default: the demo model that comes with cotune)",
    )
    model.add_argument(
        "--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N (%(default)s)"
    )
    model.add_argument(
        "--dtype",
        default="auto",
        choices=DTYPES,
        help="what to compute in; auto is the dtype of the stored weights (%(default)s)",
    )
    model.add_argument(
        "--max-model-len",
        type=parse_count,
        metavar="TOKENS",
        help="most tokens of prompt plus answer; 4K is 4096 (what the model was made for)",
    )
    model.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="the name that requests use (the directory's name or the hub id)",
    )
    model.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id (main)")
    model.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model; without this such a model is refused",
    )
    model.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="requests without a seed of their own draw theirs from this one (random)",
    )

    memory = parser.add_argument_group("batching and memory")
    memory.add_argument(
        "--max-num-seqs",
        type=int,
        default=schedule.max_num_seqs,
        metavar="N",
        help="most sequences that run at once (%(default)s)",
    )
    memory.add_argument(
        "--max-num-batched-tokens",
        type=parse_count,
        metavar="TOKENS",
        help="most tokens per iteration; longer prompts are prefilled in pieces "
        "(512 on a CPU, 2048 on a GPU)",
    )
    memory.add_argument(
        "--max-queue",
        type=int,
        default=schedule.max_queue,
        metavar="N",
        help="most requests that wait; further ones are answered with 429 (%(default)s)",
    )
    memory.add_argument(
        "--kv-cache-memory-bytes",
        type=parse_count,
        metavar="BYTES",
        help="memory for KV pages; 2G is 2 GiB (a share of what is free)",
    )
    memory.add_argument(
        "--kv-memory-fraction",
        type=float,
        metavar="SHARE",
        help="share of the memory left after loading that KV pages may take, 0 to 1",
    )
    memory.add_argument(
        "--num-gpu-blocks-override",
        type=int,
        metavar="N",
        help="number of KV pages, on any device, whatever the memory",
    )
    memory.add_argument(
        "--block-size", type=int, metavar="TOKENS", help="tokens per KV page (the backend's best)"
    )
    memory.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="share KV pages between prompts that begin alike (on)",
    )
    memory.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="intra-op threads of the inference lane on a CPU (torch's own choice; with learning "
        "less --training-threads)",
    )
    memory.add_argument(
        "--enforce-eager",
        action="store_true",
        help="on a GPU, do not record decodes as CUDA graphs",
    )
    memory.add_argument(
        "--training-sm-share",
        type=float,
        metavar="F",
        help="on a GPU, share of its multiprocessors that training may use (all, at low priority)",
    )
    add_schedule_arguments(parser)

    lora = parser.add_argument_group("LoRA adapters")
    lora.add_argument(
        "--lora-modules",
        nargs="+",
        type=parse_lora_module,
        action=_Collect,
        default=[],
        metavar="NAME=PATH",
        help="adapters in PEFT format to load at start; requests name one as their model",
    )
    lora.add_argument(
        "--max-loras",
        type=int,
        default=adapters.max_loras,
        metavar="N",
        help="most adapter versions that one iteration serves (%(default)s)",
    )
    lora.add_argument(
        "--max-lora-rank",
        type=int,
        default=adapters.max_lora_rank,
        metavar="R",
        help="highest rank that is taken (%(default)s)",
    )
    add_learning_arguments(parser, default=learning)


def add_general_arguments(
    parser: argparse.ArgumentParser, *, default_log_level: str = "info"
) -> None:
    """Add ``--config`` and ``--log-level``."""
    general = parser.add_argument_group("general")
    general.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="YAML or TOML file with any of these flags by name; the command line wins",
    )
    general.add_argument(
        "--log-level",
        default=default_log_level,
        choices=LOG_LEVELS,
        help="how much to say on stderr (%(default)s)",
    )


def runtime_config(args: argparse.Namespace) -> RuntimeConfig:
    """The runtime's settings from the flags of `add_runtime_arguments`, validated.

    Raises:
        ConfigError: a value is wrong; the message names the flag as well as the setting.
    """
    config = RuntimeConfig(
        model=ModelConfig(
            source=args.model,
            device=args.device,
            dtype=args.dtype,
            max_model_len=args.max_model_len,
            trust_remote_code=args.trust_remote_code,
            revision=args.revision,
            served_name=args.served_model_name,
        ),
        cache=CacheConfig(
            page_size=args.block_size,
            num_pages=args.num_gpu_blocks_override,
            kv_bytes=args.kv_cache_memory_bytes,
            memory_fraction=args.kv_memory_fraction,
            enable_prefix_sharing=args.enable_prefix_caching,
        ),
        schedule=schedule_config(
            args,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            max_queue=args.max_queue,
        ),
        adapters=AdapterConfig(
            modules=tuple(args.lora_modules),
            max_loras=args.max_loras,
            max_lora_rank=args.max_lora_rank,
        ),
        lanes=LaneConfig(
            inference_threads=args.threads,
            cuda_graphs=not args.enforce_eager,
            sm_share=args.training_sm_share,
        ),
        learning=learning_config(args),
        seed=args.seed,
    )
    config.validate()
    return config


def add_api_key_argument(group: argparse._ArgumentGroup) -> None:
    """Declare ``--api-key`` of a command that asks a server."""
    group.add_argument(
        "--api-key", metavar="KEY", help="the server's key (default: $COTUNE_API_KEY)"
    )


def api_key(args: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> str | None:
    """The key from ``--api-key`` or a config file, else from ``COTUNE_API_KEY``."""
    given: str | None = args.api_key
    return environment.get(API_KEY_VARIABLE) if given is None else given


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's event loops; None, for asyncio's own, on platforms that uvloop is not made for."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


# -- config files --------------------------------------------------------------------------------


def apply_config_file(parser: argparse.ArgumentParser, path: Path) -> None:
    """Make the values in a YAML or TOML file the defaults of `parser`.

    Keys are the parser's flags without the leading dashes, in either spelling (max-num-seqs or
    max_num_seqs), and the positional arguments by name.

    Raises:
        ConfigError: the file cannot be read, a key is unknown or a value is wrong; the message
            names the file and the key.
    """
    actions = _settable(parser)
    values: dict[str, Any] = {}
    for key, value in _load(path).items():
        name = str(key).replace("_", "-")
        is_negated = name.startswith("no-") and name not in actions and name[3:] in actions
        action = actions.get(name[3:] if is_negated else name)
        if action is None or (is_negated and not _is_switch(action)):
            raise ConfigError(_unknown(path, str(key), actions), param=str(key))
        if action.dest in values:
            raise ConfigError(f"{path}: {key} is given twice; leave one out", param=str(key))
        if value is None:  # "key:" with nothing behind it
            continue
        try:
            converted = _convert(action, value)
        except (ValueError, argparse.ArgumentTypeError) as error:
            shown = "" if action.dest == "api_key" else f" is {value!r}"
            raise ConfigError(f"{path}: {key}{shown}; {error}", param=str(key)) from error
        values[action.dest] = not converted if is_negated else converted
    parser.set_defaults(**values)


def _load(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"config file {path} cannot be read: {reason}", param="config") from error
    loaded: Any
    match path.suffix.lower():
        case ".toml":
            try:
                loaded = tomllib.loads(text)
            except tomllib.TOMLDecodeError as error:
                raise ConfigError(f"{path} is not valid TOML: {error}", param="config") from error
        case ".yaml" | ".yml":
            import yaml

            try:
                loaded = yaml.safe_load(text)
            except yaml.YAMLError as error:
                reason = " ".join(str(error).split())
                raise ConfigError(f"{path} is not valid YAML: {reason}", param="config") from error
        case _:
            raise ConfigError(
                f"config file {path} has no known ending; name it .yaml, .yml or .toml",
                param="config",
            )
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"{path} holds no settings; write one 'flag: value' per line", param="config"
        )
    return loaded


def _settable(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """What a config file may set, by its name with dashes."""
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:
        if action.dest in ("help", "config"):
            continue
        flags = [flag.lstrip("-") for flag in action.option_strings if flag.startswith("--")]
        actions[flags[0] if flags else action.dest.replace("_", "-")] = action
    return actions


def _unknown(path: Path, key: str, actions: Mapping[str, argparse.Action]) -> str:
    close = difflib.get_close_matches(key.replace("_", "-"), actions, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(actions))}"
    return f"{path}: there is no setting {key!r}; {hint}"


def _is_switch(action: argparse.Action) -> bool:
    return action.nargs == 0


def _convert(action: argparse.Action, value: object) -> Any:
    """The file's value as the command line would have given it; `ValueError` says what is wrong."""
    if _is_switch(action):
        if not isinstance(value, bool):
            raise ValueError("use true or false")
        return value
    if action.nargs in ("+", "*"):
        if isinstance(value, dict) and action.type is parse_lora_module:
            value = [f"{name}={path}" for name, path in value.items()]
        items = value if isinstance(value, list) else [value]
        return [_convert_one(action, item) for item in items]
    return _convert_one(action, value)


def _convert_one(action: argparse.Action, value: object) -> Any:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"it takes a single value, not {type(value).__name__}")
    converted: Any = value
    if (action.type is None or action.type is Path) and not isinstance(value, str):
        raise ValueError("it takes text; put it in quotes")
    if action.type is not None:
        assert callable(action.type)
        try:
            converted = action.type(str(value))
        except ValueError as error:
            kind = {"int": "a whole number", "float": "a number"}.get(
                getattr(action.type, "__name__", "")
            )
            raise ValueError(f"use {kind}" if kind else str(error)) from error
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f"use one of {', '.join(map(str, action.choices))}")
    return converted
