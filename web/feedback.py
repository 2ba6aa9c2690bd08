"""Feedback over HTTP: a WebSocket for those who send much, and POST, export and deletion.

    client                                  server
    ──────                                  ──────
    {"id":"a","type":"rating",...}   ─►
    {"id":"b","type":"edit",...}     ─►
                                     ◄─     {"type":"ack","id":"b","duplicate":false}
                                     ◄─     {"type":"ack","id":"a","duplicate":false}
    what is no event                 ─►
                                     ◄─     {"type":"error","id":null,"error":{...}}

An acknowledgement is sent when its event is durable. Events are worked on side by side, so that
many share one write to disk; those that speak of the same response, text or event keep their order.
A client that is told nothing, because its connection broke, sends the event again under its id.

Nothing grows without bound: a connection has a window of events (and of bytes) that await their
answers, an answer leaves the window when the socket has taken it, and while the window is full the
connection is not read. A client that does not read is cut off after `stall_timeout_s`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import orjson
from aiohttp import WSCloseCode, WSMsgType, hdrs, web

from ..runtime.errors import (
    CotuneError,
    DrainingError,
    LearningOffError,
    OverloadedError,
    RequestError,
)
from .edge import (
    KEY_PROTOCOL,
    RECORD,
    SUBPROTOCOL,
    is_websocket,
    json_response,
    read_body,
    source_of,
    subprotocols,
)
from .errors import Refusal, RefusalError, refusal_for
from .requests import as_object, parse_feedback, parse_json, parse_source

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence

    from .backend import Backend
    from .metrics import Metrics
    from .settings import ServerSettings

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S: Final = 2.0
"""For a client to answer a close frame."""
_EXPORT_BYTES: Final = 1 << 16
"""Rows of an export are written in pieces of about this size."""
_MAX_SHOWN_ID_CHARS: Final = 256
_WINDOW_FRAMES: Final = 4
"""Frames of the largest size that a connection's window holds."""
_SUBJECTS: Final = ("id", "target", "response_id", "chosen_id", "rejected_id")
_TEXTS: Final = ("chosen", "rejected", "completion")


@dataclass(frozen=True, slots=True)
class Answer:
    """What is said about one event: its frame, and why it was refused, if it was."""

    frame: dict[str, Any]
    refusal: Refusal | None = None


class Turns:
    """Lets events run side by side, except those that speak of the same thing.

    They take their turns in the order in which they arrive.
    """

    def __init__(self) -> None:
        self._last: dict[str, asyncio.Event] = {}

    def take(self, body: Mapping[str, object]) -> Turn:
        """The turn of an event that has just arrived."""
        subjects = _subjects(body)
        before = {self._last[subject] for subject in subjects if subject in self._last}
        turn = Turn(self, subjects, before)
        for subject in subjects:
            self._last[subject] = turn.is_over
        return turn

    def forget(self, turn: Turn) -> None:
        """A turn is over; nobody needs to wait for it."""
        for subject in turn.subjects:
            if self._last.get(subject) is turn.is_over:
                del self._last[subject]

    def __len__(self) -> int:
        return len(self._last)


class Turn:
    """One event's place among those of its subjects. Use it with ``async with``."""

    def __init__(self, turns: Turns, subjects: set[str], before: set[asyncio.Event]) -> None:
        self._turns = turns
        self._before = before
        self.subjects = subjects
        self.is_over = asyncio.Event()

    async def __aenter__(self) -> None:
        try:
            for earlier in self._before:
                await earlier.wait()
        except asyncio.CancelledError:
            self._end()
            raise

    async def __aexit__(self, *exception: object) -> None:
        self._end()

    def _end(self) -> None:
        self.is_over.set()
        self._turns.forget(self)


class Window:
    """How many events, and bytes of them, one connection may have under way. One task waits."""

    def __init__(self, max_events: int, max_bytes: int) -> None:
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._has_left = asyncio.Event()
        self.events = 0
        self.bytes = 0

    async def wait_room(self) -> None:
        """Wait until another event may enter, of whatever size: the last one may stand out."""
        while self.events >= self._max_events or self.bytes >= self._max_bytes:
            self._has_left.clear()
            await self._has_left.wait()

    def enter(self, size: int) -> None:
        """An event of `size` bytes is under way."""
        self.events += 1
        self.bytes += size

    def leave(self, size: int) -> None:
        """It was answered."""
        self.events -= 1
        self.bytes -= size
        self._has_left.set()


