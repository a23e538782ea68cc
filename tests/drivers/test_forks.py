"""Each driver of PostgreSQL and SQLite over forks in Python and in C, with whole programs: connections opened
before the fork, one of them in a transaction, and children that drop, use and close them, and exit.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from driver_forks import UNHARMED, is_harmed, run

from pidpool.tools.demo.postgres import EmbeddedPostgres

POSTGRESQL = ["psycopg2", "psycopg", "psycopg_async", "asyncpg", "pg8000"]
SQLITE = ["sqlite", "sqlite+aiosqlite"]


def url(postgres: EmbeddedPostgres, driver: str) -> str:
    return f"postgresql+{driver}://pidpool@127.0.0.1:{postgres.port}/postgres"


@pytest.mark.usefixtures("clean_log")
@pytest.mark.parametrize("driver", POSTGRESQL)
def test_a_parent_never_notices(postgres: EmbeddedPostgres, driver: str) -> None:
    assert run(url(postgres, driver), "pidpool", postgres.ca_file) == UNHARMED


@pytest.mark.parametrize("driver", POSTGRESQL)
def test_a_parent_is_harmed_with_queuepool(postgres: EmbeddedPostgres, driver: str) -> None:
    assert is_harmed(run(url(postgres, driver), "queue"))


@pytest.mark.parametrize("driver", SQLITE)
def test_a_parent_with_a_file_never_notices(tmp_path: Path, driver: str) -> None:
    assert run(f"{driver}:///{tmp_path}/a.db", "pidpool") == UNHARMED


@pytest.mark.parametrize("driver", SQLITE)
def test_a_parent_with_a_file_is_harmed_with_queuepool(tmp_path: Path, driver: str) -> None:
    assert is_harmed(run(f"{driver}:///{tmp_path}/a.db", "queue"))
