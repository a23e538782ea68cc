"""Forks many times with 100 open connections, and prints what each tenth of the forks took in the parent, and
what the parent has at its end: ``python many_forks.py <forks>``."""

from __future__ import annotations

import gc
import json
import os
import resource
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from pidpool import PidPool

CONNECTIONS = 100
A_CHILD_USES = 50  # one child in so many uses its pool


class SocketConnection:
    """A driver's connection that does nothing and has a socket."""

    def __init__(self) -> None:
        self._socket, other_end = socket.socketpair()
        other_end.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def rollback(self) -> None: ...

    def close(self) -> None:
        self._socket.close()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def pages() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def measure(forks: int) -> dict[str, list[float]]:
    pool: Any = PidPool(SocketConnection, pool_size=CONNECTIONS)
    held = [pool.connect() for _ in range(CONNECTIONS)]
    while held:
        held.pop().close()
    gc.freeze()
    measured: dict[str, list[float]] = {"pages": [], "seconds": [], "resident": [], "descriptors": []}
    for _ in range(10):
        pages_of_each, seconds_of_each = [], []
        for number in range(forks // 10):
            pages_before, began = pages(), time.thread_time()
            pid = os.fork()
            if pid == 0:
                if number % A_CHILD_USES == 0:
                    pool.connect().close()
                os._exit(0)
            seconds_of_each.append(time.thread_time() - began)
            pages_of_each.append(pages() - pages_before)
            assert os.waitpid(pid, 0)[1] == 0
        pool.status()  # the parent's own next use, which logs the forks
        measured["pages"].append(statistics.median(pages_of_each))
        measured["seconds"].append(statistics.median(seconds_of_each))
        measured["resident"].append(resident())
        measured["descriptors"].append(len(os.listdir("/proc/self/fd")))
    return measured


print(json.dumps(measure(int(sys.argv[1]))))
