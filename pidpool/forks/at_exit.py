"""Logs, when a process ends, the events that waited for the next use of a pool: that it forked, if it used no
pool afterwards; and what it inherited, if it did nothing but let go of it.

Runs by `atexit`. A child of `multiprocessing` ends without that, and has finalizers of its own. A process
logs nothing at its end if it was killed, called `os._exit`, or never used the pool after the fork.

An end is not held up: if a log writer is stuck in another thread, nothing is logged, and a slow log loses
what it has not taken within `LOG_SECONDS`.
"""

from __future__ import annotations

import logging  # its own atexit handler is registered by this import, and so runs after ours
import os
import sys
import time
from atexit import register, unregister
from typing import Any

from pidpool.forks import detection, log_locks
from pidpool.forks.detection import UNREPORTED, fork_state
from pidpool.forks.ownership import owned_connections

LOG_SECONDS = 5.0
"""Seconds for which a process logs at its end at most. The line that it is in the middle of has no bound."""

_PRIORITY = 100
"""Among multiprocessing's finalizers: its queues are closed with 10, and a log may go through one."""

_known_to_multiprocessing = False


def log_at_exit() -> None:
    """Have this process and all forked from it log at their end what waits."""
    register(_log)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_before_fork)


def _log() -> None:
    # A child that has used no pool logs what its at-fork hook let go of.
    if fork_state[0] != UNREPORTED and not (detection.is_hooked() and owned_connections):
        return
    # Quiet if the log is closed already: the process ends, and nothing can be done about it.
    complaining, logging.raiseExceptions = logging.raiseExceptions, False
    until = time.monotonic() + LOG_SECONDS
    try:
        # A daemon thread may be in the middle of a line that does not end, on a pipe that nobody reads.
        if log_locks.are_free(until):
            detection.settle(until)
    finally:
        logging.raiseExceptions = complaining


def _before_fork() -> None:
    # Exit handlers run in the reverse order of their registration. As a rule another handler stops what a log
    # needs: a queue's listener, multiprocessing's queues (a later write to one was seen to hang the exit).
    # Such handlers are already registered, so this one is made the last.
    unregister(_log)
    register(_log)
    # Only now, and only if the application has imported it: to import it takes longer than all of pidpool.
    global _known_to_multiprocessing
    util: Any = sys.modules.get("multiprocessing.util")
    if not _known_to_multiprocessing and hasattr(util, "register_after_fork"):
        util.register_after_fork(_log, _log_at_exit_in_multiprocessing)
        _known_to_multiprocessing = True


def _log_at_exit_in_multiprocessing(log: Any) -> None:
    """Have the child of a `multiprocessing.Process` log at its end."""
    sys.modules["multiprocessing.util"].Finalize(None, log, exitpriority=_PRIORITY)
