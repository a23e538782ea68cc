"""Forks within forks: each process disowns what its ancestors opened, and keeps its own."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from child import raises_foreign
from engines import pool_of
from forking import How, run_in_child
from parent import Parent, server_pid
from sqlalchemy import Engine

from pidpool import tag_of
from pidpool.forks import detection

pytestmark = pytest.mark.usefixtures("clean_log")
both_hows = pytest.mark.parametrize("how", ["python", "c"])


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("first", ["python", "c"])
@pytest.mark.parametrize("second", ["python", "c"])
@pytest.mark.parametrize("noticed", [True, False])
def test_a_grandchild_disowns_what_both_its_ancestors_opened(
    engine: Engine, first: How, second: How, noticed: bool
) -> None:
    parent = Parent(engine, "in transaction")
    top = os.getpid()

    def child() -> None:
        own, number = None, None
        if noticed:
            own = engine.connect()
            number = server_pid(own)
        run_in_child(grandchild, own, how=second)
        error = raises_foreign(parent.connection)
        assert (error.owner_pid, error.pid) == (top, os.getpid())
        parent.connection.rollback()
        if own is not None:
            assert server_pid(own) == number
            own.close()
        engine.dispose()

    def grandchild(of_child: Any) -> None:
        error = raises_foreign(parent.connection)
        assert (error.owner_pid, error.pid) == (top, os.getpid())
        if of_child is not None:
            error = raises_foreign(of_child)
            assert (error.owner_pid, error.pid) == (os.getppid(), os.getpid())
            of_child.rollback()
        parent.connection.rollback()
        for connection in filter(None, [parent.connection, of_child]):
            assert tag_of(connection) is None
            server_pid(connection)
            assert tag_of(connection).owner_pid == os.getpid()
        assert pool_of(engine).checkedout() == 1 + (of_child is not None)
        for connection in filter(None, [parent.connection, of_child]):
            connection.close()
        engine.dispose()

    run_in_child(child, how=first)
    parent.notices_nothing()


@both_hows
def test_a_replaced_connection_is_the_childs_own_also_towards_a_grandchild(engine: Engine, how: How) -> None:
    parent = Parent(engine, "no transaction")

    def child() -> None:
        connection = parent.connection
        number = server_pid(connection)  # replaced

        def grandchild() -> None:
            error = raises_foreign(connection)
            assert error.owner_pid == os.getppid()
            connection.rollback()
            assert server_pid(connection) != number
            connection.close()
            engine.dispose()

        run_in_child(grandchild, how=how)
        assert server_pid(connection) == number
        connection.close()
        engine.dispose()

    run_in_child(child, how=how)
    parent.connection.close()


def test_a_child_that_never_noticed_its_fork_can_fork(engine: Engine) -> None:
    """The hooks of its own fork meet the connects of threads that don't exist there."""
    engine.connect().close()
    held, release = threading.Event(), threading.Event()

    def connect() -> None:
        held.set()
        release.wait(30)

    thread = threading.Thread(target=detection.hold_forks_during, args=(connect,))
    thread.start()
    assert held.wait(10)

    def child() -> None:
        run_in_child(use, engine, how="python", life=10)

    try:
        run_in_child(child, how="c", life=15)
    finally:
        release.set()
        thread.join()


def use(engine: Engine) -> None:
    with engine.connect() as connection:
        server_pid(connection)
    engine.dispose()


@pytest.mark.usefixtures("table")
def test_a_child_forked_in_c_from_threads_can_fork_when_it_has_threads_of_its_own(engine: Engine) -> None:
    """It has the states of its parent's threads. Its own threads run on their stacks, so that to look for the
    frames of all threads would end it with a segmentation fault."""
    parent = Parent(engine, "in transaction")

    def child() -> int:
        parent.connection.close()
        engine.dispose()
        with threads(6, lambda n: n):
            for _ in range(20):
                pid = os.fork()
                if pid == 0:
                    os._exit(0)
                assert os.waitpid(pid, 0)[1] == 0
        return 20

    with threads(6, lambda n: 10 * n):
        assert run_in_child(child, how="c") == 20
    parent.notices_nothing()


@contextlib.contextmanager
def threads(number: int, depth_of: Callable[[int], int]) -> Iterator[None]:
    """Have threads that wait, deep in their stacks."""
    are_deep, may_end = threading.Barrier(number + 1), threading.Event()

    def descend(depth: int, way: Callable[..., Any], at_the_end: Callable[[], Any]) -> None:
        if depth:  # by way of C, so that C's stack has frames too
            list(way(lambda less: descend(less, way, at_the_end), [depth - 1]))
        else:
            at_the_end()

    def wait() -> None:
        are_deep.wait(30)
        may_end.wait(30)

    def run(depth: int) -> None:
        # Another way than the first one's, so that it writes other things to the same places of the stack.
        descend(depth + 40, lambda function, found: sorted(found, key=function), lambda: None)
        descend(depth, map, wait)

    started = [threading.Thread(target=run, args=(depth_of(n),), daemon=True) for n in range(1, number + 1)]
    for each in started:
        each.start()
    are_deep.wait(30)
    try:
        yield
    finally:
        may_end.set()
        for each in started:
            each.join(30)
