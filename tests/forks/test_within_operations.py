"""A fork in a signal handler, in the middle of a checkout or a checkin. The child goes on where it was: the
handler returns there, too."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
from engines import MakeEngine, pool_of
from forking import How, fork
from parent import server_pid
from soak import SOAK
from sqlalchemy import exc, text

from pidpool import ForeignConnectionError, PidPool
from pidpool._sqlalchemy.entry import PidPoolEntry
from pidpool.forks.stand_in import DisownedConnection

SIZE, OVERFLOW = 2, 1
CAPACITY = SIZE + OVERFLOW
_PARTS = (f"{os.sep}pidpool{os.sep}", f"{os.sep}sqlalchemy{os.sep}")

both_hows = pytest.mark.parametrize("how", ["python", "c"])


class Connection:
    """A driver's connection that knows which process opened it, and in which it is used."""

    def __init__(self) -> None:
        self.opened_by = os.getpid()

    def _use(self) -> None:
        assert self.opened_by == os.getpid(), "an inherited connection is used"

    def cursor(self) -> None:
        self._use()

    def rollback(self) -> None:
        self._use()

    def commit(self) -> None:
        self._use()

    def close(self) -> None:
        """Of a connection that is being closed at the fork both processes close it; its socket is severed."""


class Forker:
    """Forks at the n-th event of an operation, and lets both processes go on there.

    :param at: counts the events only, if it is None.
    :param event: what is counted: ``line``, ``opcode``, or ``handler`` for the places at which CPython calls
        signal handlers.
    """

    def __init__(self, at: int | None, how: How, event: str) -> None:
        self.passed = 0
        self.child: int | None = None
        self.where = ""
        self._at, self._how, self._event = at, how, event

    def __enter__(self) -> Forker:
        if self._event == "handler":
            sys.setprofile(self._profile)
        else:
            sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        # Whose connection it has is decided there between two calls. No signal handler can run in between, so
        # nothing but a tracer can fork there.
        if not _is_the_pools(frame) or frame.f_code is PidPoolEntry.open.__code__:
            return None
        if event == "call":
            frame.f_trace_opcodes = self._event == "opcode"
        elif event == self._event:
            self._pass(frame)
        return self._trace

    def _profile(self, frame: FrameType, event: str, _: object) -> None:
        if event in ("call", "c_return") and _is_the_pools(frame):
            self._pass(frame)

    def _pass(self, frame: FrameType) -> None:
        self.passed += 1
        if self.passed == self._at:
            self.__exit__()
            self.where = "".join(traceback.format_stack(frame)[-4:])
            self.child = fork(self._how)


def _is_the_pools(frame: FrameType | None) -> bool:
    return frame is not None and any(part in frame.f_code.co_filename for part in _PARTS)


def make_pool() -> PidPool:
    return PidPool(Connection, pool_size=SIZE, max_overflow=OVERFLOW, timeout=0)


Held = list[Any]


def checkout_of_an_idle_one(pool: PidPool, held: Held) -> Iterator[None]:
    held += [pool.connect(), pool.connect()]
    held.pop().close()
    yield
    held.append(pool.connect())


def checkout_that_opens_one(pool: PidPool, held: Held) -> Iterator[None]:
    held.append(pool.connect())
    yield
    held.append(pool.connect())


def checkin(pool: PidPool, held: Held) -> Iterator[None]:
    held += [pool.connect(), pool.connect()]
    yield
    held.pop().close()


def checkin_of_an_overflowing_one(pool: PidPool, held: Held) -> Iterator[None]:
    held += [pool.connect() for _ in range(CAPACITY)]
    held.pop().close()
    held.pop().close()
    yield
    held.pop().close()


def drop(pool: PidPool, held: Held) -> Iterator[None]:
    held += [pool.connect(), pool.connect()]
    yield
    held.pop()


OPERATIONS = [checkout_of_an_idle_one, checkout_that_opens_one, checkin, checkin_of_an_overflowing_one, drop]
Operation = Callable[[PidPool, Held], Iterator[None]]


def check_child(pool: PidPool, held: Held) -> None:
    """The child has its pool's whole capacity, and nothing of its parent's."""
    for each in held:
        with contextlib.suppress(ForeignConnectionError):
            each.cursor()  # its own, or refused: the driver does not say whether it is in a transaction
    each = None
    held.clear()
    checkouts = [pool.connect() for _ in range(CAPACITY)]
    connections = [each.dbapi_connection for each in checkouts]
    assert not any(isinstance(each, DisownedConnection) for each in connections)
    assert {each.opened_by for each in connections} == {os.getpid()}
    assert len({id(each) for each in connections}) == CAPACITY == pool.checkedout()
    with pytest.raises(exc.TimeoutError):
        pool.connect()
    for each in checkouts:
        each.cursor()
        each.close()
    assert (pool.checkedout(), pool.checkedin()) == (0, SIZE)
    stats = pool.stats()
    assert (stats.used, stats.idle, stats.waiting, stats.overflow) == (0, SIZE, 0, 0)
    assert stats.counters.opened - sum(stats.counters.closed.values()) == SIZE


