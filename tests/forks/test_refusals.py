"""`ForeignConnectionError`: fact, numbers and remedy in the text, and all of it through pickle."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

import pytest
from child import raises_foreign
from engines import MakeEngine
from forking import run_in_child
from parent import Parent
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError

from pidpool import ForeignConnectionError

pytestmark = pytest.mark.usefixtures("clean_log")


_inherited_by_workers: Any = None


def _use_inherited(statement: str) -> Any:
    return _inherited_by_workers.execute(text(statement)).scalar_one()


@pytest.mark.usefixtures("table")
def test_the_error_comes_whole_out_of_a_multiprocessing_pool(engine: Engine) -> None:
    global _inherited_by_workers
    parent = Parent(engine, "in transaction")
    _inherited_by_workers = parent.connection
    with multiprocessing.get_context("fork").Pool(1) as workers:
        worker = workers.apply(os.getpid)
        with pytest.raises(OperationalError) as caught:
            workers.apply(_use_inherited, ("select 1",))
        workers.close()
        workers.join()
    _inherited_by_workers = None
    error = caught.value.orig
    assert isinstance(error, ForeignConnectionError)
    assert isinstance(error, engine.dialect.loaded_dbapi.OperationalError)
    assert (error.owner_pid, error.pid) == (os.getpid(), worker)
    assert error.connection_id == parent.tag.connection_id
    assert error.state == "in transaction"
    assert str(error) == (
        f"connection {parent.tag.connection_id} belongs to pid {os.getpid()} and is in a transaction there; "
        f"roll back or close in pid {worker} and check out again"
    )
    parent.notices_nothing()


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("state", ["idle", "no transaction"])
def test_every_refusal_has_fact_numbers_and_remedy(tls_url: str, make_engine: MakeEngine, state: str) -> None:
    engine = make_engine(tls_url, on_foreign="refuse")
    parent = Parent(engine, state)

    def child() -> tuple[int, ForeignConnectionError]:
        if state == "idle":
            with pytest.raises(ForeignConnectionError) as caught:
                engine.connect()
            return os.getpid(), caught.value
        return os.getpid(), raises_foreign(parent.connection)

    pid, error = run_in_child(child)
    if state == "idle":
        assert str(error) == (
            f"the 1 idle connection(s) of this pool belong to pid {os.getpid()} and on_foreign='refuse' "
            f"lets pid {pid} check out none; call engine.dispose() in pid {pid} first"
        )
    else:
        assert str(error) == (
            f"connection {parent.tag.connection_id} belongs to pid {os.getpid()} and on_foreign='refuse' "
            f"allows no replacement; roll back or close in pid {pid} and check out again"
        )
    assert (error.owner_pid, error.pid, error.state) == (os.getpid(), pid, state)
    parent.notices_nothing()
