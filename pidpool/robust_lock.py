"""A lock in shared memory that a process takes with it when it is killed: POSIX's robust mutex.

Between processes only; it says so instead of waiting where the same thread has it already.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIZE = 64
"""Bytes; pthread_mutex_t has 40 on x86-64, 48 on AArch64 (glibc and musl)."""

# <pthread.h>, as glibc and musl have them.
_PROCESS_SHARED = 1
_ROBUST = 1
_ERRORCHECK = 2


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def _functions() -> Any:
    """Return the C library, or None where it has no robust mutexes (macOS)."""
    try:
        library = ctypes.CDLL(None)
        for name in ("setpshared", "setrobust", "settype"):
            getattr(library, f"pthread_mutexattr_{name}")
        for name in ("timedlock", "consistent", "unlock"):
            getattr(library, f"pthread_mutex_{name}")
    except (AttributeError, OSError, TypeError):
        return None
    return library


_library = _functions()


class RobustLock:
    """A lock in the first `SIZE` bytes of a shared mapping; made before the first fork, and used by every
    process that has the mapping.

    :param memory: the `mmap.mmap`, which this object keeps.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = (ctypes.c_char * SIZE).from_buffer(memory)
        if _library is None:
            return
        attributes = ctypes.create_string_buffer(SIZE)
        _library.pthread_mutexattr_init(attributes)
        _library.pthread_mutexattr_setpshared(attributes, _PROCESS_SHARED)
        _library.pthread_mutexattr_setrobust(attributes, _ROBUST)
        _library.pthread_mutexattr_settype(attributes, _ERRORCHECK)
        _library.pthread_mutex_init(self._memory, attributes)

    @contextmanager
    def held(self, seconds: float) -> Iterator[bool]:
        """Hold the lock; gives False if it could not be had within `seconds`."""
        if _library is None:
            yield False
            return
        until = time.time() + seconds
        limit = _Timespec(int(until), int(until % 1 * 1e9))
        status = _library.pthread_mutex_timedlock(self._memory, ctypes.byref(limit))
        if status == errno.EOWNERDEAD:
            _library.pthread_mutex_consistent(self._memory)
            status = 0
        try:
            yield status == 0
        finally:
            if status == 0:
                _library.pthread_mutex_unlock(self._memory)
