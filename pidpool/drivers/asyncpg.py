"""asyncpg, under SQLAlchemy's asyncio adapter; read in version 0.32."""

from __future__ import annotations

from typing import Any

from pidpool.drivers.adapted import Adapted
from pidpool.drivers.base import Settings


class AsyncPG(Adapted):
    # The adapter keeps the settings itself and begins transactions with them.
    def fileno(self, connection: Any) -> int | None:
        return int(connection.driver_connection._transport.get_extra_info("socket").fileno())

    def server_pid(self, connection: Any) -> int | None:
        return int(connection.driver_connection.get_server_pid())

    def in_transaction(self, connection: Any) -> bool | None:
        return bool(connection.driver_connection.is_in_transaction())

    def settings(self, connection: Any) -> Settings | None:
        return {name: getattr(connection, name) for name in ("isolation_level", "readonly", "deferrable")}

    def apply(self, connection: Any, settings: Settings) -> None:
        others = dict(settings)
        level = others.pop("isolation_level", None)
        # Each by its own way, so that the adapter has the level to which autocommit returns too.
        if level == "autocommit":
            connection.autocommit = True
        elif level != connection.isolation_level:
            connection.set_isolation_level(level)
        super().apply(connection, others)
