"""pidpool: a SQLAlchemy connection pool whose connections survive a fork of the process.

``create_engine(url, poolclass=PidPool)`` is all an application needs.
"""

from typing import TYPE_CHECKING

from pidpool.aio import AsyncPidPool
from pidpool.errors import ForeignConnectionError
from pidpool.forks.ownership import tag_of
from pidpool.pool import PidPool
from pidpool.tag import ConnectionTag

if TYPE_CHECKING:
    from pidpool.export.endpoint import StatsApp, serve_stats

__all__ = [
    "AsyncPidPool",
    "ConnectionTag",
    "ForeignConnectionError",
    "PidPool",
    "StatsApp",
    "serve_stats",
    "tag_of",
]


def __getattr__(name: str) -> object:
    # Not before they are asked for: a pool needs no HTTP.
    if name in ("StatsApp", "serve_stats"):
        from pidpool.export import endpoint

        return getattr(endpoint, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
