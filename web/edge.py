"""What happens to every request before and after its handler: id, key, errors, log, counts."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import orjson
from aiohttp import hdrs, web

from ..runtime.errors import CotuneError, RequestError
from .errors import INTERNAL, Refusal, RefusalError, refusal_for
from .requests import parse_request_id, parse_source

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ..runtime.types import Usage
    from .metrics import Metrics
    from .settings import ServerSettings

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

logger = logging.getLogger(__name__)
access_log = logging.getLogger("cotune.access")

OPEN_PATHS: Final = frozenset({"/", "/health", "/ready"})
"""Answered without a key: probes have none, and the page asks its reader for one."""

QUIET_PATHS: Final = frozenset({"/health", "/ready", "/metrics", "/v1/learning"})
"""Asked every few seconds; logged at DEBUG."""

SUBPROTOCOL: Final = "cotune.feedback"
"""What the feedback WebSocket speaks."""

KEY_PROTOCOL: Final = "cotune-key."
"""A subprotocol that begins with this carries the key, as base64url without padding.

Browsers cannot set a WebSocket's headers, but its protocols: `SUBPROTOCOL` and this one.
"""

CLIENT_GONE: Final = 499
"""Stands in log and metrics for a request whose client left; it is never sent."""


@dataclass(slots=True)
class RequestRecord:
    """What is told about a request when it is over. Its handler fills in what it learns."""

    id: str
    """What the client calls it (X-Request-Id), else `made_id`."""
    made_id: str
    """Unique."""
    answer: str | None = None
    """The id of the answer."""
    usage: Usage | None = None
    model: str | None = None
    error: str | None = None
    is_client_gone: bool = False
    """Half-way through its answer."""


RECORD: Final = web.RequestKey("record", RequestRecord)


@dataclass(slots=True)
class InFlight:
    """The requests that are being answered; shutdown waits for them."""

    _tasks: set[asyncio.Task[object]] = field(default_factory=set)
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._idle.set()

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, task: asyncio.Task[object]) -> None:
        """A request begins; `task` is its handler's."""
        self._tasks.add(task)
        self._idle.clear()

    def remove(self, task: asyncio.Task[object]) -> None:
        """It is over."""
        self._tasks.discard(task)
        if not self._tasks:
            self._idle.set()

    async def wait_idle(self) -> None:
        """Wait until no request is being answered."""
        await self._idle.wait()

    def cancel(self) -> None:
        """Cancel all that is left."""
        for task in self._tasks:
            task.cancel()


def json_response(
    value: object, *, status: int = 200, headers: dict[str, str] | None = None
) -> web.Response:
    """A response with a JSON body."""
    return web.Response(
        body=orjson.dumps(value),
        status=status,
        headers=headers,
        content_type="application/json",
    )


def refusal_response(refusal: Refusal) -> web.Response:
    """A response with an OpenAI error object."""
    return json_response(refusal.body, status=refusal.status, headers=dict(refusal.headers))


