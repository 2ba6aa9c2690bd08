"""The README's examples, run as they stand there."""

from __future__ import annotations

import asyncio
import os
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cotune import Runtime
from web_server import serving

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "runtime" / "demo_model"


def python_block(containing: str) -> str:
    """The README's one Python example with a text in it."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if containing in block]
    return str(block)


async def test_the_embedded_example_answers(capsys: pytest.CaptureFixture[str]) -> None:
    example = python_block("async with Runtime(model=None")
    source = "async def example():\n" + textwrap.indent(example, "    ") + "    return r, r2\n"
    imports = "from cotune import Runtime, SamplingParams"
    names: dict[str, Any] = {}
    exec(compile(source.replace(f"    {imports}\n", ""), "README.md", "exec"), names)
    exec(imports, names)
    first, second = await names["example"]()
    assert capsys.readouterr().out == first.text
    assert first.text.strip()
    assert first.adapter_version.name == ""
    assert first.timings.ttft_s > 0
    assert len(first.timings.tbt_s) == first.usage.completion_tokens - 1
    assert second.usage.completion_tokens <= 16


async def test_the_learning_example_stores_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    example = python_block('async with Runtime(state_dir="state")')
    body = example.replace("    rt.learning()", "    learning = rt.learning()\n    rt.learning()")
    source = "async def example():\n" + textwrap.indent(body, "    ") + "    return learning\n"
    names: dict[str, Any] = {}
    exec(compile(source, "README.md", "exec"), names)
    learning = await names["example"]()
    assert learning.events == {"rating": 1, "edit": 1, "preference": 1}
    assert learning.adapters[0].live_version == 0
    assert os.listdir(tmp_path) == ["state"]


async def test_the_openai_example_streams(capsys: pytest.CaptureFixture[str]) -> None:
    example = python_block("from openai import OpenAI")
    async with (
        Runtime(DEMO, device="cpu", served_name="cotune-demo", num_pages=256) as runtime,
        serving(runtime) as server,
    ):
        example = example.replace("http://127.0.0.1:8000", server.url)
        await asyncio.to_thread(exec, compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
