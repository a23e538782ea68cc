"""What all tests share: one real PostgreSQL with TLS for each process that runs tests, engines on it, and a
check that its log stays clean."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from browser import install_axe
from engines import MakeEngine
from sqlalchemy import Engine, create_engine, text

from pidpool import PidPool
from pidpool.tools.demo.postgres import EmbeddedPostgres


def pytest_collection_finish() -> None:
    # Otherwise each collection looks at all that was imported, and in a forked child copies its pages.
    gc.freeze()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As in a job that a script starts with "&". The programs that tests start would inherit it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "PYTEST_XDIST_WORKER" in os.environ:
        _hide_xdists_thread()


def _hide_xdists_thread() -> None:
    """Have a fork count as that of the only thread, as without xdist, whose thread reads from a pipe."""
    frames, pid = sys._current_frames, os.getpid()
    hidden = frames().keys() - {threading.get_ident()}

    def without_xdists() -> dict[int, None]:
        # Without the frames: one of them is this function's own, and would be in a cycle with its variable.
        # In a forked child another thread may have the number of xdist's.
        return dict.fromkeys(frames().keys() - (hidden if os.getpid() == pid else set()))

    sys._current_frames = without_xdists


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres() as server:
        yield server


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return install_axe(tmp_path_factory.mktemp("axe"))


@pytest.fixture(params=["tls", "plain"])
def url(request: pytest.FixtureRequest, postgres: EmbeddedPostgres) -> str:
    return postgres.url(tls=request.param == "tls")


@pytest.fixture
def tls_url(postgres: EmbeddedPostgres) -> str:
    return postgres.url(tls=True)


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    engines = []

    def make(url: str, **options: Any) -> Engine:
        engine = create_engine(url, **{"poolclass": PidPool, **options})
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.dispose()


@pytest.fixture
def table(postgres: EmbeddedPostgres) -> Iterator[str]:
    """An empty table `kept (v text)`, dropped afterwards."""
    engine = create_engine(postgres.url(tls=False))
    with engine.begin() as connection:
        connection.execute(text("set local lock_timeout = '10s'"))
        connection.execute(text("drop table if exists kept"))
        connection.execute(text("create table kept (v text)"))
    yield "kept"
    with engine.begin() as connection:
        connection.execute(text("set local lock_timeout = '10s'"))
        connection.execute(text("drop table kept"))
    engine.dispose()


@pytest.fixture
def clean_log(postgres: EmbeddedPostgres) -> Iterator[None]:
    """Fails the test if the server had to complain of a client meanwhile."""
    mark = postgres.log_mark()
    yield
    assert postgres.complaints(mark) == []
