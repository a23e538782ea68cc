"""`AsyncPidPool`: PidPool for `create_async_engine`."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable

from pidpool._sqlalchemy.async_idle_queue import AsyncIdleQueuePool
from pidpool._sqlalchemy.asyncio_adapter import await_only, greenlet_spawn
from pidpool.pool import PidPool


class AsyncPidPool(AsyncIdleQueuePool, PidPool):
    """`PidPool` with an asyncio queue: ``create_async_engine(url, poolclass=AsyncPidPool)``.

    Everything that `PidPool` says holds, in a child that runs an event loop of its own: asyncio
    does not support going on with the parent's. No thread touches a connection: the event loop that opened
    the pool's newest connection closes what is to be closed. A loop that has ended closes nothing, so
    dispose of the engine in it.
    """

    _loop: weakref.ref[asyncio.AbstractEventLoop] | None = None

    def start_idle_thread(self) -> None:
        """As PidPool's; also note the loop in which connections live."""
        if self.waits_in_turns:
            try:
                # Weak: a loop that has ended, and its transports, must not live on with the pool.
                self._loop = weakref.ref(asyncio.get_running_loop())
            except RuntimeError:
                self._loop = None
            super().start_idle_thread()

    def pause(self, seconds: float) -> None:
        """Let other tasks go on."""
        await_only(asyncio.sleep(seconds))

    def where_connections_may_be_closed(self, close: Callable[[], None]) -> None:
        """Have the loop call `close` when it runs next."""
        loop = None if self._loop is None else self._loop()
        if loop is not None and loop.is_running():
            asyncio.run_coroutine_threadsafe(greenlet_spawn(close), loop)
