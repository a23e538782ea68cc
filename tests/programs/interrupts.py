"""Interrupts each operation of a pool at each of its bytecodes, and counts those that do harm.

    python tests/programs/interrupts.py             # a table: QueuePool beside PidPool
    python tests/programs/interrupts.py PidPool     # the harm as JSON, and a line for each harmful bytecode
    python tests/programs/interrupts.py AsyncPidPool  # the same of the waits of asyncio's tasks
    python tests/programs/interrupts.py PidPool --only "child, first use"  # each time in a new child

An interrupt is an exception that a signal handler raises: a soft time limit, KeyboardInterrupt, a killed
greenlet. Here a tracer raises it. It does harm if the pool afterwards has more or less than its capacity,
hands one connection to two, blocks a thread for longer than its timeout, or counts something that is not so.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import gc
import itertools
import json
import logging
import os
import pickle
import sqlite3
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator
from types import CodeType, FrameType
from typing import Any, ClassVar

import structlog
from sqlalchemy import event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import QueuePool
from sqlalchemy.util import greenlet_spawn

from pidpool import AsyncPidPool, ForeignConnectionError, PidPool
from pidpool.forks import log_locks

SIZE, OVERFLOW = 2, 1
CAPACITY = SIZE + OVERFLOW
TIMEOUT = 0.06
"""The pools' timeout in seconds."""

SHORT_TIMEOUT = 0.002
"""That of the pool whose checkout times out, at every bytecode of its wait."""

PATIENCE = {QueuePool: 0.5, PidPool: 20.0, AsyncPidPool: 20.0}
"""Seconds after which a thread hangs. QueuePool leaves many hanging: to be sure of each would take long."""


class Interrupt(BaseException):
    """As KeyboardInterrupt or gevent's GreenletExit, for which ``except Exception`` is blind."""


class SoftTimeLimit(Exception):
    """As Celery's SoftTimeLimitExceeded, which ``except Exception`` catches."""


class Connection:
    """A driver's connection that does nothing."""

    alive: ClassVar[weakref.WeakSet[Connection]] = weakref.WeakSet()

    def __init__(self) -> None:
        self.is_closed = False
        Connection.alive.add(self)

    def cursor(self) -> None: ...

    def rollback(self) -> None: ...

    def commit(self) -> None: ...

    def close(self) -> None:
        self.is_closed = True

    @classmethod
    def open(cls) -> int:
        """Return how many are open."""
        return sum(not each.is_closed for each in list(cls.alive))


class InMemory(Connection, sqlite3.Connection):
    """As `Connection`, with a driver that pidpool knows: only then an inherited one is replaced."""

    def __init__(self) -> None:
        sqlite3.Connection.__init__(self, ":memory:", check_same_thread=False)
        Connection.__init__(self)


# -- interrupting


