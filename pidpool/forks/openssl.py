"""Keeps a fork out of the middle of OpenSSL's bookkeeping of threads, and bounds a child's wait if a fork has
fallen there all the same.

OpenSSL 3 has a list of all threads that have used it (crypto/initthread.c). A thread enters it at its first
use, and leaves it in a destructor of C's, when Python already has forgotten the thread. If a fork falls into
either, the list's lock stays locked in the child for ever. Each thread of the child waits for it at its own
first use, in `SSL_CTX_new` as a rule. So each thread that uses a pool enters and leaves the list while it
has the GIL, which a fork takes too. And a thread enters it before it forks, so that it needs no lock in the
child.

Threads that use OpenSSL without a pool may still be in the middle. The thread that forked is not concerned.
The child's other threads find out, within a bounded time, whether the lock is locked, and raise
(tests/forks/test_openssl.py).
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from sqlalchemy import exc

LOCK_WAIT = 10.0
"""Seconds after which a child takes OpenSSL's lock for one that its parent has left locked."""

guarded_threads: set[int] = set()
"""The threads, by `threading.get_ident`, that have entered the list and leave it with the GIL held."""

_SOUND, _SUSPECT, _LOCKED = range(3)
_state = _SOUND
"""What is known of the lock: it may be locked for ever in a forked child only."""


class _Library:
    """One loaded libcrypto. psycopg2 and psycopg bring one each, beside Python's own."""

    def __init__(self, path: str) -> None:
        mode = os.RTLD_LAZY | os.RTLD_NOLOAD
        without_gil, with_gil = ctypes.CDLL(path, mode), ctypes.PyDLL(path, mode)
        self.enter: Callable[[], object] = with_gil.ERR_clear_error
        self.enter_without_gil: Callable[[], object] = without_gil.ERR_clear_error
        self.leave: Callable[[], object] = with_gil.OPENSSL_thread_stop


_libraries: dict[str, _Library] = {}
_looked_for: set[str] = set()


class _Object(ctypes.Structure):  # struct dl_phdr_info, <link.h>
    _fields_ = (("address", ctypes.c_void_p), ("name", ctypes.c_char_p))


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Object), ctypes.c_size_t, ctypes.c_void_p)


def look(driver: str) -> None:
    """Find the OpenSSL libraries that are loaded, after the first connection of a driver was opened."""
    if driver in _looked_for:
        return
    _looked_for.add(driver)
    found: list[str] = []

    def add(loaded: Any, size: int, data: Any) -> int:
        name = os.fsdecode(loaded.contents.name or b"")
        if "libcrypto" in os.path.basename(name):
            found.append(name)
        return 0

    try:
        ctypes.CDLL(None).dl_iterate_phdr(_Callback(add), None)
        new = {path: _Library(path) for path in found if path not in _libraries}
    except (AttributeError, OSError, TypeError):
        return  # another system, or another library of that name
    if new:
        _libraries.update(new)
        guarded_threads.clear()
        if _state == _SOUND and not _has_greenlets():
            _enter(threading.get_ident(), with_gil=True)


class _Guard:
    """Ends with its thread, which has the GIL then, and takes it off the list."""

    def __init__(self, thread: int) -> None:
        self.thread = thread

    def __del__(
        self,
        current: Callable[[], int] = threading.get_ident,
        is_finalizing: Callable[[], bool] = sys.is_finalizing,
    ) -> None:
        guarded_threads.discard(self.thread)
        # A forked child ends here for each thread of its parent's: those are not this thread. And if the list
        # may be locked for ever, the thread had better wait in C, without the GIL.
        if current() == self.thread and _state == _SOUND and not is_finalizing():
            for library in _libraries.values():
                library.leave()


_local = threading.local()


def _has_greenlets() -> bool:
    return "gevent" in sys.modules or "eventlet" in sys.modules


def guard_thread(thread: int) -> None:
    """Have the calling thread enter and leave OpenSSL's list with the GIL held.

    :raises sqlalchemy.exc.InvalidRequestError: in a child whose parent has left the list locked.
    """
    if _has_greenlets():
        return  # all in one thread, as a rule
    if _state == _SOUND or _is_unlocked(thread):
        _enter(thread, with_gil=True)


def ready_to_fork() -> None:
    """Have the calling thread enter the list before it forks. Runs in the at-fork hook."""
    thread = threading.get_ident()
    if thread not in guarded_threads and _state == _SOUND and not _has_greenlets():
        # Without the GIL: it is not needed, and the thread that has the lock may want it.
        _enter(thread, with_gil=False)


def note_child(is_alone: bool) -> None:
    """Note that this is a forked child, where the list may be locked for ever.

    :param is_alone: whether the parent had no other thread.
    """
    global _state
    if not is_alone:
        _state = _SUSPECT


def _enter(thread: int, *, with_gil: bool) -> None:
    libraries = list(_libraries.values())
    for library in libraries:
        (library.enter if with_gil else library.enter_without_gil)()
    if getattr(_local, "guard", None) is None or _local.guard.thread != thread:
        _local.guard = _Guard(thread)
    if len(libraries) == len(_libraries):  # otherwise another thread has found more
        guarded_threads.add(thread)


def _is_unlocked(thread: int) -> bool:
    """Find out in a child whether the list is locked, by a thread that may wait for ever."""
    global _state
    libraries = list(_libraries.values())
    if not libraries:
        return False  # nothing is known yet
    if _state == _SUSPECT:

        def enter_and_leave() -> None:
            for library in libraries:
                library.enter_without_gil()
                library.leave()

        trial = threading.Thread(target=enter_and_leave, name="pidpool-openssl", daemon=True)
        try:
            trial.start()
        except RuntimeError:  # no more threads to be had
            return False
        trial.join(LOCK_WAIT)
        _state = _LOCKED if trial.is_alive() else _SOUND
    if _state == _LOCKED:
        pid = os.getpid()
        raise exc.InvalidRequestError(
            f"thread {thread} of pid {pid} can't use OpenSSL, and so no connection: at the fork a thread of "
            f"the parent's was beginning or ending its use of OpenSSL, and left a lock that was not free "
            f"within {LOCK_WAIT} s; end pid {pid} and fork again, or use the pool in the thread that forked"
        )
    return True
