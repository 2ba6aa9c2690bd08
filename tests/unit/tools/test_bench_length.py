"""The benchmark of answer lengths: what it says to the learner, and that it runs."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING, Any

import pytest

from cotune.tools.bench_length import Answer, choose_answers
from cotune.tools.cli import main
from cotune.tools.coserve_load import PREFERENCES_FILE
from tiny_models import save_model_directory

if TYPE_CHECKING:
    from pathlib import Path

LONG = (
    "This is how the answer begins. And then it goes on, and on, and on, and on, at length, and on."
)


def row(question: str, chosen: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": chosen,
        "rejected": "no",
    }


def write(directory: Path, *rows: dict[str, Any]) -> Path:
    with gzip.open(directory / PREFERENCES_FILE, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return directory


def test_answers_are_those_that_go_on_after_their_first_sentence() -> None:
    rows = [
        row("one", LONG),
        row("one", f"{LONG} Again."),
        row("two", "Only one sentence, which is not short."),
        row("three", f"Yes. {LONG} And that is that."),
        row("four", LONG * 9),
    ]
    found = list(choose_answers(rows, max_chars=300))
    assert [a.prompt[0]["content"] for a in found] == ["one", "three"]
    assert found[0].first_sentence == "This is how the answer begins."
    # "Yes." alone is too short to be an answer.
    assert found[1].first_sentence == "Yes. This is how the answer begins."


def test_a_wish_decides_which_of_the_two_is_chosen() -> None:
    answer = Answer([{"role": "user", "content": "one"}], LONG, "This is how the answer begins.")
    shorter, longer = (answer.preference(wish, 4) for wish in ("shorter", "longer"))
    assert (shorter["chosen"], shorter["rejected"]) == (answer.first_sentence, LONG)
    assert (longer["chosen"], longer["rejected"]) == (LONG, answer.first_sentence)
    assert shorter["id"] != longer["id"]


def test_too_few_answers_are_an_error_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path, row("one", LONG))
    assert main(["bench", "length", "--data", str(data)]) == 2
    assert "1 answers to fit" in capsys.readouterr().err


def test_nothing_to_ask_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "length", "--data", str(tmp_path), "--prompts", "0"])
    assert "--prompts: 0 is below 1" in capsys.readouterr().err


def test_it_learns_from_the_preferences_and_counts_the_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path, *(row(f"question {i}", LONG) for i in range(20)))
    model = save_model_directory(tmp_path / "model", head_dim=32)
    counts = ["--pairs", "16", "--prompts", "4", "--max-tokens", "6"]
    command = ["bench", "length", "--data", str(data), "--model", str(model), *counts]
    assert main([*command, "--stop-alphas", "3"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["wish"] for row in result["rows"]] == ["none", "shorter", "longer"]
    assert result["rows"][0]["steps"] == 0
    assert all(row["steps"] > 0 for row in result["rows"][1:])
    assert all(0 < row["mean"] <= 6 for row in result["rows"])
