from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.runtime.errors import IterationError, OverloadedError, StorageError
from cotune.tools.null_learning import NullLearning
from cotune.tools.null_runtime import NullRuntime
from cotune.web.feedback import Turns, Window
from web_server import http, serving

PATH = "/v1/feedback"
PAIR = {"prompt": [{"role": "user", "content": "hi"}], "chosen": "a", "rejected": "b"}


def preference(id: str, **fields: Any) -> dict[str, Any]:
    return {"id": id, "type": "preference", **PAIR, **fields}


# Turns.


async def order_of(*bodies: dict[str, Any]) -> list[str]:
    """The ids in the order in which they finish, if each takes as long as those that remain."""
    turns = Turns()
    done: list[str] = []

    async def run(body: dict[str, Any], steps: int) -> None:
        async with turn_of[body["id"]]:
            for _ in range(steps):
                await asyncio.sleep(0)
            done.append(body["id"])

    turn_of = {body["id"]: turns.take(body) for body in bodies}
    async with asyncio.TaskGroup() as group:
        for i, body in enumerate(bodies):
            group.create_task(run(body, 10 * (len(bodies) - i)))
    assert len(turns) == 0
    return done


async def test_events_about_different_things_run_side_by_side() -> None:
    assert await order_of(
        {"id": "a", "response_id": "1"},
        {"id": "b", "response_id": "2"},
        preference("c", chosen="c"),
        preference("d", chosen="d"),
    ) == ["d", "c", "b", "a"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"response_id": "1"}, {"response_id": "1"}),
        ({"response_id": "1"}, {"chosen_id": "1", "rejected_id": "2"}),
        ({"chosen_id": "2", "rejected_id": "1"}, {"chosen_id": "1", "rejected_id": "2"}),
        ({"response_id": "1"}, {"target": "first"}),
        (PAIR, PAIR),
        (PAIR, {**PAIR, "chosen": "b", "rejected": "a"}),
    ],
)
async def test_events_about_one_thing_keep_their_order(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    order = await order_of({"id": "first", **first}, {"id": "second", **second})
    assert order == ["first", "second"]


async def test_a_turn_that_is_cancelled_lets_the_next_one_run() -> None:
    turns = Turns()
    first, second, third = (turns.take({"id": "same"}) for _ in range(3))

    async def run(turn: Any) -> None:
        async with turn:
            pass

    async with first:
        waiting = asyncio.ensure_future(run(second))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    await run(third)
    assert len(turns) == 0


# The window.


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), max_size=40), max_events=st.integers(1, 5))
def test_a_window_never_holds_more_than_it_may(sizes: list[int], max_events: int) -> None:
    async def main() -> None:
        window = Window(max_events, 50)
        inside: list[int] = []

        async def drain() -> None:
            while True:
                await asyncio.sleep(0)
                if inside:
                    window.leave(inside.pop())

        draining = asyncio.ensure_future(drain())
        for size in sizes:
            await window.wait_room()
            window.enter(size)
            inside.append(size)
            assert window.events == len(inside) <= max_events
            assert window.bytes == sum(inside) < 50 + 40
        draining.cancel()

    asyncio.run(main())


# POST.


async def test_one_event_is_answered_with_its_acknowledgement() -> None:
    learning = NullLearning("null")
    async with (
        NullRuntime(learning=learning) as runtime,
        serving(runtime) as server,
        http(server) as client,
    ):
        for duplicate in (False, True):
            async with client.post(PATH, json=preference("a")) as response:
                assert response.status == 200
                assert await response.json() == {"type": "ack", "id": "a", "duplicate": duplicate}
    assert list(learning.events) == [("127.0.0.1", "a")]


@pytest.mark.parametrize(
    ("body", "status", "code", "param", "id"),
    [
        ({"id": "x"}, 400, "invalid_feedback", "type", "x"),
        ({"type": "rating"}, 400, "invalid_feedback", "id", None),
        (preference("x", rejected="a"), 400, "invalid_feedback", "rejected", "x"),
        (preference("x", surprise=1), 400, "invalid_feedback", "surprise", "x"),
        (preference("a", chosen="other"), 409, "id_reused", "id", "a"),
        (
            {"id": "x", "type": "rating", "response_id": "no", "rating": 1},
            404,
            "response_not_found",
            "response_id",
            "x",
        ),
        ({"id": "x", "type": "withdraw", "target": "no"}, 404, "event_not_found", "target", "x"),
        ({"id": "x" * 10_000, "type": "edit"}, 400, "invalid_feedback", "id", None),
    ],
)
async def test_one_event_that_is_refused_has_the_status_of_its_error(
    body: dict[str, Any], status: int, code: str, param: str, id: str | None
) -> None:
    learning = NullLearning("null")
    async with (
        NullRuntime(learning=learning) as runtime,
        serving(runtime) as server,
        http(server) as client,
    ):
        async with client.post(PATH, json=preference("a")) as response:
            assert response.status == 200
        async with client.post(PATH, json=body) as response:
            assert response.status == status
            frame = await response.json()
    assert (frame["type"], frame["id"]) == ("error", id)
    assert set(frame["error"]) == {"message", "type", "param", "code"}
    assert (frame["error"]["code"], frame["error"]["param"]) == (code, param)
    assert len(frame["error"]["message"]) < 1000
    assert len(learning.events) == 1


