"""What a child may do with what it inherited, one promise a test: descriptors, objects of the driver and
of SQLAlchemy that refer to the connection, grandchildren, errors. Each ends with the parent unharmed."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import gc
import multiprocessing
import os
import pickle
import resource
import select
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from child import ACTIONS, STATES, behave
from engines import MakeEngine
from forking import How, run_in_child
from parent import Parent, bytes_on_the_wire, server_pid
from sqlalchemy import Column, Engine, Integer, String, event, text
from sqlalchemy import select as sql_select
from sqlalchemy.exc import OperationalError, StatementError
from sqlalchemy.exc import TimeoutError as CheckoutTimeoutError
from sqlalchemy.orm import Session, declarative_base

from pidpool import ConnectionTag, ForeignConnectionError, PidPool, tag_of
from pidpool.forks import detection
from pidpool.forks.severing import is_disowned
from pidpool.tools.demo.postgres import EmbeddedPostgres

pytestmark = pytest.mark.usefixtures("clean_log")
both_hows = pytest.mark.parametrize("how", ["python", "c"])


@pytest.fixture
def engine(tls_url: str, make_engine: MakeEngine) -> Engine:
    return make_engine(tls_url)


def pool_of(engine: Engine) -> PidPool:
    assert isinstance(engine.pool, PidPool)
    return engine.pool


def identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def open_descriptors() -> set[int]:
    listed = {int(name) for name in os.listdir("/proc/self/fd")}
    return {fd for fd in listed if os.path.exists(f"/proc/self/fd/{fd}")}  # without the listing's own


def is_severed(tag: ConnectionTag) -> bool:
    """Return whether this process's descriptor is a socket, but no longer the one that was tagged."""
    assert tag.fd is not None
    status = os.fstat(tag.fd)
    return stat.S_ISSOCK(status.st_mode) and status.st_ino != tag.socket_inode


def raw(connection: Any) -> Any:
    return connection.connection.dbapi_connection


def raises_foreign(connection: Any, statement: str = "select 1") -> ForeignConnectionError:
    with pytest.raises(OperationalError) as caught:
        connection.execute(text(statement))
    assert caught.value.connection_invalidated
    assert isinstance(caught.value.orig, ForeignConnectionError)
    return caught.value.orig


# -- descriptors


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


def all_descriptors() -> list[int]:
    """Take every free descriptor of this process."""
    taken = []
    while True:
        try:
            taken.append(os.open(os.devnull, os.O_RDONLY))
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            return taken


@contextmanager
def few_descriptors(left: int) -> Iterator[None]:
    """Leave this process, and what it forks, so many free descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.open(os.devnull, os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(open_descriptors()) + 10, hard))
    try:
        taken.extend(all_descriptors())
        for _ in range(left):
            os.close(taken.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)


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


# -- SQLite


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


# -- forks within forks


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
    """The hooks of its own fork meet the locks of threads that don't exist there."""
    engine.connect().close()
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with detection._gate._changed:
            held.set()
            release.wait(30)

    thread = threading.Thread(target=hold)
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


# -- another driver


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("action", ACTIONS)
def test_psycopg_3_as_psycopg2(
    postgres: EmbeddedPostgres, make_engine: MakeEngine, state: str, action: str
) -> None:
    engine = make_engine(postgres.url(driver="postgresql+psycopg"))
    parent = Parent(engine, state)
    run_in_child(behave, ACTIONS[action], parent, "replace", how="c" if action == "use" else "python")
    parent.notices_nothing()


# -- the tag


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


# -- the error

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


# -- transactions of other shapes


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


# -- settings

SETTINGS = {
    "AUTOCOMMIT": {"isolation_level": "AUTOCOMMIT"},
    "SERIALIZABLE": {"isolation_level": "SERIALIZABLE"},
    "read only": {"postgresql_readonly": True},
    "all": {"isolation_level": "SERIALIZABLE", "postgresql_readonly": True, "postgresql_deferrable": True},
}


def settings_seen(connection: Any) -> tuple[Any, ...]:
    driver = raw(connection)
    names = ("transaction_isolation", "transaction_read_only", "transaction_deferrable")
    shown = tuple(connection.scalar(text(f"show {name}")) for name in names)
    connection.rollback()
    return driver.autocommit, *shown


