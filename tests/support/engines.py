"""Engines of tests: the fixture `make_engine`, and the pool and driver below SQLAlchemy's objects."""

from __future__ import annotations

from typing import Any, Protocol

from sqlalchemy import Engine

from pidpool import PidPool


class MakeEngine(Protocol):
    def __call__(self, url: str, **options: Any) -> Engine: ...


def pool_of(engine: Engine) -> PidPool:
    assert isinstance(engine.pool, PidPool)
    return engine.pool


def raw(connection: Any) -> Any:
    """Return the driver's connection of a `Connection`."""
    return connection.connection.dbapi_connection
