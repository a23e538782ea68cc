"""`Driver`: what a driver's connection says of itself without I/O and without a lock of the driver's. This
one is for a driver that is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pidpool.drivers.sockets import Sockets

Settings = Mapping[str, object]
"""What a driver holds locally of a connection's settings, by the names of its attributes."""


class Driver:
    """A driver that is not known: it may have a descriptor, and says nothing else.

    In a child these are the only calls that may be made on an inherited connection, but for
    `find_fileno` and `max_connections`.
    """

    streams_by_any_cursor: bool = False
    """Whether SQLAlchemy streams results by a cursor that was asked for as any other."""

    def fileno(self, connection: Any) -> int | None:
        # By the type, since asking a stand-in or a mock for an attribute may be a use of it.
        if callable(getattr(type(connection), "fileno", None)):
            number = connection.fileno()
            if isinstance(number, int) and number >= 0:
                return number
        return None

    def find_fileno(self, connection: Any, before: Sockets) -> int | None:
        """Find the descriptor of a connection just opened whose driver does not give it; None if that is not
        possible. May ask the server.

        :param before: the sockets that there were before the connect.
        """
        return None

    def server_pid(self, connection: Any) -> int | None:
        return None

    def in_transaction(self, connection: Any) -> bool | None:
        """Return whether a transaction is open on the server; None if that is not known."""
        return None

    def is_busy(self, connection: Any) -> bool | None:
        """Return whether a call is in flight on the connection; None if that is not known."""
        return None

    def settings(self, connection: Any) -> Settings | None:
        """Return what the driver would send with its next transaction; None if that is not known."""
        return None

    def apply(self, connection: Any, settings: Settings) -> None:
        """Give a fresh connection these settings, but for those that it has already."""
        for name, value in settings.items():
            if getattr(connection, name) != value:
                setattr(connection, name, value)

    def max_connections(self, connection: Any) -> int | None:
        """Ask the server how many connections it takes; None if the way to ask is not known.

        As `find_fileno` for a new connection of this process's own: the two methods that may send something.
        """
        return None
