from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from cotune.runtime.errors import ConfigError
from cotune.runtime.learning.events import Edit, Rating, Withdrawal, parse_event
from cotune.runtime.learning.state_directory import StateDirectory
from cotune.tools import feedback
from cotune.tools.cli import main
from cotune.tools.feedback import ServerDoor
from cotune.tools.live_server import ServerError
from feedback_values import ADAPTER, open_store, pair, rated

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PAIRS: list[dict[str, Any]] = [
    {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go.", "source": "ann"},
    {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "A", "rejected": "B"},
    {"prompt": "Hi", "completion": "Hello!", "label": True},
]


def write_rows(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def read_rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


async def rows_in(state: Path) -> list[dict[str, Any]]:
    async with open_store(StateDirectory(state).feedback) as store:
        return [dict(row) async for row in store.export()]


# -- a state directory ---------------------------------------------------------------------------


def test_rows_of_all_formats_are_stored_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, file = tmp_path / "state", write_rows(tmp_path / "rows.jsonl", PAIRS)
    assert main(["feedback", "import", file, "--state-dir", str(state), "--model", "m"]) == 0
    assert "3 stored, 0 there before, 0 refused" in capsys.readouterr().err
    assert main(["feedback", "import", file, file, "--state-dir", str(state), "--model", "m"]) == 0
    assert "0 stored, 6 there before, 0 refused" in capsys.readouterr().err
    rows = asyncio.run(rows_in(state))
    assert [row["source"] for row in rows] == ["ann", "import", "import"]
    assert {row["adapter"] for row in rows} == {"m"}
    assert {row["state"] for row in rows} == {"unprepared"}
    assert [row.get("label") for row in rows] == [None, None, True]


def test_wrong_lines_are_named_and_the_others_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["{", "", json.dumps(PAIRS[0]), json.dumps(PAIRS[0] | {"rejected": "Hello!"})]
    stdin = io.TextIOWrapper(io.BytesIO("\n".join(lines).encode()))
    monkeypatch.setattr("sys.stdin", stdin)
    monkeypatch.setattr(feedback, "SHOWN_ERRORS", 1)
    state = tmp_path / "state"
    assert main(["feedback", "import", "-", "--state-dir", str(state), "--source", "bob"]) == 1
    error = capsys.readouterr().err
    assert "-:1: not valid JSON" in error
    assert "-:4" not in error
    assert "further refusals are only counted" in error
    assert "1 stored, 0 there before, 2 refused" in error
    assert [row["source"] for row in asyncio.run(rows_in(state))] == ["bob"]


def test_a_row_whose_id_says_something_else_already_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [PAIRS[0] | {"id": "e1"}, PAIRS[0] | {"id": "e1", "chosen": "Other."}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    assert main(["feedback", "import", file, "--state-dir", str(tmp_path / "state")]) == 1
    error = capsys.readouterr().err
    assert f"{file}:2: id is 'e1'" in error
    assert "1 stored" in error


async def fill(state: Path) -> None:
    async with open_store(StateDirectory(state).feedback) as store:
        edit = Edit(id="e1", response_id="r1", text="384,400 km")
        await store.add(edit, source="ann", samples=[pair()])
        rating = Rating(id="e1", response_id="r1", rating=1)
        await store.add(rating, source="bob", samples=[rated(adapter="other")])
        rating = Rating(id="e2", response_id="r2", rating=1)
        await store.add(rating, source="bob", samples=[rated()])
        await store.add(Withdrawal(id="w", target="e2"), source="bob", samples=())


def test_an_export_has_the_rows_of_one_format(
    tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    asyncio.run(fill(tmp_path))
    command = ["feedback", "export", "--state-dir", str(tmp_path)]
    assert main(command) == 0
    output = capsysbinary.readouterr()
    (row,) = read_rows(output.out.decode())
    assert row["chosen"] == [{"role": "assistant", "content": "384,400 km"}]
    assert output.err == b"1 rows; 1 of another format left out (--format)\n"
    assert main([*command, "--format", "unpaired"]) == 0
    assert [row["label"] for row in read_rows(capsysbinary.readouterr().out.decode())] == [True]
    assert main([*command, "--format", "all", "--adapter", ADAPTER]) == 0
    assert [row["id"] for row in read_rows(capsysbinary.readouterr().out.decode())] == ["e1"]


def test_an_exported_file_can_be_imported_elsewhere(tmp_path: Path) -> None:
    asyncio.run(fill(tmp_path / "a"))
    file = tmp_path / "rows.jsonl"
    command = ["feedback", "export", "--state-dir", str(tmp_path / "a"), "--format", "all"]
    assert main([*command, "--output", str(file)]) == 0
    assert main(["feedback", "import", str(file), "--state-dir", str(tmp_path / "b")]) == 0
    columns = ("id", "source", "prompt", "chosen", "rejected", "completion", "label")
    before, after = (asyncio.run(rows_in(tmp_path / name)) for name in "ab")
    assert [[row.get(name) for name in columns] for row in after] == [
        [row.get(name) for name in columns] for row in before
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "rows.jsonl"}


def test_a_persons_feedback_is_deleted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.run(fill(tmp_path))
    command = ["feedback", "delete", "--state-dir", str(tmp_path), "--source", "bob"]
    stdin = io.StringIO("n\n")
    monkeypatch.setattr("sys.stdin", stdin)
    assert main(command) == 2
    assert "give --yes" in capsys.readouterr().err
    monkeypatch.setattr(stdin, "isatty", lambda: True)
    assert main(command) == 1
    assert "nothing was deleted" in capsys.readouterr().err
    assert main([*command, "--yes"]) == 0
    assert "3 events removed" in capsys.readouterr().err
    assert [row["source"] for row in asyncio.run(rows_in(tmp_path))] == ["ann"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["export"], "give one of --state-dir"),
        (["export", "--state-dir", "x", "--url", "y"], "give one of --state-dir"),
        (["export", "--state-dir", "nowhere"], "no feedback is stored there"),
        (["delete", "--state-dir", "nowhere", "--source", "a"], "no feedback is stored there"),
        (["import", "nothing.jsonl", "--state-dir", "state"], "nothing.jsonl cannot be read"),
        (["export", "--state-dir", "here", "--output", "no/a.jsonl"], "--output no/a.jsonl"),
        (["export", "--state-dir", "here", "--output", "file/a.jsonl"], "--output file/a.jsonl"),
    ],
)
def test_what_cannot_be_done_is_said_with_the_remedy(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    asyncio.run(fill(Path("here")))
    Path("file").touch()
    assert main(["feedback", *argv]) == 2
    assert message in capsys.readouterr().err
    assert not Path("nowhere").exists()


# -- a server ------------------------------------------------------------------------------------


class FakeServer:
    """Feedback routes that answer as the test says and remember what they were asked."""

    def __init__(self) -> None:
        self.posts: list[tuple[str, list[str]]] = []
        self.headers: list[Any] = []
        self.refusals: list[dict[str, Any]] = []  # one after the other for the first events
        self.reply: web.Response | None = None
        self.rows: bytes = b""

    @asynccontextmanager
    async def door(self, key: str | None = None, **options: Any) -> AsyncIterator[ServerDoor]:
        app = web.Application()
        app.router.add_post("/v1/feedback", self.post)
        app.router.add_get("/v1/feedback/export", self.export)
        app.router.add_delete("/v1/feedback", self.delete)
        server = TestServer(app)
        async with server, ServerDoor(str(server.make_url("/v1")), key, **options).open() as door:
            yield door

    async def post(self, request: web.Request) -> web.Response:
        if self.reply is not None:
            return self.reply
        events = await request.json()
        for event in events:
            parse_event(event)
        self.headers.append(request.headers.get("Authorization"))
        self.posts.append((request.query["source"], [event["id"] for event in events]))
        answers = [
            {"type": "error", "id": event["id"], **self.refusals.pop(0)}
            if self.refusals
            else {"type": "ack", "id": event["id"], "duplicate": event["id"] == "old"}
            for event in events
        ]
        return web.json_response(answers)

    async def export(self, request: web.Request) -> web.Response:
        if self.reply is not None:
            return self.reply
        return web.Response(body=self.rows + request.query.get("adapter", "").encode())

    async def delete(self, request: web.Request) -> web.Response:
        if self.reply is not None:
            return self.reply
        return web.json_response({"deleted": 7, "source": request.query["source"]})


def arguments(**values: Any) -> argparse.Namespace:
    defaults: dict[str, Any] = {
        "files": [],
        "source": None,
        "model": None,
        "yes": True,
        "output": None,
    }
    return argparse.Namespace(**{**defaults, "adapter": None, "format": "all", **values})


def refusal(code: str, **more: Any) -> dict[str, Any]:
    error = {"message": f"refused: {code}", "type": "t", "param": None, "code": code}
    return {"error": error, **more}


async def test_rows_are_posted_by_source_in_batches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feedback, "BATCH_EVENTS", 2)
    rows = [PAIRS[0] | {"id": f"e{i}"} for i in range(3)]
    rows += [PAIRS[1] | {"id": "old"}]
    server = FakeServer()
    async with server.door("secret") as door:
        file = write_rows(tmp_path / "rows.jsonl", rows)
        assert await feedback.import_files(door, arguments(files=[file])) == 0
    assert server.posts == [("ann", ["e0", "e1"]), ("ann", ["e2"]), ("import", ["old"])]
    assert server.headers == ["Bearer secret"] * 3
    assert "3 stored, 1 there before, 0 refused" in capsys.readouterr().err


async def test_batches_are_bounded_by_their_size_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feedback, "BATCH_BYTES", 1000)
    rows = [PAIRS[1] | {"id": f"e{i}", "chosen": "x" * 600} for i in range(3)]
    rows[1]["chosen"] = "x" * 5000
    server = FakeServer()
    async with server.door() as door:
        file = write_rows(tmp_path / "rows.jsonl", rows)
        await feedback.import_files(door, arguments(files=[file]))
    assert [ids for _, ids in server.posts] == [["e0"], ["e1"], ["e2"]]


async def test_what_the_server_cannot_take_now_is_sent_again_when_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []

    async def record_wait(seconds: float) -> None:
        waits.append(seconds)

    server = FakeServer()
    server.refusals = [
        refusal("quota_exceeded", retry_after=30),
        refusal("context_length_exceeded"),
        refusal("feedback_queue_full"),
    ]
    rows = [PAIRS[1] | {"id": f"e{i}"} for i in range(4)]
    async with server.door(sleep=record_wait) as door:
        file = write_rows(tmp_path / "rows.jsonl", rows)
        assert await feedback.import_files(door, arguments(files=[file])) == 1
    assert [ids for _, ids in server.posts] == [["e0", "e1", "e2", "e3"], ["e0", "e2"]]
    assert waits == [30]
    error = capsys.readouterr().err
    assert f"{file}:2: refused: context_length_exceeded" in error
    assert "3 stored, 0 there before, 1 refused" in error


async def test_an_export_of_a_server_is_written_as_it_comes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = FakeServer()
    long_row = json.dumps({"id": "e1", "chosen": "x" * 500_000, "rejected": "y"})
    server.rows = f'{long_row}\n{{"id": "e2"}}\n'.encode()
    output = tmp_path / "rows.jsonl"
    async with server.door() as door:
        assert await feedback.export(door, arguments(output=output)) == 0
        assert [row["id"] for row in read_rows(output.read_text())] == ["e1", "e2"]
        with pytest.raises(ServerError, match="in the middle of a row"):
            await feedback.export(door, arguments(output=output, adapter="cut off"))
    assert len(read_rows(output.read_text())) == 2, "the whole file is still there"
    assert os.listdir(tmp_path) == [output.name], "and nothing of what was cut off"


async def test_deleting_asks_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    server = FakeServer()
    async with server.door() as door:
        assert await feedback.delete(door, arguments(source="ann & co")) == 0
    assert capsys.readouterr().err == "7 events removed\n"


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (web.json_response(refusal("wrong_key"), status=401), r"refused: wrong_key \(status 401"),
        (web.Response(text="<html>", status=200), "does not speak cotune's feedback"),
        (web.Response(text="no route", status=404), r"does not speak.*\(status 404\)"),
        (web.json_response([], status=200), "does not speak cotune's feedback"),
    ],
)
async def test_an_error_of_the_server_is_told(
    tmp_path: Path, reply: web.Response, message: str
) -> None:
    server = FakeServer()
    server.reply = reply
    file = write_rows(tmp_path / "rows.jsonl", PAIRS[:1])
    async with server.door() as door:
        with pytest.raises(ServerError, match=message):
            await feedback.import_files(door, arguments(files=[file]))


async def test_a_server_that_is_not_there_is_told_with_the_remedy() -> None:
    server = TestServer(web.Application())
    await server.start_server()
    url = str(server.make_url("/"))
    await server.close()
    async with ServerDoor(url, None).open() as door:
        with pytest.raises(ServerError, match=r"no server at .*--state-dir"):
            await door.delete("ann")
    async with ServerDoor("http://", None).open() as door:
        with pytest.raises(ConfigError, match="use http://HOST:PORT"):
            await door.delete("ann")