@both_hows
@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_a_replacement_has_the_settings_of_the_inherited_connection(
    postgres: EmbeddedPostgres, make_engine: MakeEngine, driver: str, options: str, how: How
) -> None:
    engine = make_engine(postgres.url(driver=f"postgresql+{driver}"), pool_size=1, max_overflow=0)
    default = engine.connect()
    before = settings_seen(default)
    default.close()
    connection = engine.connect().execution_options(**SETTINGS[options])
    number = server_pid(connection)
    connection.rollback()
    seen = settings_seen(connection)
    assert seen != before

    def child() -> None:
        assert settings_seen(connection) == seen
        assert server_pid(connection) != number
        connection.close()
        # Back in the pool, it is as any other: what SQLAlchemy undoes at a checkin was undone.
        with engine.connect() as again:
            assert settings_seen(again) == before
        engine.dispose()

    run_in_child(child, how=how)
    assert settings_seen(connection) == seen
    assert server_pid(connection) == number
    connection.close()


@both_hows
def test_an_inherited_connection_takes_an_isolation_level(engine: Engine, how: How) -> None:
    parent = Parent(engine, "no transaction")

    def child() -> None:
        connection = parent.connection.execution_options(isolation_level="SERIALIZABLE")
        assert connection.scalar(text("show transaction_isolation")) == "serializable"
        assert server_pid(connection) != parent.server_pid
        connection.close()
        with engine.connect() as again:
            assert again.scalar(text("show transaction_isolation")) == "read committed"
        engine.dispose()

    run_in_child(child, how=how)
    assert parent.connection.scalar(text("show transaction_isolation")) == "read committed"
    parent.connection.close()


# -- what refers to an inherited connection

Base: Any = declarative_base()


class Thing(Base):
    __tablename__ = "things"
    id = Column(Integer, primary_key=True)
    value = Column(String)


@pytest.fixture
def things(postgres: EmbeddedPostgres, make_engine: MakeEngine) -> Iterator[None]:
    engine = make_engine(postgres.url(tls=False))
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Thing(id=1, value="begun"))
        session.commit()
    yield
    with engine.begin() as connection:
        connection.execute(text("set local lock_timeout = '10s'"))
        Base.metadata.drop_all(connection)


@both_hows
@pytest.mark.usefixtures("things")
@pytest.mark.parametrize("flushed", [True, False])
def test_an_inherited_session_goes_on_after_a_rollback(engine: Engine, how: How, flushed: bool) -> None:
    session = Session(engine)
    thing = session.get(Thing, 1)
    assert thing is not None
    other = Thing(id=2, value="the parent's")
    session.add(other)
    if flushed:
        session.flush()
    number = server_pid(session)

    def child() -> None:
        assert thing.value == "begun"  # it was loaded
        thing.value = "the child's"
        with pytest.raises(OperationalError) as caught:
            session.commit()
        assert isinstance(caught.value.orig, ForeignConnectionError)
        session.rollback()
        assert thing.value == "begun"
        assert session.scalars(sql_select(Thing.id)).all() == [1]
        thing.value = "the child's"
        session.commit()
        assert server_pid(session) != number
        session.close()
        engine.dispose()

    run_in_child(child, how=how)
    assert server_pid(session) == number
    session.commit()
    session.expire_all()
    values = session.execute(sql_select(Thing.id, Thing.value).order_by(Thing.id)).all()
    assert values == [(1, "the child's"), (2, "the parent's")]
    session.close()


@both_hows
@pytest.mark.parametrize("action", ["fetch", "close", "drop"])
@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_a_streamed_result_stays_the_parents(
    postgres: EmbeddedPostgres, make_engine: MakeEngine, driver: str, action: str, how: How
) -> None:
    engine = make_engine(postgres.url(driver=f"postgresql+{driver}"))
    connection = engine.connect()
    number = server_pid(connection)
    result = connection.execute(text("select generate_series(1, 2000)"), execution_options={"yield_per": 100})
    numbers = result.scalars()
    seen = [next(numbers) for _ in range(150)]
    holder = [connection, result, numbers]

    def child() -> None:
        connection, result, numbers = holder
        if action == "fetch":
            # What the driver had fetched already is there; for more it would need the server.
            with pytest.raises(OperationalError) as caught:
                for _ in numbers:
                    pass
            assert caught.value.connection_invalidated
        elif action == "close":
            result.close()
        holder.clear()
        del result, numbers
        gc.collect()
        connection.rollback()
        assert server_pid(connection) != number
        connection.close()
        engine.dispose()

    run_in_child(child, how=how)
    seen.extend(numbers)
    assert seen == list(range(1, 2001))
    assert server_pid(connection) == number
    connection.close()


