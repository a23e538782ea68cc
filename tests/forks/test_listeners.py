"""A fork inside a pool's event listener: the child, too, goes on with the checkout that it is in."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from engines import MakeEngine, pool_of, raw
from forking import HOWS, How, run_in_child, run_on_both_sides
from parent import server_pid
from sqlalchemy import event

from pidpool import tag_of

pytestmark = pytest.mark.usefixtures("clean_log")


@pytest.mark.parametrize("options", [{}, {"family_limit": 2}], ids=["plain", "family_limit"])
@pytest.mark.parametrize("connects", ["first", "again", "after pre-ping"])
def test_a_child_forked_in_a_connect_listener_gets_a_connection_of_its_own(
    tls_url: str, make_engine: MakeEngine, connects: str, options: dict[str, Any]
) -> None:
    """After a pre-ping it connects in the middle of SQLAlchemy's own checkout."""
    engine = make_engine(tls_url, pool_size=1, max_overflow=0, pool_timeout=10, pool_pre_ping=True, **options)
    pool = pool_of(engine)
    if connects != "first":
        with engine.connect() as lost:
            of_driver = raw(lost)
            if connects == "again":
                lost.invalidate()
        of_driver.close()

    def connect(fork_once: Callable[[], None]) -> tuple[int, int]:
        event.listen(engine, "connect", lambda *_: fork_once())
        connection = engine.connect()
        number = server_pid(connection)
        tag = tag_of(connection)
        assert tag is not None and (tag.owner_pid, tag.server_pid) == (os.getpid(), number)
        assert (pool.checkedout(), pool.checkedin()) == (1, 0)
        connection.close()
        assert (pool.checkedout(), pool.checkedin()) == (0, 1)
        with engine.connect() as again:
            assert server_pid(again) == number
        if os.getpid() != parent:
            engine.dispose()
        return number, tag.owner_pid

    parent = os.getpid()
    (number, owner), (childs, child) = run_on_both_sides(connect)
    assert number != childs and owner == parent != child
    with engine.connect() as connection:
        assert server_pid(connection) == number


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("was_reset", [True, False])
def test_a_child_forked_in_a_reset_listener_undoes_nothing_on_its_parents_connection(
    tls_url: str, make_engine: MakeEngine, how: How, was_reset: bool
) -> None:
    engine = make_engine(tls_url, pool_size=1, max_overflow=0, pool_timeout=10)
    pool = pool_of(engine)

    def check_in(fork_once: Callable[[], None]) -> tuple[list[str], list[str], int]:
        undone: list[str] = []
        returned: list[str] = []

        def undo(connection: Any) -> None:
            undone.append(type(connection).__name__)
            connection.cursor().execute("select 1")
            connection.rollback()

        event.listen(engine, "reset", lambda *_: fork_once())
        event.listen(engine, "checkin", lambda connection, _: returned.append(type(connection).__name__))
        checkout: Any = engine.raw_connection()
        checkout._connection_record.finalize_callback.append(undo)
        checkout._close_special(transaction_reset=was_reset)
        counts = pool.checkedout()
        with engine.connect() as connection:
            assert pool.checkedout() == 1
            server_pid(connection)
        answer = undone[:], returned[:1], counts
        if os.getpid() != parent:
            engine.dispose()
        return answer

    parent = os.getpid()
    ours, childs = run_on_both_sides(check_in, how=how)
    assert ours == (["connection"], ["connection"], 0)
    assert childs[0] == [] and childs[2] == 0
    with engine.connect() as connection:
        server_pid(connection)


def test_a_child_forked_in_the_middle_of_a_first_connect_connects_there(
    tls_url: str, make_engine: MakeEngine
) -> None:
    """It can't wait for that connect, whose lock its own thread has."""
    engine = make_engine(tls_url)
    found: list[int] = []

    def use() -> int:
        with engine.connect() as connection:
            number = server_pid(connection)
        engine.dispose()
        return number

    @event.listens_for(engine, "connect")
    def fork_once(*_: Any) -> None:
        if not found:
            found.append(os.getpid())
            found.append(run_in_child(use))

    with engine.connect() as connection:
        assert server_pid(connection) != found[1]
