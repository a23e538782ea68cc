"""`PidPool`: SQLAlchemy's QueuePool, for processes that fork.

In the order in which one reads it: the options, the doors through which an application comes, what the pool
counts, and what becomes of it in a forked child.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Iterator
from contextvars import copy_context
from typing import Any

from sqlalchemy import exc
from sqlalchemy.pool import PoolProxiedConnection

from pidpool._sqlalchemy.address import address_of
from pidpool._sqlalchemy.checked_out import CheckedOutConnection, check_out
from pidpool._sqlalchemy.entry import PidPoolEntry
from pidpool._sqlalchemy.idle_closing import ClosingQueuePool
from pidpool._sqlalchemy.interrupted import let_go_of_frames
from pidpool.drivers import Driver, Settings
from pidpool.errors import ForeignCheckoutError
from pidpool.events import overdue
from pidpool.events.pool_events import PoolEvents, held_back
from pidpool.events.user_code import calling_line
from pidpool.events.watched_checkout import WatchedCheckout
from pidpool.forks import detection, openssl, takeover
from pidpool.forks.detection import SETTLED, fork_state
from pidpool.forks.openssl import guarded_threads
from pidpool.forks.takeover import Takeover
from pidpool.options.checks import check_choice, check_number
from pidpool.stats import holders, robust_lock
from pidpool.stats.family import Family
from pidpool.stats.family_memory import check_name as check_family_name
from pidpool.stats.snapshots import FamilyStats, PoolStats
from pidpool.tag import ConnectionTag
from pidpool.terms import INHERITED_SOCKETS, ON_FOREIGN, InheritedSockets, OnForeign, StateAtFork


class PidPool(ClosingQueuePool):
    """A `sqlalchemy.pool.QueuePool` whose connections survive a fork of the process.

    Use it as ``create_engine(url, poolclass=PidPool)``; every option is a plain keyword of
    `create_engine`. In the process that opened them connections behave as a QueuePool's. A forked
    child disowns all connections it inherits: nothing it does with them reaches the server, and the
    parent can't tell that the child existed. The child's pool starts from zero, with locks of its
    own, and opens connections of its own.

    Threads: as QueuePool, any number may use the pool at once. A fork waits for connections that other
    threads are opening, `pidpool.forks.gate.CONNECT_WAIT` seconds at most.

    :param creator: as QueuePool's; so are ``pool_size``, ``max_overflow``, ``timeout`` (seconds),
        ``use_lifo``, ``recycle`` (seconds) and all further options.
    :param on_foreign: what a child does that uses an inherited connection. ``"replace"``: it gets
        one of its own, unless a transaction was open at the fork: then the use raises
        `ForeignConnectionError` through SQLAlchemy's own disconnect path. ``"refuse"``: every use
        raises, and so does a checkout if the pool had idle connections, until ``engine.dispose()``.
    :param inherited_sockets: ``"sever"`` replaces the child's descriptor of each inherited socket by
        a dead one, so that the server's session ends with its owner. ``"keep"`` leaves descriptors
        alone, but for connections in the middle of a driver's call or with a streamed result: a child that
        unwinds the call, or fetches, would otherwise do so on the socket of its parent.
    :param hold_warning: seconds; a checkout that lasts longer logs ``checkout.overdue`` once, with the
        line of code that made it, and ``checkout.returned_late`` when it ends. None: no such watch,
        at no cost. Otherwise a daemon thread watches, started with the first checkout.
    :param family: a name. All processes of this user on this host that make a pool with the same name are one
        family: their stats are shown together, however they were started. None: a family is the process
        that made the pool and all that are forked from it. Its memory is found by a file in
        ``PIDPOOL_FAMILY_DIR``, ``/dev/shm`` or `tempfile.gettempdir`. If it can't be shared, the event
        ``family.private`` says why.
    :param family_limit: how many connections all processes of the family may have open, or be opening, at a
        time. A checkout that needs a new one waits up to `timeout` seconds until the family has fewer. Needs
        robust mutexes (Linux). While a process wants a connection and there is none left for it, others close
        connections that they don't use, or have beyond their share. A daemon thread closes those of a process
        that does nothing; it sleeps until another process wants one. None: no limit, and no thread.
    :param max_idle: seconds after which an idle connection is closed, the last one too. None: never, and no
        thread looks for them.
    :param recycle_jitter: 0 to 1: by which share of ``recycle`` a connection may be recycled earlier. Each
        has a random part of it, so that connections made together do not end together.
    :param logger: a structlog or stdlib logger for the pool's events. None: structlog's own or, if
        structlog is not configured, ``logging.getLogger("pidpool")``.
    :raises ValueError: if an option has a value that it does not take.
    :raises TypeError: if an option has a value of the wrong type.
    :raises PermissionError: if the family's file is not this user's own.
    :raises OSError: if there is a `family_limit`, and the system has no memory to share.
    """

    on_foreign: OnForeign
    hold_warning: float | None

    def __init__(
        self,
        creator: Any,
        pool_size: int = 5,
        max_overflow: int = 10,
        timeout: float | None = 30.0,
        use_lifo: bool = False,
        on_foreign: OnForeign = "replace",
        inherited_sockets: InheritedSockets = "sever",
        hold_warning: float | None = None,
        family: str | None = None,
        family_limit: int | None = None,
        max_idle: float | None = None,
        recycle_jitter: float = 0.0,
        logger: Any = None,
        **options: Any,
    ) -> None:
        check_choice("on_foreign", on_foreign, ON_FOREIGN)
        check_choice("inherited_sockets", inherited_sockets, INHERITED_SOCKETS)
        check_number("pool_size", pool_size, 0, whole=True, remedy="0 for no limit")
        check_number("max_overflow", max_overflow, whole=True, remedy="a negative one for no limit")
        if timeout is not None:
            remedy = "in seconds (create_engine calls it pool_timeout), or None to wait without bound"
            check_number("timeout", timeout, 0, remedy=remedy)
        remedy = "in seconds, -1 for never (create_engine calls it pool_recycle)"
        check_number("recycle", options.get("recycle", -1), -1, remedy=remedy)
        if hold_warning is not None:
            check_number("hold_warning", hold_warning, 0, remedy="in seconds, or None for no warnings")
        if family is not None:
            check_family_name(family)
        if family_limit is not None:
            remedy = "connections of all processes together, or None for no limit"
            check_number("family_limit", family_limit, 1, whole=True, remedy=remedy)
            if not robust_lock.IS_THERE:
                raise ValueError(
                    f"family_limit={family_limit!r}: needs robust mutexes, which Linux has; take None"
                )
        if max_idle is not None:
            check_number("max_idle", max_idle, 0, remedy="in seconds, or None to keep idle connections")
        remedy = "at most 1: the share of pool_recycle by which a connection may be recycled earlier"
        check_number("recycle_jitter", recycle_jitter, 0, remedy=remedy)
        if recycle_jitter > 1:
            raise ValueError(f"recycle_jitter={recycle_jitter!r}: takes a number of 0 or more, {remedy}")
        if logger is not None and not callable(getattr(logger, "warning", None)):
            raise TypeError(f"logger={logger!r}: takes a structlog logger, or None for structlog's own")
        self.on_foreign = on_foreign
        self.inherited_sockets = inherited_sockets
        self.hold_warning = hold_warning
        self.max_idle = max_idle
        self.recycle_jitter = recycle_jitter
        self._refusal: _Refusal | None = None
        unlimited = pool_size == 0 or max_overflow < 0
        # Of the pool that this one is recreated from.
        events: PoolEvents | None = options.pop("_pool_events", None)
        self.pool_events = events or PoolEvents(
            options.get("logging_name"),
            logger,
            Family(pool_size, -1 if unlimited else max_overflow, hold_warning, family, family_limit),
            detection.mark_unreported,
            address_of(creator),
        )
        if fork_state[0] != SETTLED:
            detection.settle()
        super().__init__(
            creator,
            pool_size=pool_size,
            max_overflow=max(-1, max_overflow),  # to QueuePool only -1 is no limit
            timeout=timeout,
            use_lifo=use_lifo,
            **options,
        )
        budget = self.pool_events.budget
        self.waits_in_turns = budget is not None or max_idle is not None
        self.wanted = None if budget is None else budget.wanted
        takeover.add_pool(self)
        shared = self.pool_events.family
        if (shared.name or shared.private) is not None and events is None:
            with held_back():  # structlog may be configured after the engine is made
                self.pool_events.report_family()

    # -- the doors

    def connect(self) -> PoolProxiedConnection:
        """Check a connection out, as `Pool.connect`; in a child always one of the child's own.

        :raises ForeignConnectionError: in a child under ``on_foreign="refuse"``.
        :raises sqlalchemy.exc.TimeoutError: if none was free for `timeout` seconds.
        """
        if fork_state[0] != SETTLED:
            detection.settle()
        if self._refusal is not None:
            self._refuse_checkout(self._refusal)
        thread = threading.get_ident()
        if thread not in guarded_threads:
            openssl.guard_thread(thread)
        started = time.perf_counter_ns()
        # No local variable has the checkout: the frame of an interrupted call lives on in the traceback.
        try:
            return check_out(self, started, thread)
        except BaseException as error:
            let_go_of_frames(error)
            if isinstance(error, exc.TimeoutError):
                self._report_timeout(error, (time.perf_counter_ns() - started) / 1e9)
            raise

    def _report_timeout(self, error: exc.TimeoutError, waited: float) -> None:
        """Count and log a checkout that found no connection; name what keeps the connections."""
        family = self.pool_events.family.read(self.pool_events.pool)
        tagged = ((each.pidpool_tag, each.checked_out_at) for each in self.records())
        lines = {tag.connection_id: line for tag, line in tagged if tag is not None}
        held_longest = holders.longest(family, lines)
        if self.pool_events.family.name is not None or family.limit is not None:
            named = f"; held longest: {held_longest}" if held_longest else ""
            error.args = (f"{error.args[0]}; the family has {holders.state(family)}{named}", *error.args[1:])
        self.pool_events.checkout_timed_out(
            waited, self.size(), self.overflow(), self.checkedout(), family, held_longest
        )

    def watch(self, entry: PidPoolEntry, waited: float, now: float, is_logged: bool) -> None:
        """Log a checkout, and keep what is to be logged of its end."""
        tag = entry.pidpool_tag
        is_logged = is_logged and tag is not None
        watched = entry.watched = WatchedCheckout(now, is_logged=is_logged)
        if is_logged and tag is not None:
            self.pool_events.connection_checked_out(tag, waited)
        if self.hold_warning is not None:
            watched.watch_duration(self.hold_warning, calling_line(), copy_context())
            overdue.watch(watched.due_at, _watched_entries)

    def dispose(self) -> None:
        """Close the idle connections that this process owns, as `QueuePool.dispose`."""
        if fork_state[0] != SETTLED:
            detection.settle()
        checked_out = max(0, self.checkedout())
        # Logged at the end: a log handler that uses this pool would open what is to be closed.
        try:
            with held_back():
                closed = self.close_idle()
        except BaseException as error:
            let_go_of_frames(error)
            raise
        # A child that disposes starts afresh, also if it keeps this pool instead of the new one.
        self._refusal = None
        self.logger.info("Pool disposed. %s", self.status())
        self.pool_events.log_waiting()
        self.pool_events.pool_disposed(closed, checked_out)

    def recreate(self) -> PidPool:
        """Return a new pool with the same options and the same name in events."""
        if fork_state[0] != SETTLED:
            detection.settle()
        self.logger.info("Pool recreating")
        return self.__class__(
            on_foreign=self.on_foreign,
            inherited_sockets=self.inherited_sockets,
            hold_warning=self.hold_warning,
            family=self.pool_events.family.name,
            family_limit=self.pool_events.family.limit,
            max_idle=self.max_idle,
            recycle_jitter=self.recycle_jitter,
            _pool_events=self.pool_events,
            **self.constructor_options(),
        )

    # -- its state and its counters

    def status(self) -> str:
        """Describe the pool's state in this process, as `QueuePool.status`."""
        if fork_state[0] != SETTLED:
            detection.settle()
        return super().status()

    def checkedin(self) -> int:
        """Return how many connections of this process are idle."""
        if fork_state[0] != SETTLED:
            detection.settle()
        return super().checkedin()

    def checkedout(self) -> int:
        """Return how many connections of this process are checked out."""
        if fork_state[0] != SETTLED:
            detection.settle()
        return super().checkedout()

    def overflow(self) -> int:
        """Return the current overflow in this process, as `QueuePool.overflow`."""
        if fork_state[0] != SETTLED:
            detection.settle()
        return super().overflow()

    def stats(self) -> PoolStats:
        """Return a snapshot of what this process's pool counts and measures.

        Takes no lock and sends nothing; any thread may call it. Counts are exact. After a fork they
        start from zero, as the pool does; ``engine.dispose()`` goes on with them.
        """
        if fork_state[0] != SETTLED:
            detection.settle()
        self.make_good()
        return self.pool_events.family.read_own(self.pool_events.counters, self.pool_events.pool)

    def family_stats(self) -> FamilyStats:
        """Return a snapshot of this pool in all processes of its family.

        Those are the process that made it and all forked from it, and under a `family` all that named it.

        Read from memory that they share: it asks no other process and waits for none. Processes that have
        ended or were killed are in it with what they had counted.
        """
        if fork_state[0] != SETTLED:
            detection.settle()
        self.make_good()
        self.pool_events.counters.make_good()
        return self.pool_events.family.read(self.pool_events.pool)

    def records(self) -> list[PidPoolEntry]:
        """Return this process's pool entries, idle or checked out, in no order."""
        entries: Any = self.pool_events.counters.entries()
        return entries  # type: ignore[no-any-return]  # not cast(), which costs a forked child two pages

    # -- at a fork

    def start_from_zero(self, takeover: Takeover) -> None:
        """Replace everything that another thread may have held at the fork; may run in the at-fork hook."""
        fork = takeover.fork
        for entry in self.records():
            entry.mark_inherited()
        self.forget_entries(was_alone=fork.is_alone)
        self.pool_events.begin_anew(fork.parent_pid, fork.trigger)
        if self.on_foreign == "refuse":
            idle = takeover.open_connections().idle
            if idle:
                self._refusal = _Refusal(fork.parent_pid, idle)

    def log_takeover_later(self, takeover: Takeover) -> None:
        """Count the takeover of this pool and its predecessors, and have it logged at the next use."""
        states, severed = [], 0
        for _, state, action, _ in takeover.connections:
            states.append(state)
            severed += action == "severed"
        self.pool_events.counters.add_inherited(states, severed)
        has_warning = takeover.fork.connects_in_flight or states.count("idle") < len(states)
        level = logging.WARNING if has_warning else logging.INFO
        self.pool_events.log_later(_log_takeover, self.pool_events, takeover, level)

    def log_waiting_events(self, until: float = math.inf) -> None:
        """Log the events that could not be logged when they happened; none after `until`."""
        self.pool_events.log_waiting(until)

    def replace_inherited(
        self, checkout: CheckedOutConnection, tag: ConnectionTag, driver: Driver, settings: Settings
    ) -> Any:
        """Let a checkout of an inherited connection go on with one of this process's own."""
        other: Any = None
        try:
            other = self.connect()
            if checkout.is_detached:
                other.detach()
            driver.apply(other.dbapi_connection, settings)
            own_tag = other.pidpool_tag
            checkout.go_on_with(other)
        except BaseException as error:
            if other is not None:
                other.close()
                other = None
                let_go_of_frames(error)
            raise
        self.pool_events.connection_replaced(tag, own_tag)
        return checkout.dbapi_connection

    def report_refused(self, tag: ConnectionTag, state: StateAtFork) -> None:
        """Count and log that a use of an inherited connection was refused."""
        self.pool_events.connection_refused(tag, state)

    def _refuse_checkout(self, refusal: _Refusal) -> None:
        pid = os.getpid()
        if not refusal.is_reported:
            refusal.is_reported = True
            self.pool_events.connection_refused(None, "idle")
        raise ForeignCheckoutError(
            f"the {refusal.idle} idle connection(s) of this pool belong to pid {refusal.owner_pid} and "
            f"on_foreign='refuse' lets pid {pid} check out none; call engine.dispose() in pid {pid} first",
            owner_pid=refusal.owner_pid,
            pid=pid,
            state="idle",
        )


