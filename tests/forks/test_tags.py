"""`tag_of()`: the owner of a connection, as the parent and the child see it."""

from __future__ import annotations

import dataclasses
import os
import pickle
from typing import Any

import pytest
from forking import How, run_in_child
from parent import Parent, server_pid
from sqlalchemy import Engine, event

from pidpool import tag_of

pytestmark = pytest.mark.usefixtures("clean_log")
both_hows = pytest.mark.parametrize("how", ["python", "c"])


def test_tag_of_whatever_holds_the_connection(engine: Engine) -> None:
    entries = []
    event.listen(engine, "checkout", lambda dbapi, entry, proxied: entries.append(entry))
    with engine.connect() as connection:
        tag = tag_of(connection)
        assert tag is not None
        assert tag.owner_pid == os.getpid()
        assert tag.server_pid == server_pid(connection)
        assert tag.connection_id.startswith(f"{os.getpid()}-")
        assert tag.fd is not None and os.fstat(tag.fd).st_ino == tag.socket_inode
        assert tag_of(connection.connection) == tag_of(entries[0]) == tag
        connection.invalidate()
        assert tag_of(connection) is None
    assert tag_of(connection) is None
    proxied = engine.raw_connection()
    assert tag_of(proxied) == tag_of(entries[-1])
    proxied.close()
    assert tag_of(proxied) is None


@pytest.mark.parametrize("wrong", [None, 41, "41-7", object()])
def test_tag_of_anything_else_says_what_it_takes(wrong: Any) -> None:
    with pytest.raises(TypeError, match="takes a Connection, AsyncConnection, pooled connection or pool"):
        tag_of(wrong)


def test_a_tag_is_frozen_and_goes_through_pickle(engine: Engine) -> None:
    with engine.connect() as connection:
        tag = tag_of(connection)
    assert tag is not None
    with pytest.raises(dataclasses.FrozenInstanceError):
        tag.fd = 3  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(tag)) == tag
    assert len({tag, pickle.loads(pickle.dumps(tag))}) == 1


@both_hows
def test_a_child_reads_its_parents_tag_until_the_connection_is_replaced(engine: Engine, how: How) -> None:
    parent = Parent(engine, "no transaction")
    tag = run_in_child(lambda: tag_of(parent.connection), how=how)
    assert tag == parent.tag
    parent.connection.close()
