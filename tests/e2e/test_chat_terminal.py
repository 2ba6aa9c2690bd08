"""`cotune chat` in a real terminal: prompts, line editing, and what Ctrl-C and Ctrl-D do."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

WAIT_S = 60.0
CTRL_C, CTRL_D = "\x03", "\x04"


class Handler(BaseHTTPRequestHandler):
    """A server of one model that says "word" for as long as somebody listens."""

    client_left: threading.Event

    def do_GET(self) -> None:
        body = json.dumps({"data": [{"id": "endless"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        pieces = ["short answer"] if question == "briefly" else None
        self.send_response(200)
        self.end_headers()
        try:
            while pieces is None or pieces:
                text = pieces.pop() if pieces else "word "
                event = json.dumps({"choices": [{"delta": {"content": text}}]})
                self.wfile.write(f"data: {event}\n\n".encode())
        except OSError:
            type(self).client_left.set()

    def log_message(self, *args: object) -> None:
        """Nothing, or it would be on the test's stderr."""


@pytest.fixture
def url() -> Iterator[str]:
    Handler.client_left = threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


class Terminal:
    """A program in a pseudo-terminal."""

    def __init__(self, *argv: str) -> None:
        self._end, inner = pty.openpty()
        # A session of its own, so that the terminal is its controlling one and Ctrl-C a signal; one
        # that is heeded, as what a shell starts in the background ignores it.
        code = "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"
        code += "; signal.signal(signal.SIGINT, signal.SIG_DFL)"
        code += "; os.execv(sys.argv[1], sys.argv[1:])"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, sys.executable, *argv],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(inner)
        self._unread = ""

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def read_until(self, text: str) -> str:
        """What the program wrote up to and including `text`."""
        assert self._fill(text, WAIT_S), f"waited for {text!r}, got {self._unread[-2000:]!r}"
        read, found, self._unread = self._unread.partition(text)
        return read + found

    def interrupt(self, text: str) -> str:
        """Type Ctrl-C until `text` comes; what the program wrote up to and including it.

        Once is enough for a person. A program sees the signal only when it comes while Python's
        readline waits, and here it may come in the moment before.
        """
        deadline_s = time.monotonic() + WAIT_S
        while time.monotonic() < deadline_s:
            self.type(CTRL_C)
            if self._fill(text, 10.0):
                break
        return self.read_until(text)

    def _fill(self, text: str, wait_s: float) -> bool:
        """Read until `text` is there; False if it has not come in time."""
        deadline_s = time.monotonic() + wait_s
        while text not in self._unread:
            left_s = deadline_s - time.monotonic()
            if left_s < 0.0 or not select.select([self._end], [], [], left_s)[0]:
                return False
            try:
                self._unread += os.read(self._end, 1 << 16).decode()
            except OSError:
                pytest.fail(f"waited for {text!r}, but it ended with {self._unread[-2000:]!r}")
        return True

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)


@pytest.fixture
def terminal(url: str) -> Iterator[Terminal]:
    terminal = Terminal("-m", "cotune.tools.cli", "chat", "--url", url)
    yield terminal
    terminal.close()


def test_ctrl_c_stops_an_answer_or_drops_a_line_and_ctrl_d_leaves(terminal: Terminal) -> None:
    assert "endless: /reset forgets" in terminal.read_until("> ")
    terminal.type("talk\n")
    terminal.read_until("word word word ")
    terminal.interrupt("[stopped]")
    terminal.read_until("> ")
    assert Handler.client_left.wait(WAIT_S)

    terminal.type("half a li")
    terminal.read_until("half a li")
    terminal.interrupt("> ")
    terminal.type("briefly\n")
    terminal.read_until("short answer")
    terminal.read_until("> ")

    terminal.type(CTRL_D)
    assert terminal.process.wait(WAIT_S) == 0
