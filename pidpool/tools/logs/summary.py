"""The summary of a log: what every event adds to it, in memory that doesn't grow with the log.

Sums are exact. What is kept one by one (leaks, timeouts, the longest waits and holds) is bounded, and
how much was left out is counted.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable

from pidpool.terms import OPEN_STATES, SOCKET_ACTIONS
from pidpool.tools.logs.clean import cleaned, own_fields
from pidpool.tools.logs.findings import (
    Event,
    Leak,
    Longest,
    OverMaximum,
    Place,
    Timeout,
    UnheardFork,
    Wait,
)
from pidpool.tools.logs.processes import Connection, Process, Processes, moment, name_of, seconds, whole

MOST_LEAKS = 10_000
"""Leaks that are kept one by one; those with an open transaction have as many places of their own."""

MOST_TIMEOUTS = 1_000
MOST_PLACES = 1_000
"""Lines of code that are kept apart of the overdue checkouts."""

_SAME_FORK = 1.0
"""Seconds that the parent's and the child's time of one fork may lie apart."""

_MOST_HEARD = 100

_FAILED = (KeyError, TypeError, ValueError, OverflowError)


class Summary:
    """What a log tells of the processes, their connections and their leaks.

    Takes events in the order of their ``at``; small disorder (threads, events that were told late) does
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
        self.leaks_by_state: dict[str, int] = {}
        self.leaks_by_action: dict[str, int] = {}
        self.unheard_left_out = UnheardFork(0.0, self.processes.others, None)
        """The sums of those unheard forks for which there was no room."""
        self._unheard: dict[tuple[Process, str | None], list[UnheardFork]] = {}
        self._unheard_kept = 0
        self._heard: dict[tuple[Process, str | None], list[float]] = {}
        self.timeouts: deque[Timeout] = deque(maxlen=MOST_TIMEOUTS)
        """The newest."""
        self.timed_out = 0
        self.over_maximum: deque[OverMaximum] = deque(maxlen=_MOST_HEARD)
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
            "connection.checked_out": self._checked_out,
            "connection.checked_in": self._checked_in,
            "connection.invalidated": self._invalidated,
            "connection.closed": self._closed,
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
        }

    @property
    def open_leaks(self) -> int:
        """How many connections with an open transaction, or perhaps one, crossed a fork."""
        told = sum(self.leaks_by_state.get(state, 0) for state in OPEN_STATES)
        return told + sum(fork.in_transaction for fork in (*self.unheard_forks(), self.unheard_left_out))

    @property
    def crossed(self) -> int:
        """How many connections crossed a fork."""
        unheard = (*self.unheard_forks(), self.unheard_left_out)
        return sum(self.leaks_by_state.values()) + sum(fork.idle + fork.checked_out for fork in unheard)

    def unheard_forks(self) -> list[UnheardFork]:
        """Return the forks of which the child told nothing, oldest first."""
        return sorted((fork for forks in self._unheard.values() for fork in forks), key=lambda fork: fork.at)

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

    # -- the bulk: nothing is made here but where a connection is met first, or something is among the longest

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
        # What a finalizer held back is told late: the connection may be out again by then.
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
        """Return the connection of an event that its owner tells."""
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

    # -- checkouts that took or lasted too long

    def _timed_out(self, event: Event) -> None:
        wait = seconds(event["wait_time"])
        process = self._teller(event)
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
            OverMaximum(event["at"], self._teller(event), cleaned(event["pool"]), *numbers)
        )

    def _overdue(self, event: Event) -> None:
        held, place = seconds(event["held"]), self._place(event)
        connection = self._of_teller(event)
        process = self._teller(event) if connection is None else connection.process
        process.overdue += 1
        place.count += 1
        place.longest = max(place.longest, held)
        place.last_at = event["at"]
        if connection is not None:
            connection.where = cleaned(event.get("where"))
            began = event["at"] - held
            # The watch may tell of a checkout that came back in the same moment.
            if connection.out_at is None and (connection.back_at is None or connection.back_at < began):
                connection.out_at = began

    def _returned_late(self, event: Event) -> None:
        use, place = seconds(event["use_time"]), self._place(event)
        connection = self._of_teller(event)
        process = self._teller(event) if connection is None else connection.process
        process.returned_late += 1
        place.longest = max(place.longest, use)
        if connection is None or connection.last_use == use:
            return  # its checkin was told as well
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
        process, pool = self._teller(event), cleaned(event["pool"])
        fork = UnheardFork(event["at"], process, pool)
        fork.add(*(_number(event[name]) for name in ("idle", "checked_out", "in_transaction")))
        process.forks += 1
        key = process, pool if pool in process.pools else None
        forks = self._unheard.setdefault(key, [])
        forks.append(fork)
        self._unheard_kept += 1
        if self._unheard_kept > MOST_LEAKS:
            self._settle(key)
            # By halves, since one at a time would mean to look through all of them at each further fork.
            # Never the newest, whose child may be about to be heard of.
            half = len(forks) // 2
            for oldest in forks[:half]:
                self.unheard_left_out.add(oldest.idle, oldest.checked_out, oldest.in_transaction)
            del forks[:half]
            self._unheard_kept = sum(map(len, self._unheard.values()))

    def _adopted(self, event: Event) -> None:
        self._see_time(event)
        at, pool = event["at"], cleaned(event["pool"])
        process = self.processes.begun(event["pid"], event["parent_pid"], at)
        process.see(event)
        process.trigger = name_of(event["trigger"])
        process.connects_in_flight = whole(event.get("connects_in_flight")) or 0
        if process.trigger != "hook" or not _number(event["idle"]) + _number(event["checked_out"]):
            return  # the parent tells nothing of such a fork
        parent = self.processes.of(event["parent_pid"], at)
        key = parent, pool if pool in parent.pools else None
        heard = self._heard.setdefault(key, [])
        heard.append(at)
        if len(heard) >= _MOST_HEARD:
            self._settle(key)
            del heard[: -_MOST_HEARD // 2]

    def _settle(self, key: tuple[Process, str | None]) -> None:
        """Find the forks whose children were heard of: those nearest in time belong together.

        Not told one by one as they come, since a parent tells of several forks at a time, and late.
        """
        forks, heard = self._unheard.get(key, []), self._heard.get(key, [])
        forks.sort(key=lambda fork: fork.at)
        times = [fork.at for fork in forks]
        pairs = [
            (abs(times[i] - at), i, number)
            for number, at in enumerate(heard)
            for i in range(bisect_left(times, at - _SAME_FORK), bisect_right(times, at + _SAME_FORK))
        ]
        forks_heard: set[int] = set()
        matched: set[int] = set()
        for _, i, number in sorted(pairs):
            if i not in forks_heard and number not in matched:
                forks_heard.add(i)
                matched.add(number)
        self._unheard_kept -= len(forks_heard)
        forks[:] = [fork for i, fork in enumerate(forks) if i not in forks_heard]
        heard[:] = [at for number, at in enumerate(heard) if number not in matched]

    def _inherited(self, event: Event) -> None:
        self._see_time(event)
        # The owner first: where the log does not tell who forked whom, it is taken for the parent.
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
        if self._kept_leaks[leak.open] >= MOST_LEAKS:
            self.leaks_left_out += 1
            return
        self._kept_leaks[leak.open] += 1
        self.leaks.append(leak)
        self._leaks[leak.pid, connection] = leak
        for early in self._early.pop((leak.pid, connection), ()):
            self._note_outcome(leak, early)

    def _replaced(self, event: Event) -> None:
        self._teller(event).replaced += 1
        self._find_leak(event)

    def _refused(self, event: Event) -> None:
        self._teller(event).refused += 1
        if "connection_id" in event:
            self._find_leak(event)

    def _find_leak(self, event: Event) -> None:
        key = event["pid"], self.processes.connection(event)
        leak = self._leaks.get(key)
        if leak is not None:
            self._note_outcome(leak, event)
        elif len(self._early) < MOST_LEAKS:
            # A child tells what it inherited at its first use of the pool, which may be later than this.
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
        self._teller(event).disposed += 1

    # -- who tells it

    def _teller(self, event: Event) -> Process:
        self._see_time(event)
        process = self.processes.of(event["pid"], event["at"])
        process.see(event)
        return process

    def _of_teller(self, event: Event) -> Connection | None:
        return self._own(event) if "connection_id" in event else None

    def _see_time(self, event: Event) -> None:
        at = moment(event["at"])
        if self.first_at is None or at < self.first_at:
            self.first_at = at
        if at > self.last_at:
            self.last_at = at

    def finish(self) -> None:
        """Bring everything up to date, once all events were taken."""
        for key in self._unheard:
            self._settle(key)
        ends = [process.until() for process in self.processes]
        self.last_at = max([self.last_at, *ends])

    def not_returned(self) -> list[Connection]:
        """Return the connections that were out when their process was last heard of, longest first."""
        out = [
            (self.held(connection), connection.connection_id, connection)
            for process in self.processes
            for connection in process.connections.values()
            if connection.out_at is not None
        ]
        return [connection for *_, connection in sorted(out, key=lambda each: each[:2], reverse=True)]

    def held(self, connection: Connection) -> float:
        """Return for how long a connection had been out when its process was last heard of, in seconds."""
        return 0.0 if connection.out_at is None else max(0.0, self.heard(connection) - connection.out_at)

    def heard(self, connection: Connection) -> float:
        """Return the time up to which a connection that is out is taken to have been out."""
        newest = self.processes.connections.get(connection.connection_id)
        # If another process has the pid already, this one has ended at a time that the log does not give.
        return connection.process.until() if newest is not connection else self.last_at


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise ValueError(f"{value!r} is no number of connections")
    return value


NOTABLE = frozenset(
    [
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
    ]
)
"""Events that are worth a line while a log is followed."""
