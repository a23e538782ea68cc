"""A lock in shared memory that a process takes with it when it is killed: POSIX's robust mutex.

For processes, not for threads: it says so instead of waiting if the same thread has it already.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import time

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


class RobustLock:
    """A lock in the first `SIZE` bytes of a shared mapping; made before the first fork, and used by every
    process that has the mapping.

    :param memory: the `mmap.mmap`, which this object keeps.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self._mutex = (ctypes.c_char * SIZE).from_buffer(memory)
        if _c is None:
            return
        attributes = ctypes.create_string_buffer(SIZE)
        _c.pthread_mutexattr_init(attributes)
        _c.pthread_mutexattr_setpshared(attributes, _PROCESS_SHARED)
        _c.pthread_mutexattr_setrobust(attributes, _ROBUST)
        _c.pthread_mutexattr_settype(attributes, _ERRORCHECK)
        _c.pthread_mutex_init(self._mutex, attributes)

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
        return bool(status == 0)

    def release(self) -> None:
        """Give the lock back."""
        assert _c is not None
        _c.pthread_mutex_unlock(self._mutex)
