"""mysqlclient (read in version 2.2) and PyMySQL (1.1)."""

from __future__ import annotations

from typing import Any

from pidpool.drivers.base import Driver


class MySQL(Driver):
    """mysqlclient: it gives no descriptor, and no state of the transaction."""

    def server_pid(self, connection: Any) -> int | None:
        return int(connection.thread_id())


class PyMySQL(MySQL):
    def fileno(self, connection: Any) -> int | None:
        socket = connection._sock
        return None if socket is None else int(socket.fileno())

    def in_transaction(self, connection: Any) -> bool | None:
        return bool(connection.server_status & 1)  # SERVER_STATUS_IN_TRANS of the last packet
