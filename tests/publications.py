"""Versions for tests of publication: random adapters, put on disk and live as the learner does it.

publisher = Publications(rt, model)
number = await publisher.publish("tutor", seed=3)
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from cotune.runtime.learning.versions import Lineage, Manifest
from tiny_models import save_lora

if TYPE_CHECKING:
    from pathlib import Path

    from cotune import Runtime
    from cotune.runtime.learning.service import LearningService


def manifest(parent: int = 0, reasons: tuple[str, ...] = (), **metrics: float) -> Manifest:
    """What stands beside a version's weights."""
    return Manifest(parent=parent, lineage=Lineage(steps=1), reasons=reasons, metrics=metrics)


class Publications:
    """Publishes random adapters in a runtime that learns.

    Args:
        rt: entered.
        model: the base model, from `tiny_models.tiny_model`.

    Attributes:
        paths: the PEFT directory of each version, by ``name@number``.
    """

    def __init__(self, rt: Runtime, model: Any) -> None:
        learning = rt._served.learning
        assert learning is not None
        self.service: LearningService = learning
        self._model = model
        self.paths: dict[str, Path] = {}

    async def write(self, name: str, seed: int, *, refused: bool = False) -> int:
        """Put a version on disk; its number. Equal seeds give equal weights."""
        versions = self.service.versions

        def save(directory: Path) -> None:
            save_lora(directory, self._model, seed=seed)

        number = await asyncio.to_thread(versions.next_number, name)
        self.paths[f"{name}@{number}"] = await asyncio.to_thread(
            versions.write,
            name,
            number,
            save,
            manifest(reasons=("not_better",) if refused else ()),
            refused=refused,
        )
        return number

    async def publish(self, name: str, seed: int) -> int:
        """Write a version and let it go live, its prefixes first; its number."""
        number = await self.write(name, seed)
        publisher = self.service.publisher(name)
        async with publisher.held(number) as version:
            assert await publisher.publish(version, "it is new", changes=publisher.changes)
        return number
