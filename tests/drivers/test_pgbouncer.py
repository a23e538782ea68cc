"""PgBouncer between the pool and the server, in session and in transaction mode."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from child import raises_foreign
from engines import MakeEngine
from forking import How, run_in_child
from parent import bytes_on_the_wire, server_pid
from servers import pgbouncer
from sqlalchemy import Connection, Engine, text
from sqlalchemy.pool import QueuePool

from pidpool import tag_of
from pidpool.tools.demo.postgres import EmbeddedPostgres

pytestmark = [pytest.mark.system, pytest.mark.usefixtures("table")]
ACTIONS = ["drop", "use", "close", "dispose"]
both_hows = pytest.mark.parametrize("how", ["python", "c"])


@pytest.fixture(scope="module", params=["session", "transaction"])
def through(request: pytest.FixtureRequest, postgres: EmbeddedPostgres) -> Iterator[str]:
    with pgbouncer(postgres, request.param) as url:
        yield url


def behave(action: str, engine: Engine, holder: list[Connection]) -> None:
    connection = holder.pop()
    if action == "use":
        raises_foreign(connection)
        connection.rollback()
        connection.execute(text("insert into kept values ('child')"))
        connection.commit()
    if action in ("use", "close"):
        connection.close()
    elif action == "dispose":
        engine.dispose()
    del connection
    gc.collect()
    with engine.connect() as own:
        assert own.scalar(text("select 1")) == 1
    engine.dispose()


@pytest.mark.usefixtures("clean_log")
@both_hows
@pytest.mark.parametrize("action", ACTIONS)
def test_a_parent_never_notices(through: str, make_engine: MakeEngine, action: str, how: How) -> None:
    engine = make_engine(through)
    connection, idle = engine.connect(), engine.connect()
    idle.scalar(text("select 1"))
    tags = [tag_of(each) for each in (connection, idle)]
    idle.close()
    connection.execute(text("insert into kept values ('parent')"))
    seen = server_pid(connection), connection.scalar(text("select txid_current()"))
    sockets = [tag.fd for tag in tags if tag is not None and tag.fd is not None]
    before = [bytes_on_the_wire(fd) for fd in sockets]
    assert len(before) == 2
    holder = [connection]
    del connection
    run_in_child(behave, action, engine, holder, how=how)
    assert [bytes_on_the_wire(fd) for fd in sockets] == before
    connection = holder.pop()
    assert seen == (server_pid(connection), connection.scalar(text("select txid_current()")))
    assert tag_of(connection) == tags[0]
    connection.commit()
    rows = connection.scalars(text("select v from kept order by v")).all()
    assert rows == (["child", "parent"] if action == "use" else ["parent"])
    connection.close()


@both_hows
def test_a_parents_row_is_lost_with_queuepool(through: str, make_engine: MakeEngine, how: How) -> None:
    engine = make_engine(through, poolclass=QueuePool)
    connection = engine.connect()
    connection.execute(text("insert into kept values ('parent')"))
    holder = [connection]
    del connection

    def drop() -> None:
        holder.clear()
        gc.collect()

    run_in_child(drop, how=how)
    connection = holder.pop()
    connection.commit()
    assert connection.scalars(text("select v from kept")).all() == []
    connection.close()
