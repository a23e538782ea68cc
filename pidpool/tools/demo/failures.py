"""The failures of a fork: each function provokes one on the database, counts, and returns the numbers.

They run in a process of their own (`worker.py`), which a failure may kill. Every process that is forked
here has a timer, whose signal ends it whatever it hangs in.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import select
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, Engine, Identity, Integer, MetaData, Table, Text, event, func, text
from sqlalchemy import select as select_rows
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session, registry

from pidpool.tools.demo.contenders import BY_KEY, CONTENDERS, NULLPOOL, Contender

HUNG_SECONDS = 4.0
"""A child without a connection after this time counts as hung, and its timer ends it."""

ORPHAN_SECONDS = 1.5
"""How long the next process waits for a killed parent's lock before the child is ended too."""

_CHILD_SECONDS = 10.0
_LOCK_SECONDS = 10
_THREADS = 8
_SPEED_SECONDS = 0.02
_SPEED_ROUNDS = 20

Measured = dict[str, Any]


@dataclass(frozen=True)
class Arena:
    """The surroundings of one measurement: a contender, and a table of its own."""

    contender: Contender
    url: str
    table: str
    iterations: int

    def rows(self) -> Table:
        """Return the table of this measurement."""
        return rows_table(self.table)

    def engine(self, **options: Any) -> Engine:
        """Return a new engine of the contender's."""
        return self.contender.engine(self.url, **options)


def rows_table(name: str) -> Table:
    """Return the demo's table under this name, without creating it."""
    return Table(
        name,
        MetaData(),
        Column("id", Integer, Identity(), primary_key=True),
        Column("value", Integer),
        Column("written_by", Text),
    )


def replaced_session(arena: Arena) -> Measured:
    """Fork a child that puts its own Session into the global that holds its parent's.

    By that it drops the inherited Session, as in a well-known question about SQLAlchemy and fork.
    """
    application = _Application(arena)
    tls, done = False, 0
    try:
        for _ in range(arena.iterations):
            tls = application.turn()
            done += 1
    except Exception as error:
        traceback.print_exc()
        return {"tls": tls, "iterations": arena.iterations, "done": done, "error": _first_line(error)}
    return {"tls": tls, "iterations": arena.iterations, "done": done, "error": None}


class _Application:
    """Its attributes are the script's globals."""

    engine: Engine
    session: Session

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.row: type[Any] = type("Row", (), {"id": None, "value": None})
        registry().map_imperatively(self.row, arena.rows())
        self.fork = multiprocessing.get_context("fork")

    def begin(self) -> None:
        self.engine = self.arena.engine()
        self.session = Session(self.engine)

    def end(self) -> None:
        self.session.close()
        self.engine.dispose()

    def turn(self) -> bool:
        self.begin()
        try:
            row = self.row()
            row.value = 1
            self.session.add(row)
            self.session.commit()
            child = self.fork.Process(target=self.child, args=(row.id,))
            child.start()
            child.join()
            self.session.refresh(row)
            if child.exitcode != 0 or row.value != 2:
                raise RuntimeError(f"the child ended with {child.exitcode}; the row's value is {row.value}")
            return _has_tls(self.session.connection().connection.dbapi_connection)
        finally:
            self.end()

    def child(self, row_id: int) -> None:
        _end_after(_CHILD_SECONDS)
        self.arena.contender.begin_child(self.engine)
        self.begin()
        try:
            row = self.session.get_one(self.row, row_id)
            row.value += 1
            self.session.commit()
        finally:
            self.end()


def dropped_session(arena: Arena) -> Measured:
    """Fork in the middle of a transaction; the child drops the Session that it inherits."""
    engine = arena.engine()
    session: Session | None

    def child() -> None:
        nonlocal session
        arena.contender.begin_child(engine)
        session = None
        gc.collect()

    counts = _Commits(arena)
    for _ in range(arena.iterations):
        session = Session(engine)
        counts.insert(session)
        _wait(_fork(child))
        counts.commit(session)
    return counts.measured(engine)


