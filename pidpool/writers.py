"""Keeps a fork out of the middle of a log line: the locks of the log writers that pidpool's events go
through are held over the fork, so that the child finds them free.

structlog's writers keep their locks over a fork, locked ones too (seen to hang a child). The stdlib
makes its handlers new locks in a child, but not the buffers that they write to: a thread caught in
the middle of a write leaves the file's own lock behind. Whoever holds the writer's lock at the fork
knows that nobody is in the middle of a write.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import structlog

WRITER_WAIT = 1.0
"""Seconds that a fork waits at most for log lines being written by other threads."""

_held: dict[int, list[Any]] = {}  # by thread: two may fork at a time


def hold() -> None:
    """Take the writers' locks, before a fork; gives up on those that aren't free in time."""
    held = _held[threading.get_ident()] = []
    deadline = time.monotonic() + WRITER_WAIT
    held.extend(lock for lock in _locks() if lock.acquire(timeout=max(0.0, deadline - time.monotonic())))


def release() -> None:
    """Give the locks back, after the fork, in the parent and in a child alike."""
    held = _held.pop(threading.get_ident(), [])
    while held:
        try:
            held.pop().release()
        except RuntimeError:
            pass  # the stdlib has made this one anew in the child


def renew() -> None:
    """Free the locks that other threads held at the fork, in a child; those threads don't exist here."""
    release()
    for lock in _locks():
        # What the stdlib does for its own locks. It is the lock itself that is reset, since loggers
        # that were made already refer to it.
        if hasattr(lock, "_at_fork_reinit"):
            lock._at_fork_reinit()


def _locks() -> Iterator[Any]:
    # By file, for all of structlog's PrintLogger, WriteLogger and BytesLogger.
    yield from list(getattr(structlog._output, "WRITE_LOCKS", {}).values())
    logger: logging.Logger | None = logging.getLogger("pidpool")
    while logger is not None:
        for handler in logger.handlers:
            if handler.lock is not None:
                yield handler.lock
        logger = logger.parent if logger.propagate else None
