"""A checkout that is told of: when and where it was made, so that its end, or that it lasts for long, can
be told in the context in which it was made. Other checkouts have no such thing.
"""

from __future__ import annotations

import math
import time
from contextvars import Context
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pidpool._sqlalchemy.checkout import PidRecord
    from pidpool.events.user_code import Place
    from pidpool.forks.ownership import ConnectionTag


class Checkout:
    """One checkout, kept by its pool entry until that comes back.

    :param record: the entry.
    :param since: `time.perf_counter()` when the connection was handed out.
    :param told: whether there was an event of the checkout, so that there is one of its end.
    """

    __slots__ = ("record", "since", "told", "due_at", "place", "to_tell")

    due_at: float
    """When it will have lasted for the pool's `hold_warning` seconds."""
    place: Place | None
    to_tell: list[Context] | None
    """The context in which the checkout was made, for `checkout.overdue`. Popped by the one who tells
    it, the watching thread or the one that returns the connection; None where nobody watches."""

    def __init__(self, record: PidRecord, since: float, *, told: bool) -> None:
        self.record = record
        self.since = since
        self.told = told
        self.due_at = math.inf
        self.place = self.to_tell = None

    def tell_overdue(self, now: float) -> None:
        """Tell, unless that was done, that the checkout has lasted for `hold_warning` seconds."""
        context = self._claim()
        if context is not None:
            self._tell_overdue(context, now - self.since)

    def tell_return(self) -> None:
        """Tell that the checkout is over. Before the connection is idle again: whoever gets it next tells
        of that afterwards."""
        telemetry, tag = self.record.pidpool._telemetry, self._tag()
        hold_warning = None if self.to_tell is None else self.record.pidpool.hold_warning
        context = self._claim()
        # Read after the claim: where the thread was first, this has lasted for `hold_warning` seconds.
        use_time = time.perf_counter() - self.since
        if self.told and tag is not None:
            telemetry.connection_checked_in(tag, use_time)
        if hold_warning is not None and use_time >= hold_warning:
            if context is not None:  # the thread has not come round to it
                self._tell_overdue(context, use_time)
            telemetry.checkout_returned_late(tag, use_time, hold_warning, self._where())

    def _claim(self) -> Context | None:
        try:
            return self.to_tell.pop() if self.to_tell else None
        except IndexError:
            return None

    def _tell_overdue(self, context: Context, held: float) -> None:
        pool = self.record.pidpool
        assert pool.hold_warning is not None
        told = pool._telemetry.checkout_overdue
        context.run(told, self._tag(), held, pool.hold_warning, self._where())

    def _tag(self) -> ConnectionTag | None:
        holding = self.record.pidpool_holding
        return None if holding is None else holding.tag

    def _where(self) -> str | None:
        return None if self.place is None else str(self.place)