def forked_in_c(arena: Arena) -> Measured:
    """Fork in C in the middle of a transaction, as uWSGI does, so that no at-fork hook runs.

    Every second child goes on with the Session that it inherits, as a web application's worker would;
    the others drop it.
    """
    engine = arena.engine()
    session: Session | None

    def drop() -> None:
        nonlocal session
        arena.contender.begin_child(engine)
        session = None
        gc.collect()

    def use() -> None:
        assert session is not None
        arena.contender.begin_child(engine)
        try:
            session.execute(text("select 1"))
        except DBAPIError:
            pass  # a worker can handle this error: it rolls back and goes on
        session.rollback()
        session.execute(text("select 1"))
        session.close()

    counts = _Commits(arena)
    failed = 0
    for i in range(arena.iterations):
        session = Session(engine)
        counts.insert(session)
        failed += _wait(_fork(use if i % 2 else drop, in_c=True)) != 0
        counts.commit(session)
    return {**counts.measured(engine), "children_failed": failed}


class _Commits:
    """Counts the commits that reported success to the parent, and the rows that are there."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.rows = arena.rows()
        self.reported = 0
        self.tls = False
        self.error: str | None = None

    def insert(self, session: Session) -> None:
        session.execute(self.rows.insert().values(written_by="parent"))
        self.tls = _has_tls(session.connection().connection.dbapi_connection)

    def commit(self, session: Session) -> None:
        try:
            session.commit()
            self.reported += 1
        except Exception as error:
            traceback.print_exc()
            self.error = self.error or _first_line(error)
        session.close()

    def measured(self, engine: Engine) -> Measured:
        with engine.connect() as connection:
            count = select_rows(func.count()).select_from(self.rows).where(self.rows.c.written_by == "parent")
            present = connection.execute(count).scalar_one()
        engine.dispose()
        return {
            "tls": self.tls,
            "commits": self.arena.iterations,
            "commits_reported": self.reported,
            "rows_present": present,
            "error": self.error,
        }


def orphaned_lock(arena: Arena) -> Measured:
    """Kill a parent that holds a row lock, and time the next process's wait for the lock.

    The parent's child lives on and does nothing. If the lock is still held after `ORPHAN_SECONDS`, the
    child is ended too.
    """
    rows = arena.rows()
    locked = select_rows(rows).with_for_update()
    engine = arena.engine()
    with engine.begin() as connection:
        connection.execute(rows.insert().values(written_by="parent"))
        tls = _has_tls(connection.connection.dbapi_connection)
    engine.dispose()
    is_up, report_up = os.pipe()
    may_end, let_end = os.pipe()  # closing it lets the child end

    def parent() -> None:
        os.close(let_end)
        engine = arena.engine()
        connection = engine.connect()
        connection.execute(locked).all()

        def child() -> None:
            arena.contender.begin_child(engine)
            os.write(report_up, b".")
            os.read(may_end, 1)

        _fork(child)
        time.sleep(_CHILD_SECONDS)

    engine = arena.engine()
    with engine.connect() as connection:
        # Connects before the clock starts, which times only the lock.
        connection.execute(text(f"set lock_timeout = '{ORPHAN_SECONDS}s'"))
        connection.commit()
        pid = _fork(parent)
        os.close(report_up)
        if not select.select([is_up], [], [], _CHILD_SECONDS)[0] or not os.read(is_up, 1):
            raise RuntimeError(f"the parent did not take the lock within {_CHILD_SECONDS:.0f} s")
        os.kill(pid, signal.SIGKILL)
        killed_at = time.monotonic()
        _wait(pid)
        child_ended = False
        try:
            connection.execute(locked).all()
        except OperationalError:
            connection.rollback()
            child_ended = True
            os.close(let_end)
            connection.execute(text(f"set lock_timeout = '{_LOCK_SECONDS}s'"))
            connection.execute(locked).all()
        held = time.monotonic() - killed_at
    engine.dispose()
    return {"tls": tls, "seconds": round(held, 3), "until_child_ended": child_ended}


def forked_with_threads(arena: Arena) -> Measured:
    """Fork while threads use the pool; each child checks out one connection."""
    engine = arena.engine(pool_size=3, max_overflow=0, pool_timeout=20)
    opened: list[tuple[int, Any]] = []
    event.listen(engine, "connect", lambda connection, record: opened.append((os.getpid(), connection)))
    stop = threading.Event()
    errors: list[str] = []
    tls = False

    def work() -> None:
        nonlocal tls
        while not stop.is_set():
            try:
                with engine.connect() as connection:
                    connection.execute(text("select 1"))
                    tls = tls or _has_tls(connection.connection.dbapi_connection)
            except Exception as error:
                traceback.print_exc()
                errors.append(_first_line(error))
                stop.wait(0.01)

    def child() -> None:
        arena.contender.begin_child(engine)
        with engine.connect() as connection:
            connection.execute(text("select 1"))
        # Only its own, and in an orderly way, so that this causes no complaint of the server.
        for pid, dbapi_connection in opened:
            if pid == os.getpid():
                dbapi_connection.close()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(_THREADS)]
    for thread in threads:
        thread.start()
    children: list[int] = []
    statuses: dict[int, int] = {}

    def reap(pid: int, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while pid not in statuses:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                statuses[pid] = status
            elif time.monotonic() > deadline:
                return
            else:
                time.sleep(0.002)

    for _ in range(arena.iterations):
        children.append(_fork(child, seconds=HUNG_SECONDS))
        reap(children[-1], 0.1)  # the loop below waits for hung children together
    for pid in children:
        reap(pid, HUNG_SECONDS + 5)
    stop.set()
    deadline = time.monotonic() + 2
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if not any(thread.is_alive() for thread in threads):
        engine.dispose()
    hung = [pid for pid in children if statuses.get(pid, signal.SIGALRM) == signal.SIGALRM]
    succeeded = [pid for pid in children if statuses.get(pid) == 0]
    return {
        "tls": tls,
        "forks": arena.iterations,
        "children_hung": len(hung),
        "children_failed": len(children) - len(hung) - len(succeeded),
        "hung_after_seconds": HUNG_SECONDS,
        "parent_errors": len(errors),
        "error": errors[0] if errors else None,
    }


def speed(arena: Arena) -> Measured:
    """Time ``SELECT 1`` with each pool in turn, with checkout and return, without a fork."""
    contenders = (*CONTENDERS, NULLPOOL)
    engines = {contender.key: contender.engine(arena.url) for contender in contenders}
    taken: dict[str, list[float]] = {key: [] for key in engines}
    tls = False
    # In many short rounds, so that a busy moment of the machine affects all contenders.
    for _ in range(_SPEED_ROUNDS):
        for key, engine in engines.items():
            end = time.perf_counter() + _SPEED_SECONDS
            while (start := time.perf_counter()) < end:
                with engine.connect() as connection:
                    connection.execute(text("select 1"))
                taken[key].append(time.perf_counter() - start)
    for engine in engines.values():
        with engine.connect() as connection:
            tls = _has_tls(connection.connection.dbapi_connection)
        engine.dispose()
    medians = {key: round(statistics.median(times) * 1e6, 1) for key, times in taken.items()}
    return {"tls": tls, "microseconds": medians}


MEASURES: dict[str, Callable[[Arena], Measured]] = {
    measure.__name__: measure
    for measure in (
        replaced_session,
        dropped_session,
        orphaned_lock,
        forked_with_threads,
        forked_in_c,
        speed,
    )
}


def measure(name: str, contender: str, url: str, table: str, iterations: int) -> Measured:
    """Measure one failure of one contender in this process."""
    return MEASURES[name](Arena(BY_KEY[contender], url, table, iterations))


# -- forks


def _end_after(seconds: float) -> None:
    # SIGALRM's default action ends the process whatever it hangs in. A fork does not inherit the timer.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _fork(child: Callable[[], None], *, in_c: bool = False, seconds: float = _CHILD_SECONDS) -> int:
    """Fork a process that runs `child()` and ends; return its pid."""
    # PyDLL keeps the GIL over the call, so that the child has it too; uWSGI forks with it held.
    pid: int = ctypes.PyDLL(None).fork() if in_c else os.fork()
    if pid:
        return pid
    code = 1
    try:
        _end_after(seconds)
        child()
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _wait(pid: int) -> int:
    return os.waitpid(pid, 0)[1]


# -- drivers and errors


def _has_tls(dbapi_connection: Any) -> bool:
    info = dbapi_connection.info  # psycopg2
    in_use = getattr(info, "ssl_in_use", None)
    if in_use is None:
        in_use = dbapi_connection.pgconn.ssl_in_use  # psycopg 3
    return bool(in_use)


def _first_line(error: BaseException) -> str:
    cause = getattr(error, "orig", None) or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]
