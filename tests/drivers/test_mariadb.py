"""The drivers of MySQL on a real MariaDB: forks as in test_forks.py, how the socket of a connection is found
that its driver does not give, and what is known of the transaction.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from driver_forks import UNHARMED, is_harmed, run
from engines import MakeEngine, raw
from mariadb_server import MariaDB
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from pidpool import AsyncPidPool
from pidpool.drivers import driver_of

pytestmark = pytest.mark.system

DRIVERS = ["mysqldb", "pymysql", "mysqlconnector", "aiomysql", "asyncmy"]


def url(mariadb: MariaDB, driver: str) -> str:
    return f"mysql+{driver}://app@127.0.0.1:{mariadb.port}/app"


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_parent_never_notices(mariadb: MariaDB, driver: str) -> None:
    mark = mariadb.log_mark()
    assert run(url(mariadb, driver), "pidpool", mariadb.ca_file) == UNHARMED
    assert mariadb.complaints(mark) == []


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_parent_is_harmed_with_queuepool(mariadb: MariaDB, driver: str) -> None:
    assert is_harmed(run(url(mariadb, driver), "queue"))


# -- mysql-connector-python's C extension, which gives no descriptor


@pytest.fixture(scope="session")
def c_extension() -> dict[str, str]:
    """The environment in which it can be imported: it needs the newer OpenSSL that its wheel brings."""
    import mysql

    folder = Path(mysql.__path__[0], "vendor")
    environment = {"LD_LIBRARY_PATH": str(folder)}
    program = "import mysql.connector; assert mysql.connector.HAVE_CEXT"
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, **environment})
    return environment


@pytest.mark.parametrize("over", ["tls", "unix socket"])
def test_a_socket_that_the_driver_does_not_give_is_severed(
    mariadb: MariaDB, c_extension: dict[str, str], over: str
) -> None:
    mark = mariadb.log_mark()
    address, ca = url(mariadb, "mysqlconnector"), mariadb.ca_file
    if over == "unix socket":
        address, ca = f"{address}?unix_socket={mariadb.unix_socket}", "-"
    assert run(address, "pidpool", ca, **c_extension) == UNHARMED
    assert mariadb.complaints(mark) == []


def test_it_harms_the_parent_with_queuepool(mariadb: MariaDB, c_extension: dict[str, str]) -> None:
    assert is_harmed(run(url(mariadb, "mysqlconnector"), "queue", **c_extension))


FOUND = """
import os, socket, sys, threading
from sqlalchemy import create_engine, text
from pidpool import PidPool, tag_of
from pidpool.drivers.mysql import MySQLConnector

# All connects are over before a socket is looked for: each finds those of the others too.
connected, find = threading.Barrier(8), MySQLConnector.find_fileno
def find_late(*arguments):
    connected.wait(30)
    return find(*arguments)
MySQLConnector.find_fileno = find_late

engine = create_engine(sys.argv[1], poolclass=PidPool, pool_size=8)
found = []
def connect():
    connection = engine.connect()
    host = connection.scalar(text("select host from information_schema.processlist where id=connection_id()"))
    found.append((connection, tag_of(connection), int(host.rpartition(":")[2])))
threads = [threading.Thread(target=connect) for _ in range(8)]
[each.start() for each in threads]
[each.join() for each in threads]
assert len({tag.fd for _, tag, _ in found}) == 8
for _, tag, port in found:
    with socket.socket(fileno=os.dup(tag.fd)) as copy:
        assert copy.getsockname()[1] == port
    assert os.fstat(tag.fd).st_ino == tag.socket_inode
print("found")
"""


def test_threads_that_connect_at_once_each_find_their_own(
    mariadb: MariaDB, c_extension: dict[str, str]
) -> None:
    address = url(mariadb, "mysqlconnector")
    done = subprocess.run(
        [sys.executable, "-c", FOUND, address],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **c_extension},
    )
    assert done.stdout == "found\n", done.stderr


# -- what is known of the transaction


@pytest.mark.parametrize("driver", ["pymysql", "mysqlconnector"])
def test_rows_that_were_only_read_are_a_transaction_or_may_be(
    mariadb: MariaDB, make_engine: MakeEngine, driver: str
) -> None:
    with make_engine(url(mariadb, driver)).connect() as connection:
        connection.execute(text("create table if not exists kept (v varchar(20))"))
        connection.commit()
        driver_connection = raw(connection)
        state = driver_of(driver_connection)
        assert state.in_transaction(driver_connection) is False
        connection.execute(text("select * from kept for update"))
        expected = None if driver == "pymysql" else True
        assert state.in_transaction(driver_connection) is expected
        connection.execute(text("insert into kept values ('a')"))
        assert state.in_transaction(driver_connection) is True
        connection.commit()
        assert state.in_transaction(driver_connection) is False


@pytest.mark.parametrize(("driver", "after_rows"), [("aiomysql", None), ("asyncmy", True)])
def test_rows_that_were_only_read_under_asyncio(
    mariadb: MariaDB, driver: str, after_rows: bool | None
) -> None:
    async def parent() -> None:
        engine = create_async_engine(url(mariadb, driver), poolclass=AsyncPidPool)
        async with engine.connect() as connection:
            await connection.execute(text("create table if not exists kept (v varchar(20))"))
            await connection.commit()
            driver_connection: Any = (await connection.get_raw_connection()).dbapi_connection
            state = driver_of(driver_connection)
            assert state.in_transaction(driver_connection) is False
            await connection.execute(text("select * from kept for update"))
            assert state.in_transaction(driver_connection) is after_rows
            await connection.execute(text("insert into kept values ('a')"))
            assert state.in_transaction(driver_connection) is True
            await connection.commit()
            assert state.in_transaction(driver_connection) is False
        await engine.dispose()

    asyncio.run(parent())
