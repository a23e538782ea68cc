"""A daemon thread for each pool whose family has a limit, or whose idle connections have a bound. It closes
those that another process wants, or that have been idle for too long, and sleeps meanwhile.

Started when the process opens its first connection, in a forked child by the child's first one. It ends soon
after its pool has gone.
"""

from __future__ import annotations

import threading
import time
import weakref
from typing import Protocol

from sqlalchemy.exc import InvalidRequestError

from pidpool.forks import openssl
from pidpool.stats.bell import Bell

LONGEST_SLEEP = 60.0
"""Seconds after which it looks at the latest, to see whether its pool still is there."""


class LookedAfterPool(Protocol):
    """A pool, as far as the thread needs it."""

    def look_after_idle(self) -> float:
        """Close the idle connections that are due; return the seconds until the next look."""


def start(pool: LookedAfterPool, bell: Bell | None) -> None:
    """Start the thread of a pool.

    :param bell: wakes it when another process wants a connection; None if none can.
    """
    arguments = weakref.ref(pool), bell
    thread = threading.Thread(target=_run, args=arguments, name="pidpool-idle", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # no more threads to be had, or the interpreter is ending
        pass


def _run(reference: weakref.ref[LookedAfterPool], bell: Bell | None) -> None:
    try:
        openssl.guard_thread(threading.get_ident())
    except InvalidRequestError:
        return  # it could close no connection
    while True:
        # Before the look: a ring that comes after it ends the sleep at once.
        heard = 0 if bell is None else bell.heard()
        seconds = _look(reference)
        if seconds is None:
            return
        seconds = min(seconds, LONGEST_SLEEP)
        if bell is None:
            time.sleep(seconds)
        else:
            bell.sleep(heard, seconds)


def _look(reference: weakref.ref[LookedAfterPool]) -> float | None:
    """Have the pool look; None if it has gone."""
    # A function of its own, so that the sleeping thread's frame keeps no pool alive.
    pool = reference()
    return None if pool is None else pool.look_after_idle()
