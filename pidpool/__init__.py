"""pidpool: a SQLAlchemy connection pool whose connections survive a fork of the process.

``create_engine(url, poolclass=PidPool)`` is all an application needs.
"""

from typing import TYPE_CHECKING

from pidpool.aio import AsyncPidPool
from pidpool.errors import ForeignConnectionError
from pidpool.pool import PidPool
from pidpool.tag import ConnectionTag, tag_of

if TYPE_CHECKING:
    from pidpool.export.endpoint import StatsApp, serve_stats

    __version__: str

__all__ = [
    "AsyncPidPool",
    "ConnectionTag",
    "ForeignConnectionError",
    "PidPool",
    "StatsApp",
    "__version__",
    "serve_stats",
    "tag_of",
]


def __getattr__(name: str) -> object:
    # Not before they are asked for: a pool needs no HTTP.
    if name in ("StatsApp", "serve_stats"):
        from pidpool.export import endpoint

        return getattr(endpoint, name)
    if name == "__version__":
        from importlib.metadata import version

        return version("pidpool")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
