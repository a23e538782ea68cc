"""Reads /proc/PID/stat, by which the processes of a family and those of ``pidpool ps`` are told apart."""

from __future__ import annotations

STATE, PARENT, START_TIME, START_STACK = 0, 1, 19, 25
"""Positions in the answer of `read_stat` (proc_pid_stat(5)). START_TIME counts clock ticks since boot."""


def read_stat(pid: int | str) -> list[bytes]:
    """Return the fields of /proc/PID/stat behind the name of the program.

    :param pid: a pid, or ``"self"``.
    :raises OSError: if there is no such process, or it may not be read.
    """
    with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
        # From the last parenthesis: the name may hold spaces and parentheses.
        return file.read(4096).rpartition(b")")[2].split()
