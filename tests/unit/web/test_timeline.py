from __future__ import annotations

import math
import time
from typing import Any

import pytest

from cotune.runtime.scheduling.timeline import QuantumRecord, TimelineSnapshot
from cotune.runtime.types import SamplingParams
from cotune.tools.null_runtime import NullRuntime
from cotune.web.timeline import FEW
from web_server import http, serving


async def get(client: Any, path: str, status: int = 200) -> Any:
    async with client.get(path) as response:
        assert response.status == status, await response.text()
        return await response.json()


async def test_a_trace_that_perfetto_opens_is_what_comes_unless_asked_otherwise() -> None:
    async with (
        NullRuntime(manual=True) as runtime,
        serving(runtime) as server,
        http(server) as client,
        runtime.complete("x", SamplingParams(n=2, max_tokens=3)),
    ):
        runtime.step(3)
        runtime.records.mark("publication", "null@1")
        async with client.get("/v1/timeline") as response:
            assert response.headers["Content-Type"].startswith("application/json")
            assert "cotune-trace.json" in response.headers["Content-Disposition"]
            trace = await response.json()
        iterations = [e["args"] for e in trace["traceEvents"] if e.get("cat") == "iteration"]
        assert [told["decodes"] for told in iterations] == [2, 2, 2]
        assert [e["name"] for e in trace["traceEvents"] if e["ph"] == "i"] == ["publication"]
        assert abs(trace["otherData"]["began_unix_s"] - time.time()) < 60.0
        named = await get(client, "/v1/timeline?format=chrome")
        assert named["traceEvents"] == trace["traceEvents"]


async def test_records_are_the_snapshot_and_the_zero_of_its_clock() -> None:
    async with (
        NullRuntime(manual=True) as runtime,
        serving(runtime) as server,
        http(server) as client,
        runtime.complete("x", SamplingParams(max_tokens=3)),
    ):
        runtime.step(2)
        body = await get(client, "/v1/timeline?format=records")
        assert body["object"] == "timeline"
        assert abs(body["epoch"] + body["now_s"] - time.time()) < 60.0
        found = TimelineSnapshot.from_dict(body)
        assert found.iterations == runtime.timeline().iterations
        assert found.iterations[0].slack_s == math.inf


async def test_only_the_last_seconds_are_told_where_that_was_asked_for() -> None:
    async with (
        NullRuntime(manual=True) as runtime,
        serving(runtime) as server,
        http(server) as client,
    ):
        now_s = time.monotonic()
        for ended_s in (now_s - 5000.0, now_s):
            runtime.records.add_quantum(
                QuantumRecord("a", "step", 0, 0, ended_s - 1.0, ended_s, 0.0, None, 0, None)
            )
        body = await get(client, "/v1/timeline?format=records&seconds=1000.5")
        assert [quantum["ended_s"] for quantum in body["quanta"]] == [now_s]
        assert len((await get(client, "/v1/timeline?format=records"))["quanta"]) == 2


async def test_a_long_timeline_is_the_same_although_a_thread_shapes_it() -> None:
    async with (
        NullRuntime(manual=True) as runtime,
        serving(runtime) as server,
        http(server) as client,
        runtime.complete("x", SamplingParams(max_tokens=3, ignore_eos=True)),
    ):
        runtime.step(FEW + 1)
        body = await get(client, "/v1/timeline?format=records")
        assert len(body["iterations"]) == FEW + 1


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("seconds=0", "seconds"),
        ("seconds=-1", "seconds"),
        ("seconds=nan", "seconds"),
        ("seconds=inf", "seconds"),
        ("seconds=", "seconds"),
        ("seconds=soon", "seconds"),
        ("format=xml", "format"),
        ("format=", "format"),
    ],
)
async def test_a_wrong_query_is_refused_by_name(query: str, param: str) -> None:
    async with NullRuntime() as runtime, serving(runtime) as server, http(server) as client:
        error = (await get(client, f"/v1/timeline?{query}", 400))["error"]
        assert error["param"] == param
        assert "use " in error["message"]


async def test_the_timeline_is_behind_the_key() -> None:
    async with (
        NullRuntime() as runtime,
        serving(runtime, api_key="secret") as server,
        http(server) as stranger,
        http(server, "secret") as friend,
    ):
        await get(stranger, "/v1/timeline", 401)
        await get(friend, "/v1/timeline")
