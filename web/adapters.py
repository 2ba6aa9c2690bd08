"""What was learned, and which version of it answers: /v1/learning and /v1/adapters."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from aiohttp import web

from ..runtime.errors import NotFoundError
from .edge import json_response, printable, read_body
from .requests import PromoteRequest, parse_promote

if TYPE_CHECKING:
    from ..runtime.learning.status import AdapterLearning, LearningStatus
    from ..runtime.learning.versions import VersionRecord
    from .backend import Backend
    from .settings import ServerSettings


class AdapterRoutes:
    """The handlers for versions and for the state of learning.

    A version is named ``name@7``, or ``7`` for the served model's own.
    """

    def __init__(self, runtime: Backend, settings: ServerSettings) -> None:
        self._runtime = runtime
        self._settings = settings

    def table(self) -> list[web.RouteDef]:
        """All routes."""
        return [
            web.get("/v1/learning", self.learning),
            web.get("/v1/adapters", self.versions),
            web.get("/v1/adapters/{version:.+}", self.version),
            web.post("/v1/adapters/{version:.+}/promote", self.promote),
            web.post("/v1/adapters/{version:.+}/rollback", self.rollback),
        ]

    async def learning(self, request: web.Request) -> web.Response:
        """GET /v1/learning. It answers in a runtime that does not learn, too."""
        return json_response(learning_body(self._runtime.learning(), self._runtime.served_name))

    async def versions(self, request: web.Request) -> web.Response:
        """GET /v1/adapters, all or those of ``?adapter=``."""
        wanted = request.query.get("adapter")
        records = await self._runtime.adapters()
        return json_response(
            {
                "object": "list",
                "data": [
                    version_body(record) for record in records if wanted in (None, record.adapter)
                ],
            }
        )

    async def version(self, request: web.Request) -> web.Response:
        """GET /v1/adapters/VERSION."""
        given = request.match_info["version"]
        name, at, number = given.rpartition("@")
        adapter = name if at else self._runtime.served_name
        for record in await self._runtime.adapters():
            if record.adapter == adapter and str(record.number) == number:
                return json_response(version_body(record))
        raise NotFoundError(
            f"there is no adapter version {printable(given)!r}; /v1/adapters lists those there are "
            "(name@7, or 7 for the served model's own)",
            param="version",
            code="version_not_found",
        )

    async def promote(self, request: web.Request) -> web.Response:
        """POST /v1/adapters/VERSION/promote: it answers from the next request on."""
        parsed = await self._promote_request(request)
        given = request.match_info["version"]
        return _live_response(
            "promoted", given, await self._runtime.promote(given, force=parsed.force)
        )

    async def rollback(self, request: web.Request) -> web.Response:
        """POST /v1/adapters/VERSION/rollback: what was live before it is live again."""
        given = request.match_info["version"]
        return _live_response("rolled_back", given, await self._runtime.rollback(given))

    async def _promote_request(self, request: web.Request) -> PromoteRequest:
        """Without a body its content type does not matter: some clients always send one."""
        if not request.can_read_body:
            return PromoteRequest()
        return parse_promote(await read_body(request, self._settings))


def _live_response(what: str, given: str, live: VersionRecord | None) -> web.Response:
    """What is live now; null is the base model."""
    return json_response(
        {
            "object": f"adapter.{what}",
            "version": given,
            "live": None if live is None else version_body(live),
        }
    )


def version_body(record: VersionRecord) -> dict[str, Any]:
    """One version, published or refused."""
    return {
        "object": "adapter_version",
        "id": f"{record.adapter}@{record.number}",
        "adapter": record.adapter,
        "version": record.number,
        "parent": record.parent,
        "created": int(record.created.timestamp()),
        "state": record.state,
        "is_live": record.is_live,
        "metrics": dict(record.metrics),
        "reasons": record.reasons,
        "explanation": record.explanation,
        "lineage": asdict(record.lineage),
        "path": str(record.path),
        "bytes": record.nbytes,
    }


def learning_body(status: LearningStatus, served_name: str) -> dict[str, Any]:
    """The state of learning: that of the served model on top, then each adapter's."""
    adapters = {adapter.adapter: _adapter_body(adapter) for adapter in status.adapters}
    served = adapters.get(served_name)
    body: dict[str, Any] = {
        "object": "learning",
        "enabled": status.enabled,
        "events": sum(status.events.values()),
        "events_by_type": dict(status.events),
        "refused_events": dict(status.refused_events),
        "duplicates": status.duplicates,
        "recorded_responses": status.recorded_responses,
        "adapter": served_name,
        "live_version": 0,
        "pairs": {},
        "candidates": {
            "passed": 0,
            "refused": 0,
            "refused_by_reason": {},
            "undecided": 0,
            "undecided_by_reason": {},
        },
    }
    return body | (served or {}) | {"adapters": list(adapters.values())}


def _adapter_body(adapter: AdapterLearning) -> dict[str, Any]:
    return {
        "adapter": adapter.adapter,
        "phase": adapter.phase,
        "live_version": adapter.live_version,
        "live_since": None if adapter.live_since is None else adapter.live_since.isoformat(),
        "live_version_age_seconds": adapter.live_age_s,
        "pairs": dict(adapter.pairs),
        "candidates": {
            "passed": adapter.candidates_passed,
            "refused": sum(adapter.candidates_refused.values()),
            "refused_by_reason": dict(adapter.candidates_refused),
            "undecided": sum(adapter.candidates_undecided.values()),
            "undecided_by_reason": dict(adapter.candidates_undecided),
        },
        "training": {
            "steps": adapter.steps,
            "tokens": adapter.tokens_trained,
            "loss": adapter.loss,
            "margin": adapter.margin,
            "reward_accuracy": adapter.reward_accuracy,
            "gradient_norm": adapter.gradient_norm,
            "learning_rate": adapter.learning_rate,
            "set_downs": adapter.set_downs,
        },
        "win_rate": adapter.win_rate,
        "base_win_rate": adapter.base_win_rate,
        "last_verdict": adapter.last_verdict,
    }
