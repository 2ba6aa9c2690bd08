"""`cotune chat`: a conversation in the terminal, with a model of its own or a running server.

    main thread                               loop thread
    ───────────                               ───────────
    read a line (input, with line editing)
    ask(messages) ───────────────────────►    a request: to the embedded runtime, or over HTTP
    print pieces  ◄──────────────────────     its text as it comes
    Ctrl-C ── cancel ────────────────────►    the request is aborted, the conversation goes on

The event loop has a thread of its own because reading a line blocks and because Ctrl-C is then what
it is in any terminal program: an exception in the main thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self, TextIO

from ..runtime.errors import ConfigError, CotuneError, RequestError
from ..runtime.types import Message, SamplingParams
from .live_server import AsyncServer, ServerError, told_error
from .options import (
    add_api_key_argument,
    add_general_arguments,
    add_runtime_arguments,
    api_key,
    loop_factory,
    runtime_config,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
    from types import TracebackType

EPILOG = """\
examples:
  cotune chat                                        the demo model
  cotune chat path/to/model --temperature 0
  cotune chat --lora-modules tutor=path/to/adapter --model-name tutor
  cotune chat --url http://127.0.0.1:8000            a server that is running
  printf 'Hello!\\nWhy?\\n' | cotune chat              one turn per line

in the conversation:
  /reset    forget what was said          /exit, Ctrl-D    leave
  Ctrl-C    stop the answer               /help            this list
"""

IN_CHAT_HELP = "/reset forgets what was said; /exit or Ctrl-D leaves; Ctrl-C stops an answer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``cotune chat``."""
    parser.usage = "cotune chat [MODEL] [flags]"
    parser.description = "Talk to a model: loaded here, or behind a running server (--url)."
    parser.epilog = EPILOG
    talk = parser.add_argument_group("conversation")
    talk.add_argument("--url", metavar="URL", help="a running server; no model is loaded here")
    add_api_key_argument(talk)
    talk.add_argument(
        "--model-name", metavar="NAME", help="model or adapter that answers (the base model)"
    )
    talk.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    talk.add_argument(
        "--stats", action="store_true", help="after each answer, tokens and speed on stderr"
    )
    sampling = parser.add_argument_group("sampling (where left out, the model's own defaults)")
    sampling.add_argument("--max-tokens", type=int, metavar="N", help="longest answer")
    sampling.add_argument("--temperature", type=float, metavar="X", help="0 is greedy")
    sampling.add_argument("--top-p", type=float, metavar="X")
    sampling.add_argument("--top-k", type=int, metavar="N")
    sampling.add_argument("--min-p", type=float, metavar="X")
    add_runtime_arguments(parser)
    add_general_arguments(parser, default_log_level="warning")


def run(args: argparse.Namespace) -> int:
    """Hold the conversation; the exit status."""
    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        seed=args.seed,
    )
    try:
        params.validate()
    except RequestError as error:
        raise ConfigError(error.message, param=error.param) from error
    partner: Partner
    if args.url is not None:
        if args.model is not None:
            raise ConfigError(
                f"MODEL is {args.model!r}, but --url was given and nothing is loaded here; "
                "use --model-name to choose among the server's models"
            )
        partner = ServerPartner(args.url, api_key(args), args.model_name, params)
    else:
        partner = EmbeddedPartner(args, params)
    system: list[Message] = []
    if args.system is not None:
        system.append({"role": "system", "content": args.system})
    with LoopThread(partner) as loop_thread:
        is_terminal = sys.stdin.isatty()
        if is_terminal:
            print(f"{partner.name}: {IN_CHAT_HELP}", file=sys.stderr)
        conversation = Conversation(loop_thread.ask, system, sys.stdout, stats=args.stats)
        return conversation.run(prompted_lines() if is_terminal else piped_lines(sys.stdin))