class Interrupter:
    """Raises an exception at the n-th bytecode executed after `start`; counts them if `at` is None.

    :param within: the names of the functions whose bytecodes count; None for all.
    """

    def __init__(
        self, at: int | None, error: type[BaseException], within: Collection[str] | None = None
    ) -> None:
        self.executed = 0
        self.where: str | None = None
        self._at = at
        self._error = error
        self._within = within

    def start(self) -> None:
        sys.settrace(self._trace)

    def stop(self) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        if not _is_traced(frame.f_code) or (self._within and frame.f_code.co_name not in self._within):
            return None
        if frame.f_code.co_filename == threading.__file__ and _is_in_threadings_hook(frame):
            return None
        frame.f_trace = self._trace_bytecode  # Python 3.13 and later look at it in the next line
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._trace_bytecode

    def _trace_bytecode(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "opcode":
            self.executed += 1
            if self.executed == self._at:
                sys.settrace(None)  # one interrupt
                code = frame.f_code
                self.where = (
                    f"{code.co_filename.rpartition('site-packages/')[2]}:{frame.f_lineno} {code.co_name}"
                )
                raise self._error
        return self._trace_bytecode


def forget_what_tracing_noted(error: BaseException | None) -> None:
    """In Python 3.10 a traced frame has a copy of its local variables, which only reading it renews."""
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            _ = frame.f_locals
        error = error.__context__


_TRACED = (f"{os.sep}pidpool{os.sep}", f"{os.sep}sqlalchemy{os.sep}")
_TRACED_MODULES = {module.__file__ for module in (threading, weakref, contextlib)}
"""The parts of the standard library that pools are made of. Not logging, which has locks of its own."""


def _is_in_threadings_hook(frame: FrameType | None) -> bool:
    """Return whether this is CPython's own work in a forked child. An interrupt there is not pidpool's."""
    while frame is not None and frame.f_code is not threading._after_fork.__code__:  # type: ignore[attr-defined]
        frame = frame.f_back
    return frame is not None


_BRIDGE = greenlet_spawn.__code__.co_filename
"""SQLAlchemy's way from a task to its greenlet. An exception there leaves the pool's call suspended, for as
long as the exception is kept."""


def _is_traced(code: CodeType) -> bool:
    name = code.co_filename
    if name == _BRIDGE:
        return False
    return any(part in name for part in _TRACED) or name in _TRACED_MODULES


# -- the operations


class Trial:
    """A pool in the state in which an operation finds it.

    The application keeps what it has in `held`. If an operation is interrupted, it closes what still is valid
    there, as a ``with`` block does, and forgets it.
    """

    def __init__(self, make: Callable[..., Any], connection: type[Connection]) -> None:
        self.pool = make(connection, pool_size=SIZE, max_overflow=OVERFLOW, timeout=TIMEOUT)
        self.held: list[Any] = []
        self.uses_again = False
        """Whether the application uses what it still has once more before it closes it."""
        self.elsewhere = 0
        """How many connections other processes have checked out."""

    def fill(self, idle: int, held: int) -> None:
        checkouts = [self.pool.connect() for _ in range(idle + held)]
        for _ in range(idle):
            checkouts.pop().close()
        self.held = checkouts


def checkout_of_an_idle_connection(trial: Trial) -> Iterator[None]:
    trial.fill(idle=1, held=1)
    yield
    trial.held.append(trial.pool.connect())


def checkout_that_opens_one(trial: Trial) -> Iterator[None]:
    trial.fill(idle=0, held=2)
    yield
    trial.held.append(trial.pool.connect())


def checkout_that_recycles(trial: Trial) -> Iterator[None]:
    trial.fill(idle=0, held=2)
    trial.held[0].invalidate(soft=True)
    trial.held.pop(0).close()
    yield
    trial.held.append(trial.pool.connect())


def checkout_that_finds_a_dead_connection(trial: Trial) -> Iterator[None]:
    trial.fill(idle=1, held=1)
    errors = [DisconnectionError()]

    # Its frame, which the error's traceback keeps, has all that is being checked out.
    @event.listens_for(trial.pool, "checkout")
    def checkout(connection: Any, entry: Any, checkout: Any) -> None:
        if errors:
            raise errors.pop()

    yield
    trial.held.append(trial.pool.connect())


def checkout_that_times_out(trial: Trial) -> Iterator[None]:
    trial.fill(idle=0, held=3)
    yield
    trial.held.append(trial.pool.connect())


def checkin(trial: Trial) -> Iterator[None]:
    trial.fill(idle=0, held=2)
    yield
    trial.held[0].close()


def checkin_of_an_overflowing_one(trial: Trial) -> Iterator[None]:
    trial.fill(idle=2, held=1)
    yield
    trial.held[0].close()


def be_dead() -> None:
    raise sqlite3.OperationalError("the server is gone")


def checkin_of_a_dead_one(trial: Trial) -> Iterator[None]:
    trial.fill(idle=0, held=2)
    trial.held[0].dbapi_connection.rollback = be_dead
    yield
    trial.held[0].close()


def checkin_after_a_dead_one(trial: Trial) -> Iterator[None]:
    trial.fill(idle=0, held=2)
    trial.held[0].dbapi_connection.rollback = be_dead
    trial.held.pop(0).close()
    trial.held.append(trial.pool.connect())  # the same entry
    yield
    trial.held[1].close()


def drop(trial: Trial) -> Iterator[None]:
    trial.fill(idle=0, held=2)
    yield
    del trial.held[0]


def invalidate(trial: Trial) -> Iterator[None]:
    trial.fill(idle=1, held=1)
    yield
    trial.held[0].invalidate()


def invalidate_a_detached_one(trial: Trial) -> Iterator[None]:
    trial.fill(idle=1, held=1)
    trial.held[0].detach()
    yield
    trial.held[0].invalidate()


def detach(trial: Trial) -> Iterator[None]:
    trial.fill(idle=1, held=1)
    yield
    trial.held[0].detach()


def dispose(trial: Trial) -> Iterator[None]:
    trial.fill(idle=1, held=1)
    yield
    trial.pool.dispose()


OPERATIONS: dict[str, Callable[[Trial], Iterator[None]]] = {
    "checkout, idle": checkout_of_an_idle_connection,
    "checkout, opens": checkout_that_opens_one,
    "checkout, recycles": checkout_that_recycles,
    "checkout, dead": checkout_that_finds_a_dead_connection,
    "checkout, times out": checkout_that_times_out,
    "checkin": checkin,
    "checkin, overflow": checkin_of_an_overflowing_one,
    "checkin, dead": checkin_of_a_dead_one,
    "checkin, after dead": checkin_after_a_dead_one,
    "drop": drop,
    "invalidate": invalidate,
    "invalidate, detached": invalidate_a_detached_one,
    "detach": detach,
    "dispose": dispose,
}


def drop_from_a_disposed_pool(trial: Trial) -> Iterator[None]:
    trial.fill(idle=0, held=2)
    trial.pool.dispose()
    yield
    del trial.held[0]


# A QueuePool counts wrong what comes back after it was disposed of, also without an interrupt.
DISPOSED_OPERATIONS: dict[str, Callable[[Trial], Iterator[None]]] = {
    "drop, disposed": drop_from_a_disposed_pool,
}


def check_out_in_a_task(trial: Trial) -> Iterator[None]:
    trial.fill(idle=0, held=3)
    yield
    asyncio.run(greenlet_spawn(lambda: trial.held.append(trial.pool.connect())))


def hand_over_to_a_task(trial: Trial) -> Iterator[None]:
    trial.fill(idle=0, held=3)
    yield

    async def hand_over() -> None:
        task = asyncio.create_task(greenlet_spawn(lambda: trial.held.append(trial.pool.connect())))
        await asyncio.sleep(0)  # it waits now
        try:
            trial.held[0].close()
        finally:
            await task

    asyncio.run(hand_over())


TASK_OPERATIONS: dict[str, Callable[[Trial], Iterator[None]]] = {
    "task, times out": check_out_in_a_task,
    "task, handed over": hand_over_to_a_task,
}


def inherit(trial: Trial, *, detached: bool = False, how: Callable[[], int] = os.fork) -> None:
    """Go on in a child, which has inherited a checkout, and end the parent after it."""
    trial.fill(idle=0, held=1)
    if detached:
        trial.held[0].detach()
    go_on_in_a_child(trial, how)
    trial.elsewhere = int(not detached)


def go_on_in_a_child(trial: Trial, how: Callable[[], int] = os.fork) -> None:
    pid = how()
    if pid:
        os.waitpid(pid, 0)
        os._exit(0)
    Connection.alive = weakref.WeakSet()  # those that this process opens
    trial.uses_again = True


def start_a_thread() -> None:
    threading.Thread(target=threading.Event().wait, daemon=True).start()


def fork(trial: Trial) -> Iterator[None]:
    trial.fill(idle=0, held=1)
    start_a_thread()
    yield
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)


