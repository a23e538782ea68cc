"""Inherited cursors and streamed results: the child's end of them sends nothing to the parent's server."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ssl
import sys
from typing import Any

import pytest
from engines import MakeEngine
from forking import How, run_in_child, run_in_child_of_loop
from parent import Parent, server_pid
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import create_async_engine

from pidpool import AsyncPidPool
from pidpool.forks import detection
from pidpool.tools.demo.postgres import EmbeddedPostgres

pytestmark = pytest.mark.usefixtures("clean_log")
both_hows = pytest.mark.parametrize("how", ["python", "c"])


@both_hows
@pytest.mark.parametrize("action", ["fetch", "close", "drop"])
@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_a_streamed_result_stays_the_parents(
    postgres: EmbeddedPostgres, make_engine: MakeEngine, driver: str, action: str, how: How
) -> None:
    engine = make_engine(postgres.url(driver=f"postgresql+{driver}"))
    connection = engine.connect()
    number = server_pid(connection)
    result = connection.execute(text("select generate_series(1, 2000)"), execution_options={"yield_per": 100})
    numbers = result.scalars()
    seen = [next(numbers) for _ in range(150)]
    holder = [connection, result, numbers]

    def child() -> None:
        connection, result, numbers = holder
        if action == "fetch":
            # The rows that the driver had fetched are there; for more it would need the server.
            with pytest.raises(OperationalError) as caught:
                for _ in numbers:
                    pass
            assert caught.value.connection_invalidated
        elif action == "close":
            result.close()
        holder.clear()
        del result, numbers
        gc.collect()
        connection.rollback()
        assert server_pid(connection) != number
        connection.close()
        engine.dispose()

    run_in_child(child, how=how)
    seen.extend(numbers)
    assert seen == list(range(1, 2001))
    assert server_pid(connection) == number
    connection.close()


@both_hows
def test_a_streamed_result_stays_the_parents_if_sockets_are_kept(
    tls_url: str, make_engine: MakeEngine, how: How
) -> None:
    engine = make_engine(tls_url, inherited_sockets="keep")
    connection = engine.connect()
    number = server_pid(connection)
    result = connection.execute(text("select generate_series(1, 9)"), execution_options={"yield_per": 2})
    numbers = result.scalars()
    holder = [connection, numbers]
    seen = [next(numbers)]

    def child() -> None:
        connection, numbers = holder
        with pytest.raises(OperationalError):
            list(numbers)
        connection.rollback()
        assert server_pid(connection) != number
        connection.close()
        engine.dispose()

    run_in_child(child, how=how)
    seen.extend(numbers)
    assert seen == list(range(1, 10))
    assert server_pid(connection) == number
    connection.close()


@both_hows
@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("action", ["drop", "close", "use"])
@pytest.mark.parametrize("name", [None, "named"])
def test_a_cursor_of_the_driver_sends_nothing(
    engine: Engine, name: str | None, action: str, how: How
) -> None:
    parent = Parent(engine, "in transaction")
    cursor = parent.connection.connection.cursor(name)
    cursor.execute("select generate_series(1, 5000)")
    cursor.fetchmany(10)
    holder = [cursor]
    parent.goes_on()

    def child() -> None:
        cursor = holder.pop()
        if name is None:
            detection.settle()  # it has its rows: none of its methods is one of the pool's doors
        if action == "close" and name is None:
            cursor.close()
        elif action == "close" or action == "use":
            with pytest.raises(engine.dialect.loaded_dbapi.OperationalError):
                cursor.close() if action == "close" else cursor.fetchmany(10) if name else cursor.execute(
                    "select 1"
                )
        del cursor
        gc.collect()
        parent.connection.close()
        engine.dispose()

    cursor = None
    run_in_child(child, how=how)
    cursor = holder.pop()
    parent.has_had_no_traffic()
    assert len(cursor.fetchall()) == 4990
    cursor.close()
    parent.goes_on()
    parent.notices_nothing()


@pytest.mark.parametrize("action", ["fetch", "close"])
@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_a_streamed_result_stays_the_parents_if_the_child_collects_its_checkout(
    postgres: EmbeddedPostgres, make_engine: MakeEngine, driver: str, action: str
) -> None:
    """In a cycle, which leaves no reference from the connection to its checkout."""
    engine = make_engine(postgres.url(driver=f"postgresql+{driver}"), inherited_sockets="keep")
    holder: list[Any] = [engine.raw_connection()]
    cursor = holder[0].cursor("streamed")
    cursor.execute("select generate_series(1, 2000)")
    assert cursor.fetchmany(2) == [(1,), (2,)]

    def child() -> None:
        cycle: list[Any] = [*holder]
        cycle.append(cycle)
        holder.clear()
        del cycle
        gc.collect()
        with contextlib.suppress(Exception):  # whatever the driver makes of it
            cursor.fetchmany(300) if action == "fetch" else cursor.close()

    run_in_child(child, how="c")
    assert cursor.fetchmany(300) == [(number,) for number in range(3, 303)]
    cursor.close()
    holder[0].close()


@both_hows
@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_a_loop_over_a_named_cursor_stays_the_parents(
    postgres: EmbeddedPostgres, make_engine: MakeEngine, driver: str, how: How
) -> None:
    """The child goes on in the middle of it."""
    engine = make_engine(postgres.url(driver=f"postgresql+{driver}"))
    connection = engine.raw_connection()
    cursor: Any = connection.cursor("streamed")
    cursor.itersize = 2
    cursor.execute("select generate_series(1, 20)")
    rows = iter(cursor)
    seen = [next(rows), next(rows)]

    def child() -> None:
        with pytest.raises(engine.dialect.loaded_dbapi.Error):
            list(rows)
        connection.close()
        engine.dispose()

    run_in_child(child, how=how)
    assert [*seen, *rows] == [(number,) for number in range(1, 21)]
    cursor.close()
    connection.close()


def test_next_of_a_streamed_cursor_is_the_drivers(
    postgres: EmbeddedPostgres, tls_url: str, make_engine: MakeEngine
) -> None:
    context = ssl.create_default_context(cafile=postgres.ca_file)
    url = postgres.url(driver="postgresql+pg8000").partition("?")[0]
    pg8000 = make_engine(url, connect_args={"ssl_context": context}).raw_connection()
    named = make_engine(tls_url).raw_connection()
    for cursor in (pg8000.cursor(), named.cursor("streamed")):
        cursor.execute("select generate_series(1, 3)")
        assert [*next(cursor)] == [1]
        assert [[*row] for row in cursor] == [[2], [3]]
        cursor.close()
    pg8000.close()
    named.close()


@both_hows
@pytest.mark.parametrize("action", ["fetch", "close"])
@pytest.mark.parametrize("inherited_sockets", ["sever", "keep"])
def test_a_result_that_pg8000_streams_stays_the_parents(
    postgres: EmbeddedPostgres, make_engine: MakeEngine, how: How, inherited_sockets: str, action: str
) -> None:
    """SQLAlchemy streams there by a cursor that it has asked for as any other."""
    context = ssl.create_default_context(cafile=postgres.ca_file)
    url = postgres.url(driver="postgresql+pg8000").partition("?")[0]
    engine = make_engine(url, inherited_sockets=inherited_sockets, connect_args={"ssl_context": context})
    connection = engine.connect()
    number = server_pid(connection)
    result = connection.execute(text("select generate_series(1, 90)"), execution_options={"yield_per": 2})
    numbers = result.scalars()
    seen = [next(numbers)]

    def child() -> None:
        with contextlib.suppress(Exception):
            list(numbers) if action == "fetch" else result.close()
        connection.rollback()
        assert server_pid(connection) != number
        connection.close()
        engine.dispose()

    run_in_child(child, how=how)
    assert [*seen, *numbers] == list(range(1, 91))
    assert server_pid(connection) == number
    connection.close()


@both_hows
@pytest.mark.parametrize("inherited_sockets", ["sever", "keep"])
def test_a_result_that_asyncpg_streams_stays_the_parents(
    postgres: EmbeddedPostgres, how: How, inherited_sockets: str
) -> None:
    url = postgres.url(driver="postgresql+asyncpg")
    engine = create_async_engine(url, poolclass=AsyncPidPool, inherited_sockets=inherited_sockets)
    loop = asyncio.new_event_loop()

    async def begin() -> list[Any]:
        connection = await engine.connect()
        result = await connection.stream(
            text("select generate_series(1, 900)"), execution_options={"yield_per": 2}
        )
        numbers = result.scalars()
        return [connection, numbers, await anext(aiter(numbers))]

    connection, numbers, first = loop.run_until_complete(begin())

    async def child() -> None:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(5) if sys.version_info >= (3, 11) else contextlib.nullcontext():
                await numbers.all()

    async def end() -> list[int]:
        rest = await numbers.all()
        await connection.close()
        await engine.dispose()
        return [first, *rest]

    run_in_child_of_loop(loop, child, how)
    assert loop.run_until_complete(asyncio.wait_for(end(), 20)) == list(range(1, 901))
    loop.close()
