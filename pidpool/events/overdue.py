"""Watches for checkouts that last longer than their pool's `hold_warning`, and tells of each once.

One daemon thread per process, started by the first checkout that is to be watched; a forked child
starts one of its own. It sleeps until the earliest checkout is due, so a checkout has to wake it only
when it was asleep for longer than that: once in `hold_warning` seconds at the most.
"""

from __future__ import annotations

import math
import queue
import threading
import time

from pidpool.forks import detection as fork
from pidpool.forks.takeover import forkable

_to_start = [True]  # popped by the one who starts the thread; a lock could be inherited locked
_next_look = math.inf  # time.perf_counter()
_wake: queue.SimpleQueue[None] = queue.SimpleQueue()  # its put() may be interrupted by a finalizer's


def watch(due_at: float) -> None:
    """See to it that somebody looks at the checkouts when a new one is due (`time.perf_counter()`)."""
    if _to_start:
        _start()
    # One wake is enough: the thread takes it before it looks.
    if due_at < _next_look and _wake.empty():
        _wake.put(None)


def _start() -> None:
    try:
        _to_start.pop()
    except IndexError:
        return  # another thread was first
    thread = threading.Thread(target=_run, args=(_wake,), name="pidpool-overdue", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # no more threads to be had, or the interpreter is ending
        _to_start.append(True)


def _run(wake: queue.SimpleQueue[None]) -> None:
    global _next_look
    while True:
        # First: who checks out after the listing below must find that it has to wake us.
        _next_look = math.inf
        now = time.perf_counter()
        earliest = math.inf
        for pool in list(forkable):
            for record in pool.records() if pool.hold_warning is not None else ():
                checkout = record.checkout_told
                if checkout is None:
                    continue
                due_at = checkout.due_at
                if due_at <= now:
                    checkout.tell_overdue(now)
                else:
                    earliest = min(earliest, due_at)
        _next_look = earliest
        try:
            wake.get(timeout=None if earliest == math.inf else max(0.0, earliest - time.perf_counter()))
        except queue.Empty:
            pass


def _begin_anew(trigger: fork.Trigger, connects_in_flight: int) -> None:
    """Forget the parent's thread, in a child."""
    global _next_look, _wake
    if _to_start:
        return  # there is none
    _to_start.append(True)
    _next_look = math.inf
    _wake = queue.SimpleQueue()


fork.in_child(_begin_anew)