def prompted_lines() -> Iterator[str]:
    """What is typed, line by line, with the terminal's line editing; ends with Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() line editing and history
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # an unfinished line is thrown away, as shells do
            print()


def piped_lines(lines: Iterable[str]) -> Iterator[str]:
    """Lines of a file or pipe."""
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not valid UTF-8: {error}") from error


# -- the conversation ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AnswerStatistics:
    """What one answer took. Times in seconds, from the question on."""

    tokens: int
    first_s: float
    total_s: float

    def __str__(self) -> str:
        rate = self.tokens / self.total_s if self.total_s else 0.0
        return f"[{self.tokens} tokens, first after {self.first_s:.2f} s, {rate:.0f} tokens/s]"


class Answer(Protocol):
    """One answer on its way: iterate for pieces of text; then `tokens` is known."""

    tokens: int

    def __iter__(self) -> Iterator[str]: ...

    def stop(self) -> None:
        """Abort the request; the iteration ends after what has already come."""


class Conversation:
    """Turns of a conversation: owns the messages so far.

    Args:
        ask: starts the answer to a list of messages.
        beginning: messages that /reset goes back to.
        output: where answers go.
        stats: say tokens and speed after each answer, on stderr.
    """

    def __init__(
        self,
        ask: Callable[[Sequence[Message]], Answer],
        beginning: Sequence[Message],
        output: TextIO,
        *,
        stats: bool = False,
    ) -> None:
        self._ask = ask
        self._beginning = list(beginning)
        self._output = output
        self._stats = stats
        self.messages: list[Message] = list(beginning)

    def run(self, lines: Iterator[str]) -> int:
        """Answer each line until the lines end or /exit; 1 if any request failed."""
        failures = 0
        for line in lines:
            match line.strip():
                case "":
                    continue
                case "/exit":
                    break
                case "/reset":
                    self.messages = list(self._beginning)
                case "/help":
                    print(IN_CHAT_HELP, file=sys.stderr)
                case command if command.startswith("/") and " " not in command:
                    print(f"there is no {command}; {IN_CHAT_HELP}", file=sys.stderr)
                case text:
                    failures += not self._turn(text)
        return 1 if failures else 0

    def _turn(self, text: str) -> bool:
        """One question and its answer; False if it failed, and then it is not remembered."""
        question: Message = {"role": "user", "content": text}
        started_s = time.monotonic()
        first_s: float | None = None
        pieces: list[str] = []
        answer = self._ask([*self.messages, question])
        try:
            for piece in answer:
                if first_s is None:
                    first_s = time.monotonic() - started_s
                pieces.append(piece)
                print(piece, end="", file=self._output, flush=True)
        except KeyboardInterrupt:
            answer.stop()
            print(" [stopped]", end="", file=self._output)
        except CotuneError as error:
            if pieces:
                print(file=self._output, flush=True)
            print(f"cotune chat: {error}", file=sys.stderr)
            return False
        print(file=self._output, flush=True)
        said = "".join(pieces)
        if said:  # what was seen is what the model hears next, also when it was stopped
            self.messages += [question, {"role": "assistant", "content": said}]
        if self._stats and answer.tokens and first_s is not None:
            total_s = time.monotonic() - started_s
            print(AnswerStatistics(answer.tokens, first_s, total_s), file=sys.stderr)
        return True


# -- who answers ---------------------------------------------------------------------------------


class InputError(CotuneError):
    """What was piped in cannot be read."""


class Partner(Protocol):
    """Something that answers, entered and used on the loop thread."""

    name: str

    def open(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Load or connect; `name` is known within."""

    def answer(
        self, messages: Sequence[Message], say: Callable[[str], None]
    ) -> Coroutine[Any, Any, int]:
        """Hand the pieces of the answer to `say` as they come; returns the number of tokens."""


