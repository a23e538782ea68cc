"""How a forked child takes over: once in each child, before anything else is done with a pool, it disowns all
inherited connections, and all its pools start from zero.

It runs at the first door that notices the fork. The at-fork hook, if there is one, only severs the sockets
and keeps alive what the child inherited: every memory page that a child writes to is copied. If the hook
can't sever all, it takes over at once. So nothing here may block, log, raise or send anything. The events
wait for the first use of each pool.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from pidpool.forks import at_exit, detection, ownership, severing
from pidpool.forks.detection import NoticedFork
from pidpool.forks.ownership import (
    Checkout,
    Entry,
    OwnedConnection,
    detached_connections,
    owned_connections,
)
from pidpool.forks.stand_in import (
    DisownedConnection,
    Inheritance,
    ReplacingPool,
    is_busy,
    transaction_state,
)
from pidpool.stats.process_counters import FORKS, ProcessCounters
from pidpool.tag import ConnectionTag
from pidpool.terms import SocketAction, StateAtFork


class Lineage(Protocol):
    """What a pool shares with the successors that ``recreate()`` made of it. All of it may be called inside
    an at-fork hook."""

    counters: ProcessCounters

    def log_fork_later(self, at: float, idle: int, checked_out: int, in_transaction: int) -> None:
        """Have it logged in the parent that a child was forked with so many connections open."""

    def look_up_fork(self) -> None:
        """Look up, in the child's at-fork hook, the line that forked."""


class ForkablePool(ReplacingPool, Protocol):
    """A pool, as far as a fork concerns it. All of it may be called inside an at-fork hook but the last."""

    @property
    def pool_events(self) -> Lineage: ...

    def connections_in_queue(self) -> int | None:
        """Return how many connections are idle; None if some are checked out."""

    def start_from_zero(self, takeover: Takeover) -> None:
        """Replace in the child everything that another thread may have held at the fork."""

    def log_takeover_later(self, takeover: Takeover) -> None:
        """Have what the child found in a pool and its predecessors logged at its next use."""

    def log_waiting_events(self, until: float) -> None: ...


_pools: dict[int, weakref.ref[ForkablePool]] = {}


def add_pool(pool: ForkablePool) -> None:
    """Have a pool taken over in every child that is forked from now on, as long as it lives."""
    key = id(pool)
    _pools[key] = weakref.ref(pool, lambda reference: _forget_pool(key, reference))


def _forget_pool(key: int, reference: weakref.ref[ForkablePool]) -> None:
    if _pools.get(key) is reference:
        del _pools[key]


def pools() -> list[Any]:
    """Return every pool of this process that is alive."""
    # Copied in one step of C's: other threads make and drop engines meanwhile. A WeakSet's copy is a loop
    # of Python's (tests/forks/test_takeover.py::test_engines_come_and_go_in_other_threads_while_one_forks).
    found = []
    for reference in list(_pools.values()):
        pool = reference()
        if pool is not None:
            found.append(pool)
    return found


class OpenConnections:
    """How many connections were open at a fork."""

    def __init__(self) -> None:
        self.idle = 0
        self.checked_out = 0
        self.in_transaction = 0

    def add(self, state: StateAtFork) -> None:
        """Count one connection."""
        self.idle += state == "idle"
        self.checked_out += state != "idle"
        self.in_transaction += state == "in transaction"


InheritedConnection = tuple[ConnectionTag, StateAtFork, SocketAction, "str | None"]
"""One connection that a child inherited, and the line that had checked it out, if known. Not a class, whose
functions would cost a child their pages."""


class Takeover:
    """What a child found when it took a pool over."""

    __slots__ = ("fork", "connections")

    def __init__(self, fork: NoticedFork) -> None:
        self.fork = fork
        self.connections: list[InheritedConnection] = []

    def open_connections(self) -> OpenConnections:
        """Count the connections."""
        counted = OpenConnections()
        for _, state, _, _ in self.connections:
            counted.add(state)
        return counted


def _holders(owned: OwnedConnection) -> tuple[Entry | None, Checkout | None, ForkablePool | None]:
    """Return what refers to a connection that is open at a fork: entry, checkout and pool."""
    if owned.detached is not None:
        # Its entry has gone back to the pool, and may hold another connection already.
        checkout = owned.detached()
        return None, checkout, None if checkout is None else checkout.pidpool
    entry = owned.entry()
    if entry is None:
        return None, None, None
    return entry, entry.current_checkout() if entry.in_use else None, entry.pidpool


def _state(connection: Any, entry: Entry | None) -> StateAtFork:
    return "idle" if entry is not None and not entry.in_use else transaction_state(connection)


def _note_fork(at: float) -> None:
    # Runs in the parent at every fork, so it calls little and touches few objects: each of their pages is
    # copied. As a rule all connections are idle, and none has to be looked at.
    idle: dict[Lineage, int] = {}
    left = has_any = len(owned_connections)
    must_look = bool(detached_connections)
    for reference in list(_pools.values()):
        pool = reference()
        if pool is None:
            continue
        lineage = pool.pool_events
        if lineage not in idle:
            lineage.counters.cells[FORKS] += 1
            idle[lineage] = 0
        if has_any and not must_look:  # all pools: an entry without a connection counts as one
            queued = pool.connections_in_queue()
            if queued is None:
                must_look = True
            else:
                idle[lineage] += queued
                left -= queued
    if left or must_look:  # also for an entry without a connection, or a connection that no pool has
        _look_and_log_fork(at)
        return
    for lineage, number in idle.items():
        if number:
            lineage.log_fork_later(at, number, 0, 0)


