"""The servers of the drivers' tests."""

from __future__ import annotations

from collections.abc import Iterator

import mariadb_server
import pytest


@pytest.fixture(scope="session")
def mariadb() -> Iterator[mariadb_server.MariaDB]:
    with mariadb_server.mariadb() as server:
        yield server
