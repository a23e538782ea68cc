"""The address of the database that a pool connects to, for the pool's name: as `create_engine` passes it to
the driver. SQLAlchemy gives a pool neither the engine nor its URL, only the function that connects.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

# Under one of these names each driver takes it.
_HOST = ("host", "hostaddr", "server", "unix_socket")
_PORT = ("port",)
_DATABASE = ("dbname", "database", "db")

_UNSAFE = re.compile(r"[=@\s]|://")
"""In a whole DSN under the name of a part of one, which may have a password; the name is in every event."""


def address_of(creator: Any) -> str | None:
    """Return ``host:port/database``, without the parts that the URL leaves to the driver.

    :param creator: the pool's.
    :return: None if it was not made by `create_engine`, or nothing of the address is known.
    """
    if getattr(creator, "__module__", None) != "sqlalchemy.engine.create":
        return None  # the application's own
    passed = inspect.getclosurevars(creator).nonlocals
    # The arguments' name is cargs up to SQLAlchemy 2.0.47.
    keywords, arguments = passed.get("cparams"), passed.get("cargs_tup", passed.get("cargs"))
    if not isinstance(keywords, Mapping) or not isinstance(arguments, list | tuple):
        return None  # another version of SQLAlchemy, whose pools then have numbers
    if getattr(passed.get("dialect"), "name", None) == "sqlite":
        return str(arguments[0]).partition("?")[0] if arguments else None
    host, port, database = (_first(keywords, names) for names in (_HOST, _PORT, _DATABASE))
    if host is not None and ":" in host and not host.startswith("/"):
        host = f"[{host}]"
    address = host or ""
    if port is not None:
        address += f":{port}"
    if database is not None:
        address += f"/{database}" if address else database
    return address or None


def _first(keywords: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    found = next((keywords[name] for name in names if keywords.get(name)), None)
    text = str(found) if isinstance(found, str | int) else ""
    return text if text and not _UNSAFE.search(text) else None
