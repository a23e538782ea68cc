"""`AsyncPidPool`: PidPool for `create_async_engine`."""

from __future__ import annotations

from pidpool._sqlalchemy.async_idle_queue import AsyncIdleQueuePool
from pidpool.pool import PidPool


class AsyncPidPool(AsyncIdleQueuePool, PidPool):
    """`PidPool` with an asyncio queue: ``create_async_engine(url, poolclass=AsyncPidPool)``.

    Everything that `PidPool` says holds, in a child that runs an event loop of its own: asyncio
    does not support going on with the parent's.
    """
