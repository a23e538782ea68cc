"""Forks with a connection idle and another in a transaction, over one driver; prints what became of them.

    driver_forks.py URL POOL CA

In each turn the parent inserts a row, a child is forked, in Python or in C, and does one thing with what it
inherited; then the parent's transaction goes on, and commits. CA: a file for TLS, or "-".
"""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import gc
import itertools
import json
import os
import signal
import socket
import ssl
import struct
import sys
import warnings
from collections.abc import Callable
from typing import Any

from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, QueuePool

from pidpool import AsyncPidPool, ForeignConnectionError, PidPool, tag_of
from pidpool.forks.severing import is_disowned

ACTIONS = ("drop", "use", "close", "exit")
HOWS = ("python", "c")
SECONDS = 5 if sys.argv[2] == "queue" else 30
"""After which a child, or the parent's turn, counts as hung."""

url = make_url(sys.argv[1])
pool, ca = sys.argv[2:]
driver = url.get_dialect().driver
is_async = url.get_dialect().is_async
is_sqlite = url.get_backend_name() == "sqlite"
pool_class: Any = {
    ("pidpool", False): PidPool,
    ("pidpool", True): AsyncPidPool,
    ("queue", False): QueuePool,
    ("queue", True): AsyncAdaptedQueuePool,
}[pool, is_async]
WHO = {"postgresql": "select pg_backend_pid()", "sqlite": "select 0"}.get(
    url.get_backend_name(), "select connection_id()"
)


def connect_args() -> dict[str, Any]:
    if ca == "-":
        return {
            "psycopg2": {"sslmode": "disable"},
            "psycopg": {"sslmode": "disable"},
            "pg8000": {"ssl_context": False},
            "asyncpg": {"ssl": False},
            "pymysql": {"ssl_disabled": True},
            "mysqlconnector": {"ssl_disabled": True},
        }.get(driver, {})
    context = ssl.create_default_context(cafile=ca)
    return {
        "psycopg2": {"sslmode": "verify-full", "sslrootcert": ca},
        "psycopg": {"sslmode": "verify-full", "sslrootcert": ca},
        "pg8000": {"ssl_context": context},
        "mysqldb": {"ssl": {"ca": ca}},
        "pymysql": {"ssl": {"ca": ca}},
        "mysqlconnector": {"ssl_ca": ca},
    }.get(driver, {"ssl": context})


def make_engine(pool_class: Any) -> Any:
    make = create_async_engine if is_async else create_engine
    return make(url, poolclass=pool_class, connect_args=connect_args())


def bytes_on_the_wire(fd: int) -> tuple[int, int] | None:
    with socket.socket(fileno=os.dup(fd)) as copy:
        if copy.family == socket.AF_UNIX:
            return None
        info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    # struct tcp_info of linux/tcp.h: tcpi_bytes_received, tcpi_bytes_sent.
    return struct.unpack_from("Q", info, 128)[0], struct.unpack_from("Q", info, 200)[0]


libc = ctypes.PyDLL(None)


