"""The pool's options: refused where they make no sense, kept over recreate() and dispose(), given to
create_engine, in a URL, or to the pool itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import MakeEngine
from events import Events
from forking import run_in_child
from sqlalchemy import create_engine, event, text
from sqlalchemy.ext.asyncio import create_async_engine

from pidpool import AsyncPidPool, PidPool
from pidpool.tools.demo.postgres import EmbeddedPostgres

WRONG: list[tuple[str, Any, type[Exception], str]] = [
    ("on_foreign", "refues", ValueError, "takes one of 'replace', 'refuse'"),
    ("on_foreign", None, ValueError, "takes one of 'replace', 'refuse'"),
    ("on_foreign", ["replace"], ValueError, "takes one of 'replace', 'refuse'"),
    ("inherited_sockets", "close", ValueError, "takes one of 'sever', 'keep'"),
    ("hold_warning", -1, ValueError, "takes a number of 0 or more, in seconds, or None for no warnings"),
    ("hold_warning", float("nan"), ValueError, "takes a number of 0 or more"),
    ("hold_warning", float("inf"), ValueError, "takes a number of 0 or more"),
    ("hold_warning", "5", TypeError, "takes a number of 0 or more"),
    ("hold_warning", True, TypeError, "takes a number of 0 or more"),
    ("family", "a/b", ValueError, "takes 1 to 64 letters, digits"),
    ("family", 5, TypeError, "takes 1 to 64 letters, digits"),
    ("family_limit", 0, ValueError, "takes a whole number of 1 or more, connections of all processes"),
    ("family_limit", 2.5, TypeError, "takes a whole number of 1 or more"),
    ("max_idle", -1, ValueError, "takes a number of 0 or more, in seconds, or None to keep idle connections"),
    ("max_idle", "1h", TypeError, "takes a number of 0 or more"),
    ("recycle_jitter", 1.5, ValueError, "takes a number of 0 or more, at most 1: the share of pool_recycle"),
    ("recycle_jitter", -0.1, ValueError, "takes a number of 0 or more, at most 1"),
    ("recycle_jitter", None, TypeError, "takes a number of 0 or more, at most 1"),
    ("logger", "pidpool", TypeError, "takes a structlog logger, or None for structlog's own"),
    ("logger", object(), TypeError, "takes a structlog logger"),
    ("pool_size", -1, ValueError, "takes a whole number of 0 or more, 0 for no limit"),
    ("pool_size", "5", TypeError, "takes a whole number of 0 or more"),
    ("pool_size", 2.5, TypeError, "takes a whole number of 0 or more"),
    ("pool_size", None, TypeError, "takes a whole number of 0 or more"),
    ("max_overflow", 1.5, TypeError, "takes a whole number, a negative one for no limit"),
    ("timeout", -0.1, ValueError, "create_engine calls it pool_timeout"),
    ("timeout", "30", TypeError, "create_engine calls it pool_timeout"),
    ("recycle", -2, ValueError, "in seconds, -1 for never (create_engine calls it pool_recycle)"),
    ("recycle", "1h", TypeError, "in seconds, -1 for never"),
]


@pytest.mark.parametrize(("option", "value", "error", "takes"), WRONG)
def test_a_wrong_option_says_which_what_it_got_and_what_it_takes(
    option: str, value: Any, error: type[Exception], takes: str
) -> None:
    with pytest.raises(error) as caught:
        PidPool(object, **{option: value})
    assert str(caught.value).startswith(f"{option}={value!r}: ")
    assert takes in str(caught.value)


def test_a_wrong_option_of_create_engine_fails_there() -> None:
    with pytest.raises(ValueError, match="on_foreign='ignore': takes one of"):
        create_engine("sqlite://", poolclass=PidPool, on_foreign="ignore")
    with pytest.raises(TypeError, match="no_such_option"):
        create_engine("sqlite://", poolclass=PidPool, no_such_option=1)


def options(**more: Any) -> dict[str, Any]:
    return {
        "poolclass": PidPool,
        "pool_size": 3,
        "max_overflow": 2,
        "pool_timeout": 1.5,
        "pool_use_lifo": True,
        "pool_recycle": 3000,
        "pool_pre_ping": True,
        "pool_reset_on_return": "commit",
        "pool_logging_name": "orders",
        "on_foreign": "refuse",
        "inherited_sockets": "keep",
        "hold_warning": 25.0,
        "family": "orders",
        "family_limit": 7,
        "max_idle": 600.0,
        "recycle_jitter": 0.25,
        **more,
    }


def read(pool: PidPool) -> tuple[Any, ...]:
    return (
        type(pool),
        pool.size(),
        pool._max_overflow,
        pool.timeout(),
        pool._pool.use_lifo,
        pool._recycle,
        pool._pre_ping,
        pool._reset_on_return.name,
        pool.logging_name,
        pool.on_foreign,
        pool.inherited_sockets,
        pool.hold_warning,
        pool.pool_events.family.name,
        pool.pool_events.family.limit,
        pool.max_idle,
        pool.recycle_jitter,
        pool.pool_events.pool,
        id(pool.pool_events._logger._logger),
        pool.pool_events._logger._logger is not None,
    )


@pytest.mark.usefixtures("clean_log")
def test_every_option_is_kept(tls_url: str, make_engine: MakeEngine) -> None:
    engine = make_engine(tls_url, **options(logger=Events().logger))
    listened: list[str] = []
    event.listen(engine, "checkout", lambda *_: listened.append("checkout"))
    pool = engine.pool
    assert isinstance(pool, PidPool)
    before = read(pool)
    shown = (3, 2, 1.5, True, 3000, True, "reset_commit", "orders", "refuse", "keep", 25.0)
    shown += ("orders", 7, 600.0, 0.25, "orders")
    assert before[1:-2] == shown

    def child(how: str) -> None:
        pool.status()  # noticed
        assert read(pool) == before
        engine.dispose(close=how == "with close")
        assert engine.pool is not pool
        assert read(engine.pool) == before
        count = len(listened)
        with engine.connect() as connection:
            connection.scalar(text("select 1"))
        assert len(listened) == count + 1
        engine.dispose()

    assert read(pool.recreate()) == before
    run_in_child(child, "with close")
    run_in_child(child, "without")
    engine.dispose()
    assert read(engine.pool) == before


@pytest.mark.usefixtures("clean_log")
def test_a_given_logger_is_kept_after_dispose_and_in_a_child(tls_url: str, make_engine: MakeEngine) -> None:
    events = Events()
    engine = make_engine(tls_url, logger=events.logger)

    def use() -> list[str]:
        events.clear()
        with engine.connect() as connection:
            connection.scalar(text("select 1"))
        engine.dispose()
        return events.names

    assert "connection.opened" in use()
    assert "connection.opened" in use()  # of the second pool
    names = run_in_child(use)
    assert names[0] == "pool.adopted" and "connection.opened" in names


def test_the_name_in_events_is_the_pools_logging_name(tls_url: str, make_engine: MakeEngine) -> None:
    events = Events()
    engine = make_engine(tls_url, logger=events.logger, pool_logging_name="orders")
    engine.connect().close()
    assert {event["pool"] for event in events.all} == {"orders"}


def test_the_pool_alone(tmp_path: Path) -> None:
    import sqlite3

    pool = PidPool(lambda: sqlite3.connect(tmp_path / "a.db"), 1, max_overflow=0, timeout=None)
    connection = pool.connect()
    assert connection.cursor().execute("select 1").fetchone() == (1,)
    connection.close()
    assert (pool.checkedin(), pool.checkedout()) == (1, 0)
    pool.dispose()


def test_a_plain_pool_for_sqlite(tmp_path: Path, make_engine: MakeEngine) -> None:
    engine = make_engine(f"sqlite:///{tmp_path}/a.db", pool_size=1, max_overflow=0)
    with engine.begin() as connection:
        connection.execute(text("create table t (v integer)"))
        connection.execute(text("insert into t values (1)"))
    first = engine.raw_connection()
    raw = first.dbapi_connection
    first.close()
    second = engine.raw_connection()
    assert second.dbapi_connection is raw  # pooled
    second.close()
    with engine.connect() as connection:
        assert connection.scalar(text("select v from t")) == 1
        assert engine.pool.status().startswith("Pool size: 1")


def test_the_async_pool_keeps_its_class_and_its_options(postgres: EmbeddedPostgres) -> None:
    engine = create_async_engine(postgres.url(driver="postgresql+asyncpg"), **options(poolclass=AsyncPidPool))
    pool = engine.sync_engine.pool
    assert isinstance(pool, AsyncPidPool)
    again = pool.recreate()
    assert read(again) == read(pool) and type(again._pool) is type(pool._pool)