class FeedbackRoutes:
    """The handlers, and the WebSockets that are open."""

    def __init__(self, runtime: Backend, settings: ServerSettings, metrics: Metrics) -> None:
        self._runtime = runtime
        self._settings = settings
        self._metrics = metrics
        self._connections: set[_Connection] = set()
        self._all_closed = asyncio.Event()
        self._all_closed.set()
        self._is_closing = False

    def table(self) -> list[web.RouteDef]:
        """All routes."""
        return [
            web.get("/v1/feedback", self.connect, allow_head=False),
            web.post("/v1/feedback", self.post),
            web.delete("/v1/feedback", self.delete),
            web.get("/v1/feedback/export", self.export, allow_head=False),
        ]

    async def close(self) -> None:
        """Read no more from any WebSocket; wait until all are answered and closed with 1001."""
        self._is_closing = True
        for connection in self._connections:
            connection.stop()
        await self._all_closed.wait()

    async def connect(self, request: web.Request) -> web.StreamResponse:
        """GET /v1/feedback: a WebSocket."""
        self._check_connection(request)
        source = source_of(request)
        socket = web.WebSocketResponse(
            protocols=(SUBPROTOCOL,),
            timeout=_CLOSE_TIMEOUT_S,
            heartbeat=self._settings.heartbeat_s,
            max_msg_size=self._settings.max_frame_bytes,
            autoclose=False,  # what was read is answered first
            autoping=False,  # a pong, too, must not wait for its reader for ever
            compress=False,  # a small frame must not become a large one
            writer_limit=0,  # look after each frame whether the client reads
        )
        begin = partial(self._begin_message, turns=Turns(), source=source)
        connection = _Connection(socket, request, self._settings, begin)
        with self._open(connection):
            try:
                await socket.prepare(request)
            except ConnectionError:  # it left during its handshake
                record = request[RECORD]
                record.is_client_gone, record.error = True, "client_gone"
                return web.Response()
            if await connection.run():
                code = WSCloseCode.GOING_AWAY if self._is_closing else WSCloseCode.OK
                await connection.close(code)
        return socket

    async def post(self, request: web.Request) -> web.Response:
        """POST /v1/feedback: an event, or a list of them, answered in order.

        A single event that is refused has the status of its error. A list has 200 if anything in
        it was stored, otherwise the status of its first error.
        """
        source = source_of(request)
        body = parse_feedback(await read_body(request, self._settings), self._settings)
        turns = Turns()
        if not isinstance(body, list):
            answer = await self._begin(body, turns, source)
            return _answered(request, [answer], answer.frame)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._begin(event, turns, source)) for event in body]
        answers = [task.result() for task in tasks]
        return _answered(request, answers, [answer.frame for answer in answers])

    async def delete(self, request: web.Request) -> web.Response:
        """DELETE /v1/feedback?source=: all that a person said and was answered."""
        source = request.query.get("source")
        if source is None:
            raise RequestError(
                "source is missing; name whose feedback to delete, as /v1/feedback?source=NAME",
                param="source",
            )
        deleted = await self._runtime.forget(parse_source(source, param="source"))
        return json_response({"object": "feedback.deleted", "source": source, "deleted": deleted})

    async def export(self, request: web.Request) -> web.StreamResponse:
        """GET /v1/feedback/export: one JSON object per line, of ``?adapter=`` or of all."""
        adapter = request.query.get("adapter")
        async with aclosing(_pieces(self._runtime.export_feedback(adapter))) as pieces:
            piece = await anext(pieces, None)  # what fails at once gets a status
            response = web.StreamResponse(
                headers={"Content-Type": "application/x-ndjson", "Cache-Control": "no-store"}
            )
            record = request[RECORD]
            try:
                await response.prepare(request)
                while piece is not None:
                    async with asyncio.timeout(self._settings.stall_timeout_s):
                        await response.write(piece)
                    piece = await anext(pieces, None)
                async with asyncio.timeout(self._settings.stall_timeout_s):
                    await response.write_eof()
            except ConnectionError:
                record.is_client_gone, record.error = True, "client_gone"
            except TimeoutError:
                record.is_client_gone, record.error = True, "stalled"
                _abort(request)
            except CotuneError as error:
                # Its status was sent; a body that is cut off says that something is missing.
                logger.error("the export of feedback ended early: %s", error)
                record.error = refusal_for(error).code
                _abort(request)
            return response

    def _check_connection(self, request: web.Request) -> None:
        if not is_websocket(request):
            raise RefusalError(
                Refusal(
                    426,
                    "GET /v1/feedback opens a WebSocket; connect with a WebSocket client, POST "
                    "events to this address, or GET /v1/feedback/export",
                    code="websocket_required",
                    headers=((hdrs.UPGRADE, "websocket"),),
                )
            )
        offered = subprotocols(request)
        if offered and SUBPROTOCOL not in offered:
            raise RequestError(
                f"the WebSocket offers no subprotocol that this server speaks; offer {SUBPROTOCOL} "
                f"(beside {KEY_PROTOCOL}KEY, where that is used), or none",
                code="unknown_subprotocol",
            )
        if self._is_closing:
            raise DrainingError("the server is shutting down; connect to another one")
        if not self._runtime.learning().enabled:
            raise LearningOffError(
                "this server does not learn, so it takes no feedback; start it with "
                "learning.enabled"
            )
        if len(self._connections) >= self._settings.max_feedback_connections:
            raise OverloadedError(
                f"{len(self._connections)} feedback connections are open, which is all this server "
                "takes; try again, or POST",
                code="too_many_connections",
            )

    @contextmanager
    def _open(self, connection: _Connection) -> Iterator[None]:
        self._connections.add(connection)
        self._all_closed.clear()
        self._metrics.feedback_connections += 1
        try:
            yield
        finally:
            self._metrics.feedback_connections -= 1
            self._connections.discard(connection)
            if not self._connections:
                self._all_closed.set()

    def _begin_message(
        self, data: str | bytes, turns: Turns, source: str
    ) -> Coroutine[Any, Any, Answer]:
        """`_begin` for a message of a WebSocket."""
        try:
            if isinstance(data, bytes):
                raise RequestError(
                    "the frame is binary; send each event as a text frame that holds JSON",
                    code="binary_frame",
                )
            body = parse_json(data, what="the frame")
        except RequestError as error:
            return self._refuse_unread(error)
        return self._begin(body, turns, source)

    def _begin(self, event: object, turns: Turns, source: str) -> Coroutine[Any, Any, Answer]:
        """Take an event's turn, now, and return what will answer it."""
        try:
            body = as_object(event, what="the event")
        except RequestError as error:
            return self._refuse_unread(error)
        return self._answer(body, turns.take(body), source)

    async def _refuse_unread(self, error: RequestError) -> Answer:
        refusal = refusal_for(error)
        self._metrics.on_unreadable_feedback(refusal.code or refusal.type)
        return _refused(None, refusal)

    async def _answer(self, body: Mapping[str, object], turn: Turn, source: str) -> Answer:
        """Hand an event to the runtime when it is its turn."""
        try:
            async with turn:
                done = await self._runtime.feedback(body, source=source)
        except CotuneError as error:
            refusal = refusal_for(error)
            if refusal.status >= 500:
                logger.error("feedback was not stored: %s", error)
        except Exception as error:
            # The boundary: one event's failure is not its connection's.
            logger.exception("feedback was not stored")
            refusal = refusal_for(error)
        else:
            return Answer({"type": "ack", "id": done.id, "duplicate": done.duplicate})
        return _refused(body.get("id"), refusal)


