"""Question 11: what does PidPool cost asyncio, ``async with engine.connect()`` with asyncpg?"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import closing

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from bench.harness import Answer, Panel, Row, Scale, Slice, Spread, alternate, at_most, main, ratios
from pidpool import AsyncPidPool
from pidpool.tools.demo.postgres import EmbeddedPostgres

QUESTION = "asyncio: async with engine.connect(), asyncpg over TLS"

READING = """\
`async with engine.connect()` on an idle connection, without a statement, in CPU time of the thread: no word
goes to the server, so all of it is SQLAlchemy's engine, its greenlets and the pool. *With a statement* asks
for a row in between. Slices of 50, against AsyncAdaptedQueuePool, which is what `create_async_engine` takes
by itself; *again* is that pool a second time."""

ASYNC_QUEUE, ASYNC_QUEUE_AGAIN = "AsyncAdaptedQueuePool", "AsyncAdaptedQueuePool again"
ASYNC_PID = "AsyncPidPool"
TIMES = 50


def answer(scale: Scale) -> Answer:
    measured: dict[str, list[float]] = {}
    with EmbeddedPostgres() as server, closing(asyncio.new_event_loop()) as loop:
        for _ in range(scale.rounds(4) if not scale.quick else 1):
            engines = _engines(server.url(tls=True, driver="postgresql+asyncpg"))
            slices = {}
            for name, engine in engines.items():
                slices[name] = _slice(loop, _checkout(engine))
                slices[f"{name}, with a statement"] = _slice(loop, _statement(engine))
            for name, values in alternate(slices, scale.rounds(100)).items():
                measured.setdefault(name, []).extend(values)
            for engine in engines.values():
                loop.run_until_complete(engine.dispose())
    rows = [
        at_most(
            "AsyncPidPool against AsyncAdaptedQueuePool",
            ratios(measured[ASYNC_PID], measured[ASYNC_QUEUE]),
            0.95,
            ASYNC_QUEUE,
        ),
        Row(
            "AsyncPidPool against AsyncAdaptedQueuePool, with a statement",
            ratios(
                measured[f"{ASYNC_PID}, with a statement"], measured[f"{ASYNC_QUEUE}, with a statement"]
            ).text(" ×", digits=3),
        ),
    ]
    cost = {name: Spread.of(values) for name, values in measured.items()}
    rows += [Row(name, spread.text(" µs", 1e6)) for name, spread in cost.items()]
    names = [ASYNC_QUEUE, ASYNC_QUEUE_AGAIN, ASYNC_PID]
    panel = Panel(QUESTION, "µs of CPU time", names, {"": [cost[name].median * 1e6 for name in names]})
    return Answer(QUESTION, READING, rows, [panel])


def _engines(url: str) -> dict[str, AsyncEngine]:
    classes = {
        ASYNC_QUEUE: AsyncAdaptedQueuePool,
        ASYNC_QUEUE_AGAIN: AsyncAdaptedQueuePool,
        ASYNC_PID: AsyncPidPool,
    }
    return {name: create_async_engine(url, poolclass=pool) for name, pool in classes.items()}


def _slice(loop: asyncio.AbstractEventLoop, operation: Callable[[], Awaitable[None]]) -> Slice:
    async def run() -> float:
        started = time.thread_time_ns()
        for _ in range(TIMES):
            await operation()
        return (time.thread_time_ns() - started) / TIMES / 1e9

    return lambda: loop.run_until_complete(run())


def _checkout(engine: AsyncEngine) -> Callable[[], Awaitable[None]]:
    async def operation() -> None:
        async with engine.connect():
            pass

    return operation


def _statement(engine: AsyncEngine) -> Callable[[], Awaitable[None]]:
    select = text("select 1")

    async def operation() -> None:
        async with engine.connect() as connection:
            await connection.scalar(select)

    return operation


if __name__ == "__main__":
    main(answer)
