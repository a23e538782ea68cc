"""A process with one pool and some open connections that forks on request, for the questions about forks.

Each contender is a process of its own, since pidpool's hooks, once imported, run at every fork of a
process. `Forker` is the measuring process's side; run as a program, the module is the process that forks.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

# Not used here, but by every contender: what they cost a fork, they cost all of them alike.
import psycopg2  # noqa: F401
import structlog  # noqa: F401
from sqlalchemy import create_engine, text
from sqlalchemy.pool import QueuePool

from bench import fake_driver
from bench.harness import settle

QUEUE = "queue"
NONE = "none"
"""pidpool is imported, and there is no pool."""
PID = "pid"

FILES = 1200
"""How many files the largest of them has open, at the least."""


@dataclass(frozen=True)
class Forked:
    """What one fork took, in seconds."""

    parent: float
    """`os.fork()` in the parent, by the clock."""
    parent_cpu: float
    """The same in CPU time."""
    parent_faults: int
    """Memory pages that the parent touched for the first time since the fork, before `os.fork()` returned."""
    child_cpu: float = 0.0
    """CPU time of the child until it returned from `os.fork()`, at-fork hooks included."""
    child_faults: int = 0
    """Memory pages that the child touched for the first time until then."""
    use_cpu: float = 0.0
    """CPU time of what it did then."""
    use_faults: int = 0
    """Memory pages that it touched for the first time then."""
    child: float = 0.0
    """From before the fork until the child was done, by the clock."""


class Forker:
    """The process that forks. Starting it takes a moment: first `wait_until_ready`.

    :param pool: `QUEUE`, `PID` or `NONE`.
    :param connections: how many connections of it are open and idle.
    :param url: of the database; empty for the fake driver, with a socket for each connection.
    """

    def __init__(self, pool: str, connections: int = 0, url: str = "") -> None:
        self.connections = connections
        command = [sys.executable, "-m", "bench.forker", pool, str(connections), url]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def wait_until_ready(self) -> None:
        self._answer()

    def fork(self, use: str) -> Forked:
        """Fork once.

        :param use: ``"look"``: the child asks its pool for its status, which is the first use of it;
            ``"row"``: it gets itself a connection and a row; ``"end"``: it ends at once, so that what is
            measured is the parent's alone.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(use + "\n")
        self._process.stdin.flush()
        return Forked(**self._answer())

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that forks ended with status {self._process.wait()}")
        answer: dict[str, float] = json.loads(line)
        return answer

    def close(self) -> None:
        self._process.communicate()  # closes its input, which ends it


@contextmanager
def forkers(specifications: Mapping[str, tuple[str, int]], url: str = "") -> Iterator[dict[str, Forker]]:
    """Start a process for each name; its pool and number of connections are given."""
    with ExitStack() as stack:
        made = {}
        for name, (pool, connections) in specifications.items():
            made[name] = Forker(pool, connections, url)
            stack.callback(made[name].close)
        for process in made.values():
            process.wait_until_ready()
        yield made


def alternate_forks(made: Mapping[str, Forker], use: str, rounds: int) -> dict[str, list[Forked]]:
    """Let them fork in turns, each round in another order: one that is its own predecessor is faster."""
    results: dict[str, list[Forked]] = {name: [] for name in made}
    names, orders = list(made), random.Random(rounds)
    for _ in range(rounds):
        orders.shuffle(names)
        for name in names:
            results[name].append(made[name].fork(use))
    return results


def _main(name: str, connections: int, url: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, FILES), hard), hard))
    poolclass: Any = QueuePool
    if name != QUEUE:
        from pidpool import PidPool

        poolclass = PidPool
    options = {"pool_size": max(connections, 5), "max_overflow": 0}
    engine: Any = create_engine(url, poolclass=poolclass, **options) if url else None
    pool: Any = engine.pool if url else None
    if not url and name != NONE:
        pool = poolclass(fake_driver.SocketConnection, **options)
    held = [pool.connect() for _ in range(connections)]
    while held:
        held.pop().close()
    select = text("select 1")

    def row() -> None:
        if name == QUEUE:
            engine.dispose(close=False)
        with engine.connect() as connection:
            connection.scalar(select)

    def look() -> None:
        if pool is not None:
            pool.status()

    uses: dict[str, Callable[[], None] | None] = {"row": row, "look": look, "end": None}
    settle()
    _tell({})
    for line in sys.stdin:
        _tell(_fork(uses[line.strip()]))


def _tell(answer: dict[str, float]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _fork(use: Callable[[], None] | None) -> dict[str, float]:
    reader, writer = os.pipe()
    faults = _faults()
    started_cpu, started = time.thread_time(), time.perf_counter()
    pid = os.fork()
    if pid == 0:
        try:
            # A process's clock of CPU time begins with it, and so does its count of faults.
            child_cpu, child_faults = time.process_time(), _faults()
            if use is None:
                os._exit(0)
            use()
            use_cpu, child = time.process_time() - child_cpu, time.perf_counter() - started
            answer = {
                "child_cpu": child_cpu,
                "child_faults": child_faults,
                "use_cpu": use_cpu,
                "use_faults": _faults() - child_faults,
                "child": child,
            }
            os.write(writer, json.dumps(answer).encode())
            os._exit(0)
        finally:
            os._exit(1)
    parent_cpu, parent = time.thread_time() - started_cpu, time.perf_counter() - started
    parent_faults = _faults() - faults
    os.close(writer)
    with open(reader, "rb") as answers:
        text_of_it = answers.read()
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError(f"a child ended with wait status {status}")
    of_parent = {"parent": parent, "parent_cpu": parent_cpu, "parent_faults": parent_faults}
    return {**(json.loads(text_of_it) if text_of_it else {}), **of_parent}


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
