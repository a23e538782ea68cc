"""Listeners that end a checkout in the middle of its return, or raise there."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from pidpool import AsyncPidPool, PidPool
from pidpool.tools.demo.postgres import EmbeddedPostgres

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Connection:
    def __init__(self) -> None:
        self.is_open = True

    def rollback(self) -> None: ...

    def close(self) -> None:
        self.is_open = False


def make_pool() -> tuple[PidPool, list[Connection]]:
    opened: list[Connection] = []

    def connect() -> Connection:
        opened.append(Connection())
        return opened[-1]

    return PidPool(connect, pool_size=2, max_overflow=0, timeout=5), opened


@pytest.mark.parametrize("was_reset", [True, False])
@pytest.mark.parametrize("end", ["detach", "invalidate"])
def test_a_checkout_that_a_reset_listener_has_ended_is_returned_once(end: str, was_reset: bool) -> None:
    pool, _ = make_pool()
    checkout: Any = pool.connect()

    @event.listens_for(pool, "reset")
    def end_it(connection: Any, entry: Any, state: Any) -> None:
        if entry.fairy_ref is not None and entry.fairy_ref().is_valid:
            getattr(entry.fairy_ref(), end)()

    checkout._close_special(transaction_reset=was_reset)
    assert (pool.checkedin(), pool.checkedout()) == (1, 0)
    one, other = pool.connect(), pool.connect()
    assert one.dbapi_connection is not other.dbapi_connection


@pytest.mark.filterwarnings("ignore:Double checkin")  # by SQLAlchemy's own checkin
def test_an_interrupt_after_a_reset_listener_has_ended_the_checkout_is_raised() -> None:
    pool, _ = make_pool()

    @event.listens_for(pool, "reset")
    def invalidate(connection: Any, entry: Any, state: Any) -> None:
        checkout = entry.fairy_ref and entry.fairy_ref()
        if checkout is not None and checkout.is_valid:
            checkout.invalidate()
            raise KeyboardInterrupt

    checkout = pool.connect()
    with pytest.raises(KeyboardInterrupt):
        checkout.close()
    assert (pool.checkedin(), pool.checkedout()) == (1, 0)


def _close(checkouts: list[Any]) -> None:
    with pytest.raises(ZeroDivisionError):
        checkouts[0].close()


def _close_after_failed_reset(checkouts: list[Any]) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("of the test")

    event.listen(checkouts[0]._pool, "reset", fail)
    _close(checkouts)


def _drop(checkouts: list[Any]) -> None:
    checkouts.clear()


@pytest.mark.parametrize(
    ("by", "end"),
    [
        ("checkin", _close),
        ("checkin", _close_after_failed_reset),
        ("checkin", _drop),
        ("finalize_callback", _close),
        ("finalize_callback", _drop),
    ],
)
def test_a_connection_is_closed_if_its_return_fails(by: str, end: Callable[[list[Any]], None]) -> None:
    pool, opened = make_pool()

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    checkouts: list[Any] = [pool.connect()]
    if by == "checkin":
        event.listen(pool, "checkin", fail)
    else:
        checkouts[0]._connection_record.finalize_callback.append(fail)
    end(checkouts)
    assert [each.is_open for each in opened] == [False]
    assert (pool.checkedin(), pool.checkedout()) == (0, 0)
    counts = pool.stats().counters
    assert (counts.opened, counts.closed["invalidated"]) == (1, 1)


@pytest.mark.parametrize("driver", ["postgresql+asyncpg", "postgresql+psycopg"])
@pytest.mark.parametrize(
    ("name", "reason"), [("reset", "invalidated"), ("detach", "collected"), ("close_detached", "collected")]
)
@pytest.mark.filterwarnings("ignore:The garbage collector is trying to clean up:sqlalchemy.exc.SAWarning")
@pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning")  # psycopg's own
@pytest.mark.filterwarnings("ignore:.*unclosed:ResourceWarning")  # asyncpg's
def test_a_collected_async_checkout_is_counted_closed_once(
    postgres: EmbeddedPostgres, driver: str, name: str, reason: str
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    async def collect() -> None:
        engine = create_async_engine(postgres.url(driver=driver), poolclass=AsyncPidPool)
        pool: Any = engine.pool
        connection: AsyncConnection | None = await engine.connect()
        assert connection is not None
        event.listen(engine.sync_engine, name, fail)
        del connection
        gc.collect()
        event.remove(engine.sync_engine, name, fail)
        stats = pool.stats()
        assert (stats.idle, stats.used, stats.connections) == (0, 0, ())
        assert {each: count for each, count in stats.counters.closed.items() if count} == {reason: 1}
        async with engine.connect() as connection:
            await connection.execute(text("select 1"))
        await engine.dispose()

    asyncio.run(collect())
