"""The whole circle over HTTP: a model answers, is rated, learns, publishes, and is rolled back."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from cotune import Runtime
from cotune.runtime.learning.config import GateConfig, LearningConfig, TrainingConfig
from tiny_models import save_model_directory
from web_server import http, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import aiohttp

MODEL = "tiny"
PREFERRED, OTHER = "hello hello hello", "the old river"
# A gate that lets pass whatever is better on the few held-out pairs: this is about the circle.
LEARNING = LearningConfig(
    enabled=True,
    adapters=("tutor",),
    training=TrainingConfig(
        batch_size=4, learning_rate=5e-3, batch_wait_s=0.2, epochs=4, warmup_steps=0, beta=0.5
    ),
    gate=GateConfig(
        held_out_share=0.3,
        min_held_out=4,
        candidate_steps=8,
        candidate_wait_s=0.2,
        confidence_z=0.5,
        max_probe_increase=20.0,
        min_entropy_ratio=0.0,
        max_repetition=1.0,
        max_chosen_drop=20.0,
    ),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_directory(tmp_path_factory.mktemp("models") / MODEL)


@asynccontextmanager
async def learning_server(model: Path, state: Path) -> AsyncIterator[aiohttp.ClientSession]:
    async with (
        Runtime(model, device="cpu", learning=LEARNING, state_dir=state, num_pages=256) as runtime,
        serving(runtime) as server,
        http(server) as client,
    ):
        yield client


async def get(client: aiohttp.ClientSession, path: str) -> Any:
    async with client.get(path) as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def chat(client: aiohttp.ClientSession, text: str, **fields: Any) -> Any:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 6, **fields}
    async with client.post("/v1/chat/completions", json=body) as response:
        assert response.status == 200, await response.text()
        return await response.json()


def preference(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "id": f"p{number}",
        "type": "preference",
        "prompt": [{"role": "user", "content": f"what did she say number {number}"}],
        "chosen": PREFERRED,
        "rejected": OTHER,
        **fields,
    }


async def learning_until(client: aiohttp.ClientSession, condition: Any) -> Any:
    """`/v1/learning`, once it says so."""
    async with asyncio.timeout(240):
        while not condition(status := await get(client, "/v1/learning")):  # noqa: ASYNC110
            await asyncio.sleep(0.1)  # a client can only ask
    return status


async def live_version(client: aiohttp.ClientSession) -> int:
    return int((await get(client, "/v1/learning"))["live_version"])


async def roll_back(client: aiohttp.ClientSession) -> int:
    """Go back from the version that is live; its number."""
    while True:
        live = await live_version(client)
        async with client.post(f"/v1/adapters/{live}/rollback") as response:
            if response.status == 200:
                return live
            # Another one went live in between.
            assert response.status == 409
            assert (await response.json())["error"]["code"] == "version_not_live"
            assert await live_version(client) > live


async def test_feedback_becomes_a_version_that_answers_until_it_is_rolled_back(
    model: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    async with learning_server(model, state) as client:
        first = await chat(client, "hello")
        assert first["system_fingerprint"].endswith("base")
        async with client.ws_connect("/v1/feedback") as ws:
            await ws.send_json(
                {"id": "r", "type": "rating", "response_id": first["id"], "rating": 1}
            )
            for number in range(48):
                await ws.send_json(preference(number))
            answers = [await ws.receive_json() for _ in range(49)]
        assert {answer["type"] for answer in answers} == {"ack"}
        status = await learning_until(client, lambda status: status["live_version"] > 0)
        assert status["events"] == 49
        assert status["candidates"]["passed"] >= 1

        # It goes on learning, so another version may go live between any two requests.
        answer = await chat(client, "hello")
        name, _, version = answer["system_fingerprint"].rpartition("@")
        assert name.endswith(MODEL)
        assert status["live_version"] <= int(version) <= await live_version(client)
        assert answer["model"] == MODEL
        pinned = await chat(client, "hello", model=f"{MODEL}@0", temperature=0)
        assert pinned["system_fingerprint"].endswith("base")
        again = await chat(client, "hello", model="tutor", temperature=0)
        assert again["choices"] == pinned["choices"], "a tenant of its own has learned nothing"

        listed = await get(client, "/v1/adapters")
        assert int(version) in [entry["version"] for entry in listed["data"]]
        live = await roll_back(client)
        assert await live_version(client) != live
        async with client.post(f"/v1/adapters/{live}/rollback") as response:
            assert response.status == 409
            assert (await response.json())["error"]["code"] == "version_not_live"
        async with client.post(f"/v1/adapters/{live}/promote") as response:
            assert response.status == 200
        metrics = await (await client.get("/metrics")).text()
        assert f'cotune_live_version{{adapter="{MODEL}"' in metrics
    # A restart finds it.
    async with learning_server(model, state) as client:
        assert await live_version(client) >= live
        answer = await chat(client, "hello")
        assert not answer["system_fingerprint"].endswith("base")
        async with client.post("/v1/feedback", json=preference(3)) as response:
            assert (await response.json())["duplicate"] is True


async def test_feedback_is_exported_as_trl_reads_it_and_a_persons_data_is_removed(
    model: Path, tmp_path: Path
) -> None:
    async with learning_server(model, tmp_path / "state") as client:
        both = await chat(client, "what is the name", n=2, user="ann", temperature=1.0)
        events = [
            preference(0),
            {"id": "e", "type": "edit", "response_id": f"{both['id']}:0", "text": PREFERRED},
            {"id": "bad", "type": "rating", "response_id": "nobody", "rating": 1},
        ]
        async with client.post(
            "/v1/feedback", json=events, headers={"X-Feedback-Source": "ann"}
        ) as response:
            stored = await response.json()
        kinds = [answer["type"] for answer in stored]
        assert kinds == ["ack", "ack", "error"]
        assert stored[2]["error"]["code"] == "response_not_found"
        async with client.get("/v1/feedback/export") as response:
            rows = [json.loads(line) for line in (await response.text()).splitlines()]
        assert [row["id"] for row in rows] == ["p0", "e"]
        for row in rows:
            assert row["chosen"][0]["content"] == PREFERRED
            assert row["prompt"][-1]["role"] == "user"
        async with client.delete("/v1/feedback", params={"source": "ann"}) as response:
            assert response.status == 200
        async with client.get("/v1/feedback/export") as response:
            assert await response.text() == ""
        again = {"id": "f", "type": "rating", "response_id": f"{both['id']}:1", "rating": -1}
        async with client.post("/v1/feedback", json=again) as response:
            assert response.status == 404, "the answer itself was ann's, and is gone"


async def test_an_answer_that_was_not_to_be_stored_cannot_be_rated(
    model: Path, tmp_path: Path
) -> None:
    async with learning_server(model, tmp_path / "state") as client:
        answer = await chat(client, "hello", store=False)
        event = {"id": "r", "type": "rating", "response_id": answer["id"], "rating": 1}
        async with client.post("/v1/feedback", json=event) as response:
            assert response.status == 404
            assert (await response.json())["error"]["param"] == "response_id"


async def test_a_server_that_does_not_learn_says_so(model: Path) -> None:
    async with (
        Runtime(model, device="cpu", num_pages=256) as runtime,
        serving(runtime) as server,
        http(server) as client,
    ):
        assert (await get(client, "/v1/learning"))["enabled"] is False
        async with client.post("/v1/feedback", json=preference(0)) as response:
            assert response.status == 400
            assert (await response.json())["error"]["code"] == "learning_off"
