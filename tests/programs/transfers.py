"""Threads commit transfers between accounts over TLS while others fork; prints what was committed, and what
the process has left: ``python transfers.py <forks>``.

The forks are Python's. A child forked in C, without CPython's own work after a fork, may wait for ever in
CPython for the GIL if another thread asked for it at the fork.

The database `DB_URL` gets the tables ``accounts (id, balance)`` and ``transfers (id)``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import itertools
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

from descriptors import open_descriptors
from forking import has_ended
from sqlalchemy import Connection, create_engine, text
from waiting import until

from pidpool import PidPool

ACCOUNTS = 20
TRANSFERRING, FORKING = 4, 2
A_CHILD_TRANSFERS = 50  # one child in so many makes a transfer of its own
CHILDS_LIFE = 60.0

engine = create_engine(
    os.environ["DB_URL"], poolclass=PidPool, pool_size=TRANSFERRING, max_overflow=1, pool_timeout=60
)


def transfer(connection: Connection, number: int) -> None:
    """Move a random amount between two accounts; `number` is the transfer's own."""
    one, other = random.sample(range(ACCOUNTS), 2)
    amount = random.randint(1, 100)
    change = text("update accounts set balance = balance + :amount where id = :id")
    # In the order of their numbers, since otherwise two transfers may wait for each other.
    for account, sign in sorted([(one, 1), (other, -1)]):
        connection.execute(change, {"amount": sign * amount, "id": account})
    connection.execute(text("insert into transfers values (:number)"), {"number": number})
    connection.commit()


def prepare() -> None:
    with engine.begin() as connection:
        connection.execute(text("create table accounts (id int primary key, balance bigint)"))
        connection.execute(text("create table transfers (id bigint)"))
        connection.execute(
            text(f"insert into accounts select n, 1000 from generate_series(0, {ACCOUNTS - 1}) n")
        )


class Transferring(threading.Thread):
    def __init__(self, first: int) -> None:
        super().__init__(name=f"transfers {first}")
        self.numbers = itertools.count(first, TRANSFERRING)
        self.made: list[int] = []
        self.error: BaseException | None = None
        self.is_over = False

    def run(self) -> None:
        try:
            while not self.is_over:
                with engine.connect() as connection:
                    number = next(self.numbers)
                    transfer(connection, number)
                    self.made.append(number)
        except BaseException as error:
            self.error = error


class Forking(threading.Thread):
    def __init__(self, first: int, forks: int) -> None:
        super().__init__(name=f"forks {first}")
        self.children = range(first, forks, FORKING)
        self.made: list[int] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            for number in self.children:
                self.fork(number)
        except BaseException as error:
            self.error = error

    def fork(self, number: int) -> None:
        transfers = number % A_CHILD_TRANSFERS == 0
        pid = os.fork()
        if pid == 0:
            child(number, transfers)
        try:
            until(lambda: has_ended(pid), f"child {number} hangs", CHILDS_LIFE, 0.001)
        except AssertionError:
            os.kill(pid, signal.SIGABRT)  # its stacks
            raise
        status = os.waitpid(pid, 0)[1]
        assert status == 0, f"child {number} ended with {status}"
        if transfers:
            self.made.append(-number - 1)


def child(number: int, transfers: bool) -> None:
    code = 1
    try:
        match number % 4:
            case 0:
                engine.pool.status()
            case 1:
                gc.collect()
            case 2:
                engine.dispose()
        if transfers:
            with engine.connect() as connection:
                transfer(connection, -number - 1)
            engine.dispose()
        code = 0
    finally:
        os._exit(code)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(forks: int) -> None:
    faulthandler.enable()
    prepare()
    held = engine.connect()  # in one transaction from before the first fork until after the last
    before = held.execute(text("select pg_backend_pid(), txid_current()")).one()
    transferring = [Transferring(first) for first in range(TRANSFERRING)]
    forking = [Forking(first, forks) for first in range(FORKING)]
    for thread in transferring:
        thread.start()
    until(lambda: all(thread.made or thread.error for thread in transferring), "no transfer in a minute")
    descriptors = open_descriptors()
    began, resident_before = time.monotonic(), resident()
    for fork in forking:
        fork.start()
    for fork in forking:
        fork.join()
    seconds = time.monotonic() - began
    for thread in transferring:
        thread.is_over = True
    for thread in transferring:
        thread.join(CHILDS_LIFE)
    errors = [repr(thread.error) for thread in (*transferring, *forking) if thread.error is not None]
    hung = [thread.name for thread in transferring if thread.is_alive()]
    is_as_before = held.execute(text("select pg_backend_pid(), txid_current()")).one() == before
    held.close()
    pool = engine.pool
    assert isinstance(pool, PidPool)
    left = open_descriptors() - descriptors
    made = [number for thread in (*transferring, *forking) for number in thread.made]
    with engine.connect() as connection:
        balance = connection.scalar(text("select sum(balance) from accounts"))
        there = list(connection.scalars(text("select id from transfers")))
    print(
        json.dumps(
            {
                "forks": forks,
                "seconds": seconds,
                "transfers": len(made),
                "errors": errors,
                "hung": hung,
                "the held transaction is as before": is_as_before,
                "balance": int(balance),
                "expected balance": 1000 * ACCOUNTS,
                "not there": sorted(set(made) - set(there)),
                "not reported": sorted(set(there) - set(made)),
                "twice": len(there) - len(set(there)),
                "descriptors": sorted(left),
                "entries": len(pool.records()),
                "grown": resident() - resident_before,
            }
        )
    )
    sys.stdout.flush()
    engine.dispose()


with contextlib.suppress(BrokenPipeError):
    main(int(sys.argv[1]))
