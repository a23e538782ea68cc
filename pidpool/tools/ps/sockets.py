"""Finds the sockets to a database that several processes hold open, and judges which process opened each one
by how the holders came to be. Looks from the outside: sends nothing, attaches to no process. Linux only.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pidpool.tools.ps.processes import (
    Entry,
    Process,
    ancestors,
    describe,
    forked_from,
    holders_by_inode,
    read_descriptors,
    read_tree,
    still_holds,
)
from pidpool.tools.ps.servers import SERVERS, Network, Server

SETTLE = 0.1
"""Seconds after which the holders are looked at again: a process that was about to run another program
has then closed its copies."""


@dataclass(frozen=True)
class Holder(Process):
    """A process that holds a socket."""

    fds: tuple[int, ...]
    """Its descriptors of that socket."""


@dataclass(frozen=True)
class Owner(Process):
    """The process that opened a socket."""

    certain: bool
    """Whether that is known: of the holders it alone has run a program of its own (exec) since it was forked,
    and a driver's socket does not outlive exec. Otherwise it is the likeliest one."""
    holds: bool | None
    """Whether it still has the socket; None if it could not be looked into."""


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
    """The shared sockets, and what could not be looked at."""

    taken_at: float
    """Seconds since the epoch."""
    looked_into: int
    """Number of processes."""
    sockets: tuple[SharedSocket, ...]
    unreadable: tuple[Process, ...]
    """Processes into which this user may not look. Database servers are left out."""
    notes: tuple[str, ...]
    """What else could not be looked at on this machine, and why."""

    def to_dict(self) -> dict[str, Any]:
        """Return the scan as dicts, lists, strings and numbers, by the names of the fields."""
        return dataclasses.asdict(self)


class NoSuchProcess(LookupError):
    """There is no process of the given pid."""


def find(pids: Sequence[int] = (), ports: Collection[int] = ()) -> Scan:
    """Look for sockets to a database that several processes hold open.

    Takes some milliseconds for each hundred processes, and `SETTLE` more if a socket has to be looked at
    twice. A process that ends meanwhile is left out.

    :param pids: only sockets that one of these processes or of their descendants holds; default: all.
    :param ports: remote ports that lead to a database, besides `PORTS`.
    :raises NoSuchProcess: if one of `pids` does not exist.
    """
    taken_at = time.time()
    tree = read_tree()
    for pid in pids:
        if pid not in tree:
            raise NoSuchProcess(pid)
    wanted = {pid for pid in tree if not pids or not {pid, *ancestors(tree, pid)}.isdisjoint(pids)}
    servers = {pid for pid in tree if tree[pid].name in SERVERS}
    descriptors, unreadable = read_descriptors(tree)
    unreadable -= servers
    if pids:
        # An ancestor may share a socket with the given processes as well as a descendant may.
        unreadable &= wanted.union(*(forked_from(tree, tree[pid]) for pid in pids))
    clients = {pid: held for pid, held in descriptors.items() if pid not in servers}
    shared = {
        inode: holders
        for inode, holders in holders_by_inode(clients).items()
        if len(holders) > 1 and not wanted.isdisjoint(holders)
    }
    found: list[SharedSocket] = []
    notes: set[str] = set()
    if shared:
        network = Network(tree, descriptors, ports)
        leads_to = {inode: network.server_of(inode, holders) for inode, holders in shared.items()}
        notes = network.notes
        if any(leads_to.values()):
            time.sleep(SETTLE)
        for inode, server in leads_to.items():
            if server is not None:
                holders = [pid for pid in shared[inode] if still_holds(tree[pid], inode)]
                if len(holders) > 1:
                    found.append(_shared_socket(tree, descriptors, inode, server, holders))
    return Scan(
        taken_at,
        len(descriptors),
        tuple(sorted(found, key=lambda each: (each.shared_since, each.owner.pid, each.inode))),
        tuple(describe(tree[pid]) for pid in sorted(unreadable)),
        tuple(sorted(notes)),
    )


def _shared_socket(
    tree: Mapping[int, Entry],
    descriptors: Mapping[int, Mapping[int, list[int]]],
    inode: int,
    server: Server,
    pids: list[int],
) -> SharedSocket:
    holders = sorted(
        (Holder(**vars(describe(tree[pid])), fds=tuple(sorted(descriptors[pid][inode]))) for pid in pids),
        key=lambda holder: (tree[holder.pid].start, holder.pid),
    )
    pid, certain = _owner(tree, [tree[holder.pid] for holder in holders])
    holds = pid in pids if pid in descriptors else None
    owner = Owner(**vars(describe(tree[pid])), certain=certain, holds=holds)
    since = min(holder.started_at for holder in holders if holder.pid != pid)
    return SharedSocket(
        inode, server.name, server.family, server.address, server.port, owner, tuple(holders), since
    )


def _owner(tree: Mapping[int, Entry], holders: Sequence[Entry]) -> tuple[int, bool]:
    """Return the pid that opened a socket, and whether that is certain.

    :param holders: oldest first.
    """
    # Drivers open sockets close-on-exec: a process that ran a program after its fork inherited none.
    executed = [holder.pid for holder in holders if not holder.forked]
    if len(executed) == 1:
        return executed[0], True
    above = {holder.pid: list(ancestors(tree, holder.pid)) for holder in holders}
    for holder in holders:
        if all(holder.pid == pid or holder.pid in ancestors for pid, ancestors in above.items()):
            return holder.pid, False
    if not executed:
        # Only an ancestor whose memory a holder still has can have left it the descriptor.
        lines = [list(forked_from(tree, holder)) for holder in holders]
        for pid in lines[0]:
            if all(pid in line for line in lines):
                return pid, False
    return holders[0].pid, False
