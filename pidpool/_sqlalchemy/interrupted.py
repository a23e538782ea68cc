"""What is left of an operation that an exception has interrupted: a signal handler's, a killed greenlet's."""

from __future__ import annotations

_MODULES = (
    *("pidpool.", "sqlalchemy.pool.", "sqlalchemy.event.", "sqlalchemy.util.", "weakref.", "contextlib."),
    *("sqlalchemy.log.", "logging."),  # with ``echo="debug"`` lines name the connection
    *("sqlalchemy.engine.create.", "sqlalchemy.engine.default."),  # they open connections for an entry
)


def let_go_of_frames(error: BaseException) -> None:
    """Have an exception's traceback keep no connection, however long the application keeps the exception.

    Clears the local variables of the frames that are the pool's own. Others are left as they are.
    """
    seen: set[int] = set()
    now: BaseException | None = error
    while now is not None and id(now) not in seen:
        seen.add(id(now))
        traceback = now.__traceback__
        while traceback is not None:
            if f"{traceback.tb_frame.f_globals.get('__name__')}.".startswith(_MODULES):
                try:
                    traceback.tb_frame.clear()
                except RuntimeError:
                    pass  # it still runs
            traceback = traceback.tb_next
        now = now.__context__
