from __future__ import annotations

import asyncio
import contextlib
import io
import json
import socket
import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import pytest
from aiohttp import web

from cotune.runtime.errors import ConfigError, ContextLengthError
from cotune.runtime.types import SamplingParams
from cotune.tools.chat import (
    AnswerStatistics,
    Conversation,
    InputError,
    LoopThread,
    piped_lines,
    prompted_lines,
)
from cotune.tools.cli import main

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from cotune.runtime.config import RuntimeConfig
    from cotune.runtime.types import Message

WAIT_S = 30


# -- the conversation ----------------------------------------------------------------------------


class ScriptedAnswer:
    """Pieces of text; an exception among them is raised in its place."""

    def __init__(self, pieces: Sequence[str | BaseException]) -> None:
        self.tokens = 0
        self.is_stopped = False
        self._pieces = pieces

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces:
            if isinstance(piece, BaseException):
                raise piece
            self.tokens += 1
            yield piece

    def stop(self) -> None:
        self.is_stopped = True


class Scripted:
    """Answers questions from a list and remembers what it was asked."""

    def __init__(self, *answers: Sequence[str | BaseException]) -> None:
        self.answers = [ScriptedAnswer(pieces) for pieces in answers]
        self.asked: list[list[Message]] = []

    def __call__(self, messages: Sequence[Message]) -> ScriptedAnswer:
        self.asked.append(list(messages))
        return self.answers[len(self.asked) - 1]


def hold(ask: Scripted, lines: list[str], **options: Any) -> tuple[int, str, Conversation]:
    output = io.StringIO()
    beginning: list[Message] = options.pop("beginning", [])
    conversation = Conversation(ask, beginning, output, **options)
    return conversation.run(iter(lines)), output.getvalue(), conversation


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def test_each_line_is_a_turn_and_later_turns_know_the_earlier_ones() -> None:
    ask = Scripted(["Hi", " there"], ["Fine."])
    status, output, _ = hold(ask, ["Hello\n", "\n", "How are you?\n"])
    assert status == 0
    assert output == "Hi there\nFine.\n"
    assert ask.asked == [
        [user("Hello")],
        [user("Hello"), assistant("Hi there"), user("How are you?")],
    ]


def test_reset_forgets_all_but_the_system_message() -> None:
    system: Message = {"role": "system", "content": "Be brief."}
    ask = Scripted(["a"], ["b"])
    hold(ask, ["one", "/reset", "two"], beginning=[system])
    assert ask.asked == [[system, user("one")], [system, user("two")]]


def test_exit_ends_it_and_help_and_unknown_commands_are_not_sent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ask = Scripted(["a"])
    status, output, _ = hold(ask, ["/help", "/rest", "hello", "/exit", "never"])
    assert (status, output) == (0, "a\n")
    assert ask.asked == [[user("hello")]]
    errors = capsys.readouterr().err
    assert "/reset forgets" in errors
    assert "there is no /rest; /reset forgets" in errors


def test_ctrl_c_stops_the_answer_and_not_the_conversation() -> None:
    ask = Scripted(["Once", " upon", KeyboardInterrupt()], ["Yes."])
    status, output, _ = hold(ask, ["Tell me a story", "Go on"])
    assert status == 0
    assert ask.answers[0].is_stopped
    assert output == "Once upon [stopped]\nYes.\n"
    assert ask.asked[1] == [user("Tell me a story"), assistant("Once upon"), user("Go on")]


def test_a_turn_stopped_before_its_first_word_is_not_remembered() -> None:
    ask = Scripted([KeyboardInterrupt()], ["Yes."])
    hold(ask, ["one", "two"])
    assert ask.asked[1] == [user("two")]


