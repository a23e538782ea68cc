"""``pidpool top``: a live view of a stats endpoint in the terminal, the family as a tree. The answers are
read in tools/top/client.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pidpool.cli.options import interval as interval_option
from pidpool.terms import OPEN_STATES
from pidpool.tools.text import age, duration, printable
from pidpool.tools.top.client import Family, Member, Rates, StatsUnavailable, Tally, fetch, rates, stats_url
from pidpool.tools.tree import branch, walk

UNAVAILABLE = 1
"""The exit status if the first request gets no stats."""

_WIDE = 110
"""Columns; a terminal at least as wide also shows what each process inherited."""


@click.command(epilog="\b\nExample:\n  pidpool top --interval 5 http://127.0.0.1:9432/")
@click.argument("url")
@interval_option("How long to wait between two requests.")
@click.option(
    "--token",
    envvar="PIDPOOL_TOKEN",
    metavar="TOKEN",
    help="The endpoint's bearer token. Better given in PIDPOOL_TOKEN: other users see a command's options.",
)
@click.option("--once", is_flag=True, help="Print one answer and exit; also the default without a terminal.")
def command(url: str, interval: float, token: str | None, once: bool) -> None:
    """Watch a stats endpoint in the terminal.

    URL is the address of serve_stats() or StatsApp, such as http://127.0.0.1:9432/. Rates and times are
    those of the last interval; with --once, those since the start. Ctrl-C ends.

    Exit status: 0; 1 if the first request gets no stats; 2 if URL is no address of HTTP.
    """
    try:
        address = stats_url(url)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="URL") from None
    if token is not None:
        token = token.strip()
        if not (token.isascii() and token.isprintable()):
            raise click.BadParameter("has characters that no bearer token may have", param_hint="--token")
    console = Console(highlight=False, emoji=False, markup=False)
    try:
        families = fetch(address, token)
        if once or not sys.stdout.isatty() or console.is_dumb_terminal:
            console.print(_shown(families, {}, console.width, None))
        else:
            _watch(console, address, token, interval, families)
    except StatsUnavailable as error:
        click.echo(f"pidpool top: {printable(str(error))}", err=True)
        sys.exit(UNAVAILABLE)
    except KeyboardInterrupt:
        pass


def _watch(
    console: Console, address: str, token: str | None, interval: float, families: Sequence[Family]
) -> None:
    before: Mapping[str, Family] = {}
    answered, failure = time.monotonic(), ""
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            view = _shown(families, before, console.width, console.height)
            live.update(Group(_heading(address, interval, answered, failure), view), refresh=True)
            time.sleep(interval)
            try:
                latest = fetch(address, token)
            except StatsUnavailable as error:
                failure = printable(str(error))
            else:
                before = {family.pool: family for family in families}
                families, answered, failure = latest, time.monotonic(), ""


def _heading(address: str, interval: float, answered: float, failure: str) -> Text:
    clock = time.strftime("%H:%M:%S")
    if failure:
        seconds = time.monotonic() - answered
        return Text(f"{clock}, STALE: this is {age(seconds)} old. {failure}.\n", "bold red")
    return Text(f"{clock}, every {interval:g} s; Ctrl-C ends. {address}\n", "dim")


def _shown(
    families: Sequence[Family], before: Mapping[str, Family], width: int, height: int | None
) -> RenderableType:
    if not families:
        return Text("The endpoint has no pool.")
    # A family takes 9 lines besides its processes, 10 with a limit, and the heading 2.
    lines = 9 + any(family.limit is not None for family in families)
    rows = None if height is None else max(1, (height - 2) // len(families) - lines)
    return Group(*(_family(family, before.get(family.pool), width, rows) for family in families))


def _family(family: Family, before: Family | None, width: int, rows: int | None) -> RenderableType:
    seconds = family.taken_at - before.taken_at if before else None
    now = rates(family.tally, before.tally if before else None, seconds, family.bounds)
    facts = Table.grid(padding=(0, 2))
    facts.add_row("  connections", _connections(family))
    if family.limit is not None:
        facts.add_row("  family limit", _limit(family, family.limit))
    facts.add_row("  checkouts", _checkouts(now))
    facts.add_row("  inherited", _inherited(family.tally))
    facts.add_row("  of them", _leaks(family.tally))
    return Group(_title(family), facts, Text(), _processes(family, before, seconds, width, rows), Text())


def _title(family: Family) -> Text:
    running = sum(member.alive for member in family.members)
    ended = len(family.members) - running + family.departed
    title = Text(f"pool {printable(family.pool)}", "bold")
    title.append(f"  {running} running, {ended} ended", "not bold")
    if family.unlisted:
        title.append(f"; {family.unlisted} more found no room in the family's memory", "yellow")
    return title


def _connections(family: Family) -> Text:
    line = Text(f"{family.idle} idle, {family.used} used, ")
    line.append(f"{family.waiting} waiting", "bold yellow" if family.waiting else "")
    server = family.server_max_connections
    most = "without limit" if family.maximum is None else f"at most {family.maximum}"
    if server is None:
        line.append(f"; {most}")
    elif family.maximum is None or family.maximum > server:
        line.append(f"; {most}; the server allows only {server}", "bold red")
    else:
        line.append(f"; {most}; the server allows {server}")
    return line


def _limit(family: Family, limit: int) -> Text:
    line = Text(f"{family.permits} of {limit} taken, ")
    line.append(f"{family.wanting} wanted", "bold yellow" if family.wanting else "")
    line.append(f", {family.given_back} given back")
    return line


def _checkouts(now: Rates) -> Text:
    if now.seconds is None:
        counts = f"{now.checkouts} so far, {now.opened} opened, "
    else:
        counts = f"{_rate(now.per_second(now.checkouts))}/s, {_rate(now.per_second(now.opened))}/s opened, "
    line = Text(counts)
    line.append(f"{now.timeouts} timed out", "bold red" if now.timeouts else "")
    line.append(f"; p99 wait {_seconds(now.wait_p99)}, use {_seconds(now.use_p99)}")
    return line


def _inherited(tally: Tally) -> Text:
    line = Text(f"{sum(tally.inherited.values())} by {tally.forks} forks")
    states = ", ".join(f"{count} {printable(state)}" for state, count in tally.inherited.items() if count)
    if states:
        risky = sum(tally.inherited.get(state, 0) for state in OPEN_STATES)
        line.append(f": {states}", "yellow" if risky else "")
    return line


def _leaks(tally: Tally) -> Text:
    line = Text(f"{tally.severed} severed, {tally.kept} kept, {tally.replaced} replaced, ")
    line.append(f"{tally.refused} refused", "yellow" if tally.refused else "")
    return line


def _processes(
    family: Family, before: Family | None, seconds: float | None, width: int, rows: int | None
) -> RenderableType:
    earlier = {(member.pid, member.since): member for member in before.members} if before else {}
    wide = width >= _WIDE
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("  process", no_wrap=True)
    numbers = ["idle", "used", "waiting", "overflow", "max", "checkouts" if before is None else "checkouts/s"]
    for name in [*numbers, *(["wait p99", "inherited", "severed", "replaced", "refused"] if wide else [])]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("age", justify="right", no_wrap=True)
    lines = list(_tree(family.members))
    for before_name, member in lines[:rows]:
        old = earlier.get((member.pid, member.since))
        now = rates(member.tally, old.tally if old else None, seconds, family.bounds)
        table.add_row(*_row(before_name, member, now, before is not None, wide, family.taken_at))
    left_out = len(lines[rows:]) if rows is not None else 0
    if not left_out:
        return table
    return Group(table, Text(f"  … and {left_out} more, for which this terminal is too low", "dim"))


def _row(before_name: str, member: Member, now: Rates, live: bool, wide: bool, at: float) -> list[Text]:
    name = Text(f"  {before_name}{member.pid}" + ("" if member.alive else " ended"))
    if not member.alive:
        name.stylize("dim")
        return [name]
    checkouts = _rate(now.per_second(now.checkouts)) if live else str(now.checkouts)
    tally = member.tally
    cells = [
        name,
        Text(str(member.idle)),
        Text(str(member.used)),
        Text(str(member.waiting), "bold yellow" if member.waiting else ""),
        # Counted from minus pool_size, as QueuePool does; below zero there is no overflow.
        Text(str(max(0, member.overflow))),
        Text("–" if member.maximum is None else str(member.maximum)),
        Text(checkouts),
    ]
    if wide:
        leaks = (sum(tally.inherited.values()), tally.severed, tally.replaced, tally.refused)
        cells += [Text(_seconds(now.wait_p99)), *(Text(str(count)) for count in leaks)]
    return [*cells, Text(age(at - member.since))]


def _tree(members: Sequence[Member]) -> Iterator[tuple[str, Member]]:
    """Yield the processes with the branches before them; an ended one only if a descendant runs."""
    # Of several processes that had one pid in turn, the running one.
    by_pid = {member.pid: member for member in sorted(members, key=lambda member: member.alive)}
    shown: set[int] = set()
    for member in by_pid.values():
        ancestor: Member | None = member if member.alive else None
        while ancestor is not None and ancestor.pid not in shown:
            shown.add(ancestor.pid)
            ancestor = by_pid.get(ancestor.parent_pid or 0)
    roots: list[Member] = []
    children: dict[int, list[Member]] = {}
    for member in members:
        if by_pid[member.pid] is member and member.pid in shown:
            siblings = children.setdefault(member.parent_pid, []) if member.parent_pid in by_pid else roots
            siblings.append(member)
    for place, member in walk(roots, lambda member: children.get(member.pid, [])):
        yield branch(place), member


def _rate(rate: float | None) -> str:
    if rate is None:
        return "–"
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds == float("inf"):
        return "over 30 s"
    return duration(seconds)
