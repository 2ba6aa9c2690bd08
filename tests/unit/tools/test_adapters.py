"""`cotune adapters`, on a state directory and on a server."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from cotune.runtime.learning import checkpoint
from cotune.runtime.learning.state_directory import CHECKPOINT_FILE, StateDirectory
from cotune.runtime.learning.status import AdapterLearning, LearningStatus
from cotune.runtime.learning.versions import Lineage, Manifest, VersionStore
from cotune.tools.cli import main
from cotune.web.adapters import learning_body, version_body

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


def save(directory: Path) -> None:
    a, b = torch.ones(2, 3), torch.ones(5, 2)
    save_file(
        {f"{MODULE}.lora_A.weight": a, f"{MODULE}.lora_B.weight": b},
        directory / "adapter_model.safetensors",
    )
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """tutor: 1 and 2 published (2 is live), 3 refused."""
    store = VersionStore(tmp_path / "state" / "adapters")
    for refused in (False, False, True):
        number = store.next_number("tutor")
        manifest = Manifest(
            parent=number - 1,
            lineage=Lineage(steps=20 * number, base_model="tiny"),
            metrics={"win_rate": 0.6 + number / 10, "live_win_rate": 0.5, "gain": 0.1},
            reasons=("not_better",) if refused else (),
            explanation="words of the gate",
        )
        store.write("tutor", number, save, manifest, refused=refused)
        if not refused:
            store.set_live("tutor", number, "published")
    store.close()
    return tmp_path / "state"


def live(state: Path) -> int:
    return VersionStore(state / "adapters", read_only=True).live("tutor")


def run(state: Path, *argv: str) -> int:
    return main(["adapters", *argv, "--state-dir", str(state)])


def test_list_has_a_line_per_version(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(state, "list") == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["version", "state", "live"]
    assert [line.split()[0] for line in lines] == ["tutor@1", "tutor@2", "tutor@3"]
    assert "*" in lines[1]
    assert "80%" in lines[1]
    assert lines[2].endswith("not_better")
    assert run(state, "list", "--adapter", "nobody") == 0
    assert capsys.readouterr().out == "no versions yet\n"


def test_list_tells_of_candidates_that_are_no_versions(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {"passed": 2, "refused": {"entropy": 1}, "undecided_by_reason": {"not_better": 3}}
    checkpoint.save(StateDirectory(state).training("tutor"), {}, told)
    # One of before undecided candidates were counted, with a name that no directory can have.
    old = {"passed": 0, "refused": {}, "undecided": 2}
    checkpoint.save(StateDirectory(state).training("a/b"), {}, old)
    assert run(state, "list") == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "a/b: of its candidates 0 passed, 0 refused, 0 undecided",
        "tutor: of its candidates 2 passed, 1 refused (entropy 1), 3 undecided (not_better 3)",
    ]
    assert run(state, "list", "--adapter", "a/b") == 0
    assert capsys.readouterr().out.startswith("no versions yet\na/b: of its candidates 0 passed")


def test_a_damaged_checkpoint_hides_no_versions(
    state: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    file = StateDirectory(state).training("tutor") / CHECKPOINT_FILE
    file.parent.mkdir(parents=True)
    file.write_bytes(b"torn")
    assert run(state, "list") == 0
    assert "candidates" not in (out := capsys.readouterr().out)
    assert "tutor@3" in out
    assert "cannot be read" in caplog.text


def test_list_can_be_read_by_programs(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(state, "list", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(item["number"], item["state"], item["is_live"]) for item in found] == [
        (1, "published", False),
        (2, "published", True),
        (3, "refused", False),
    ]


@pytest.mark.parametrize("name", ["tutor@3", "3"])
def test_show_tells_lineage_verdict_and_metrics(
    state: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert run(state, "show", name) == 0
    text = capsys.readouterr().out
    for words in ("tutor@3", "refused", "words of the gate", "not_better", "tiny", "win_rate"):
        assert words in text


def test_diff_compares_metrics_and_weights(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(state, "diff", "1", "2") == 0
    text = capsys.readouterr().out
    assert "win_rate" in text
    assert "model.layers.0.self_attn.q_proj" in text
    assert run(state, "diff", "tutor@0", "tutor@2", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"]["gain"] == [None, 0.1]
    assert found["modules"]["model.layers.0.self_attn.q_proj"]["norm_a"] == 0.0


def test_promote_and_rollback_change_what_is_live(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(state, "rollback", "tutor@2") == 0
    assert live(state) == 1
    assert run(state, "promote", "tutor@2") == 0
    assert live(state) == 2
    assert run(state, "rollback", "2") == 0
    assert run(state, "rollback", "1") == 0
    assert live(state) == 0
    assert "the base model, tutor@0, is live" in capsys.readouterr().out


def test_a_rollback_that_comes_twice_goes_back_once(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(state, "rollback", "tutor@2") == 0
    assert run(state, "rollback", "tutor@2") == 1
    assert live(state) == 1
    assert "tutor@1 is live" in capsys.readouterr().err


def test_a_refused_version_goes_live_by_force_alone(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(state, "promote", "tutor@3") == 1
    assert "refused by the gate (not_better)" in capsys.readouterr().err
    assert live(state) == 2
    assert run(state, "promote", "tutor@3", "--force") == 0
    assert live(state) == 3


def test_export_copies_a_peft_directory(state: Path, tmp_path: Path) -> None:
    assert run(state, "export", "tutor@2", str(tmp_path / "out")) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert run(state, "export", "tutor@2", str(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (["show", "tutor@9"], 1, "there is no version tutor@9; versions: tutor@1, tutor@2"),
        (["promote", "tutor@9"], 1, "tutor has no version 9"),
        (["show", "tutor"], 2, "use NAME@NUMBER"),
        (["show", "@1"], 2, "use NAME@NUMBER"),
        (["diff", "tutor@1", "other@1"], 2, "different adapters"),
        (["rollback", "tutor@0"], 1, "tutor@0, is not a live version"),
    ],
)
def test_what_cannot_be_done_is_explained(
    state: Path, capsys: pytest.CaptureFixture[str], argv: list[str], status: int, words: str
) -> None:
    assert run(state, *argv) == status
    assert words in capsys.readouterr().err
    assert live(state) == 2


def test_beside_a_server_one_may_look_and_not_change(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = VersionStore(state / "adapters")
    assert run(state, "list") == 0
    assert run(state, "promote", "tutor@1") == 2
    assert "--url" in capsys.readouterr().err
    server.close()


def test_a_directory_without_versions_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "list") == 2
    assert "no versions are stored there" in capsys.readouterr().err
    assert main(["adapters", "list"]) == 2
    assert not list(tmp_path.iterdir())


# --- a server -------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Answers as the adapter routes do, and writes down what it was asked."""

    daemon_threads = True

    def __init__(self, state: Path) -> None:
        self.asked: list[tuple[str, str, Any, str | None]] = []
        store = VersionStore(state / "adapters", read_only=True)
        self.bodies = [version_body(record) for record in store.records()]
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.note(None)
        if self.path == "/v1/learning":
            adapter = AdapterLearning(
                adapter="tutor",
                candidates_passed=2,
                candidates_refused={"not_better": 1},
                candidates_undecided={"not_better": 4},
            )
            status = LearningStatus(enabled=True, adapters=(adapter,))
            self.answer(200, learning_body(status, "tutor"))
        else:
            self.answer(200, {"object": "list", "data": self.server.bodies})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.note(body)
        if self.path.endswith("rollback"):
            self.answer(200, {"object": "adapter.rolled_back", "live": None})
        elif body.get("force"):
            self.answer(200, {"object": "adapter.promoted", "live": self.server.bodies[0]})
        else:
            self.answer(409, {"error": {"message": "it was refused", "code": "version_refused"}})

    def note(self, body: Any) -> None:
        self.server.asked.append((self.command, self.path, body, self.headers.get("Authorization")))

    def answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(state: Path) -> Iterator[Server]:
    with Server(state) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_server_is_asked_for_its_versions(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapters", "list", "--url", f"{server.url}/v1", "--api-key", "k"]) == 0
    out = capsys.readouterr().out
    assert "tutor@2" in out
    assert out.endswith("2 passed, 1 refused (not_better 1), 4 undecided (not_better 4)\n")
    assert main(["adapters", "show", "2", "--url", server.url]) == 0
    assert "words of the gate" in capsys.readouterr().out
    asked = [(method, path, key) for method, path, _, key in server.asked]
    assert asked[:2] == [
        ("GET", "/v1/adapters", "Bearer k"),
        ("GET", "/v1/learning", "Bearer k"),
    ]
    assert set(asked[2:]) == {("GET", "/v1/adapters", None)}


def test_a_server_is_asked_to_promote_and_to_roll_back(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapters", "promote", "a b/tutor@2", "--force", "--url", server.url]) == 0
    assert main(["adapters", "rollback", "tutor@2", "--url", server.url]) == 0
    assert "the base model, tutor@0, is live" in capsys.readouterr().out
    assert [(path, body) for _, path, body, _ in server.asked] == [
        ("/v1/adapters/a%20b/tutor@2/promote", {"force": True}),
        ("/v1/adapters/tutor@2/rollback", {}),
    ]


def test_what_a_server_refuses_is_told_in_its_words(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapters", "promote", "tutor@3", "--url", server.url]) == 1
    assert "it was refused (status 409)" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_told_with_a_remedy(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    url = server.url
    server.shutdown()
    server.server_close()
    assert main(["adapters", "list", "--url", url]) == 1
    assert "start one with" in capsys.readouterr().err
