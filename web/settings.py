"""How the HTTP server listens and what it will take. Values only; nothing here opens a socket."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from ..runtime.errors import ConfigError
from ..runtime.types import MAX_N


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Address, key and limits of one HTTP server."""

    host: str = "127.0.0.1"
    """Address to listen on. One that other machines can reach needs an `api_key`."""
    port: int = 8000
    """TCP port; 0 lets the system choose one."""
    api_key: str | None = None
    """Clients send it as ``Authorization: Bearer KEY``. /health and /ready stay open without it."""
    max_body_bytes: int = 8 * 1024 * 1024
    """Largest request body, after decompression; a larger one is answered with 413."""
    max_messages: int = 1024
    """Most messages in one chat request."""
    max_prompts: int = 128
    """Most prompts in one completions request."""
    max_n: int = MAX_N
    """Most completions per prompt; the runtime itself stops at 128."""
    read_timeout_s: float = 60.0
    """Longest wait for a request's body, from its headers to its last byte."""
    stall_timeout_s: float = 120.0
    """A client that reads nothing of its stream for this long is disconnected."""
    shutdown_timeout_s: float = 30.0
    """At shutdown, how long running requests may go on before they are cancelled."""
    keepalive_timeout_s: float = 75.0
    """How long an idle connection is kept."""
    backlog: int = 2048
    """Connections that the system queues before they are accepted."""
    allowed_origins: tuple[str, ...] = ()
    """Web origins that a browser may call from (CORS), ``"*"`` for any. None by default."""
    max_frame_bytes: int = 1024 * 1024
    """Largest message on the feedback WebSocket; a larger one ends the connection (1009)."""
    max_feedback_events: int = 1000
    """Most events in one POST to /v1/feedback."""
    feedback_window: int = 256
    """Events of one connection that may await their answers; reading pauses beyond them."""
    max_feedback_connections: int = 256
    """Most WebSockets at /v1/feedback; further ones are refused with 429."""
    heartbeat_s: float = 30.0
    """A quiet WebSocket gets a ping this often, and is cut if half as long brings no pong."""
    enable_adapter_loading: bool = True
    """Serve /v1/load_lora_adapter and /v1/unload_lora_adapter."""

    def validate(self) -> None:
        """Raise `ConfigError` naming the field, its value and the remedy."""
        if not 0 <= self.port <= 65535:
            raise _wrong("port", self.port, "choose 0 to 65535")
        if self.api_key is not None:
            if not self.api_key:
                raise _wrong("api_key", "empty", "give a key, or leave it out")
            if not (self.api_key.isascii() and self.api_key.isprintable()) or " " in self.api_key:
                raise _wrong(
                    "api_key",
                    "not usable in a header",
                    "use visible ASCII characters without spaces",
                )
        elif not is_loopback(self.host):
            raise _wrong(
                "host",
                repr(self.host),
                "set an API key (--api-key or COTUNE_API_KEY), or listen on 127.0.0.1; without a "
                "key only this machine may reach the server",
            )
        for name in (
            "max_body_bytes",
            "max_messages",
            "max_prompts",
            "max_n",
            "backlog",
            "max_frame_bytes",
            "max_feedback_events",
            "feedback_window",
            "max_feedback_connections",
        ):
            if getattr(self, name) < 1:
                raise _wrong(name, getattr(self, name), "choose 1 or more")
        if self.max_n > MAX_N:
            raise _wrong("max_n", self.max_n, f"choose at most {MAX_N}")
        for name in ("read_timeout_s", "stall_timeout_s", "keepalive_timeout_s", "heartbeat_s"):
            if not getattr(self, name) > 0:
                raise _wrong(name, getattr(self, name), "choose a number of seconds above 0")
        if not self.shutdown_timeout_s >= 0:
            raise _wrong("shutdown_timeout_s", self.shutdown_timeout_s, "choose 0 or more seconds")
        for origin in self.allowed_origins:
            if origin != "*" and ("://" not in origin or origin.endswith("/")):
                raise _wrong(
                    "allowed_origins",
                    repr(origin),
                    'write "*" or scheme://host[:port] without a slash at the end',
                )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`.

    A name other than ``localhost`` counts as reachable: what it resolves to may change.
    """
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _wrong(field: str, value: object, remedy: str) -> ConfigError:
    return ConfigError(f"{field} is {value}; {remedy}", param=field)
