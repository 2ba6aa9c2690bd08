from __future__ import annotations

import gzip
import logging
from typing import Any

import orjson
import pytest

from cotune.tools.null_runtime import NullRuntime
from cotune.web.edge import printable
from cotune.web.errors import RefusalError
from web_server import http, serving

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}


def check_error(body: Any, code: str | None) -> dict[str, Any]:
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == code
    assert body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error


# Keys.


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Bearer sesame2",
        "Bearer sesam",
        "Basic sesame",
        "sesame",
        "Bearer s\xe9same",
    ],
)
async def test_without_the_key_nothing_is_answered(header: str | None) -> None:
    async with NullRuntime() as runtime, serving(runtime, api_key="sesame") as server:
        headers = {} if header is None else {"Authorization": header}
        async with http(server) as client:
            for method, path in (
                ("POST", CHAT),
                ("GET", "/v1/models"),
                ("GET", "/metrics"),
                ("GET", "/version"),
                ("POST", "/tokenize"),
                ("GET", "/no/such/path"),
                ("OPTIONS", CHAT),
            ):
                async with client.request(method, path, headers=headers) as response:
                    assert response.status == 401, path
                    assert response.headers["WWW-Authenticate"].startswith("Bearer")
                    error = (await response.json())["error"]
                    assert error["code"] in ("missing_api_key", "invalid_api_key")
                    assert "sesame" not in error["message"]


async def test_with_the_key_all_is_answered_and_probes_need_none() -> None:
    async with NullRuntime() as runtime, serving(runtime, api_key="sesame") as server:
        async with http(server, key="sesame") as client:
            async with client.post(CHAT, json=HELLO) as response:
                assert response.status == 200
            lower = {"Authorization": "bearer sesame"}
            async with client.get("/v1/models", headers=lower) as response:
                assert response.status == 200
        async with http(server) as client:
            for path in ("/health", "/ready", "/"):
                async with client.get(path) as response:
                    assert response.status == 200, path


async def test_a_key_lets_the_server_listen_on_every_address() -> None:
    async with (
        NullRuntime() as runtime,
        serving(runtime, api_key="sesame", host="0.0.0.0") as server,
    ):
        assert server.url.startswith("http://0.0.0.0:")


# Bodies.


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
async def test_another_content_type_is_refused(content_type: str | None) -> None:
    async with NullRuntime() as runtime, serving(runtime) as server, http(server) as client:
        headers = {} if content_type is None else {"Content-Type": content_type}
        async with client.post(
            CHAT,
            data=orjson.dumps(HELLO),
            headers=headers,
            skip_auto_headers=["Content-Type"],
        ) as response:
            assert response.status == 400
            error = check_error(await response.json(), "unsupported_content_type")
            assert "application/json" in error["message"]


async def test_a_content_type_may_name_its_charset() -> None:
    async with NullRuntime() as runtime, serving(runtime) as server, http(server) as client:
        headers = {"Content-Type": "application/json; charset=utf-8"}
        async with client.post(CHAT, data=orjson.dumps(HELLO), headers=headers) as response:
            assert response.status == 200


@pytest.mark.parametrize("is_chunked", [True, False])
async def test_a_body_over_the_limit_is_refused_however_it_is_sent(is_chunked: bool) -> None:
    async with (
        NullRuntime() as runtime,
        serving(runtime, max_body_bytes=1000) as server,
        http(server) as client,
    ):
        body = orjson.dumps({**HELLO, "user": "x" * 2000})

        async def pieces() -> Any:
            for start in range(0, len(body), 100):
                yield body[start : start + 100]

        async with client.post(
            CHAT,
            data=pieces() if is_chunked else body,
            headers={"Content-Type": "application/json"},
        ) as response:
            assert response.status == 413
            error = check_error(await response.json(), "request_too_large")
            assert "1000" in error["message"]


