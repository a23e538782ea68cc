"""The kernel's tables of sockets, read-only: TCP from /proc/PID/net, unix sockets with their
peers from the kernel's socket diagnostics (as ``ss -x`` does). Linux only.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

Endpoint: TypeAlias = "tuple[str, int]"

_ESTABLISHED, _LISTEN = 0x01, 0x0A  # include/net/tcp_states.h


@dataclass(frozen=True)
class TcpSocket:
    """One socket of a network namespace. An IPv4 address that IPv6 wraps is given as IPv4."""

    inode: int
    local: Endpoint
    remote: Endpoint
    established: bool
    listening: bool


@dataclass(frozen=True)
class UnixSocket:
    """One unix socket; an accepted one has the path of the socket that listened."""

    inode: int
    path: str
    peer: int | None
    """The inode of the other end."""


def read_tcp(pid: int) -> list[TcpSocket]:
    """Return the TCP sockets of the network namespace in which a process is.

    :raises OSError: if the process has ended or may not be looked into.
    """
    rows = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    try:
        rows += Path(f"/proc/{pid}/net/tcp6").read_text().splitlines()[1:]
    except FileNotFoundError:
        pass  # a kernel without IPv6
    return [_tcp_socket(row.split()) for row in rows]


def _tcp_socket(fields: list[str]) -> TcpSocket:
    state = int(fields[3], 16)
    return TcpSocket(
        inode=int(fields[9]),
        local=_endpoint(fields[1]),
        remote=_endpoint(fields[2]),
        established=state == _ESTABLISHED,
        listening=state == _LISTEN,
    )


def _endpoint(text: str) -> Endpoint:
    digits, _, port = text.partition(":")
    # Printed as 32-bit numbers, each in the machine's byte order.
    words = [int(digits[at : at + 8], 16) for at in range(0, len(digits), 8)]
    address = ipaddress.ip_address(b"".join(struct.pack("=I", word) for word in words))
    wrapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(wrapped or address), int(port, 16)


_ACCEPTS_CONNECTIONS = 0x10000  # __SO_ACCEPTCON of linux/net.h


def read_unix_listeners(pid: int) -> list[str]:
    """Return the paths on which unix sockets listen in a process's network namespace.

    :raises OSError: if the process has ended or may not be looked into.
    """
    rows = Path(f"/proc/{pid}/net/unix").read_text(errors="replace").splitlines()[1:]
    fields = [row.split(maxsplit=7) for row in rows]
    return [each[7] for each in fields if len(each) == 8 and int(each[3], 16) & _ACCEPTS_CONNECTIONS]


# linux/netlink.h, linux/sock_diag.h, linux/unix_diag.h
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST_DUMP = 0x001 | 0x300
_ERROR, _DONE = 2, 3
_SHOW_NAME_AND_PEER = 0x1 | 0x4
_NAME, _PEER = 0, 2
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_QUERY = struct.Struct("=BBHIIIII")  # family, protocol, pad, states, inode, show, cookie
_ANSWER = struct.Struct("=BBBBIII")  # family, type, state, pad, inode, cookie
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_SECONDS = 5.0


def dump_unix() -> dict[int, UnixSocket]:
    """Return the unix sockets of this process's own network namespace by inode.

    :raises OSError: if the kernel does not answer: it lacks ``unix_diag``, or a sandbox forbids it.
    """
    query = _QUERY.pack(socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, _SHOW_NAME_AND_PEER, 0xFFFFFFFF, 0xFFFFFFFF)
    request = _HEADER.pack(_HEADER.size + len(query), _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 1, 0) + query
    found: dict[int, UnixSocket] = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as kernel:
        kernel.settimeout(_SECONDS)
        kernel.send(request)
        while True:
            data = kernel.recv(1 << 16)
            while data:
                length, kind, _, _, _ = _HEADER.unpack_from(data)
                if kind == _DONE:
                    return found
                if kind == _ERROR:
                    raise OSError(-struct.unpack_from("=i", data, _HEADER.size)[0], "no unix_diag")
                one = _unix_socket(data[_HEADER.size : length])
                found[one.inode] = one
                data = data[_aligned(length) :]


def _unix_socket(message: bytes) -> UnixSocket:
    inode = _ANSWER.unpack_from(message)[4]
    path, peer = "", None
    rest = message[_ANSWER.size :]
    while len(rest) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(rest)
        value = rest[_ATTRIBUTE.size : length]
        if kind == _NAME:
            path = value.rstrip(b"\0").decode(errors="replace")
        elif kind == _PEER:
            (peer,) = struct.unpack("=I", value)
        rest = rest[_aligned(length) :]
    return UnixSocket(inode, path, peer)


def _aligned(length: int) -> int:
    return (length + 3) & ~3