class EmbeddedPartner:
    """A runtime in this process."""

    def __init__(self, args: argparse.Namespace, params: SamplingParams) -> None:
        self._config = runtime_config(args)
        self._model_name: str | None = args.model_name
        self._params = params
        self._runtime: Any = None
        self.name = ""

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Load the model."""
        from ..runtime.runtime import Runtime

        async with Runtime(config=self._config) as self._runtime:
            names = [model.id for model in self._runtime.model_names()]
            if self._model_name is not None and self._model_name not in names:
                raise ConfigError(
                    f"--model-name is {self._model_name!r}; loaded are {', '.join(names)}"
                )
            self.name = self._model_name or self._runtime.served_name
            yield

    async def answer(self, messages: Sequence[Message], say: Callable[[str], None]) -> int:
        """Ask the runtime."""
        request = self._runtime.chat(list(messages), self._params, model=self._model_name)
        async with request as stream:
            async for delta in stream:
                if delta.text:
                    say(delta.text)
            return int(stream.usage.completion_tokens)


class ServerPartner:
    """A server that speaks the OpenAI API.

    Args:
        url: with or without ``/v1``.
        key: sent as a bearer token, if there is one.
        model_name: None for the first model that the server lists.
        params: only what was set is sent.
    """

    def __init__(
        self, url: str, key: str | None, model_name: str | None, params: SamplingParams
    ) -> None:
        remedy = "start one with `cotune serve`, or leave out --url"
        self._server = AsyncServer(url, key, remedy=remedy)
        self._model_name = model_name
        self.name = ""
        wanted = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed")
        self._fields = {
            name: value for name in wanted if (value := getattr(params, name)) is not None
        }

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Connect, and see which models there are."""
        async with self._server.open():
            async with self._request("GET", "/models") as reply:
                names = self._model_names(await reply.text())
            if self._model_name is not None and self._model_name not in names:
                raise ConfigError(
                    f"--model-name is {self._model_name!r}; the server has {', '.join(names)}"
                )
            if not names:
                raise ServerError(f"{self._server.url} lists no model")
            self.name = self._model_name or names[0]
            yield

    async def answer(self, messages: Sequence[Message], say: Callable[[str], None]) -> int:
        """Ask the server and follow its event stream."""
        body = {
            "model": self.name,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._fields,
        }
        tokens = 0
        async with self._request("POST", "/chat/completions", body) as reply:
            async for line in reply.content:
                data = line.decode("utf-8").removeprefix("data:").strip()
                if not line.startswith(b"data:") or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise ServerError(str(event["error"].get("message", event["error"])))
                if event.get("usage"):
                    tokens = int(event["usage"]["completion_tokens"])
                for choice in event.get("choices", ()):
                    if text := choice.get("delta", {}).get("content"):
                        say(text)
        return tokens

    def _model_names(self, body: str) -> list[str]:
        try:
            return [str(model["id"]) for model in json.loads(body)["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(
                f"{self._server.url} does not speak the OpenAI API: /v1/models gave {body[:80]!r}"
            ) from error

    @contextlib.asynccontextmanager
    async def _request(self, method: str, path: str, body: Any = None) -> AsyncIterator[Any]:
        """A reply with a good status; anything else is a `ServerError`."""
        async with self._server.request(method, path, json=body) as reply:
            if reply.status >= 400:
                text = await reply.text()
                message = told_error(text, text.strip()[:500])
                raise ServerError(f"{message} (status {reply.status})")
            yield reply


# -- the loop thread -----------------------------------------------------------------------------


class LoopThread:
    """An event loop in a thread, with a partner open on it.

    Entering waits until the partner is ready and raises what prevented that. Leaving closes the
    partner and raises what went wrong meanwhile; while it is still loading, loading is cancelled.
    """

    def __init__(self, partner: Partner) -> None:
        self._partner = partner
        self._started: Future[asyncio.Task[None]] = Future()
        self._ready: Future[asyncio.AbstractEventLoop] = Future()
        self._is_leaving = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="cotune-chat-loop")

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._ready.result()
        except BaseException:
            self._is_leaving = True
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_leaving = True
        self._end()
        if self._error is not None:
            raise self._error

    def ask(self, messages: Sequence[Message]) -> LoopAnswer:
        """Start an answer."""
        return LoopAnswer(self._ready.result(), self._partner, messages)

    def _end(self) -> None:
        if self._started.exception() is None:
            task = self._started.result()
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself
                task.get_loop().call_soon_threadsafe(task.cancel)
        self._thread.join()

    def _work(self) -> None:
        try:
            with asyncio.Runner(loop_factory=loop_factory()) as runner:
                runner.run(self._main())
        except BaseException as error:  # noqa: BLE001 - raised in the main thread
            if not self._started.done():
                self._started.set_exception(error)
            if not self._ready.done():
                self._ready.set_exception(error)
            elif not (self._is_leaving and isinstance(error, asyncio.CancelledError)):
                self._error = error

    async def _main(self) -> None:
        """Keep the partner open until this task is cancelled."""
        task = asyncio.current_task()
        assert task is not None
        self._started.set_result(task)
        loop = asyncio.get_running_loop()
        async with self._partner.open():
            self._ready.set_result(loop)
            await loop.create_future()


class LoopAnswer:
    """An answer that is made on the loop thread and read on this one."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, partner: Partner, messages: Sequence[Message]
    ) -> None:
        self.tokens = 0
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        answering = partner.answer(messages, self._pieces.put)
        self._future = asyncio.run_coroutine_threadsafe(answering, loop)
        self._future.add_done_callback(lambda _: self._pieces.put(None))

    def __iter__(self) -> Iterator[str]:
        while (piece := self._pieces.get()) is not None:
            yield piece
        self.tokens = self._future.result()

    def stop(self) -> None:
        """Abort the request. Its pages go back on the loop thread, while the user thinks."""
        self._future.cancel()
