"""PidPool for an application whose code is not to be changed: ``?plugin=pidpool`` in its database URL."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sqlalchemy.engine import URL, CreateEnginePlugin
from sqlalchemy.pool import QueuePool

from pidpool.aio import AsyncPidPool
from pidpool.pool import PidPool

_log = logging.getLogger("pidpool")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("takes a number") from None


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("takes a whole number") from None


_WORDS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


def _flag(text: str) -> bool:
    try:
        return _WORDS[text.lower()]
    except KeyError:
        raise ValueError("takes true or false") from None


_OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "on_foreign": ("on_foreign", str),
    "inherited_sockets": ("inherited_sockets", str),
    "hold_warning": ("hold_warning", _number),
    "family": ("family", str),
    "family_limit": ("family_limit", _whole),
    "max_idle": ("max_idle", _number),
    "recycle_jitter": ("recycle_jitter", _number),
    "pool_size": ("pool_size", _whole),
    "max_overflow": ("max_overflow", _whole),
    "pool_timeout": ("pool_timeout", _number),
    "pool_recycle": ("pool_recycle", _whole),
    "pool_pre_ping": ("pool_pre_ping", _flag),
    "pool_use_lifo": ("pool_use_lifo", _flag),
    "pool_name": ("pool_logging_name", str),
}
"""Of each option in a URL: the keyword of `create_engine`, and what makes its value of the text."""


class PidPoolPlugin(CreateEnginePlugin):
    """Sets ``poolclass`` to `PidPool`, or `AsyncPidPool` for an async engine.

    PidPool's own options and the pool's usual ones may stand in the URL too, where they take precedence over
    the keywords of `create_engine`: ``?plugin=pidpool&on_foreign=refuse&pool_size=3``. ``pool_name`` is
    `create_engine`'s ``pool_logging_name``. An engine that has or asks for a pool that is not a QueuePool
    (NullPool, SQLite in memory) keeps it; the log says so.

    :raises ValueError: if an option has a value that it does not take.
    """

    def __init__(self, url: URL, kwargs: dict[str, Any]) -> None:
        super().__init__(url, kwargs)
        given = {option: url.query[option] for option in _OPTIONS if option in url.query}
        dialect: Any = url.get_dialect(bool(kwargs.get("_is_async")))
        wanted = kwargs.get("poolclass") or dialect.get_pool_class(url)
        if "pool" in kwargs or not issubclass(wanted, QueuePool):
            has = "a pool of its own" if "pool" in kwargs else wanted.__name__
            without = f", and ignores {', '.join(given)} in the URL" if given else ""
            remedy = "for PidPool leave out pool= and poolclass=, and use no SQLite in memory"
            _log.info("plugin=pidpool changes nothing: the engine asks for %s%s; %s", has, without, remedy)
            return
        if not issubclass(wanted, PidPool):
            kwargs["poolclass"] = AsyncPidPool if dialect.is_async else PidPool
        for option, text in given.items():
            keyword, convert = _OPTIONS[option]
            if not isinstance(text, str):
                raise ValueError(f"{option} is in the URL {len(text)} times; give it once")
            try:
                kwargs[keyword] = convert(text)
            except ValueError as error:
                raise ValueError(f"{option}={text!r} in the URL: {error}") from None

    def update_url(self, url: URL) -> URL:
        """Return the URL without what is not the driver's."""
        return url.difference_update_query(_OPTIONS)
