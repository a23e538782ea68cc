"""The drivers of MySQL and MariaDB: mysqlclient (read in version 2.3), PyMySQL (1.2), mysql-connector-python
(26.10), and under SQLAlchemy's asyncio adapter aiomysql (0.3) and asyncmy (0.2).
"""

from __future__ import annotations

from typing import Any

from pidpool.drivers.adapted import Adapted
from pidpool.drivers.base import Driver
from pidpool.drivers.sockets import Sockets

_IN_TRANSACTION = 1  # SERVER_STATUS_IN_TRANS and SERVER_STATUS_AUTOCOMMIT of the protocol
_AUTOCOMMIT = 2


def _in_transaction(status: int, *, is_older: bool) -> bool | None:
    """Return what the server's status says of the transaction.

    :param is_older: whether rows came after the packet that the status is of. PyMySQL and its descendants do
        not read the one after the rows, and a SELECT begins a transaction too.
    """
    if status & _IN_TRANSACTION:
        return True
    return None if is_older and not status & _AUTOCOMMIT else False


class MySQLClient(Driver):
    """mysqlclient: it gives its descriptor (since 1.4), and no state of the transaction."""

    def server_pid(self, connection: Any) -> int | None:
        return int(connection.thread_id())


class PyMySQL(MySQLClient):
    def fileno(self, connection: Any) -> int | None:
        socket = connection._sock
        return None if socket is None else int(socket.fileno())

    def in_transaction(self, connection: Any) -> bool | None:
        last = connection._result
        is_older = last is not None and last.server_status is None
        return _in_transaction(connection.server_status, is_older=is_older)


class MySQLConnector(Driver):
    """mysql-connector-python: pure Python, or over its C extension, which gives no descriptor."""

    def fileno(self, connection: Any) -> int | None:
        network = getattr(connection, "_socket", None)
        socket = None if network is None else network.sock
        return None if socket is None else int(socket.fileno())

    def find_fileno(self, connection: Any, before: Sockets) -> int | None:
        found = before.opened_to(connection.unix_socket or connection.server_port)
        if len(found) > 1 and not connection.unix_socket:  # other threads connect too
            cursor = connection.cursor()
            try:
                # For one's own session no privilege is needed. "host:port", as the server sees the client.
                cursor.execute("select host from information_schema.processlist where id = connection_id()")
                port = int(cursor.fetchone()[0].rpartition(":")[2])
            finally:
                cursor.close()
                connection.rollback()
            found = [each for each in found if each.port == port]
        return found[0].fd if len(found) == 1 else None

    def server_pid(self, connection: Any) -> int | None:
        return int(connection.connection_id)

    def in_transaction(self, connection: Any) -> bool | None:
        return bool(connection.in_transaction)


class AioMySQL(Adapted):
    def fileno(self, connection: Any) -> int | None:
        writer = connection.driver_connection._writer
        return int(writer.transport.get_extra_info("socket").fileno())

    def server_pid(self, connection: Any) -> int | None:
        return int(connection.driver_connection.thread_id())

    def in_transaction(self, connection: Any) -> bool | None:
        last = connection.driver_connection._result
        is_older = last is not None and last.server_status is None
        return _in_transaction(connection.driver_connection.server_status, is_older=is_older)


class AsyncMy(AioMySQL):
    def fileno(self, connection: Any) -> int | None:
        return int(connection.driver_connection._transport.get_extra_info("socket").fileno())

    def in_transaction(self, connection: Any) -> bool | None:
        # It reads the status after the rows if the server sends it in the newer form.
        is_older = not getattr(connection.driver_connection, "_deprecate_eof", False)
        return _in_transaction(connection.driver_connection.server_status, is_older=is_older)
