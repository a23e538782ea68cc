"""Objects that refer to an inherited connection: sessions, pooled connections, and all their methods."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
from engines import MakeEngine, pool_of, raw
from forking import How, run_in_child
from parent import Parent, server_pid
from sqlalchemy import Column, Engine, Integer, String, text
from sqlalchemy import select as sql_select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, declarative_base

from pidpool import ForeignConnectionError
from pidpool.tools.demo.postgres import EmbeddedPostgres

pytestmark = pytest.mark.usefixtures("clean_log")
both_hows = pytest.mark.parametrize("how", ["python", "c"])


Base: Any = declarative_base()


class Thing(Base):
    __tablename__ = "things"
    id = Column(Integer, primary_key=True)
    value = Column(String)


@pytest.fixture
def things(postgres: EmbeddedPostgres, make_engine: MakeEngine) -> Iterator[None]:
    engine = make_engine(postgres.url(tls=False))
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Thing(id=1, value="begun"))
        session.commit()
    yield
    with engine.begin() as connection:
        connection.execute(text("set local lock_timeout = '10s'"))
        Base.metadata.drop_all(connection)


@both_hows
@pytest.mark.usefixtures("things")
@pytest.mark.parametrize("flushed", [True, False])
def test_an_inherited_session_goes_on_after_a_rollback(engine: Engine, how: How, flushed: bool) -> None:
    session = Session(engine)
    thing = session.get(Thing, 1)
    assert thing is not None
    other = Thing(id=2, value="the parent's")
    session.add(other)
    if flushed:
        session.flush()
    number = server_pid(session)

    def child() -> None:
        assert thing.value == "begun"  # it was loaded
        thing.value = "the child's"
        with pytest.raises(OperationalError) as caught:
            session.commit()
        assert isinstance(caught.value.orig, ForeignConnectionError)
        session.rollback()
        assert thing.value == "begun"
        assert session.scalars(sql_select(Thing.id)).all() == [1]
        thing.value = "the child's"
        session.commit()
        assert server_pid(session) != number
        session.close()
        engine.dispose()

    run_in_child(child, how=how)
    assert server_pid(session) == number
    session.commit()
    session.expire_all()
    values = session.execute(sql_select(Thing.id, Thing.value).order_by(Thing.id)).all()
    assert values == [(1, "the child's"), (2, "the parent's")]
    session.close()


@both_hows
def test_raw_connections_as_sqlalchemys(engine: Engine, how: How) -> None:
    proxied = engine.raw_connection()
    number = proxied.driver_connection.get_backend_pid()
    open_transaction = engine.raw_connection()
    open_transaction.cursor().execute("select 1")

    def child() -> None:
        cursor = proxied.cursor()
        cursor.execute("select pg_backend_pid()")
        assert cursor.fetchone() != (number,)
        proxied.rollback()
        proxied.close()
        with pytest.raises(ForeignConnectionError):
            open_transaction.cursor().execute("select 1")
        with pytest.raises(ForeignConnectionError):
            open_transaction.commit()
        open_transaction.rollback()
        open_transaction.cursor().execute("select 1")
        open_transaction.close()
        assert pool_of(engine).checkedout() == 0
        engine.dispose()

    run_in_child(child, how=how)
    assert proxied.driver_connection.get_backend_pid() == number
    assert open_transaction.driver_connection.info.transaction_status == 2  # INTRANS
    proxied.close()
    open_transaction.close()


DOORS = {
    "dbapi_connection.close": lambda connection: raw(connection).close(),
    "proxied.close": lambda connection: connection.connection.close(),
    "proxied.rollback": lambda connection: connection.connection.rollback(),
    "proxied.detach": lambda connection: connection.connection.detach(),
    "proxied.invalidate": lambda connection: connection.connection.invalidate(),
    "connection.detach": lambda connection: connection.detach(),
    "connection.info": lambda connection: connection.info,
    "is_valid": lambda connection: connection.connection.is_valid,
}


@both_hows
@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("door", DOORS)
def test_every_door_of_a_pooled_connection_checks_its_owner(engine: Engine, door: str, how: How) -> None:
    parent = Parent(engine, "in transaction")

    def child() -> None:
        DOORS[door](parent.connection)
        parent.connection.close()
        parent.connection = None
        engine.dispose()
        gc.collect()

    run_in_child(child, how=how)
    parent.notices_nothing()


@both_hows
@pytest.mark.usefixtures("table")
def test_a_soft_invalidation_in_a_child_leaves_the_connection_to_be_used(engine: Engine, how: How) -> None:
    """It has the next checkout recycle a connection; an inherited one never has another checkout."""
    parent = Parent(engine, "no transaction")

    def child() -> int:
        parent.connection.connection.invalidate(soft=True)
        pid = server_pid(parent.connection)
        parent.connection.close()
        engine.dispose()
        return pid

    assert run_in_child(child, how=how) != parent.server_pid
    parent.notices_nothing()
