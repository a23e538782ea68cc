"""A checkout that is told of: when and where it was made, so that its end, or that it lasts for long, can
be told in the context in which it was made. Other checkouts have no such thing.
"""

from __future__ import annotations

import math
import time
from contextvars import Context
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pidpool.ownership import ConnectionTag
    from pidpool.places import Place
    from pidpool.proxied import PidRecord


class Checkout:
    """One checkout, kept by its pool entry until that comes back.

    :param record: the entry.
    :param told: whether there was an event of the checkout, so that there is one of its end.
    """

    __slots__ = ("record", "since", "told", "due_at", "place", "context")

    due_at: float
    """`time.perf_counter()` when it will have lasted for `hold_warning` seconds; infinite once that was
    told."""

    def __init__(self, record: PidRecord, since: float, *, told: bool) -> None:
        self.record = record
        self.since = since
        self.told = told
        self.due_at = math.inf
        self.place: Place | None = None
        self.context: Context | None = None

    def tell_overdue(self, now: float) -> None:
        """Tell, in the context in which the checkout was made, that it has lasted for long."""
        self.due_at = math.inf
        pool = self.record.pidpool
        if pool.hold_warning is None or self.context is None:
            return
        self.context.copy().run(
            pool._telemetry.checkout_overdue,
            self._tag(),
            now - self.since,
            pool.hold_warning,
            self._where(),
        )

    def tell_return(self) -> None:
        """Tell that the checkout is over. Before the connection is idle again: whoever gets it next tells
        of that afterwards."""
        pool, tag = self.record.pidpool, self._tag()
        use_time = time.perf_counter() - self.since
        self.due_at = math.inf
        if self.told and tag is not None:
            pool._telemetry.connection_checked_in(tag, use_time)
        if pool.hold_warning is not None and use_time > pool.hold_warning and self.context is not None:
            pool._telemetry.checkout_returned_late(tag, use_time, pool.hold_warning, self._where())

    def _tag(self) -> ConnectionTag | None:
        holding = self.record.pidpool_holding
        return None if holding is None else holding.tag

    def _where(self) -> str | None:
        return None if self.place is None else str(self.place)
