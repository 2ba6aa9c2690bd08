"""The architecture: who may import whom, and what importing costs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import cotune

ROOT = Path(cotune.__file__).resolve().parent
FOLDERS = ("runtime", "streams", "cache", "policy", "web", "tools")

# Folder to the folders it may import from, besides itself. "" is the package's own __init__.
MAY_IMPORT: dict[str, set[str]] = {
    "": {"runtime"},
    "policy": set(),
    "cache": set(),
    "streams": set(),
    "runtime": {"policy", "cache", "streams"},
    "web": {"runtime", ""},
    "tools": {*FOLDERS, ""},
}
STDLIB_ONLY = ("policy", "cache")
WITHOUT_TORCH = ("policy", "cache", "web")
TORCH_STACK = {"torch", "transformers", "peft", "safetensors", "tokenizers", "numba"}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def all_sources() -> list[tuple[str, Path]]:
    found = [("", ROOT / "__init__.py")]
    found += [(folder, path) for folder in FOLDERS for path in sources(folder)]
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("cotune", *(part for part in parts if part != "__init__")))


def imports(path: Path) -> list[tuple[int, str]]:
    """Line and absolute name of everything a file imports, wherever in the file it stands."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            found += [(node.lineno, ".".join([*module, alias.name])) for alias in node.names]
    return found


def folder_of(name: str) -> str | None:
    """The folder of ours that an imported name is in; None if it is not ours."""
    parts = name.split(".")
    if parts[0] != "cotune":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in FOLDERS else ""


def violations(folder: str, path: Path) -> list[str]:
    """What `path`, which lies in `folder`, imports and may not."""
    wrong: list[str] = []
    for line, name in imports(path):
        where = f"{path.relative_to(ROOT)}:{line} imports {name}"
        top, target = name.split(".")[0], folder_of(name)
        if target is not None:
            if target != folder and target not in MAY_IMPORT[folder]:
                wrong.append(f"{where}: {folder or '__init__'} may not import {target or 'cotune'}")
        elif folder in STDLIB_ONLY and top not in sys.stdlib_module_names:
            wrong.append(f"{where}: {folder} uses the standard library alone")
        elif folder in WITHOUT_TORCH and top in TORCH_STACK:
            wrong.append(f"{where}: {folder} does without torch")
    return wrong


def test_every_file_of_the_package_imports_only_what_its_folder_may() -> None:
    found = all_sources()
    assert {folder for folder, _ in found} == {"", *FOLDERS}
    assert not [line for folder, path in found for line in violations(folder, path)]


@pytest.mark.parametrize(
    ("folder", "line", "is_allowed"),
    [
        ("policy", "import heapq", True),
        ("policy", "import numpy", False),
        ("policy", "from ..cache.pages import PagePool", False),
        ("policy", "from ..runtime import errors", False),
        ("cache", "from .pages import PagePool", True),
        ("cache", "def f():\n    import torch", False),
        ("streams", "import torch", True),
        ("streams", "from .. import policy", False),
        ("streams", "from ..runtime.errors import ConfigError", False),
        ("runtime", "from ..streams.lane import Lane", True),
        ("runtime", "from ..web import server", False),
        ("runtime", "import cotune.tools.cli", False),
        ("web", "from .. import __version__", True),
        ("web", "from ..runtime.types import Delta", True),
        ("web", "from ..streams.lane import Lane", False),
        ("web", "import torch.nn", False),
        ("tools", "from ..web.server import serve", True),
    ],
)
def test_the_rules_tell_good_imports_from_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, line: str, is_allowed: bool
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / folder / "example.py"
    path.parent.mkdir()
    path.write_text(line + "\n")
    assert (violations(folder, path) == []) is is_allowed


def test_imports_between_folders_are_relative() -> None:
    absolute: list[str] = []
    for _folder, path in all_sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), path)):
            match node:
                case ast.ImportFrom(level=0, module=str(module)):
                    names = [module]
                case ast.Import(names=aliases):
                    names = [alias.name for alias in aliases]
                case _:
                    continue
            if any(name.split(".")[0] == "cotune" for name in names):
                absolute.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not absolute


# -- in fresh interpreters -----------------------------------------------------------------------

# Imports each module as if it were the first of ours: those of ours that earlier ones brought in
# are forgotten before. The heavy libraries are kept, which is what makes one interpreter enough.
EACH_ALONE = """
import importlib, json, sys, traceback
failures = {}
for name in json.loads(sys.argv[1]):
    for known in [m for m in sys.modules if m.split(".")[0] == "cotune"]:
        del sys.modules[known]
    try:
        importlib.import_module(name)
    except BaseException:
        failures[name] = traceback.format_exc()
print(json.dumps(failures))
"""

AFTER_IMPORT = """
import importlib, json, sys
importlib.import_module(sys.argv[1])
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


def run_python(code: str, argument: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, argument],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_each_module_can_be_the_first_one_imported() -> None:
    names = [module_name(path) for _folder, path in all_sources()]
    failures: dict[str, str] = json.loads(run_python(EACH_ALONE, json.dumps(names)))
    assert not failures, "\n".join(failures.values())


@pytest.mark.parametrize(
    "module", ["cotune", "cotune.policy", "cotune.cache.manager", "cotune.web.server"]
)
def test_importing_it_does_not_bring_in_torch(module: str) -> None:
    loaded = set(json.loads(run_python(AFTER_IMPORT, module)))
    assert "cotune" in loaded
    assert not loaded & TORCH_STACK


def test_the_command_starts_without_torch_aiohttp_or_yaml() -> None:
    loaded = set(json.loads(run_python(AFTER_IMPORT, "cotune.tools.cli")))
    assert not loaded & {*TORCH_STACK, "aiohttp", "numpy", "rich", "uvloop", "yaml"}
