"""`Adapted`: what the drivers under SQLAlchemy's asyncio adapters have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pidpool.drivers.base import Driver


class Adapted(Driver):
    """A driver under an adapter of SQLAlchemy's, whose `driver_connection` is the driver's own."""

    is_executing: Callable[[Any], bool] | None = None
    """Says of an adapter whether a statement is in flight. No driver says it, so the room of SQLAlchemy's
    private names sets this."""

    def is_busy(self, connection: Any) -> bool | None:
        ask = Adapted.is_executing
        return None if ask is None else ask(connection)
