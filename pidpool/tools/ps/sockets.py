"""Finds the sockets to a database that several processes hold open, from the outside: through /proc, with
nothing sent and nothing attached to. Whose they are is judged by how each process came to be. Linux only.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pidpool.stats.process import PARENT, START_TIME, STATE, read_stat
from pidpool.tools.ps import socket_tables
from pidpool.tools.ps.socket_tables import TcpSocket, UnixSocket

PORTS: Mapping[int, str] = {
    5432: "PostgreSQL",
    6432: "PgBouncer",
    3306: "MySQL",
    1433: "SQL Server",
    1521: "Oracle",
}
"""Remote ports that stand for a database wherever the server runs."""

SERVERS: Mapping[str, str] = {
    "postgres": "PostgreSQL",
    "postmaster": "PostgreSQL",
    "pgbouncer": "PgBouncer",
    "pgpool": "Pgpool-II",
    "mysqld": "MySQL",
    "mariadbd": "MariaDB",
    "sqlservr": "SQL Server",
    "tnslsnr": "Oracle",
}
"""Names of executables that are database servers: what such a process holds is no leak, and a socket
whose other end it holds leads to a database, on whichever port."""

_POSTGRES_PATH = re.compile(r"/\.s\.PGSQL\.(\d+)$")
_MYSQL_PATH = re.compile(r"/(?:mysql|mysqld|mariadb|mariadbd)\.sock$")

SETTLE = 0.1
"""Seconds after which what was found is looked at again: a process that was about to run another
program has closed its copies by then."""


@dataclass(frozen=True)
class Process:
    """A process at the time of the scan."""

    pid: int
    parent_pid: int
    name: str
    command: str
    """The command line, passwords masked; the name, where it can't be read."""
    user: str
    started_at: float
    """Seconds since the epoch."""


@dataclass(frozen=True)
class Holder(Process):
    """A process that holds a socket."""

    fds: tuple[int, ...]
    """Its descriptors of that socket."""


@dataclass(frozen=True)
class Owner(Process):
    """The process that opened a socket."""

    certain: bool
    """Whether that is known: it alone of the holders has run a program of its own since it was forked,
    and a driver's socket does not outlive that. Otherwise it is the likeliest one."""
    holds: bool | None
    """Whether it still has the socket; None where it could not be looked into."""


@dataclass(frozen=True)
class SharedSocket:
    """A socket to a database that two or more processes hold open."""

    inode: int
    server: str
    """PostgreSQL, MySQL, …; "database" for a port that only the caller named."""
    family: str
    """``"ipv4"``, ``"ipv6"`` or ``"unix"``."""
    address: str
    """The server's address, or the path of its unix socket."""
    port: int | None
    """The server's port; None for a unix socket whose path has none."""
    owner: Owner
    holders: tuple[Holder, ...]
    """Oldest first, the owner included if it still holds the socket."""
    shared_since: float
    """Seconds since the epoch: when the first of the other holders was started."""

    @property
    def inheritors(self) -> tuple[Holder, ...]:
        """The holders that are not the owner."""
        return tuple(holder for holder in self.holders if holder.pid != self.owner.pid)


