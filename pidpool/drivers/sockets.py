"""Finds the socket of a connection whose driver gives no descriptor: among the sockets that this process has
after the connect, and did not have before, by the address of the other end.
"""

from __future__ import annotations

import os
import socket
import time
from typing import NamedTuple

LOOKS, BETWEEN_LOOKS = 100, 0.002
"""How often, and after how many seconds, a moment is looked for in which each socket has one descriptor."""


class NewSocket(NamedTuple):
    """A socket that was opened since."""

    fd: int
    port: int | None
    """The port of this end."""


class Sockets:
    """The sockets that this process has at present, other threads' included."""

    def __init__(self) -> None:
        self._inodes = set(_inodes().values())

    def opened_to(self, address: int | str) -> list[NewSocket]:
        """Return the sockets that were opened since, and whose other end is there.

        :param address: a TCP port, or the path of a Unix socket.
        """
        found = []
        for fd in self._new_ones():
            try:
                with socket.socket(fileno=os.dup(fd)) as copy:
                    ours, other = copy.getsockname(), copy.getpeername()
            except OSError:
                continue  # not connected, or another thread's that it has closed
            if isinstance(other, tuple):
                if other[1] == address:
                    found.append(NewSocket(fd, ours[1]))
            elif other == address:
                found.append(NewSocket(fd, None))
        return found

    def _new_ones(self) -> list[int]:
        for _ in range(LOOKS):
            new = {fd: inode for fd, inode in _inodes().items() if inode not in self._inodes}
            if len(set(new.values())) == len(new):
                break
            time.sleep(BETWEEN_LOOKS)  # another thread looks at a copy of one, as is done above
        return list(new)


def _inodes() -> dict[int, str]:
    """Return the sockets of this process by descriptor; none where there is no /proc."""
    found = {}
    try:
        names = os.listdir("/proc/self/fd")
    except OSError:
        return {}
    for name in names:
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # closed meanwhile
        if target.startswith("socket:"):
            found[int(name)] = target
    return found
