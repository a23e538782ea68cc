"""Which process is meant by a pid: pids are reused, so a process is known by its pid, the time when it
started and the address of its stack.
"""

from __future__ import annotations

import os
import sys
import time

STATE, PARENT, START_TIME, START_STACK = 0, 1, 19, 25
"""Positions in the answer of `read_stat` (proc_pid_stat(5)). START_TIME counts clock ticks since boot."""

_TICK_NS = 10**9 // os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0


def read_stat(pid: int | str) -> list[bytes]:
    """Return the fields of /proc/PID/stat behind the name of the program.

    :param pid: a pid, or ``"self"``.
    :raises OSError: if there is no such process, or it may not be read.
    """
    with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
        # From the last parenthesis: the name may hold spaces and parentheses.
        return file.read(4096).rpartition(b")")[2].split()


def boot_time() -> int:
    """Return the nanoseconds since the machine was booted; 0 if the system has no such clock."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return 0 if clock is None else time.clock_gettime_ns(clock)


def own_stack() -> int:
    """Return the address where this process's stack begins; 0 if the system does not give it.

    Forked processes share it until one of them executes another program.
    """
    try:
        return int(read_stat("self")[START_STACK])
    except (OSError, IndexError, ValueError):
        return 0


def is_alive(pid: int, joined: int, stack: int) -> bool:
    """Return whether the process that had this pid when it joined still runs, with the same stack.

    A later process with the same pid has a later start. A zombie has ended. A process that executes
    another program keeps its pid and start, but gets another stack, and has lost the pool.

    :param joined: the `boot_time` when the process joined.
    :param stack: its `own_stack`; 0 for any.
    """
    if sys.platform == "linux":
        try:
            fields = read_stat(pid)
            if fields[STATE] in (b"Z", b"X") or int(fields[START_TIME]) * _TICK_NS > joined + _TICK_NS:
                return False
            # The kernel gives 0 or 1 if this process may not see the other's addresses.
            return int(fields[START_STACK]) in (0, 1, stack) or not stack
        except (OSError, IndexError, ValueError):
            pass  # it has ended, or belongs to another user and /proc hides it
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
