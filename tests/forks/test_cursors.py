"""Inherited cursors and streamed results: the child's end of them sends nothing to the parent's server."""

from __future__ import annotations

import gc

import pytest
from engines import MakeEngine
from forking import How, run_in_child
from parent import Parent, server_pid
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError

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
