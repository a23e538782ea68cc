"""`PidPoolEntry`: SQLAlchemy's pool entry, made to know which connection it holds and whose that is. Read
beside `_ConnectionRecord` in sqlalchemy/pool/base.py.
"""

from __future__ import annotations

import random
import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol, cast

from sqlalchemy.pool.base import _ConnectionRecord

from pidpool._sqlalchemy import contract  # noqa: F401  checks what is relied on here
from pidpool._sqlalchemy.entry_list import EntryList
from pidpool.drivers import driver_of, sockets_before, unknown_driver
from pidpool.events.pool_events import PoolEvents
from pidpool.events.watched_checkout import WatchedCheckout
from pidpool.forks import detection, openssl, ownership, severing
from pidpool.forks.detection import FORKED, fork_state, noticed_pid
from pidpool.forks.ownership import Checkout, OwnedConnection
from pidpool.stats.budget import Permit
from pidpool.stats.process_counters import SCRATCH, ProcessCounters, write_connection
from pidpool.tag import ConnectionTag
from pidpool.terms import CloseReason, InheritedSockets


class PoolOfEntries(Protocol):
    """The pool of an entry, as far as the entry needs it."""

    pool_events: PoolEvents

    streams_by_any_cursor: bool
    """Whether its driver's results may be streamed by any cursor."""

    def wait_for_permit(self) -> Permit | None:
        """Return a permit to open a connection; None if the family has no limit."""

    inherited_sockets: InheritedSockets


class ForkedWhileOpening(Exception):
    """A signal handler has forked, this is the child, and the connection just opened is its parent's."""


