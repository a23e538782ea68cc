"""How a forked child takes over: once in each child, before anything else is done with a pool, it disowns all
inherited connections, and all its pools start from zero.

Runs in the at-fork hook if there is one, and otherwise at the first door that notices the fork. So it must
not block, log, raise or send anything. The events of it wait for the first use of each pool.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from pidpool.forks import at_exit, detection, severing
from pidpool.forks.ownership import Checkout, Entry, OwnedConnection, owned_connections
from pidpool.forks.stand_in import (
    DisownedConnection,
    Inheritance,
    ReplacingPool,
    is_busy,
    transaction_state,
)
from pidpool.tag import ConnectionTag
from pidpool.terms import SocketAction, StateAtFork, Trigger


class ForkablePool(ReplacingPool, Protocol):
    """A pool, as far as a fork concerns it. All of it may be called inside an at-fork hook but the last."""

    @property
    def lineage(self) -> object:
        """The same object for a pool and for the successors that ``recreate()`` made of it."""

    def note_fork(self, at: float, connections: OpenConnections) -> None:
        """Note in the parent that a child was forked with so many connections of the lineage open."""

    def start_from_zero(self, takeover: Takeover) -> None:
        """Replace in the child everything that another thread may have held at the fork."""

    def log_waiting_events(self) -> None: ...


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
    found = (reference() for reference in list(_pools.values()))
    return [pool for pool in found if pool is not None]


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


class InheritedConnection(NamedTuple):
    """One connection that a child inherited."""

    tag: ConnectionTag
    state: StateAtFork
    action: SocketAction
    checked_out_at: str | None


class Takeover:
    """What a child found when it took a pool over."""

    def __init__(self, parent_pid: int, trigger: Trigger, connects_in_flight: int) -> None:
        self.at = time.time()
        self.parent_pid = parent_pid
        self.trigger = trigger
        self.connects_in_flight = connects_in_flight
        self.connections: list[InheritedConnection] = []


class _Open(NamedTuple):
    """One connection that is open at a fork, and all that refers to it."""

    owned: OwnedConnection
    connection: Any
    entry: Entry | None
    checkout: Checkout | None
    pool: ForkablePool | None

    @property
    def state(self) -> StateAtFork:
        if self.entry is not None and not self.entry.in_use:
            return "idle"
        return transaction_state(self.connection)


def _open_connections() -> Iterator[_Open]:
    for owned in list(owned_connections.values()):
        connection = owned.connection()
        if connection is None or isinstance(connection, DisownedConnection):
            continue
        entry: Entry | None = None
        if owned.detached is not None:
            # Its entry has gone back to the pool, and may hold another connection already.
            checkout = owned.detached()
        else:
            entry = owned.entry()
            checkout = None if entry is None else entry.current_checkout()
        pool = entry.pidpool if entry is not None else checkout.pidpool if checkout is not None else None
        yield _Open(owned, connection, entry, checkout, pool)


def _note_fork_in_parent(at: float) -> None:
    noted: dict[int, tuple[ForkablePool, OpenConnections]] = {}
    for pool in pools():
        noted.setdefault(id(pool.lineage), (pool, OpenConnections()))
    for each in _open_connections():
        if each.pool is not None:
            _, connections = noted.setdefault(id(each.pool.lineage), (each.pool, OpenConnections()))
            connections.add(each.state)
    for pool, connections in noted.values():
        pool.note_fork(at, connections)


def _take_over(trigger: Trigger, connects_in_flight: int) -> None:
    parent_pid = detection.process_pid()
    takeovers = {id(pool): (pool, Takeover(parent_pid, trigger, connects_in_flight)) for pool in pools()}
    for each in _open_connections():
        if each.pool is None:
            _disown(each)
            continue
        state = each.state
        _put_stand_in(each, each.pool, state)
        action = _disown(each)
        if id(each.pool) in takeovers:
            place = None if each.entry is None else each.entry.checked_out_at
            inherited = InheritedConnection(each.owned.tag, state, action, place)
            takeovers[id(each.pool)][1].connections.append(inherited)
    for pool, takeover in takeovers.values():
        pool.start_from_zero(takeover)
    owned_connections.clear()


def _put_stand_in(inherited: _Open, pool: ForkablePool, state: StateAtFork) -> None:
    connection, entry, checkout = inherited.connection, inherited.entry, inherited.checkout
    if checkout is not None and checkout.held_connection is not connection:
        checkout = None
    stand_in = DisownedConnection(Inheritance(pool, inherited.owned.tag, connection, state, checkout))
    if checkout is not None:
        checkout.held_connection = stand_in
    if entry is not None and entry.dbapi_connection is connection:
        entry.dbapi_connection = stand_in


def _disown(inherited: _Open) -> SocketAction:
    """Let go of an inherited connection without a byte to the server; say what became of its socket."""
    severing.pin(inherited.connection)  # first: from here on its id stays its own
    # A child that was forked in the middle of a driver's call may unwind that call, which then ends on the
    # socket what its parent is doing there (test_takeover.py::test_a_copy_in_flight_is_the_parents).
    is_in_a_call = inherited.checkout is not None and is_busy(inherited.connection)
    return "severed" if inherited.owned.sever_socket(even_if_kept=is_in_a_call) else "kept"


def _log_waiting_events() -> None:
    for pool in pools():
        pool.log_waiting_events()


def _has_open_connections() -> bool:
    return bool(owned_connections)


detection.register_parent_callback(_note_fork_in_parent)
detection.register_urgency_check(_has_open_connections)
detection.register_child_callback(_take_over)
detection.register_report_callback(_log_waiting_events)
at_exit.log_at_exit()