class _Connection:
    """One WebSocket, from its handshake to its close frame.

    Args:
        socket: not prepared yet.
        request: what it came from.
        settings: the limits.
        begin: takes a message and returns what will answer it.
    """

    def __init__(
        self,
        socket: web.WebSocketResponse[Any],
        request: web.Request,
        settings: ServerSettings,
        begin: Callable[[str | bytes], Coroutine[Any, Any, Answer]],
    ) -> None:
        self._socket = socket
        self._request = request
        self._begin = begin
        self._stall_timeout_s = settings.stall_timeout_s
        self._window = Window(settings.feedback_window, _WINDOW_FRAMES * settings.max_frame_bytes)
        self._reader: asyncio.Task[None] | None = None
        self._is_stopped = False
        self._is_gone = False

    def stop(self) -> None:
        """Read no more. What was read is still answered."""
        self._is_stopped = True
        if self._reader is not None:
            self._reader.cancel()

    async def run(self) -> bool:
        """Answer until the client leaves or `stop` is called. Whether the client is still there."""
        if self._is_stopped:
            return True
        async with asyncio.TaskGroup() as answers:
            self._reader = answers.create_task(self._read(answers))
        return not self._is_gone

    async def close(self, code: WSCloseCode) -> None:
        """Say goodbye, for as long as that may take."""
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self._socket.close(code=code)
        except TimeoutError:
            self._lose("stalled")

    async def _read(self, answers: asyncio.TaskGroup) -> None:
        # `stop` cancels this. A message that `receive` has returned is under way before the next
        # await, so that none is read and left without an answer.
        while True:
            await self._window.wait_room()
            message = await self._socket.receive()
            match message.type:
                case WSMsgType.TEXT | WSMsgType.BINARY:
                    size = len(message.data)
                    self._window.enter(size)
                    answers.create_task(self._answer(self._begin(message.data), size))
                case WSMsgType.PING:
                    await self._send(message.data, WSMsgType.PONG)
                case WSMsgType.PONG:
                    pass
                case _:  # it closes, is gone, or broke the protocol
                    return

    async def _answer(self, answer: Coroutine[Any, Any, Answer], size: int) -> None:
        try:
            await self._send(orjson.dumps((await answer).frame), WSMsgType.TEXT)
        finally:
            self._window.leave(size)

    async def _send(self, data: bytes, kind: WSMsgType) -> None:
        """Send a frame; wait while the client does not read, up to a limit."""
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                await self._socket.send_frame(data, kind)
        except TimeoutError:
            self._lose("stalled")
        except ConnectionError:
            self._lose("client_gone")

    def _lose(self, why: str) -> None:
        """The client cannot be told anything any more."""
        self._is_gone = True
        record = self._request[RECORD]
        record.is_client_gone, record.error = True, why
        _abort(self._request)
        self.stop()