class Edge:
    """The outermost layer of the application. `middleware` and `sign` are given to aiohttp."""

    def __init__(self, settings: ServerSettings, metrics: Metrics) -> None:
        self._metrics = metrics
        self._origins = frozenset(settings.allowed_origins)
        self._key_digest = None if settings.api_key is None else _digest(settings.api_key)
        self.in_flight = InFlight()

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer `request`; whatever goes wrong becomes an error object."""
        started_s = time.monotonic()
        made_id = uuid.uuid4().hex
        record = request[RECORD] = RequestRecord(made_id, made_id)
        task = asyncio.current_task()
        assert task is not None
        self.in_flight.add(task)
        status = CLIENT_GONE
        try:
            response = await self._answer(request, record, handler)
            if not record.is_client_gone:
                status = response.status
            return response
        finally:
            self.in_flight.remove(task)
            self._tell(request, record, status, time.monotonic() - started_s)

    async def sign(self, request: web.Request, response: web.StreamResponse) -> None:
        """Put the request's id, and what browsers ask for, on a response (any response)."""
        response.headers[hdrs.SERVER] = "cotune"
        if (record := request.get(RECORD)) is not None:
            response.headers["X-Request-Id"] = record.id
        if self._origins and (origin := self._allowed(request.headers.get(hdrs.ORIGIN))):
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
            response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = "X-Request-Id, Retry-After"
            if origin != "*":
                response.headers[hdrs.VARY] = hdrs.ORIGIN

    async def _answer(
        self, request: web.Request, record: RequestRecord, handler: Handler
    ) -> web.StreamResponse:
        try:
            if self._is_preflight(request):
                return _preflight_response()
            self._check_key(request)
            self._check_origin(request)
            given = request.headers.get("X-Request-Id")
            if given is not None and request.path not in OPEN_PATHS:
                record.id = parse_request_id(given, param="X-Request-Id")
            return await handler(request)
        except web.HTTPException as error:
            refusal = _refusal_for_http(request, error)
        except (CotuneError, RefusalError) as error:
            refusal = refusal_for(error)
            if refusal.status >= 500 and refusal.status != 503:
                logger.error("request %s failed: %s", record.id, error)
        except Exception:
            # The boundary: whatever else went wrong is ours to mend, and the client's to know of.
            logger.exception("request %s failed", record.id)
            refusal = INTERNAL
        record.error = refusal.code or refusal.type
        return refusal_response(refusal)

    def _check_key(self, request: web.Request) -> None:
        if self._key_digest is None or request.path in OPEN_PATHS:
            return
        scheme, _, key = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        if not key and is_websocket(request):
            scheme, key = "bearer", _key_among(subprotocols(request))
        if scheme.lower() != "bearer" or not key:
            raise RefusalError(
                Refusal(
                    401,
                    "no API key was given; send it as 'Authorization: Bearer KEY'",
                    code="missing_api_key",
                    headers=((hdrs.WWW_AUTHENTICATE, "Bearer"),),
                )
            )
        # Digests have one length, so that not even the key's is told by the time this takes.
        if not hmac.compare_digest(_digest(key.strip()), self._key_digest):
            raise RefusalError(
                Refusal(
                    401,
                    "the API key is not the one this server was started with",
                    code="invalid_api_key",
                    headers=((hdrs.WWW_AUTHENTICATE, 'Bearer error="invalid_token"'),),
                )
            )

    def _check_origin(self, request: web.Request) -> None:
        """Refuse what another site's page sends without the browser having asked us first.

        That is a WebSocket, and a POST whose body is not JSON; before any other request with an
        effect a browser asks (a preflight), and is not answered.
        """
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is None or self._allowed(origin) is not None:
            return
        is_asked = request.method != hdrs.METH_POST or request.content_type == "application/json"
        if (is_asked and not is_websocket(request)) or _is_same_host(origin, request):
            return
        raise RefusalError(
            Refusal(
                403,
                f"pages of {printable(origin)} may not use this server; add that origin to its "
                "allowed_origins",
                code="origin_not_allowed",
            )
        )

    def _allowed(self, origin: str | None) -> str | None:
        if origin is None:
            return None
        if "*" in self._origins:
            return "*"
        return origin if origin in self._origins else None

    def _is_preflight(self, request: web.Request) -> bool:
        return (
            request.method == hdrs.METH_OPTIONS
            and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers
            and self._allowed(request.headers.get(hdrs.ORIGIN)) is not None
        )

    def _tell(
        self, request: web.Request, record: RequestRecord, status: int, seconds: float
    ) -> None:
        resource = request.match_info.route.resource
        route = "unknown" if resource is None else resource.canonical
        method = request.method if request.method in hdrs.METH_ALL else "other"
        self._metrics.on_http(method, route, status, seconds)
        level = logging.DEBUG if request.path in QUIET_PATHS else logging.INFO
        if not access_log.isEnabledFor(level):
            return
        parts = [
            f"method={method} path={printable(request.raw_path)} status={status}",
            f"ms={seconds * 1e3:.1f} id={record.id}",
        ]
        if record.answer is not None:
            parts.append(f"answer={record.answer}")
        if record.model is not None:
            parts.append(f"model={printable(record.model)}")
        if (usage := record.usage) is not None:
            parts.append(
                f"prompt_tokens={usage.prompt_tokens} cached_tokens={usage.cached_tokens} "
                f"completion_tokens={usage.completion_tokens}"
            )
        if record.error is not None:
            parts.append(f"error={record.error}")
        access_log.log(level, " ".join(parts))


