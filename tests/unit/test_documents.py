"""The documents name what is there, and only that."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

import cotune
from cotune.policy import POLICY_NAMES, PolicySettings
from cotune.tools.cli import BENCHMARKS, COMMANDS
from cotune.tools.schedule_options import FLAG_OF_SCHEDULE_SETTING

ROOT = Path(cotune.__file__).resolve().parent
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")], key=lambda path: path.as_posix()
)
FOLDERS = ("policy", "cache", "streams", "runtime", "web")


def rows(document: str, heading: str) -> list[list[str]]:
    """The cells of the table whose header row begins with a word."""
    lines = iter((ROOT / document).read_text(encoding="utf-8").splitlines())
    for line in lines:
        if line.startswith(f"| {heading} |"):
            break
    next(lines)
    found = []
    for line in lines:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


def test_every_setting_of_the_policies_is_explained_with_its_default() -> None:
    table = rows("docs/policies.md", "setting")
    settings = PolicySettings()
    expected = {field.name: str(getattr(settings, field.name)) for field in fields(settings)}
    assert {name.strip("`"): default for name, _, default, *_ in table} == expected
    assert all(len(row) == 5 and row[3] and row[4] for row in table)
    for name in expected:
        flag = "--" + name.replace("_", "-")
        assert FLAG_OF_SCHEDULE_SETTING[f"schedule.settings.{name}"] == flag


@pytest.mark.parametrize("document", ["README.md", "docs/policies.md"])
def test_every_policy_has_its_line(document: str) -> None:
    names = [re.findall(r"`([^`]+)`", row[0])[0] for row in rows(document, "policy")]
    assert tuple(names) == POLICY_NAMES


def test_every_module_has_its_place_in_the_architecture() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    sections = re.findall(r"^\*\*([a-z/]+)\*\*(.*?)(?=^\*\*|^#)", text, re.DOTALL | re.MULTILINE)
    named = {folder: set(re.findall(r"`([a-z_]+)`", body)) for folder, body in sections}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            if path.name != "__init__.py":
                place = path.parent.relative_to(ROOT).as_posix()
                assert path.stem in named[place], f"{place}/{path.name} is not in ARCHITECTURE.md"


def test_every_named_module_is_there() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for folder, body in re.findall(
        r"^\*\*([a-z/]+)\*\*(.*?)(?=^\*\*|^#)", text, re.DOTALL | re.MULTILINE
    ):
        for name in re.findall(r"`([a-z_]+)`", body):
            assert (ROOT / folder / f"{name}.py").is_file(), f"{folder}/{name}.py is not there"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_that_is_named_can_be_run(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for command, benchmark in re.findall(r"(?:`|^    )cotune ([a-z-]+)(?: ([a-z]+))?", text, re.M):
        assert command in COMMANDS
        assert command != "bench" or benchmark in {"", *BENCHMARKS}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), target