async def test_a_compressed_body_counts_at_its_full_size() -> None:
    async with (
        NullRuntime() as runtime,
        serving(runtime, max_body_bytes=10_000) as server,
        http(server) as client,
    ):
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        small = gzip.compress(orjson.dumps(HELLO))
        async with client.post(CHAT, data=small, headers=headers) as response:
            assert response.status == 200
        bomb = gzip.compress(orjson.dumps({**HELLO, "user": "x" * 1_000_000}))
        assert len(bomb) < 10_000
        async with client.post(CHAT, data=bomb, headers=headers) as response:
            assert response.status == 413
        async with client.post(CHAT, data=b"no gzip", headers=headers) as response:
            assert response.status == 400
            assert b"error" in await response.read()


# Paths.


@pytest.mark.parametrize(
    "path", ["/nope", "/v1", "/v1/chat/completions/", "/v1/embeddings", "/%ff", "/a%0aX-Evil:%201"]
)
async def test_an_unknown_path_is_an_error_object(path: str) -> None:
    async with NullRuntime() as runtime, serving(runtime) as server, http(server) as client:
        from yarl import URL

        async with client.get(URL(server.url + path, encoded=True)) as response:
            assert response.status == 404
            check_error(await response.json(), "unknown_url")


async def test_a_wrong_method_says_which_are_right() -> None:
    async with NullRuntime() as runtime, serving(runtime) as server, http(server) as client:
        async with client.get(CHAT) as response:
            assert response.status == 405
            assert response.headers["Allow"] == "POST"
            check_error(await response.json(), "method_not_allowed")
        async with client.delete("/v1/models") as response:
            assert response.status == 405
            assert response.headers["Allow"] == "GET, HEAD"


# Ids.


async def test_a_request_has_an_id_its_own_or_a_new_one() -> None:
    async with NullRuntime() as runtime, serving(runtime) as server, http(server) as client:
        headers = {"X-Request-Id": "trace-7/a"}
        async with client.post(CHAT, json=HELLO, headers=headers) as response:
            assert response.headers["X-Request-Id"] == "trace-7/a"
        async with client.get("/health") as one, client.get("/nope") as two:
            assert one.headers["X-Request-Id"] != two.headers["X-Request-Id"]


async def test_one_trace_id_may_cover_several_answers_and_each_has_its_own_id() -> None:
    async with NullRuntime() as runtime, serving(runtime) as server, http(server) as client:
        ids = set()
        for _ in range(2):
            headers = {"X-Request-Id": "trace"}
            async with client.post(CHAT, json=HELLO, headers=headers) as response:
                ids.add((await response.json())["id"])
        assert len(ids) == 2
        async with client.post(CHAT, json={**HELLO, "request_id": "mine"}) as response:
            assert (await response.json())["id"] == "chatcmpl-mine"


async def test_a_header_that_is_no_id_is_refused() -> None:
    async with (
        NullRuntime() as runtime,
        serving(runtime) as server,
        http(server) as client,
        client.get("/health", headers={"X-Request-Id": "a b"}) as probe,
        client.get("/v1/models", headers={"X-Request-Id": "a b"}) as response,
    ):
        assert probe.status == 200  # whoever probes is no caller who could mend it
        assert response.status == 400
        assert (await response.json())["error"]["param"] == "X-Request-Id"


# Browsers.


