"""The pool behind an engine, async engine or pool that the application passes to an export."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from sqlalchemy import Engine

from pidpool.pool import PidPool

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    Source: TypeAlias = "Engine | AsyncEngine | PidPool"


def checked(source: Source) -> Engine | PidPool:
    """Return the engine or pool itself; for an async engine, the engine below it.

    :raises TypeError: for anything else, and for an engine whose pool is not a `PidPool`.
    """
    found = getattr(source, "sync_engine", source)
    if not isinstance(found, Engine | PidPool):
        raise TypeError(f"{source!r} is neither an engine nor a PidPool; give options by their names")
    pool = found.pool if isinstance(found, Engine) else found
    if not isinstance(pool, PidPool):
        raise TypeError(
            f"the pool of {source!r} is a {type(pool).__name__}, which keeps no stats; "
            "create the engine with poolclass=PidPool"
        )
    return found


def pool_of(source: Engine | PidPool) -> PidPool:
    """Return the current pool; ``engine.dispose()`` replaces an engine's pool by a new one."""
    pool = source.pool if isinstance(source, Engine) else source
    assert isinstance(pool, PidPool)
    return pool