def _subjects(body: Mapping[str, object]) -> set[str]:
    """What an event speaks of: ids of events and responses, or the texts that it compares."""
    subjects = {value for name in _SUBJECTS if isinstance(value := body.get(name), str)}
    if "prompt" in body:
        texts = sorted(value for name in _TEXTS if isinstance(value := body.get(name), str))
        texts_and_prompt = orjson.dumps([body["prompt"], texts])
        subjects.add(hashlib.blake2b(texts_and_prompt, digest_size=16).hexdigest())
    return subjects


def _refused(id: object, refusal: Refusal) -> Answer:
    is_shown = isinstance(id, str) and len(id) <= _MAX_SHOWN_ID_CHARS
    frame = {"type": "error", "id": id if is_shown else None, **refusal.body}
    for name, value in refusal.headers:
        if name == hdrs.RETRY_AFTER:
            frame["retry_after"] = int(value)
    return Answer(frame, refusal)


def _answered(request: web.Request, answers: Sequence[Answer], body: object) -> web.Response:
    """The response to a POST: an error's status only if nothing was stored."""
    refusals = [answer.refusal for answer in answers if answer.refusal is not None]
    if not refusals:
        return json_response(body)
    request[RECORD].error = refusals[0].code or refusals[0].type
    if len(refusals) < len(answers):
        return json_response(body)
    return json_response(body, status=refusals[0].status, headers=dict(refusals[0].headers))


async def _pieces(rows: AsyncIterator[Mapping[str, object]]) -> AsyncGenerator[bytes, None]:
    """Rows as lines of JSON, several at a time."""
    piece = bytearray()
    try:
        async for row in rows:
            piece += orjson.dumps(dict(row), option=orjson.OPT_APPEND_NEWLINE)
            if len(piece) >= _EXPORT_BYTES:
                yield bytes(piece)
                piece.clear()
        if piece:
            yield bytes(piece)
    finally:
        if isinstance(rows, AsyncGenerator):
            await rows.aclose()


def _abort(request: web.Request) -> None:
    """Cut the connection, unsent data included."""
    if (transport := request.transport) is not None:
        transport.abort()
