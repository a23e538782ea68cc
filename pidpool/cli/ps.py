"""``pidpool ps``: shows which processes hold a database socket together, and what to do about it. The search
itself is in tools/ps/sockets.py.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Sequence

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.text import Text

from pidpool.cli.options import interval as interval_option
from pidpool.tools.ps import sockets
from pidpool.tools.ps.processes import Process
from pidpool.tools.ps.sockets import Holder, Owner, Scan, SharedSocket
from pidpool.tools.text import age, printable

FOUND = 1
"""The exit status of ``--check`` if there is a shared socket."""

UNABLE = 2
"""The exit status if nothing can be looked at; also click's own for a wrong usage."""

# In a line of 80 columns the program's name and its options matter more than its directory.
_PATH = re.compile(r"(?<!\S)/\S*/")


@click.command(epilog="\b\nExample:\n  pidpool ps --check 4125")
@click.argument("pids", metavar="[PID]...", type=click.IntRange(min=1), nargs=-1)
@click.option(
    "--port",
    "ports",
    type=click.IntRange(1, 65535),
    multiple=True,
    metavar="PORT",
    help="A further remote port that leads to a database; may be repeated.",
)
@click.option("--check", is_flag=True, help="Exit with 1 if such a socket is found.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --watch, one line for each scan.")
@click.option("--watch", is_flag=True, help="Repeat the scan until Ctrl-C.")
@interval_option("How long --watch waits between two scans.")
def command(
    pids: tuple[int, ...], ports: tuple[int, ...], check: bool, as_json: bool, watch: bool, interval: float
) -> None:
    """Find database sockets that several processes hold open.

    Looks at running processes from the outside, through /proc: nothing has to be changed in the
    application, and nothing is sent to the database. A process that holds a connection of another one
    can end its transaction or break its TLS. With PIDs, only sockets that these processes or their
    descendants hold are shown.

    A socket leads to a database if its remote port is a usual one of PostgreSQL, PgBouncer, MySQL, SQL
    Server or Oracle, or one given with --port, or if a database server on this machine holds its other
    end, on any port or unix socket.

    Sees the processes of its own user; as root, all. Linux only.

    Exit status: 0; 1 with --check if such a socket is found; 2 if a PID does not exist or, with --check
    and no such socket found, could not be looked into.
    """
    if sys.platform != "linux":
        click.echo(f"pidpool ps: needs the /proc of Linux; this is {sys.platform}", err=True)
        sys.exit(UNABLE)
    if not os.path.exists("/proc/self/stat"):
        click.echo("pidpool ps: /proc is not there; mount it (mount -t proc proc /proc)", err=True)
        sys.exit(UNABLE)
    if check and watch:
        raise click.UsageError("--check scans once and --watch does not end; leave one out")
    if watch:
        _watch(pids, ports, as_json, interval)
        return
    scan = _find(pids, ports)
    if as_json:
        click.echo(json.dumps(scan.to_dict(), indent=2))
    else:
        _console().print(_shown(scan))
    if check and scan.sockets:
        sys.exit(FOUND)
    if check and pids and scan.unreadable:
        sys.exit(UNABLE)  # a process that was asked for may hold one unseen


def _find(pids: Sequence[int], ports: Sequence[int]) -> Scan:
    try:
        return sockets.find(pids, ports)
    except sockets.NoSuchProcess as error:
        click.echo(f"pidpool ps: there is no process {error}; give the pid of a running one", err=True)
        sys.exit(UNABLE)


def _watch(pids: Sequence[int], ports: Sequence[int], as_json: bool, interval: float) -> None:
    console = _console()
    try:
        if as_json:
            while True:
                click.echo(json.dumps(_find(pids, ports).to_dict()))
                time.sleep(interval)
        if not sys.stdout.isatty() or console.is_dumb_terminal:
            while True:
                scan = _find(pids, ports)
                console.print(Text(f"{_clock(scan.taken_at)}"), _shown(scan), Text())
                time.sleep(interval)
        with Live(console=console, auto_refresh=False, vertical_overflow="ellipsis") as live:
            while True:
                scan = _find(pids, ports)
                looked = Text(f"\n{_clock(scan.taken_at)}, every {interval:g} s; Ctrl-C ends", style="dim")
                live.update(Group(_shown(scan), looked), refresh=True)
                time.sleep(interval)
    except KeyboardInterrupt:
        pass


