"""`EventLogger`: which logger a pool's events go to, whether it takes a level, and the writing of a line.

Takes the user's structlog configuration as it is. If structlog is not configured, events go to the stdlib
logger ``pidpool``, whose warnings reach stderr unless logging says otherwise; never to stdout.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import structlog


class _Thread(threading.local):
    writing = False  # an event, in this thread


_thread = _Thread()


class EventLogger:
    """Writes the events of one pool. Any thread may use it; never used inside an at-fork hook.

    :param logger: a structlog logger, one with its methods, or one of the stdlib's, to use instead of
        structlog's own; None for structlog's own.
    """

    def __init__(self, logger: Any) -> None:
        self._logger = _over_stdlib(logger) if isinstance(logger, logging.Logger) else logger
        self._takes_level: Callable[[int], bool] = _always
        # The configuration of structlog under which `_takes_level` was found.
        self._factory: object = None
        self._wrapper: object = None
        self._configured: object = None

    def is_enabled(self, level: int = logging.DEBUG) -> bool:
        """Return whether an event of this level would be logged at present.

        Notices at once that structlog was configured anew, or that a level of the stdlib's changed.
        Takes 0.1 µs; to bind a logger and ask that one takes 3.
        """
        if self._logger is None and not _configuration.is_configured:
            return _stdlib_takes_level(level)
        if (
            _configuration.logger_factory is not self._factory
            or _configuration.default_wrapper_class is not self._wrapper
            or _configuration.is_configured is not self._configured
        ):
            self._look_up()
        try:
            return self._takes_level(level)
        except Exception:
            return True  # `write` then meets the error, and reports it

    def write(self, level: str, event: str, fields: dict[str, object]) -> None:
        """Log an event; an error in the logger costs the event, and no connection.

        Does nothing if this thread is writing one already: then a log handler uses a pool, and to log
        that would make it use the pool again, without an end.
        """
        if _thread.writing:
            return
        _thread.writing = True
        try:
            getattr(self._bound_logger(), level)(event, **fields)
        except Exception:
            _complain(event)
        finally:
            _thread.writing = False

    @property
    def is_writing(self) -> bool:
        """Whether this thread is in the middle of writing an event, of any pool."""
        return _thread.writing

    def _look_up(self) -> None:
        factory, wrapper = _configuration.logger_factory, _configuration.default_wrapper_class
        configured = _configuration.is_configured
        try:
            self._takes_level = _level_check(self._bound_logger())
        except Exception:
            self._takes_level = _always  # `write` reports it
        self._factory, self._wrapper, self._configured = factory, wrapper, configured

    def _bound_logger(self) -> Any:
        logger = self._logger
        if logger is not None:
            bound = logger.bind() if hasattr(logger, "bind") else logger
            return bound.sync_bl if isinstance(bound, structlog.stdlib.AsyncBoundLogger) else bound
        if not _configuration.is_configured:
            return _stdlib_logger.bind()
        wrapper = _configuration.default_wrapper_class
        if wrapper is structlog.stdlib.AsyncBoundLogger:
            # Its methods are coroutines, which a pool can't await.
            wrapper = structlog.stdlib.BoundLogger
        return structlog.wrap_logger(None, wrapper_class=wrapper, logger_factory_args=("pidpool",)).bind()


def _complain(event: str) -> None:
    # A full disk under a log must not cost a connection; this is logging's own rule.
    if logging.raiseExceptions and sys.stderr is not None:
        try:
            sys.stderr.write(f"pidpool: the event {event} could not be logged:\n")
            traceback.print_exc(file=sys.stderr)
        except (OSError, ValueError):
            pass  # stderr is closed too


def _over_stdlib(logger: logging.Logger) -> Any:
    """Return a structlog logger that takes nothing from structlog's configuration."""
    return structlog.wrap_logger(
        logger,
        wrapper_class=structlog.stdlib.BoundLogger,
        context_class=dict,
        cache_logger_on_first_use=False,
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            structlog.processors.KeyValueRenderer(key_order=["event", "pool", "pid"]),
        ],
    )


_stdlib_logger = _over_stdlib(logging.getLogger("pidpool"))
_stdlib_takes_level = logging.getLogger("pidpool").isEnabledFor


def _always(level: int) -> bool:
    return True


def _level_check(bound: Any) -> Callable[[int], bool]:
    """Return the function by which a logger says whether it takes a level."""
    names = ("is_enabled_for", "isEnabledFor")  # structlog's own since 25.1; the stdlib's
    # Looked up in the class: any attribute of a `structlog.BoundLogger` is a method that logs.
    check = next((getattr(bound, name) for name in names if hasattr(type(bound), name)), None)
    inner = getattr(bound, "_logger", None)
    if isinstance(inner, logging.Logger) and (
        # Asked without the detour, and also if structlog's own level would let everything pass.
        check is None or isinstance(bound, structlog.stdlib.BoundLogger) or check(logging.DEBUG)
    ):
        check = inner.isEnabledFor
    return check or _always


class _AskedConfiguration:
    """structlog's configuration by its public functions, which take twice the time."""

    is_configured = property(lambda self: structlog.is_configured())
    default_wrapper_class = property(lambda self: structlog.get_config()["wrapper_class"])
    logger_factory = property(lambda self: structlog.get_config()["logger_factory"])


_configuration: Any = getattr(structlog._config, "_CONFIG", None) or _AskedConfiguration()
