"""`max_idle` and `recycle_jitter`: connections that end in time, and not all at once."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from typing import Any

import pytest
from engines import MakeEngine
from events import Events
from forking import run_in_child
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.util import greenlet_spawn
from waiting import until

from pidpool import AsyncPidPool, PidPool
from pidpool.tools.demo.postgres import EmbeddedPostgres


class Connection:
    def rollback(self) -> None: ...

    def close(self) -> None: ...


def idle_threads() -> int:
    return len(alive())


def alive() -> set[threading.Thread]:
    return {each for each in threading.enumerate() if each.name == "pidpool-idle"}


@pytest.mark.parametrize("use_lifo", [False, True])
def test_idle_connections_are_closed_the_last_one_too(
    tls_url: str, make_engine: MakeEngine, use_lifo: bool, clean_log: None
) -> None:
    events = Events()
    engine = make_engine(tls_url, max_idle=0.3, pool_use_lifo=use_lifo, logger=events.logger)
    pool = engine.pool
    assert isinstance(pool, PidPool)
    held = [engine.connect() for _ in range(3)]
    time.sleep(0.5)
    assert pool.stats().counters.closed["idle"] == 0  # they are in use
    returned = time.monotonic()
    for each in held:
        each.close()
    until(lambda: pool.checkedin() == 0, "they are not closed")
    assert 0.3 <= time.monotonic() - returned < 5
    until(lambda: pool.stats().counters.closed["idle"] == 3, "they are not counted")
    assert [each["reason"] for each in events.of("connection.closed")] == ["idle"] * 3
    with engine.connect() as connection:
        assert connection.scalar(text("select 1")) == 1
    assert pool.overflow() == -4


def test_what_is_used_meanwhile_stays_open() -> None:
    pool = PidPool(Connection, pool_size=1, max_idle=1.0)
    for _ in range(40):
        pool.connect().close()
        time.sleep(0.03)
    assert pool.stats().counters.opened == 1


def test_a_child_has_a_thread_of_its_own_when_it_opens_one() -> None:
    pool = PidPool(Connection, max_idle=0.1)
    pool.connect().close()

    def child() -> int:
        assert idle_threads() == 0
        pool.connect().close()
        assert idle_threads() == 1
        until(lambda: pool.checkedin() == 0, "it is not closed")
        return pool.stats().counters.closed["idle"]

    assert run_in_child(child) == 1


def test_there_is_no_thread_without_the_options() -> None:
    before = alive()
    pool = PidPool(Connection)
    pool.connect().close()
    assert alive() <= before


def test_the_thread_ends_with_its_pool() -> None:
    before = alive()
    pool: Any = PidPool(Connection, max_idle=0.2)
    pool.connect().close()
    (thread,) = alive() - before
    del pool
    gc.collect()
    until(lambda: not thread.is_alive(), "the thread goes on")


def test_a_thread_that_waits_while_idle_ones_are_closed_gets_a_connection() -> None:
    pool = PidPool(Connection, pool_size=1, max_overflow=0, timeout=5, max_idle=0)
    for _ in range(30):
        pool.connect().close()
        time.sleep(0.003)


def test_an_event_loop_closes_its_idle_connections(postgres: EmbeddedPostgres, clean_log: None) -> None:
    engine = create_async_engine(
        postgres.url(driver="postgresql+asyncpg"), poolclass=AsyncPidPool, max_idle=0.2
    )
    pool = engine.sync_engine.pool
    assert isinstance(pool, AsyncPidPool)

    async def use() -> None:
        async with engine.connect() as one, engine.connect() as other:
            await one.execute(text("select 1"))
            await other.execute(text("select 1"))
        await asyncio.wait_for(both_closed(), 30)
        await engine.dispose()

    async def both_closed() -> None:
        # By the count: an entry is out of the pool before its connection is closed.
        while pool.stats().counters.closed["idle"] < 2:
            await asyncio.sleep(0.02)

    asyncio.run(use())
    assert pool.checkedin() == 0


def test_recycling_is_spread_and_never_later(tls_url: str, make_engine: MakeEngine) -> None:
    engine = make_engine(tls_url, pool_size=20, pool_recycle=100, recycle_jitter=0.5)
    pool = engine.pool
    assert isinstance(pool, PidPool)
    held = [engine.connect() for _ in range(20)]
    entries: list[Any] = pool.records()
    after = [entry.recycled_at - entry.starttime for entry in entries]
    assert all(50 <= each <= 100 for each in after) and max(after) - min(after) > 10
    assert 5 < sum(each < 75 for each in after) < 18 or len({*after}) == 20
    for each in held:
        each.close()
    assert pool.stats().counters.closed["recycled"] == 0
    for entry in entries[:5]:
        entry.recycled_at = time.time() - 1
    held = [engine.connect() for _ in range(20)]
    assert pool.stats().counters.closed["recycled"] == 5
    for each in held:
        each.close()
    for each in [engine.connect() for _ in range(20)]:
        each.close()
    assert pool.stats().counters.closed["recycled"] == 5  # once


def test_no_jitter_without_pool_recycle() -> None:
    pool = PidPool(Connection, recycle_jitter=1.0)
    pool.connect().close()
    pool.connect().close()
    assert pool.stats().counters.closed["recycled"] == 0


def test_an_item_under_way_to_a_task_ends_no_closing_of_idle_connections() -> None:
    async def close_idle() -> None:
        pool = AsyncPidPool(Connection, pool_size=2, max_overflow=0, timeout=30, max_idle=3600)
        one, other = await greenlet_spawn(pool.connect), await greenlet_spawn(pool.connect)
        waiting = asyncio.create_task(greenlet_spawn(pool.connect))
        until_waiting = time.monotonic() + 30
        while not pool.stats().waiting and time.monotonic() < until_waiting:
            await asyncio.sleep(0)
        one.close()  # from now on that task's, which has not run yet
        other.close()
        pool._close_due()
        (await waiting).close()
        assert (pool.checkedin(), pool.overflow()) == (2, 0)

    asyncio.run(close_idle())
