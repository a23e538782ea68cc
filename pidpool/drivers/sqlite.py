"""CPython's sqlite3, and aiosqlite (read in version 0.22) under SQLAlchemy's asyncio adapter.

They have no descriptor to sever: inherited handles are pinned and never closed, since closing one drops the
owner's locks on the file (https://sqlite.org/howtocorrupt.html, section 2.6).
"""

from __future__ import annotations

from typing import Any

from pidpool.drivers.base import Driver, Settings


class SQLite(Driver):
    def fileno(self, connection: Any) -> int | None:
        return None

    def in_transaction(self, connection: Any) -> bool | None:
        return bool(connection.in_transaction)

    def is_busy(self, connection: Any) -> bool | None:
        return False  # it has no socket

    def settings(self, connection: Any) -> Settings | None:
        return {"isolation_level": connection.isolation_level}


class AioSQLite(SQLite):
    def in_transaction(self, connection: Any) -> bool | None:
        return super().in_transaction(connection.driver_connection)

    def settings(self, connection: Any) -> Settings | None:
        return super().settings(connection.driver_connection)
