"""A server that runs, as seen by commands that ask it something."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any, Final

from ..runtime.errors import ConfigError, CotuneError

TIMEOUT_S: Final = 60.0


class ServerError(CotuneError):
    """The server cannot be reached, or answered with an error; says what to do."""


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
        if "://" not in url:
            url = f"http://{url}"
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--url is {url!r}; use http://HOST:PORT")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
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
        try:
            message = str(json.loads(data)["error"]["message"])
        except (ValueError, KeyError, TypeError):
            message = f"it does not answer as cotune does: {data[:200]!r}"
        return ServerError(f"{self.url}: {message} (status {status})")
