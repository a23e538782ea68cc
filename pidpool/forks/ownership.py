"""The connections that this process owns: every one that it opened and has not closed. A forked child finds
here what it inherited.
"""

from __future__ import annotations

import itertools
import os
import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from pidpool.drivers import Sockets, driver_of, under_adapter
from pidpool.forks import detection, severing
from pidpool.forks.detection import FORKED, fork_state, process_pid
from pidpool.tag import ConnectionTag


class Checkout(Protocol):
    """One checkout of a connection, as far as this room deals with it."""

    held_connection: Any
    """The driver's connection, or the stand-in for it; read without asking which process this is."""
    entry: Any
    """The pool's entry; None once it has gone back."""

    has_streamed: bool
    """Whether a cursor of it may still ask the server for rows, past all doors of the pool."""

    @property
    def dbapi_connection(self) -> Any: ...

    @property
    def pidpool(self) -> Any: ...


class Entry(Protocol):
    """A pool's entry, as far as this room deals with it."""

    dbapi_connection: Any

    pool_events: Any
    """What its pool shares with those that are recreated from it."""

    @property
    def in_use(self) -> bool: ...

    @property
    def pidpool(self) -> Any: ...

    @property
    def checked_out_at(self) -> str | None:
        """The line of the user's code that checked it out, if that is known."""

    def current_checkout(self) -> Checkout | None: ...


class Permit(Protocol):
    """What the family's budget gives for each connection."""

    def give_back(self) -> None: ...


class OwnedConnection:
    """A connection that this process opened, as long as it lives. Holds no reference to it."""

    __slots__ = (
        "tag",
        "sever",
        "fd",
        "identity",
        "detached",
        "used_by",
        "permit",
        "is_severed",
        "is_counted_closed",
        "_connection",
        "_driver_connection",
        "_entry",
        "_pool_events",
        "_key",
        "__weakref__",
    )

    def __init__(
        self, tag: ConnectionTag, identity: tuple[int, int] | None, connection: Any, entry: Entry, sever: bool
    ) -> None:
        self.tag = tag
        self.sever = sever
        self.detached: Callable[[], Checkout | None] | None = None
        """A weak reference to the checkout that was detached from the pool with this connection."""
        # Without this a child that collects the checkout and the connection together finds nothing left to
        # disown: weak references go first.
        self.used_by: Entry | None = None
        """The pool's entry, while it is checked out."""
        self.permit: Permit | None = None
        """The connection's permit, if its family has a limit; given back once it is closed."""
        self.is_severed = False
        self.is_counted_closed = False
        self.fd = tag.fd
        self.identity = identity
        self._key = id(connection)
        self._entry: weakref.ref[Entry] = weakref.ref(entry)
        self._pool_events: weakref.ref[Any] = weakref.ref(entry.pool_events)
        self._connection = self._watch(connection)
        self._driver_connection = None
        if self._connection is None:
            # Of a collected checkout SQLAlchemy drops the connection if the driver can't close it in a
            # finalizer, as psycopg (tests/pool/test_async.py::test_a_collected_checkout_is_closed_as_such).
            self._driver_connection = self._watch(under_adapter(connection))

    def _watch(self, connection: Any) -> weakref.ref[Any] | None:
        try:
            return None if connection is None else weakref.ref(connection, self._collected)
        except TypeError:  # has no weak references: pyodbc's, SQLAlchemy's adapters for asyncio
            return None

    def entry(self) -> Entry | None:
        """Return the pool entry that the connection was opened for, or None if that is gone."""
        return self._entry()

    def is_lost_by(self, pool_events: object) -> bool:
        """Return whether it is a pool's whose entry for it is gone: an interrupt has lost the entry.

        Otherwise the entry is in the pool, in a frame that deals with it, or in `used_by`.
        """
        return self._pool_events() is pool_events and self.detached is None and self._entry() is None

    def connection(self) -> Any:
        """Return the driver's connection, or None if it was collected."""
        if self._connection is not None:
            return self._connection()
        # By what holds it, past the checks of a detached checkout: a child may ask while it takes over.
        if self.detached is not None:
            checkout = self.detached()
            return None if checkout is None else checkout.held_connection
        entry = self._entry()
        return None if entry is None else entry.dbapi_connection

    def sever_socket(self, *, even_if_kept: bool = False) -> bool:
        """Sever the connection's socket if that is wanted; return whether it was done, now or before.

        Does nothing if the descriptor is no longer the socket that was tagged. Descriptor numbers are
        reused, so a number alone proves nothing
        (tests/forks/test_sockets.py::test_a_reused_descriptor_is_left_alone).
        """
        if self.is_severed or not (self.sever or even_if_kept) or self.fd is None or self.identity is None:
            return self.is_severed
        if severing.socket_identity(self.fd) == self.identity:
            try:
                severing.sever(self.fd, severing.dead_socket())
                self.is_severed = True
            except OSError:
                pass  # no descriptor is left, say: it stays as it is, and is never used
        return self.is_severed

    def is_of_this_process(self) -> bool:
        """Return whether this process opened it; asks first whether this is a forked child."""
        if fork_state[0] == FORKED:
            detection.notice_fork()
        return self.tag.owner_pid == process_pid()

    def detach(self, checkout: Any) -> None:
        """Note that the checkout has taken the connection out of the pool."""
        is_watched = self._connection is not None or self._driver_connection is not None
        # If nothing else can be: then the connection ends with the checkout, unless it is kept by itself.
        self.detached = weakref.ref(checkout, None if is_watched else self._collected)
        if owned_connections.get(self._key) is self:
            detached_connections[self._key] = self

    def renew(self, connection: Any, entry: Entry) -> None:
        """Refer anew to a connection and its entry that were collected in a cycle, and then resurrected."""
        permit = self.permit
        self.__init__(self.tag, self.identity, connection, entry, self.sever)  # type: ignore[misc]
        self.permit = permit
        owned_connections[self._key] = self

    def let_go(self) -> None:
        """Take the connection out of `owned_connections`: its owner is about to close it."""
        if owned_connections.get(self._key) is self:
            owned_connections.pop(self._key, None)
            detached_connections.pop(self._key, None)

    def disown(self, connection: Any) -> None:
        """Let go of a connection that turns out to be another process's, without touching it."""
        severing.pin(connection)
        self.sever_socket()
        self.let_go()

    def _collected(self, reference: weakref.ref[Any]) -> None:
        # In a child that has not noticed its fork nothing else would sever it: its destructor is next.
        if fork_state[0] == FORKED:
            self.sever_socket()
        self.let_go()
        self.give_back_permit()

    def give_back_permit(self) -> None:
        """Let another process of the family open a connection in the place of this one, which is closed."""
        if self.permit is not None:
            self.permit.give_back()


