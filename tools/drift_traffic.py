"""The people of a drift run: those who give feedback, and those who chat meanwhile.

Both are ordinary clients of the server, over HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from ..runtime.errors import CotuneError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import aiohttp

    from ..runtime.types import Message
    from .drift_stream import Sent

WINDOW: Final = 64
"""Events of one user that may await their acknowledgement."""
MAX_CHATS: Final = 64
"""Chat requests at once; one that would be more is left out, and counted."""


class DriftError(CotuneError):
    """The run cannot go on: the server or the learner does not do what it should."""


class User:
    """One person's feedback, over a WebSocket. Use it with ``async with``.

    Args:
        session: of the server.
        source: whose feedback it is.
        answered: called with the source and the frame of each answer.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        source: str,
        answered: Callable[[str, Mapping[str, Any]], None],
    ) -> None:
        self._session = session
        self._source = source
        self._answered = answered
        self._stack = contextlib.AsyncExitStack()
        self._room = asyncio.Semaphore(WINDOW)
        self._waiting: set[str] = set()
        self._all_answered = asyncio.Event()
        self._is_leaving = False
        self._socket: aiohttp.ClientWebSocketResponse

    async def __aenter__(self) -> User:
        async with contextlib.AsyncExitStack() as stack:
            self._socket = await stack.enter_async_context(
                self._session.ws_connect("/v1/feedback", params={"source": self._source})
            )
            group = await stack.enter_async_context(asyncio.TaskGroup())
            stack.push_async_callback(self._leave)
            group.create_task(self._read())
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exception: Any) -> None:
        await self._stack.__aexit__(*exception)

    async def _leave(self) -> None:
        """Say goodbye; the reader ends."""
        self._is_leaving = True
        await self._socket.close()

    async def send(self, event: Sent) -> None:
        """Send one event; waits while too many await their answer."""
        await self._room.acquire()
        self._waiting.add(event.id)
        self._all_answered.clear()
        await self._socket.send_json(event.frame())

    async def wait_answers(self) -> None:
        """Until everything that was sent has been answered."""
        if self._waiting:
            await self._all_answered.wait()

    async def _read(self) -> None:
        async for message in self._socket:
            frame = json.loads(message.data)
            if frame["id"] not in self._waiting:
                raise DriftError(f"the server answers what {self._source} did not send: {frame}")
            self._waiting.discard(frame["id"])
            self._answered(self._source, frame)
            self._room.release()
            if not self._waiting:
                self._all_answered.set()
        if not self._is_leaving:
            raise DriftError(
                f"the server closed the connection of {self._source} with {len(self._waiting)} "
                f"events unanswered (code {self._socket.close_code})"
            )


class ChatTraffic:
    """Conversations that arrive at random times, and how long their answers take.

    Args:
        session: of the server.
        rate: requests per second, on average (Poisson).
        max_tokens: of each answer, exactly.
        prompts: what may be asked now.
        is_learning: whether the learner works now.
        seed: of arrivals and choices.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        rate: float,
        max_tokens: int,
        prompts: Callable[[], Sequence[tuple[Message, ...]]],
        is_learning: Callable[[], bool],
        seed: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session = session
        self._rate = rate
        self._max_tokens = max_tokens
        self._prompts = prompts
        self._is_learning = is_learning
        self._random = random.Random(seed)
        self._clock = clock
        self._requests: Counter[str] = Counter()
        self._ttfts_s: list[tuple[bool, float]] = []  # was it learning, time
        self._gaps_s: list[tuple[bool, float]] = []

    async def run(self) -> None:
        """Ask until cancelled."""
        if not self._rate:
            return
        async with asyncio.TaskGroup() as group:
            live: set[asyncio.Task[None]] = set()
            while True:
                await asyncio.sleep(self._random.expovariate(self._rate))
                prompts = self._prompts()
                if len(live) >= MAX_CHATS or not prompts:
                    self._requests["left_out"] += 1
                    continue
                task = group.create_task(self._ask(self._random.choice(prompts)))
                live.add(task)
                task.add_done_callback(live.discard)

    async def _ask(self, prompt: tuple[Message, ...]) -> None:
        """One streamed answer: its time to first text, and the gaps between its events."""
        is_learning = self._is_learning()
        body = {
            "messages": list(prompt),
            "max_tokens": self._max_tokens,
            "ignore_eos": True,
            "stream": True,
        }
        last_s = self._clock()
        times = self._ttfts_s
        async with self._session.post("/v1/chat/completions", json=body) as response:
            if response.status != 200:
                self._requests[f"status_{response.status}"] += 1
                return
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    self._requests["failed"] += 1
                    return
                if not any(choice["delta"].get("content") for choice in event["choices"]):
                    continue
                now_s = self._clock()
                times.append((is_learning, now_s - last_s))
                last_s, times = now_s, self._gaps_s
        self._requests["completed"] += 1

    def report(self) -> dict[str, Any]:
        """Requests by how they ended, TTFT and gaps between events of one answer."""
        return {
            "requests": dict(self._requests),
            "ttft": _times(self._ttfts_s),
            "tbt": _times(self._gaps_s),
        }


def _times(times: Sequence[tuple[bool, float]]) -> dict[str, Any]:
    """Over all requests, and apart for those that came while the learner worked or was idle."""
    return {
        "all": quantiles([s for _, s in times]),
        "while_learning": quantiles([s for is_learning, s in times if is_learning]),
        "while_idle": quantiles([s for is_learning, s in times if not is_learning]),
    }


def quantiles(values: Sequence[float]) -> dict[str, float | int | None]:
    """n, p50 and p99 (nearest rank) of some times in seconds, in milliseconds."""
    ordered = sorted(values)
    found: dict[str, float | int | None] = {"n": len(ordered)}
    for percent in (50, 99):
        rank = math.ceil(percent / 100 * len(ordered)) - 1
        found[f"p{percent}_ms"] = ordered[rank] * 1e3 if ordered else None
    return found
