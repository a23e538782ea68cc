"""`Wait`: a thread's wait for a connection, or for a permit to open one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from pidpool.events.pool_events import PoolEvents
from pidpool.stats.budget import Budget, Permit


class Wait:
    """One wait. It is counted from its first look for what is left of its time on, as long as it lives: no
    interrupt can leave it counted.

    :param events: the pool's.
    :param timeout: the pool's, in seconds; None for no bound.
    """

    __slots__ = ("since", "reason", "_events", "_deadline", "_is_counted", "_wanting", "__weakref__")

    def __init__(self, events: PoolEvents, timeout: float | None) -> None:
        self.since = time.monotonic()
        self.reason: str | None = None
        """Why there was no connection, if that was for want of a permit."""
        self._events = events
        self._deadline = math.inf if timeout is None else self.since + timeout
        self._is_counted = False
        self._wanting: Budget | None = None

    def left(self) -> float:
        """Return the seconds that are left."""
        if not self._is_counted:
            self._is_counted = True
            self._events.counters.waiting.add(self)
        return self._deadline - time.monotonic()

    def take_permit(self, budget: Budget | None, make_good: Callable[[], None]) -> Permit | None:
        """Take a permit if there is one; otherwise have other processes know that one is wanted.

        :param make_good: gives back those that interrupted operations have lost.
        """
        if budget is None:
            return None
        permit = budget.take()
        if permit is None and self._wanting is None:
            make_good()
            permit = budget.take()
        if permit is None:
            if self._wanting is not budget:  # a child, forked meanwhile, has a budget of its own
                self._wanting = budget
                budget.begin_wish(self)
            budget.wish()
            self.reason = (
                f"family_limit of {budget.limit} reached"
                if budget.limit
                else "this process found no room in the memory of its family, so it gets no connection"
            )
        return permit