@both_hows
@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("action", ["drop", "close", "use"])
@pytest.mark.parametrize("name", [None, "named"])
def test_a_cursor_of_the_driver_sends_nothing(
    engine: Engine, name: str | None, action: str, how: How
) -> None:
    parent = Parent(engine, "in transaction")
    cursor = parent.connection.connection.cursor(name)
    cursor.execute("select generate_series(1, 5000)")
    cursor.fetchmany(10)
    holder = [cursor]
    parent.goes_on()

    def child() -> None:
        cursor = holder.pop()
        if name is None:
            detection.settle()  # it has its rows: none of its methods is one of the pool's doors
        if action == "close" and name is None:
            cursor.close()
        elif action == "close" or action == "use":
            with pytest.raises(engine.dialect.loaded_dbapi.OperationalError):
                cursor.close() if action == "close" else cursor.fetchmany(10) if name else cursor.execute(
                    "select 1"
                )
        del cursor
        gc.collect()
        parent.connection.close()
        engine.dispose()

    cursor = None
    run_in_child(child, how=how)
    cursor = holder.pop()
    parent.has_heard_nothing()
    assert len(cursor.fetchall()) == 4990
    cursor.close()
    parent.goes_on()
    parent.notices_nothing()


@both_hows
def test_info_is_of_the_connection_that_is_there(engine: Engine, how: How) -> None:
    """SQLAlchemy's documented recipe keeps a pid in it."""

    @event.listens_for(engine, "connect")
    def connect(dbapi_connection: Any, entry: Any) -> None:
        entry.info["pid"] = os.getpid()

    connection = engine.connect()
    number = server_pid(connection)
    connection.rollback()
    connection.info["seen"] = "by the parent"
    assert connection.info == {"pid": os.getpid(), "seen": "by the parent"}

    def child() -> None:
        assert server_pid(connection) != number
        assert connection.info == {"pid": os.getpid()}
        connection.close()
        engine.dispose()

    run_in_child(child, how=how)
    assert connection.info == {"pid": os.getpid(), "seen": "by the parent"}
    assert server_pid(connection) == number
    connection.close()


@both_hows
def test_raw_connections_as_sqlalchemys(engine: Engine, how: How) -> None:
    proxied = engine.raw_connection()
    number = proxied.driver_connection.get_backend_pid()
    open_transaction = engine.raw_connection()
    open_transaction.cursor().execute("select 1")

    def child() -> None:
        cursor = proxied.cursor()
        cursor.execute("select pg_backend_pid()")
        assert cursor.fetchone() != (number,)
        proxied.rollback()
        proxied.close()
        with pytest.raises(ForeignConnectionError):
            open_transaction.cursor().execute("select 1")
        with pytest.raises(ForeignConnectionError):
            open_transaction.commit()
        open_transaction.rollback()
        open_transaction.cursor().execute("select 1")
        open_transaction.close()
        assert pool_of(engine).checkedout() == 0
        engine.dispose()

    run_in_child(child, how=how)
    assert proxied.driver_connection.get_backend_pid() == number
    assert open_transaction.driver_connection.info.transaction_status == 2  # INTRANS
    proxied.close()
    open_transaction.close()


DOORS = {
    "dbapi_connection.close": lambda connection: raw(connection).close(),
    "proxied.close": lambda connection: connection.connection.close(),
    "proxied.rollback": lambda connection: connection.connection.rollback(),
    "proxied.detach": lambda connection: connection.connection.detach(),
    "proxied.invalidate": lambda connection: connection.connection.invalidate(),
    "connection.detach": lambda connection: connection.detach(),
    "connection.info": lambda connection: connection.info,
    "is_valid": lambda connection: connection.connection.is_valid,
}


@both_hows
@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("door", DOORS)
def test_every_door_of_a_pooled_connection_asks_whose_it_is(engine: Engine, door: str, how: How) -> None:
    parent = Parent(engine, "in transaction")

    def child() -> None:
        DOORS[door](parent.connection)
        parent.connection.close()
        parent.connection = None
        engine.dispose()
        gc.collect()

    run_in_child(child, how=how)
    parent.notices_nothing()


