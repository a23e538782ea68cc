"""`HookedQueuePool`: the hooks that SQLAlchemy's QueuePool has for its own subclasses, under names that they
keep. `PidPool` builds on it and names nothing that is private to SQLAlchemy.
"""

from __future__ import annotations

import time
from typing import Any, cast

from sqlalchemy import exc
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool
from sqlalchemy.util import queue as sqlalchemy_queue

from pidpool._sqlalchemy.checked_out import CheckedOutConnection
from pidpool._sqlalchemy.entry import ForkedWhileOpening, JitteredEntry, PidPoolEntry
from pidpool._sqlalchemy.entry_list import EntryList, take_lost
from pidpool._sqlalchemy.first_connect import renew_first_connect
from pidpool._sqlalchemy.idle_queue import IdleQueue
from pidpool._sqlalchemy.wait import Wait
from pidpool.events.pool_events import PoolEvents
from pidpool.forks import detection, severing
from pidpool.forks.detection import FORKED, fork_state
from pidpool.forks.ownership import OwnedConnection, owned_connections
from pidpool.forks.stand_in import DisownedConnection
from pidpool.stats.budget import POLL, Permit
from pidpool.stats.process_counters import IN_STATE_SINCE, LAST_BUCKET, THREAD, USE, USE_SUM
from pidpool.terms import CloseReason, InheritedSockets


