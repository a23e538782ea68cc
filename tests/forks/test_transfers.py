"""Many forks, from several threads, while others commit transfers over TLS: nothing is lost, doubled or hung.
20,000 forks in `make soak`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from soak import SOAK
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from pidpool.tools.demo.postgres import EmbeddedPostgres

FORKS = 20_000 if SOAK else 100
BOUND = 7200 if SOAK else 280


@pytest.fixture
def database(postgres: EmbeddedPostgres) -> Iterator[str]:
    """The URL of a server over TLS; what the program has made there is dropped afterwards."""
    yield postgres.url(tls=True)
    with create_engine(postgres.url(tls=False), poolclass=NullPool).begin() as connection:
        connection.execute(text("drop table if exists accounts, transfers"))


@pytest.mark.soak
@pytest.mark.usefixtures("clean_log")
@pytest.mark.timeout(BOUND + 10)
def test_many_forks_while_threads_commit_transfers(database: str) -> None:
    program = Path(__file__).parent.parent / "programs" / "transfers.py"
    ran = subprocess.run(
        [sys.executable, str(program), str(FORKS)],
        env={**os.environ, "DB_URL": database},
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["errors"] == found["hung"] == [], ran.stderr
    assert found["the held transaction is as before"], found
    assert found["balance"] == found["expected balance"], found
    assert found["not there"] == found["not reported"] == [], found
    assert found["twice"] == 0, found
    assert found["descriptors"] == [], found
    assert found["entries"] <= 5, found
    assert found["transfers"] > 0, found
    # 8 MB for the allocator and for the numbers of the transfers, whatever the number of forks.
    assert found["grown"] < 8 * 1024 * 1024 + 200 * found["transfers"], found
