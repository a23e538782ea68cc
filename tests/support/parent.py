"""The parent's side of every fork test: its connection, and the proof that nothing happened to it."""

from __future__ import annotations

import os
import socket
import struct
from typing import Any

from sqlalchemy import Connection, Engine, text

from pidpool import tag_of


def server_pid(connection: Connection) -> int:
    return int(connection.execute(text("select pg_backend_pid()")).scalar_one())


def bytes_on_the_wire(fd: int) -> tuple[int, int]:
    """Return the bytes sent and received on a TCP socket so far, by whichever process."""
    with socket.socket(fileno=os.dup(fd)) as copy:
        info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    # struct tcp_info of linux/tcp.h: tcpi_bytes_received at 128, tcpi_bytes_sent at 200.
    return struct.unpack_from("Q", info, 200)[0], struct.unpack_from("Q", info, 128)[0]


class Parent:
    """A process with one connection, in one of the states that a fork can find it in."""

    def __init__(self, engine: Engine, state: str) -> None:
        self.engine = engine
        self.state = state
        self.connection: Connection | None = engine.connect()
        if state.startswith("detached"):
            self.connection.detach()
        self.server_pid = server_pid(self.connection)
        self.connection.rollback()
        self.transaction_id: Any = None
        if state.endswith("in transaction"):
            self.connection.execute(text("insert into kept values ('parent')"))
            self.transaction_id = self._transaction_id()
        tag = tag_of(self.connection)
        assert tag is not None and tag.fd is not None and tag.server_pid == self.server_pid
        self.tag = tag
        self.fd = tag.fd
        if state == "idle":
            self.connection.close()
            self.connection = None
        self.goes_on()
        self._raw = None if self.connection is None else self.connection.connection.dbapi_connection

    def _transaction_id(self) -> Any:
        assert self.connection is not None
        return self.connection.execute(text("select txid_current()")).scalar_one()

    def goes_on(self) -> None:
        """Note that the test has used the connection in this process itself."""
        self._bytes = bytes_on_the_wire(self.fd)

    def has_had_no_traffic(self) -> None:
        """Check that no byte has passed on the connection, by whichever process."""
        assert bytes_on_the_wire(self.fd) == self._bytes

    def notices_nothing(self) -> None:
        """Check that the connection is as it was before the fork, and use it to the end."""
        self.has_had_no_traffic()
        if self.connection is None:
            self.connection = self.engine.connect()
        else:
            assert self.connection.connection.dbapi_connection is self._raw
        assert server_pid(self.connection) == self.server_pid
        assert tag_of(self.connection) == self.tag
        if self.transaction_id is None:
            self.connection.execute(text("insert into kept values ('parent')"))
        else:
            assert self._transaction_id() == self.transaction_id
        self.connection.commit()
        rows = self.connection.execute(text("select v from kept")).scalars().all()
        assert rows.count("parent") == 1
        self.connection.close()
