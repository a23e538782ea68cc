"""The processes and connections of a log, kept apart even if a pid was used again.

A pid names one process at a time. It is another one from `pool.adopted` or `connection.inherited` on
(both stand at the start of a forked child), and from the first connection
whose number was used before: ``<pid>-<number>`` counts upwards as long as a process lives.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from pidpool.tools.logs.clean import clean, cleaned

MOST_PROCESSES = 5_000
"""Processes that are kept apart; all others are counted together."""

MOST_CONNECTIONS = 20_000
"""Connections that are kept apart, of all processes; if there are more, the oldest are counted together."""

_AT_ONCE = 1.0
"""Seconds within which the first events of a process follow each other."""

_CONNECTION_ID = re.compile(r"([1-9][0-9]{0,9})-([1-9][0-9]{0,17})\Z")
_MOST_POOLS = 20


class Use:
    """The checkouts of one connection, or of several."""

    __slots__ = ("checkouts", "checkins", "wait_sum", "wait_max", "use_sum", "use_max")

    def __init__(self) -> None:
        self.checkouts = 0
        self.checkins = 0
        self.wait_sum = 0.0
        self.wait_max = 0.0
        self.use_sum = 0.0
        self.use_max = 0.0

    def add(self, other: Use) -> None:
        """Add another one's checkouts."""
        self.checkouts += other.checkouts
        self.checkins += other.checkins
        self.wait_sum += other.wait_sum
        self.wait_max = max(self.wait_max, other.wait_max)
        self.use_sum += other.use_sum
        self.use_max = max(self.use_max, other.use_max)


class Connection(Use):
    """A connection, as far as the log describes it."""

    __slots__ = (
        "process",
        "connection_id",
        "pool",
        "fd",
        "server_pid",
        "opened_at",
        "create_time",
        "last_at",
        "out_at",
        "back_at",
        "out_wait",
        "where",
        "last_use",
        "closed_at",
        "closed_reason",
        "invalidations",
    )

    def __init__(self, process: Process, event: Mapping[str, Any]) -> None:
        super().__init__()
        self.process = process
        self.connection_id: str = event["connection_id"]
        self.pool = cleaned(event["pool"])
        self.fd = whole(event.get("fd"))
        self.server_pid = whole(event.get("server_pid"))
        self.opened_at: float = event["opened_at"]
        self.create_time: float | None = None
        self.last_at: float = event["at"]
        self.out_at: float | None = None
        """Since when it is checked out; None while it is not."""
        self.back_at: float | None = None
        """When it last came back."""
        self.out_wait = 0.0
        self.where: str | None = None
        """The line that checked it out, if an event named it."""
        self.last_use: float | None = None
        self.closed_at: float | None = None
        self.closed_reason: str | None = None
        self.invalidations = 0


class Process:
    """One process: a pid from its first event on until the pid is another process's."""

    def __init__(self, pid: int, number: int, at: float) -> None:
        self.pid = pid
        self.number = number
        """1 for the first process with this pid in the log, then 2 and so on."""
        self.parent: Process | None = None
        self.children: list[Process] = []
        self.first_at = at
        self.last_at = at
        self.adopted_at: float | None = None
        self.trigger: str | None = None
        self.connects_in_flight = 0
        self.has_events = False
        """Whether it has events of its own, and is not only named in another's."""
        self.pools: dict[str, None] = {}
        self.connections: dict[str, Connection] = {}
        self.left_out = Use()
        """The use of those connections that are no longer kept apart."""
        self.connections_left_out = 0
        self.highest = 0
        self.highest_opened_at = 0.0
        self.opened = 0
        self.failed: dict[str, int] = {}
        """Connects that failed, by the class of the error."""
        self.create_max = 0.0
        self.closed: dict[str, int] = {}
        self.invalidations = 0
        self.timeouts = 0
        self.overdue = 0
        self.returned_late = 0
        self.forks = 0
        self.inherited: dict[str, int] = {}
        self.replaced = 0
        self.refused = 0
        self.disposed = 0

    @property
    def id(self) -> str:
        """Its pid, followed by a number if the pid was used before in the log."""
        if self.pid == 0:
            return "others"
        return str(self.pid) if self.number == 1 else f"{self.pid}#{self.number}"

    def see(self, event: Mapping[str, Any]) -> None:
        """Take note of one of the process's own events."""
        at = event["at"]
        self.has_events = True
        self.first_at = min(self.first_at, at)
        self.last_at = max(self.last_at, at)
        pool = cleaned(event["pool"])
        if pool is not None and pool not in self.pools and len(self.pools) < _MOST_POOLS:
            self.pools[pool] = None

    def children_by_age(self) -> list[Process]:
        """Return the processes that it forked, oldest first."""
        return sorted(self.children, key=lambda child: child.adopted_at or 0.0)

    def use(self) -> Use:
        """Return the use of all its connections together."""
        total = Use()
        total.add(self.left_out)
        for connection in self.connections.values():
            total.add(connection)
        return total

    def until(self) -> float:
        """Return when its last event was."""
        return max([self.last_at, *(connection.last_at for connection in self.connections.values())])


