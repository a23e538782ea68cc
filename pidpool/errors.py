"""The one error that pidpool adds: a connection was used by a process that does not own it.

`ForeignConnectionError` is the name to catch; the classes actually raised are leaves of it that are
also SQLAlchemy's or the driver's own, so that `except` blocks written before pidpool go on working.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from sqlalchemy import exc

_Rebuild: TypeAlias = "tuple[Any, tuple[Any, ...]]"


class ForeignConnectionError(Exception):
    """A process used, or asked a pool for, a connection that belongs to another process.

    Raised in two forms, both caught by this name:

    * by a checkout under ``on_foreign="refuse"``: also a `sqlalchemy.exc.InvalidRequestError`;
    * by the use of an inherited connection: also the driver's own ``OperationalError``. SQLAlchemy
      wraps it, so that an application sees `sqlalchemy.exc.OperationalError` with
      ``connection_invalidated=True`` and this error as its ``.orig``.

    Nothing has been sent to the server when it is raised. It can be pickled (a worker of
    ``multiprocessing.Pool`` may hand it to its parent).

    :param message: the fact, its numbers and the remedy.
    :param connection_id: `ConnectionTag.connection_id`, or None if several connections are meant.
    :param owner_pid: the process that opened the connection.
    :param pid: the process that wanted to use it.
    :param state: what the connection was doing at the fork: ``"idle"``, ``"no transaction"``,
        ``"in transaction"`` or ``"unknown"``.
    """

    def __init__(
        self,
        message: str,
        *,
        connection_id: str | None = None,
        owner_pid: int = 0,
        pid: int = 0,
        state: str = "unknown",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.connection_id = connection_id
        self.owner_pid = owner_pid
        self.pid = pid
        self.state = state

    def __str__(self) -> str:
        return self.message

    def _fields(self) -> dict[str, Any]:
        return {
            "connection_id": self.connection_id,
            "owner_pid": self.owner_pid,
            "pid": self.pid,
            "state": self.state,
        }

    def __reduce__(self) -> _Rebuild:
        return _rebuild, (type(self), self.message, self._fields())


class ForeignCheckoutError(ForeignConnectionError, exc.InvalidRequestError):
    """A checkout refused because the pool's idle connections belong to another process."""


def _rebuild(
    error_class: type[ForeignConnectionError], message: str, fields: dict[str, Any]
) -> ForeignConnectionError:
    return error_class(message, **fields)


def _rebuild_for_driver(
    operational_error: type[Exception], message: str, fields: dict[str, Any]
) -> ForeignConnectionError:
    return foreign_error_for(operational_error)(message, **fields)


_for_driver: dict[type[Exception], type[ForeignConnectionError]] = {}


def foreign_error_for(operational_error: type[Exception]) -> type[ForeignConnectionError]:
    """Return the `ForeignConnectionError` that is also the given driver's ``OperationalError``.

    It must not be a `SQLAlchemyError` as well: SQLAlchemy wraps those as a plain StatementError
    and does not look for a disconnect (``DBAPIError.instance``).
    """

    if operational_error in _for_driver:
        return _for_driver[operational_error]

    def __reduce__(self: ForeignConnectionError) -> _Rebuild:
        # By the driver's class, since this one can't be found by its name.
        return _rebuild_for_driver, (operational_error, self.message, self._fields())

    members = {"__module__": __name__, "__doc__": ForeignConnectionError.__doc__, "__reduce__": __reduce__}
    leaf = type("ForeignConnectionError", (ForeignConnectionError, operational_error), members)
    return _for_driver.setdefault(operational_error, leaf)