class PidPoolEntry(_ConnectionRecord):
    """One entry of a pool: SQLAlchemy's `ConnectionPoolEntry`.

    In a child `inherited` is set for every entry of the parent's. Such an entry is not counted there and
    never goes back into the pool.
    """

    __slots__ = (
        "members",
        "owned",
        "inherited",
        "close_reason",
        "watched",
        "out_since",
        "pool_events",
        "counters",
        "slot_number",
        "slot",
        "permit",
    )

    members: EntryList | None
    """The pool's entries, while this is one of them."""
    owned: OwnedConnection | None
    """The connection that it held last; `owned_now` if it still holds it."""
    inherited: bool
    close_reason: CloseReason
    """Why its connection is closed, if it is closed next."""
    watched: WatchedCheckout | None
    out_since: int
    """`time.perf_counter_ns()` of the checkout; 0 while it is idle."""
    counters: ProcessCounters
    """The counters of the process that made the entry."""
    slot_number: int
    slot: memoryview
    """Its part of those counters: its checkouts are counted there."""
    permit: Permit | None
    """For the connection that it is about to open, if the family has a limit."""

    def __init__(self, pool: PoolOfEntries, connect: bool = True, permit: Permit | None = None) -> None:
        self.members = None
        self.permit = permit
        self.owned = None
        self.inherited = False
        self.close_reason = "recycled"
        self.watched = None
        self.out_since = 0
        self.pool_events = pool.pool_events
        self.counters = counters = pool.pool_events.counters
        self.slot_number, self.slot = counters.assign_slot(self)
        as_sqlalchemys: Any = pool
        super().__init__(as_sqlalchemys, connect)

    def connect(self) -> None:
        """Open the first connection of an entry that was made without one."""
        self._ConnectionRecord__connect()

    # -- its place in the pool

    def leave(self) -> None:
        """Leave the pool, which may make another entry in the place of this one."""
        if self.members is not None:
            self.members.remove(self)
        if not self.inherited:
            self.counters.release_slot(self)
        self.slot, self.slot_number = SCRATCH, 0

    def end(self, error: BaseException | None) -> None:
        """Close the connection and leave the pool, since an operation on the entry was interrupted."""
        self.fairy_ref = self.watched = None
        self.out_since = 0
        if self.owned is not None:
            self.owned.used_by = None
        try:
            self.invalidate(error)
        finally:
            self.leave()

    # -- which connection it holds

    def open(self, create: Callable[[Any], Any]) -> Any:
        """Open a connection and note that this process owns it, before anything else is done with it.

        :param create: SQLAlchemy's function that opens one for an entry.
        """
        severing.make_dead_socket()  # for a child at its limit of open files
        before = sockets_before(getattr(self.pidpool.engine_dialect, "driver", None))
        connection = create(self)
        # Without a call in between, in which a signal handler could fork. If the creator has forked, the
        # connection is the child's. If a handler forks in the lines below, it is the parent's.
        owner = noticed_pid[0]
        if fork_state[0] == FORKED:
            detection.notice_fork()
            owner = noticed_pid[0]
        openssl.look(type(connection).__module__)
        sever = self.pidpool.inherited_sockets == "sever"
        owned = ownership.tag_connection(connection, self, sever=sever, before=before)
        if fork_state[0] == FORKED:
            detection.notice_fork()
        if noticed_pid[0] != owner:
            owned.disown(connection)
            raise ForkedWhileOpening
        self.own(owned)
        self._hand_permit_over(connection)
        if driver_of(connection).streams_by_any_cursor:
            self.pidpool.streams_by_any_cursor = True
        self.pidpool.start_idle_thread()
        try:
            # One statement, once in a family, before the application has the connection.
            self.pool_events.family.learn_server_max_connections(
                lambda: driver_of(connection).max_connections(connection)
            )
        except Exception:
            self.pidpool.logger.debug("The server's max_connections could not be read", exc_info=True)
        return connection

    def _hand_permit_over(self, connection: Any) -> None:
        """Have the connection just opened keep the permit until it is closed."""
        budget = self.pool_events.budget
        if budget is None or self.owned is None:
            return
        if self.permit is None or not self.permit.is_of(budget):
            # The creator has forked, this is the child, and the permit is the parent's.
            try:
                self.permit = self.pidpool.wait_for_permit()
            except BaseException:
                self.pidpool._close_connection(connection)
                raise
        self.owned.permit, self.permit = self.permit, None

    def mark_inherited(self) -> None:
        """Note, in a child, that this entry is the parent's, and so is the memory where it counts."""
        self.inherited = True
        self.members = None
        self.slot = SCRATCH
        self.slot_number = self.out_since = 0
        self.watched = None

    def become_this_process_own(self) -> None:
        """Note, in a child, that it holds a connection of the child's own: its creator has forked."""
        self.inherited = False
        if self.members is not None:
            self.members.remove(self)
        self.counters = self.pool_events.counters
        self.slot_number, self.slot = self.counters.assign_slot(self)
        if self.owned is not None:
            write_connection(self.slot, self.owned.tag)

    def take_part_again(self) -> None:
        """Register the entry anew if it was collected in a cycle with its checkout, which resurrects it.

        Its weak references are gone then: no list would have it, and no child would find it.
        """
        if self.counters.has_slot(self):
            return
        if self.members is not None and self not in self.members:
            self.members.add(self, None)
        self.slot_number, self.slot = self.counters.assign_slot(self)
        owned = self.owned_now
        if owned is not None:
            owned.renew(self.dbapi_connection, self)
            write_connection(self.slot, owned.tag)

    def own(self, owned: OwnedConnection) -> None:
        """Note which connection the entry holds from now on."""
        self.owned = owned
        write_connection(self.slot, owned.tag)

    def own_none(self) -> None:
        """Note that the entry holds no connection any more."""
        write_connection(self.slot, None)

    @property
    def owned_now(self) -> OwnedConnection | None:
        """The connection that it holds at present; None while it holds none."""
        return None if self.dbapi_connection is None else self.owned

    @property
    def pidpool_tag(self) -> ConnectionTag | None:
        owned = self.owned_now
        return None if owned is None else owned.tag

    @property
    def pidpool(self) -> Any:
        """The pool."""
        return self._ConnectionRecord__pool  # type: ignore[attr-defined]

    @property
    def checked_out_at(self) -> str | None:
        """The line of the user's code that checked it out, known with `hold_warning` only."""
        return None if self.watched is None else self.watched.where

    def current_checkout(self) -> Checkout | None:
        """Return the checkout that holds it, or None if it is idle or the checkout was dropped."""
        reference = self.fairy_ref
        checkout: Any = None if reference is None else reference()
        # SQLAlchemy's own class, for a moment, if its own code makes the checkout.
        is_ours = hasattr(type(checkout), "held_connection")
        return cast(Checkout, checkout) if is_ours else None

    def mark_checked_out(self, checkout: Any) -> None:
        """Note which checkout holds it."""
        self.fairy_ref = weakref.ref(checkout)

    def undo_at_checkin_too(self, other: PidPoolEntry) -> None:
        """Take over what SQLAlchemy wants undone when the other's connection comes back."""
        self.finalize_callback.extend(other.finalize_callback)

    # -- SQLAlchemy's own, with a look first whether this is the process that it thinks

    @property
    def driver_connection(self) -> Any:  # type: ignore[override]  # as SQLAlchemy's own classes
        if fork_state[0] == FORKED:
            detection.notice_fork()
        return super().driver_connection

    def _ConnectionRecord__connect(self) -> None:
        # Every connect and reconnect of an entry passes here, its first-connect events included. A fork has
        # to wait for all of it: a dialect half initialised by another thread would stay so in the child.
        if self.permit is None:
            self.permit = self.pidpool.wait_for_permit()
        self.close_reason = "failed"
        started = time.perf_counter()
        try:
            took = detection.hold_forks_during(super()._ConnectionRecord__connect)  # type: ignore[misc]
        except BaseException as error:
            self.pool_events.connection_failed(error, time.perf_counter() - started)
            raise
        finally:
            self.close_reason = "recycled"
            if self.permit is not None:  # no connection was opened
                self.permit.give_back()
                self.permit = None
        if self.owned is not None:
            self.pool_events.connection_opened(self.owned.tag, took)
            unknown = unknown_driver(self.dbapi_connection)
            if unknown is not None:
                self.pool_events.driver_unknown(unknown, self.owned.tag)

    def _ConnectionRecord__close(self, *, terminate: bool = False) -> None:
        connection = self.dbapi_connection
        try:
            super()._ConnectionRecord__close(terminate=terminate)  # type: ignore[misc]
        except BaseException:
            # Interrupted, perhaps before the driver has closed it. SQLAlchemy 2.1 has forgotten it already,
            # and the traceback may keep it, in the frame of a listener.
            if connection is not None and self.dbapi_connection is None:
                self.pidpool.close_if_open(connection)
            raise

    def close(self) -> None:
        if self._let_go_if_inherited():
            return
        super().close()

    def invalidate(self, e: BaseException | None = None, soft: bool = False) -> None:
        if self._let_go_if_inherited():
            return
        tag = self.pidpool_tag
        if tag is not None:
            self.pool_events.connection_invalidated(tag, soft, e)
        if not soft:
            self.close_reason = "invalidated"
        try:
            super().invalidate(e, soft)
        finally:
            self.close_reason = "recycled"

    def checkin(self, _fairy_was_created: bool = True) -> None:
        if self._let_go_if_inherited():
            self.fairy_ref = None
            return
        # First: a checkout that has its entry ends it if it is interrupted. It must not be another's then.
        if self.owned is not None:
            self.owned.used_by = None
        checkout = self.current_checkout()
        if checkout is not None:
            checkout.entry = None
        try:
            super().checkin(_fairy_was_created)
        except BaseException as error:
            if self.fairy_ref is None and self.out_since:  # a listener has raised: it was not returned
                self.end(error)
            raise

    def _let_go_if_inherited(self) -> bool:
        if fork_state[0] == FORKED:
            detection.notice_fork()
        if not self.inherited:
            return False
        self.finalize_callback.clear()
        self.dbapi_connection = None
        return True


class JitteredEntry(PidPoolEntry):
    """An entry that recycles its connection some time before the pool's ``recycle`` seconds are over."""

    __slots__ = ("recycled_at",)

    recycled_at: float
    """Seconds since the epoch."""

    def _ConnectionRecord__connect(self) -> None:
        super()._ConnectionRecord__connect()
        pool = self.pidpool
        self.recycled_at = self.starttime + pool._recycle * (1 - pool.recycle_jitter * random.random())

    def get_connection(self) -> Any:
        if self.dbapi_connection is not None and time.time() > self.recycled_at:
            self._soft_invalidate_time = time.time()  # SQLAlchemy recycles it
        return super().get_connection()
