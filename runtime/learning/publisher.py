"""Puts versions of one adapter into service and takes them out.

    on disk            in host memory           a slot, its prefixes            requests
    version directory ─► held by AdapterStore ─► prefilled in the background ─► live

The disk comes first: the pointer to the live version is written before the first request gets it,
so a killed process restarts with what it served. Nothing waits for anything: requests that run
finish on their version, new ones get the live one from the moment `set_live` returns. The version
before the live one is kept in memory with its prefixes, so that going back is as quick as that.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from ..errors import ConfigError, ConflictError, CotuneError, NotFoundError
from ..types import BASE, AdapterVersion

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from ...cache.manager import KVCacheManager
    from ..adapters import AdapterStore
    from ..background import Background
    from ..lora import LoraWeights
    from .versions import VersionRecord, VersionStore

log = logging.getLogger(__name__)

STAYS_HOT = 8
"""Publications for which a prefix is taken along without having been asked for."""
WARM_TOKENS = 4096
"""Most tokens of hot prefixes that are prefilled under a new version."""


class Publisher:
    """The only one who changes which version of `adapter` is live.

    Args:
        adapter: its name.
        versions: on disk.
        adapters: in memory.
        cache: tells which prefixes are hot.
        background: prefills them.
        read: reads a version's directory; may take a while, so it is called on a thread.
        warm: whether to prefill hot prefixes before a version goes live.
        on_live: is told which version went live, and why.
    """

    def __init__(
        self,
        adapter: str,
        *,
        versions: VersionStore,
        adapters: AdapterStore,
        cache: KVCacheManager,
        background: Background,
        read: Callable[[Path], LoraWeights],
        warm: bool,
        on_live: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._adapter = adapter
        self._on_live = on_live
        self._versions = versions
        self._adapters = adapters
        self._cache = cache
        self._background = background
        self._read = read
        self._warms = warm
        self._live = 0
        self._before: AdapterVersion | None = None  # pinned
        self._hot: dict[tuple[int, ...], int] = {}  # to the publications since it was seen so
        self._changes = 0
        self._turn = asyncio.Lock()  # disk and memory change together

    @property
    def live(self) -> AdapterVersion:
        """What requests for this adapter get now."""
        return AdapterVersion(self._adapter, self._live) if self._live else BASE

    @property
    def changes(self) -> int:
        """Goes up whenever another version goes live."""
        return self._changes

    async def start(self) -> None:
        """Put what was live at the end of the last run into service.

        Raises:
            ConfigError: it is not there any more, or damaged.
        """
        number = await asyncio.to_thread(self._versions.live, self._adapter)
        if not number:
            return
        try:
            async with self.held(number) as version:
                self._adapters.set_live(version)
        except NotFoundError as error:
            folder = self._versions.directory(self._adapter, number).parent
            raise ConfigError(
                f"{self._adapter}@{number} is live, but not in {folder} any more; get it back from "
                "a backup, or promote another version (cotune adapters promote)",
                param="learning.state_dir",
                code="version_missing",
            ) from error
        self._live = number

    @asynccontextmanager
    async def held(self, number: int) -> AsyncIterator[AdapterVersion]:
        """Have a version in memory for as long as the block lasts, from disk if need be.

        Raises:
            NotFoundError: there is no such version.
            AdapterLoadError: its files are damaged.
        """
        if number == 0:
            yield BASE
            return
        version = AdapterVersion(self._adapter, number)
        try:
            self._adapters.pin(version)
        except NotFoundError:
            path = await asyncio.to_thread(self._versions.path, self._adapter, number)
            weights = await asyncio.to_thread(self._read, path)
            try:  # somebody may have been faster
                self._adapters.pin(version)
            except NotFoundError:
                self._adapters.add(self._adapter, weights, path, number=number, make_live=False)
        try:
            yield version
        finally:
            self._adapters.unpin(version)

    async def warm(self, version: AdapterVersion) -> None:
        """Prefill under `version` the prefixes that requests to the live version share.

        A failure is logged and costs nothing but the first requests' time.
        """
        if not self._warms:
            return
        hot = self._cache.hot_prefixes(self.live, WARM_TOKENS)
        # When versions follow each other quickly, what is hot is not asked for under each of them.
        self._hot = {path: age + 1 for path, age in self._hot.items() if age < STAYS_HOT}
        self._hot |= dict.fromkeys(hot, 0)
        by_age = sorted(self._hot, key=self._hot.__getitem__)
        paths = _longest(by_age, WARM_TOKENS)
        try:
            async with asyncio.TaskGroup() as group:
                for path in paths:
                    group.create_task(self._background.prefill(version, path))
        except* CotuneError as failures:
            log.warning("prefixes could not be prefilled under %s: %s", version, failures)

    async def publish(self, version: AdapterVersion, why: str, *, changes: int) -> bool:
        """Let a version that the caller holds go live, if nothing else has since `changes`."""
        await self.warm(version)
        async with self._turn:
            if changes != self._changes:
                return False
            await self._switch(version.version, why)
        return True

    async def promote(self, number: int, *, force: bool) -> VersionRecord | None:
        """Let a published version go live, at once and cold; the base model for 0.

        Nothing happens if it is live already.

        Raises:
            NotFoundError: there is no such version.
            ConflictError: the gate refused it, and `force` is not set.
        """
        record = await self._record(number) if number else None
        if record is not None and record.state == "refused" and not force:
            reasons = ", ".join(record.reasons) or "no reason given"
            raise ConflictError(
                f"{self._adapter}@{number} was refused by the gate ({reasons}); say force to "
                "promote it nevertheless",
                param="version",
                code="version_refused",
            )
        async with self.held(number), self._turn:
            if number != self._live:
                await self._switch(number, "promoted")
        return await self._record(number) if number else None

    async def rollback(self, number: int) -> VersionRecord | None:
        """Take the live version back: what was live before it is live again. None: the base model.

        Raises:
            NotFoundError: there is no such version.
            ConflictError: it is not live.
        """
        if number:
            await self._record(number)
        async with self._turn:
            if number != self._live or number == 0:
                live = f"{self._adapter}@{self._live}" if self._live else "the base model"
                raise ConflictError(
                    f"{self._adapter}@{number} is not live, {live} is; roll that back, or promote "
                    "the version that you want",
                    param="version",
                    code="version_not_live",
                )
            before = await asyncio.to_thread(self._versions.previous, self._adapter)
            async with self.held(before):
                await self._switch(before, f"rolled back from {number}")
        return await self._record(before) if before else None

    async def _record(self, number: int) -> VersionRecord:
        return await asyncio.to_thread(self._versions.record, self._adapter, number)

    async def _switch(self, number: int, why: str) -> None:
        """The version, which is held, goes live: on disk first. With `_turn` held.

        Once the disk is asked, memory follows, even for a caller that is cancelled meanwhile.
        """
        writing = asyncio.ensure_future(
            asyncio.to_thread(self._versions.set_live, self._adapter, number, why)
        )
        cancelled: asyncio.CancelledError | None = None
        while not writing.done():
            try:
                await asyncio.shield(writing)
            except asyncio.CancelledError as error:
                cancelled = error
        writing.result()
        before = self.live
        if before != BASE:
            self._adapters.pin(before)
        if number:
            self._adapters.set_live(AdapterVersion(self._adapter, number))
        else:
            self._adapters.clear_live(self._adapter)
        self._live = number
        if self._before is not None:
            self._adapters.unpin(self._before)
        self._before = before if before != BASE else None
        self._changes += 1
        log.info("%s@%d is live (%s)", self._adapter, number, why)
        self._on_live(f"{self._adapter}@{number}, {why}")
        if cancelled is not None:
            raise cancelled


def _longest(paths: list[tuple[int, ...]], max_tokens: int) -> list[tuple[int, ...]]:
    """The first of `paths` up to `max_tokens`, without those that are the beginning of another.

    What several share at their beginnings is computed once, and counts once.
    """
    chosen: list[tuple[int, ...]] = []
    room = max_tokens
    for path in paths:
        new = len(path) - max((_shared(path, known) for known in chosen), default=0)
        if not new:
            continue
        if new > room:
            break
        room -= new
        chosen.append(path)
    return chosen


def _shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
