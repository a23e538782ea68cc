"""pidpool: a SQLAlchemy connection pool whose connections survive a fork of the process.

``create_engine(url, poolclass=PidPool)`` is all an application needs.
"""

from pidpool.aio import AsyncPidPool
from pidpool.errors import ForeignConnectionError
from pidpool.ownership import ConnectionTag, tag_of
from pidpool.pool import PidPool

__all__ = ["AsyncPidPool", "ConnectionTag", "ForeignConnectionError", "PidPool", "tag_of"]
