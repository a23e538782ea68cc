"""What pidpool relies on in SQLAlchemy beyond its public interface, checked when this room is imported.

A name that is missing or has another shape is a `ContractBroken` that says which: otherwise a renamed hook
would simply never be called, and a fork would harm the parent without a word. The names were read in
SQLAlchemy 2.0.31 to 2.1.9.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

from sqlalchemy import __version__, event, util
from sqlalchemy.connectors import asyncio as asyncio_connector
from sqlalchemy.event import attr
from sqlalchemy.pool import Pool, QueuePool, base
from sqlalchemy.util import queue

COPIES_READ_AT = ("2.0.", "2.1.")
"""The versions of SQLAlchemy whose code the copies in `copies` were compared with."""


class ContractBroken(ImportError):
    """This version of SQLAlchemy lacks something that pidpool relies on; the text names it."""


def use_copies() -> bool:
    """Return whether the copies of SQLAlchemy's code may be used that were made for speed.

    Not with a version that they were not compared with, nor with ``PIDPOOL_COPIES=0`` in the environment.
    Then SQLAlchemy's own code runs, which is slower and does the same.
    """
    return __version__.startswith(COPIES_READ_AT) and os.environ.get("PIDPOOL_COPIES") != "0"


# What a finalizer calls has two forms: 2.1 added a parameter in the place of another.
FINALIZER_TAKES_REFERENCE = False
"""Whether `_finalize_fairy` takes the entry's weak reference (SQLAlchemy 2.0)."""


def _broken(name: str, found: str) -> ContractBroken:
    return ContractBroken(
        f"pidpool relies on sqlalchemy's {name}, and SQLAlchemy {__version__} {found}; "
        "install a version of pidpool made for it, or SQLAlchemy 2.1"
    )


def _get(owner: Any, name: str, owner_name: str) -> Any:
    try:
        return inspect.getattr_static(owner, name)
    except AttributeError:
        raise _broken(f"{owner_name}.{name}", "has no such name") from None


def _parameters(owner: Any, name: str, owner_name: str, *parameters: str) -> list[str]:
    """Check that a function has these parameters, in this order; more may follow. Return all."""
    found = _get(owner, name, owner_name)
    function: Callable[..., Any] = getattr(found, "__func__", found)
    try:
        names = [each for each in inspect.signature(function).parameters if each != "self"]
    except (TypeError, ValueError):
        raise _broken(f"{owner_name}.{name}", "has something else under that name") from None
    if names[: len(parameters)] != list(parameters):
        takes = ", ".join(names)
        raise _broken(f"{owner_name}.{name}({', '.join(parameters)})", f"has {name}({takes})")
    return names


def _slots(owner: type, owner_name: str, *names: str) -> None:
    for name in names:
        if not inspect.ismemberdescriptor(_get(owner, name, owner_name)):
            raise _broken(f"{owner_name}.{name}", "has it as something else than a slot")


def _check_base() -> None:
    module = "pool.base"
    for name in ("_ConnectionRecord", "_ConnectionFairy", "_finalize_fairy", "reset_rollback"):
        _get(base, name, module)

    record: Any = base._ConnectionRecord
    _slots(record, "_ConnectionRecord", "fairy_ref", "finalize_callback", "fresh", "starttime")
    _slots(record, "_ConnectionRecord", "dbapi_connection", "_ConnectionRecord__pool")
    _parameters(record, "__init__", "_ConnectionRecord", "pool", "connect")
    _parameters(record, "checkout", "_ConnectionRecord", "cls", "pool")
    _parameters(record, "_ConnectionRecord__connect", "_ConnectionRecord")
    _parameters(record, "_ConnectionRecord__close", "_ConnectionRecord", "terminate")
    _parameters(record, "get_connection", "_ConnectionRecord")
    _parameters(record, "_checkin_failed", "_ConnectionRecord", "err", "_fairy_was_created")
    _parameters(record, "checkin", "_ConnectionRecord", "_fairy_was_created")
    _parameters(record, "close", "_ConnectionRecord")
    _parameters(record, "invalidate", "_ConnectionRecord", "e", "soft")
    for name in ("_soft_invalidate_time", "in_use", "driver_connection", "info", "record_info"):
        _get(record, name, "_ConnectionRecord")

    fairy: Any = base._ConnectionFairy
    _slots(fairy, "_ConnectionFairy", "dbapi_connection", "_connection_record", "_echo", "_pool", "_counter")
    _parameters(
        fairy, "__init__", "_ConnectionFairy", "pool", "dbapi_connection", "connection_record", "echo"
    )
    _parameters(fairy, "_checkout", "_ConnectionFairy", "cls", "pool", "threadconns", "fairy")
    _parameters(fairy, "_checkin", "_ConnectionFairy", "transaction_was_reset")
    _parameters(fairy, "_reset", "_ConnectionFairy", "pool", "transaction_was_reset", "terminate_only")
    _parameters(fairy, "invalidate", "_ConnectionFairy", "e", "soft")
    _parameters(fairy, "close", "_ConnectionFairy")
    _parameters(fairy, "_close_special", "_ConnectionFairy", "transaction_reset")
    for name in ("detach", "is_detached", "info", "driver_connection"):
        _get(fairy, name, "_ConnectionFairy")


