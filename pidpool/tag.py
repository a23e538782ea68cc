"""`ConnectionTag`: which process opened a connection, and what the connection is to the operating system and
to the server. `tag_of` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Connection

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection


@dataclass(frozen=True)
class ConnectionTag:
    """Which process opened a connection, and what it is to the operating system and to the server.

    Made once, when the connection is opened; immutable, can be pickled and passed between
    processes. A child reads its parent's tag on an inherited connection.
    """

    connection_id: str
    """``<pid of the owner>-<number>``; the number counts the connections of that process."""
    owner_pid: int
    """The process that opened the connection."""
    fd: int | None
    """The descriptor of its socket in the owner; None if the driver does not give it."""
    socket_inode: int | None
    """The inode of that socket. It proves that the descriptor still is the same socket."""
    server_pid: int | None
    """What ``pg_backend_pid()`` (or MySQL's ``connection_id()``) answers on it."""
    opened_at: float
    """Seconds since the epoch."""


def tag_of(
    x: Connection | AsyncConnection | PoolProxiedConnection | ConnectionPoolEntry,
) -> ConnectionTag | None:
    """Return the tag of the connection that `x` holds at present.

    Never blocks, opens nothing and may be called in any thread and any process: in a forked child
    an inherited connection still has its owner's tag until it is replaced.

    :param x: a SQLAlchemy ``Connection`` or ``AsyncConnection``, what ``engine.raw_connection()``
        or ``pool.connect()`` returned, or the entry that pool events are given.
    :return: None if `x` holds no connection now, being closed or invalidated.
    :raises TypeError: if `x` is none of these, or not of a `PidPool`.
    """
    proxied: Any = x
    if hasattr(x, "sync_connection"):  # AsyncConnection; None before it is started
        proxied = x.sync_connection
        if proxied is None:
            return None
    if isinstance(proxied, Connection):
        if proxied.closed or proxied.invalidated:
            return None
        proxied = proxied.connection  # which reconnects only after an invalidation
    try:
        tag: ConnectionTag | None = proxied.pidpool_tag
    except AttributeError:
        # Without the object's repr: a driver's shows the DSN.
        raise TypeError(
            f"a {type(x).__name__} has no tag: tag_of() takes a Connection, AsyncConnection, pooled "
            "connection or pool entry of an engine made with poolclass=PidPool"
        ) from None
    return tag
