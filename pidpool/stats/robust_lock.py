"""A lock in shared memory that a process takes with it when it is killed: POSIX's robust mutex.

A thread that has it already does not wait for itself (`RobustLock.run`).
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from operator import methodcaller
from types import FrameType

SIZE = 64
"""Bytes; pthread_mutex_t has 40 on x86-64, 48 on AArch64 (glibc and musl)."""

# <pthread.h>, as glibc and musl have them.
_PROCESS_SHARED = 1
_ROBUST = 1
_ERRORCHECK = 2


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_MUTEX = ("timedlock", "trylock", "consistent", "unlock", "init")
_ATTRIBUTES = ("init", "setpshared", "setrobust", "settype")


def _library() -> ctypes.CDLL | None:
    """Return the C library with what is needed looked up, or None if it has no robust mutexes (macOS)."""
    try:
        library = ctypes.CDLL(None)
        # Looked up ahead: a child that had to do it would pay for it at each fork.
        for name in (*(f"mutex_{each}" for each in _MUTEX), *(f"mutexattr_{each}" for each in _ATTRIBUTES)):
            getattr(library, f"pthread_{name}")
    except (AttributeError, OSError, TypeError):
        return None
    return library


_c = _library()

_CALL = methodcaller("__call__")

IS_THERE = _c is not None
"""Whether this system has such locks; where it has none they can't be acquired."""


_left_locked: list[ctypes.Array[ctypes.c_char]] = []
"""Locks that are still held, though nothing else refers to them: their memory stays."""


class RobustLock:
    """A lock in the first `SIZE` bytes of shared memory, used by every process that has it.

    :param memory: the memory, which this object keeps.
    :param is_new: whether to make the lock. It must be made once only, before another process has the memory.
    """

    def __init__(self, memory: memoryview, *, is_new: bool = True) -> None:
        self._mutex = (ctypes.c_char * SIZE).from_buffer(memory)
        self._users: dict[tuple[int, int], FrameType] = {}
        """The call of `run` that each thread is in."""
        if _c is None:
            return
        self._unlock = partial(_c.pthread_mutex_unlock, self._mutex)
        if not is_new:
            return
        attributes = ctypes.create_string_buffer(SIZE)
        _c.pthread_mutexattr_init(attributes)
        _c.pthread_mutexattr_setpshared(attributes, _PROCESS_SHARED)
        _c.pthread_mutexattr_setrobust(attributes, _ROBUST)
        _c.pthread_mutexattr_settype(attributes, _ERRORCHECK)
        _c.pthread_mutex_init(self._mutex, attributes)

    def run(self, seconds: float, work: Callable[[], object]) -> bool:
        """Call `work` with the lock; False, and no call, if the lock could not be had within `seconds`.

        Also if this thread has the lock already: a finalizer or a signal may come in the middle of `work`.
        """
        # With the pid, since a child inherits the dict.
        user = os.getpid(), threading.get_ident()
        if user in self._users and _is_running(self._users[user], sys._getframe()):
            return False
        try:
            self._users[user] = sys._getframe()
            if not self.acquire(seconds):
                return False
            # In one step of C's: no signal handler runs in between, whose exception would leave it locked.
            # Other threads would wait until this one's next call, which finds that it has the lock.
            list(map(_CALL, (work, self._unlock)))
            return True
        finally:
            # If `work` was interrupted. Twice, for an interrupt of the first; not to have it is no error.
            try:
                self.release()
            finally:
                self.release()
                self._users.pop(user, None)

    def __del__(self) -> None:
        # The C library has a list of the locks that a thread holds, and would follow it into memory that is
        # gone.
        if self._users:  # two interrupts came, in `work` and before the release
            _left_locked.append(self._mutex)

    def acquire(self, seconds: float) -> bool:
        """Take the lock; False if it could not be had within `seconds`."""
        if _c is None:
            return False
        status = _c.pthread_mutex_trylock(self._mutex)
        if status == errno.EBUSY:
            until = time.time() + seconds
            limit = _Timespec(int(until), int(until % 1 * 1e9))
            status = _c.pthread_mutex_timedlock(self._mutex, ctypes.byref(limit))
        if status == errno.EOWNERDEAD:
            status = _c.pthread_mutex_consistent(self._mutex)
        return status in (0, errno.EDEADLK)

    def release(self) -> None:
        """Give the lock back; does nothing if this thread has it not."""
        if _c is not None:
            self._unlock()


def _is_running(frame: FrameType, inner: FrameType | None) -> bool:
    """Return whether one frame, directly or not, has called another."""
    while inner is not None and inner is not frame:
        inner = inner.f_back
    return inner is not None