async def test_a_list_is_answered_in_its_order_each_for_itself() -> None:
    learning = NullLearning("null")
    async with (
        NullRuntime(learning=learning) as runtime,
        serving(runtime) as server,
        http(server) as client,
    ):
        events = [
            preference("a"),
            {"id": "w", "type": "withdraw", "target": "a"},
            "no event",
            preference("a"),
            preference("b", chosen=""),
            preference("c", chosen="c"),
        ]
        async with client.post(PATH, json=events) as response:
            assert response.status == 200
            frames = await response.json()
    assert [(frame["type"], frame["id"]) for frame in frames] == [
        ("ack", "a"),
        ("ack", "w"),
        ("error", None),
        ("ack", "a"),
        ("error", "b"),
        ("ack", "c"),
    ]
    assert [frame.get("duplicate") for frame in frames] == [False, False, None, True, None, False]
    assert learning.events["127.0.0.1", "a"].is_withdrawn


async def test_a_list_is_stored_together_and_not_one_by_one() -> None:
    learning = NullLearning("null", manual=True)
    async with (
        NullRuntime(learning=learning) as runtime,
        serving(runtime) as server,
        http(server) as client,
    ):
        events = [preference(str(i), chosen=f"text {i}") for i in range(20)]
        posting = asyncio.ensure_future(client.post(PATH, json=events))
        await learning.wait_waiting(20)
        learning.commit()
        async with await posting as response:
            assert [frame["id"] for frame in await response.json()] == [e["id"] for e in events]


async def test_a_list_of_which_nothing_was_stored_has_the_status_of_its_first_error() -> None:
    learning = NullLearning("null")
    learning.failure = StorageError("the disk is full; make room", retry_after_s=3)
    async with (
        NullRuntime(learning=learning) as runtime,
        serving(runtime) as server,
        http(server) as client,
        client.post(PATH, json=[preference("a"), preference("b")]) as response,
    ):
        assert response.status == 503
        assert response.headers["Retry-After"] == "3"
        frames = await response.json()
    assert [frame["error"]["code"] for frame in frames] == ["storage_failed"] * 2
    assert [frame["retry_after"] for frame in frames] == [3, 3]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (OverloadedError("slow down", code="quota_exceeded"), 429, "quota_exceeded"),
        (IterationError("broken"), 500, "iteration_failed"),
        (KeyError("secret"), 500, "internal_error"),
    ],
)
async def test_a_failure_is_told_and_a_foreign_one_tells_nothing(
    error: Exception, status: int, code: str
) -> None:
    learning = NullLearning("null")
    learning.failure = error
    async with (
        NullRuntime(learning=learning) as runtime,
        serving(runtime) as server,
        http(server) as client,
        client.post(PATH, json=preference("a")) as response,
    ):
        assert response.status == status
        frame = await response.json()
    assert frame["error"]["code"] == code
    assert "secret" not in str(frame)
    assert ("retry_after" in frame) == (status == 429)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"[[]", b"\xff", b'{"id": "\xff"}'])
async def test_a_body_that_is_no_event_is_refused(body: bytes) -> None:
    async with (
        NullRuntime(learning=NullLearning("null")) as runtime,
        serving(runtime) as server,
        http(server) as client,
        client.post(PATH, data=body, headers={"Content-Type": "application/json"}) as response,
    ):
        assert response.status == 400
        assert (await response.json())["error"]["code"] == "invalid_json"


# Who says it.


@pytest.mark.parametrize(
    ("query", "headers", "source"),
    [
        ({}, {}, "127.0.0.1"),
        ({}, {"X-Feedback-Source": "ann"}, "ann"),
        ({"source": "bob"}, {"X-Feedback-Source": "ann"}, "bob"),
        ({"source": "Zo\u00eb & co"}, {}, "Zo\u00eb & co"),
    ],
)
async def test_the_source_is_what_the_request_says_or_else_the_peer(
    query: dict[str, str], headers: dict[str, str], source: str
) -> None:
    learning = NullLearning("null")
    async with (
        NullRuntime(learning=learning) as runtime,
        serving(runtime) as server,
        http(server) as client,
        client.post(PATH, json=preference("a"), params=query, headers=headers) as response,
    ):
        assert response.status == 200
    assert list(learning.events) == [(source, "a")]


