from __future__ import annotations

from typing import Any

from cotune.runtime.learning.status import AdapterLearning, LearningStatus
from cotune.tools.null_learning import NullLearning
from cotune.tools.null_runtime import NullRuntime
from cotune.web.adapters import learning_body
from web_server import http, serving

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}


async def get(client: Any, path: str, status: int = 200) -> Any:
    async with client.get(path) as response:
        assert response.status == status
        return await response.json()


async def post(client: Any, path: str, status: int = 200, **body: Any) -> Any:
    async with client.post(path, json=body or None) as response:
        assert response.status == status, await response.text()
        return await response.json()


async def test_versions_are_listed_with_what_is_known_of_them() -> None:
    learning = NullLearning("tiny")
    learning.publish(win_rate=0.75)
    learning.refuse("entropy")
    async with (
        NullRuntime(served_name="tiny", learning=learning) as runtime,
        serving(runtime) as server,
        http(server) as client,
    ):
        listed = await get(client, "/v1/adapters")
        assert [version["id"] for version in listed["data"]] == ["tiny@1", "tiny@2"]
        first, second = listed["data"]
        assert (first["state"], first["is_live"]) == ("published", True)
        assert first["metrics"] == {"win_rate": 0.75}
        assert (second["state"], second["is_live"]) == ("refused", False)
        assert second["reasons"] == ["entropy"]
        assert second["parent"] == 1
        assert set(first["lineage"]) > {"steps", "samples", "tokens", "base_model"}
        assert await get(client, "/v1/adapters/tiny@1") == first
        assert await get(client, "/v1/adapters/2") == second
        assert (await get(client, "/v1/adapters?adapter=other"))["data"] == []
        for path in ("/v1/adapters/3", "/v1/adapters/other@1", "/v1/adapters/x"):
            error = (await get(client, path, 404))["error"]
            assert (error["code"], error["param"]) == ("version_not_found", "version")


async def test_an_adapter_whose_name_has_slashes_is_found() -> None:
    learning = NullLearning("org/tiny")
    learning.publish()
    async with (
        NullRuntime(served_name="org/tiny", learning=learning) as runtime,
        serving(runtime) as server,
        http(server) as client,
    ):
        assert (await get(client, "/v1/adapters/org/tiny@1"))["id"] == "org/tiny@1"
        await post(client, "/v1/adapters/org/tiny@1/rollback")
        assert learning.live == 0


async def test_promotion_and_rollback_decide_what_the_next_request_gets() -> None:
    learning = NullLearning("tiny")
    async with (
        NullRuntime(served_name="tiny", learning=learning) as runtime,
        serving(runtime) as server,
        http(server) as client,
    ):

        async def answers() -> str:
            fingerprint: str = (await post(client, CHAT, **HELLO))["system_fingerprint"]
            return fingerprint

        assert await answers() == "cotune-base"
        learning.publish()
        learning.publish()
        assert await answers() == "tiny@2"
        body = await post(client, "/v1/adapters/tiny@2/rollback")
        assert body["object"] == "adapter.rolled_back"
        assert body["live"]["id"] == "tiny@1"
        assert body["live"]["is_live"] is True
        assert await answers() == "tiny@1"
        assert (await post(client, "/v1/adapters/1/rollback"))["live"] is None
        assert await answers() == "cotune-base"
        body = await post(client, "/v1/adapters/2/promote")
        assert (body["object"], body["live"]["id"]) == ("adapter.promoted", "tiny@2")
        assert await answers() == "tiny@2"
        assert (await post(client, "/v1/adapters/0/promote"))["live"] is None
        assert await answers() == "cotune-base"


async def test_a_refused_version_goes_live_only_by_force() -> None:
    learning = NullLearning("tiny")
    learning.refuse("probe_loss")
    async with (
        NullRuntime(served_name="tiny", learning=learning) as runtime,
        serving(runtime) as server,
        http(server) as client,
    ):
        error = (await post(client, "/v1/adapters/1/promote", 409))["error"]
        assert error["code"] == "version_refused"
        assert learning.live == 0
        await post(client, "/v1/adapters/1/promote", 400, force="yes")
        await post(client, "/v1/adapters/1/promote", force=True)
        assert learning.live == 1
        error = (await post(client, "/v1/adapters/7/rollback", 404))["error"]
        assert error["code"] == "version_not_found"
        learning.publish()
        error = (await post(client, "/v1/adapters/1/rollback", 409))["error"]
        assert error["code"] == "version_not_live"


async def test_the_state_of_learning_has_the_served_model_on_top() -> None:
    learning = NullLearning("null")
    async with (
        NullRuntime(learning=learning) as runtime,
        serving(runtime) as server,
        http(server) as client,
    ):
        id = (await post(client, CHAT, **HELLO))["id"]
        await post(client, "/v1/feedback", id="a", type="edit", response_id=id, text="better")
        await post(client, "/v1/feedback", id="b", type="rating", response_id=id, rating=1)
        learning.publish()
        learning.refuse("probe_loss", "entropy")
        learning.leave_undecided("not_better")
        body = await get(client, "/v1/learning")
    assert body["enabled"] is True
    assert body["events"] == 2
    assert body["events_by_type"] == {"edit": 1, "rating": 1}
    assert body["pairs"] == {"queued": 1}
    assert body["live_version"] == 1
    assert body["candidates"] == {
        "passed": 1,
        "refused": 1,
        "refused_by_reason": {"entropy+probe_loss": 1},
        "undecided": 1,
        "undecided_by_reason": {"not_better": 1},
    }
    (adapter,) = body["adapters"]
    assert adapter.items() <= body.items()
    assert adapter["training"]["loss"] is None


def test_each_adapter_has_its_own_part_and_the_served_one_is_found_by_name() -> None:
    status = LearningStatus(
        enabled=True,
        events={"rating": 3},
        adapters=(
            AdapterLearning(adapter="other", live_version=9, pairs={"trained": 1}),
            AdapterLearning(adapter="mine", live_version=4, pairs={"queued": 2}, win_rate=0.5),
        ),
    )
    body = learning_body(status, "mine")
    assert (body["adapter"], body["live_version"], body["pairs"]) == ("mine", 4, {"queued": 2})
    assert body["win_rate"] == 0.5
    assert [part["adapter"] for part in body["adapters"]] == ["other", "mine"]


async def test_a_server_that_does_not_learn_tells_so_and_has_all_fields() -> None:
    async with NullRuntime() as runtime, serving(runtime) as server, http(server) as client:
        body = await get(client, "/v1/learning")
    assert body["enabled"] is False
    assert (body["events"], body["pairs"], body["live_version"]) == (0, {}, 0)
    assert body["candidates"] == {
        "passed": 0,
        "refused": 0,
        "refused_by_reason": {},
        "undecided": 0,
        "undecided_by_reason": {},
    }
    assert body["adapters"] == []
