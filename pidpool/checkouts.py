"""Every checkout of this process: how long it has lasted and who made it, and the weak reference that
returns the connection when a checkout is dropped instead of closed.
"""

from __future__ import annotations

import math
import time
import weakref
from contextvars import Context
from typing import TYPE_CHECKING, Any

from sqlalchemy import __version__ as sqlalchemy_version
from sqlalchemy.pool.base import _finalize_fairy

from pidpool import fork
from pidpool.fork import WIPED, flag

if TYPE_CHECKING:
    from pidpool.places import Place
    from pidpool.pool import PidPool
    from pidpool.proxied import PidFairy, PidRecord


class Checkout(weakref.ref["PidFairy"]):
    """A weak reference to a checkout's `PidFairy`."""

    __slots__ = ("record", "pool", "echo", "since", "due_at", "told", "place", "to_tell", "__weakref__")

    record: PidRecord
    pool: PidPool
    echo: Any
    since: float
    """`time.perf_counter()` when the connection was handed out."""
    due_at: float
    """When it will have lasted for the pool's `hold_warning` seconds."""
    told: bool
    """Whether there was an event of the checkout, so that there is one of its end."""
    place: Place | None
    to_tell: list[Context] | None
    """The context in which the checkout was made, for `checkout.overdue`. Popped by the one who tells
    it, the watching thread or the one that returns the connection; None where nobody watches."""

    @classmethod
    def of(cls, fairy: PidFairy, record: PidRecord, pool: PidPool, echo: Any) -> Checkout:
        """Put a new checkout on the list."""
        checkout = cls(fairy, _dropped)
        checkout.record = record
        checkout.pool = pool
        checkout.echo = echo
        checkout.since = 0.0
        checkout.due_at = math.inf
        checkout.told = False
        checkout.place = checkout.to_tell = None
        checkouts[id(checkout)] = checkout
        return checkout

    def detach(self) -> None:
        """Forget the checkout: it was closed or detached (the name is `weakref.finalize`'s)."""
        checkouts.pop(id(self), None)

    def go_on_as(self, other: Checkout) -> None:
        """Take over what is known of another checkout, whose connection this one has taken."""
        self.since, self.due_at, self.told = other.since, other.due_at, other.told
        self.place, self.to_tell = other.place, other.to_tell

    def tell_overdue(self, now: float) -> None:
        """Tell, unless that was done, that the checkout has lasted for `hold_warning` seconds."""
        context = self._claim()
        if context is not None:
            self._tell_overdue(context, now - self.since)

    def tell_return(self) -> None:
        """Tell that the checkout is over. Before the connection is returned: whoever gets it next
        tells of that afterwards."""
        hold_warning = None if self.to_tell is None else self.pool.hold_warning
        if not self.told and hold_warning is None:
            return
        context = self._claim()
        # Read after the claim: where the thread was first, this has lasted for `hold_warning` seconds.
        use_time = time.perf_counter() - self.since
        holding = self.record.pidpool_holding
        if self.told and holding is not None:
            self.pool._telemetry.connection_checked_in(holding.tag, use_time)
        if hold_warning is not None and use_time >= hold_warning:
            if context is not None:  # the thread has not come round to it
                self._tell_overdue(context, use_time)
            self.pool._telemetry.checkout_returned_late(
                None if holding is None else holding.tag, use_time, hold_warning, self._where()
            )

    def _claim(self) -> Context | None:
        try:
            return self.to_tell.pop() if self.to_tell else None
        except IndexError:
            return None

    def _tell_overdue(self, context: Context, held: float) -> None:
        hold_warning, holding = self.pool.hold_warning, self.record.pidpool_holding
        assert hold_warning is not None
        tag = None if holding is None else holding.tag
        context.run(self.pool._telemetry.checkout_overdue, tag, held, hold_warning, self._where())

    def _where(self) -> str | None:
        return None if self.place is None else str(self.place)


checkouts: dict[int, Checkout] = {}
"""Keeps the references alive, without which they would not fire when a pool is dropped together with
its checkouts. Emptied in a child."""


def _dropped(checkout: Checkout) -> None:
    """Return the connection of a checkout that was garbage collected; never logs, never raises."""
    if flag[0] == WIPED:
        fork.notice()  # first: it empties the list, as what this process inherited is not its to return
    # Fires for those that were closed too, when their fairy goes.
    if checkouts.pop(id(checkout), None) is None:
        return
    with checkout.pool._telemetry.deferred():
        checkout.tell_return()
        _give_back(checkout.record, checkout)


if sqlalchemy_version.startswith("2.0."):

    def _give_back(record: PidRecord, checkout: Checkout) -> None:
        # mypy sees SQLAlchemy 2.1's signature: the reference is 2.0's.
        finalize: Any = _finalize_fairy
        finalize(None, record, checkout.pool, checkout, checkout.echo, transaction_was_reset=False)

else:

    def _give_back(record: PidRecord, checkout: Checkout) -> None:
        _finalize_fairy(
            None,
            record,
            checkout.pool,
            checkout.echo,
            transaction_was_reset=False,
            is_gc_cleanup=True,
        )
