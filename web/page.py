"""The page at ``/``: a chat with the model, for a person with a browser."""

from __future__ import annotations

from importlib import resources
from typing import Final

from aiohttp import web

# The page is one file and loads nothing; it talks to this server alone.
_POLICY: Final = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def add_page(app: web.Application) -> None:
    """Serve the page at ``/``. It is read once, here."""
    body = (resources.files(__package__) / "static" / "index.html").read_bytes()

    async def page(request: web.Request) -> web.Response:
        """GET /."""
        return web.Response(
            body=body,
            content_type="text/html",
            charset="utf-8",
            headers={
                "Content-Security-Policy": _POLICY,
                "X-Content-Type-Options": "nosniff",
                "Cache-Control": "no-cache",
            },
        )

    app.router.add_get("/", page)
