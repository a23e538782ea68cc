"""Starts workers in every way of the standard library's, with a transaction open, and prints what they saw:

workers.py METHOD [MODULE]

METHOD is fork, forkserver or spawn; MODULE is what the fork server imports before it forks.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from sqlalchemy import text
from sqlalchemy.exc import OperationalError

TURNS = range(4)


def work(_: int) -> dict[str, Any]:
    """Use the pool and, first of all under pidpool, the connection that the module has opened."""
    import opened

    inherited = opened.opener != os.getpid()
    refused = None
    if not hasattr(opened, "refused") and os.environ["POOL"] == "pidpool":
        refused = opened.refused = is_refused(opened)  # type: ignore[attr-defined]
    with opened.engine.connect() as connection:
        number = connection.scalar(text("select pg_backend_pid()"))
    return {
        "pid": os.getpid(),
        "server_pid": number,
        "opener": opened.opener if inherited else None,
        "refused": refused,
    }


def is_refused(opened: Any) -> bool:
    """Use the module's connection, which is this worker's own unless a fork brought it."""
    refused = False
    try:
        opened.held.execute(text("select 1"))
    except OperationalError:
        refused = True
    opened.held.rollback()
    if opened.opener != os.getpid():
        opened.end_well()
    return refused


def work_and_send(pipe: Any) -> None:
    pipe.send(work(0))


def in_processes(context: Any) -> list[dict[str, Any]]:
    answers = []
    for _ in range(2):
        mine, theirs = context.Pipe()
        process = context.Process(target=work_and_send, args=(theirs,))
        process.start()
        theirs.close()
        answers.append(mine.recv())
        process.join()
        assert process.exitcode == 0
    return answers


def in_a_thread(context: Any) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: answers.extend(in_processes(context)))
    thread.start()
    thread.join()
    return answers


def in_a_pool(context: Any) -> list[dict[str, Any]]:
    with context.Pool(2) as pool:
        answers: list[dict[str, Any]] = pool.map(work, TURNS, chunksize=1)
        pool.close()
        pool.join()
    return answers


def in_an_executor(context: Any) -> list[dict[str, Any]]:
    with ProcessPoolExecutor(2, context) as executor:
        return list(executor.map(work, TURNS))


KINDS = {
    "Process": in_processes,
    "Process in a thread": in_a_thread,
    "Pool": in_a_pool,
    "ProcessPoolExecutor": in_an_executor,
}


def main(method: str, preload: list[str]) -> None:
    import opened

    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(preload)
    opened.held.execute(text("insert into kept values ('parent')"))
    transaction = opened.held.scalar(text("select txid_current()"))
    kinds = {"Process": in_processes} if os.environ["POOL"] == "queue" else KINDS
    workers = {kind: start(context) for kind, start in kinds.items()}
    parent = {"pid": os.getpid(), "server_pid": opened.server_pid}
    if os.environ["POOL"] == "pidpool":
        assert opened.held.scalar(text("select pg_backend_pid()")) == opened.server_pid
        assert opened.held.scalar(text("select txid_current()")) == transaction
        opened.held.commit()
        parent["rows"] = opened.held.scalar(text("select count(*) from kept"))
    print(json.dumps({"parent": parent, "workers": workers}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
