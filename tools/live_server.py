"""A server that runs, as seen by commands that ask it something."""

from __future__ import annotations

import contextlib
import json
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any, Final

from ..runtime.errors import ConfigError, CotuneError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

TIMEOUT_S: Final = 60.0
CONNECT_S: Final = 10.0


class ServerError(CotuneError):
    """The server cannot be reached, or answered with an error; says what to do."""


def base_url(given: str) -> str:
    """What ``/v1`` follows: `given` may end with that, and need not begin with ``http://``."""
    url = given if "://" in given else f"http://{given}"
    return url.rstrip("/").removesuffix("/v1")


def bearer(key: str | None) -> dict[str, str]:
    """The header that shows the key, if there is one."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def told_error(body: str | bytes, otherwise: str) -> str:
    """The message of an error object; where the body is none, what is said otherwise."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return otherwise


class LiveServer:
    """Asks a server and gives what it answers.

    Args:
        url: with or without ``/v1``.
        key: sent as a bearer token, if there is one.
        remedy: what to do where no server answers.

    Raises:
        ConfigError: `url` is none.
    """

    def __init__(self, url: str, key: str | None, remedy: str) -> None:
        self.url = base_url(url)
        if "://" in url and not url.startswith(("http://", "https://")):
            raise ConfigError(f"--url is {url!r}; use http://HOST:PORT")
        self._headers = bearer(key)
        self._remedy = remedy

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The answer to a request, from JSON.

        Args:
            method: of HTTP.
            path: what follows ``/v1``.
            body: sent as JSON (None: nothing is).

        Raises:
            ServerError: there is no such server, it refuses, or it is not ours.
        """
        headers = dict(self._headers)
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(body).encode()
        try:
            request = urllib.request.Request(
                f"{self.url}/v1{path}", data=data, headers=headers, method=method
            )
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error.code, error.read()) from None
        except urllib.error.URLError as error:
            raise ServerError(
                f"no server at {self.url} ({error.reason}); {self._remedy}"
            ) from error
        except (OSError, ValueError) as error:
            raise ServerError(f"{self.url} does not answer as cotune: {error}") from error

    def _refused(self, status: int, data: bytes) -> ServerError:
        message = told_error(data, f"it does not answer as cotune does: {data[:200]!r}")
        return ServerError(f"{self.url}: {message} (status {status})")


class AsyncServer:
    """Asks a server from an event loop. Answers may come in pieces, and take their time.

    Args:
        url: with or without ``/v1``.
        key: sent as a bearer token, if there is one.
        remedy: what to do where no server answers.
        broken: what to do when a connection breaks, if there is anything.
    """

    def __init__(self, url: str, key: str | None, *, remedy: str, broken: str = "") -> None:
        self.url = base_url(url)
        self._given = url
        self._headers = bearer(key)
        self._remedy = remedy
        self._broken = f"; {broken}" if broken else ""
        self._session: Any = None

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Connections are made when they are needed."""
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
        async with aiohttp.ClientSession(headers=self._headers, timeout=timeout) as self._session:
            yield

    @contextlib.asynccontextmanager
    async def request(self, method: str, path: str, **options: Any) -> AsyncIterator[Any]:
        """A reply, whatever its status.

        Args:
            method: of HTTP.
            path: what follows ``/v1``.
            options: as `aiohttp.ClientSession.request` takes them.

        Raises:
            ServerError: no server answers, or the connection breaks before the block is left.
            ConfigError: the URL is none.
        """
        import aiohttp

        try:
            async with self._session.request(method, f"{self.url}/v1{path}", **options) as reply:
                yield reply
        except aiohttp.ClientConnectorError as error:
            raise ServerError(
                f"no server at {self.url} ({error.strerror or error}); {self._remedy}"
            ) from error
        except aiohttp.InvalidURL as error:
            raise ConfigError(f"--url is {self._given!r}; use http://HOST:PORT") from error
        except aiohttp.ClientError as error:
            raise ServerError(
                f"the connection to {self.url} broke: {error}{self._broken}"
            ) from error
