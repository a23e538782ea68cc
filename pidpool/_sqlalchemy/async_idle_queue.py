"""`AsyncIdleQueue`: the queue of idle connections under asyncio, where tasks wait in the place of threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy.pool import AsyncAdaptedQueuePool

from pidpool._sqlalchemy.asyncio_adapter import await_only
from pidpool._sqlalchemy.idle_queue import IdleQueue, Waiter

_T = TypeVar("_T")


class AsyncIdleQueue(IdleQueue[_T]):
    """An `IdleQueue` for the tasks of one event loop.

    An item that was put for a waiting task is that task's: a task that asks meanwhile does not get it.
    """

    patience = 0.0

    def _wait(self, timeout: float | None, since: float | None, give_up: Callable[[], bool] | None) -> _T:
        # A task that waits in several calls is the last each time: of hundreds that all come again, those
        # that came to the front would pass one another.
        return super()._wait(timeout, None, give_up)

    def make_waiter(self) -> Waiter:
        """Return what the running task waits with.

        :raises sqlalchemy.exc.MissingGreenlet: if it can't wait here.
        """
        waiter: Waiter = await_only(_waiting_task())
        return waiter

    def abandon(self) -> None:
        """As `IdleQueue.abandon`; the tasks that wait are the parent's, and do not run in its child."""
        # To wake one would write to the socket by which its event loop is woken: the parent has that too.
        self._waiters.clear()
        super().abandon()


class _WaitingTask(Waiter):
    """A task that waits for an item. While it sleeps its loop has a timer, which keeps the task alive."""

    __slots__ = ("_loop", "_woken", "_has_given_up")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._woken = self._loop.create_future()
        super().__init__()

    @property
    def is_closed(self) -> bool:
        """Whether it waits no more; so does a task whose loop was closed before it."""
        return self._has_given_up or self._loop.is_closed()

    @is_closed.setter
    def is_closed(self, value: bool) -> None:
        self._has_given_up = value

    def sleep(self, seconds: float) -> None:
        # Not asyncio.wait_for: before Python 3.12 it loses a cancellation that comes just after the item.
        await_only(asyncio.wait([self._woken], timeout=seconds))
        if self._woken.done():
            self._woken = self._loop.create_future()

    def wake(self) -> None:
        # Perhaps in another thread, in which a checkout was collected.
        try:
            is_in_loop = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            is_in_loop = False  # no loop runs in this thread
        if is_in_loop:
            self._wake()
            return
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:
            pass  # the loop is closed

    def _wake(self) -> None:
        if not self._woken.done():
            self._woken.set_result(None)


async def _waiting_task() -> Waiter:
    return _WaitingTask()


class AsyncIdleQueuePool(AsyncAdaptedQueuePool):
    """SQLAlchemy's AsyncAdaptedQueuePool with this queue."""

    _queue_class: Any = AsyncIdleQueue