owned_connections: dict[int, OwnedConnection] = {}
"""Every connection opened by this process, by `id()`. Emptied in a child once all are disowned."""

detached_connections: dict[int, OwnedConnection] = {}
"""Those of them that were detached from their pool."""

_numbers = itertools.count(1)


def sever_all() -> bool:
    """Sever all sockets in a child's at-fork hook; return whether all connections had one to sever.

    The same as `OwnedConnection.sever_socket` for each, in one function: a child pays for each object that it
    touches. Device and inode say by themselves that it is a socket.
    """
    try:
        fstat, dup2, dead_socket = os.fstat, os.dup2, severing.dead_socket()
    except OSError:
        return False
    all_severed = True
    for owned in owned_connections.values():
        fd = owned.fd
        if fd is None or not owned.sever:
            all_severed = False
            continue
        try:
            status = fstat(fd)
            if (status.st_dev, status.st_ino) == owned.identity:
                dup2(dead_socket, fd, False)
                owned.is_severed = True
                continue
        except OSError:
            pass  # it is closed
        all_severed = False
    return all_severed


def tag_connection(
    connection: Any, entry: Entry, *, sever: bool, before: Sockets | None = None
) -> OwnedConnection:
    """Tag a connection that was just opened and note that this process owns it.

    :param before: the sockets that there were before, if the driver may give no descriptor.
    """
    driver = driver_of(connection)
    # If the driver fails here, that is no reason to lose a good connection: what can't be read is None.
    try:
        fd = driver.fileno(connection)
        if fd is None and before is not None:
            fd = driver.find_fileno(connection, before)
    except Exception:
        fd = None
    try:
        server_pid = driver.server_pid(connection)
    except Exception:
        server_pid = None
    identity = None if fd is None else severing.socket_identity(fd)
    pid = process_pid()
    tag = ConnectionTag(
        connection_id=f"{pid}-{next(_numbers)}",
        owner_pid=pid,
        fd=fd,
        socket_inode=None if identity is None else identity[1],
        server_pid=server_pid,
        opened_at=time.time(),
    )
    owned = OwnedConnection(tag, identity, connection, entry, sever)
    owned_connections[id(connection)] = owned
    return owned