def _check_finalizer() -> None:
    global FINALIZER_TAKES_REFERENCE
    known = ("dbapi_connection", "connection_record", "pool")
    names = _parameters(base, "_finalize_fairy", "pool.base", *known)
    if names[3:7] == ["ref", "echo", "transaction_was_reset", "fairy"]:
        FINALIZER_TAKES_REFERENCE = True
    elif names[3:7] == ["echo", "transaction_was_reset", "fairy", "is_gc_cleanup"]:
        FINALIZER_TAKES_REFERENCE = False
        _slots(base._ConnectionFairy, "_ConnectionFairy", "_finalizer")
        _get(base._ConnectionRecord, "needs_gc", "_ConnectionRecord")
    else:
        raise _broken(
            "pool.base._finalize_fairy(..., ref, echo, transaction_was_reset, fairy) or "
            "(..., echo, transaction_was_reset, fairy, is_gc_cleanup)",
            f"has _finalize_fairy({', '.join(names)})",
        )


def _no_connection() -> Any: ...


class _NamedPool(QueuePool):
    _sqla_logger_namespace = "sqlalchemy.pool.pidpool_contract"


def _check_pool() -> None:
    _parameters(Pool, "_create_connection", "Pool")
    _parameters(Pool, "_should_wrap_creator", "Pool", "creator")
    _parameters(Pool, "_close_connection", "Pool", "connection", "terminate")
    _parameters(Pool, "_invalidate", "Pool", "connection", "exception", "_checkin")
    _parameters(Pool, "_return_conn", "Pool", "record")
    _parameters(Pool, "connect", "Pool")
    _parameters(QueuePool, "_do_get", "QueuePool")
    _parameters(QueuePool, "_do_return_conn", "QueuePool", "record")
    _get(QueuePool, "_queue_class", "QueuePool")
    named: Any = _NamedPool(_no_connection)
    if named.logger.name != _NamedPool._sqla_logger_namespace:
        raise _broken("log and the attribute _sqla_logger_namespace of a pool's class", "does not read it")
    pool = QueuePool(_no_connection)
    for name in (
        "_dialect",
        "_reset_on_return",
        "_recycle",
        "_pre_ping",
        "_invalidate_time",
        "_invoke_creator",
    ):
        _has(pool, name, "Pool")
    for name in ("_creator", "_orig_logging_name", "logger", "dispatch", "echo"):
        _has(pool, name, "Pool")
    for name in ("_pool", "_overflow", "_max_overflow", "_timeout"):
        _has(pool, name, "QueuePool")
    for name in ("QueueCommon", "Empty", "Full"):
        _get(queue, name, "util.queue")


def _has(instance: object, name: str, owner_name: str) -> None:
    if not hasattr(instance, name):
        raise _broken(f"{owner_name}.{name}", "has no such name")


def _check_first_connect() -> None:
    # As `create_engine` makes the engine's own listener.
    _parameters(util, "only_once", "util", "fn", "retry_on_exception")
    listener: Any = util.only_once(lambda: None, retry_on_exception=True)
    cells = dict(zip(listener.__code__.co_freevars, listener.__closure__ or (), strict=True))
    for name in ("once", "fn"):
        if name not in cells:
            raise _broken(f"util.only_once and its closure cell {name!r}", f"has the cells {[*cells]}")
    if not isinstance(cells["once"].cell_contents, list):
        raise _broken("util.only_once, whose closure cell 'once' is a list,", "has something else in it")

    _get(attr, "_CompoundListener", "event.attr")
    pool = QueuePool(_no_connection)
    event.listen(pool, "connect", lambda *_: None)
    listeners = pool.dispatch.connect
    for name in ("_exec_once_mutex", "_exec_w_sync_once", "_exec_w_sync_on_first_run"):
        _has(listeners, name, "event.attr._CompoundListener")
    for name in ("parent_listeners", "listeners"):
        _has(listeners, name, "event.attr._ListenerCollection")


def _check_asyncio() -> None:
    for name in ("await_only", "greenlet_spawn"):  # without greenlet they raise if they are called
        _get(util, name, "util")
    adapter: Any = asyncio_connector.AsyncAdapt_dbapi_connection
    _slots(adapter, "connectors.asyncio.AsyncAdapt_dbapi_connection", "_execute_mutex")


_check_base()
_check_finalizer()
_check_pool()
_check_first_connect()
_check_asyncio()