def state(pool: PidPool) -> dict[str, Any]:
    stats = pool.stats()
    counters = stats.counters
    return {
        "used": stats.used,
        "idle": stats.idle,
        "opened": counters.opened,
        "closed": counters.closed,
        "checkouts": counters.checkouts,
        "checkins": counters.checkins,
        "waits": sum(counters.wait_time.counts),
        "uses": sum(counters.use_time.counts),
        "checkedout": pool.checkedout(),
        "checkedin": pool.checkedin(),
    }


def fork_within(operation: Operation, at: int | None, how: How, event: str) -> tuple[Forker, dict[str, Any]]:
    """Run an operation with a fork in it; return the state of the parent's pool afterwards."""
    pool, held = make_pool(), Held()
    steps = operation(pool, held)
    next(steps)
    reader, writer = os.pipe()
    forker = Forker(at, how, event)
    failure = None
    try:
        with forker:
            next(steps, None)
        if forker.child == 0:
            check_child(pool, held)
    except BaseException:
        if forker.child != 0:
            raise
        failure = traceback.format_exc()
    finally:
        if forker.child == 0:
            with contextlib.suppress(OSError):
                os.write(writer, pickle.dumps(failure)[-60000:])
            os._exit(0)
    os.close(writer)
    try:
        if forker.child is not None:
            answer = b""
            while part := os.read(reader, 1 << 16):
                answer += part
            os.waitpid(forker.child, 0)
            assert answer, f"the child ended: {forker.where}"
            assert pickle.loads(answer) is None, f"{forker.where}: {pickle.loads(answer)}"
    finally:
        os.close(reader)
    for each in held:
        each.cursor()
    return forker, state(pool)


@pytest.mark.soak
@both_hows
@pytest.mark.parametrize("event", ["handler", "line"] + ["opcode"] * SOAK)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: each.__name__)
def test_a_child_that_goes_on_in_the_middle_of_an_operation(
    operation: Operation, event: str, how: How
) -> None:
    for _ in range(2):
        forker, expected = fork_within(operation, None, how, event)
    wrong = []
    step = 1 if SOAK else {"handler": 7, "line": 29}[event]
    for at in range(1, forker.passed + 1, step):
        forker, found = fork_within(operation, at, how, event)
        # Between the lines that count, where no signal handler is called, a child counts on its parent's row.
        if found != expected and event == "handler":
            wrong.append((forker.where, found))
    assert not wrong, f"instead of {expected}"


@pytest.mark.soak
@both_hows
@pytest.mark.usefixtures("clean_log")
def test_a_child_that_goes_on_has_sessions_of_its_own(
    tls_url: str, make_engine: MakeEngine, how: How
) -> None:
    """At some of the places of a checkout and a checkin, with a transaction open on another connection."""
    engine = make_engine(tls_url, pool_size=2, max_overflow=0)

    def check_out_and_in() -> None:
        engine.raw_connection().close()

    with engine.connect() as kept:
        kept.execute(text("create temp table written (number int) on commit drop"))
        own = server_pid(kept)
        check_out_and_in()
        with Forker(None, how, "handler") as counted:
            check_out_and_in()
        for at in range(1, counted.passed + 1, 1 if SOAK else 6):
            reader, writer = os.pipe()
            with Forker(at, how, "handler") as forker:
                check_out_and_in()
            if forker.child == 0:
                found: Any = None
                with contextlib.suppress(Exception), engine.connect() as first, engine.connect() as second:
                    found = server_pid(first), server_pid(second)
                engine.dispose()
                os.write(writer, pickle.dumps(found))
                os._exit(0)
            assert forker.child is not None
            os.close(writer)
            pids = pickle.loads(os.read(reader, 1000))
            os.close(reader)
            os.waitpid(forker.child, 0)
            with engine.connect() as other:
                own_pids = {own, server_pid(other)}
            assert pids and len({*pids, *own_pids}) == 4, forker.where
            kept.execute(text("insert into written values (1)"))
        assert kept.scalar(text("select count(*) from written")) and server_pid(kept) == own


@both_hows
@pytest.mark.usefixtures("clean_log")
def test_a_child_does_not_close_what_its_parent_was_about_to_close(
    tls_url: str, make_engine: MakeEngine, how: How
) -> None:
    """The handler forks, and raises in the child."""
    engine = make_engine(tls_url)
    dialect: Any = engine.dialect
    close = dialect.do_close

    def fork_and_close(connection: Any) -> None:
        del dialect.do_close
        if fork(how) == 0:
            raise KeyboardInterrupt
        os.wait()
        connection.cursor().execute("select 1")
        is_alive.append(True)  # SQLAlchemy logs an error, and goes on
        close(connection)

    is_alive: list[bool] = []
    checkout = engine.raw_connection()
    parent = os.getpid()
    dialect.do_close = fork_and_close
    try:
        checkout.invalidate()
    finally:
        if os.getpid() != parent:
            os._exit(0)
    assert is_alive
    counts = pool_of(engine).stats().counters
    assert (counts.opened, counts.closed["invalidated"]) == (1, 1)
