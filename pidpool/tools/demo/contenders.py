"""The pools that the demo compares.

SQLAlchemy's QueuePool, plain and with either of the two remedies that SQLAlchemy's documentation names
for processes that fork; PidPool; and NullPool, for its speed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, create_engine, event, exc
from sqlalchemy.pool import NullPool, Pool, QueuePool

from pidpool.pool import PidPool


@dataclass(frozen=True)
class Contender:
    """A pool, and how its application handles forks."""

    key: str
    title: str
    poolclass: type[Pool]
    listens: bool = False
    """Whether its engines have the documented event listeners, which compare a connection's pid with the
    process's at checkout."""
    disposes: bool = False
    """Whether its children begin with ``engine.dispose(close=False)``, as documented."""

    def engine(self, url: str, **options: Any) -> Engine:
        """Return a new engine of this contender's."""
        engine = create_engine(url, poolclass=self.poolclass, **options)
        if self.listens:
            event.listen(engine, "connect", _note_pid)
            event.listen(engine, "checkout", _compare_pid)
        return engine

    def begin_child(self, engine: Engine) -> None:
        """Run this contender's first step in a child with the engine that it inherits."""
        if self.disposes:
            engine.dispose(close=False)


# The listeners of "Using Connection Pools with Multiprocessing or os.fork()",
# https://docs.sqlalchemy.org/en/20/core/pooling.html


def _note_pid(dbapi_connection: Any, record: Any) -> None:
    record.info["pid"] = os.getpid()


def _compare_pid(dbapi_connection: Any, record: Any, fairy: Any) -> None:
    owner, pid = record.info["pid"], os.getpid()
    if owner != pid:
        record.dbapi_connection = fairy.dbapi_connection = None
        raise exc.DisconnectionError(f"opened by pid {owner}, checked out in pid {pid}")


PIDPOOL = Contender("pidpool", "PidPool", PidPool)

CONTENDERS = (
    Contender("queuepool", "QueuePool", QueuePool),
    Contender("events", "QueuePool + events", QueuePool, listens=True),
    Contender("dispose", "QueuePool + dispose", QueuePool, disposes=True),
    PIDPOOL,
)

NULLPOOL = Contender("nullpool", "NullPool", NullPool)

BY_KEY = {contender.key: contender for contender in (*CONTENDERS, NULLPOOL)}
