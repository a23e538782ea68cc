"""The names under which pools stand in events and metrics, if the application gives none."""

from __future__ import annotations

import itertools
import weakref

_numbers = itertools.count(1)
_holders: weakref.WeakValueDictionary[str, object] = weakref.WeakValueDictionary()
"""The pools that are named after an address, as long as they live. Without a lock, which a fork could copy
locked: two pools that are made in the same moment may get one name."""


def name_for(holder: object, address: str | None) -> str:
    """Return a name for a pool: its address, with ``#2`` and so on for further pools of that address.

    Without an address: ``pool-1`` and so on.

    :param holder: what has the name as long as it lives.
    """
    if address is None:
        return f"pool-{next(_numbers)}"
    for number in itertools.count(1):
        name = address if number == 1 else f"{address}#{number}"
        if _holders.setdefault(name, holder) is holder:
            break
    return name
