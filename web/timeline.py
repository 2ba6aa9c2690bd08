"""What the lanes did: /v1/timeline, for Perfetto or as records."""

from __future__ import annotations

import asyncio
import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from ..runtime.errors import RequestError
from ..runtime.scheduling.timeline import chrome_trace
from .edge import json_response, printable

if TYPE_CHECKING:
    from ..runtime.scheduling.timeline import TimelineSnapshot
    from .backend import Backend

FORMATS: Final = ("chrome", "records")
FEW: Final = 256
"""Up to so many iterations are shaped on the event loop (well under a few milliseconds)."""


class TimelineRoutes:
    """The handler for the timeline."""

    def __init__(self, runtime: Backend) -> None:
        self._runtime = runtime

    def table(self) -> list[web.RouteDef]:
        """All routes."""
        return [web.get("/v1/timeline", self.timeline)]

    async def timeline(self, request: web.Request) -> web.Response:
        """GET /v1/timeline.

        ``?seconds=`` is how far back to go (all that is remembered), ``?format=`` is "chrome", a
        trace that Perfetto opens, or "records".
        """
        seconds, format = _seconds(request), _format(request)
        snapshot = self._runtime.timeline(seconds)
        epoch = datetime.now(UTC).timestamp() - snapshot.now_s

        def respond() -> web.Response:
            return _response(snapshot, epoch, format)

        if len(snapshot.iterations) <= FEW:
            return respond()
        return await asyncio.to_thread(respond)


def _response(snapshot: TimelineSnapshot, epoch: float, format: str) -> web.Response:
    if format == "records":
        body: dict[str, Any] = {"object": "timeline", "epoch": epoch, **snapshot.to_dict()}
        return json_response(body)
    return json_response(
        chrome_trace(snapshot, epoch),
        headers={"Content-Disposition": 'attachment; filename="cotune-trace.json"'},
    )


def _seconds(request: web.Request) -> float | None:
    given = request.query.get("seconds")
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0.0):
        raise RequestError(
            f"seconds is {printable(given)!r}; use a number above 0, or leave it out for all that "
            "is remembered",
            param="seconds",
        )
    return seconds


def _format(request: web.Request) -> str:
    given = request.query.get("format", FORMATS[0])
    if given not in FORMATS:
        raise RequestError(
            f"format is {printable(given)!r}; use one of {', '.join(FORMATS)}", param="format"
        )
    return given
