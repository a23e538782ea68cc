"""Two-phase and nested transactions stay the parent's, whatever the child does."""

from __future__ import annotations

import gc

import pytest
from forking import How, run_in_child
from parent import Parent, server_pid
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError

from pidpool import ForeignConnectionError, tag_of

pytestmark = pytest.mark.usefixtures("clean_log")
both_hows = pytest.mark.parametrize("how", ["python", "c"])


@both_hows
@pytest.mark.parametrize("ending", ["prepare", "commit", "rollback", "close", "drop"])
def test_a_two_phase_transaction_stays_the_parents(engine: Engine, ending: str, how: How) -> None:
    connection = engine.connect()
    number = server_pid(connection)
    connection.rollback()
    transaction = connection.begin_twophase()
    txid = connection.scalar(text("select txid_current()"))
    holder = [connection, transaction]
    tag = tag_of(connection)

    def child() -> None:
        connection, transaction = holder
        if ending in ("prepare", "commit"):
            with pytest.raises(OperationalError) as caught:
                getattr(transaction, ending)()
            assert isinstance(caught.value.orig, ForeignConnectionError)
        elif ending == "rollback":
            transaction.rollback()
            assert server_pid(connection) != number
        if ending != "drop":
            connection.close()
        holder.clear()
        del connection, transaction
        gc.collect()
        engine.dispose()

    run_in_child(child, how=how)
    assert connection.scalar(text("select txid_current()")) == txid
    assert (server_pid(connection), tag_of(connection)) == (number, tag)
    transaction.rollback()
    connection.close()


@both_hows
@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("ending", ["rollback", "commit", "leave", "raise", "drop"])
def test_a_savepoint_stays_the_parents(engine: Engine, ending: str, how: How) -> None:
    parent = Parent(engine, "in transaction")
    holder = [parent.connection, parent.connection.begin_nested()]
    parent.connection.execute(text("insert into kept values ('nested')"))
    parent.goes_on()

    def child() -> None:
        connection, nested = holder
        parent.connection = None
        if ending == "rollback":
            nested.rollback()
        elif ending == "commit":
            with pytest.raises(OperationalError):
                nested.commit()
        elif ending == "leave":
            with pytest.raises(OperationalError), nested:
                pass
        elif ending == "raise":
            with pytest.raises(KeyError), nested:
                raise KeyError
        if ending != "drop":
            connection.rollback()
            assert server_pid(connection) != parent.server_pid
            connection.close()
        holder.clear()
        del connection, nested
        gc.collect()
        engine.dispose()

    run_in_child(child, how=how)
    holder.pop().commit()
    rows = parent.connection.scalars(text("select v from kept order by v")).all()
    assert rows == ["nested", "parent"]
    parent.goes_on()
    holder.clear()
    parent.notices_nothing()