def _look_and_log_fork(at: float) -> None:
    open_connections: dict[Lineage, OpenConnections] = {}
    for owned in list(owned_connections.values()):
        connection = owned.connection()
        entry, _, pool = _holders(owned)
        if connection is not None and pool is not None:
            counted = open_connections.setdefault(pool.pool_events, OpenConnections())
            counted.add(_state(connection, entry))
    for lineage, counted in open_connections.items():
        lineage.log_fork_later(at, counted.idle, counted.checked_out, counted.in_transaction)


def _sever_at_once(is_alone: bool) -> bool:
    """Do in the child's at-fork hook what can't wait; return whether the rest can.

    The server's sessions must end with their owner, whatever this process does. And nothing that it
    inherited may be destroyed before it is disowned: its pools keep their idle connections, and
    `owned_connections` keeps those that are checked out.
    """
    if not owned_connections:
        return True
    for pool in pools():
        severing.pin(pool)
        if not is_alone:  # the parent has looked it up for another thread's fork, or not at all
            pool.pool_events.look_up_fork()
    severing.pin(owned_connections)
    # No pool keeps a connection that was detached from it.
    return ownership.sever_all() and not detached_connections


def _take_over(fork: NoticedFork) -> None:
    takeovers: dict[int, tuple[ForkablePool, Takeover]] = {}
    for pool in pools():
        takeovers[id(pool)] = pool, Takeover(fork)
    for owned in list(owned_connections.values()):
        connection = owned.connection()
        if connection is None:
            # Detached and dropped before the fork was noticed. An adapter of SQLAlchemy's for asyncio has no
            # weak reference whose end would have severed it
            # (tests/pool/test_async.py::test_an_async_parent_never_notices).
            owned.sever_socket()
            continue
        if isinstance(connection, DisownedConnection):
            continue  # this was interrupted, and begins again
        entry, checkout, pool = _holders(owned)
        if pool is not None:
            state = _state(connection, entry)
            _put_stand_in(owned.tag, connection, entry, checkout, pool, state)
        severing.pin(connection)  # before the socket: from here on its id stays its own
        # A child that was forked in the middle of a driver's call may unwind that call, which then ends on
        # the socket what its parent is doing there (test_takeover.py::test_a_copy_in_flight_is_the_parents).
        action: SocketAction = "severed"
        if not owned.is_severed:
            if entry is not None and not entry.in_use:
                may_be_used = is_busy(connection) is True  # in a listener, between checkouts
            else:
                # Also if its checkout was dropped, in whose finalizer this may run: the call is still
                # unwound. If it was collected in a cycle, nobody knows whether it has streamed.
                has_streamed = checkout is None or checkout.has_streamed
                may_be_used = has_streamed or is_busy(connection) is not False
            if not owned.sever_socket(even_if_kept=may_be_used):
                action = "kept"
        if pool is not None and id(pool) in takeovers:
            place = None if entry is None or state == "idle" else entry.checked_out_at
            takeovers[id(pool)][1].connections.append((owned.tag, state, action, place))
    of_lineages: dict[Lineage, tuple[ForkablePool, Takeover]] = {}
    for pool, takeover in takeovers.values():
        pool.start_from_zero(takeover)
        severing.unpin(pool)  # it will have connections of this process's own, which are to be closed with it
        # A pool that was disposed of lives as long as a checkout of it. In the log both are one pool,
        # as in the counts (test_events.py::test_a_pool_and_its_predecessors_are_adopted_once).
        if pool.pool_events in of_lineages:
            of_lineages[pool.pool_events][1].connections.extend(takeover.connections)
        else:
            of_lineages[pool.pool_events] = pool, takeover
    for pool, takeover in of_lineages.values():
        pool.log_takeover_later(takeover)
    owned_connections.clear()
    detached_connections.clear()


def _put_stand_in(
    tag: ConnectionTag,
    connection: Any,
    entry: Entry | None,
    checkout: Checkout | None,
    pool: ForkablePool,
    state: StateAtFork,
) -> None:
    is_held = checkout is not None and checkout.held_connection is connection
    is_in_entry = entry is not None and entry.dbapi_connection is connection
    # Of a checkout whose dead connection is just replaced, the entry has the new one already.
    its_checkout = checkout if is_held or is_in_entry else None
    stand_in = DisownedConnection(Inheritance(pool, tag, connection, state, its_checkout))
    if checkout is not None and is_held:
        checkout.held_connection = stand_in
    if entry is not None and is_in_entry:
        entry.dbapi_connection = stand_in


def _log_waiting_events(until: float) -> None:
    for pool in pools():
        pool.log_waiting_events(until)


detection.register_fork_callback(_note_fork)
detection.register_hook_callback(_sever_at_once)
detection.register_child_callback(_take_over)
detection.register_report_callback(_log_waiting_events)
at_exit.log_at_exit()
