"""The connection of the child's own in the place of an inherited one: its settings, its `info`, its turn."""

from __future__ import annotations

import os
from typing import Any

import pytest
from engines import MakeEngine, pool_of, raw
from forking import How, run_in_child
from parent import Parent, server_pid
from sqlalchemy import Engine, event, text
from sqlalchemy.exc import OperationalError, StatementError
from sqlalchemy.exc import TimeoutError as CheckoutTimeoutError

from pidpool.tools.demo.postgres import EmbeddedPostgres

pytestmark = pytest.mark.usefixtures("clean_log")
both_hows = pytest.mark.parametrize("how", ["python", "c"])


SETTINGS = {
    "AUTOCOMMIT": {"isolation_level": "AUTOCOMMIT"},
    "SERIALIZABLE": {"isolation_level": "SERIALIZABLE"},
    "read only": {"postgresql_readonly": True},
    "all": {"isolation_level": "SERIALIZABLE", "postgresql_readonly": True, "postgresql_deferrable": True},
}


def settings_seen(connection: Any) -> tuple[Any, ...]:
    driver = raw(connection)
    names = ("transaction_isolation", "transaction_read_only", "transaction_deferrable")
    shown = tuple(connection.scalar(text(f"show {name}")) for name in names)
    connection.rollback()
    return driver.autocommit, *shown


@both_hows
@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_a_replacement_has_the_settings_of_the_inherited_connection(
    postgres: EmbeddedPostgres, make_engine: MakeEngine, driver: str, options: str, how: How
) -> None:
    engine = make_engine(postgres.url(driver=f"postgresql+{driver}"), pool_size=1, max_overflow=0)
    default = engine.connect()
    before = settings_seen(default)
    default.close()
    connection = engine.connect().execution_options(**SETTINGS[options])
    number = server_pid(connection)
    connection.rollback()
    seen = settings_seen(connection)
    assert seen != before

    def child() -> None:
        assert settings_seen(connection) == seen
        assert server_pid(connection) != number
        connection.close()
        # Back in the pool it is as any other: SQLAlchemy has reset it at the checkin.
        with engine.connect() as again:
            assert settings_seen(again) == before
        engine.dispose()

    run_in_child(child, how=how)
    assert settings_seen(connection) == seen
    assert server_pid(connection) == number
    connection.close()


@both_hows
def test_an_inherited_connection_takes_an_isolation_level(engine: Engine, how: How) -> None:
    parent = Parent(engine, "no transaction")

    def child() -> None:
        connection = parent.connection.execution_options(isolation_level="SERIALIZABLE")
        assert connection.scalar(text("show transaction_isolation")) == "serializable"
        assert server_pid(connection) != parent.server_pid
        connection.close()
        with engine.connect() as again:
            assert again.scalar(text("show transaction_isolation")) == "read committed"
        engine.dispose()

    run_in_child(child, how=how)
    assert parent.connection.scalar(text("show transaction_isolation")) == "read committed"
    parent.connection.close()


@both_hows
def test_info_is_of_the_connection_that_is_there(engine: Engine, how: How) -> None:
    """SQLAlchemy's documented recipe keeps a pid in it."""

    @event.listens_for(engine, "connect")
    def connect(dbapi_connection: Any, entry: Any) -> None:
        entry.info["pid"] = os.getpid()

    connection = engine.connect()
    number = server_pid(connection)
    connection.rollback()
    connection.info["seen"] = "by the parent"
    assert connection.info == {"pid": os.getpid(), "seen": "by the parent"}

    def child() -> None:
        assert server_pid(connection) != number
        assert connection.info == {"pid": os.getpid()}
        connection.close()
        engine.dispose()

    run_in_child(child, how=how)
    assert connection.info == {"pid": os.getpid(), "seen": "by the parent"}
    assert server_pid(connection) == number
    connection.close()


@both_hows
def test_a_replacement_waits_its_turn_and_may_fail(tls_url: str, make_engine: MakeEngine, how: How) -> None:
    """The error is the same as when SQLAlchemy reconnects; the next use tries again."""
    engine = make_engine(tls_url, pool_size=1, max_overflow=0, pool_timeout=0.2)
    parent = Parent(engine, "no transaction")
    refused = []

    @event.listens_for(engine, "do_connect")
    def do_connect(dialect: Any, record: Any, arguments: Any, keywords: Any) -> None:
        if refused:
            raise dialect.loaded_dbapi.OperationalError("connection refused")

    def child() -> None:
        refused.append(True)
        with pytest.raises(OperationalError, match="connection refused"):
            server_pid(parent.connection)
        refused.clear()
        parent.connection.rollback()
        other = engine.connect()
        with pytest.raises(StatementError, match="QueuePool limit of size 1") as caught:
            server_pid(parent.connection)
        assert isinstance(caught.value.orig, CheckoutTimeoutError)
        other.close()
        parent.connection.rollback()
        assert server_pid(parent.connection) != parent.server_pid
        parent.connection.close()
        assert (pool_of(engine).checkedin(), pool_of(engine).checkedout()) == (1, 0)
        engine.dispose()

    run_in_child(child, how=how)
    assert server_pid(parent.connection) == parent.server_pid
    parent.connection.close()


@both_hows
def test_a_detach_that_finds_no_place_can_be_tried_again(
    tls_url: str, make_engine: MakeEngine, how: How
) -> None:
    engine = make_engine(tls_url, pool_size=1, max_overflow=0, pool_timeout=0.2)
    parent = Parent(engine, "no transaction")

    def child() -> None:
        other = engine.connect()
        with pytest.raises(CheckoutTimeoutError):
            parent.connection.detach()
        other.close()
        assert server_pid(parent.connection) != parent.server_pid
        parent.connection.rollback()
        parent.connection.detach()
        assert pool_of(engine).checkedout() == 0
        parent.connection.close()
        engine.dispose()

    run_in_child(child, how=how)
    assert server_pid(parent.connection) == parent.server_pid
    parent.connection.close()
