"""The application that every host serves. The process that imports it opens two connections: one goes back to
the pool, the other one stays checked out with a row that is not committed yet.

Each process appends to the file REPORT what it did: one JSON object a line. The environment has DB_URL, POOL
(`pidpool` or `queue`) and TABLE too.
"""

from __future__ import annotations

import atexit
import json
import logging
import multiprocessing.util
import os
import threading
from typing import Any

from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool

from pidpool import PidPool

# Each connection inherited in a transaction is a warning; here that is the point of the test.
logging.getLogger("pidpool").setLevel(logging.ERROR)

poolclass = {"pidpool": PidPool, "queue": QueuePool}[os.environ["POOL"]]
INSERT = f"insert into {os.environ['TABLE']} values (:what, :number, :pid)"
LOOK = text("select pg_backend_pid(), txid_current()")


def report(what: str, number: int, **more: Any) -> None:
    line = json.dumps({"what": what, "number": number, "pid": os.getpid(), "owner": owner, **more})
    descriptor = os.open(os.environ["REPORT"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line.encode() + b"\n")
    finally:
        os.close(descriptor)


def insert(connection: Connection, what: str, number: int) -> int:
    """Insert a row, and return the server's pid."""
    row = {"what": what, "number": number, "pid": os.getpid()}
    return int(connection.scalar(text(f"{INSERT} returning pg_backend_pid()"), row) or 0)


owner = os.getpid()
engine = create_engine(os.environ["DB_URL"], poolclass=poolclass)
held = engine.connect()
insert(held, "parent", owner)
held_is = held.execute(LOOK).one()
engine.connect().close()
report("parent", owner, server_pid=held_is[0])

first_use = threading.Lock()
# Pids, since a child inherits what its parent has done already.
used_held_in = owner
ends_well_in: int | None = None
ended_in: int | None = None


def work(number: int) -> None:
    """Insert a row through the pool. The first time in a worker, do it on the parent's connection too."""
    global used_held_in
    end_well()
    try:
        with engine.begin() as connection:
            server_pid = insert(connection, "row", number)
        report("row", number, server_pid=server_pid)
        if os.getpid() != owner:
            with first_use:  # never in the owner, from which a child would inherit it locked
                if used_held_in != os.getpid():
                    used_held_in = os.getpid()
                    use_what_is_held(number)
    except BaseException as error:
        report("failed", number, error=str(error).strip())
        raise


def use_what_is_held(number: int) -> None:
    error = ""
    try:
        server_pid = insert(held, "held", number)
    except DBAPIError as raised:
        error = type(raised.orig).__name__
        held.rollback()
        server_pid = insert(held, "held", number)
    held.commit()
    report("held", number, server_pid=server_pid, error=error)


def end_well() -> None:
    """Have `end` run in a worker of multiprocessing too, which ends by os._exit() after its finalizers."""
    global ends_well_in
    if ends_well_in != os.getpid():
        ends_well_in = os.getpid()
        multiprocessing.util.Finalize(None, end, exitpriority=10)


def end() -> None:
    """End as a process should: the parent commits, and all close their connections."""
    global ended_in
    if ended_in == os.getpid():
        return
    ended_in = os.getpid()
    if ended_in == owner:
        try:
            assert held.execute(LOOK).one() == held_is, "the parent's transaction is another one"
            held.commit()
            with engine.begin() as connection:
                insert(connection, "pool", owner)
        except BaseException as error:
            report("failed", owner, error=str(error).strip())
    leave()


def leave() -> None:
    """Close this process's connections, and lose those of its parent."""
    held.close()
    engine.dispose()


def work_and_leave(number: int) -> None:
    """Work in a child that is ended without exit handlers afterwards."""
    work(number)
    if os.getpid() != owner:
        leave()


atexit.register(end)
