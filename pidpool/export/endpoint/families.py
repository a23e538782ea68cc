"""The families whose stats an endpoint shows. Read from memory: nothing here opens a connection,
waits for one, or asks a server.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from pidpool.export.pools import checked, pool_of
from pidpool.stats.snapshots import FamilyStats

if TYPE_CHECKING:
    from pidpool.export.pools import Source


class Families:
    """The families of some engines and pools.

    :raises TypeError: as `checked`, and if no engine or pool is given.
    """

    def __init__(self, sources: tuple[Source, ...]) -> None:
        if not sources:
            raise TypeError("give at least one engine or pool whose stats are to be shown")
        self._sources = [checked(source) for source in sources]

    def snapshots(self) -> list[FamilyStats]:
        """Return a snapshot of each family; no two with the same name."""
        pools = {id(pool): pool for pool in map(pool_of, self._sources)}
        names: dict[str, int] = {}
        families = []
        for pool in pools.values():
            family = pool.family_stats()
            count = names[family.pool] = names.get(family.pool, 0) + 1
            if count > 1:  # two series of one name would cost Prometheus the whole scrape
                family = dataclasses.replace(family, pool=f"{family.pool}#{count}")
            families.append(family)
        return families
