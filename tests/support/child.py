"""The child's side of a fork test: each use of what it inherited, and the checks of what it must see."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import pytest
from parent import Parent, server_pid
from sqlalchemy import Connection, text
from sqlalchemy.exc import OperationalError

from pidpool import ForeignConnectionError, PidPool, tag_of

STATES = ["idle", "no transaction", "in transaction", "detached", "detached in transaction"]
POLICIES = ["replace", "refuse"]


def raises_foreign(connection: Any, statement: str = "select 1") -> ForeignConnectionError:
    """Check that an inherited connection refuses a statement; return the error of the refusal."""
    with pytest.raises(OperationalError) as caught:
        connection.execute(text(statement))
    assert caught.value.connection_invalidated
    assert isinstance(caught.value.orig, ForeignConnectionError)
    return caught.value.orig


class Child:
    """A child; each method of the first group does one thing, and asserts what the child must see."""

    def __init__(self, parent: Parent, policy: str) -> None:
        self.engine = parent.engine
        self.connection = parent.connection
        self.parent = parent
        self.policy = policy
        parent.connection = None  # this process's copy: nothing else refers to it here
        parent._raw = None
        self.state = parent.state

    # -- what it does

    def use(self) -> None:
        if self.connection is None:
            self.check_out()
        elif self.policy == "refuse" or self.state.endswith("in transaction"):
            self.is_refused(self.connection)
            self.connection.rollback()
            self.goes_on_with_its_own(self.connection)
        else:
            self.goes_on_with_its_own(self.connection)
        self.leave()

    def commit(self) -> None:
        if self.connection is not None:
            if self.state.endswith("in transaction"):
                with pytest.raises(OperationalError) as caught:
                    self.connection.commit()
                self.names_both_pids(caught.value)
            else:
                self.connection.commit()
        self.leave()

    def rollback(self) -> None:
        if self.connection is not None:
            self.connection.rollback()
            if self.policy == "refuse":
                self.is_refused(self.connection)
                self.connection.rollback()
            self.goes_on_with_its_own(self.connection)
        self.leave()

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
        self.leave()

    def invalidate(self) -> None:
        if self.connection is not None:
            self.connection.invalidate()
            self.connection.rollback()
            self.goes_on_with_its_own(self.connection)
        self.leave()

    def leave_a_with_block(self) -> None:
        if self.connection is not None:
            with self.connection:
                pass
        self.leave()

    def drop_and_collect(self) -> None:
        self.connection = None
        gc.collect()
        self.check_out()
        self.leave()

    def dispose(self) -> None:
        self.engine.dispose()
        with self.engine.connect() as connection:
            self.is_own(connection)
        self.leave()

    def dispose_without_close(self) -> None:
        self.engine.dispose(close=False)
        with self.engine.connect() as connection:
            self.is_own(connection)
        self.leave()

    def check_out(self) -> None:
        """Under the pool options of the test: plain, pre-ping, recycle."""
        if self.policy == "refuse" and self.state == "idle":
            with pytest.raises(ForeignConnectionError) as caught:
                self.engine.connect()
            assert caught.value.owner_pid == os.getppid() and caught.value.pid == os.getpid()
            with pytest.raises(ForeignConnectionError):
                self.engine.raw_connection()
            self.engine.dispose(close=False)
        with self.engine.connect() as connection:
            self.is_own(connection)

    def look(self) -> None:
        pool = self.engine.pool
        assert isinstance(pool, PidPool)
        assert pool.checkedout() == pool.checkedin() == 0
        assert pool.overflow() == -pool.size()
        pool.status()
        self.leave()

    # -- what it must see

    def goes_on_with_its_own(self, connection: Connection) -> None:
        self.is_own(connection)
        connection.execute(text("insert into kept values ('child')"))
        connection.commit()
        self.is_own(connection)

    def is_own(self, connection: Connection) -> None:
        assert server_pid(connection) != self.parent.server_pid
        tag = tag_of(connection)
        assert tag is not None and tag.owner_pid == os.getpid()
        assert tag.server_pid == server_pid(connection)

    def is_refused(self, connection: Connection) -> None:
        with pytest.raises(OperationalError) as caught:
            connection.execute(text("select 1"))
        self.names_both_pids(caught.value)

    def names_both_pids(self, error: OperationalError) -> None:
        assert error.connection_invalidated
        assert isinstance(error.orig, ForeignConnectionError)
        assert str(os.getpid()) in str(error.orig) and str(os.getppid()) in str(error.orig)
        assert (error.orig.owner_pid, error.orig.pid) == (os.getppid(), os.getpid())

    def leave(self) -> None:
        """Close all connections of its own: otherwise the server's log complains."""
        if self.connection is not None:
            self.connection.close()
        self.connection = None
        self.engine.dispose()
        gc.collect()


ACTIONS: dict[str, Callable[[Child], None]] = {
    "use": Child.use,
    "commit": Child.commit,
    "rollback": Child.rollback,
    "close": Child.close,
    "invalidate": Child.invalidate,
    "leave a with block": Child.leave_a_with_block,
    "drop and collect": Child.drop_and_collect,
    "dispose": Child.dispose,
    "dispose without close": Child.dispose_without_close,
    "look": Child.look,
}


def behave(action: Callable[[Child], None], parent: Parent, policy: str) -> None:
    action(Child(parent, policy))
