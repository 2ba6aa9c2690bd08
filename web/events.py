"""Server-sent events to one client: written in batches, never faster than it reads."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.http import StreamWriter

from .shape import DONE

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from .metrics import Metrics


class StalledClientError(ConnectionError):
    """The client read nothing for too long; its connection was cut."""


class EventStream:
    """The response of one streaming request.

    One `send` is one write to the socket: the caller joins all events that are ready. When the
    client reads more slowly than they come, `send` waits until the socket's buffers have room
    again, which pauses this stream alone; at most about 64 KiB wait in this process by then.

    Nothing is sent before `open`, so that a request that fails before its first token still gets
    a status of its own.
    """

    def __init__(self, request: web.Request, metrics: Metrics, *, stall_timeout_s: float) -> None:
        self._request = request
        self._metrics = metrics
        self._stall_timeout_s = stall_timeout_s
        self._response: web.StreamResponse | None = None
        writer = request.writer
        assert isinstance(writer, StreamWriter)
        self._writer = writer

    @property
    def is_open(self) -> bool:
        """Whether the status line is on its way."""
        return self._response is not None

    async def open(self) -> None:
        """Send the headers (with the first events, in one packet)."""
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                # Tells nginx and its kin to pass events on as they come.
                "X-Accel-Buffering": "no",
            }
        )
        await response.prepare(self._request)
        self._response = response

    async def send(self, events: bytes) -> None:
        """Write events. Waits for a slow reader.

        Raises:
            ConnectionError: the client is gone, or has stalled (`StalledClientError`).
        """
        if not events:
            return
        # `write` would drain by itself now and then, without a limit on the time.
        await self._writer.write(events, drain=False)
        if self._request.protocol.writing_paused:
            await self._wait_for_reader(self._writer.drain())

    async def close(self, events: bytes = b"") -> web.StreamResponse:
        """Write the last events and [DONE], and end the response."""
        assert self._response is not None
        await self.send(events + DONE)
        await self._wait_for_reader(self._response.write_eof())
        return self._response

    def abandon(self) -> web.StreamResponse:
        """The unfinished response of a client that has gone; aiohttp finds the socket closed."""
        assert self._response is not None
        return self._response

    async def _wait_for_reader(self, writing: Awaitable[None]) -> None:
        self._metrics.paused_streams += 1
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                await writing
        except TimeoutError:
            if (transport := self._request.transport) is not None:
                transport.abort()
            raise StalledClientError(
                f"the client read nothing for {self._stall_timeout_s:g} s; disconnected"
            ) from None
        finally:
            self._metrics.paused_streams -= 1
