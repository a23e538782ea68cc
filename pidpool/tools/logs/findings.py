"""What is found in a log and kept one by one: leaks, long waits and holds, timeouts, overdue checkouts. The
counting is in summary.py, the forks that only a parent logged are in unmatched.py.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Any, NamedTuple

from pidpool.terms import OPEN_STATES, SOCKET_ACTIONS, STATES_AT_FORK, StateAtFork
from pidpool.tools.logs.clean import LONGEST_FORK_LINE, cleaned, own_fields
from pidpool.tools.logs.processes import Connection, Process, name_of

Event = Mapping[str, Any]


class Leak:
    """A connection that was open in another process than its owner's: one `connection.inherited`."""

    __slots__ = ("at", "owner", "inheritor", "connection", "owner_pid", "pid", "state", "action", "where",
                 "fork_line", "replaced_by", "replaced_by_server_pid", "refused", "fields")  # fmt: skip

    def __init__(self, event: Event, connection: Connection, inheritor: Process) -> None:
        self.at: float = event["at"]
        self.connection = connection
        self.owner = connection.process
        self.inheritor = inheritor
        self.owner_pid: int = event["owner_pid"]
        self.pid: int = event["pid"]
        state, action = event["state"], event["action"]
        # A state that this version does not know may be an open transaction.
        self.state: StateAtFork = state if state in STATES_AT_FORK else "unknown"
        self.action: str = action if action in SOCKET_ACTIONS else name_of(action)
        self.where = cleaned(event.get("where"))
        self.fork_line = fork_line_of(event)
        self.replaced_by: str | None = None
        self.replaced_by_server_pid: int | None = None
        self.refused = False
        self.fields = own_fields(event)

    @property
    def open(self) -> bool:
        """Whether a transaction was, or may have been, open."""
        return self.state in OPEN_STATES

    @property
    def outcome(self) -> str:
        """What was done about it, in words."""
        said = [self.action]
        if self.refused:
            said.append("refused")
        if self.replaced_by is not None:
            server = (
                "" if self.replaced_by_server_pid is None else f" (server pid {self.replaced_by_server_pid})"
            )
            said.append(f"replaced by {self.replaced_by}{server}")
        if len(said) == 1:
            said.append("left to its owner" if self.state == "idle" else "not used")
        return ", then ".join(said)


class Wait(NamedTuple):
    """How long a checkout waited, or for how long it was held."""

    seconds: float
    order: int
    at: float
    """When the wait was over, or the connection came back."""
    connection: Connection
    wait: float
    """Of a hold: how long the checkout had waited."""
    where: str | None
    fields: dict[str, str]


class Longest:
    """The longest of many, as many as `size`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.floor = 0.0 if size else float("inf")
        """Nothing up to this is kept."""
        self._heap: list[Wait] = []

    def add(self, wait: Wait) -> None:
        """Keep one that is longer than `floor`."""
        if len(self._heap) < self.size:
            heapq.heappush(self._heap, wait)
        else:
            heapq.heappushpop(self._heap, wait)
        if len(self._heap) == self.size:
            self.floor = self._heap[0].seconds

    def first(self, number: int | None = None) -> list[Wait]:
        """Return the longest, longest first: all that are kept, or `number` of them."""
        return heapq.nlargest(len(self._heap) if number is None else number, self._heap)

    def __len__(self) -> int:
        return len(self._heap)


class Timeout(NamedTuple):
    """A checkout for which no connection was free in time."""

    at: float
    process: Process
    pool: str | None
    wait: float
    size: int | None
    overflow: int | None
    checked_out: int | None
    fields: dict[str, str]


class OverMaximum(NamedTuple):
    """A pool whose processes may have more connections than their server allows."""

    at: float
    process: Process
    pool: str | None
    processes: int | None
    maximum: int | None
    server_max_connections: int | None


class ForkLine:
    """The connections that crossed the forks of one line of code."""

    def __init__(self, line: str | None) -> None:
        self.line = line
        """With its callers, as the field `forked_at` has it; None if the log does not name it."""
        self.crossed = 0
        self.open = 0
        """How many of them had a transaction open, or perhaps open."""

    def add(self, crossed: int, open_ones: int) -> None:
        """Count connections in."""
        self.crossed += crossed
        self.open += open_ones


def fork_line_of(event: Event) -> str | None:
    """Return the line that forked, with its callers; None if the event does not name it."""
    return cleaned(event.get("forked_at"), LONGEST_FORK_LINE)


class Place:
    """The overdue checkouts of one line of code."""

    def __init__(self, where: str | None, hold_warning: float) -> None:
        self.where = where
        self.hold_warning = hold_warning
        self.count = 0
        self.longest = 0.0
        self.last_at = 0.0