def _console() -> Console:
    return Console(highlight=False, emoji=False, markup=False)


def _shown(scan: Scan) -> RenderableType:
    parts: list[RenderableType] = []
    many = len(scan.sockets)
    looked = f"{scan.looked_into} processes looked into"
    if not many:
        parts.append(Text(f"No database socket is held by more than one process; {looked}.", "green"))
    else:
        what = "1 database socket is" if many == 1 else f"{many} database sockets are"
        parts.append(Text(f"{what} held by more than one process; {looked}.", "bold red"))
    for each in scan.sockets:
        parts += [Text(), *_socket(each, scan.taken_at)]
    if scan.unreadable:
        parts += [Text(), Text(_unreadable(scan.unreadable), "yellow")]
    parts += [Text(f"Note: {note}.", "yellow") for note in scan.notes]
    return Group(*parts)


def _socket(found: SharedSocket, now: float) -> list[RenderableType]:
    since = f"since {_clock(found.shared_since)} ({age(now - found.shared_since)})"
    owner = found.owner
    rows = [(str(owner.pid), _role(owner), "", owner.command)] if not owner.holds else []
    for holder in found.holders:
        role = _role(owner) if holder.pid == owner.pid else "inherited it"
        rows.append((str(holder.pid), role, _fds(holder), holder.command))
    pids, roles, fds = (max(len(row[column]) for row in rows) for column in range(3))
    return [
        Text(f"{found.server} at {where(found)}, shared {since}", "bold"),
        *(
            Text(
                f"  {row[0]:>{pids}}  {row[1]:<{roles}}  {row[2]:<{fds}}  {_PATH.sub('', printable(row[3]))}",
                no_wrap=True,
                overflow="ellipsis",
            )
            for row in rows
        ),
        Padding(Text(meaning(found)), (0, 0, 0, 2)),
    ]


def where(found: SharedSocket) -> str:
    """Return the server's address as one word."""
    if found.family == "unix":
        return printable(found.address)
    return f"[{found.address}]:{found.port}" if found.family == "ipv6" else f"{found.address}:{found.port}"


def meaning(found: SharedSocket) -> str:
    """Say in one sentence what a shared socket can do and what helps."""
    others = [str(holder.pid) for holder in found.inheritors]
    senders = f"pid {others[0]}" if len(others) == 1 else f"pids {', '.join(others[:-1])} and {others[-1]}"
    harm = "end its transactions unasked"
    if found.family != "unix":
        harm += " or, over TLS, break its connection"
    return (
        f"Anything that {senders} may send, even a finalizer's rollback, goes into the server session of "
        f"pid {found.owner.pid} and can {harm}: "
        "give the engine poolclass=PidPool, or open no connection before the fork."
    )


def _role(owner: Owner) -> str:
    role = "opened it" if owner.certain else "probably opened it"
    if owner.holds is None:
        return f"{role} (unreadable)"
    return role if owner.holds else f"{role}, let it go"


def _fds(holder: Holder) -> str:
    return ("fd " if len(holder.fds) == 1 else "fds ") + ", ".join(map(str, holder.fds))


_PIDS_SHOWN = 5


def _unreadable(processes: Sequence[Process]) -> str:
    by_user: dict[str, list[str]] = defaultdict(list)
    for process in processes:
        by_user[printable(process.user)].append(str(process.pid))
    users = []
    for user, pids in sorted(by_user.items()):
        more = ", …" if len(pids) > _PIDS_SHOWN else ""
        users.append(f"{len(pids)} of {user} ({', '.join(pids[:_PIDS_SHOWN])}{more})")
    what = "1 process" if len(processes) == 1 else f"{len(processes)} processes"
    remedy = "run as root to see all" if os.geteuid() else "this system denies them even to root"
    return f"Could not look into {what}: {'; '.join(users)}; {remedy}."


def _clock(at: float) -> str:
    then = time.localtime(at)
    today = then[:3] == time.localtime()[:3]
    return time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S", then)