class _Refusal:
    """Why a child's checkouts are refused."""

    def __init__(self, owner_pid: int, idle: int) -> None:
        self.owner_pid = owner_pid
        self.idle = idle
        self.is_reported = False


def _log_takeover(events: PoolEvents, takeover: Takeover, level: int) -> None:
    # Not a method of the pool: what waits in a process when it forks is kept in the child for good, and must
    # not keep a pool (tests/forks/test_grandchildren.py::test_a_pool_that_a_grandchild_disposed_of_goes).
    if not events.is_enabled(level):
        return  # to make events that nothing takes costs a child dozens of pages
    fork, connections = takeover.fork, takeover.open_connections()
    # Without a hook the line that runs now is another one, and the line of an earlier fork may be there.
    is_known = fork.trigger == "hook" and takeover.connections
    forked_at = events.forked_at if is_known else None
    events.pool_adopted(
        fork.at,
        fork.parent_pid,
        fork.trigger,
        connections.idle,
        connections.checked_out,
        connections.in_transaction,
        fork.connects_in_flight,
        forked_at,
    )
    for tag, state, action, where in takeover.connections:
        events.connection_inherited(fork.at, tag, state, action, where, forked_at)


def _watched_entries() -> Iterator[PidPoolEntry]:
    for pool in takeover.pools():
        if pool.hold_warning is not None:
            yield from pool.records()


detection.register_child_callback(lambda fork: overdue.forget_thread())