class HookedQueuePool(QueuePool):
    """A QueuePool with entries and checkouts of pidpool's.

    A subclass sets `pool_events` and `inherited_sockets` before it calls this ``__init__``.
    """

    # SQLAlchemy's own lines stay below its own loggers: `pidpool` is for events alone, and SQLAlchemy's
    # DEBUG lines show the driver's repr of a connection, DSN included.
    _sqla_logger_namespace = "sqlalchemy.pool.impl.PidPool"

    # Not in the instance's dict, which SQLAlchemy's own tests compare with that of a recreated pool.
    __slots__ = ("members", "has_left_some_out")

    _queue_class: Any = IdleQueue

    pool_events: PoolEvents
    inherited_sockets: InheritedSockets

    recycle_jitter: float = 0.0
    """The share of ``recycle`` by which a connection may be recycled earlier."""
    waits_in_turns = False
    """Whether a wait for a connection may end without one coming back."""
    streams_by_any_cursor = False
    """Whether its driver's results may be streamed by any cursor; known once a connection is open."""
    wanted: memoryview | None = None
    """A cell that is not 0 if a thread of the family may want a permit; None without a limit."""

    members: EntryList
    """The pool's entries, idle or not: all that the pool has of its capacity."""
    has_left_some_out: bool
    """Whether entries were checked out when it was disposed of, which are none of its `members` any more."""

    def __init__(self, creator: Any, **options: Any) -> None:
        self.members = EntryList()
        self.has_left_some_out = False
        super().__init__(creator, **options)
        self._inherited_queue: Any = None

    # SQLAlchemy counts here by hand, from minus `pool_size` on. An interrupt makes no number wrong that is
    # reckoned at each question.
    @property
    def _overflow(self) -> int:
        self.make_good()
        return len(self.members) - self._pool.maxsize

    @_overflow.setter
    def _overflow(self, value: int) -> None: ...

    @property
    def _limit(self) -> int | None:
        """How many entries there may be; None for no limit."""
        return None if self._max_overflow < 0 else self._pool.maxsize + self._max_overflow

    # -- what a subclass has of it

    @property
    def engine_dialect(self) -> Any:
        """The dialect of the engine; one without a driver if the pool has no engine."""
        return self._dialect

    def connections_in_queue(self) -> int | None:
        """Return how many entries are idle; None if some may be checked out. Looks at no entry.

        Called before each fork, so it calls nothing that costs pages.
        """
        queued = len(self._pool.queue)  # type: ignore[attr-defined]
        return queued if queued == len(self.members.references) and not self.has_left_some_out else None

    def constructor_options(self) -> dict[str, Any]:
        """Return the options of QueuePool with which this pool was made, for `recreate`."""
        return {
            "creator": self._creator,
            "pool_size": self._pool.maxsize,
            "max_overflow": self._max_overflow,
            "timeout": self._timeout,
            "use_lifo": self._pool.use_lifo,
            "pre_ping": self._pre_ping,
            "recycle": self._recycle,
            "echo": self.echo,
            "logging_name": self._orig_logging_name,
            "reset_on_return": self._reset_on_return,
            "_dispatch": self.dispatch,
            "dialect": self._dialect,
        }

    def close_idle(self) -> int:
        """Close the connections in the pool and begin to count anew; return how many were closed."""
        closed = 0
        while True:
            try:
                entry = cast(PidPoolEntry, self._pool.get(False))
            except sqlalchemy_queue.Empty:
                break
            closed += entry.dbapi_connection is not None
            entry.close_reason = "disposed"
            try:
                entry.close()
            finally:
                entry.leave()
        self.has_left_some_out = len(self.members) > 0
        self.members = EntryList()
        return closed

    def forget_entries(self, *, was_alone: bool) -> None:
        """Start with an empty queue and locks of this process's own, in a child; takes no lock.

        :param was_alone: whether the parent had no other thread: then locks are as this thread left them,
            and go on.
        """
        self.members = EntryList()
        self.has_left_some_out = False
        # Kept as long as the pool, since to destroy what it holds costs more.
        inherited: Any = self._pool
        self._inherited_queue = inherited
        self._pool = self._queue_class(inherited.maxsize, use_lifo=inherited.use_lifo)
        inherited.abandon()
        # SQLAlchemy makes it at the first use: it is not there if nothing has connected or listened yet.
        if not was_alone and "dispatch" in self.__dict__:
            renew_first_connect(self.dispatch)

    # -- opening and closing

    def _should_wrap_creator(self, creator: Any) -> Any:
        create = super()._should_wrap_creator(creator)
        return lambda entry: entry.open(create)

    def _create_connection(self, permit: Permit | None = None) -> ConnectionPoolEntry:
        entry = self._open_entry(permit)
        if entry is None:
            raise self._timed_out()
        return entry

    def _open_entry(self, permit: Permit | None) -> PidPoolEntry | None:
        """Make an entry with a connection; None if there is no room for one more."""
        is_jittered = self.recycle_jitter and self._recycle > -1
        entry = (JitteredEntry if is_jittered else PidPoolEntry)(self, False, permit)
        if not self.members.add(entry, self._limit):
            return None
        try:
            entry.connect()
        except ForkedWhileOpening as forked:
            forked.__traceback__ = None  # a cycle that SQLAlchemy makes keeps the frames, and what they have
            return None
        except BaseException:
            entry.leave()
            raise
        if fork_state[0] == FORKED:
            detection.notice_fork()
        if entry.counters is not self.pool_events.counters and not self.takes(entry):
            return None  # this is the child, forked in the lines above: the connection is its parent's
        return entry

    def _close_connection(self, connection: Any, *, terminate: bool = False) -> None:
        if fork_state[0] == FORKED:
            detection.notice_fork()
        if isinstance(connection, DisownedConnection) or severing.is_disowned(connection):
            return
        owned = owned_connections.get(id(connection))
        if owned is None:
            super()._close_connection(connection, terminate=terminate)
            return
        try:
            super()._close_connection(connection, terminate=terminate)
        except BaseException:
            # Perhaps before the driver has closed it. Nothing refers to it any more but, maybe, a traceback.
            if not self._dialect.is_async and owned.is_of_this_process():
                super()._close_connection(connection, terminate=True)
            raise
        finally:
            # Afterwards: if a signal handler forks meanwhile, the child finds the connection, and severs it.
            if owned.is_of_this_process():
                owned.give_back_permit()
                owned.let_go()  # then: `close_if_open` finds it, if an interrupt comes before
                self.note_closed(owned)  # also if a task was cancelled here: it is closed, or dropped

    def close_if_open(self, connection: Any) -> None:
        """Close a connection of this process's whose closing was interrupted before it began."""
        owned = owned_connections.get(id(connection))
        if owned is not None and owned.is_of_this_process() and not self._dialect.is_async:
            self._close_connection(connection, terminate=True)

    def note_closed(self, owned: OwnedConnection) -> None:
        """Count and log once that a connection was closed, or dropped."""
        if owned.is_counted_closed:
            return
        owned.is_counted_closed = True
        entry = cast("PidPoolEntry | None", owned.entry())
        reason: CloseReason = "detached"
        if owned.detached is None:
            reason = "collected" if entry is None else entry.close_reason
            if entry is not None and entry.owned is owned:
                entry.own_none()
        self.pool_events.connection_closed(owned.tag, reason)

    # -- taking and returning an entry

    def _do_get(self) -> ConnectionPoolEntry:
        try:
            return self._pool.get(False)
        except sqlalchemy_queue.Empty:
            pass
        return self._open_or_wait()

    def _open_or_wait(self) -> ConnectionPoolEntry:
        """Open a connection as soon as there is room for one, or get one that comes back meanwhile."""
        if self.pool_events.budget is None and self._has_room():  # as a rule nothing has to be waited for
            opened = self._open_entry(None)
            if opened is not None:
                return opened
        wait = Wait(self.pool_events, self._timeout)
        while True:
            idle: Any = self._pool  # another one if this is a child, forked in the lines below
            while self._has_room():
                budget = self.pool_events.budget
                permit = wait.take_permit(budget, self.make_good)
                if permit is None and budget is not None:
                    break
                entry = self._open_entry(permit)
                if entry is not None:
                    return entry
            left = wait.left()
            if left <= 0:
                reason = wait.reason
                del wait  # it counts no more, however long the error's traceback is kept
                raise self._timed_out(reason)
            if self.waits_in_turns:
                left = min(left, POLL)
            try:
                return cast(ConnectionPoolEntry, idle.get(True, left, wait.since, self._has_room_again))
            except sqlalchemy_queue.Empty:
                pass

    def _has_room(self) -> bool:
        limit = self._limit
        if limit is None or len(self.members) < limit:
            return True
        self.make_good()
        return len(self.members) < limit

    def make_good(self) -> None:
        """Close what interrupted operations have lost, so that its place is free, and its permit."""
        self.members.forget_collected()
        # Those too that were checked out of this pool or a predecessor when it was disposed of.
        entries: Any = self.pool_events.counters.entries()
        for entry in take_lost(entries):
            cast(PidPoolEntry, entry).end(None)
        for owned in list(owned_connections.values()):
            if owned.is_lost_by(self.pool_events):  # a cursor may keep it, in a cycle that an error has made
                self.close_if_open(owned.connection())
        if self.pool_events.budget is not None:
            self.pool_events.budget.settle()

    def _has_room_again(self) -> bool:
        """Return whether a waiting thread may open a connection: one was lost or closed, not returned."""
        return not self.waits_in_turns and self._has_room()

    def _timed_out(self, reason: str | None = None) -> exc.TimeoutError:
        timeout = "" if self._timeout is None else f", timeout {self._timeout:0.2f}"
        reason = reason or f"QueuePool limit of size {self.size()} overflow {self.overflow()} reached"
        return exc.TimeoutError(f"{reason}, connection timed out{timeout}", code="3o7r")

    def wait_for_permit(self) -> Permit | None:
        """Return a permit for a connection that an entry is to open anew; None if the family has no limit.

        :raises sqlalchemy.exc.TimeoutError: if there was none in time.
        """
        if self.pool_events.budget is None:
            return None
        wait = Wait(self.pool_events, self._timeout)
        while True:
            budget = self.pool_events.budget
            permit = wait.take_permit(budget, self.make_good)
            if permit is not None or budget is None:
                return permit
            left = wait.left()
            if left <= 0:
                reason = wait.reason
                del wait  # it counts no more, however long the error's traceback is kept
                raise self._timed_out(reason)
            try:
                self.close_entry(cast(Any, self._pool.get(False)), "given back")
            except sqlalchemy_queue.Empty:
                self.pause(min(left, POLL))

    def pause(self, seconds: float) -> None:
        """Let other threads go on."""
        time.sleep(seconds)

    def start_idle_thread(self) -> None:
        """Start what looks after idle connections, if anything does."""

    def is_to_be_given_back(self) -> bool:
        """Return whether a connection that comes back is to be closed, since another process wants one."""
        return False

    def close_entry(self, entry: PidPoolEntry, reason: CloseReason) -> None:
        """Close an entry that was taken out of the pool, in the place of returning it."""
        tag = entry.pidpool_tag
        idle = max(0, time.perf_counter_ns() - entry.slot[IN_STATE_SINCE]) / 1e9
        entry.close_reason = reason
        try:
            entry.close()
        finally:
            entry.leave()
        if tag is not None and reason == "given back":
            self.pool_events.connection_given_back(tag, idle)

    def takes(self, entry: PidPoolEntry) -> bool:
        """Return whether an entry is the pool's.

        One that was checked out when the pool was disposed of becomes the pool's again, if there is room. So
        does one whose creator has forked, with the connection that it opened in the child.
        Another process's entry never is, nor is one that has left the pool.
        """
        if entry.counters is not self.pool_events.counters:
            if owned_connections.get(id(entry.dbapi_connection)) is not entry.owned:
                return False
            entry.become_this_process_own()
        elif entry.members is None:
            return False
        if entry.members is self.members or self.members.add(entry, self._limit):
            return True
        self.close_entry(entry, "overflow")
        return False

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        entry: Any = record  # not cast(): these lines run with every checkin
        if entry.watched is not None and not entry.inherited:
            entry.watched.log_return(entry)
            entry.watched = None
        now = time.perf_counter_ns()
        used = now - entry.out_since
        bucket = (used >> 10).bit_length()
        # After the last call, which a signal handler may follow that forks: no count is another process's.
        if fork_state[0] == FORKED:
            detection.notice_fork()
        if entry.members is not self.members and not self.takes(entry):
            return
        if entry.out_since:
            entry.out_since = 0
            slot = entry.slot
            slot[USE + (bucket if bucket < LAST_BUCKET else LAST_BUCKET)] += 1
            slot[USE_SUM] += used
            slot[IN_STATE_SINCE] = now
            slot[THREAD] = 0
        if self.wanted is not None and self.wanted[0] and self.is_to_be_given_back():
            self.close_entry(entry, "given back")
            return
        beyond = self._pool.keep(entry)  # type: ignore[attr-defined]
        if beyond is not None:
            self.close_entry(beyond, "overflow")

    def _invalidate(
        self, connection: Any, exception: BaseException | None = None, _checkin: bool = True
    ) -> None:
        if isinstance(connection, CheckedOutConnection) and connection.is_disowned():
            # One inherited connection says nothing of the child's own: they stay.
            if _checkin:
                connection.invalidate(exception)
            return
        super()._invalidate(connection, exception, _checkin)