class Processes:
    """All processes and connections of a log, in bounded memory."""

    def __init__(self) -> None:
        self.all: list[Process] = []
        self.others = Process(0, 1, 0.0)
        """All processes for which there was no room, as one."""
        self.left_out = 0
        """How many forked processes are counted in `others`."""
        self.connections: dict[str, Connection] = {}
        """By id; the newest if an id was used again."""
        self._by_pid: dict[int, list[Process]] = {}
        self._last_left_out = (0, 0.0)
        # In the order in which they were first seen, and in which they were closed.
        self._open: OrderedDict[Connection, None] = OrderedDict()
        self._over: OrderedDict[Connection, None] = OrderedDict()

    def __iter__(self) -> Iterator[Process]:
        yield from self.all
        if self.others.has_events:
            yield self.others

    def roots(self) -> list[Process]:
        """Return the processes without a known parent, oldest first."""
        found = (process for process in self.all if process.parent is None)
        return sorted(found, key=lambda process: process.first_at)

    def of(self, pid: object, at: float) -> Process:
        """Return the process that had this pid at that time."""
        number = _pid(pid)
        for process in reversed(self._by_pid.get(number, ())):
            if process.first_at <= at + _AT_ONCE:
                return process
        known = self._by_pid.get(number)
        return known[0] if known else self._new(number, at)

    def begun(self, pid: object, parent_pid: object, at: float) -> Process:
        """Return the forked process that starts here with this pid."""
        number = _pid(pid)
        parent = self.of(parent_pid, at)
        known = self._by_pid.get(number)
        process = known[-1] if known else None
        if process is not None and process.adopted_at is not None:
            if abs(process.adopted_at - at) > _AT_ONCE:
                process = None
        elif process is not None and process.first_at < at - _AT_ONCE:
            process = None
        if process is None:
            process = self._new(number, at)
        if process is self.others:
            self._count_left_out(number, at)
            return process
        if process.adopted_at is None:
            process.adopted_at = at
            process.first_at = min(process.first_at, at)
        if process.parent is None and not _descends(parent, process):
            process.parent = parent
            parent.children.append(process)
        return process

    def connection(self, event: Mapping[str, Any]) -> Connection:
        """Return the connection of an event, whichever process logged it."""
        connection_id = event["connection_id"]
        opened_at = moment(event["opened_at"])
        newest = self.connections.get(connection_id)
        if newest is not None and newest.opened_at == opened_at:
            return newest
        process, number = self._owner(connection_id, event["owner_pid"], opened_at)
        known = process.connections.get(connection_id)
        if known is not None and known.opened_at == opened_at:
            return known
        if number > process.highest:
            process.highest, process.highest_opened_at = number, opened_at
        connection = Connection(process, event)
        if known is not None:
            self._forget(known)
        process.connections[connection_id] = connection
        self._open[connection] = None
        if newest is None or newest.opened_at < opened_at:
            self.connections[connection_id] = connection
            if newest is not None and newest in self._open:
                self._over[newest] = self._open.pop(newest)  # its process has ended
        if len(self._open) + len(self._over) > MOST_CONNECTIONS:
            self._forget(next(iter(self._over or self._open)))
        return connection

    def close(self, connection: Connection, at: float, reason: str) -> None:
        """Note that a connection was closed."""
        if connection.closed_at is None:
            connection.closed_at, connection.closed_reason = at, reason
        if connection in self._open:
            self._over[connection] = self._open.pop(connection)

    def _owner(self, connection_id: object, owner_pid: object, opened_at: float) -> tuple[Process, int]:
        match = _CONNECTION_ID.match(connection_id) if isinstance(connection_id, str) else None
        if match is None or int(match[1]) != owner_pid:
            raise ValueError(f"{connection_id!r} is no connection id of pid {owner_pid!r}")
        number = int(match[2])
        process = self.of(owner_pid, opened_at)
        process.first_at = min(process.first_at, opened_at)
        later = opened_at - process.highest_opened_at
        if process is self.others or not process.highest:
            return process, number
        if (number == process.highest and later > 0) or (number < process.highest and later > _AT_ONCE):
            process = self._new(process.pid, opened_at)
        return process, number

    def _new(self, pid: int, at: float) -> Process:
        if len(self.all) >= MOST_PROCESSES:
            return self.others
        known = self._by_pid.setdefault(pid, [])
        process = Process(pid, len(known) + 1, at)
        known.append(process)
        self.all.append(process)
        return process

    def _count_left_out(self, pid: int, at: float) -> None:
        # A process logs its start several times in a row: for each pool and each connection.
        last_pid, last_at = self._last_left_out
        self.left_out += pid != last_pid or abs(at - last_at) > _AT_ONCE
        self._last_left_out = pid, at

    def _forget(self, connection: Connection) -> None:
        """Keep no more than the sums of a connection."""
        process = connection.process
        process.left_out.add(connection)
        process.connections_left_out += 1
        process.last_at = max(process.last_at, connection.last_at)
        if process.connections.get(connection.connection_id) is connection:
            del process.connections[connection.connection_id]
        if self.connections.get(connection.connection_id) is connection:
            del self.connections[connection.connection_id]
        self._open.pop(connection, None)
        self._over.pop(connection, None)


def _descends(process: Process, ancestor: Process) -> bool:
    at: Process | None = process
    while at is not None:
        if at is ancestor:
            return True
        at = at.parent
    return False


def _pid(value: object) -> int:
    if type(value) is not int or not 0 < value < 1 << 32:
        raise ValueError(f"{value!r} is no pid")
    return value


def whole(value: object) -> int | None:
    """Return a number of a log as it is, and anything else as None."""
    return value if type(value) is int and -1 << 63 <= value < 1 << 63 else None


def seconds(value: object) -> float:
    """Return a duration of a log.

    :raises ValueError: if it is none.
    """
    if type(value) not in (int, float) or not 0.0 <= value < 1e10:  # type: ignore[operator]
        raise ValueError(f"{value!r} is no duration in seconds")
    return float(value)  # type: ignore[arg-type]


moment = seconds
"""A time of a log, in seconds since the epoch: the same bounds hold (1e10 is the year 2286)."""


def name_of(value: object) -> str:
    """Return a word of a log, such as a reason.

    :raises ValueError: if it is no string.
    """
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no word")
    return clean(value, 40)
