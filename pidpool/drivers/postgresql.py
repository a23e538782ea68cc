"""What the synchronous drivers of PostgreSQL have in common."""

from __future__ import annotations

from typing import Any

from pidpool.drivers.base import Driver


class PostgreSQL(Driver):
    """What the drivers of PostgreSQL have in common."""

    def max_connections(self, connection: Any) -> int | None:
        if self.in_transaction(connection) is not False:
            return None
        cursor = connection.cursor()
        try:
            cursor.execute("show max_connections")
            return int(cursor.fetchone()[0])
        finally:
            cursor.close()
            connection.rollback()
