"""Many forks in a row, 500 of each kind (20,000 in `make soak`): nothing of them stays in the parent.

With 100 open connections there are 500 forks (10,000 in `make soak`).
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from engines import MakeEngine
from forking import How, fork
from parent import Parent
from soak import SOAK
from sqlalchemy import text

from pidpool import PidPool
from pidpool.forks import ownership

FORKS = 20_000 if SOAK else 500
FORKS_OF_MANY = 10_000 if SOAK else 500
A_CHILD_USES = 50  # one child in so many opens a connection of its own
GROWTH = 64 * 1024  # bytes in all, for what Python's own caches take; one object a fork would be more


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def fork_and_wait(how: How, child: Any) -> None:
    pid = fork(how)
    if pid == 0:
        code = 1
        try:
            child()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.soak
@pytest.mark.usefixtures("table", "clean_log")
@pytest.mark.parametrize("how", ["python", "c"])
def test_nothing_of_many_forks_stays_in_the_parent(tls_url: str, make_engine: MakeEngine, how: How) -> None:
    engine = make_engine(tls_url)
    parent = Parent(engine, "in transaction")
    others = [engine.connect() for _ in range(2)]
    engine.connect().close()
    pool = engine.pool
    assert isinstance(pool, PidPool)

    def use() -> None:
        for connection in others:
            connection.rollback()
        with engine.connect() as own:
            assert own.scalar(text("select 1")) == 1
        for connection in others:
            connection.close()
        engine.dispose()

    def settle() -> None:
        # The parent's own next use, which logs the forks.
        pool.status()
        gc.collect()

    for _ in range(20):  # caches fill
        fork_and_wait(how, use if how == "python" else lambda: None)
    settle()
    before = (descriptors(), len(ownership.owned_connections), len(pool.records()))
    rss = resident()
    tracemalloc.start()
    try:
        settle()
        traced = tracemalloc.get_traced_memory()[0]
        for number in range(FORKS):
            fork_and_wait(how, use if number % A_CHILD_USES == 0 else pool.status)
            if number % 100 == 99:
                settle()
        settle()
        grown = tracemalloc.get_traced_memory()[0] - traced
    finally:
        tracemalloc.stop()
    assert (descriptors(), len(ownership.owned_connections), len(pool.records())) == before
    assert grown < GROWTH
    # 2 MB for what the allocator rounds up, whatever the number of forks.
    assert resident() - rss < 2 * 1024 * 1024
    for connection in others:
        connection.close()
    parent.notices_nothing()


@pytest.mark.soak
@pytest.mark.timeout(1800 if SOAK else 300)
def test_forks_with_many_connections_stay_as_cheap_as_they_were() -> None:
    """In a program of its own, without other threads: as the parent of most workers."""
    program = Path(__file__).parent.parent / "programs" / "many_forks.py"
    command = [sys.executable, str(program), str(FORKS_OF_MANY)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=1790 if SOAK else 280, check=False)
    assert ran.returncode == 0, ran.stderr
    measured = json.loads(ran.stdout)
    # The first tenth fills caches.
    pages, resident_then = measured["pages"][1:], measured["resident"][1:]
    assert max(pages) <= 1.2 * min(pages), measured
    assert len(set(measured["descriptors"])) == 1, measured
    assert resident_then[-1] - resident_then[0] < 2 * 1024 * 1024, measured
    if SOAK:  # the time of many, since a busy machine takes its share of few
        seconds = measured["seconds"]
        assert statistics.median(seconds[-3:]) <= 1.5 * statistics.median(seconds[1:4]), measured
