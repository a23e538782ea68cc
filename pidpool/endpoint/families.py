"""From what an application has (engines, pools) to the stats of their families, as they are now.

Read from shared memory: nothing here opens a connection, waits for one, or asks a server.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeAlias

from sqlalchemy import Engine

from pidpool.pool import PidPool
from pidpool.stats import FamilyStats

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    Source: TypeAlias = "Engine | AsyncEngine | PidPool"


class Families:
    """The engines and pools that an endpoint tells of.

    :raises TypeError: for anything else, and for an engine whose pool is no `PidPool`.
    """

    def __init__(self, sources: tuple[Source, ...]) -> None:
        if not sources:
            raise TypeError("give at least one engine or pool whose stats are to be shown")
        self._sources: list[Any] = [getattr(source, "sync_engine", source) for source in sources]
        for source in self._sources:
            if not isinstance(source, Engine | PidPool):
                raise TypeError(f"{source!r} is no engine and no PidPool; give options by their names")
            pool = _pool_of(source)
            if not isinstance(pool, PidPool):
                raise TypeError(
                    f"the pool of {source!r} is a {type(pool).__name__}, which keeps no stats; "
                    "create the engine with poolclass=PidPool"
                )

    def now(self) -> list[FamilyStats]:
        """Return a snapshot of each family; no two with the same name."""
        # Looked up each time: engine.dispose() puts a new pool in the place of the old one.
        pools = {id(pool): pool for pool in map(_pool_of, self._sources)}
        names: dict[str, int] = {}
        families = []
        for pool in pools.values():
            family = pool.family_stats()
            count = names[family.pool] = names.get(family.pool, 0) + 1
            if count > 1:  # two series of one name would cost Prometheus the whole scrape
                family = dataclasses.replace(family, pool=f"{family.pool}#{count}")
            families.append(family)
        return families


def _pool_of(source: Any) -> Any:
    return source.pool if isinstance(source, Engine) else source
