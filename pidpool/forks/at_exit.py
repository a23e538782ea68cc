"""Tells, when a process ends, what waited for the next use of a pool: that it forked, in a parent that
used none afterwards, and what it inherited, in a child that did nothing but let go of it.

Runs by `atexit`; a child of `multiprocessing` ends without that, and has finalizers of its own. Who is
killed, ends by `os._exit` or never noticed that it was forked tells nothing.
"""

from __future__ import annotations

import atexit
import logging  # its own atexit handler is registered by this import, and runs after ours
import os
import sys
from typing import Any

from pidpool.forks import detection as fork

_PRIORITY = 100
"""Among multiprocessing's finalizers: its queues are closed with 10, and a log may go through one."""

_known_to_multiprocessing = False


def tell_at_the_end() -> None:
    """See to it, once, that this process and all forked from it tell at their end."""
    atexit.register(_tell)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_before_fork)


def _tell() -> None:
    """Tell what was not told yet. Quiet where the log is closed by now: that is nobody's fault."""
    if fork.flag[0] != fork.UNREPORTED:
        return
    complaining, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        fork.settle()
    finally:
        logging.raiseExceptions = complaining


def _before_fork() -> None:
    # Handlers run the last one first. What a log needs at the end is stopped by a handler, as a rule: a
    # queue's listener, multiprocessing's queues (to write to one afterwards was seen to hang the exit).
    # Whoever logs with them has registered theirs by now, so this one is made the last.
    atexit.unregister(_tell)
    atexit.register(_tell)
    # Only now, and only where somebody else has imported it: that takes longer than all of pidpool.
    global _known_to_multiprocessing
    util: Any = sys.modules.get("multiprocessing.util")
    if not _known_to_multiprocessing and hasattr(util, "register_after_fork"):
        util.register_after_fork(_tell, _in_multiprocessing)
        _known_to_multiprocessing = True


def _in_multiprocessing(tell: Any) -> None:
    """Have the child of a `multiprocessing.Process` tell at its end."""
    sys.modules["multiprocessing.util"].Finalize(None, tell, exitpriority=_PRIORITY)
