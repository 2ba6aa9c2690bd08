from __future__ import annotations

import argparse
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from cotune.policy.settings import PolicySettings
from cotune.runtime.config import RuntimeConfig
from cotune.runtime.errors import ConfigError
from cotune.tools import chat, serve
from cotune.tools.options import (
    FLAG_OF_SETTING,
    add_general_arguments,
    add_runtime_arguments,
    api_key,
    apply_config_file,
    parse_count,
    parse_lora_module,
    runtime_config,
)
from cotune.tools.schedule_options import schedule_config

if TYPE_CHECKING:
    from types import ModuleType


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="test")
    parser.add_argument("--api-key")
    parser.add_argument("--rate", type=float)
    add_runtime_arguments(parser)
    add_general_arguments(parser)
    return parser


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# -- kinds of values -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4096", 4096),
        ("4k", 4000),
        ("4K", 4096),
        ("1.5k", 1500),
        ("2G", 2 << 30),
        ("1t", 10**12),
        ("-1", -1),
        (" 7 ", 7),
    ],
)
def test_counts_may_have_a_decimal_or_a_binary_suffix(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "K", "four", "1.5", "1.0001k", "4KB", "nan", "inf", "1e-1"])
def test_what_is_no_whole_number_is_no_count(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number"):
        parse_count(text)


@pytest.mark.parametrize(
    "text", ["tutor=some/path", '{"name": "tutor", "path": "some/path", "base_model_name": "m"}']
)
def test_an_adapter_is_given_as_name_and_path_in_either_form(text: str) -> None:
    assert parse_lora_module(text) == ("tutor", Path("some/path"))


def test_a_path_may_hold_an_equals_sign_and_a_home_directory() -> None:
    assert parse_lora_module("a=b=c") == ("a", Path("b=c"))
    assert parse_lora_module("a=~/b") == ("a", Path.home() / "b")


@pytest.mark.parametrize(
    "text", ["tutor", "=path", "name=", "", '{"name": "x"}', "{broken", "{}", "[1]"]
)
def test_an_adapter_in_another_form_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not name=path"):
        parse_lora_module(text)


# -- flags ---------------------------------------------------------------------------------------


def test_without_flags_the_config_is_the_default_one(parser: argparse.ArgumentParser) -> None:
    assert runtime_config(parser.parse_args([])) == RuntimeConfig()


def test_each_flag_sets_its_setting(parser: argparse.ArgumentParser) -> None:
    config = runtime_config(
        parser.parse_args(
            [
                "some/model", "--device", "cpu", "--dtype", "bfloat16", "--max-model-len", "1K",
                "--served-model-name", "it", "--revision", "v1", "--trust-remote-code",
                "--seed", "-3", "--max-num-seqs", "7", "--max-num-batched-tokens", "2k",
                "--max-queue", "9", "--kv-cache-memory-bytes", "1G", "--kv-memory-fraction", "0.5",
                "--num-gpu-blocks-override", "11", "--block-size", "32",
                "--no-enable-prefix-caching", "--threads", "2", "--enforce-eager",
                "--training-sm-share", "0.25", "--policy", "inference-only",
                "--ttft-target-ms", "250", "--tbt-target-ms", "12.5",
                "--profile", "some/file.json", "--gamma", "3",
                "--min-chunk-tokens", "4", "--training-signal", "loss",
                "--lora-modules", "a=x", "b=y", "--max-loras", "3", "--max-lora-rank", "8",
            ]
        )
    )  # fmt: skip
    assert config.model.source == "some/model"
    assert config.model.device == "cpu"
    assert config.model.dtype == "bfloat16"
    assert config.model.max_model_len == 1024
    assert config.model.served_name == "it"
    assert config.model.revision == "v1"
    assert config.model.trust_remote_code
    assert config.seed == -3
    assert config.schedule.max_num_seqs == 7
    assert config.schedule.max_num_batched_tokens == 2000
    assert config.schedule.max_queue == 9
    assert config.cache.kv_bytes == 1 << 30
    assert config.cache.memory_fraction == 0.5
    assert config.cache.num_pages == 11
    assert config.cache.page_size == 32
    assert not config.cache.enable_prefix_sharing
    assert config.lanes.inference_threads == 2
    assert not config.lanes.cuda_graphs
    assert config.lanes.sm_share == 0.25
    assert config.schedule.policy == "inference-only"
    assert config.schedule.ttft_target_s == 0.25
    assert config.schedule.tbt_target_s == 0.0125
    assert config.schedule.profile == "some/file.json"
    assert config.schedule.settings.gamma == 3.0
    assert config.schedule.settings.min_chunk_tokens == 4
    assert config.schedule.settings.training_signal == "loss"
    assert config.adapters.modules == (("a", Path("x")), ("b", Path("y")))
    assert config.adapters.max_loras == 3
    assert config.adapters.max_lora_rank == 8


def test_lora_modules_given_twice_add_up(parser: argparse.ArgumentParser) -> None:
    args = parser.parse_args(["--lora-modules", "a=x", "--lora-modules", "b=y"])
    assert [name for name, _ in args.lora_modules] == ["a", "b"]
    assert parser.parse_args([]).lora_modules == []


def test_a_wrong_value_is_refused_with_its_setting(parser: argparse.ArgumentParser) -> None:
    with pytest.raises(ConfigError, match=r"schedule.max_num_seqs is 0") as caught:
        runtime_config(parser.parse_args(["--max-num-seqs", "0"]))
    assert FLAG_OF_SETTING[str(caught.value.param)] == "--max-num-seqs"


@pytest.mark.parametrize(
    ("argv", "setting", "flag"),
    [
        (["--ttft-target-ms", "0"], "schedule.ttft_target_s", "--ttft-target-ms"),
        (["--tbt-target-ms", "nan"], "schedule.tbt_target_s", "--tbt-target-ms"),
        (["--profile", " "], "schedule.profile", "--profile"),
        (["--training-sm-share", "1"], "lanes.sm_share", "--training-sm-share"),
        (["--gamma", "-1"], "schedule.settings.gamma", "--gamma"),
        (["--training-floor", "1.5"], "schedule.settings.training_floor", "--training-floor"),
        (["--packing-bins", "0"], "schedule.settings.packing_bins", "--packing-bins"),
    ],
)
def test_a_wrong_setting_of_scheduling_is_refused_with_its_flag(
    parser: argparse.ArgumentParser, argv: list[str], setting: str, flag: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        runtime_config(parser.parse_args(argv))
    assert caught.value.param == setting
    assert caught.value.message.startswith(setting)
    assert FLAG_OF_SETTING[setting] == flag


def test_the_flag_of_a_policys_constant_is_its_name(parser: argparse.ArgumentParser) -> None:
    # Not validated here, so that any value will do.
    given: dict[str, Any] = {
        name: "loss" if name == "training_signal" else value + 1
        for name, value in asdict(PolicySettings()).items()
    }
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    assert schedule_config(parser.parse_args(argv)).settings == PolicySettings(**given)


def test_every_flag_named_in_errors_is_a_flag_of_serve() -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings} | {"MODEL"}
    assert set(FLAG_OF_SETTING.values()) <= flags


def test_every_setting_has_a_flag_but_those_that_have_no_use_here() -> None:
    def names(value: Any, prefix: str = "") -> set[str]:
        if not is_dataclass(value):
            return {prefix}
        found = (names(getattr(value, f.name), f"{prefix}.{f.name}") for f in fields(value))
        return set().union(*found)

    settings = {name.removeprefix(".") for name in names(RuntimeConfig())}
    # Leaving the server drains for --shutdown-timeout.
    assert settings - set(FLAG_OF_SETTING) == {"schedule.stop_grace_s"}


def test_the_key_comes_from_the_flag_or_else_from_the_environment() -> None:
    environment = {"COTUNE_API_KEY": "from-environment"}
    assert api_key(argparse.Namespace(api_key="given"), environment) == "given"
    assert api_key(argparse.Namespace(api_key=None), environment) == "from-environment"
    assert api_key(argparse.Namespace(api_key=None), {}) is None


# -- config files --------------------------------------------------------------------------------

YAML = """\
model: some/model
max-model-len: 4K
max_num_seqs: 12
enable-prefix-caching: false
trust-remote-code: true
rate: 1
seed:
lora-modules:
  - a=x
  - b=y
"""
TOML = """\
model = "some/model"
max-model-len = "4K"
max_num_seqs = 12
no-enable-prefix-caching = true
trust-remote-code = true
rate = 1.0
lora-modules = {a = "x", b = "y"}
"""


@pytest.mark.parametrize(("name", "text"), [("c.yaml", YAML), ("c.YML", YAML), ("c.toml", TOML)])
def test_a_file_can_hold_any_flag(
    parser: argparse.ArgumentParser, tmp_path: Path, name: str, text: str
) -> None:
    apply_config_file(parser, write(tmp_path / name, text))
    args = parser.parse_args([])
    assert args.model == "some/model"
    assert args.max_model_len == 4096
    assert args.max_num_seqs == 12
    assert args.enable_prefix_caching is False
    assert args.trust_remote_code is True
    assert args.rate == 1.0
    assert args.seed is None
    assert args.lora_modules == [("a", Path("x")), ("b", Path("y"))]


def test_the_command_line_wins_over_the_file(
    parser: argparse.ArgumentParser, tmp_path: Path
) -> None:
    apply_config_file(parser, write(tmp_path / "c.yaml", YAML))
    args = parser.parse_args(
        ["other", "--max-num-seqs", "3", "--enable-prefix-caching", "--lora-modules", "c=z"]
    )
    assert args.model == "other"
    assert args.max_num_seqs == 3
    assert args.enable_prefix_caching is True
    assert args.lora_modules == [("c", Path("z"))]
    assert args.max_model_len == 4096


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-num-seq: 3", "there is no setting 'max-num-seq'; did you mean 'max-num-seqs'?"),
        ("zzzz: 3", "there is no setting 'zzzz'; known are "),
        ("no-seed: true", "there is no setting 'no-seed'"),
        ("config: other.yaml", "there is no setting 'config'"),
        ("3: 3", "there is no setting '3'"),
        ("max-num-seqs: many", "max-num-seqs is 'many'; use a whole number"),
        ("max-num-seqs: 1.5", "max-num-seqs is 1.5; use a whole number"),
        ("max-num-seqs: true", "max-num-seqs is True; it takes a single value, not bool"),
        ("max-num-seqs: [1]", "max-num-seqs is [1]; it takes a single value, not list"),
        ("rate: fast", "rate is 'fast'; use a number"),
        ("max-model-len: 4KB", "max-model-len is '4KB'; '4KB' is not a whole number"),
        ("dtype: float23", "dtype is 'float23'; use one of auto, float32, bfloat16, float16"),
        ("revision: 12", "revision is 12; it takes text; put it in quotes"),
        ("trust-remote-code: 'yes'", "trust-remote-code is 'yes'; use true or false"),
        ("lora-modules: [tutor]", "is not name=path"),
        ("seed: 1\nmax-num-seqs: 1\nmax_num_seqs: 2", "max_num_seqs is given twice"),
        ("- seed", "holds no settings; write one 'flag: value' per line"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_the_file(
    parser: argparse.ArgumentParser, tmp_path: Path, text: str, message: str
) -> None:
    path = write(tmp_path / "wrong.yaml", text)
    with pytest.raises(ConfigError) as caught:
        apply_config_file(parser, path)
    assert str(path) in caught.value.message
    assert message in caught.value.message
    assert "\n" not in caught.value.message


def test_a_wrong_key_is_not_shown(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_config_file(parser, write(tmp_path / "c.yaml", "api-key: 12345"))
    assert "12345" not in caught.value.message
    assert "put it in quotes" in caught.value.message


def test_a_file_that_cannot_be_read_is_named(
    parser: argparse.ArgumentParser, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"missing.yaml cannot be read: No such file"):
        apply_config_file(parser, tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match=r"c.ini has no known ending; name it .yaml"):
        apply_config_file(parser, write(tmp_path / "c.ini", ""))
    with pytest.raises(ConfigError, match=r"c.toml is not valid TOML"):
        apply_config_file(parser, write(tmp_path / "c.toml", "a = "))
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read: not UTF-8 text"):
        apply_config_file(parser, tmp_path / "c.yaml")


def test_an_empty_file_changes_nothing(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    before = parser.parse_args([])
    apply_config_file(parser, write(tmp_path / "c.yaml", "# nothing yet\n"))
    assert parser.parse_args([]) == before


@pytest.mark.parametrize("command", [serve, chat])
def test_a_file_of_every_default_gives_the_defaults(command: ModuleType, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    defaults = parser.parse_args([])
    values = {
        name: value
        for name, value in vars(defaults).items()
        if value is not None and name != "config"
    }
    apply_config_file(parser, write(tmp_path / "c.yaml", yaml.safe_dump(values)))
    assert parser.parse_args([]) == defaults