def be_forked(trial: Trial) -> Iterator[None]:
    trial.fill(idle=0, held=1)
    start_a_thread()
    yield
    go_on_in_a_child(trial)
    trial.elsewhere = 1


def first_use(trial: Trial) -> Iterator[None]:
    inherit(trial)
    yield
    trial.held[0].cursor()


def first_use_of_a_detached_one(trial: Trial) -> Iterator[None]:
    inherit(trial, detached=True)
    yield
    trial.held[0].cursor()


def detach_an_inherited_one(trial: Trial) -> Iterator[None]:
    inherit(trial)
    yield
    trial.held[0].detach()


def first_use_after_a_fork_in_c(trial: Trial) -> Iterator[None]:
    inherit(trial, how=ctypes.PyDLL(None).fork)
    yield
    trial.held[0].cursor()


CHILD_OPERATIONS: dict[str, Callable[[Trial], Iterator[None]]] = {
    "fork": fork,
    "child, forked": be_forked,
    "child, first use": first_use,
    "child, first use, detached": first_use_of_a_detached_one,
    "child, detach": detach_an_inherited_one,
    "child, first use, in C": first_use_after_a_fork_in_c,
}

ALL_OPERATIONS = {**OPERATIONS, **DISPOSED_OPERATIONS, **TASK_OPERATIONS, **CHILD_OPERATIONS}


