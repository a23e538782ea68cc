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

    __slots__ = ("record", "pool", "echo", "since", "due_at", "told", "place", "context", "__weakref__")

    record: PidRecord
    pool: PidPool
    echo: Any
    since: float
    """`time.perf_counter()` when the connection was handed out."""
    due_at: float
    """When it will have lasted for the pool's `hold_warning` seconds; never once that was told."""
    told: bool
    """Whether there was an event of the checkout, so that there is one of its end."""
    place: Place | None
    context: Context | None

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
        checkout.place = checkout.context = None
        checkouts[id(checkout)] = checkout
        return checkout

    def detach(self) -> None:
        """Forget the checkout: it was closed or detached (the name is `weakref.finalize`'s)."""
        checkouts.pop(id(self), None)

    def go_on_as(self, other: Checkout) -> None:
        """Take over what is known of another checkout, whose connection this one has taken."""
        self.since, self.due_at, self.told = other.since, other.due_at, other.told
        self.place, self.context = other.place, other.context

    def tell_overdue(self, now: float) -> None:
        """Tell, in the context in which the checkout was made, that it has lasted for long."""
        self.due_at = math.inf
        hold_warning, holding = self.pool.hold_warning, self.record.pidpool_holding
        if hold_warning is None or self.context is None:
            return
        self.context.copy().run(
            self.pool._telemetry.checkout_overdue,
            None if holding is None else holding.tag,
            now - self.since,
            hold_warning,
            None if self.place is None else str(self.place),
        )

    def tell_return(self) -> None:
        """Tell that the checkout is over. Before the connection is returned: whoever gets it next
        tells of that afterwards."""
        hold_warning = self.pool.hold_warning
        if not self.told and hold_warning is None:
            return
        use_time = time.perf_counter() - self.since
        holding = self.record.pidpool_holding
        if self.told and holding is not None:
            self.pool._telemetry.connection_checked_in(holding.tag, use_time)
        if hold_warning is not None and use_time > hold_warning and self.place is not None:
            self.due_at = math.inf
            self.pool._telemetry.checkout_returned_late(
                None if holding is None else holding.tag, use_time, hold_warning, str(self.place)
            )


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
