"""The summary as one JSON document, for programs. Its shape is stable: fields are added, and a field that
means something else gets another name and the document another `SCHEMA`.

Times are seconds since the epoch, durations are in seconds, null means "not known". A process is named by its
``id``: its pid, or ``<pid>#<n>`` for the n-th process with that pid; ``others`` stands for all processes for
which there was no room.

``schema``, ``files``, ``lines``, ``events``, ``foreign_lines``, ``first_at``, ``last_at``
``open_transaction_leaks``: the number that ``--check`` looks at
``totals``: opened, failed (by error), closed (by reason), checkouts, checkins, invalidations, timeouts,
    overdue, returned_late, forks, inherited (by state), severed, kept, replaced, refused, disposed
``processes``: id, pid, parent (an id), forked_at, noticed_by, connects_in_flight, first_at, last_at, pools,
    the totals of the process, wait and use (count, sum, max), create_time_max, connections_left_out and its
    connections: connection_id, pool, fd, server_pid, opened_at, create_time, checkouts, checkins, wait, use,
    invalidations, closed_at, closed_reason, out_since
``leaks``: at, owner and inheritor (ids), owner_pid, pid, connection_id, pool, fd, server_pid, state, action,
    open_transaction, where, fork_line, refused, replaced_by, replaced_by_server_pid, fields (the user's own)
``fork_lines``: fork_line (the line of code that forked, with its callers; null means "not known"), leaks,
    open_transaction_leaks: of all forks of that line; those with most leaks first
``unmatched_forks``: at, owner (an id), pool, fork_line, idle, checked_out, in_transaction: forks that the
    parent logged and no child; their connections in a transaction are counted in open_transaction_leaks too
``longest_waits``, ``longest_holds``: seconds, at, process, connection_id, pool, where, fields
``not_returned``: process, connection_id, pool, server_pid, since, seconds, where
``timeouts``: at, process, pool, seconds, size, overflow, checked_out, fields; the newest
``over_maximum``: at, process, pool, processes, maximum, server_max_connections; the newest
``overdue``: where, count, longest, hold_warning, last_at
``left_out``: how many leaks (also of unmatched forks), processes, connections, timeouts, not_returned and
    overdue checkouts are counted above without being listed
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pidpool.terms import SOCKET_ACTIONS
from pidpool.tools.logs.findings import ForkLine, Leak, OverMaximum, Place, Timeout, Wait
from pidpool.tools.logs.processes import Connection, Process, Use
from pidpool.tools.logs.reading import Source
from pidpool.tools.logs.summary import Summary
from pidpool.tools.logs.unmatched import UnmatchedFork

SCHEMA = 1

MOST_NOT_RETURNED = 1_000


def document(summary: Summary, sources: Sequence[Source], top: int = 10) -> dict[str, Any]:
    """Return the summary as dicts, lists, strings and numbers.

    :param top: how many of the longest waits and holds are listed.
    """
    processes = list(summary.processes)
    out = summary.not_returned()
    return {
        "schema": SCHEMA,
        "files": [source.name for source in sources],
        "lines": sum(source.lines for source in sources),
        "events": summary.events,
        "foreign_lines": foreign(summary, sources),
        "first_at": summary.first_at,
        "last_at": summary.last_at if summary.first_at is not None else None,
        "open_transaction_leaks": summary.open_leaks,
        "totals": totals(summary),
        "processes": [_process(process) for process in processes],
        "leaks": [_leak(leak) for leak in summary.leaks],
        "fork_lines": [_fork_line(line) for line in summary.fork_lines()],
        "unmatched_forks": [_unmatched(fork) for fork in summary.unmatched.listed()],
        "longest_waits": [_longest(wait) for wait in summary.waits.first(top)],
        "longest_holds": [_longest(hold) for hold in summary.holds.first(top)],
        "not_returned": [_not_returned(each, summary) for each in out[:MOST_NOT_RETURNED]],
        "timeouts": [_timeout(timeout) for timeout in summary.timeouts],
        "over_maximum": [_over_maximum(each) for each in summary.over_maximum],
        "overdue": [_place(place) for place in places(summary)],
        "left_out": {
            "leaks": summary.leaks_left_out + summary.unmatched.left_out.connections,
            "processes": summary.processes.left_out,
            "connections": sum(process.connections_left_out for process in processes),
            "timeouts": summary.timed_out - len(summary.timeouts),
            "not_returned": max(0, len(out) - MOST_NOT_RETURNED),
            "overdue": summary.elsewhere.count,
        },
    }


def foreign(summary: Summary, sources: Iterable[Source]) -> int:
    """Return how many lines were no events of pidpool."""
    return summary.foreign + sum(source.foreign for source in sources)


def places(summary: Summary) -> list[Place]:
    """Return the lines of code whose checkouts were overdue, the most frequent first."""
    return sorted(summary.places.values(), key=lambda place: (-place.count, -place.longest))


def totals(summary: Summary) -> dict[str, Any]:
    """Return the counts of all processes together."""
    found: dict[str, Any] = {}
    for process in summary.processes:
        for name, value in _counts(process).items():
            if isinstance(value, dict):
                into = found.setdefault(name, {})
                for key, number in value.items():
                    into[key] = into.get(key, 0) + number
            else:
                found[name] = found.get(name, 0) + value
    return {**found, **{action: summary.leaks_by_action.get(action, 0) for action in SOCKET_ACTIONS}}


def _fields(item: object, names: str) -> dict[str, Any]:
    """Return the attributes that have the same name in the document."""
    return {name: getattr(item, name) for name in names.split()}


def _counts(process: Process) -> dict[str, Any]:
    names = "opened invalidations timeouts overdue returned_late forks replaced refused disposed"
    return {
        **_fields(process, names),
        **_fields(process.use(), "checkouts checkins"),
        "failed": dict(process.failed),
        "closed": dict(process.closed),
        "inherited": dict(process.inherited),
    }


def _times(use: Use) -> dict[str, Any]:
    return {
        "wait": {"count": use.checkouts, "sum": round(use.wait_sum, 6), "max": use.wait_max},
        "use": {"count": use.checkins, "sum": round(use.use_sum, 6), "max": use.use_max},
    }


def _process(process: Process) -> dict[str, Any]:
    return {
        **_fields(process, "id connects_in_flight first_at connections_left_out"),
        "pid": process.pid or None,
        "parent": None if process.parent is None else process.parent.id,
        "forked_at": process.adopted_at,
        "noticed_by": process.trigger,
        "last_at": process.until(),
        "pools": list(process.pools),
        **_counts(process),
        **_times(process.use()),
        "create_time_max": process.create_max,
        "connections": [_connection(connection) for connection in process.connections.values()],
    }


def _connection(connection: Connection) -> dict[str, Any]:
    names = "connection_id pool fd server_pid opened_at create_time checkouts checkins invalidations"
    return {
        **_fields(connection, f"{names} closed_at closed_reason"),
        **_times(connection),
        "out_since": connection.out_at,
    }


def _leak(leak: Leak) -> dict[str, Any]:
    return {
        **_fields(leak, "at owner_pid pid state action where fork_line"),
        "owner": leak.owner.id,
        "inheritor": leak.inheritor.id,
        **_fields(leak.connection, "connection_id pool fd server_pid"),
        "open_transaction": leak.open,
        **_fields(leak, "refused replaced_by replaced_by_server_pid fields"),
    }


def _unmatched(fork: UnmatchedFork) -> dict[str, Any]:
    return {**_fields(fork, "at pool fork_line idle checked_out in_transaction"), "owner": fork.owner.id}


def _fork_line(line: ForkLine) -> dict[str, Any]:
    return {"fork_line": line.line, "leaks": line.crossed, "open_transaction_leaks": line.open}


def _longest(wait: Wait) -> dict[str, Any]:
    return {
        **_fields(wait, "seconds at where fields"),
        "process": wait.connection.process.id,
        **_fields(wait.connection, "connection_id pool"),
    }


def _not_returned(connection: Connection, summary: Summary) -> dict[str, Any]:
    return {
        **_fields(connection, "connection_id pool server_pid where"),
        "process": connection.process.id,
        "since": connection.out_at,
        "seconds": round(summary.held(connection), 6),
    }


def _timeout(timeout: Timeout) -> dict[str, Any]:
    return {
        **_fields(timeout, "at pool size overflow checked_out fields"),
        "process": timeout.process.id,
        "seconds": timeout.wait,
    }


def _over_maximum(over: OverMaximum) -> dict[str, Any]:
    return {
        **_fields(over, "at pool processes maximum server_max_connections"),
        "process": over.process.id,
    }


def _place(place: Place) -> dict[str, Any]:
    return _fields(place, "where count longest hold_warning last_at")