@both_hows
def test_a_replacement_waits_its_turn_and_may_fail(tls_url: str, make_engine: MakeEngine, how: How) -> None:
    """The error is what SQLAlchemy makes of it when it reconnects; the next use tries again."""
    engine = make_engine(tls_url, pool_size=1, max_overflow=0, pool_timeout=0.2)
    parent = Parent(engine, "no transaction")
    refused = []

    @event.listens_for(engine, "do_connect")
    def do_connect(dialect: Any, record: Any, arguments: Any, keywords: Any) -> None:
        if refused:
            raise dialect.loaded_dbapi.OperationalError("connection refused")

    def child() -> None:
        refused.append(True)
        with pytest.raises(OperationalError, match="connection refused"):
            server_pid(parent.connection)
        refused.clear()
        parent.connection.rollback()
        other = engine.connect()
        with pytest.raises(StatementError, match="QueuePool limit of size 1") as caught:
            server_pid(parent.connection)
        assert isinstance(caught.value.orig, CheckoutTimeoutError)
        other.close()
        parent.connection.rollback()
        assert server_pid(parent.connection) != parent.server_pid
        parent.connection.close()
        assert (pool_of(engine).checkedin(), pool_of(engine).checkedout()) == (1, 0)
        engine.dispose()

    run_in_child(child, how=how)
    assert server_pid(parent.connection) == parent.server_pid
    parent.connection.close()


# -- the end of a child

EXIT = """
import atexit, ctypes, logging, os, sys, weakref
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session
from pidpool import PidPool

logging.getLogger("pidpool").setLevel(logging.ERROR)  # it warns of what was in a transaction
url, how, use = sys.argv[1:]
engine = create_engine(url, poolclass=PidPool)
engine.connect().close()
connection, session, clean = engine.connect(), Session(engine), engine.connect()
connection.execute(text("create temp table t as select 1 as v"))
session.execute(text("create temp table t as select 2 as v"))
detached = engine.connect()
detached.detach()
detached.execute(text("create temp table t as select 3 as v"))
raw = engine.raw_connection()
cursor = raw.cursor()
cursor.execute("select 4 as v")
numbers = [c.scalar(text("select pg_backend_pid()")) for c in (connection, session, detached)]

class Late:
    pass

late = Late()
pid = os.fork() if how == "python" else ctypes.PyDLL(None).fork()
if pid == 0:
    weakref.finalize(late, print, "finalized", flush=True)
    if use == "at exit":
        atexit.register(lambda: print("used", clean.scalar(text("select 41")), flush=True))
        atexit.register(engine.dispose)
    elif use == "before":
        print("used", clean.scalar(text("select 41")), flush=True)
        clean.close()
        engine.dispose()
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert numbers == [c.scalar(text("select pg_backend_pid()")) for c in (connection, session, detached)]
assert [c.scalar(text("select v from t")) for c in (connection, session, detached)] == [1, 2, 3]
connection.commit()
session.commit()
detached.commit()
assert cursor.fetchall() == [(4,)]
detached.close()
raw.close()
connection.close()
session.close()
clean.close()
engine.dispose()
print("parent unharmed")
"""


@both_hows
@pytest.mark.parametrize("use", ["never", "before", "at exit"])
def test_a_child_that_ends_as_python_programs_end(tls_url: str, how: How, use: str) -> None:
    """With atexit, weakref.finalize and the interpreter's own clearing of modules."""
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", EXIT, tls_url, how, use],
        capture_output=True,
        text=True,
        timeout=60,
    )
    said = ([] if use == "never" else ["used 41"]) + ["finalized", "parent unharmed"]
    assert (ended.returncode, sorted(ended.stdout.splitlines()), ended.stderr) == (0, sorted(said), "")


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("what", ["detached", "idle"])
def test_what_a_child_forked_in_c_collects_before_it_notices_is_severed(
    tls_url: str, make_engine: MakeEngine, what: str
) -> None:
    """Weak references go before the destructors: nobody finds such a connection afterwards, and its
    descriptor would keep the server's session when the parent is killed."""
    kept: list[Any] = [make_engine(tls_url).pool.recreate()]
    parent = kept[0].connect()
    tag = tag_of(parent)
    assert tag is not None and tag.fd is not None
    if what == "detached":
        parent.detach()
    else:
        parent.close()
    kept.append(parent)
    del parent
    before = bytes_on_the_wire(tag.fd)

    def collect() -> int:
        kept.append(kept)  # a cycle, as an application's objects are in
        holder = kept[:]
        holder.append(holder)
        kept.clear()
        del holder
        gc.collect()
        assert tag.fd is not None
        return os.fstat(tag.fd).st_ino

    assert run_in_child(collect, how="c") != tag.socket_inode
    assert bytes_on_the_wire(tag.fd) == before
    with kept[1] if what == "detached" else kept[0].connect() as connection:
        cursor = connection.cursor()
        cursor.execute("select pg_backend_pid()")
        assert cursor.fetchone() == (tag.server_pid,)
    kept[0].dispose()
