"""Notices a fork, with and without Python's at-fork hooks. Knows nothing of pools: the other modules register
what is to be done in the parent, in the child, and at the first use of a pool afterwards.

The lazy check is one read of `fork_state`, a byte on a page that the kernel zeroes in every forked child
(madvise MADV_WIPEONFORK, Linux 4.14 and later), also if the fork was made in C. The read takes 0.03 µs;
os.getpid() takes 0.18. Without such a page a comparison of pids takes its place.
"""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401  for its at-fork hook, see below
import gc
import math
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable
from threading import get_ident
from typing import Protocol

# Imports logging. The at-fork hooks of logging and of concurrent.futures take a lock before the fork. They
# have to be registered before ours, so that they run after it. Otherwise a thread that has such a lock would
# wait in our hook for a connect whose thread waits for the same lock, to fork too
# (tests/pool/test_threads.py::test_connecting_threads_that_fork_do_not_wait_for_each_other).
from pidpool.forks import log_locks, openssl
from pidpool.forks.gate import ConnectGate, Passage
from pidpool.forks.openssl import guarded_threads
from pidpool.stats import process_counters
from pidpool.terms import Trigger

_MADV_WIPEONFORK = 18

FORKED = 0
"""This process was forked and has not noticed it yet. The value that the kernel leaves in a wiped page."""
SETTLED = 1
"""This process has dealt with everything that it inherited."""
UNREPORTED = 2
"""Events wait that could not be logged at once."""


class _ForkState(Protocol):
    def __getitem__(self, index: int, /) -> int: ...
    def __setitem__(self, index: int, value: int, /) -> None: ...


