"""Forks within forks: each process disowns what its ancestors opened, and keeps its own."""

from __future__ import annotations

import gc
import os
import sys
import threading
import weakref
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


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("first", ["python", "c"])
@pytest.mark.parametrize("second", ["python", "c"])
def test_a_pool_that_a_grandchild_disposed_of_goes(engine: Engine, first: How, second: How) -> None:
    parent = Parent(engine, "no transaction")

    def child() -> None:  # forks before it uses its pool: its events wait
        run_in_child(grandchild, how=second)

    def grandchild() -> None:
        connection = engine.connect()
        pool = weakref.ref(engine.pool)
        engine.dispose(close=False)
        connection.close()
        parent.connection.close()
        gc.collect()
        assert pool() is None

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
def test_a_child_forked_in_c_from_threads_looks_for_no_frames_of_threads(engine: Engine) -> None:
    """It has the states of its parent's threads. Threads that it starts run on their stacks, so to look for
    the frames of all threads would end it with a segmentation fault."""
    parent = Parent(engine, "in transaction")
    may_end = threading.Event()
    waiting = threading.Thread(target=may_end.wait, args=(30,))
    waiting.start()

    def child() -> list[str]:
        parent.connection.close()
        engine.dispose()
        looked: list[str] = []
        frames, sys._current_frames = sys._current_frames, lambda: looked.append("at frames") or {}
        try:
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
        finally:
            sys._current_frames = frames
        return looked

    try:
        assert run_in_child(child, how="c") == []
        assert run_in_child(child, how="python") == ["at frames"]
    finally:
        may_end.set()
        waiting.join()
    parent.notices_nothing()
