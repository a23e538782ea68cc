"""Whose connection is it: the tag that every connection gets when it is opened, and the register of
all connections that this process has open, by which a forked child finds what it inherited.
"""

from __future__ import annotations

import itertools
import os
import stat
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Connection

from pidpool.drivers import driver_of
from pidpool.forks import detection as fork
from pidpool.forks import stand_in as inherited
from pidpool.tag import ConnectionTag as ConnectionTag  # also for those who look for it here

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection


class Holding:
    """A connection that this process opened, as long as it lives. Holds no reference to it."""

    __slots__ = (
        "tag",
        "sever",
        "device",
        "detached",
        "checked_out",
        "_connection",
        "_record",
        "_key",
        "__weakref__",
    )

    def __init__(
        self, tag: ConnectionTag, device: int | None, connection: Any, record: Any, sever: bool
    ) -> None:
        self.tag = tag
        self.device = device
        self.sever = sever
        self.detached: Callable[[], Any] | None = None  # a weak reference to the detached fairy
        # The pool entry, while it is checked out. Without it a child that collects the checkout and
        # the connection together finds nothing left to disown: weak references go first.
        self.checked_out: Any = None
        self._key = id(connection)
        self._record: weakref.ref[Any] = weakref.ref(record)
        self._connection: weakref.ref[Any] | None
        try:
            self._connection = weakref.ref(connection, self._collected)
        except TypeError:  # can't be referred to weakly: pyodbc's, SQLAlchemy's asyncio adapters
            self._connection = None

    def record(self) -> Any:
        """Return the pool entry that the connection was opened for, or None if that is gone."""
        return self._record()

    def connection(self) -> Any:
        """Return the driver's connection, or None if it was collected."""
        if self._connection is not None:
            return self._connection()
        # By what holds it, past the checks of a detached fairy: a child may ask while it adopts.
        if self.detached is not None:
            fairy = self.detached()
            return None if fairy is None else fairy._held
        record = self._record()
        return None if record is None else record.dbapi_connection

    def is_still_that_socket(self) -> bool:
        """Return whether the tag's descriptor still is the socket that was tagged.

        Descriptor numbers are reused, so a number alone proves nothing
        (tests/forks/test_inherited.py::test_a_reused_descriptor_is_left_alone).
        """
        if self.tag.fd is None or self.tag.socket_inode is None:
            return False
        try:
            status = os.fstat(self.tag.fd)
        except OSError:
            return False
        return (
            stat.S_ISSOCK(status.st_mode)
            and status.st_dev == self.device
            and status.st_ino == self.tag.socket_inode
        )

    def let_go(self) -> None:
        """Take the connection off the register: it is about to be closed by its owner."""
        if register.get(self._key) is self:
            del register[self._key]

    def _collected(self, reference: weakref.ref[Any]) -> None:
        # In a child that has not noticed its fork, nobody else will find it: its destructor is next.
        if fork.flag[0] == fork.WIPED and self.sever and self.is_still_that_socket():
            assert self.tag.fd is not None
            inherited.sever(self.tag.fd)
        self.let_go()


register: dict[int, Holding] = {}
"""Every connection opened by this process, by `id()`. Emptied in a child once all are disowned."""

_numbers = itertools.count(1)


def take(connection: Any, record: Any, *, sever: bool) -> Holding:
    """Tag a connection that was just opened and put it on the register."""
    driver = driver_of(connection)
    # A driver that fails here is no reason to lose a good connection: what can't be read is None.
    try:
        fd = driver.fileno(connection)
    except Exception:
        fd = None
    try:
        server_pid = driver.server_pid(connection)
    except Exception:
        server_pid = None
    device = inode = None
    if fd is not None:
        status = os.fstat(fd)
        if stat.S_ISSOCK(status.st_mode):
            device, inode = status.st_dev, status.st_ino
    pid = fork.current().pid
    tag = ConnectionTag(
        connection_id=f"{pid}-{next(_numbers)}",
        owner_pid=pid,
        fd=fd,
        socket_inode=inode,
        server_pid=server_pid,
        opened_at=time.time(),
    )
    holding = Holding(tag, device, connection, record, sever)
    register[id(connection)] = holding
    return holding


def tag_of(
    x: Connection | AsyncConnection | PoolProxiedConnection | ConnectionPoolEntry,
) -> ConnectionTag | None:
    """Return the tag of the connection that `x` holds at present.

    Never blocks, opens nothing and may be called in any thread and any process: in a forked child
    an inherited connection still has its owner's tag until it is replaced.

    :param x: a SQLAlchemy ``Connection`` or ``AsyncConnection``, what ``engine.raw_connection()``
        or ``pool.connect()`` returned, or the entry that pool events are given.
    :return: None if `x` holds no connection now, being closed or invalidated.
    :raises TypeError: if `x` is none of these, or not of a `PidPool`.
    """
    proxied: Any = x
    if hasattr(x, "sync_connection"):  # AsyncConnection; None before it is started
        proxied = x.sync_connection
        if proxied is None:
            return None
    if isinstance(proxied, Connection):
        # Not `.connection`: that reconnects after an invalidation.
        proxied = proxied._dbapi_connection
        if proxied is None:
            return None
    try:
        holding: Holding | None = proxied.pidpool_holding
    except AttributeError:
        # Not its repr: a driver's shows the DSN.
        raise TypeError(
            f"a {type(x).__name__} has no tag: tag_of() takes a Connection, AsyncConnection, pooled "
            "connection or pool entry of an engine made with poolclass=PidPool"
        ) from None
    return None if holding is None else holding.tag
