"""Copies of SQLAlchemy's own checkout and checkin, without what those need only at times: half the time. They
are used with the versions that they were compared with. With others SQLAlchemy's own code runs
(`contract.use_copies`).

Read beside `_ConnectionRecord.checkout`, `_ConnectionFairy.__init__`, `_ConnectionFairy._reset` and
`_finalize_fairy` in sqlalchemy/pool/base.py.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable
from typing import Any

from sqlalchemy.pool import PoolResetState
from sqlalchemy.pool.base import _ConnectionFairy, _ConnectionRecord, reset_rollback

from pidpool._sqlalchemy import contract
from pidpool._sqlalchemy.entry import ForkedWhileOpening
from pidpool.forks import detection
from pidpool.forks.detection import FORKED, fork_state
from pidpool.forks.stand_in import DisownedConnection
from pidpool.stats.process_counters import IN_STATE_SINCE, LAST_BUCKET, THREAD, WAIT, WAIT_SUM

USED = contract.use_copies()


def init_checkout(self: Any, pool: Any, dbapi_connection: Any, record: Any, echo: Any) -> None:
    """Make a checkout: `_ConnectionFairy.__init__` without its finalizer, a third of a checkout's time."""
    self.entry = record
    self._pool = pool
    self._counter = 0
    self._echo = echo
    self.held_connection = dbapi_connection
    record.fairy_ref = weakref.ref(self)


def make_check_out(
    checkout_class: Any, by_sqlalchemy: Callable[[Any], Any]
) -> Callable[[Any, int, int], Any]:
    """Return the function that checks a connection out: `_ConnectionRecord.checkout`, and its counting.

    :param checkout_class: the class of the checkouts.
    :param by_sqlalchemy: checks out by SQLAlchemy's own code.
    """
    entry_class = vars(_ConnectionRecord)
    # If a tracer or SQLAlchemy's tests have wrapped their method, it is not passed over.
    their_checkout = entry_class["checkout"] if USED else None
    debug = logging.DEBUG

    def check_out(pool: Any, started: int, thread: int) -> Any:
        if entry_class["checkout"] is not their_checkout:
            checkout = by_sqlalchemy(pool)
        else:
            entry = pool._do_get()
            dbapi_connection = entry.dbapi_connection
            # What get_connection() would find out, without the call.
            if (
                dbapi_connection is None
                or pool._recycle > -1
                or pool._invalidate_time > entry.starttime
                or entry._soft_invalidate_time > entry.starttime
            ):
                try:
                    dbapi_connection = entry.get_connection()
                except ForkedWhileOpening as forked:
                    forked.__traceback__ = None
                    return check_out(pool, started, thread)
                except BaseException as error:
                    entry._checkin_failed(error, _fairy_was_created=False)
                    raise
            echo = pool.logger.isEnabledFor(debug)
            if echo:
                pool.logger.debug("Connection %r checked out from pool", dbapi_connection)
            checkout = checkout_class(pool, dbapi_connection, entry, echo)
            if pool.dispatch.checkout or pool._pre_ping:
                checkout.ping_and_call_listeners()
            else:
                checkout._counter = 1
        entry = checkout.entry
        if entry is None:
            return checkout  # a checkout listener has detached or invalidated it
        entry.owned.used_by = entry
        now = time.perf_counter_ns()
        waited = now - started
        bucket = (waited >> 10).bit_length()  # process_counters.bucket(), without the call
        # After the last call, which a signal handler may follow that forks: no count is another process's.
        if fork_state[0] == FORKED:
            detection.notice_fork()
        if entry.members is not pool.members and not pool.takes(entry):
            return check_out(
                pool, started, thread
            )  # this is the child: entry and connection are its parent's
        entry.out_since = now
        slot = entry.slot
        slot[WAIT + (bucket if bucket < LAST_BUCKET else LAST_BUCKET)] += 1
        slot[WAIT_SUM] += waited
        slot[IN_STATE_SINCE] = now
        slot[THREAD] = thread
        is_logged = pool.pool_events.is_enabled()
        if is_logged or pool.hold_warning is not None:
            pool.watch(entry, waited / 1e9, now / 1e9, is_logged)
        return checkout

    return check_out


def check_in(self: Any, transaction_was_reset: bool = False) -> None:
    """Return a connection to its pool: `_finalize_fairy`, `_ConnectionFairy._reset` and
    `_ConnectionRecord.checkin`, for a pool that rolls back at checkin and does not log it. For a checkin that
    was asked for, asyncio's dialects do the same as others."""
    if fork_state[0] == FORKED:
        detection.notice_fork()
    connection, pool, entry = self.held_connection, self._pool, self.entry
    if isinstance(connection, DisownedConnection):
        self.let_go()
        return
    dispatch = pool.dispatch
    if connection is None or entry is None or self._echo or pool._reset_on_return is not reset_rollback:
        _ConnectionFairy._checkin(self, transaction_was_reset)
        return
    try:
        if dispatch.reset:
            state = PoolResetState(
                transaction_was_reset=transaction_was_reset, terminate_only=False, asyncio_safe=True
            )
            dispatch.reset(connection, entry, state)
        if not transaction_was_reset:
            pool._dialect.do_rollback(self)
    except BaseException as error:
        if self.entry is None:  # a reset listener has detached or invalidated it before
            self.held_connection = None
            pool.logger.error("Exception during reset or similar", exc_info=True)
            if not isinstance(error, Exception):
                raise
            return
        self.reset_error = error
        _ConnectionFairy._checkin(self)
        return
    if fork_state[0] == FORKED:
        detection.notice_fork()
    # A reset listener has detached or invalidated it. Or this is a child, forked in the lines above: what
    # follows would use its parent's connection.
    if self.entry is not entry or entry.inherited:
        self.let_go()
        return
    entry.owned.used_by = entry.fairy_ref = None
    connection = entry.dbapi_connection
    while entry.finalize_callback:
        undo = entry.finalize_callback.pop()
        if connection is not None:
            undo(connection)
    if dispatch.checkin:
        dispatch.checkin(connection, entry)
    self.held_connection = self.entry = None
    pool._do_return_conn(entry)
