"""Keeps a fork out of the middle of a log line: the forking thread holds the locks of this process's log
writers over the fork, and the child makes anew those that could not be held.

A writer has two locks. structlog's writers keep theirs over a fork, a locked one too (seen to hang a child);
the stdlib gives its handlers new ones. Under both lies the lock of the file's own buffer, which Python never
renews: if a fork falls into the middle of a write, the child's first line would wait for it for ever. No
thread is in the middle of a write while the forking thread holds the writer's lock
(tests/forks/test_log_locks.py).
"""

from __future__ import annotations

import io
import logging
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from itertools import compress
from operator import methodcaller
from typing import Any

import structlog

from pidpool.forks.gate import Fork

LOG_LINE_WAIT = 1.0
"""Seconds that a fork waits at most for log lines that other threads are writing."""

LIVING_WAIT = 0.2
"""Seconds for which a child that may have threads of its own waits for a lock, before it takes the lock's
holder for a thread of its parent's."""

_held: dict[Fork, list[Any]] = {}


def hold(fork: Fork) -> None:
    """Take the writers' locks before a fork, but for those that do not become free in time."""
    held = _held[fork] = []
    deadline = time.monotonic() + LOG_LINE_WAIT
    for lock, _ in _writers():
        held.extend(_taken(lock, max(0.0, deadline - time.monotonic())))
        if lock is _of_logging and not (held and held[-1] is lock):
            # Its holder may want the handlers' locks (logging.config does), and the stdlib's own hook
            # is about to wait for it, without a bound.
            return


def are_free(until: float) -> bool:
    """Return whether no thread keeps a writer's lock beyond `until`, in seconds of `time.monotonic`."""
    return all(_becomes_free(lock, max(0.0, until - time.monotonic())) for lock, _ in _writers())


def release(fork: Fork) -> None:
    """Give the locks back, after the fork, in the parent and in a child alike. What an interrupt has left is
    given back by a second call."""
    held = _held.get(fork, [])
    while held:
        try:
            next(map(_RELEASE, iter(held.pop, None)))
        except RuntimeError:
            pass  # the stdlib has made this one anew in the child
    _held.pop(fork, None)


# A lock that was taken is noted, and one that is no longer noted is released, in one step of C's: no signal
# handler runs in between, whose exception would leave the lock locked. Most of these locks can't be asked
# whether this thread has them.

_RELEASE = methodcaller("release")


def _taken(lock: Any, seconds: float) -> Iterator[Any]:
    """Take a lock, and return it, when the iterator is asked; nothing if it does not become free in time."""
    return compress((lock,), map(lock.acquire, (True,), (seconds,)))


def _becomes_free(lock: Any, seconds: float) -> bool:
    return len(list(map(_RELEASE, _taken(lock, seconds)))) == 1


def renew(*, in_hook: bool) -> None:
    """Make anew in a child each lock that another thread may have held at the fork: that thread does not
    exist here. If it was interrupted, it can begin again.

    :param in_hook: whether this is the first code that runs in this child. Otherwise the child may have
        written lines and started threads, and only a lock that does not become free is made anew.
    """
    own = [fork for fork in _held if fork[0] == threading.get_ident()]
    held = {id(lock) for fork in own for lock in _held[fork]}
    for fork in own:
        release(fork)
    _held.clear()
    for lock, files in _writers():
        if id(lock) in held:
            continue
        # No wait in the hook: under gevent it would switch to the parent's greenlets.
        if not in_hook and _becomes_free(lock, LIVING_WAIT):
            continue
        for file in files:
            _renew_buffer(file)
        # The lock itself is reset, since loggers that were made already refer to it. Last: a free lock stands
        # for buffers that are well.
        if hasattr(lock, "_at_fork_reinit"):
            lock._at_fork_reinit()


def _renew_buffer(file: Any) -> None:
    """Give a file's buffer a new lock. What it held goes: the parent has it too, and will write it."""
    buffer = getattr(file, "buffer", file)  # a text file's
    for kind in (io.BufferedWriter, io.BufferedRandom):
        initialise: Any = kind.__init__
        if isinstance(buffer, kind):
            try:
                initialise(buffer, buffer.raw)  # in place, as with the locks
            except (OSError, ValueError):
                pass  # closed, or no longer open for writing


_of_logging: Any = getattr(logging, "_lock", None)


def _writers() -> Iterator[tuple[Any, list[Any]]]:
    """Return every lock once, with the files that are written to under it."""
    found: dict[int, tuple[Any, list[Any]]] = {}

    def add(lock: Any, *files: Any) -> None:
        found.setdefault(id(lock), (lock, []))[1].extend(files)

    # By file, for all of structlog's PrintLogger, WriteLogger and BytesLogger.
    output: Any = structlog._output
    locks = getattr(output, "WRITE_LOCKS", {})
    # Copied in one step: other threads may be making loggers. Keys are weak references since structlog 25.
    for file, lock in list(getattr(locks, "data", locks).items()):
        file = file() if isinstance(file, weakref.ref) else file
        # PrintLogger prints to what sys.stdout is at the time.
        add(lock, file, *([sys.stdout] if file is output.stdout else []))
    if _of_logging is not None:
        add(_of_logging)
    # All handlers and not just those that pidpool's events pass: others may write to the same file.
    # The newest first, as one that passes records on was made after the one that it passes them to.
    for reference in reversed(logging._handlerList[:]):  # type: ignore[attr-defined]
        handler = reference()
        if handler is None or handler.lock is None:
            continue
        add(handler.lock, getattr(handler, "stream", None))
        mutex = getattr(getattr(handler, "queue", None), "mutex", None)
        if mutex is not None:  # QueueHandler: its listener takes the queue's lock alone
            add(mutex)
    return iter(found.values())