# -- what must be so afterwards


class Checkouts(threading.Thread):
    """Checks out as many connections as the pool may have, and one more, in a thread of its own: a lock that
    the interrupted one has kept would not keep that out."""

    def __init__(self, pool: Any, elsewhere: int) -> None:
        super().__init__(daemon=True)
        self.pool = pool
        self.elsewhere = elsewhere
        self.found: list[str] = []

    def run(self) -> None:
        checkouts: list[Any] = []
        if not log_locks.are_free(time.monotonic() + 1):
            self.found.append("a log writer's lock is kept")
        if not gc.isenabled():
            self.found.append("no garbage is collected")
        try:
            checkouts.extend(self.pool.connect() for _ in range(CAPACITY))
        except Exception as error:
            self.found.append(f"capacity {len(checkouts)} of {CAPACITY}: {type(error).__name__}")
            error.__traceback__ = None
        connections = {id(each.dbapi_connection) for each in checkouts}
        if len(connections) < len(checkouts):
            self.found.append("one connection for two")
        if any(each.dbapi_connection.is_closed for each in checkouts):
            self.found.append("a closed connection")
        if self.pool.checkedout() != len(checkouts):
            self.found.append(f"checkedout() {self.pool.checkedout()} of {len(checkouts)}")
        if self.pool.overflow() != len(checkouts) - SIZE:
            self.found.append(f"overflow() {self.pool.overflow()} of {len(checkouts) - SIZE}")
        if not self.found:
            try:
                self.pool._timeout = 0.0
                self.pool.connect()
                self.found.append("more than the capacity")
            except Exception as error:
                error.__traceback__ = None
        # Now that a checkout had to wait.
        if Connection.open() > CAPACITY:
            self.found.append(f"{Connection.open()} connections open at a capacity of {CAPACITY}")
        for each in checkouts:
            each.close()
        del checkouts
        self._look_at_counts()

    def _look_at_counts(self) -> None:
        pool, opened = self.pool, Connection.open()
        if (pool.checkedout(), pool.checkedin()) != (0, SIZE):
            self.found.append(f"checkedout() {pool.checkedout()}, checkedin() {pool.checkedin()} at the end")
        if opened > SIZE:
            self.found.append(f"{opened} connections open at the end")
        if isinstance(pool, PidPool):
            stats, family = pool.stats(), pool.family_stats()
            counts = {
                "used": (stats.used, 0),
                "idle": (stats.idle, SIZE),
                "waiting": (stats.waiting, 0),
                "overflow": (stats.overflow, 0),
                "listed": (len(stats.connections), SIZE),
                "wanting": (stats.wanting, 0),
                "permits": (stats.permits, 0 if family.limit is None else SIZE),
                "family's used": (family.used, self.elsewhere),
                "family's idle": (family.idle, SIZE),
            }
            self.found.extend(
                f"{name} {is_} of {right}" for name, (is_, right) in counts.items() if is_ != right
            )


