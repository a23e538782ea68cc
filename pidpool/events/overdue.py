"""Watches for checkouts that last longer than their pool's `hold_warning`, and logs each of them once.

One daemon thread per process, started by the first checkout that is to be watched; a forked child starts one
of its own. It sleeps until the earliest checkout is due. So a checkout has to wake it only if the thread was
to sleep for longer than that: once in `hold_warning` seconds at most.
"""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Callable, Iterable

from pidpool.events.watched_checkout import WatchedEntry
from pidpool.stats import daemon_thread

_to_start = [True]  # popped by the thread that starts the watching one; a lock could be inherited locked
_next_look = math.inf  # time.perf_counter()
_wake: queue.SimpleQueue[None] = queue.SimpleQueue()  # its put() may be interrupted by a finalizer's


def watch(due_at: float, entries: Callable[[], Iterable[WatchedEntry]]) -> None:
    """Have the checkouts looked at when a new one is due (`time.perf_counter()`).

    :param entries: returns all entries of this process that may be watched; the first caller's is used.
    """
    if _to_start:
        _start(entries)
    # One wake is enough: the thread takes it before it looks.
    if due_at < _next_look and _wake.empty():
        _wake.put(None)


def forget_thread() -> None:
    """Forget the parent's thread, in a child."""
    global _next_look, _wake
    if _to_start:
        return  # there is none
    _to_start.append(True)
    _next_look = math.inf
    _wake = queue.SimpleQueue()


def _start(entries: Callable[[], Iterable[WatchedEntry]]) -> None:
    try:
        _to_start.pop()
    except IndexError:
        return  # another thread was first
    try:
        daemon_thread.start("pidpool-overdue", _run, _wake, entries)
    except RuntimeError:  # no more threads to be had, or the interpreter is ending
        _to_start.append(True)


def _run(wake: queue.SimpleQueue[None], entries: Callable[[], Iterable[WatchedEntry]]) -> None:
    global _next_look
    while True:
        # First: a checkout that is made after the look below must find that it has to wake this thread.
        _next_look = math.inf
        earliest = _next_look = _look(entries)
        try:
            wake.get(timeout=None if earliest == math.inf else max(0.0, earliest - time.perf_counter()))
        except queue.Empty:
            pass


def _look(entries: Callable[[], Iterable[WatchedEntry]]) -> float:
    """Log each checkout that is overdue; return when the next one is due.

    A function of its own, so that the sleeping thread's frame keeps no pool alive.
    """
    now, earliest = time.perf_counter(), math.inf
    for entry in entries():
        checkout = entry.watched
        if checkout is None:
            continue
        if checkout.due_at <= now:
            checkout.log_overdue(entry, now)
        else:
            earliest = min(earliest, checkout.due_at)
    return earliest
