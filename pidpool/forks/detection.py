"""Which process is this? Detects a fork, with and without at-fork hooks, and holds a fork back while
a connection is being opened. Knows nothing of pools: they hand in what is to be done in a child.

The lazy check is one read of `flag`, a byte on a page that the kernel zeroes in every forked child
(madvise MADV_WIPEONFORK, Linux 4.14 and later), C forks included: 0.03 µs where os.getpid() takes
0.18. Elsewhere a pid comparison takes its place.
"""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401  for its at-fork hook, see below
import gc
import mmap
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

# Imports logging. Its at-fork hooks, and those of concurrent.futures, take a lock before the fork: they
# have to be registered before ours, so as to run after it. Else a thread that has that lock would wait in
# our hook for a connect whose thread waits for the lock, to fork too
# (tests/pool/test_threads.py::test_connecting_threads_that_fork_do_not_wait_for_each_other).
from pidpool.forks import log_locks as writers

_MADV_WIPEONFORK = 18

CONNECT_WAIT = 5.0
"""Seconds that a fork waits at most for the connects in flight in other threads, and that a new
connect waits at most for a fork to be over."""

WIPED = 0  # this process was forked and has not noticed yet
SETTLED = 1  # this process has dealt with whatever it inherited
UNREPORTED = 2  # something happened in a place where nothing may be logged


Trigger = Literal["hook", "lazy"]
"""What noticed a fork."""


class _Flag(Protocol):
    def __getitem__(self, index: int, /) -> int: ...
    def __setitem__(self, index: int, value: int, /) -> None: ...


