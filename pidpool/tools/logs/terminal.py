"""The summary for a terminal, readable at 80 columns: what is wrong first, then the processes.

Every value of a log has been through clean.py, and is never taken for rich's markup.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text
from rich.tree import Tree

from pidpool.terms import OPEN_STATES
from pidpool.tools.logs.clean import cleaned
from pidpool.tools.logs.document import foreign, places, totals
from pidpool.tools.logs.findings import Leak, Longest
from pidpool.tools.logs.processes import Connection, Process
from pidpool.tools.logs.reading import Source
from pidpool.tools.logs.summary import Summary
from pidpool.tools.logs.unmatched import UnmatchedFork
from pidpool.tools.text import clock, count, day, duration
from pidpool.tools.tree import breadth_first, walk

MOST_PROCESSES = 40
MOST_CONNECTIONS = 5
"""Of one process."""
MOST_LEAKS = 20
MOST_FORK_LINES = 10

_HEADING = "bold"
_FAINT = "dim"
_BAD = "bold red"
_WARN = "yellow"


def render(summary: Summary, sources: Sequence[Source], width: int, colour: bool, top: int = 10) -> str:
    """Return the whole summary as text.

    :param width: columns.
    :param colour: whether to use a terminal's colours.
    :param top: how many of the longest are shown.
    """
    console = Console(
        file=io.StringIO(), width=width, force_terminal=colour, color_system="auto" if colour else None
    )
    console.print(_facts(summary, sources), soft_wrap=False)
    if summary.first_at is None:
        return _text_of(console)
    _print_leaks(console, summary)
    _print_processes(console, summary)
    _print_longest(console, summary, "Longest waits for a connection", summary.waits, top)
    _print_longest(console, summary, "Longest holds", summary.holds, top)
    _print_not_returned(console, summary, top)
    _print_timeouts(console, summary, top)
    _print_over_maximum(console, summary, top)
    _print_overdue(console, summary, top)
    return _text_of(console)


def _text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return "".join(line.rstrip() + "\n" for line in console.file.getvalue().splitlines())


def _facts(summary: Summary, sources: Sequence[Source]) -> Text:
    files = sources[0].name if len(sources) == 1 else count(len(sources), "file")
    others = foreign(summary, sources)
    text = Text.assemble((cleaned(files) or "", _HEADING), f": {count(summary.events, 'event')}")
    if others:
        text.append(f", {count(others, 'other line')}")
    text.append("\n")
    if summary.first_at is None:
        text.append(
            "No events of pidpool. They are read as JSON lines (structlog's JSONRenderer);\n"
            "checkouts are logged at level DEBUG, forks and connections at INFO.",
            _WARN,
        )
        return text
    first, last = summary.first_at, summary.last_at
    text.append(
        f"{day(first)} {clock(first)} to {clock(last, first)} UTC ({duration(last - first)})\n", _FAINT
    )
    sums = totals(summary)
    processes = len(summary.processes.all) + summary.processes.left_out
    text.append(
        f"{count(processes, 'process', 'processes')}, {count(sums.get('opened', 0), 'connection')} opened, "
        f"{count(sums.get('checkouts', 0), 'checkout')}"
    )
    return text


def _heading(console: Console, title: str, style: str = _HEADING) -> None:
    console.print()
    console.print(Text(title, style))


def _indented(console: Console, text: Text) -> None:
    for line in text.split("\n"):
        spaces = len(line.plain) - len(line.plain.lstrip())
        # As padding, so that wrapped lines stay indented.
        console.print(Padding(line[spaces:], (0, 0, 0, 2 + spaces)))


# -- leaks


def _print_leaks(console: Console, summary: Summary) -> None:
    total, unsafe = summary.crossed, summary.open_leaks
    if not total:
        _heading(console, "No connection crossed a fork", "bold green")
        return
    title = f"{count(total, 'connection')} crossed a fork"
    if unsafe:
        _heading(console, f"{title}, {unsafe:,} with an open transaction", _BAD)
    else:
        _heading(console, f"{title}, none with an open transaction")
    found: list[Leak | UnmatchedFork] = [*summary.leaks, *summary.unmatched.listed()]
    found.sort(key=lambda each: (not each.open, each.at))
    for each in found[:MOST_LEAKS]:
        _indented(console, _leak(each, summary) if isinstance(each, Leak) else _unmatched(each, summary))
    more = max(0, len(found) - MOST_LEAKS) + summary.leaks_left_out
    if more:
        states = ", ".join(f"{number:,} {state}" for state, number in sorted(summary.leaks_by_state.items()))
        _indented(console, Text(f"and {more:,} more (see --json); by state: {states}", _FAINT))
    _print_fork_lines(console, summary)


def _print_fork_lines(console: Console, summary: Summary) -> None:
    lines = summary.fork_lines()
    if not any(line.line for line in lines):
        return
    _heading(console, "Connections that crossed a fork, by the line that forked")
    for line in lines[:MOST_FORK_LINES]:
        text = Text(f"{line.crossed:>9,}×")
        if line.open:
            text.append(f"  {line.open:,} with an open transaction", _BAD)
        called = (line.line or "an unknown line").replace(" < ", f"\n{'':12}called at ")
        _indented(console, text.append(f"\n{'':12}{called}"))
    _print_rest(console, len(lines) - MOST_FORK_LINES)


def _unmatched(fork: UnmatchedFork, summary: Summary) -> Text:
    text = Text.assemble(
        (clock(fork.at, summary.first_at), _FAINT),
        f"  pid {fork.owner.id} → a child without events",
        (f"  {fork.pool}" if fork.pool else "", _FAINT),
        "\n  ",
    )
    states = [
        Text(f"{number:,} {state}", _BAD if state in OPEN_STATES else "")
        for state, number in fork.by_state().items()
    ]
    text.append_text(Text("; ").join(states))
    if fork.fork_line is not None:
        text.append(f"\n  forked at {_nearest(fork.fork_line)}")
    return text


def _leak(leak: Leak, summary: Summary) -> Text:
    connection = leak.connection
    text = Text.assemble(
        (clock(leak.at, summary.first_at), _FAINT),
        f"  {connection.connection_id}  pid {leak.owner.id} → pid {leak.inheritor.id}",
        (f"  fd {_or_unknown(connection.fd)}, server pid {_or_unknown(connection.server_pid)}", _FAINT),
        "\n  ",
        (leak.state, _BAD if leak.open else ""),
        f"; {leak.outcome}",
    )
    if leak.where is not None:
        text.append(f"\n  checked out at {leak.where}")
    if leak.fork_line is not None:
        text.append(f"\n  forked at {_nearest(leak.fork_line)}")
    return _with_fields(text, leak.fields, "\n  ")


def _nearest(fork_line: str) -> str:
    """Return the line that forked, without its callers."""
    return fork_line.partition(" < ")[0]


# -- processes


def _print_processes(console: Console, summary: Summary) -> None:
    _heading(console, "Processes")
    roots = summary.processes.roots()
    shown = set(breadth_first(roots, Process.children_by_age, MOST_PROCESSES))
    trees: dict[Process, Tree] = {}
    hidden: Counter[Process | None] = Counter()  # by the nearest ancestor that is shown
    nearest: dict[Process, Process | None] = {}
    for _, process in walk(roots, Process.children_by_age):
        parent = process.parent
        if process not in shown:
            nearest[process] = nearest.get(parent, parent) if parent else None
            hidden[nearest[process]] += 1
            continue
        name = _process(process, summary)
        trees[process] = Tree(name, guide_style=_FAINT) if parent is None else trees[parent].add(name)
        _add_connections(trees[process], process, summary)
    for process, tree in trees.items():
        if hidden[process]:
            tree.add(Text(f"and {count(hidden[process], 'more process', 'more processes')}", _FAINT))
    for root in roots:
        if root in trees:
            console.print(Padding(trees[root], (0, 0, 0, 2)))
    if hidden[None]:
        _indented(console, Text(f"and {count(hidden[None], 'more process', 'more processes')}", _FAINT))
    total = len(summary.processes.all) + summary.processes.left_out
    if total > len(shown):
        _indented(console, Text(f"{len(shown):,} of {total:,} processes are shown (see --json)", _FAINT))


def _process(process: Process, summary: Summary) -> Text:
    text = Text.assemble((f"pid {process.id}", _HEADING))
    if process.adopted_at is not None:
        noticed = f" (noticed by {process.trigger})" if process.trigger else ""
        text.append(f"  forked {clock(process.adopted_at, summary.first_at)}{noticed}")
    if not process.has_events:
        text.append("  no events of its own", _FAINT)
        return text
    if process.pools:
        text.append(f"  {', '.join(process.pools)}", _FAINT)
    use = process.use()
    did = [count(use.checkouts, "checkout")] if use.checkouts else []
    if use.checkouts:
        hold = f", hold {duration(use.use_max)}" if use.checkins else ""
        did.append(f"longest wait {duration(use.wait_max)}{hold}")
    if did:
        text.append("\n" + "; ".join(did))
    life = [f"opened {process.opened:,}"] if process.opened else []
    if process.closed:
        life.append(
            "closed " + ", ".join(f"{number:,} {reason}" for reason, number in process.closed.items())
        )
    if life:
        text.append("\n" + "; ".join(life))
    harm = []
    if process.inherited:
        states = ", ".join(f"{number:,} {state}" for state, number in process.inherited.items())
        harm.append(f"inherited {states}")
    for number, word in (
        *((number, f"connects failed ({error})") for error, number in process.failed.items()),
        (process.replaced, "replaced"),
        (process.refused, "refused"),
        (process.invalidations, "invalidated"),
        (process.timeouts, "timed out"),
        (process.overdue, "overdue"),
        (process.connects_in_flight, "connects in flight at the fork"),
    ):
        if number:
            harm.append(f"{number:,} {word}")
    if harm:
        text.append("\n" + "; ".join(harm), _WARN)
    return text


def _add_connections(branch: Tree, process: Process, summary: Summary) -> None:
    connections = sorted(
        process.connections.values(),
        key=lambda each: (each.out_at is None, -each.checkouts, each.opened_at),
    )
    for connection in connections[:MOST_CONNECTIONS]:
        branch.add(_connection(connection, summary))
    left = len(connections) - MOST_CONNECTIONS + process.connections_left_out
    if left > 0:
        branch.add(Text(f"and {count(left, 'more connection')}", _FAINT))


def _connection(connection: Connection, summary: Summary) -> Text:
    text = Text(connection.connection_id)
    if connection.checkouts:
        held = f", held {duration(connection.use_sum)}" if connection.checkins else ""
        text.append(f"  {count(connection.checkouts, 'checkout')}{held}")
    text.append(f"  server pid {_or_unknown(connection.server_pid)}", _FAINT)
    if connection.closed_reason is not None:
        text.append(f"  {connection.closed_reason}", _FAINT)
    elif connection.out_at is not None:
        text.append(f"  out {clock(connection.out_at, summary.first_at)}", _WARN)
    return text


# -- waits, holds, timeouts


def _print_longest(console: Console, summary: Summary, title: str, longest: Longest, top: int) -> None:
    if not len(longest):
        return
    _heading(console, title)
    for each in longest.first(top):
        text = Text.assemble(
            f"{duration(each.seconds):>10}",
            (f"  {clock(each.at - each.seconds, summary.first_at)}", _FAINT),
            f"  {each.connection.connection_id}",
        )
        if each.connection.process.number > 1:
            text.append(f" (pid {each.connection.process.id})")
        if each.where is not None:
            text.append(f"\n{'':12}{each.where}")
        _indented(console, _with_fields(text, each.fields, "  "))


def _print_not_returned(console: Console, summary: Summary, top: int) -> None:
    out = summary.not_returned()
    if not out:
        return
    _heading(console, f"{count(len(out), 'checkout')} not returned by the end of the log", _WARN)
    for connection in out[:top]:
        text = Text.assemble(
            f"{duration(summary.held(connection)):>10}",
            (f"  since {clock(connection.out_at or 0.0, summary.first_at)}", _FAINT),
            f"  {connection.connection_id}",
            (f"  server pid {_or_unknown(connection.server_pid)}", _FAINT),
        )
        if connection.where is not None:
            text.append(f"\n{'':12}{connection.where}")
        _indented(console, text)
    _print_rest(console, len(out) - top)


def _print_timeouts(console: Console, summary: Summary, top: int) -> None:
    if not summary.timed_out:
        return
    _heading(console, f"{count(summary.timed_out, 'checkout')} timed out", _WARN)
    for timeout in list(summary.timeouts)[-top:]:
        text = Text.assemble(
            f"{duration(timeout.wait):>10}",
            (f"  {clock(timeout.at - timeout.wait, summary.first_at)}", _FAINT),
            f"  pid {timeout.process.id}: size {_or_unknown(timeout.size)}, overflow "
            f"{_or_unknown(timeout.overflow)}, checked out {_or_unknown(timeout.checked_out)}",
        )
        _indented(console, _with_fields(text, timeout.fields, "  "))
    _print_rest(console, summary.timed_out - min(top, len(summary.timeouts)))


def _print_over_maximum(console: Console, summary: Summary, top: int) -> None:
    if not summary.over_maximum:
        return
    _heading(console, "Processes that may have more connections than their server allows", _WARN)
    for each in list(summary.over_maximum)[-top:]:
        text = Text.assemble(
            (clock(each.at, summary.first_at), _FAINT),
            f"  {each.pool}: {_or_unknown(each.processes)} processes, {_or_unknown(each.maximum)} "
            f"connections at most; the server allows {_or_unknown(each.server_max_connections)}",
        )
        _indented(console, text)
    _print_rest(console, len(summary.over_maximum) - top)


def _print_overdue(console: Console, summary: Summary, top: int) -> None:
    found = places(summary)
    total = sum(place.count for place in found) + summary.elsewhere.count
    if not found:
        return
    _heading(console, f"{count(total, 'checkout')} overdue, by the line that made them", _WARN)
    for place in found[:top]:
        _indented(
            console,
            Text(
                f"{place.count:>9,}×  longest {duration(place.longest)}, limit {duration(place.hold_warning)}"
                f"\n{'':12}{place.where or 'an unknown line'}"
            ),
        )
    _print_rest(console, len(found) - top)


def _print_rest(console: Console, rest: int) -> None:
    if rest > 0:
        _indented(console, Text(f"and {rest:,} more (see --json)", _FAINT))


def _with_fields(text: Text, fields: Mapping[str, str], before: str) -> Text:
    if fields:
        text.append(before + " ".join(f"{name}={value}" for name, value in fields.items()), _FAINT)
    return text


def _or_unknown(value: object) -> str:
    return "?" if value is None else str(value)


# -- while a log is followed

_SHOWN: Mapping[str, Iterable[str]] = {
    "connection.failed": ("error", "create_time"),
    "connection.inherited": ("owner_pid", "state", "action", "where", "forked_at"),
    "connection.replaced": ("owner_pid", "by"),
    "connection.refused": ("owner_pid", "state"),
    "connection.invalidated": ("soft", "error"),
    "checkout.timed_out": ("wait_time", "size", "overflow", "checked_out"),
    "checkout.overdue": ("held", "where"),
    "checkout.returned_late": ("use_time", "where"),
    "pool.forked": ("idle", "checked_out", "in_transaction", "forked_at"),
    "pool.adopted": ("parent_pid", "trigger", "idle", "checked_out", "in_transaction", "forked_at"),
    "pool.over_maximum": ("processes", "maximum", "server_max_connections"),
    "driver.unknown": ("driver", "has_descriptor"),
}


def line_of(event: Mapping[str, Any]) -> str:
    """Return one line for an event, for following a log."""
    name = event["event"]
    fields = [f"pid {event['pid']}", name]
    connection_id = cleaned(event.get("connection_id"))
    if connection_id is not None:
        fields.append(connection_id)
    shown = {key: cleaned(event.get(key)) for key in _SHOWN[name]}
    fields += [f"{key}={value}" for key, value in shown.items() if value is not None]
    return f"{clock(event['at'])}  {'  '.join(fields)}"
