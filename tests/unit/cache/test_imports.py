from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import importlib, sys
importlib.import_module({module!r})
unwanted = ("torch", "numpy", "transformers", "cotune.policy", "cotune.streams", "cotune.web")
found = [name for name in unwanted if name in sys.modules]
assert not found, f"{module} brought in {{found}}"
"""


@pytest.mark.parametrize("name", ["pages", "trie", "manager"])
def test_a_cache_module_alone_brings_in_no_torch_and_no_neighbour(name: str) -> None:
    script = SCRIPT.format(module=f"cotune.cache.{name}")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
