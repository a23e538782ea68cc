"""An application that nobody here wrote: in a virtual environment of its own, over a database of its own.

`make test-applications` makes the environments. That an application uses PidPool, and how often it forked,
is read in the memory of the family that its database URL names.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pages
import pytest
from following import Adapted, follow, shell, write_files
from sessions import kill_session
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.pool import NullPool

from pidpool import PidPool
from pidpool.stats.snapshots import FamilyStats
from pidpool.tools.demo.postgres import EmbeddedPostgres

ROOT = Path(__file__).parents[2]

_numbers = itertools.count()


class Application:
    """An application, and its database.

    :param pool: what the application's database URL names: ``pidpool``, ``queue`` for SQLAlchemy's own, or
        ``page`` if the URL is one of a page, which names it by itself.
    """

    def __init__(self, name: str, pool: str, postgres: EmbeddedPostgres, directory: Path) -> None:
        self.name = name
        self.pool = pool
        self.postgres = postgres
        self.directory = directory
        self.log = directory / "log"
        self.bin = ROOT / f".venv-{name}" / "bin"
        assert self.bin.exists(), f"{self.bin} is missing: make test-applications makes it"
        database = f"{name}_{pool}_{next(_numbers)}"
        with create_engine(
            postgres.url(), poolclass=NullPool, isolation_level="AUTOCOMMIT"
        ).connect() as admin:
            admin.execute(text(f"create database {database}"))
        self.mark = postgres.log_mark()
        self.address = make_url(postgres.url(tls=True)).set(database=database)
        self.families = directory / "families"
        self.families.mkdir(mode=0o700)
        self.adapt = Adapted(self.url)
        self.environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(directory),
            "PIDPOOL_FAMILY_DIR": str(self.families),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def url(self, driver: str = "postgresql+psycopg2") -> str:
        """Return the URL that the application is given: all that it knows of PidPool."""
        address = self.address.set(drivername=driver)
        if driver.endswith("asyncpg"):
            address = address.set(query={"ssl": "require"})
        if self.pool == "pidpool":
            address = address.update_query_dict({"plugin": "pidpool", "family": self.name})
        return address.render_as_string(hide_password=False)

    @contextlib.contextmanager
    def running(self, *command: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a program of the application's until the body is over."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [str(self.bin / command[0]), *command[1:]],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**self.environment, **environment},
            )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)  # its own group, since start_new_session
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            kill_session(process)

    def run(self, *command: str, seconds: float = 300.0, **environment: str) -> None:
        with self.running(*command, **environment) as process:
            assert process.wait(seconds) == 0, self.log.read_text()[-5000:]

    def write_files_of(self, page: Path, under: str | None = None) -> None:
        write_files(pages.files(page, under), self.adapt, self.directory)

    @contextlib.contextmanager
    def followed(self, steps: list[pages.Step], bound: float) -> Iterator[None]:
        """Run a page's transcript; what it has started goes on until the body is over."""
        with shell(self.directory, self.environment) as bash:
            follow(bash, steps, self.adapt, self.directory, bound)
            yield

    def ask(self, statement: str) -> Any:
        """Return the single value of a statement in the application's database."""
        with create_engine(self.address, poolclass=NullPool).connect() as connection:
            return connection.scalar(text(statement))

    @contextlib.contextmanager
    def watched(self) -> Iterator[Callable[[], FamilyStats]]:
        """Be a member of the family, so that it does not end before it is read; gives what reads it."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PIDPOOL_FAMILY_DIR", str(self.families))
            engine = create_engine(self.address, poolclass=PidPool, family=self.name)
        engine.connect().close()
        try:
            assert isinstance(engine.pool, PidPool)
            yield engine.pool.family_stats
        finally:
            engine.dispose()

    def complaints(self) -> list[str]:
        """Return the complaints in the server's log. An application's processes break off their connections
        when it is ended: read it before."""
        return self.postgres.complaints(self.mark)
