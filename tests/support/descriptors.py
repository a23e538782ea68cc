"""The descriptors of this process, and whether one of them is a severed connection's."""

from __future__ import annotations

import os
import stat

from pidpool import ConnectionTag


def identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def open_descriptors() -> set[int]:
    listed = {int(name) for name in os.listdir("/proc/self/fd")}
    return {fd for fd in listed if os.path.exists(f"/proc/self/fd/{fd}")}  # without the listing's own


def is_severed(tag: ConnectionTag) -> bool:
    """Return whether this process's descriptor is a socket, but no longer the one that was tagged."""
    assert tag.fd is not None
    status = os.fstat(tag.fd)
    return stat.S_ISSOCK(status.st_mode) and status.st_ino != tag.socket_inode
