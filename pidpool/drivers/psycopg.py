"""psycopg 3, also under SQLAlchemy's asyncio adapter; read in _connection_base.py of version 3.3."""

from __future__ import annotations

from typing import Any

from pidpool.drivers.base import Settings
from pidpool.drivers.postgresql import PostgreSQL


class Psycopg(PostgreSQL):
    def server_pid(self, connection: Any) -> int | None:
        return int(connection.pgconn.backend_pid)

    def in_transaction(self, connection: Any) -> bool | None:
        if connection.closed:
            return None
        return bool(connection.pgconn.transaction_status != 0)  # PQTRANS_IDLE

    def is_busy(self, connection: Any) -> bool | None:
        return bool(connection.pgconn.transaction_status == 1)  # PQTRANS_ACTIVE

    def settings(self, connection: Any) -> Settings | None:
        return {
            "isolation_level": connection.isolation_level,
            "read_only": connection.read_only,
            "deferrable": connection.deferrable,
            "autocommit": connection.autocommit,
        }


class AsyncPsycopg(Psycopg):
    # To set one is a coroutine here, even though it is local; the adapter has methods that await it.
    def fileno(self, connection: Any) -> int | None:
        return super().fileno(connection.driver_connection)

    def server_pid(self, connection: Any) -> int | None:
        return super().server_pid(connection.driver_connection)

    def in_transaction(self, connection: Any) -> bool | None:
        return super().in_transaction(connection.driver_connection)

    def is_busy(self, connection: Any) -> bool | None:
        return super().is_busy(connection.driver_connection)

    def settings(self, connection: Any) -> Settings | None:
        return super().settings(connection.driver_connection)

    def apply(self, connection: Any, settings: Settings) -> None:
        for name, value in settings.items():
            if getattr(connection.driver_connection, name) != value:
                getattr(connection, f"set_{name}")(value)
