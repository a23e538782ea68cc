"""PidPool for an application whose code is not to be changed: ``?plugin=pidpool`` in its database URL."""

from __future__ import annotations

import logging
from typing import Any

from sqlalchemy.engine import URL, CreateEnginePlugin
from sqlalchemy.pool import QueuePool

from pidpool.aio import AsyncPidPool
from pidpool.options.in_url import IN_URL
from pidpool.pool import PidPool

_log = logging.getLogger("pidpool")


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
        given = {option: url.query[option] for option in IN_URL if option in url.query}
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
            keyword, convert = IN_URL[option]
            if not isinstance(text, str):
                raise ValueError(f"{option} is in the URL {len(text)} times; give it once")
            try:
                kwargs[keyword] = convert(text)
            except ValueError as error:
                raise ValueError(f"{option}={text!r} in the URL: {error}") from None

    def update_url(self, url: URL) -> URL:
        """Return the URL without what is not the driver's."""
        return url.difference_update_query(IN_URL)
