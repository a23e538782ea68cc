"""The summary as one JSON document, for programs. Its shape is stable: fields are added, and a field that
means something else gets another name and the document another `SCHEMA`.

Times are seconds since the epoch, durations seconds, null is "not known". A process is named by its
``id``: its pid, or ``<pid>#<n>`` for the n-th process with that pid; ``others`` are those for which there
was no room.

``schema``, ``files``, ``lines``, ``events``, ``foreign_lines``, ``first_at``, ``last_at``
``open_transaction_leaks``: what ``--check`` looks at
``totals``: opened, closed (by reason), checkouts, checkins, invalidations, timeouts, overdue,
    returned_late, forks, inherited (by state), severed, kept, replaced, refused, disposed
``processes``: id, pid, parent (an id), forked_at, noticed_by, connects_in_flight, first_at, last_at, pools,
    the totals of the process, wait and use (count, sum, max), create_time_max, connections_left_out and its
    connections: connection_id, pool, fd, server_pid, opened_at, create_time, checkouts, checkins, wait, use,
    invalidations, closed_at, closed_reason, out_since
``leaks``: at, owner and inheritor (ids), owner_pid, pid, connection_id, pool, fd, server_pid, state, action,
    open_transaction, where, refused, replaced_by, replaced_by_server_pid, fields (the user's own)
``unheard_forks``: at, owner (an id), pool, idle, checked_out, in_transaction: forks that the parent tells of
    and no child; what crossed them is in open_transaction_leaks too
``longest_waits``, ``longest_holds``: seconds, at, process, connection_id, pool, where, fields
``not_returned``: process, connection_id, pool, server_pid, since, seconds, where
``timeouts``: at, process, pool, seconds, size, overflow, checked_out, fields; the newest
``over_maximum``: at, process, pool, processes, maximum, server_max_connections; the newest
``overdue``: where, count, longest, hold_warning, last_at
``left_out``: how many leaks (unheard ones as well), processes, connections, timeouts, not_returned and
    overdue checkouts are counted above without being listed
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pidpool.tools.logs.findings import Leak, Place, Timeout, Wait
from pidpool.tools.logs.processes import Connection, Process, Use
from pidpool.tools.logs.reading import Source
from pidpool.tools.logs.summary import Summary

SCHEMA = 1

MOST_NOT_RETURNED = 1_000


def document(summary: Summary, sources: Sequence[Source], top: int = 10) -> dict[str, Any]:
    """Return the summary as dicts, lists, strings and numbers.

    :param top: how many of the longest waits and holds are listed.
    """
    processes = list(summary.processes)
    out = summary.not_returned()
    unheard = summary.unheard_left_out
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
        "unheard_forks": [
            {
                "at": fork.at,
                "owner": fork.owner.id,
                "pool": fork.pool,
                "idle": fork.idle,
                "checked_out": fork.checked_out,
                "in_transaction": fork.in_transaction,
            }
            for fork in summary.unheard_forks()
        ],
        "longest_waits": _longest(summary.waits.first(top)),
        "longest_holds": _longest(summary.holds.first(top)),
        "not_returned": [
            {
                "process": connection.process.id,
                "connection_id": connection.connection_id,
                "pool": connection.pool,
                "server_pid": connection.server_pid,
                "since": connection.out_at,
                "seconds": round(summary.held(connection), 6),
                "where": connection.where,
            }
            for connection in out[:MOST_NOT_RETURNED]
        ],
        "timeouts": [_timeout(timeout) for timeout in summary.timeouts],
        "over_maximum": [{**each._asdict(), "process": each.process.id} for each in summary.over_maximum],
        "overdue": [_place(place) for place in places(summary)],
        "left_out": {
            "leaks": summary.leaks_left_out + unheard.idle + unheard.checked_out,
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
    actions = summary.leaks_by_action
    return {**found, "severed": actions.get("severed", 0), "kept": actions.get("kept", 0)}


def _counts(process: Process) -> dict[str, Any]:
    use = process.use()
    return {
        "opened": process.opened,
        "closed": dict(process.closed),
        "checkouts": use.checkouts,
        "checkins": use.checkins,
        "invalidations": process.invalidations,
        "timeouts": process.timeouts,
        "overdue": process.overdue,
        "returned_late": process.returned_late,
        "forks": process.forks,
        "inherited": dict(process.inherited),
        "replaced": process.replaced,
        "refused": process.refused,
        "disposed": process.disposed,
    }


def _process(process: Process) -> dict[str, Any]:
    return {
        "id": process.id,
        "pid": process.pid or None,
        "parent": None if process.parent is None else process.parent.id,
        "forked_at": process.adopted_at,
        "noticed_by": process.trigger,
        "connects_in_flight": process.connects_in_flight,
        "first_at": process.first_at,
        "last_at": process.until(),
        "pools": list(process.pools),
        **_counts(process),
        **_times(process.use()),
        "create_time_max": process.create_max,
        "connections": [_connection(connection) for connection in process.connections.values()],
        "connections_left_out": process.connections_left_out,
    }


def _times(use: Use) -> dict[str, Any]:
    return {
        "wait": {"count": use.checkouts, "sum": round(use.wait_sum, 6), "max": use.wait_max},
        "use": {"count": use.checkins, "sum": round(use.use_sum, 6), "max": use.use_max},
    }


def _connection(connection: Connection) -> dict[str, Any]:
    return {
        "connection_id": connection.connection_id,
        "pool": connection.pool,
        "fd": connection.fd,
        "server_pid": connection.server_pid,
        "opened_at": connection.opened_at,
        "create_time": connection.create_time,
        "checkouts": connection.checkouts,
        "checkins": connection.checkins,
        **_times(connection),
        "invalidations": connection.invalidations,
        "closed_at": connection.closed_at,
        "closed_reason": connection.closed_reason,
        "out_since": connection.out_at,
    }


def _leak(leak: Leak) -> dict[str, Any]:
    return {
        "at": leak.at,
        "owner": leak.owner.id,
        "inheritor": leak.inheritor.id,
        "owner_pid": leak.owner_pid,
        "pid": leak.pid,
        "connection_id": leak.connection.connection_id,
        "pool": leak.connection.pool,
        "fd": leak.connection.fd,
        "server_pid": leak.connection.server_pid,
        "state": leak.state,
        "action": leak.action,
        "open_transaction": leak.open,
        "where": leak.where,
        "refused": leak.refused,
        "replaced_by": leak.replaced_by,
        "replaced_by_server_pid": leak.replaced_by_server_pid,
        "fields": leak.fields,
    }


def _longest(longest: list[Wait]) -> list[dict[str, Any]]:
    return [
        {
            "seconds": each.seconds,
            "at": each.at,
            "process": each.connection.process.id,
            "connection_id": each.connection.connection_id,
            "pool": each.connection.pool,
            "where": each.where,
            "fields": each.fields,
        }
        for each in longest
    ]


def _timeout(timeout: Timeout) -> dict[str, Any]:
    return {
        "at": timeout.at,
        "process": timeout.process.id,
        "pool": timeout.pool,
        "seconds": timeout.wait,
        "size": timeout.size,
        "overflow": timeout.overflow,
        "checked_out": timeout.checked_out,
        "fields": timeout.fields,
    }


def _place(place: Place) -> dict[str, Any]:
    return {
        "where": place.where,
        "count": place.count,
        "longest": place.longest,
        "hold_warning": place.hold_warning,
        "last_at": place.last_at,
    }
