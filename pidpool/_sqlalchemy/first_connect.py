"""A pool's first-connect events, made fit for a forked child."""

from __future__ import annotations

from contextlib import suppress
from itertools import chain
from typing import Any

from sqlalchemy.engine import create as engine_create
from sqlalchemy.event import attr

from pidpool._sqlalchemy import contract  # noqa: F401  checks what is relied on here


def renew_first_connect(dispatch: Any) -> None:
    """Give a pool's first-connect events a mutex of this process's own, and their first run back.

    Another thread may have been in the middle of them at the fork: it holds the mutex, and has taken the
    engine's once-only initialisation of the dialect off its list. That thread does not exist here, so this
    process's first connect has to do it.
    """
    for name in ("connect", "first_connect"):
        listeners = getattr(dispatch, name)
        if not isinstance(listeners, attr._CompoundListener):
            continue  # nothing has listened or connected yet: there is no mutex
        _forget_mutex(listeners)
        if listeners._exec_w_sync_once:
            continue
        for listener in chain(listeners.parent_listeners, listeners.listeners):
            _give_first_run_back(listener)


def _forget_mutex(listeners: Any) -> None:
    """The next use makes another one."""
    if hasattr(listeners, "_get_exec_once_mutex"):
        listeners._exec_once_mutex = None
    else:  # before SQLAlchemy 2.0.44: an attribute that is made when it is not there
        with suppress(AttributeError):
            del listeners._exec_once_mutex


def _give_first_run_back(listener: Any) -> None:
    # util.only_once(): the cell `once` is the list that the function in the cell `fn` is popped from.
    names = getattr(getattr(listener, "__code__", None), "co_freevars", ())
    if "once" not in names or "fn" not in names:
        return  # a listener of another kind
    once = listener.__closure__[names.index("once")].cell_contents
    function = listener.__closure__[names.index("fn")].cell_contents
    if once == [] and function.__module__ == engine_create.__name__:
        once.append(function)
