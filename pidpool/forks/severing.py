"""Lets go of an inherited connection: a dead socket goes over its descriptor, and the driver's object is kept
alive for ever.

All of this may run inside an at-fork hook: it takes no lock, logs nothing and sends nothing.
"""

from __future__ import annotations

import ctypes
import os
import socket
import stat
from typing import Any

_pinned: dict[int, object] = {}
# A reference that is never given back: a module's globals are cleared at interpreter exit, and all that is in
# there would go. Taken ahead: a child that had to call it would pay for it at its fork.
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_pinned))


def pin(kept: object) -> None:
    """Keep an inherited object alive for ever, so that no destructor of it ever runs in this process.

    Some connections' destructors send a goodbye to the server, and psycopg2's takes a mutex that another
    thread may have held at the fork. Idempotent.
    """
    _pinned[id(kept)] = kept  # from then on the id stays this object's own


def unpin(kept: object) -> None:
    """Give back what was pinned until more was known of it."""
    _pinned.pop(id(kept), None)


def is_disowned(connection: Any) -> bool:
    """Return whether this driver connection was inherited and disowned in this process."""
    return id(connection) in _pinned


def sever(fd: int, dead_socket: int) -> None:
    """Put a dead socket over this process's descriptor of a shared one.

    Drops this process's reference and no more: nothing is sent, nothing is shut down, O_NONBLOCK and
    epoll registrations of the shared socket stay as they are. A later write to the descriptor gets EPIPE,
    a later read the end of the stream.

    :param dead_socket: see `dead_socket`.
    """
    os.dup2(dead_socket, fd, inheritable=False)


def dead_socket() -> int:
    """Return the one descriptor that severing needs.

    Opened in the process that opens connections. Asked for before each time that sockets are severed: see
    `_DeadSocket.fileno`.
    """
    return _dead_socket.fileno()


def make_dead_socket() -> None:
    """Make the dead socket ahead, before a connection is opened.

    :raises OSError: if this process has no descriptors left for it.
    """
    try:
        _dead_socket.fileno()
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror}: no connection is opened, since a forked child needs two descriptors more for "
            f"its dead socket; close files in pid {os.getpid()} or raise its limit{_limit_of_files()}",
        ) from None


def _limit_of_files() -> str:
    try:
        import resource  # not on Windows
    except ImportError:
        return ""
    return f" of open files, {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}"


def socket_identity(fd: int) -> tuple[int, int] | None:
    """Return the device and inode of a socket; None if the descriptor is closed or no socket."""
    try:
        status = os.fstat(fd)
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISSOCK(status.st_mode) else None


class _DeadSocket:
    """One end of a socketpair whose other end is closed."""

    def __init__(self) -> None:
        self._fd = -1
        self._identity: tuple[int, int] | None = None

    def fileno(self) -> int:
        """Return its descriptor; makes the socket if it is not there (any more).

        Made ahead, when a connection is tagged, so that a child at its limit of open files can sever all
        the same. Checked each time: a daemon may have closed all its descriptors, and the number may
        belong to another file by then.
        """
        try:
            status = os.fstat(self._fd)
            if (status.st_dev, status.st_ino) == self._identity:
                return self._fd
        except OSError:
            pass  # closed, or not made yet
        ours, other_end = socket.socketpair()
        other_end.close()
        self._fd = ours.detach()
        self._identity = socket_identity(self._fd)
        return self._fd


_dead_socket = _DeadSocket()
