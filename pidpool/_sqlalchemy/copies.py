"""Copies of SQLAlchemy's own checkout and checkin, without what those need only at times: half the time. They
are used with the versions that they were compared with. With others SQLAlchemy's own code runs
(`contract.use_copies`).

Read beside `_ConnectionRecord.checkout`, `_ConnectionFairy.__init__` and `_finalize_fairy` in
sqlalchemy/pool/base.py.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

from sqlalchemy.pool.base import _ConnectionFairy, _ConnectionRecord, reset_rollback

from pidpool._sqlalchemy import contract
from pidpool.forks import detection
from pidpool.forks.detection import FORKED, fork_state
from pidpool.forks.stand_in import DisownedConnection

USED = contract.use_copies()


def init_checkout(self: Any, pool: Any, dbapi_connection: Any, record: Any, echo: Any) -> None:
    """Make a checkout: `_ConnectionFairy.__init__` without its finalizer, a third of a checkout's time."""
    self._pool = pool
    self._counter = 0
    self._echo = echo
    self.held_connection = dbapi_connection
    self.entry = record
    record.fairy_ref = weakref.ref(self)


def make_check_out(checkout_class: Any, by_sqlalchemy: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return the function that checks a connection out: `_ConnectionRecord.checkout`.

    :param checkout_class: the class of the checkouts.
    :param by_sqlalchemy: does the same by SQLAlchemy's own code.
    """
    entry_class = vars(_ConnectionRecord)
    their_checkout = entry_class["checkout"]
    debug = logging.DEBUG

    def check_out(pool: Any) -> Any:
        # If a tracer or SQLAlchemy's tests have wrapped their method, it is not passed over.
        if entry_class["checkout"] is not their_checkout:
            return by_sqlalchemy(pool)
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
            except BaseException as error:
                entry._checkin_failed(error, _fairy_was_created=False)
                raise
            if entry.inherited:  # a connect listener has forked, and this is the child
                return check_out(pool)
        echo = pool.logger.isEnabledFor(debug)
        if echo:
            pool.logger.debug("Connection %r checked out from pool", dbapi_connection)
        checkout = checkout_class(pool, dbapi_connection, entry, echo)
        if pool.dispatch.checkout or pool._pre_ping:
            return _ConnectionFairy._checkout(pool, None, checkout)
        checkout._counter = 1
        return checkout

    return check_out


def check_in(self: Any, transaction_was_reset: bool = False) -> None:
    """Return a connection to its pool: `_finalize_fairy` and `_ConnectionRecord.checkin`, if nothing but a
    rollback is asked for. For a checkin that was asked for, asyncio's dialects do the same as others."""
    if fork_state[0] == FORKED:
        detection.notice_fork()
    connection, pool, entry = self.held_connection, self._pool, self.entry
    if isinstance(connection, DisownedConnection):
        self.let_go()
        return
    dispatch = pool.dispatch
    if (
        connection is None
        or entry is None
        or self._echo
        or entry.finalize_callback
        or dispatch.reset
        or pool._reset_on_return is not reset_rollback
    ):
        _ConnectionFairy._checkin(self, transaction_was_reset)
        return
    if not transaction_was_reset:
        try:
            pool._dialect.do_rollback(self)
        except BaseException as error:
            self.reset_error = error
            _ConnectionFairy._checkin(self)
            return
    entry.fairy_ref = None
    if dispatch.checkin:
        dispatch.checkin(entry.dbapi_connection, entry)
    self.held_connection = self.entry = None
    pool._do_return_conn(entry)
