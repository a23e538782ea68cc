"""Inherited SQLite handles: neither used nor closed in the child."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from child import raises_foreign
from descriptors import open_descriptors
from engines import MakeEngine, raw
from forking import How, run_in_child
from sqlalchemy import text

from pidpool.forks.severing import is_disowned

pytestmark = pytest.mark.usefixtures("clean_log")
both_hows = pytest.mark.parametrize("how", ["python", "c"])


@both_hows
def test_an_inherited_sqlite_handle_is_neither_used_nor_closed(
    tmp_path: Path, make_engine: MakeEngine, how: How
) -> None:
    engine = make_engine(f"sqlite:///{tmp_path}/a.db")
    with engine.begin() as connection:
        connection.execute(text("create table kept (v text)"))
    connection = engine.connect()
    idle = engine.connect()
    handles = [raw(connection), raw(idle)]
    idle.close()
    connection.execute(text("insert into kept values ('parent')"))

    def child() -> None:
        descriptors = open_descriptors()
        raises_foreign(connection)
        connection.close()
        engine.dispose()
        gc.collect()
        for handle in handles:
            assert is_disowned(handle)
            handle.total_changes  # noqa: B018  # raises if the handle is closed
        assert open_descriptors() == descriptors
        with engine.connect() as own:
            assert raw(own) not in handles
            assert own.scalar(text("select 1")) == 1
        engine.dispose()

    run_in_child(child, how=how)
    assert raw(connection) is handles[0]
    connection.commit()
    assert connection.scalars(text("select v from kept")).all() == ["parent"]
    connection.close()
