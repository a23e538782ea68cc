"""How a forked child takes over: once in each child, before anything else is done with a pool, all
inherited connections are disowned and all pools start from zero.

Runs in the at-fork hook where there is one, and else at the first door that notices the fork. So it
must not block, log, raise or send anything; what it found is told at the first use of each pool.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from pidpool._sqlalchemy.checkout import PidFairy, PidRecord
from pidpool.forks import at_exit as ending
from pidpool.forks import detection as fork
from pidpool.forks import ownership
from pidpool.forks import stand_in as inherited
from pidpool.forks.ownership import ConnectionTag, Holding
from pidpool.forks.stand_in import DisownedConnection, Inheritance
from pidpool.stats.process_counters import Count

if TYPE_CHECKING:
    from pidpool.events.user_code import Place
    from pidpool.forks.detection import Trigger
    from pidpool.pool import PidPool

forkable: weakref.WeakSet[PidPool] = weakref.WeakSet()
"""Every pool of this process that is alive."""


class Fork:
    """A fork as the parent's pool remembers it until it may tell of it: how many connections it had."""

    def __init__(self, at: float) -> None:
        self.at = at
        self.idle = 0
        self.checked_out = 0
        self.in_transaction = 0


class Adoption:
    """What a child found when it took a pool over."""

    def __init__(self, parent_pid: int, trigger: Trigger, connects_in_flight: int) -> None:
        self.at = time.time()
        self.parent_pid = parent_pid
        self.trigger = trigger
        self.connects_in_flight = connects_in_flight
        self.connections: list[tuple[ConnectionTag, str, str, Place | None]] = []
        """The tag, the state at the fork, what became of the descriptor and who had checked it out,
        for each connection."""

    def count(self, state: str) -> int:
        """Return how many connections were inherited in this state."""
        return sum(each == state for _, each, _, _ in self.connections)


class _Open(NamedTuple):
    """One connection that is open at a fork, and all that refers to it."""

    holding: Holding
    connection: Any
    record: PidRecord | None
    fairy: PidFairy | None
    pool: PidPool | None

    @property
    def state(self) -> str:
        if self.record is not None and self.record.fairy_ref is None:
            return inherited.IDLE
        return inherited.transaction_state(self.connection)

    @property
    def place(self) -> Place | None:
        checkout = None if self.record is None else self.record.checkout_told
        return None if checkout is None else checkout.place


def _open_connections() -> Iterator[_Open]:
    for holding in list(ownership.register.values()):
        connection = holding.connection()
        if connection is None or isinstance(connection, DisownedConnection):
            continue
        record: PidRecord | None = None
        fairy: PidFairy | None = None
        if holding.detached is not None:
            # Its record has gone back to the pool and may hold another one by now.
            fairy = holding.detached()
        else:
            record = holding.record()
            if record is not None and record.fairy_ref is not None:
                fairy = cast("PidFairy | None", record.fairy_ref())
        pool = record.pidpool if record is not None else fairy.pidpool if fairy is not None else None
        yield _Open(holding, connection, record, fairy, pool)


def _note_fork(at: float) -> None:
    for row in {pool._telemetry.row for pool in list(forkable)}:  # a pool's successors share it
        row.add(Count.FORKS)
    forks: dict[int, tuple[PidPool, Fork]] = {}
    for each in _open_connections():
        if each.pool is None:
            continue
        _, noted = forks.setdefault(id(each.pool), (each.pool, Fork(at)))
        state = each.state
        noted.idle += state == inherited.IDLE
        noted.checked_out += state != inherited.IDLE
        noted.in_transaction += state == inherited.IN_TRANSACTION
    for pool, noted in forks.values():
        pool._unreported.append(noted)
    if forks and fork.flag[0] == fork.SETTLED:
        fork.flag[0] = fork.UNREPORTED


def _adopt(trigger: Trigger, connects_in_flight: int) -> None:
    parent_pid = fork.current().pid
    pools = {id(pool): pool for pool in list(forkable)}
    adoptions = {key: Adoption(parent_pid, trigger, connects_in_flight) for key in pools}
    for each in _open_connections():
        holding, connection, pool = each.holding, each.connection, each.pool
        if pool is None:
            inherited.disown(holding, connection)
            continue
        state, place = each.state, each.place
        _replace_by_stand_in(pool, holding, connection, state, each.record, each.fairy)
        action = inherited.disown(holding, connection)
        if id(pool) in adoptions:
            adoptions[id(pool)].connections.append((holding.tag, state, action, place))
    for key, pool in pools.items():
        pool._start_from_zero(adoptions[key])
    ownership.register.clear()


def _replace_by_stand_in(
    pool: PidPool,
    holding: Holding,
    connection: Any,
    state: str,
    record: PidRecord | None,
    fairy: PidFairy | None,
) -> None:
    if fairy is not None and fairy._held is not connection:
        fairy = None
    stand_in = DisownedConnection(Inheritance(pool, holding.tag, connection, state, fairy))
    if fairy is not None:
        fairy._held = stand_in
    if record is not None and record.dbapi_connection is connection:
        record.dbapi_connection = stand_in


def renew_first_connect(dispatch: Any) -> None:
    """Give a pool's first-connect events a mutex of this process's own, and their first run back.

    Another thread may have been in the middle of them at the fork: it holds the mutex, and has
    taken the engine's once-only initialisation of the dialect off its list. That thread does not
    exist here, so it falls to this process's first connect to do it.
    """
    for name in ("connect", "first_connect"):
        listeners = getattr(dispatch, name)
        if getattr(listeners, "_exec_once_mutex", None) is not None:
            listeners._exec_once_mutex = None
        if getattr(listeners, "_exec_w_sync_once", True):
            continue
        for listener in chain(listeners.parent_listeners, listeners.listeners):
            # sqlalchemy.util.only_once(): `once` is the list that the function `fn` is popped from.
            names = getattr(getattr(listener, "__code__", None), "co_freevars", ())
            if "once" not in names or "fn" not in names:
                continue
            once = listener.__closure__[names.index("once")].cell_contents
            function = listener.__closure__[names.index("fn")].cell_contents
            if once == [] and getattr(function, "__module__", "") == "sqlalchemy.engine.create":
                once.append(function)


def _report() -> None:
    for pool in list(forkable):
        pool._report()


def _are_connections_open() -> bool:
    return bool(ownership.register)


fork.in_parent(_note_fork)
fork.is_urgent(_are_connections_open)
fork.in_child(_adopt)
fork.at_first_use(_report)
ending.tell_at_the_end()