@dataclass(frozen=True)
class Scan:
    """What was found, and what could not be looked at."""

    taken_at: float
    """Seconds since the epoch."""
    looked_into: int
    """How many processes."""
    sockets: tuple[SharedSocket, ...]
    unreadable: tuple[Process, ...]
    """Processes into which this user may not look. Database servers are left out."""
    notes: tuple[str, ...]
    """What else this machine did not let be seen."""

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as dicts, lists, strings and numbers, by the names of the fields."""
        return dataclasses.asdict(self)


class NoSuchProcess(LookupError):
    """There is no process of the given pid."""


def find(pids: Sequence[int] = (), ports: Collection[int] = ()) -> Scan:
    """Look for sockets to a database that several processes hold open.

    Takes some milliseconds for each hundred processes, and `SETTLE` more if there is something to look
    at twice. Processes may end meanwhile; they are left out then.

    :param pids: only sockets that one of these processes or of their descendants holds; default: all.
    :param ports: remote ports that lead to a database, besides `PORTS`.
    :raises NoSuchProcess: if one of `pids` does not exist.
    """
    taken_at = time.time()
    tree = _read_tree()
    for pid in pids:
        if pid not in tree:
            raise NoSuchProcess(pid)
    wanted = {pid for pid in tree if not pids or not {pid, *_ancestors(tree, pid)}.isdisjoint(pids)}
    descriptors, unreadable = _read_descriptors(tree)
    if pids:
        # A process that they were forked from may share a socket with them as well as a descendant.
        unreadable &= wanted.union(*(_forked_from(tree, tree[pid]) for pid in pids))
    shared = {
        inode: holders
        for inode, holders in _by_inode(tree, descriptors, SERVERS).items()
        if len(holders) > 1 and not wanted.isdisjoint(holders)
    }
    found: list[SharedSocket] = []
    notes: set[str] = set()
    if shared:
        network = _Network(tree, descriptors, ports)
        servers = {inode: network.server_of(inode, holders) for inode, holders in shared.items()}
        notes = network.notes
        if any(servers.values()):
            time.sleep(SETTLE)
        for inode, server in servers.items():
            if server is not None:
                holders = [pid for pid in shared[inode] if _still_holds(tree[pid], inode)]
                if len(holders) > 1:
                    found.append(_describe(tree, descriptors, inode, server, holders))
    return Scan(
        taken_at,
        len(descriptors),
        tuple(sorted(found, key=lambda each: (each.shared_since, each.owner.pid, each.inode))),
        tuple(_process(tree[pid]) for pid in sorted(unreadable)),
        tuple(sorted(notes)),
    )


# -- processes


@dataclass(frozen=True)
class _Entry:
    """A process as /proc/PID/stat has it, which every user may read."""

    pid: int
    parent_pid: int
    name: str
    start: int
    """Clock ticks after the boot; tells it from a later process with the same pid."""
    forked: bool
    """Whether it still runs the memory that it was forked with: it never ran a program (exec) itself."""


_FLAGS = 6
_FORKED_NO_EXEC = 0x40  # PF_FORKNOEXEC of linux/sched.h
_KERNEL_THREAD = 0x200000  # PF_KTHREAD


def _read_entry(pid: int) -> _Entry | None:
    """Return None for what is no process with descriptors: ended ones and the kernel's threads."""
    try:
        fields = read_stat(pid)
        flags = int(fields[_FLAGS])
        if fields[STATE] in (b"Z", b"X") or flags & _KERNEL_THREAD:
            return None
        name = Path(f"/proc/{pid}/comm").read_text(errors="replace").removesuffix("\n")
    except OSError:
        return None
    forked = bool(flags & _FORKED_NO_EXEC)
    return _Entry(pid, int(fields[PARENT]), name, int(fields[START_TIME]), forked)


def _read_tree() -> dict[int, _Entry]:
    entries = (_read_entry(pid) for pid in psutil.pids())
    return {entry.pid: entry for entry in entries if entry is not None}


def _ancestors(tree: Mapping[int, _Entry], pid: int) -> Iterator[int]:
    """Yield parent, grandparent and so on; bounded, since the tree was not read in one instant."""
    for _ in range(len(tree)):
        entry = tree.get(pid)
        if entry is None or entry.parent_pid not in tree:
            return
        pid = entry.parent_pid
        yield pid


def _read_descriptors(tree: Mapping[int, _Entry]) -> tuple[dict[int, dict[int, list[int]]], set[int]]:
    """Return the sockets of all processes, and who may not be looked into, database servers left out."""
    descriptors, unreadable = {}, set()
    for entry in tree.values():
        try:
            descriptors[entry.pid] = _socket_descriptors(entry.pid)
        except PermissionError:
            if entry.name not in SERVERS:
                unreadable.add(entry.pid)
        except OSError:
            pass  # it has ended
    return descriptors, unreadable


def _socket_descriptors(pid: int) -> dict[int, list[int]]:
    """Return the sockets of a process: its descriptors by inode."""
    found: dict[int, list[int]] = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue  # closed meanwhile
        if target.startswith("socket:["):
            found.setdefault(int(target[8:-1]), []).append(int(name))
    return found


