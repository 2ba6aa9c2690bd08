"""Opens the port, and closes it in order.

start     the caller enters its Runtime, then awaits `serve`
running   until `stop` is set
stop      1. /ready says 503, new requests get 503 with Retry-After
          2. the port is closed; connections that are idle are closed
          3. feedback that was read is answered, and its WebSockets are closed with 1001
          4. running requests finish, for at most `shutdown_timeout_s`
          5. the rest are cancelled, and their pages freed
          6. `serve` returns; the caller leaves its Runtime
"""

from __future__ import annotations

import asyncio
import errno
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from aiohttp import web

from ..runtime.errors import ConfigError
from .adapters import AdapterRoutes
from .edge import Edge, InFlight
from .feedback import FeedbackRoutes
from .metrics import Metrics
from .page import add_page
from .routes import Routes
from .settings import ServerSettings
from .timeline import TimelineRoutes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from .backend import Backend

__all__ = ["ServerSettings", "make_app", "serve"]

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S: Final = 2.0
"""For connections to be closed once no request is left."""


class _Lifecycle:
    """Whether the server is stopping, and what it still answers."""

    def __init__(self, in_flight: InFlight, feedback: FeedbackRoutes) -> None:
        self.in_flight = in_flight
        self.feedback = feedback
        self.is_stopping = False


_LIFECYCLE: Final = web.AppKey("lifecycle", _Lifecycle)


def make_app(runtime: Backend, settings: ServerSettings) -> web.Application:
    """The application, for a runner of the caller's own. Most want `serve`.

    Run it with ``handler_cancellation=True``: otherwise a client that leaves is noticed only when
    its answer is done, and its pages are held until then.
    """
    metrics = Metrics(runtime)
    edge = Edge(settings, metrics)
    feedback = FeedbackRoutes(runtime, settings, metrics)
    lifecycle = _Lifecycle(edge.in_flight, feedback)
    app = web.Application(middlewares=[edge.middleware], client_max_size=settings.max_body_bytes)
    app[_LIFECYCLE] = lifecycle
    app.on_response_prepare.append(edge.sign)
    routes = Routes(runtime, settings, metrics, lambda: lifecycle.is_stopping)
    app.add_routes(routes.table())
    app.add_routes(feedback.table())
    app.add_routes(AdapterRoutes(runtime, settings).table())
    app.add_routes(TimelineRoutes(runtime).table())
    add_page(app)

    async def listen(app: web.Application) -> AsyncIterator[None]:
        runtime.add_listener(metrics)
        yield
        runtime.remove_listener(metrics)

    app.cleanup_ctx.append(listen)
    return app


async def serve(
    runtime: Backend,
    settings: ServerSettings,
    *,
    on_ready: Callable[[str], None] | None = None,
    stop: asyncio.Event,
) -> None:
    """Serve an entered runtime until `stop` is set, then shut down in order.

    Args:
        runtime: answers the requests. It stays the caller's; it has been drained on return.
        settings: where to listen, and the limits.
        on_ready: called once with the server's URL, when connections are accepted.
        stop: set it to shut down, from a signal handler for instance.

    Raises:
        ConfigError: a setting is wrong, or the port cannot be opened.

    Cancelling this shuts down as well, without waiting for running requests.
    """
    settings.validate()
    app = make_app(runtime, settings)
    lifecycle = app[_LIFECYCLE]
    runner = web.AppRunner(
        app,
        access_log=None,  # ours is in edge.py
        handler_cancellation=True,
        keepalive_timeout=settings.keepalive_timeout_s,
        shutdown_timeout=_CLOSE_TIMEOUT_S,
    )
    await runner.setup()
    try:
        host = settings.host.strip("[]")  # as in a URL, or bare
        site = web.TCPSite(runner, host, settings.port, backlog=settings.backlog)
        try:
            await site.start()
        except OSError as error:
            raise _cannot_listen(settings, error) from error
        url = _url(settings.host, site.port)
        logger.info("serving %s at %s", runtime.served_name, url)
        if on_ready is not None:
            on_ready(url)
        await stop.wait()
        lifecycle.is_stopping = True
        await site.stop()
        with suppress(TimeoutError):  # those that take longer are waited for with the requests
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await lifecycle.feedback.close()
        await _finish_requests(runtime, lifecycle.in_flight, settings.shutdown_timeout_s)
    finally:
        lifecycle.is_stopping = True
        lifecycle.in_flight.cancel()
        await runner.cleanup()
    logger.info("stopped serving at %s", url)


async def _finish_requests(runtime: Backend, in_flight: InFlight, timeout_s: float) -> None:
    logger.info("shutting down: %d requests are being answered", len(in_flight))
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    await runtime.drain(timeout_s)
    # The runtime is done; slow readers may still be taking their answers.
    with suppress(TimeoutError):
        async with asyncio.timeout_at(max(deadline, loop.time() + _CLOSE_TIMEOUT_S)):
            await in_flight.wait_idle()
        return
    logger.warning("shutting down: cancelling %d requests after %g s", len(in_flight), timeout_s)
    in_flight.cancel()
    with suppress(TimeoutError):
        async with asyncio.timeout(_CLOSE_TIMEOUT_S):
            await in_flight.wait_idle()


def _cannot_listen(settings: ServerSettings, error: OSError) -> ConfigError:
    where = f"{settings.host}:{settings.port}"
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"port {settings.port} on {settings.host} is in use by another program; choose another "
            "with --port (0 takes any free one), or stop that program",
            param="port",
            code="port_in_use",
        )
    if error.errno == errno.EACCES:
        return ConfigError(
            f"this user may not open {where}; choose a port from 1024 on with --port",
            param="port",
            code="port_forbidden",
        )
    return ConfigError(
        f"cannot listen on {where}: {error.strerror or error}; --host must be an address of this "
        "machine (127.0.0.1 for this machine alone, 0.0.0.0 for all its addresses)",
        param="host",
        code="host_unusable",
    )


def _url(host: str, port: int) -> str:
    if ":" in host:
        host = f"[{host.strip('[]')}]"
    return f"http://{host}:{port}"
