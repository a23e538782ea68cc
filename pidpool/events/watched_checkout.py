"""`WatchedCheckout`: when and where a checkout began, and the context for its later events. A checkout of
which nothing will be logged has no such object.
"""

from __future__ import annotations

import math
import time
from contextvars import Context
from typing import Protocol

from pidpool.events.pool_events import PoolEvents
from pidpool.events.user_code import CodeLine
from pidpool.tag import ConnectionTag


class WatchedEntry(Protocol):
    """The pool's entry that is checked out, as far as its events need it."""

    pool_events: PoolEvents
    watched: WatchedCheckout | None

    @property
    def pidpool_tag(self) -> ConnectionTag | None: ...


class WatchedCheckout:
    """One checkout, kept by its pool entry until the connection comes back.

    It does not refer to the entry: an entry in a cycle, if an interrupt loses it, counts until a collection.

    :param since: `time.perf_counter()` when the connection was handed out.
    :param is_logged: whether the checkout was logged, so that its end is logged too.
    """

    __slots__ = ("since", "is_logged", "hold_warning", "due_at", "code_line", "_overdue_contexts")

    def __init__(self, since: float, *, is_logged: bool) -> None:
        self.since = since
        self.is_logged = is_logged
        self.hold_warning: float | None = None
        """The pool's `hold_warning` in seconds; None if the duration is not watched."""
        self.due_at = math.inf
        """When it will have lasted for `hold_warning` seconds."""
        self.code_line: CodeLine | None = None
        """The line of the user's code that made it."""
        # The context in which the checkout was made, for `checkout.overdue`. The thread that logs the event
        # pops it: the watching thread, or the thread that returns the connection.
        self._overdue_contexts: list[Context] = []

    def watch_duration(self, hold_warning: float, code_line: CodeLine | None, context: Context) -> None:
        """Have the checkout logged as overdue, once, when it has lasted for `hold_warning` seconds."""
        self.hold_warning = hold_warning
        self.due_at = self.since + hold_warning
        self.code_line = code_line
        self._overdue_contexts = [context]

    def log_overdue(self, entry: WatchedEntry, now: float) -> None:
        """Log that the checkout has lasted for `hold_warning` seconds, unless that was done."""
        context = self._claim()
        if context is not None:
            self._log_overdue(entry, context, now - self.since)

    def log_return(self, entry: WatchedEntry) -> None:
        """Log that the checkout is over.

        Called before the connection is idle again: the events of its next checkout come afterwards.
        """
        events, tag = entry.pool_events, entry.pidpool_tag
        context = self._claim()
        # Read after the claim: if the watching thread was first, this has lasted for `hold_warning` seconds.
        use_time = time.perf_counter() - self.since
        if self.is_logged and tag is not None:
            events.connection_checked_in(tag, use_time)
        if self.hold_warning is not None and use_time >= self.hold_warning:
            if context is not None:  # the watching thread has not come round to it
                self._log_overdue(entry, context, use_time)
            events.checkout_returned_late(tag, use_time, self.hold_warning, self.where)

    @property
    def where(self) -> str | None:
        """The line of the user's code that made it, as text; None if that is not known."""
        return None if self.code_line is None else str(self.code_line)

    def _claim(self) -> Context | None:
        try:
            return self._overdue_contexts.pop()
        except IndexError:
            return None

    def _log_overdue(self, entry: WatchedEntry, context: Context, held: float) -> None:
        assert self.hold_warning is not None
        log = entry.pool_events.checkout_overdue
        context.run(log, entry.pidpool_tag, held, self.hold_warning, self.where)
