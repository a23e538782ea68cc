"""Finds the database server that a socket leads to, in the socket tables of each network namespace.
Linux only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from pidpool.tools.ps import socket_tables
from pidpool.tools.ps.processes import Entry, holders_by_inode
from pidpool.tools.ps.socket_tables import TcpSocket, UnixSocket

PORTS: Mapping[int, str] = {
    5432: "PostgreSQL",
    6432: "PgBouncer",
    3306: "MySQL",
    1433: "SQL Server",
    1521: "Oracle",
}
"""Remote ports that lead to a database, on whichever machine the server runs."""

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
"""Names of executables that are database servers. A socket that such a process holds is no leak; a socket
whose other end such a process holds leads to a database, on whichever port."""

_POSTGRES_PATH = re.compile(r"/\.s\.PGSQL\.(\d+)$")
_MYSQL_PATH = re.compile(r"/(?:mysql|mysqld|mariadb|mariadbd)\.sock$")


@dataclass(frozen=True)
class Server:
    """A database server, as the client's end of a connection sees it."""

    name: str
    family: str
    address: str
    port: int | None


class Network:
    """The sockets of all network namespaces that have a readable process."""

    def __init__(
        self,
        tree: Mapping[int, Entry],
        descriptors: Mapping[int, Mapping[int, list[int]]],
        ports: Collection[int],
    ) -> None:
        self.notes: set[str] = set()
        self._tree = tree
        self._holders = holders_by_inode(descriptors)
        self._ports = {**dict.fromkeys(ports, "database"), **PORTS}
        self._namespaces = [_Namespace(members) for members in _by_namespace(descriptors).values()]
        self._unix: dict[int, UnixSocket] = {}
        try:
            self._unix = socket_tables.dump_unix()
        except OSError as error:
            self.notes.add(
                f"unix sockets could not be looked at: the kernel does not report their other ends ({error})"
            )

    def server_of(self, inode: int, pids: Collection[int]) -> Server | None:
        """Return the database to which a socket leads, if it is the client's end of one that does."""
        namespace = next((namespace for namespace in self._namespaces if inode in namespace.tcp), None)
        if namespace is not None:
            return self._tcp_server(namespace, namespace.tcp[inode])
        if inode in self._unix:
            return self._unix_server(self._unix[inode])
        foreign = [
            namespace
            for namespace in self._namespaces
            if not namespace.ours and namespace.members & set(pids)
        ]
        if foreign and self._unix:
            self.notes.add(
                "unix sockets in other network namespaces (containers) could not be looked at; "
                "run pidpool ps inside"
            )
        return None

    def _tcp_server(self, namespace: _Namespace, row: TcpSocket) -> Server | None:
        if not row.established or row.local[1] in namespace.listening:
            return None
        address, port = row.remote
        name = self._local_server(namespace, row) or self._ports.get(port)
        if name is None:
            return None
        return Server(name, "ipv6" if ":" in address else "ipv4", address, port)

    def _local_server(self, namespace: _Namespace, row: TcpSocket) -> str | None:
        """Return the name of the database server on this machine that holds the other end."""
        for other in [namespace, *(each for each in self._namespaces if each is not namespace)]:
            inode = other.by_pair.get((row.remote, row.local))
            if inode is not None:
                # A user who may not look into the server can still see the port on which it listens.
                port = row.remote[1]
                listens = port in other.postgres_ports
                return self._held_by_server(inode) or (PORTS.get(port, "PostgreSQL") if listens else None)
        return None

    def _unix_server(self, client: UnixSocket) -> Server | None:
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
        return None if name is None else Server(name, "unix", server.path, port)

    def _held_by_server(self, inode: int) -> str | None:
        names = (SERVERS.get(self._tree[pid].name) for pid in self._holders.get(inode, ()))
        return next(filter(None, names), None)


class _Namespace:
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
                continue  # it has ended
            found = filter(None, map(_POSTGRES_PATH.search, paths))
            self.postgres_ports = {int(match[1]) for match in found}
            break
        self.listening = {row.local[1] for row in self.tcp.values() if row.listening}
        self.by_pair = {(row.local, row.remote): row.inode for row in self.tcp.values() if row.established}


def _by_namespace(pids: Collection[int]) -> dict[str, list[int]]:
    namespaces: dict[str, list[int]] = {}
    for pid in pids:
        try:
            namespaces.setdefault(os.readlink(f"/proc/{pid}/ns/net"), []).append(pid)
        except OSError:
            continue  # it has ended
    return namespaces
