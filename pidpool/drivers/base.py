"""`Driver`: what a driver's connection says of itself without I/O and without a lock of the driver's. This
one is for a driver that is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Settings = Mapping[str, object]
"""What a driver holds locally of a connection's settings, by the names of its attributes."""


class Driver:
    """A driver that is not known: it may have a descriptor, and says nothing else.

    In a child these are the only calls that may be made on an inherited connection, but for
    `max_connections`.
    """

    def fileno(self, connection: Any) -> int | None:
        # By the type, since asking a stand-in or a mock for an attribute may be a use of it.
        if callable(getattr(type(connection), "fileno", None)):
            number = connection.fileno()
            if isinstance(number, int) and number >= 0:
                return number
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

        The one method here that sends something: for a new connection of this process's own.
        """
        return None