def test_a_failed_turn_is_said_and_forgotten_and_is_the_exit_status(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ask = Scripted(["begun", ContextLengthError("too long; /reset")], ["Yes."])
    status, output, _ = hold(ask, ["one", "two"])
    assert status == 1
    assert output == "begun\nYes.\n"
    assert capsys.readouterr().err == "cotune chat: too long; /reset\n"
    assert ask.asked[1] == [user("two")]


def test_statistics_are_said_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    hold(Scripted(["a", "b"]), ["one"], stats=True)
    assert "[2 tokens, first after 0.00 s" in capsys.readouterr().err
    text = str(AnswerStatistics(tokens=30, first_s=0.25, total_s=1.5))
    assert text == "[30 tokens, first after 0.25 s, 20 tokens/s]"


def test_typed_lines_end_with_ctrl_d_and_survive_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    typed: list[str | BaseException] = ["one", KeyboardInterrupt(), "two", EOFError()]

    def read(prompt: str) -> str:
        line = typed.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    assert list(prompted_lines()) == ["one", "two"]


def test_piped_bytes_that_are_no_text_are_one_error() -> None:
    piped = io.TextIOWrapper(io.BytesIO(b"fine\n\xff\xfe\n"), encoding="utf-8")
    with pytest.raises(InputError, match="standard input is not valid UTF-8"):
        list(piped_lines(piped))


# -- the loop thread -----------------------------------------------------------------------------


class FakePartner:
    """Answers with the words of the last message; "wait" blocks until it is cancelled."""

    name = "fake"

    def __init__(self, *, fails_with: BaseException | None = None) -> None:
        self.events: list[str] = []
        self.is_waiting = threading.Event()
        self.was_cancelled = threading.Event()
        self._fails_with = fails_with

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        if self._fails_with is not None:
            raise self._fails_with
        self.events.append("open")
        try:
            yield
        finally:
            self.events.append("closed")

    async def answer(self, messages: Sequence[Message], say: Callable[[str], None]) -> int:
        words = messages[-1]["content"].split()
        for word in words:
            if word == "wait":
                self.is_waiting.set()
                try:
                    await asyncio.get_running_loop().create_future()
                finally:
                    self.was_cancelled.set()
            if word == "fail":
                raise ContextLengthError("too long")
            say(word)
        return len(words)


def test_pieces_come_from_the_loop_thread_and_tokens_after_them() -> None:
    partner = FakePartner()
    with LoopThread(partner) as loop_thread:
        answer = loop_thread.ask([user("one two three")])
        assert list(answer) == ["one", "two", "three"]
        assert answer.tokens == 3
    assert partner.events == ["open", "closed"]
    assert not [t for t in threading.enumerate() if t.name == "cotune-chat-loop"]


def test_an_error_on_the_loop_thread_is_raised_after_the_pieces_before_it() -> None:
    with LoopThread(FakePartner()) as loop_thread:
        pieces = iter(loop_thread.ask([user("one fail two")]))
        assert next(pieces) == "one"
        with pytest.raises(ContextLengthError, match="too long"):
            next(pieces)
        assert list(loop_thread.ask([user("fine")])) == ["fine"]


def test_stopping_cancels_the_request_and_the_next_one_is_answered() -> None:
    partner = FakePartner()
    with LoopThread(partner) as loop_thread:
        answer = loop_thread.ask([user("one wait")])
        assert next(iter(answer)) == "one"
        assert partner.is_waiting.wait(WAIT_S)
        answer.stop()
        assert partner.was_cancelled.wait(WAIT_S)
        assert list(loop_thread.ask([user("next")])) == ["next"]


def test_what_prevents_opening_is_raised_on_entering() -> None:
    with (
        pytest.raises(ConfigError, match="no such model"),
        LoopThread(FakePartner(fails_with=ConfigError("no such model"))),
    ):
        pytest.fail("entered")
    assert not [t for t in threading.enumerate() if t.name == "cotune-chat-loop"]


def test_an_interrupt_while_loading_cancels_the_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    is_loading, was_cancelled = threading.Event(), threading.Event()

    class Slow(FakePartner):
        @contextlib.asynccontextmanager
        async def open(self) -> AsyncIterator[None]:
            is_loading.set()
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                was_cancelled.set()
            yield

    loop_thread = LoopThread(Slow())

    def interrupted(*args: object) -> None:
        assert is_loading.wait(WAIT_S)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop_thread._ready, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop_thread.__enter__()
    assert was_cancelled.is_set()


# -- a model of our own --------------------------------------------------------------------------


class FakeStream:
    def __init__(self, words: list[str]) -> None:
        self.usage = SimpleNamespace(completion_tokens=len(words))
        self._words = words

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        return

    async def __aiter__(self) -> AsyncIterator[SimpleNamespace]:
        for word in ["", *self._words]:
            yield SimpleNamespace(text=word)


class FakeRuntime:
    made: list[FakeRuntime]
    served_name = "demo"

    def __init__(self, *, config: RuntimeConfig) -> None:
        self.config = config
        self.calls: list[tuple[list[Message], SamplingParams, str | None]] = []
        FakeRuntime.made.append(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        return

    def model_names(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(id="demo"), SimpleNamespace(id="tutor")]

    def chat(
        self, messages: list[Message], params: SamplingParams, *, model: str | None
    ) -> FakeStream:
        self.calls.append((messages, params, model))
        return FakeStream([f"{messages[-1]['content']}", "!"])


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the text what comes from standard input; nothing is loaded for an embedded model."""
    module = ModuleType("runtime")
    module.Runtime = FakeRuntime  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cotune.runtime.runtime", module)
    FakeRuntime.made = []
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    monkeypatch.delenv("COTUNE_API_KEY", raising=False)
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_piped_lines_are_answered_by_an_embedded_model(
    pipe: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    pipe("Hello\nWhy?\n")
    flags = "some/model --temperature 0 --max-tokens 5 --model-name tutor --dtype bfloat16"
    assert main(["chat", *flags.split(), "--system", "Be brief."]) == 0
    captured = capsys.readouterr()
    assert captured.out == "Hello!\nWhy?!\n"
    assert captured.err == ""
    (runtime,) = FakeRuntime.made
    assert runtime.config.model.source == "some/model"
    assert runtime.config.model.dtype == "bfloat16"
    messages, params, model = runtime.calls[1]
    assert [message["content"] for message in messages] == ["Be brief.", "Hello", "Hello!", "Why?"]
    assert params == SamplingParams(temperature=0.0, max_tokens=5)
    assert model == "tutor"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--temperature", "-1"], "cotune chat: temperature is -1.0; it must be from 0 to 100"),
        (["--model-name", "x"], "cotune chat: --model-name is 'x'; loaded are demo, tutor"),
        (["m", "--url", "http://h"], "cotune chat: MODEL is 'm', but --url was given"),
        (["--max-num-seqs", "0"], "schedule.max_num_seqs is 0; use 1 or more (--max-num-seqs)"),
    ],
)
def test_wrong_flags_are_one_line_and_status_2(
    pipe: Callable[[str], None], capsys: pytest.CaptureFixture[str], flags: list[str], line: str
) -> None:
    pipe("Hello\n")
    assert main(["chat", *flags]) == 2
    captured = capsys.readouterr()
    assert line in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


# -- a server ------------------------------------------------------------------------------------


class OpenAIServer:
    """Speaks as much of the OpenAI API as a chat needs, on a loop and thread of its own."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.models: list[str] | None = ["base", "tutor"]
        self.error: tuple[int, str] | None = None
        self.error_in_stream: str | None = None
        self.url = ""

    @contextlib.contextmanager
    def running(self) -> Iterator[Self]:
        ready, leave = threading.Event(), threading.Event()

        async def serve() -> None:
            app = web.Application()
            app.router.add_get("/v1/models", self._list)
            app.router.add_post("/v1/chat/completions", self._chat)
            runner = web.AppRunner(app)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            ready.set()
            await asyncio.to_thread(leave.wait)
            await runner.cleanup()

        thread = threading.Thread(target=asyncio.run, args=(serve(),))
        thread.start()
        assert ready.wait(WAIT_S)
        try:
            yield self
        finally:
            leave.set()
            thread.join()

    async def _list(self, request: web.Request) -> web.Response:
        self.keys.append(request.headers.get("Authorization"))
        if self.models is None:
            return web.Response(text="<html>Welcome!</html>")
        return web.json_response({"data": [{"id": name} for name in self.models]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.error is not None:
            return web.Response(status=self.error[0], text=self.error[1])
        response = web.StreamResponse()
        await response.prepare(request)
        events: list[Any] = [{"choices": [{"delta": {"role": "assistant"}}]}]
        events += [{"choices": [{"delta": {"content": text}}]} for text in ("Grüß", " dich")]
        if self.error_in_stream is not None:
            events.append({"error": {"message": self.error_in_stream}})
        else:
            events.append({"choices": [], "usage": {"completion_tokens": 7}})
        for event in events:
            data = json.dumps(event, ensure_ascii=False).encode()
            await response.write(b": a comment\n\ndata: " + data + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer().running() as server:
        yield server


@pytest.mark.parametrize("suffix", ["", "/", "/v1"])
def test_a_server_answers_with_its_first_model_and_the_flags_that_were_given(
    server: OpenAIServer,
    pipe: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
    suffix: str,
) -> None:
    pipe("Hallo\nUnd?\n")
    flags = ["--url", server.url + suffix, "--api-key", "k", "--top-p", "0.5", "--stats"]
    assert main(["chat", *flags]) == 0
    captured = capsys.readouterr()
    assert captured.out == "Grüß dich\nGrüß dich\n"
    assert captured.err.count("[7 tokens, ") == 2
    assert server.keys == ["Bearer k"]
    assert server.bodies[1] == {
        "model": "base",
        "messages": [user("Hallo"), assistant("Grüß dich"), user("Und?")],
        "stream": True,
        "stream_options": {"include_usage": True},
        "top_p": 0.5,
    }
    assert FakeRuntime.made == []


def test_a_server_can_be_asked_for_another_of_its_models(
    server: OpenAIServer, pipe: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    pipe("Hallo\n")
    assert main(["chat", "--url", server.url, "--model-name", "tutor"]) == 0
    assert server.bodies[0]["model"] == "tutor"
    pipe("Hallo\n")
    assert main(["chat", "--url", server.url, "--model-name", "nobody"]) == 2
    assert "'nobody'; the server has base, tutor" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (
            '{"error": {"message": "too busy", "type": "x", "param": null, "code": null}}',
            "cotune chat: too busy (status 429)\n",
        ),
        ("plain words", "cotune chat: plain words (status 429)\n"),
    ],
)
def test_a_refusal_of_the_server_is_said_in_its_words(
    server: OpenAIServer,
    pipe: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
    body: str,
    line: str,
) -> None:
    server.error = (429, body)
    pipe("Hallo\n")
    assert main(["chat", "--url", server.url]) == 1
    captured = capsys.readouterr()
    assert captured.err == line
    assert captured.out == ""


def test_an_error_in_the_stream_is_said_after_what_came_before(
    server: OpenAIServer, pipe: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    server.error_in_stream = "the iteration failed"
    pipe("Hallo\n")
    assert main(["chat", "--url", server.url]) == 1
    captured = capsys.readouterr()
    assert captured.out == "Grüß dich\n"
    assert captured.err == "cotune chat: the iteration failed\n"


def test_a_server_that_is_not_there_is_one_line_with_the_remedy(
    pipe: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    pipe("Hallo\n")
    assert main(["chat", "--url", f"127.0.0.1:{port}"]) == 1
    captured = capsys.readouterr().err
    assert captured.startswith(f"cotune chat: no server at http://127.0.0.1:{port} (")
    assert "start one with `cotune serve`" in captured
    assert captured.count("\n") == 1


def test_what_is_no_server_of_models_is_one_line(
    server: OpenAIServer, pipe: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    pipe("Hallo\n")
    assert main(["chat", "--url", "http://"]) == 2
    assert "--url is 'http://'; use http://HOST:PORT" in capsys.readouterr().err
    server.models = []
    assert main(["chat", "--url", server.url]) == 1
    assert "lists no model" in capsys.readouterr().err
    server.models = None
    assert main(["chat", "--url", server.url]) == 1
    line = capsys.readouterr().err
    assert "does not speak the OpenAI API: /v1/models gave '<html>Welcome!</html>'" in line
