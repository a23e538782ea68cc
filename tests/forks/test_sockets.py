"""The descriptors of inherited connections are severed, or left alone if they are something else already."""

from __future__ import annotations

import fcntl
import os
import resource
import select
import socket
from pathlib import Path

import pytest
from child import raises_foreign
from descriptors import identity, is_severed, open_descriptors
from engines import MakeEngine, raw
from forking import How, run_in_child
from limits import all_descriptors, few_descriptors
from parent import Parent, server_pid
from sqlalchemy import Engine, text

from pidpool import tag_of
from pidpool.forks import detection

pytestmark = pytest.mark.usefixtures("clean_log")
both_hows = pytest.mark.parametrize("how", ["python", "c"])


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("what", ["file", "socket", "nothing"])
def test_a_reused_descriptor_is_left_alone(engine: Engine, tmp_path: Path, what: str) -> None:
    """A child whose descriptors were closed, and reused, before pidpool could look at them."""
    parent = Parent(engine, "in transaction")

    def child() -> None:
        fd = parent.fd
        os.close(fd)
        ours, other = socket.socketpair()
        new = os.open(tmp_path / "reused", os.O_RDWR | os.O_CREAT) if what == "file" else ours.detach()
        if what != "nothing":
            assert new == fd or os.dup2(new, fd) == fd
            before = identity(fd)
        elif new == fd:
            os.close(fd)
        raises_foreign(parent.connection)
        if what == "nothing":
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)
        else:
            assert identity(fd) == before
            assert os.write(fd, b"still mine") == 10
        if what == "socket":
            assert other.recv(100) == b"still mine"
        engine.dispose()

    run_in_child(child, how="c")
    parent.notices_nothing()


@both_hows
@pytest.mark.usefixtures("table")
def test_what_is_shared_with_the_parent_stays_as_it_was(
    engine: Engine, tls_url: str, make_engine: MakeEngine, how: How
) -> None:
    """O_NONBLOCK and epoll registrations belong to the socket and not to the child's descriptor."""
    listener = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    listener.execute(text("listen news"))
    tag = tag_of(listener)
    assert tag is not None and tag.fd is not None
    flags = fcntl.fcntl(tag.fd, fcntl.F_GETFL)
    assert flags & os.O_NONBLOCK  # libpq's choice
    with select.epoll() as watch:
        watch.register(tag.fd, select.EPOLLIN)
        assert watch.poll(0) == []

        def child() -> None:
            with engine.connect() as own:
                server_pid(own)
            assert is_severed(tag)
            fcntl.fcntl(tag.fd, fcntl.F_SETFL, 0)  # on the dead socket, not on the shared one
            engine.dispose()

        run_in_child(child, how=how)
        assert fcntl.fcntl(tag.fd, fcntl.F_GETFL) == flags
        assert watch.poll(0) == []
        with make_engine(tls_url).begin() as other:
            other.execute(text("notify news, 'extra'"))
        assert watch.poll(10) == [(tag.fd, select.EPOLLIN)]
    connection = raw(listener)
    connection.poll()
    assert [notice.payload for notice in connection.notifies] == ["extra"]
    assert server_pid(listener) == tag.server_pid
    listener.close()


@both_hows
@pytest.mark.usefixtures("table")
def test_a_severed_descriptor_is_a_dead_socket_that_no_program_inherits(engine: Engine, how: How) -> None:
    parent = Parent(engine, "in transaction")

    def child() -> None:
        detection.settle()
        assert is_severed(parent.tag)
        assert not os.get_inheritable(parent.fd)
        with socket.socket(fileno=os.dup(parent.fd)) as copy:
            assert copy.recv(1) == b""
            with pytest.raises(BrokenPipeError):
                copy.send(b"x")

    run_in_child(child, how=how)
    parent.notices_nothing()


@both_hows
@pytest.mark.usefixtures("table")
def test_severing_goes_on_after_a_daemon_closed_all_descriptors(engine: Engine, how: How) -> None:
    parent = Parent(engine, "in transaction")
    of_parent = open_descriptors() - {0, 1, 2}

    def daemon() -> None:
        for fd in of_parent:
            try:
                os.close(fd)
            except OSError:
                pass
        # The dead socket's number, and the connection's, go to something else.
        files = [os.open(os.devnull, os.O_RDONLY) for _ in range(20)]
        before = [identity(fd) for fd in files]
        raises_foreign(parent.connection)
        parent.connection.rollback()
        own = engine.connect()
        number = server_pid(own)
        tag = tag_of(own)
        assert tag is not None and tag.owner_pid == os.getpid()

        def grandchild() -> None:
            raises_foreign(own)
            assert is_severed(tag)
            own.close()
            engine.dispose()

        run_in_child(grandchild, how=how)
        assert server_pid(own) == number
        assert [identity(fd) for fd in files] == before
        own.close()
        engine.dispose()

    run_in_child(daemon, how=how)
    parent.notices_nothing()


@both_hows
@pytest.mark.usefixtures("table")
def test_a_child_without_a_free_descriptor_severs_all_the_same(engine: Engine, how: How) -> None:
    parent = Parent(engine, "in transaction")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def child() -> None:
        all_descriptors()
        raises_foreign(parent.connection)
        assert is_severed(parent.tag)
        parent.connection.rollback()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert server_pid(parent.connection) != parent.server_pid
        parent.connection.close()
        engine.dispose()

    with few_descriptors(left=3):  # run_in_child() needs so many itself
        run_in_child(child, how=how)
    parent.notices_nothing()


@both_hows
@pytest.mark.usefixtures("table")
def test_kept_sockets_stay_open_and_are_not_used(tls_url: str, make_engine: MakeEngine, how: How) -> None:
    engine = make_engine(tls_url, inherited_sockets="keep")
    parent = Parent(engine, "in transaction")
    connection = raw(parent.connection)

    def child() -> None:
        raises_foreign(parent.connection)
        assert not is_severed(parent.tag)
        assert not connection.closed
        parent.connection.close()
        engine.dispose()

    run_in_child(child, how=how)
    parent.notices_nothing()
