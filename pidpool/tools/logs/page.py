"""The summary as one self-contained HTML page: a lane for each process, a bar for each checkout, forks as
branches, leaks in red. Its parts are page.html, page.css and page.js beside this file.

All data goes into the page as JSON that can't end its script element, and from there into its text only by
``textContent``. A policy in the page forbids every request and every script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from string import Template
from typing import Any

from pidpool.tools.logs.document import foreign, totals
from pidpool.tools.logs.findings import Leak
from pidpool.tools.logs.processes import Connection, Process
from pidpool.tools.logs.reading import Source
from pidpool.tools.logs.summary import Summary
from pidpool.tools.text import count
from pidpool.tools.tree import walk

MOST_BARS = 4_000
MOST_LANES = 200
MOST_LEAKS = 1_000
MOST_OUT = 500


def render(summary: Summary, sources: Sequence[Source]) -> str:
    """Return the page."""
    data = json.dumps(_data(summary, sources), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    # JSON has these characters in strings only, and there the escape means the same.
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    style, script = _part("page.css"), _part("page.js")
    return Template(_part("page.html")).substitute(
        style=style, style_hash=_hash(style), script=script, script_hash=_hash(script), data=data
    )


def _part(name: str) -> str:
    return resources.files("pidpool.tools.logs").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _data(summary: Summary, sources: Sequence[Source]) -> dict[str, Any]:
    shown = _shown_lanes(summary)
    lanes = {id(process): number for number, (process, _) in enumerate(shown)}
    leaks = sorted(summary.leaks, key=lambda leak: (not leak.open, leak.at))
    leaks = [leak for leak in leaks if {id(leak.owner), id(leak.inheritor)} <= lanes.keys()][:MOST_LEAKS]
    unmatched = [fork for fork in summary.unmatched.listed() if id(fork.owner) in lanes]
    unmatched = sorted(unmatched, key=lambda fork: not fork.open)[:MOST_LEAKS]
    bars = [
        _bar(lanes[id(hold.connection.process)], hold.connection, hold.at - hold.seconds, hold.at,
             hold.wait, hold.where, hold.fields)
        for hold in summary.holds.first(MOST_BARS)
        if id(hold.connection.process) in lanes
    ]  # fmt: skip
    out = summary.not_returned()
    bars += [
        _bar(lanes[id(each.process)], each, each.out_at or 0.0, None, each.out_wait, each.where, {})
        for each in out[:MOST_OUT]
        if id(each.process) in lanes
    ]
    timeouts = [
        [lanes[id(each.process)], each.at - each.wait, each.wait, each.size, each.overflow, each.checked_out]
        for each in summary.timeouts
        if id(each.process) in lanes
    ]
    sums = totals(summary)
    crossed = len(leaks) + sum(fork.connections for fork in unmatched)
    return {
        "files": [source.name for source in sources][:20],
        "moreFiles": max(0, len(sources) - 20),
        "from": summary.first_at,
        "to": summary.last_at if summary.first_at is not None else None,
        "events": summary.events,
        "foreign": foreign(summary, sources),
        "processes": len(summary.processes.all) + summary.processes.left_out,
        "checkouts": sums.get("checkouts", 0),
        "opened": sums.get("opened", 0),
        "timedOut": summary.timed_out,
        "notReturned": len(out),
        "longestWait": max((each.seconds for each in summary.waits.first(1)), default=None),
        "longestHold": max((each.seconds for each in summary.holds.first(1)), default=None),
        "leakCount": summary.crossed,
        "openLeakCount": summary.open_leaks,
        "lanes": [_lane(process, depth, lanes) for process, depth in shown],
        "bars": bars,
        "leaks": [_leak(leak, lanes) for leak in leaks],
        "unmatchedForks": [
            [
                lanes[id(fork.owner)],
                fork.at,
                fork.pool,
                fork.idle,
                fork.checked_out,
                fork.in_transaction,
                fork.state,
                fork.fork_line,
            ]
            for fork in unmatched
        ],
        "forkLines": [[each.line, each.crossed, each.open] for each in summary.fork_lines()],
        "timeouts": timeouts,
        "leftOut": _left_out(summary, sums, len(shown), len(bars), crossed, len(timeouts)),
    }


def _shown_lanes(summary: Summary) -> list[tuple[Process, int]]:
    """Return the processes that get a lane with their depth in the tree, parents before children.

    If there are too many: those with open leaks first, then those with leaks, then the earliest; each with
    all its ancestors.
    """
    rank = {id(process): 2 for process in summary.processes.all}
    for leak in summary.leaks:
        for process in (leak.owner, leak.inheritor):
            rank[id(process)] = min(rank.get(id(process), 2), 0 if leak.open else 1)
    wanted: set[int] = set()
    for process in sorted(summary.processes.all, key=lambda each: (rank[id(each)], each.first_at)):
        line = []
        at: Process | None = process
        while at is not None and id(at) not in wanted:
            line.append(id(at))
            at = at.parent
        if len(wanted) + len(line) <= MOST_LANES:
            wanted.update(line)
    lines = walk(summary.processes.roots(), Process.children_by_age)
    return [(process, len(place)) for place, process in lines if id(process) in wanted]


def _lane(process: Process, depth: int, lanes: dict[int, int]) -> dict[str, Any]:
    use = process.use()
    return {
        "id": process.id,
        "depth": depth,
        "parent": None if process.parent is None else lanes[id(process.parent)],
        "forked": process.adopted_at,
        "noticedBy": process.trigger,
        "from": process.first_at,
        "to": process.until(),
        "pools": list(process.pools),
        "checkouts": use.checkouts,
        "longestWait": use.wait_max,
        "longestHold": use.use_max,
        "opened": process.opened,
        "closed": sum(process.closed.values()),
        "inherited": sum(process.inherited.values()),
        "replaced": process.replaced,
        "refused": process.refused,
        "overdue": process.overdue,
        "timedOut": process.timeouts,
    }


def _bar(
    lane: int, connection: Connection, start: float, end: float | None, wait: float, where: str | None,
    fields: dict[str, str],
) -> list[Any]:  # fmt: skip
    return [lane, round(start, 6), end, connection.connection_id, connection.server_pid, connection.pool,
            wait, where, fields]  # fmt: skip


def _leak(leak: Leak, lanes: dict[int, int]) -> dict[str, Any]:
    return {
        "at": leak.at,
        "owner": lanes[id(leak.owner)],
        "inheritor": lanes[id(leak.inheritor)],
        "connection": leak.connection.connection_id,
        "pool": leak.connection.pool,
        "fd": leak.connection.fd,
        "serverPid": leak.connection.server_pid,
        "state": leak.state,
        "open": leak.open,
        "outcome": leak.outcome,
        "where": leak.where,
        "forkLine": leak.fork_line,
        "fields": leak.fields,
    }


def _left_out(
    summary: Summary, sums: dict[str, Any], lanes: int, bars: int, leaks: int, timeouts: int
) -> list[str]:
    """Return, in words, what the page does not show."""
    said = []
    processes = len(summary.processes.all) + summary.processes.left_out - lanes
    if processes:
        said.append(
            f"{count(processes, 'process', 'processes')}: those with leaks are shown first, then the oldest"
        )
    checkouts = sums.get("checkouts", 0) - bars
    if checkouts > 0 and bars:
        said.append(f"{count(checkouts, 'checkout')}: the longest are shown")
    hidden = summary.crossed - leaks
    if hidden:
        said.append(f"{count(hidden, 'leak')}: those with an open transaction are shown first")
    if summary.timed_out > timeouts:
        said.append(f"{count(summary.timed_out - timeouts, 'timeout')}: the newest are shown")
    return said