class _StateByPid:
    """The state for systems without a page that a fork wipes: remembers which process set it."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._value = FORKED

    def __getitem__(self, index: int) -> int:
        return self._value if os.getpid() == self._pid else FORKED

    def __setitem__(self, index: int, value: int) -> None:
        self._pid, self._value = os.getpid(), value


def _make_state() -> _ForkState:
    try:
        # Private: a shared mapping can't be wiped.
        page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        page.madvise(_MADV_WIPEONFORK)
    except (AttributeError, OSError, TypeError, ValueError):
        return _StateByPid()
    return page


fork_state: _ForkState = _make_state()
"""``fork_state[0]`` is FORKED, SETTLED or UNREPORTED; each door of a pool reads it first."""
fork_state[0] = SETTLED

_pid = os.getpid()
noticed_pid = [_pid]
"""As `process_pid`, for code that must not call a function: a signal handler may fork at each call."""
_gate = ConnectGate()
process_counters.watch_forks(fork_state, noticed_pid)


def is_hooked() -> bool:
    """Return whether the at-fork hook has run in this process, and has left most of it to its first use."""
    return fork_state[0] == FORKED and _hooked_pid == os.getpid()


def process_pid() -> int:
    """Return the pid of this process; in a child that has not noticed its fork, that of its parent."""
    return _pid


class NoticedFork:
    """The fork by which this process began."""

    __slots__ = ("at", "parent_pid", "trigger", "connects_in_flight", "is_alone")

    def __init__(self, at: float, trigger: Trigger, connects_in_flight: int, is_alone: bool) -> None:
        self.at = at
        """Seconds since the epoch: when the at-fork hook ran or, without one, when the fork was noticed."""
        self.parent_pid = _pid
        self.trigger = trigger
        self.connects_in_flight = connects_in_flight
        self.is_alone = is_alone
        """Whether the parent had no other thread and no connect in flight: nothing was in the middle."""


# -- what the other modules register

_fork_callbacks: list[Callable[[float], None]] = []
_hook_callbacks: list[Callable[[bool], bool]] = []
_child_callbacks: list[Callable[[NoticedFork], None]] = []
_report_callbacks: list[Callable[[float], None]] = []


def register_fork_callback(callback: Callable[[float], None]) -> None:
    """Have `callback(at)` called in the parent before every fork that runs Python's hooks.

    `at` is in seconds since the epoch, before anything that the child does. The callback runs inside the
    at-fork hook: it must not block, log, yield or raise. Before the fork and not after it: every page that
    the parent writes to while the child has it too is copied.
    """
    _fork_callbacks.append(callback)


def register_child_callback(callback: Callable[[NoticedFork], None]) -> None:
    """Have `callback(fork)` called once in every forked child.

    It may run inside an at-fork hook: it must not block, log, yield or raise. It is called again if it was
    interrupted.
    """
    _child_callbacks.append(callback)


def register_hook_callback(callback: Callable[[bool], bool]) -> None:
    """Have `callback(is_alone)` called in a child's at-fork hook, for what can't wait for a pool's first use.

    `is_alone` is whether the parent noted this fork, and had no other thread and no connect in flight. The
    callback returns whether all the rest can wait. If one can't, the hook deals with the fork at once.
    """
    _hook_callbacks.append(callback)


def register_report_callback(report: Callable[[float], None]) -> None:
    """Have `report(until)` called at the next use of a pool, when logging is allowed and events wait.

    It begins no event after `until`, which is in seconds of `time.monotonic`.
    """
    _report_callbacks.append(report)


# -- what the pools call


def mark_unreported() -> None:
    """Note that events wait, so that the next use of a pool logs them."""
    if fork_state[0] == SETTLED:
        fork_state[0] = UNREPORTED


def settle(until: float = math.inf) -> None:
    """Deal with a fork and log what waits; called at a pool's doors when ``fork_state[0]`` is not SETTLED.

    :param until: `time.monotonic` after which no further event is logged.
    """
    if fork_state[0] == FORKED:
        notice_fork()
    if fork_state[0] == UNREPORTED:
        fork_state[0] = SETTLED  # first: a log handler may use a pool
        for report in _report_callbacks:
            report(until)


def hold_forks_during(connect: Callable[[], None]) -> float:
    """Connect, with its events, and hold forks of other threads back meanwhile, for a bounded while.

    Return how many seconds it took, without the wait for other threads' forks.
    """
    entered, passage = _gate, Passage()
    try:
        entered.enter_connect(passage)
        started = time.perf_counter()
        connect()
        return time.perf_counter() - started
    finally:
        leave_connect(entered, passage)


def leave_connect(entered: ConnectGate, passage: Passage) -> None:
    """Let forks in again, through the gate that the connect has entered."""
    if fork_state[0] == FORKED:
        notice_fork()
    entered.leave_connect(passage)


_notice_locks: dict[int, threading.RLock] = {}  # type: ignore[valid-type, unused-ignore]  # a function before 3.13


def notice_fork() -> None:
    """Deal with a fork, if there was one and it was not dealt with yet. Never blocks for long, never logs."""
    global _pid, _gate, _has_dead_threads
    was_hooked = _hooked_pid == os.getpid()
    at = _hooked_at if was_hooked else time.time()
    # A lock of this process's own: a fork may have copied any other one in a locked state.
    lock = _notice_locks.setdefault(os.getpid(), threading.RLock())
    with lock:
        if fork_state[0] != FORKED:
            return
        # A collection in the middle would run finalizers of connections that are not disowned yet.
        collecting = gc.isenabled()
        try:
            try:
                gc.disable()
                is_alone = was_hooked and _hooked_alone
                in_flight = 0 if is_alone else _gate.in_flight(threading.get_ident())
                fork = NoticedFork(at, "hook" if was_hooked else "lazy", in_flight, is_alone)
                for callback in _child_callbacks:
                    callback(fork)
                if not was_hooked:
                    _has_dead_threads = True
                    log_locks.renew(in_hook=False)
                openssl.note_child(is_alone)
                _pid = noticed_pid[0] = os.getpid()
                if not is_alone:
                    _gate = ConnectGate()
                fork_state[0] = UNREPORTED  # last: if this is interrupted, the next check begins again
            finally:
                if collecting:
                    gc.enable()
        finally:
            if collecting:  # again, for an interrupt of the first
                gc.enable()


# -- the at-fork hooks


_forks_alone = False
"""Whether this process forks, or was forked, by the only thread that it had, outside of a connect: nothing is
in the middle of a connect or of a log line, so there is nothing to wait for, to hold or to renew."""

_hooked_pid = 0
"""The process whose at-fork hook has begun. What can wait is left to the first look at `fork_state`."""
_hook_is_over = False
"""Whether the at-fork hook has run to its end in this child."""
_hooked_at = 0.0
_hooked_alone = False


_has_dead_threads = False
"""Whether this process was forked in C, without what CPython does after a fork. It may have the states of its
parent's threads then, on whose stacks its own new threads run."""


