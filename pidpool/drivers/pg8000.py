"""pg8000; read in core.py of version 1.31."""

from __future__ import annotations

import struct
from typing import Any

from pidpool.drivers.postgresql import PostgreSQL


class Pg8000(PostgreSQL):
    # SQLAlchemy declares a cursor on the server by a statement, and fetches from it.
    streams_by_any_cursor = True

    # Isolation level, read only and deferrable are kept by the server: only autocommit is held here.
    def fileno(self, connection: Any) -> int | None:
        socket = connection._usock
        return None if socket is None else int(socket.fileno())

    def server_pid(self, connection: Any) -> int | None:
        pid, _ = struct.unpack("!ii", connection._backend_key_data[:8])
        return int(pid)

    def in_transaction(self, connection: Any) -> bool | None:
        if connection._usock is None:
            return None
        # None before the first statement.
        return connection._transaction_status not in (None, b"I")