async def test_a_source_that_is_none_is_refused() -> None:
    async with (
        NullRuntime(learning=NullLearning("null")) as runtime,
        serving(runtime) as server,
        http(server) as client,
    ):
        for query, headers, param in (
            ({"source": ""}, {}, "source"),
            ({}, {"X-Feedback-Source": "x" * 300}, "X-Feedback-Source"),
        ):
            async with client.post(
                PATH, json=preference("a"), params=query, headers=headers
            ) as response:
                assert response.status == 400
                assert (await response.json())["error"]["param"] == param


# Recording.


async def test_answers_are_recorded_for_their_source_unless_they_should_not_be() -> None:
    learning = NullLearning("null")
    hello = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    async with (
        NullRuntime(learning=learning) as runtime,
        serving(runtime) as server,
        http(server) as client,
    ):
        ids = {}
        for name, extra in (
            ("peer", {}),
            ("named", {"user": "ann"}),
            ("two", {"n": 2, "safety_identifier": "bob"}),
            ("off", {"store": False}),
        ):
            async with client.post("/v1/chat/completions", json={**hello, **extra}) as response:
                ids[name] = (await response.json())["id"]
        body = {"prompt": ["x", "y"], "max_tokens": 2, "user": "ann"}
        async with client.post("/v1/completions", json=body) as response:
            ids["text"] = (await response.json())["id"]
    assert {id: source for id, (source, _) in learning.responses.items()} == {
        ids["peer"]: "127.0.0.1",
        ids["named"]: "ann",
        f"{ids['two']}:0": "bob",
        f"{ids['two']}:1": "bob",
        f"{ids['text']}-0": "ann",
        f"{ids['text']}-1": "ann",
    }


# Export and deletion.


async def test_an_export_is_one_object_per_line_however_many_there_are() -> None:
    learning = NullLearning("null")
    async with (
        NullRuntime(learning=learning) as runtime,
        serving(runtime) as server,
        http(server) as client,
    ):
        for i in range(300):
            await runtime.feedback(preference(str(i), chosen=f"{i} " * 400), source="ann")
        async with client.get(f"{PATH}/export") as response:
            assert response.content_type == "application/x-ndjson"
            lines = (await response.text()).splitlines()
        assert [line.count('"source":"ann"') for line in lines] == [1] * 300
        async with client.get(f"{PATH}/export", params={"adapter": "other"}) as response:
            assert response.status == 200
            assert await response.text() == ""


async def test_an_export_that_fails_half_way_is_cut_off_and_not_shortened() -> None:
    class Failing(NullLearning):
        async def export(self, adapter: str | None) -> Any:
            for _ in range(3):
                yield {"text": "x" * (1 << 17)}
            raise StorageError("the disk cannot be read")

    async with (
        NullRuntime(learning=Failing("null")) as runtime,
        serving(runtime) as server,
        http(server) as client,
        client.get(f"{PATH}/export") as response,
    ):
        assert response.status == 200
        with pytest.raises(Exception, match=r"not completed|payload|reset|disconnected"):
            await response.read()


async def test_a_persons_feedback_is_deleted_by_name_and_never_by_accident() -> None:
    learning = NullLearning("null")
    async with (
        NullRuntime(learning=learning) as runtime,
        serving(runtime) as server,
        http(server) as client,
    ):
        await runtime.feedback(preference("a"), source="ann")
        await runtime.feedback(preference("b"), source="127.0.0.1")
        async with client.delete(PATH) as response:
            assert response.status == 400
            assert (await response.json())["error"]["param"] == "source"
        async with client.delete(PATH, params={"source": "ann"}) as response:
            assert await response.json() == {
                "object": "feedback.deleted",
                "source": "ann",
                "deleted": 1,
            }
    assert list(learning.events) == [("127.0.0.1", "b")]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", PATH),
        ("DELETE", f"{PATH}?source=x"),
        ("GET", f"{PATH}/export"),
        ("GET", "/v1/adapters"),
        ("GET", "/v1/adapters/1"),
        ("POST", "/v1/adapters/1/promote"),
        ("POST", "/v1/adapters/1/rollback"),
    ],
)
async def test_a_server_that_does_not_learn_says_so(method: str, path: str) -> None:
    async with NullRuntime() as runtime, serving(runtime) as server, http(server) as client:
        json = preference("a") if path == PATH else None
        async with client.request(method, path, json=json) as response:
            assert response.status == 400
            assert (await response.json())["error"]["code"] == "learning_off"


async def test_a_get_that_is_no_websocket_says_what_is_here() -> None:
    async with (
        NullRuntime(learning=NullLearning("null")) as runtime,
        serving(runtime) as server,
        http(server) as client,
        client.get(PATH) as response,
    ):
        assert response.status == 426
        assert response.headers["Upgrade"] == "websocket"
        assert (await response.json())["error"]["code"] == "websocket_required"