class _PidFlag:
    """The flag where there is no page that a fork wipes: remembers who set it."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._value = WIPED

    def __getitem__(self, index: int) -> int:
        return self._value if os.getpid() == self._pid else WIPED

    def __setitem__(self, index: int, value: int) -> None:
        self._pid, self._value = os.getpid(), value


def _make_flag() -> _Flag:
    try:
        # Private: a shared mapping can't be wiped.
        page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        page.madvise(_MADV_WIPEONFORK)
    except (AttributeError, OSError, TypeError, ValueError):
        return _PidFlag()
    return page


@dataclass(frozen=True)
class Process:
    """A process, told apart from a later one that is given the same pid by a random token."""

    pid: int
    token: str

    @classmethod
    def this(cls) -> Process:
        return cls(os.getpid(), os.urandom(8).hex())


flag: _Flag = _make_flag()
flag[0] = SETTLED
process = Process.this()


def current() -> Process:
    """Return this process; after a fork only once the fork was noticed."""
    return process


class _Gate:
    """Keeps a fork and a connect from happening at the same time, for a bounded while.

    A connect in flight in another thread leaves the child with OpenSSL's global locks held: its own
    first TLS connect would wait for ever, and no lock of ours could be replaced to cure that.
    """

    def __init__(self) -> None:
        # Conditions over a reentrant lock: a finalizer may run, and connect, inside any line here.
        self._changed = threading.Condition(threading.RLock())
        self._connecting: dict[int, int] = {}
        self._forking: dict[int, int] = {}

    def enter_connect(self) -> None:
        """Call before a connection is opened; waits until no other thread is forking."""
        thread = threading.get_ident()
        with self._changed:
            # Who is connecting or forking already must not wait: the fork may be waiting for it.
            if thread not in self._connecting and thread not in self._forking:
                self._changed.wait_for(lambda: not self._forking, 2 * CONNECT_WAIT)
            self._connecting[thread] = self._connecting.get(thread, 0) + 1

    def leave_connect(self) -> None:
        """Call once the connection is open and its connect events have run, or failed.

        In a child that was forked meanwhile this does nothing: the gate is its parent's, whose threads
        may have left it locked.
        """
        if flag[0] == WIPED:
            notice()
        if self is gate:
            self._leave(self._connecting)

    def before_fork(self) -> None:
        """Wait until no other thread is connecting; a thread that forks itself does not count."""
        thread = threading.get_ident()
        with self._changed:
            self._forking[thread] = self._forking.get(thread, 0) + 1
            self._changed.notify_all()  # two connecting threads that fork wait for each other else
            self._changed.wait_for(lambda: not self.in_flight(thread), CONNECT_WAIT)

    def after_fork_in_parent(self) -> None:
        self._leave(self._forking)

    def in_flight(self, thread: int) -> int:
        """Return how many connects other threads have in flight; takes no lock, so a child may ask."""
        return sum(other != thread and other not in self._forking for other in self._connecting)

    def _leave(self, threads: dict[int, int]) -> None:
        thread = threading.get_ident()
        with self._changed:
            left = threads.get(thread, 0) - 1
            if left > 0:
                threads[thread] = left
            else:
                threads.pop(thread, None)
            self._changed.notify_all()


gate = _Gate()

_in_parent: list[Callable[[float], None]] = []
_at_once: list[Callable[[], bool]] = []
_in_child: list[Callable[[Trigger, int], None]] = []
_to_report: list[Callable[[], None]] = []


def in_parent(forked: Callable[[float], None]) -> None:
    """Have `forked(at)` called in the parent after every fork that ran Python's hooks; `at` in seconds
    since the epoch, before anything of the child's.

    It runs inside the at-fork hook: it must not block, log, yield or raise.
    """
    _in_parent.append(forked)


def in_child(adopt: Callable[[Trigger, int], None]) -> None:
    """Have `adopt(trigger, connects_in_flight)` called once in every forked child.

    It may run inside an at-fork hook: it must not block, log, yield or raise, and it may be called
    again if it was interrupted.
    """
    _in_child.append(adopt)


def is_urgent(asked: Callable[[], bool]) -> None:
    """Have a child's at-fork hook ask whether the fork has to be dealt with at once; else that is done
    when something first looks at `flag`, and a child that never uses a pool pays nothing."""
    _at_once.append(asked)


def at_first_use(report: Callable[[], None]) -> None:
    """Have `report()` called at the next use of a pool, where logging is allowed, when `flag[0]` is
    UNREPORTED; always so in a child."""
    _to_report.append(report)


def notice(trigger: Trigger = "lazy") -> None:
    """Deal with a fork if there was one and nobody has yet. Never blocks for long, never logs."""
    global process, gate
    if _hooked_pid == os.getpid():
        trigger = "hook"
    # A lock of this process's own: one that a fork may have copied in a locked state can't be used.
    lock = _locks.setdefault(os.getpid(), threading.RLock())
    with lock:
        if flag[0] != WIPED:
            return
        # A collection in the middle would run finalizers of connections not disowned yet.
        collecting = gc.isenabled()
        gc.disable()
        try:
            in_flight = gate.in_flight(threading.get_ident())
            for adopt in _in_child:
                adopt(trigger, in_flight)
            writers.renew(in_hook=trigger == "hook")
            process = Process.this()
            gate = _Gate()
            flag[0] = UNREPORTED  # last: if this is interrupted, the next check begins again
        finally:
            if collecting:
                gc.enable()


class _Thread(threading.local):
    forking_at: float | None = None
    """Seconds since the epoch, while the thread forks."""


_thread = _Thread()
_locks: dict[int, threading.RLock] = {}  # type: ignore[valid-type, unused-ignore]  # a function before 3.13


def settle() -> None:
    """Deal with a fork and report it; called at a pool's doors when `flag[0]` is not SETTLED."""
    if flag[0] == WIPED:
        notice()
    if flag[0] == UNREPORTED:
        flag[0] = SETTLED  # first: a log handler may use a pool
        for report in _to_report:
            report()


def _before() -> None:
    if flag[0] == WIPED:
        # A child forked in C that forks before it uses a pool: the gate it has is its parent's, whose
        # threads may have left it locked (test_a_child_that_never_noticed_its_fork_can_fork).
        notice()
    gate.before_fork()
    writers.hold()  # last: a thread whose connect is waited for may log
    # Not afterwards, when the child may be ahead: who sorts events by time has the fork first.
    _thread.forking_at = time.time()


def _after_in_parent() -> None:
    writers.release()
    gate.after_fork_in_parent()
    began, _thread.forking_at = _thread.forking_at, None
    for forked in _in_parent:
        forked(time.time() if began is None else began)  # None: who forked in C ran this hook alone


_hooked_pid = 0
"""The process whose at-fork hook has run and left the fork to the first look at `flag`."""


def _after_in_child() -> None:
    global _hooked_pid
    if any(asked() for asked in _at_once):
        notice("hook")
    else:
        _hooked_pid = os.getpid()
        writers.renew(in_hook=True)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