async def read_body(request: web.Request, settings: ServerSettings) -> bytes:
    """The body of a JSON request.

    Raises `RequestError` for another content type and `RefusalError` for a body that is too large
    (413) or too slow (408).
    """
    if request.content_type != "application/json":
        given = request.headers.get(hdrs.CONTENT_TYPE)
        raise RequestError(
            f"the content type is {'missing' if given is None else printable(given)}; send "
            "'Content-Type: application/json'",
            code="unsupported_content_type",
        )
    if (request.content_length or 0) > settings.max_body_bytes:
        raise _too_large(settings)
    try:
        async with asyncio.timeout(settings.read_timeout_s):
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise _too_large(settings) from None
    except TimeoutError:
        raise RefusalError(
            Refusal(
                408,
                f"the body did not arrive within {settings.read_timeout_s:g} s",
                code="request_timeout",
            )
        ) from None
    except web.RequestPayloadError as error:
        raise RequestError(
            f"the body cannot be read: {printable(str(error))}; check its length and encoding",
            code="invalid_body",
        ) from None


def printable(text: str, limit: int = 200) -> str:
    """Text of a client's making, safe to log and to send back: one line, not long."""
    text = text if len(text) <= limit else text[:limit] + "..."
    return "".join("\\x20" if c == " " else c if c.isprintable() else ascii(c)[1:-1] for c in text)


def is_websocket(request: web.Request) -> bool:
    """Whether the client asks for a WebSocket."""
    return request.headers.get(hdrs.UPGRADE, "").strip().lower() == "websocket"


def subprotocols(request: web.Request) -> list[str]:
    """What the client offers to speak on its WebSocket."""
    offered = ",".join(request.headers.getall(hdrs.SEC_WEBSOCKET_PROTOCOL, ()))
    return [name.strip() for name in offered.split(",") if name.strip()]


def source_of(request: web.Request) -> str:
    """Whose request it is: ``?source=``, else X-Feedback-Source, else the peer's address."""
    if (given := request.query.get("source")) is not None:
        return parse_source(given, param="source")
    if (given := request.headers.get("X-Feedback-Source")) is not None:
        return parse_source(given, param="X-Feedback-Source")
    return request.remote or "unknown"


def _key_among(offered: list[str]) -> str:
    """The key in a WebSocket's subprotocols; empty if there is none that can be read."""
    for name in offered:
        if name.startswith(KEY_PROTOCOL):
            encoded = name.removeprefix(KEY_PROTOCOL)
            try:
                data = base64.b64decode(encoded + "=" * (-len(encoded) % 4), b"-_", validate=True)
            except binascii.Error:
                return encoded  # wrong, and refused as such
            return data.decode("utf-8", "surrogateescape")
    return ""


def _is_same_host(origin: str, request: web.Request) -> bool:
    """Whether a page comes from this server. The scheme may differ: a proxy may end TLS."""
    return origin.partition("://")[2].lower() == request.headers.get(hdrs.HOST, "").lower()


def _too_large(settings: ServerSettings) -> RefusalError:
    return RefusalError(
        Refusal(
            413,
            f"the body is larger than {settings.max_body_bytes} bytes; send less, or raise the "
            "server's max_body_bytes",
            code="request_too_large",
        )
    )


def _refusal_for_http(request: web.Request, error: web.HTTPException) -> Refusal:
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return Refusal(
            405,
            f"{printable(request.path)} does not take {printable(error.method)}; use {allowed}",
            code="method_not_allowed",
            headers=((hdrs.ALLOW, allowed),),
        )
    if isinstance(error, web.HTTPNotFound):
        return Refusal(
            404,
            f"there is nothing at {printable(request.path)}; the API is at /v1/chat/completions, "
            "/v1/completions, /v1/models, /v1/feedback, /v1/learning and /v1/adapters",
            code="unknown_url",
        )
    return Refusal(error.status, error.reason, code="http_error")


def _preflight_response() -> web.Response:
    return web.Response(
        status=204,
        headers={
            hdrs.ACCESS_CONTROL_ALLOW_METHODS: "GET, POST, DELETE, OPTIONS",
            hdrs.ACCESS_CONTROL_ALLOW_HEADERS: (
                "Authorization, Content-Type, X-Request-Id, X-Feedback-Source"
            ),
            hdrs.ACCESS_CONTROL_MAX_AGE: "600",
        },
    )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
