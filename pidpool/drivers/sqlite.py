"""CPython's sqlite3."""

from __future__ import annotations

from typing import Any

from pidpool.drivers.base import Driver, Settings


class SQLite(Driver):
    # Has no descriptor to sever: its inherited handles are pinned and never closed, since closing one
    # drops the owner's locks on the file (https://sqlite.org/howtocorrupt.html, section 2.6).
    def in_transaction(self, connection: Any) -> bool | None:
        return bool(connection.in_transaction)

    def is_busy(self, connection: Any) -> bool | None:
        return False  # it has no socket

    def settings(self, connection: Any) -> Settings | None:
        return {"isolation_level": connection.isolation_level}
