"""What a driver holds of a connection's settings goes with it to the child's replacement."""

from __future__ import annotations

import asyncio

import pytest
from forking import How, run_in_child_of_loop
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from pidpool import AsyncPidPool
from pidpool.tools.demo.postgres import EmbeddedPostgres


@pytest.mark.usefixtures("table", "clean_log")
@pytest.mark.parametrize("how", ["python", "c"])
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_autocommit_goes_with_an_async_connection(postgres: EmbeddedPostgres, driver: str, how: How) -> None:
    engine = create_async_engine(postgres.url(driver=f"postgresql+{driver}"), poolclass=AsyncPidPool)
    who = text("select pg_backend_pid()")

    async def open_one() -> tuple[AsyncConnection, int]:
        connection = await engine.connect()
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        return connection, (await connection.execute(who)).scalar_one()

    async def child() -> None:
        await connection.execute(text("insert into kept values ('child')"))
        assert await connection.scalar(who) != number
        await connection.close()
        async with engine.connect() as again:  # which is not in autocommit any more
            await again.execute(text("insert into kept values ('rolled back')"))
        await engine.dispose()

    async def look() -> None:
        assert await connection.scalar(who) == number
        assert (await connection.scalars(text("select v from kept"))).all() == ["child"]
        await connection.close()
        await engine.dispose()

    loop = asyncio.new_event_loop()
    connection, number = loop.run_until_complete(open_one())
    run_in_child_of_loop(loop, child, how)
    loop.run_until_complete(look())
    loop.close()
