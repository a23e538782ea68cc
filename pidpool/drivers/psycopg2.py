"""psycopg2; read in connection_type.c of version 2.9."""

from __future__ import annotations

from typing import Any

from pidpool.drivers.base import Settings
from pidpool.drivers.postgresql import PostgreSQL


class Psycopg2(PostgreSQL):
    # All are plain reads of the connection's struct or of libpq's PGconn. The setters of the
    # settings are local too, and refused while a transaction is open.
    def server_pid(self, connection: Any) -> int | None:
        return int(connection.get_backend_pid())

    def in_transaction(self, connection: Any) -> bool | None:
        if connection.closed:
            return None
        return bool(connection.get_transaction_status() != 0)  # PQTRANS_IDLE

    def is_busy(self, connection: Any) -> bool | None:
        return bool(connection.get_transaction_status() == 1)  # PQTRANS_ACTIVE

    def settings(self, connection: Any) -> Settings | None:
        return {
            # isolation_level, readonly and deferrable first: psycopg2 sends them at once, by SQL,
            # when they are set in autocommit mode.
            "isolation_level": connection.isolation_level,
            "readonly": connection.readonly,
            "deferrable": connection.deferrable,
            "autocommit": connection.autocommit,
        }
