"""The summary of a log: what every event adds to it, in memory that doesn't grow with the log.

Sums are exact. Leaks, timeouts, the longest waits and holds are kept one by one up to a bound; those left out
are counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from pidpool.terms import OPEN_STATES, SOCKET_ACTIONS, StateAtFork, Trigger
from pidpool.tools.logs.clean import cleaned, own_fields
from pidpool.tools.logs.findings import (
    Event,
    ForkLine,
    Leak,
    Longest,
    OverMaximum,
    Place,
    Timeout,
    Wait,
    fork_line_of,
)
from pidpool.tools.logs.processes import Connection, Process, Processes, moment, name_of, seconds, whole
from pidpool.tools.logs.unmatched import UnmatchedFork, UnmatchedForks

MOST_LEAKS = 10_000
"""Leaks that are kept one by one; those with an open transaction have as many places of their own."""

MOST_TIMEOUTS = 1_000
MOST_PLACES = 1_000
"""Lines of code whose overdue checkouts, and whose leaks, are kept apart."""

_MOST_OVER_MAXIMUM = 100

_HOOK: Trigger = "hook"

_FAILED = (KeyError, TypeError, ValueError, OverflowError)


class Summary:
    """What a log says of the processes, their connections and their leaks.

    Takes events in the order of their ``at``; small disorder (threads, events that were logged late) does
    no harm. Not safe to use from several threads at once.

    :param longest: how many of the longest waits and holds are kept.
    """

    def __init__(self, longest: int = 10) -> None:
        self.processes = Processes()
        self.events = 0
        self.foreign = 0
        """Lines that are no events of pidpool."""
        self.first_at: float | None = None
        self.last_at = 0.0
        self.waits = Longest(longest)
        self.holds = Longest(longest)
        self.leaks: list[Leak] = []
        self.leaks_left_out = 0
        self.leaks_by_state: dict[StateAtFork, int] = {}
        self.leaks_by_action: dict[str, int] = {}
        self._fork_lines: dict[str | None, ForkLine] = {}
        """Without the unmatched forks."""
        self.unmatched = UnmatchedForks(self.processes.others)
        self.timeouts: deque[Timeout] = deque(maxlen=MOST_TIMEOUTS)
        """The newest."""
        self.timed_out = 0
        self.over_maximum: deque[OverMaximum] = deque(maxlen=_MOST_OVER_MAXIMUM)
        """The newest."""
        self.places: dict[str | None, Place] = {}
        self.elsewhere = Place(None, 0.0)
        """Overdue checkouts of further places."""
        self._order = 0
        self._leaks: dict[tuple[int, Connection], Leak] = {}
        """By the pid that inherited it."""
        self._early: dict[tuple[int, Connection], list[Event]] = {}
        self._kept_leaks = {True: 0, False: 0}  # by Leak.open
        self._takes: dict[str, Callable[[Event], None]] = {
            "connection.opened": self._opened,
            "connection.failed": self._connect_failed,
            "connection.checked_out": self._checked_out,
            "connection.checked_in": self._checked_in,
            "connection.invalidated": self._invalidated,
            "connection.closed": self._closed,
            "connection.given_back": self._noted,
            "connection.inherited": self._inherited,
            "connection.replaced": self._replaced,
            "connection.refused": self._refused,
            "checkout.timed_out": self._timed_out,
            "checkout.overdue": self._overdue,
            "checkout.returned_late": self._returned_late,
            "pool.forked": self._forked,
            "pool.adopted": self._adopted,
            "pool.disposed": self._disposed,
            "pool.over_maximum": self._over_maximum,
            "family.private": self._noted,
            "family.limits_differ": self._noted,
            "driver.unknown": self._noted,
        }

    @property
    def open_leaks(self) -> int:
        """How many connections with an open transaction, or perhaps one, crossed a fork."""
        known = sum(self.leaks_by_state.get(state, 0) for state in OPEN_STATES)
        return known + self.unmatched.in_transaction

    @property
    def crossed(self) -> int:
        """How many connections crossed a fork."""
        return sum(self.leaks_by_state.values()) + self.unmatched.connections

    def fork_lines(self) -> list[ForkLine]:
        """Return the lines of code that forked with connections open: those with most leaks first."""
        found: dict[str | None, ForkLine] = {}
        for line in self._fork_lines.values():
            found.setdefault(line.line, ForkLine(line.line)).add(line.crossed, line.open)
        for fork in (*self.unmatched.listed(), self.unmatched.left_out):
            if fork.connections:
                line = found.setdefault(fork.fork_line, ForkLine(fork.fork_line))
                line.add(fork.connections, fork.in_transaction)
        return sorted(found.values(), key=lambda line: (-line.open, -line.crossed, line.line or ""))

    def feed(self, events: Iterable[Event]) -> list[Event]:
        """Take events, and return those that are worth a line while a log is followed."""
        takes = self._takes
        notable: list[Event] = []
        for event in events:
            try:
                name = event["event"]
                takes[name](event)
            except _FAILED:
                self.foreign += 1
            else:
                self.events += 1
                if name in NOTABLE:
                    notable.append(event)
        return notable

    # -- the bulk: creates an object only for a new connection, or for one of the longest waits and holds

    def _checked_out(self, event: Event) -> None:
        at, wait = event["at"], event["wait_time"]
        connection = self.processes.connections.get(event["connection_id"])
        if connection is None or connection.opened_at != event["opened_at"]:
            connection = self._own(event)
        if not (0.0 <= at < 1e10 and 0.0 <= wait < 1e10):  # a string raises, not-a-number is neither
            raise ValueError(event)
        connection.checkouts += 1
        connection.wait_sum += wait
        if wait > connection.wait_max:
            connection.wait_max = wait
        connection.last_at = connection.out_at = at
        connection.out_wait = wait
        connection.where = None
        if wait > self.waits.floor:
            self._order -= 1
            self.waits.add(Wait(wait, self._order, at, connection, wait, None, own_fields(event)))

    def _checked_in(self, event: Event) -> None:
        at, use = event["at"], event["use_time"]
        connection = self.processes.connections.get(event["connection_id"])
        if connection is None or connection.opened_at != event["opened_at"]:
            connection = self._own(event)
        if not (0.0 <= at < 1e10 and 0.0 <= use < 1e10):
            raise ValueError(event)
        connection.checkins += 1
        connection.use_sum += use
        if use > connection.use_max:
            connection.use_max = use
        connection.last_use = use
        if use > self.holds.floor:
            self._hold(event, connection, use)
        # A finalizer's checkin is logged late: the connection may already be out again.
        if connection.out_at is None or at >= connection.out_at:
            connection.out_at = None
            connection.last_at = connection.back_at = at

    def _hold(self, event: Event, connection: Connection, use: float) -> None:
        self._order -= 1
        where = cleaned(event.get("where")) or connection.where
        hold = Wait(use, self._order, event["at"], connection, connection.out_wait, where, own_fields(event))
        self.holds.add(hold)

    # -- a connection's life

    def _own(self, event: Event) -> Connection:
        """Return the connection of an event that its owner logged."""
        self._see_time(event)
        if event["pid"] != event["owner_pid"]:
            raise ValueError(event)
        connection = self.processes.connection(event)
        connection.process.see(event)
        connection.last_at = max(connection.last_at, event["at"])
        return connection

    def _opened(self, event: Event) -> None:
        create_time = seconds(event["create_time"])
        connection = self._own(event)
        connection.create_time = create_time
        process = connection.process
        process.opened += 1
        process.create_max = max(process.create_max, create_time)

    def _connect_failed(self, event: Event) -> None:
        seconds(event["create_time"])
        error = name_of(event["error"])
        failed = self._process_of(event).failed
        failed[error] = failed.get(error, 0) + 1

    def _invalidated(self, event: Event) -> None:
        connection = self._own(event)
        connection.invalidations += 1
        connection.process.invalidations += 1

    def _closed(self, event: Event) -> None:
        reason = name_of(event["reason"])
        connection = self._own(event)
        closed = connection.process.closed
        closed[reason] = closed.get(reason, 0) + 1
        connection.out_at = None
        self.processes.close(connection, event["at"], reason)

    def _noted(self, event: Event) -> None:
        """Take note of the process alone: a count of the event is not shown."""
        self._process_of(event)

    # -- checkouts that took or lasted too long

    def _timed_out(self, event: Event) -> None:
        wait = seconds(event["wait_time"])
        process = self._process_of(event)
        process.timeouts += 1
        self.timed_out += 1
        timeout = Timeout(
            event["at"],
            process,
            cleaned(event["pool"]),
            wait,
            whole(event.get("size")),
            whole(event.get("overflow")),
            whole(event.get("checked_out")),
            own_fields(event),
        )
        self.timeouts.append(timeout)

    def _over_maximum(self, event: Event) -> None:
        numbers = [whole(event.get(name)) for name in ("processes", "maximum", "server_max_connections")]
        self.over_maximum.append(
            OverMaximum(event["at"], self._process_of(event), cleaned(event["pool"]), *numbers)
        )

    def _overdue(self, event: Event) -> None:
        held, place = seconds(event["held"]), self._place(event)
        connection = self._connection_of(event)
        process = self._process_of(event) if connection is None else connection.process
        process.overdue += 1
        place.count += 1
        place.longest = max(place.longest, held)
        place.last_at = event["at"]
        if connection is not None:
            connection.where = cleaned(event.get("where"))
            began = event["at"] - held
            # A checkout may become overdue and come back in the same moment.
            if connection.out_at is None and (connection.back_at is None or connection.back_at < began):
                connection.out_at = began

    def _returned_late(self, event: Event) -> None:
        use, place = seconds(event["use_time"]), self._place(event)
        connection = self._connection_of(event)
        process = self._process_of(event) if connection is None else connection.process
        process.returned_late += 1
        place.longest = max(place.longest, use)
        if connection is None or connection.last_use == use:
            return  # its checkin was logged as well
        if use > self.holds.floor:
            self._hold(event, connection, use)
        connection.out_at = None
        connection.back_at = event["at"]

    def _place(self, event: Event) -> Place:
        where, hold_warning = cleaned(event.get("where")), seconds(event["hold_warning"])
        if where in self.places:
            return self.places[where]
        if len(self.places) >= MOST_PLACES:
            return self.elsewhere
        return self.places.setdefault(where, Place(where, hold_warning))

    # -- forks

    def _forked(self, event: Event) -> None:
        process = self._process_of(event)
        fork = UnmatchedFork(event["at"], process, cleaned(event["pool"]), fork_line_of(event))
        fork.add(*(_number(event[name]) for name in ("idle", "checked_out", "in_transaction")))
        process.forks += 1
        self.unmatched.add_fork(fork)

    def _adopted(self, event: Event) -> None:
        self._see_time(event)
        at = event["at"]
        process = self.processes.begun(event["pid"], event["parent_pid"], at)
        process.see(event)
        process.trigger = name_of(event["trigger"])
        process.connects_in_flight = whole(event.get("connects_in_flight")) or 0
        # Without the hook (a fork in C) or without an open connection the parent logs nothing.
        if process.trigger == _HOOK and _number(event["idle"]) + _number(event["checked_out"]):
            parent = self.processes.of(event["parent_pid"], at)
            self.unmatched.add_adoption(parent, cleaned(event["pool"]), at)

    def _inherited(self, event: Event) -> None:
        self._see_time(event)
        # The owner first: if the log names no parent, the owner is taken for it.
        connection = self.processes.connection(event)
        if event["pid"] == event["owner_pid"]:
            raise ValueError(event)
        process = self.processes.begun(event["pid"], event["owner_pid"], event["at"])
        leak = Leak(event, connection, process)
        process.see(event)
        process.inherited[leak.state] = process.inherited.get(leak.state, 0) + 1
        self.leaks_by_state[leak.state] = self.leaks_by_state.get(leak.state, 0) + 1
        action = leak.action if leak.action in SOCKET_ACTIONS else "other"
        self.leaks_by_action[action] = self.leaks_by_action.get(action, 0) + 1
        line = leak.fork_line
        if line not in self._fork_lines and len(self._fork_lines) >= MOST_PLACES:
            line = None
        self._fork_lines.setdefault(line, ForkLine(line)).add(1, leak.open)
        if self._kept_leaks[leak.open] >= MOST_LEAKS:
            self.leaks_left_out += 1
            return
        self._kept_leaks[leak.open] += 1
        self.leaks.append(leak)
        self._leaks[leak.pid, connection] = leak
        for early in self._early.pop((leak.pid, connection), ()):
            self._note_outcome(leak, early)

    def _replaced(self, event: Event) -> None:
        self._process_of(event).replaced += 1
        self._find_leak(event)

    def _refused(self, event: Event) -> None:
        self._process_of(event).refused += 1
        if "connection_id" in event:
            self._find_leak(event)

    def _find_leak(self, event: Event) -> None:
        key = event["pid"], self.processes.connection(event)
        leak = self._leaks.get(key)
        if leak is not None:
            self._note_outcome(leak, event)
        elif len(self._early) < MOST_LEAKS:
            # A child logs what it inherited at its first use of the pool, which may be later than this.
            early = self._early.setdefault(key, [])
            if len(early) < 2:
                early.append(event)

    def _note_outcome(self, leak: Leak, event: Event) -> None:
        if event["event"] == "connection.refused":
            leak.refused = True
        else:
            leak.replaced_by = cleaned(event.get("by"))
            leak.replaced_by_server_pid = whole(event.get("by_server_pid"))

    def _disposed(self, event: Event) -> None:
        self._process_of(event).disposed += 1

    # -- the process and the connection of an event

    def _process_of(self, event: Event) -> Process:
        """Return the process that logged an event."""
        self._see_time(event)
        process = self.processes.of(event["pid"], event["at"])
        process.see(event)
        return process

    def _connection_of(self, event: Event) -> Connection | None:
        """Return the connection of an event, if it names one."""
        return self._own(event) if "connection_id" in event else None

    def _see_time(self, event: Event) -> None:
        at = moment(event["at"])
        if self.first_at is None or at < self.first_at:
            self.first_at = at
        if at > self.last_at:
            self.last_at = at

    def finish(self) -> None:
        """Bring everything up to date, once all events were taken."""
        self.unmatched.match()
        ends = [process.until() for process in self.processes]
        self.last_at = max([self.last_at, *ends])

    def not_returned(self) -> list[Connection]:
        """Return the connections that were out at the last event of their process, longest first."""
        out = [
            (self.held(connection), connection.connection_id, connection)
            for process in self.processes
            for connection in process.connections.values()
            if connection.out_at is not None
        ]
        return [connection for *_, connection in sorted(out, key=lambda each: each[:2], reverse=True)]

    def held(self, connection: Connection) -> float:
        """Return for how many seconds a connection had been out at the last event of its process."""
        return 0.0 if connection.out_at is None else max(0.0, self._out_until(connection) - connection.out_at)

    def _out_until(self, connection: Connection) -> float:
        """Return the time up to which a connection that was not returned is taken to have been out."""
        newest = self.processes.connections.get(connection.connection_id)
        # If another process has the pid already, this one has ended at a time that the log does not give.
        return connection.process.until() if newest is not connection else self.last_at


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise ValueError(f"{value!r} is no number of connections")
    return value


NOTABLE = frozenset(
    [
        "connection.failed",
        "connection.inherited",
        "connection.replaced",
        "connection.refused",
        "connection.invalidated",
        "checkout.timed_out",
        "checkout.overdue",
        "checkout.returned_late",
        "pool.forked",
        "pool.adopted",
        "pool.over_maximum",
        "driver.unknown",
    ]
)
"""Events that are worth a line while a log is followed."""