def _by_inode(
    tree: Mapping[int, _Entry], descriptors: Mapping[int, Mapping[int, list[int]]], without: Collection[str]
) -> dict[int, list[int]]:
    holders: dict[int, list[int]] = {}
    for pid, sockets in descriptors.items():
        if tree[pid].name not in without:
            for inode in sockets:
                holders.setdefault(inode, []).append(pid)
    return holders


def _still_holds(entry: _Entry, inode: int) -> bool:
    now = _read_entry(entry.pid)
    try:
        return now is not None and now.start == entry.start and inode in _socket_descriptors(entry.pid)
    except OSError:
        return False


# Of a URL, and of what looks like a password in a DSN or an option.
_SECRET = re.compile(r"(?<=://)([^\s:/@]*):[^\s@]+(?=@)|(?i:(pass(?:word|wd)?[ =]))\S+")


def _masked(command: str) -> str:
    return _SECRET.sub(lambda match: f"{match[1]}:***" if match[1] is not None else f"{match[2]}***", command)


def _process(entry: _Entry) -> Process:
    command, user = "", "?"
    try:
        process = psutil.Process(entry.pid)
        with process.oneshot():
            user = process.username()
            command = _masked(" ".join(process.cmdline()).strip())
    except (psutil.Error, OSError):
        pass
    started_at = psutil.boot_time() + entry.start / os.sysconf("SC_CLK_TCK")
    return Process(entry.pid, entry.parent_pid, entry.name, command or entry.name, user, started_at)


# -- whose it is


def _describe(
    tree: Mapping[int, _Entry],
    descriptors: Mapping[int, Mapping[int, list[int]]],
    inode: int,
    server: _Server,
    pids: list[int],
) -> SharedSocket:
    holders = sorted(
        (Holder(**vars(_process(tree[pid])), fds=tuple(sorted(descriptors[pid][inode]))) for pid in pids),
        key=lambda holder: (tree[holder.pid].start, holder.pid),
    )
    pid, certain = _owner(tree, [tree[holder.pid] for holder in holders])
    holds = pid in pids if pid in descriptors else None
    owner = Owner(**vars(_process(tree[pid])), certain=certain, holds=holds)
    since = min(holder.started_at for holder in holders if holder.pid != pid)
    return SharedSocket(
        inode, server.name, server.family, server.address, server.port, owner, tuple(holders), since
    )


def _owner(tree: Mapping[int, _Entry], holders: Sequence[_Entry]) -> tuple[int, bool]:
    """Return who opened a socket, and whether that is certain.

    :param holders: oldest first.
    """
    # Drivers open sockets close-on-exec: a process that ran a program after its fork inherited none.
    executed = [holder.pid for holder in holders if not holder.forked]
    if len(executed) == 1:
        return executed[0], True
    above = {holder.pid: list(_ancestors(tree, holder.pid)) for holder in holders}
    for holder in holders:
        if all(holder.pid == pid or holder.pid in ancestors for pid, ancestors in above.items()):
            return holder.pid, False
    if not executed:
        # Those alone from which a process has its memory, and with it its descriptors.
        lines = [list(_forked_from(tree, holder)) for holder in holders]
        for pid in lines[0]:
            if all(pid in line for line in lines):
                return pid, False
    return holders[0].pid, False


def _forked_from(tree: Mapping[int, _Entry], entry: _Entry) -> Iterator[int]:
    """Yield the ancestors of which a process still runs a copy; descriptors are inherited with that."""
    for pid in _ancestors(tree, entry.pid):
        # Who adopts an orphan is another program, as a rule: init, a container's shim.
        if not entry.forked or not _same_program(entry, tree[pid]):
            return
        entry = tree[pid]
        yield pid


def _same_program(one: _Entry, other: _Entry) -> bool:
    try:
        return os.readlink(f"/proc/{one.pid}/exe") == os.readlink(f"/proc/{other.pid}/exe")
    except OSError:
        return one.name == other.name


# -- where it leads


@dataclass(frozen=True)
class _Server:
    name: str
    family: str
    address: str
    port: int | None


