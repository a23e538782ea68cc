"""The families of the engines that an export is for, as they are now. Read from memory: nothing here opens a
connection, waits for one, or asks a server.
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
        families: dict[str, FamilyStats] = {}
        for pool in pools.values():
            family = pool.family_stats()
            name, number = family.pool, 1
            while name in families:  # two series of one name would cost Prometheus the whole scrape
                number += 1
                name = f"{family.pool}#{number}"
            families[name] = family if number == 1 else dataclasses.replace(family, pool=name)
        return [*families.values()]