async def test_other_origins_are_not_allowed_unless_named() -> None:
    origin = {"Origin": "https://app.example"}
    preflight = {**origin, "Access-Control-Request-Method": "POST"}
    async with NullRuntime() as runtime:
        async with serving(runtime) as server, http(server) as client:
            async with client.post(CHAT, json=HELLO, headers=origin) as response:
                assert "Access-Control-Allow-Origin" not in response.headers
            async with client.options(CHAT, headers=preflight) as response:
                assert response.status == 405
        async with (
            serving(runtime, allowed_origins=("https://app.example",), api_key="k") as server,
            http(server) as client,
        ):
            # A browser asks without the key, and must be told before it sends it.
            async with client.options(CHAT, headers=preflight) as response:
                assert response.status == 204
                assert response.headers["Access-Control-Allow-Origin"] == "https://app.example"
                assert "Authorization" in response.headers["Access-Control-Allow-Headers"]
            key = {"Authorization": "Bearer k"}
            stream = {**HELLO, "stream": True}
            async with client.post(CHAT, json=stream, headers={**origin, **key}) as response:
                assert response.headers["Access-Control-Allow-Origin"] == "https://app.example"
                assert response.headers["Vary"] == "Origin"
            async with client.post(CHAT, json=HELLO, headers=origin) as response:
                # The page may read why.
                assert response.status == 401
                assert response.headers["Access-Control-Allow-Origin"] == "https://app.example"
            other = {"Origin": "https://evil.example", **key}
            async with client.post(CHAT, json=HELLO, headers=other) as response:
                assert "Access-Control-Allow-Origin" not in response.headers


async def test_any_origin_is_a_star() -> None:
    async with (
        NullRuntime() as runtime,
        serving(runtime, allowed_origins=("*",)) as server,
        http(server) as client,
        client.get("/v1/models", headers={"Origin": "https://a.example"}) as response,
    ):
        assert response.headers["Access-Control-Allow-Origin"] == "*"


async def test_the_page_loads_nothing_from_elsewhere() -> None:
    async with NullRuntime() as runtime, serving(runtime) as server, http(server) as client:
        async with client.get("/") as response:
            assert response.content_type == "text/html"
            assert "default-src 'none'" in response.headers["Content-Security-Policy"]
            page = await response.text()
        assert "http://" not in page
        assert "https://" not in page
        for path in ("/v1/chat/completions", "/v1/timeline", "/metrics"):
            assert path in page


# Failures of our own.


async def test_a_bug_is_a_500_that_hides_its_reason_and_logs_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with NullRuntime() as runtime, serving(runtime) as server, http(server) as client:

        def broken() -> Any:
            raise KeyError("/etc/secret")

        monkeypatch.setattr(runtime, "model_names", broken)
        async with client.get("/v1/models") as response:
            assert response.status == 500
            body = await response.text()
        assert "secret" not in body
        check_error(orjson.loads(body), "internal_error")
        assert "/etc/secret" in caplog.text
        async with client.get("/health") as response:
            assert response.status == 200


# The log.


async def test_a_request_is_one_line_in_the_access_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="cotune.access"):
        async with NullRuntime() as runtime, serving(runtime) as server, http(server) as client:
            headers = {"X-Request-Id": "seven"}
            async with client.post(CHAT, json=HELLO, headers=headers) as response:
                answer = await response.json()
            async with client.post(CHAT, json={**HELLO, "n": 0}) as response:
                assert response.status == 400
            async with client.get("/health") as response:
                assert response.status == 200
    lines = [record.getMessage() for record in caplog.records if record.name == "cotune.access"]
    assert len(lines) == 2  # probes are quiet
    usage = answer["usage"]
    for part in (
        "method=POST",
        f"path={CHAT}",
        "status=200",
        "id=seven",
        f"answer={answer['id']}",
        "model=null",
        f"prompt_tokens={usage['prompt_tokens']}",
        "completion_tokens=3",
    ):
        assert part in lines[0].split()
    assert "status=400" in lines[1]
    assert "error=invalid_request_error" in lines[1]


@pytest.mark.parametrize("text", ["a\nb", "a b", "\x1b[31m", "\udcff", "x" * 1000, "\u202e"])
def test_what_a_client_sends_stays_on_its_line(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert " " not in shown
    assert len(shown) <= 210
    shown.encode()


def test_a_refusal_is_an_exception_with_its_message() -> None:
    from cotune.web.errors import Refusal

    assert str(RefusalError(Refusal(400, "why"))) == "why"
