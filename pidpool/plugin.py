"""PidPool for an application whose code is not to be changed: ``?plugin=pidpool`` in its database URL."""

from __future__ import annotations

from typing import Any

from sqlalchemy.engine import URL, CreateEnginePlugin
from sqlalchemy.pool import QueuePool

from pidpool.aio import AsyncPidPool
from pidpool.pool import PidPool

_OPTIONS = {
    "on_foreign": str,
    "inherited_sockets": str,
    "hold_warning": float,
    "family": str,
    "family_limit": int,
    "max_idle": float,
    "recycle_jitter": float,
}


class PidPoolPlugin(CreateEnginePlugin):
    """Sets ``poolclass`` to `PidPool`, or `AsyncPidPool` for an async engine.

    PidPool's own options may stand in the URL too: ``?plugin=pidpool&on_foreign=refuse``. An engine that
    has or asks for a pool that is not a QueuePool (NullPool, SQLite in memory) keeps it.

    :raises ValueError: if an option has a value that it does not take.
    """

    def __init__(self, url: URL, kwargs: dict[str, Any]) -> None:
        super().__init__(url, kwargs)
        dialect: Any = url.get_dialect(bool(kwargs.get("_is_async")))
        wanted = kwargs.get("poolclass") or dialect.get_pool_class(url)
        if "pool" in kwargs or not issubclass(wanted, QueuePool):
            return
        if not issubclass(wanted, PidPool):
            kwargs["poolclass"] = AsyncPidPool if dialect.is_async else PidPool
        for option, convert in _OPTIONS.items():
            if option in url.query:
                try:
                    kwargs[option] = convert(url.query[option])
                except ValueError:
                    raise ValueError(f"{option}={url.query[option]!r} in the URL: takes a number") from None

    def update_url(self, url: URL) -> URL:
        """Return the URL without what is not the driver's."""
        return url.difference_update_query(_OPTIONS)
