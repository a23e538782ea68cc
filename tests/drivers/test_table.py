"""The documentation's table of drivers says what the code does, and which of them are tested."""

from __future__ import annotations

import inspect
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import MakeEngine
from events import Events

from pidpool import drivers
from pidpool.drivers import Driver
from pidpool.drivers.sqlite import AioSQLite, SQLite

PAGE = (Path(__file__).parent.parent.parent / "docs" / "drivers.md").read_text()


def rows() -> Iterator[list[str]]:
    for row in PAGE[PAGE.index("| driver | sockets") :].splitlines()[2:]:
        if not row.startswith("|"):
            return
        yield [cell.strip() for cell in row.strip("|").split(" | ")]


ROWS = {row[0].split("`")[1]: row[1:] for row in rows()}
CLASSES = {**drivers._UNDER_ADAPTER, **drivers._KNOWN}


def test_every_driver_has_a_row() -> None:
    assert ROWS.keys() == CLASSES.keys()


@pytest.mark.parametrize("name", ROWS)
def test_a_row_says_what_the_code_does(name: str) -> None:
    sockets, read_from, settings, tested_on = ROWS[name]
    driver = type(CLASSES[name])
    is_sqlite = issubclass(driver, SQLite)
    assert sockets == ("pinned" if is_sqlite else "severed")
    assert settings == ("not known" if driver.settings is Driver.settings else "carried over")
    servers = {"pidpool.drivers.mysql": "MariaDB", "pidpool.drivers.sqlite": "SQLite"}
    assert tested_on.split()[0] == servers.get(driver.__module__, "PostgreSQL")
    if driver.in_transaction is Driver.in_transaction:
        assert read_from == "not known"
        return
    source = inspect.getsource(driver.in_transaction)
    if driver is AioSQLite:
        source += inspect.getsource(SQLite.in_transaction)
    (read,) = re.findall(r"`(\w+)`", read_from)
    assert re.search(rf"\.{read}\b", source), source
    assert ("not known after rows" in read_from) == ("_result" in source)


class Other(sqlite3.Connection):
    """The connection of a driver that pidpool does not know."""


class Unrelated:
    """Not derived from any known driver's connection."""

    def __init__(self) -> None:
        self.connection = sqlite3.connect(":memory:")

    def __getattr__(self, name: str) -> object:
        return getattr(self.connection, name)


def test_an_unknown_driver_is_logged_once(make_engine: MakeEngine) -> None:
    events = Events()
    engine = make_engine("sqlite://", creator=Unrelated, logger=events.logger)
    with engine.connect(), engine.connect():
        pass
    engine.dispose()
    with engine.connect():
        pass
    assert len(events.of("connection.opened")) == 3
    event = events.the("driver.unknown")
    assert (event["driver"], event["has_descriptor"]) == (Unrelated.__module__.partition(".")[0], False)


def test_a_subclass_of_a_known_drivers_connection_is_known(make_engine: MakeEngine) -> None:
    events = Events()
    engine = make_engine("sqlite://", creator=lambda: Other(":memory:"), logger=events.logger)
    with engine.connect():
        pass
    assert events.of("driver.unknown") == []
