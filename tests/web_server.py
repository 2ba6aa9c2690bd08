"""A real server on a real port, for tests."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp

from cotune.web.server import ServerSettings, serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cotune.web.backend import Backend


@dataclass(frozen=True)
class Server:
    """Where it listens, and how to stop it (by `stop.set()`; then `task` ends)."""

    url: str
    stop: asyncio.Event
    task: asyncio.Task[None]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@asynccontextmanager
async def serving(runtime: Backend, **settings: Any) -> AsyncIterator[Server]:
    """`serve` as `cotune serve` runs it, on a port of the system's choice."""
    stop = asyncio.Event()
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    settings.setdefault("shutdown_timeout_s", 0.0)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(
            serve(
                runtime,
                ServerSettings(port=0, **settings),
                on_ready=ready.set_result,
                stop=stop,
            )
        )
        try:
            yield Server(await ready, stop, task)
        finally:
            stop.set()


@asynccontextmanager
async def http(server: Server, key: str | None = None) -> AsyncIterator[aiohttp.ClientSession]:
    """A client whose paths are the server's."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(server.url, headers=headers) as session:
        yield session
