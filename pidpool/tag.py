"""`ConnectionTag`: the owner of a connection, and the numbers by which others know the connection."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ConnectionTag:
    """The owner of a connection, and how the operating system and the server number the connection.

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
    """The inode of that socket. It shows whether the descriptor is still that socket."""
    server_pid: int | None
    """The answer of ``pg_backend_pid()`` (or MySQL's ``connection_id()``) on this connection."""
    opened_at: float
    """Seconds since the epoch."""