def interrupt(
    make: Callable[..., Any],
    operation: str,
    within: Collection[str] | None,
    at: int | None,
    error: type[BaseException],
    keeps: bool,
) -> tuple[Interrupter, list[str]]:
    """Run an operation with an interrupt at one bytecode; return what was found to be wrong afterwards.

    :param keeps: whether the application keeps the exception, with its traceback.
    """
    Connection.alive = weakref.WeakSet()
    trial = Trial(make, InMemory if operation in CHILD_OPERATIONS else Connection)
    steps = ALL_OPERATIONS[operation](trial)
    next(steps)
    if operation.endswith("times out"):
        trial.pool._timeout = SHORT_TIMEOUT
    interrupter = Interrupter(at, error, within)
    kept: list[Any] = []
    ignored: list[Any] = []
    sys.unraisablehook = lambda unraisable: ignored.append(
        unraisable.exc_value
    )  # an exception in a finalizer
    try:
        interrupter.start()
        try:
            next(steps, None)
        finally:
            interrupter.stop()
    except BaseException as caught:
        # Without the frames above the operation: the application's own keep what they like.
        caught.__traceback__ = caught.__traceback__ and caught.__traceback__.tb_next
        if keeps:
            kept.append(caught)
    trial.pool._timeout = TIMEOUT
    if not keeps:
        ignored.clear()
    for each in kept + ignored:
        forget_what_tracing_noted(each)
    steps.close()
    if at is None:
        return interrupter, []
    refused: list[str] = []
    for each in trial.held:
        if each.is_valid:
            if trial.uses_again:
                try:
                    each.cursor()
                except ForeignConnectionError as foreign:
                    refused.append(f"the checkout is refused: {foreign}")
            each.close()
    trial.held.clear()
    each = None
    if operation in CHILD_OPERATIONS:
        gc.collect()  # one of sqlite3's refers to itself
    checkouts = Checkouts(trial.pool, trial.elsewhere)
    checkouts.found += refused
    checkouts.start()
    checkouts.join(PATIENCE[type(trial.pool)])
    if checkouts.is_alive():
        checkouts.found.append("a thread hangs")
    sys.unraisablehook = sys.__unraisablehook__
    return interrupter, checkouts.found


