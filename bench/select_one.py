"""Question 3: what does PidPool cost a real statement, ``SELECT 1`` over TLS through `Engine.connect`?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg2.pool
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.pool import NullPool, QueuePool

from bench import contenders
from bench.contenders import NULL, OSLO, PID, PSYCOPG2, QUEUE, QUEUE_AGAIN, RECIPE
from bench.harness import (
    Answer,
    Panel,
    Row,
    Scale,
    Spread,
    alternate,
    at_least,
    at_most,
    main,
    ratios,
    undisturbed,
    wall_slice,
)
from pidpool import PidPool
from pidpool.tools.demo.postgres import EmbeddedPostgres

QUESTION = "SELECT 1 over TLS"

READING = """\
`with engine.connect() as connection: connection.scalar(text("select 1"))`, by the clock, in slices of 6,
after 4 that don't count. The contenders that keep their connection all have the same one in turn, so that
neither the server's process nor the socket can differ between them: what is left of a difference is the
pool's. Of 300 slices the fastest tenth counts, since whatever else the machine does makes a slice slower
and none faster; the quartiles are those of six connections. *QueuePool again* shows how far two of one kind
are apart. NullPool connects anew for each statement, over TLS every time."""


def _statement(engine: Engine) -> Callable[[], Any]:
    select = text("select 1")

    def operation() -> None:
        with engine.connect() as connection:
            connection.scalar(select)

    return operation


def _raw(connection: Any) -> Callable[[], Any]:
    """What psycopg2's pool needs for the same: the statement, and the rollback."""
    pool = _OneConnectionPool(connection)

    def operation() -> None:
        mine = pool.getconn()
        cursor = mine.cursor()
        cursor.execute("select 1")
        cursor.fetchone()
        cursor.close()
        mine.rollback()
        pool.putconn(mine)

    return operation


class _OneConnectionPool(psycopg2.pool.ThreadedConnectionPool):
    def __init__(self, connection: Any) -> None:
        self._connection = connection
        super().__init__(1, 1)

    def _connect(self, key: Any = None) -> Any:
        self._pool.append(self._connection)
        return self._connection


def answer(scale: Scale) -> Answer:
    with EmbeddedPostgres() as server:
        return _answer(scale, server.url(tls=True))


def _answer(scale: Scale, url: str) -> Answer:
    costs = [_on_one_connection(scale, url) for _ in range(2 if scale.quick else 6)]
    null = {
        name: wall_slice(_statement(create_engine(url, poolclass=pool)), times)
        for name, pool, times in ((NULL, NullPool, 1), (PID, PidPool, 8))
    }
    against_null = alternate(null, scale.rounds(150))

    def ratio(name: str, base: str) -> Spread:
        return ratios([cost[name] for cost in costs], [cost[base] for cost in costs])

    cost = {name: Spread.of([each[name] for each in costs]) for name in costs[0]}
    cost[NULL] = Spread.of(against_null[NULL])
    times_as_many = ratios(against_null[NULL], against_null[PID])
    rows = [
        at_most("PidPool against QueuePool", ratio(PID, QUEUE), 1.01, "QueuePool's time"),
        Row("QueuePool again against QueuePool", ratio(QUEUE_AGAIN, QUEUE).text(" ×", digits=3)),
        at_least("PidPool's statements a second against NullPool's", times_as_many, 8, "NullPool"),
        Row("PidPool against the documented recipe", ratio(PID, RECIPE).text(" ×", digits=3)),
        Row("PidPool against oslo.db's guard", ratio(PID, OSLO).text(" ×", digits=3)),
    ]
    rows += [Row(name, spread.text(" µs", 1e6, 1)) for name, spread in cost.items()]
    bars = {name: spread.median * 1e6 for name, spread in cost.items() if name != NULL}
    title = f"SELECT 1 over TLS (NullPool: {cost[NULL].median * 1e6:,.0f} µs)"
    return Answer(QUESTION, READING, rows, [Panel(title, "µs", list(bars), {"": list(bars.values())})])


def _on_one_connection(scale: Scale, url: str) -> dict[str, float]:
    """Return what a statement takes with each pool, all of which have the same connection."""
    checkout = create_engine(url, poolclass=NullPool).raw_connection()
    shared = checkout.dbapi_connection
    slices = {}
    for name in (QUEUE, QUEUE_AGAIN, RECIPE, OSLO, PID):
        pool: Any = PidPool if name == PID else QueuePool
        engine = create_engine(url, poolclass=pool, creator=lambda: shared)
        contenders.add_guard(name, engine)
        slices[name] = wall_slice(_statement(engine), 6, first=4)
    slices[PSYCOPG2] = wall_slice(_raw(shared), 6, first=4)
    measured = alternate(slices, scale.rounds(300))
    checkout.close()
    return {name: undisturbed(values) for name, values in measured.items()}


if __name__ == "__main__":
    main(answer)