class Turn:
    """One fork, and what the parent finds afterwards. Coroutines use the driver, whichever it is."""

    def __init__(self, engine: Any, how: str, action: str) -> None:
        self.engine = engine
        self.how = how
        self.action = action
        self.severed = 0

    def run(self, run: Callable[[Any], Any]) -> None:
        run(self.open())
        if self.how == "python":
            run(self.fork_in_a_task())
        else:  # between two runs of the loop: from Python 3.14 on a child that is forked in one can run none
            self.fork()
        run(self.look())

    async def open(self) -> None:
        self.connection = await do(self.engine.connect())
        idle = await do(self.engine.connect())
        self.numbers = [await self.number(each) for each in (self.connection, idle)]
        for each in (self.connection, idle):
            await do(each.rollback())
        self.tags = [tag_of(each) for each in (self.connection, idle)] if pool == "pidpool" else []
        self.raw = [await raw(each) for each in (self.connection, idle)] if pool == "pidpool" else []
        await do(idle.close())
        await do(self.connection.execute(text("insert into kept values ('parent')")))
        self.held_number = await self.number(self.connection)
        self.bytes_before = self.wire()
        connection, self.connection = self.connection, None
        self.holder = [connection]
        del connection

    async def fork_in_a_task(self) -> None:
        self.fork()

    def fork(self) -> None:
        gc.collect()
        pid = os.fork() if self.how == "python" else libc.fork()
        if pid == 0:
            self.be_the_child()
        signal.alarm(SECONDS)
        _, status = os.waitpid(pid, 0)
        assert status == 0, f"the child ended with status {status}"

    async def look(self) -> None:
        assert self.wire() == self.bytes_before, "a foreign byte"
        connection = self.holder.pop()
        assert await self.number(connection) == self.held_number, "another connection"
        if pool == "pidpool":
            assert await raw(connection) is self.raw[0]
        await do(connection.commit())
        await do(connection.close())
        again = await do(self.engine.connect())
        assert await self.number(again) in self.numbers
        await do(again.close())
        signal.alarm(0)

    async def number(self, connection: Any) -> int:
        return int((await do(connection.execute(text(WHO)))).scalar_one())

    def wire(self) -> list[Any]:
        return [bytes_on_the_wire(tag.fd) for tag in self.tags if tag.fd is not None]

    # -- the child

    def be_the_child(self) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        if not is_async and self.action == "exit":
            sys.exit(0)  # the interpreter's end, with all finalizers
        code = 1
        try:
            asyncio.run(self.act()) if is_async else run_now(self.act())
            if self.action == "exit":
                atexit._run_exitfuncs()
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)

    async def act(self) -> None:
        connection = self.holder.pop()
        try:
            if self.action == "use":
                await self.use(connection)
            elif self.action == "close":
                await do(connection.close())
        except Exception:
            if pool == "pidpool":
                raise
        del connection
        gc.collect()
        if pool == "pidpool":
            if self.action != "exit":
                own = await do(self.engine.connect())
                assert is_sqlite or await self.number(own) not in self.numbers
                await do(own.close())
            self.check_what_was_inherited()
            await do(self.engine.dispose())

    async def use(self, connection: Any) -> None:
        if pool == "pidpool":
            refused: Any = None
            try:
                await do(connection.execute(text("insert into kept values ('child')")))
            except SQLAlchemyError as error:
                refused = error.orig
            assert isinstance(refused, ForeignConnectionError), refused
            await do(connection.rollback())
            assert is_sqlite or await self.number(connection) not in self.numbers
        else:
            await self.number(connection)
            await do(connection.rollback())
        await do(connection.close())

    def check_what_was_inherited(self) -> None:
        assert all(map(is_disowned, self.raw))
        for tag in self.tags:
            assert (tag.fd is None) == is_sqlite, tag
            assert is_sqlite or os.fstat(tag.fd).st_ino != tag.socket_inode


# -- over an engine of either kind


async def do(result: Any) -> Any:
    return await result if is_async else result


def run_now(coroutine: Any) -> Any:
    """Run a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as ended:
        return ended.value
    raise AssertionError


async def raw(connection: Any) -> Any:
    proxied = await connection.get_raw_connection() if is_async else connection.connection
    return proxied.dbapi_connection


def hung(*_: object) -> None:
    raise TimeoutError("the parent hung")


done: dict[str, Any] = {"forks": 0, "committed": 0, "found": 0, "failed": None}


def main(run: Callable[[Any], Any]) -> None:
    signal.signal(signal.SIGALRM, hung)
    aside = make_engine(NullPool)
    run(make_table(aside))
    engine = make_engine(pool_class)
    for how, action in itertools.product(HOWS, ACTIONS):
        done["forks"] += 1
        try:
            Turn(engine, how, action).run(run)
            done["committed"] += 1
        except Exception as error:
            signal.alarm(0)
            done["failed"] = f"{how}, {action}: {type(error).__name__}: {error}"[:300]
            break
    signal.alarm(SECONDS)
    try:
        run(count_rows(engine, aside))
    except Exception as error:
        done["failed"] = done["failed"] or f"afterwards: {error}"[:300]


async def make_table(aside: Any) -> None:
    async with Closing(aside) as connection:
        await do(connection.execute(text("drop table if exists kept")))
        await do(connection.execute(text("create table kept (v varchar(20))")))
        await do(connection.commit())


async def count_rows(engine: Any, aside: Any) -> None:
    await do(engine.dispose())
    async with Closing(aside) as connection:
        rows = (await do(connection.execute(text("select v from kept")))).scalars().all()
        done["found"] = rows.count("parent")


class Closing:
    def __init__(self, engine: Any) -> None:
        self.engine = engine

    async def __aenter__(self) -> Any:
        self.connection = await do(self.engine.connect())
        return self.connection

    async def __aexit__(self, *_: object) -> None:
        await do(self.connection.close())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    try:
        main(asyncio.new_event_loop().run_until_complete if is_async else run_now)
    except TimeoutError as error:  # a signal's handler raises between the tasks of a loop
        done["failed"] = str(error)
    print(json.dumps(done), flush=True)
    if pool == "queue":
        os._exit(0)  # what is broken may not end