def interrupt_in_a_child(*arguments: Any) -> tuple[Interrupter, list[str]]:
    """As `interrupt`, for an operation that leaves its process."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        gc.freeze()
        with open(theirs, "wb") as pipe:
            try:
                pickle.dump(interrupt(*arguments), pipe)
                pipe.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as pipe:
        result: tuple[Interrupter, list[str]] = pickle.load(pipe)
    os.waitpid(pid, 0)
    return result


def harm(
    make: Callable[..., Any],
    operation: str,
    *,
    within: Collection[str] | None = None,
    every_variant: bool,
    step: int = 1,
    most: int | None = None,
) -> tuple[int, dict[int, list[str]]]:
    """Interrupt an operation at each bytecode; return their number, and what each harmful one did.

    :param within: the names of the functions in which to do it; None for all.
    :param every_variant: whether to do it with each of the variants, not with one after the other.
    :param step: 1 for each bytecode, 2 for each second one.
    :param most: the number of harmful bytecodes that are enough.
    """
    run = interrupt_in_a_child if operation in CHILD_OPERATIONS else interrupt
    for _ in range(2):  # the first time something is imported, or made once
        executed = run(make, operation, within, None, Interrupt, False)[0].executed
    found: dict[int, list[str]] = {}
    for turn, at in enumerate(itertools.count(1, step)):
        is_over = False
        for error, keeps in VARIANTS if every_variant else VARIANTS[turn % len(VARIANTS) :][:1]:
            interrupter, wrong = run(make, operation, within, at, error, keeps)
            is_over = interrupter.where is None
            if wrong and not is_over:
                kept = "kept" if keeps else "dropped"
                what = f"{interrupter.where}, {error.__name__} {kept}: {'; '.join(wrong)}"
                found.setdefault(at, []).append(what)
        if is_over or len(found) == most:
            break
    return max(executed, at - 1), found


VARIANTS = list(itertools.product((Interrupt, SoftTimeLimit), (False, True)))


def family_limited(*arguments: Any, **options: Any) -> PidPool:
    return PidPool(*arguments, family_limit=CAPACITY, **options)


class Logger:
    """Takes the events of every level, and keeps none."""

    def debug(self, event: str, **fields: Any) -> None: ...

    info = warning = error = debug


def watched(*arguments: Any, **options: Any) -> PidPool:
    """A pool that has more to do at a checkin: it logs events, and warns of long checkouts."""
    return PidPool(*arguments, hold_warning=100.0, logger=Logger(), **options)


def echoing(*arguments: Any, **options: Any) -> PidPool:
    """A pool that logs each connection as SQLAlchemy does, to a logger that keeps nothing."""
    logging.disable(logging.NOTSET)
    logging.getLogger("pidpool").setLevel(logging.CRITICAL)
    logger = logging.getLogger("sqlalchemy.pool.impl.PidPool")
    logger.handlers, logger.propagate = [logging.NullHandler()], False
    return PidPool(*arguments, echo="debug", **options)


POOLS: dict[str, Callable[..., Any]] = {
    "QueuePool": QueuePool,
    "PidPool": PidPool,
    "family_limit": family_limited,
    "watched": watched,
    "echoing": echoing,
    "AsyncPidPool": AsyncPidPool,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pool", nargs="?", choices=POOLS)
    parser.add_argument("--only", choices=ALL_OPERATIONS, nargs="*", help="operations")
    parser.add_argument("--within", nargs="*", metavar="FUNCTION", help="only in functions of these names")
    parser.add_argument("--every", action="store_true", help="each error, kept and dropped, at each bytecode")
    parser.add_argument("--step", type=int, default=1, help="1 for each bytecode, 2 for each second one")
    parser.add_argument("--most", type=int, help="so many harmful bytecodes of an operation are enough")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    logging.raiseExceptions = False  # pidpool tells of an event that an interrupt kept from being logged
    warnings.simplefilter("ignore")
    structlog.PrintLogger()  # its lock can't be asked who has it
    pools = [arguments.pool] if arguments.pool else ["QueuePool", "PidPool"]
    operations = arguments.only or list(TASK_OPERATIONS if pools == ["AsyncPidPool"] else OPERATIONS)
    table: dict[str, dict[str, Any]] = {name: {} for name in pools}
    if not arguments.pool:
        print(f"{'interrupted at each bytecode of':32}" + "".join(f"{name:>20}" for name in pools))
    for operation in operations:
        for name in pools:
            executed, found = harm(
                POOLS[name],
                operation,
                within=arguments.within,
                every_variant=arguments.every,
                step=arguments.step,
                most=arguments.most,
            )
            table[name][operation] = {"bytecodes": executed, "harmful": found}
        if not arguments.pool:
            cells = (table[name][operation] for name in pools)
            print(
                f"{operation:32}" + "".join(f"{len(c['harmful']):>11} of {c['bytecodes']:>5}" for c in cells),
                flush=True,
            )
    if arguments.pool:
        print(json.dumps(table[arguments.pool], indent=1))


if __name__ == "__main__":
    main()
