"""asyncpg, under SQLAlchemy's asyncio adapter; read in version 0.32."""

from __future__ import annotations

from typing import Any

from pidpool.drivers.base import Driver, Settings


class AsyncPG(Driver):
    # The adapter keeps the settings itself and begins transactions with them.
    def fileno(self, connection: Any) -> int | None:
        return int(connection.driver_connection._transport.get_extra_info("socket").fileno())

    def server_pid(self, connection: Any) -> int | None:
        return int(connection.driver_connection.get_server_pid())

    def in_transaction(self, connection: Any) -> bool | None:
        return bool(connection.driver_connection.is_in_transaction())

    def settings(self, connection: Any) -> Settings | None:
        names = ("isolation_level", "_isolation_setting", "readonly", "deferrable")
        return {name: getattr(connection, name) for name in names}