class _Network:
    """The sockets of all network namespaces in which there are processes to look into."""

    def __init__(
        self,
        tree: Mapping[int, _Entry],
        descriptors: Mapping[int, Mapping[int, list[int]]],
        ports: Collection[int],
    ) -> None:
        self.notes: set[str] = set()
        self._tree = tree
        self._holders = _by_inode(tree, descriptors, ())
        self._ports = {**dict.fromkeys(ports, "database"), **PORTS}
        self._spaces = [_Space(members) for members in _namespaces(descriptors).values()]
        self._unix: dict[int, UnixSocket] = {}
        try:
            self._unix = socket_tables.dump_unix()
        except OSError as error:
            self.notes.add(
                f"unix sockets could not be looked at: the kernel does not tell their other ends ({error})"
            )

    def server_of(self, inode: int, pids: Collection[int]) -> _Server | None:
        """Return the database to which a socket leads, if it is the client's end of one that does."""
        space = next((space for space in self._spaces if inode in space.tcp), None)
        if space is not None:
            return self._tcp_server(space, space.tcp[inode])
        if inode in self._unix:
            return self._unix_server(self._unix[inode])
        foreign = [space for space in self._spaces if not space.ours and space.members & set(pids)]
        if foreign and self._unix:
            self.notes.add(
                "unix sockets in other network namespaces (containers) could not be looked at; "
                "run pidpool ps inside"
            )
        return None

    def _tcp_server(self, space: _Space, row: TcpSocket) -> _Server | None:
        if not row.established or row.local[1] in space.listening:
            return None
        address, port = row.remote
        name = self._local_server(space, row) or self._ports.get(port)
        if name is None:
            return None
        return _Server(name, "ipv6" if ":" in address else "ipv4", address, port)

    def _local_server(self, space: _Space, row: TcpSocket) -> str | None:
        """Return which database server of this machine holds the other end of a connection."""
        for other in [space, *(each for each in self._spaces if each is not space)]:
            inode = other.by_pair.get((row.remote, row.local))
            if inode is not None:
                # Who may not look into the server sees at least on which port it listens.
                port = row.remote[1]
                listens = port in other.postgres_ports
                return self._held_by_server(inode) or (PORTS.get(port, "PostgreSQL") if listens else None)
        return None

    def _unix_server(self, client: UnixSocket) -> _Server | None:
        server = self._unix.get(client.peer or 0)
        if server is None or not server.path:
            return None
        postgres = _POSTGRES_PATH.search(server.path)
        port = int(postgres[1]) if postgres else None
        name = self._held_by_server(server.inode)
        if name is None and port is not None:
            name = PORTS.get(port, "PostgreSQL")
        elif name is None and _MYSQL_PATH.search(server.path):
            name = "MySQL"
        return None if name is None else _Server(name, "unix", server.path, port)

    def _held_by_server(self, inode: int) -> str | None:
        names = (SERVERS.get(self._tree[pid].name) for pid in self._holders.get(inode, ()))
        return next(filter(None, names), None)


class _Space:
    """One network namespace, read through any of the processes in it."""

    def __init__(self, members: Collection[int]) -> None:
        self.members = frozenset(members)
        self.ours = os.getpid() in members
        self.tcp: dict[int, TcpSocket] = {}
        self.postgres_ports: set[int] = set()
        for pid in members:
            try:
                self.tcp = {row.inode: row for row in socket_tables.read_tcp(pid)}
                paths = socket_tables.read_unix_listeners(pid)
            except OSError:
                continue  # that one has ended
            found = filter(None, map(_POSTGRES_PATH.search, paths))
            self.postgres_ports = {int(match[1]) for match in found}
            break
        self.listening = {row.local[1] for row in self.tcp.values() if row.listening}
        self.by_pair = {(row.local, row.remote): row.inode for row in self.tcp.values() if row.established}


def _namespaces(pids: Collection[int]) -> dict[str, list[int]]:
    spaces: dict[str, list[int]] = {}
    for pid in pids:
        try:
            spaces.setdefault(os.readlink(f"/proc/{pid}/ns/net"), []).append(pid)
        except OSError:
            continue  # it has ended
    return spaces