def _before_fork() -> None:
    # One function: each function and each object that is touched here costs the parent a page or two.
    global _forks_alone, _hooked_pid, _hook_is_over
    _hook_is_over = False  # for the child's
    if fork_state[0] == FORKED:
        # A child forked in C that forks before it uses a pool. The gate it has is its parent's, whose
        # threads may have left it locked (test_a_child_that_never_noticed_its_fork_can_fork).
        notice_fork()
    _hooked_pid = 0  # the child may have this pid in a namespace of its own
    # Threads that were started in C are counted too; threading.active_count() has not met them. Greenlets of
    # gevent and eventlet are not, and may be in the middle of something as threads are. To look for dead
    # threads' frames crashes: see tests/forks/test_grandchildren.py.
    _forks_alone = (
        not _has_dead_threads
        and len(sys._current_frames()) == 1
        and not ("gevent" in sys.modules or "eventlet" in sys.modules)
        # This thread's own: a task of asyncio's, or one in which a signal handler or a listener forks.
        and not _gate.connecting
    )
    if not _forks_alone:
        fork = get_ident(), id(sys._getframe().f_back)
        _gate.before_fork(fork)
        log_locks.hold(fork)  # after the gate: a thread whose connect is waited for may log
    if get_ident() not in guarded_threads:
        openssl.ready_to_fork()
    # Before the fork, when no child can be ahead: events sorted by time have the fork first.
    at = time.time()
    for callback in _fork_callbacks:
        callback(at)


def _after_fork_in_parent() -> None:
    global _forks_alone
    if _forks_alone:
        _forks_alone = False
        return
    if _gate.forking:
        fork = get_ident(), id(sys._getframe().f_back)
        log_locks.release(fork)
        _gate.after_fork_in_parent(fork)  # last: there is nothing left to do once it is not there


def _after_fork_in_child() -> None:
    global _forks_alone, _hooked_pid, _hooked_at, _hooked_alone, _has_dead_threads, _hook_is_over
    if _hook_is_over:
        return  # the second call
    _has_dead_threads = False  # CPython has removed them
    if fork_state[0] != FORKED:
        # Another hook before this one has used a pool. All is done, and the connections are the child's own.
        _forks_alone, _hook_is_over = False, True
        return
    # First: a finalizer may notice the fork in the lines below.
    _hooked_at, _hooked_alone, _hooked_pid = time.time(), _forks_alone, os.getpid()
    can_wait = True
    for callback in _hook_callbacks:
        can_wait = callback(_forks_alone) and can_wait
    if not _forks_alone:
        log_locks.renew(in_hook=True)
    _forks_alone, _hook_is_over = False, True  # last: until then the second call begins again
    if not can_wait:
        notice_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork)
    # Twice, for an interrupt of the first: CPython prints it, and goes on to the next hook. A signal that
    # comes during a fork is handled in the first hook afterwards that is no function of C's, maybe in ours.
    for _ in range(2):
        os.register_at_fork(after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
