"""What pidpool has of SQLAlchemy's asyncio adapters: the way from a greenlet to the event loop and back, and
whether an adapter's statement is in flight, which no driver says.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.util import await_only, greenlet_spawn

from pidpool._sqlalchemy import contract  # noqa: F401  checks what is relied on here
from pidpool.drivers import Adapted

__all__ = ["await_only", "greenlet_spawn"]


def _is_executing(adapter: Any) -> bool:
    return bool(adapter._execute_mutex.locked())  # held during each statement


Adapted.is_executing = staticmethod(_is_executing)
