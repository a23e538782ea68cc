"""The shop's work in processes that the program itself starts: forks_itself.py HOW TASKS

Each way is one function; it returns after the work is done and its processes have ended.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import shop

WORKERS = 2


def pool(method: str) -> Callable[[int], None]:
    def run(tasks: int) -> None:
        context = multiprocessing.get_context(method)
        with context.Pool(WORKERS, shop.end_well, maxtasksperchild=max(4, tasks // 10)) as workers:
            workers.map(shop.work, range(tasks), chunksize=1)
            workers.close()  # lets them end by themselves; leaving the block would kill them
            workers.join()

    return run


def executor(method: str) -> Callable[[int], None]:
    def run(tasks: int) -> None:
        with ProcessPoolExecutor(WORKERS, multiprocessing.get_context(method), shop.end_well) as workers:
            list(workers.map(shop.work, range(tasks)))

    return run


def preloading_forkserver(tasks: int) -> None:
    """The forkserver imports the shop too, and its workers inherit from it."""
    multiprocessing.set_forkserver_preload(["shop"])
    pool("forkserver")(tasks)


def processes_from_threads(tasks: int) -> None:
    """Threads use the pool in turn with the children that they fork."""
    context = multiprocessing.get_context("fork")

    def start(numbers: range) -> None:
        for number in numbers:
            child = context.Process(target=shop.work, args=(number,))
            child.start()
            with shop.engine.connect() as connection:
                connection.execute(shop.LOOK)
            child.join()
            assert child.exitcode == 0

    threads = [threading.Thread(target=start, args=(range(first, tasks, 3),)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def joblib(backend: str) -> Callable[[int], None]:
    def run(tasks: int) -> None:
        # joblib kills its workers in the end.
        from joblib import Parallel, delayed
        from joblib.externals.loky import get_reusable_executor

        Parallel(WORKERS, backend=backend, batch_size=1)(
            delayed(shop.work_and_leave)(number) for number in range(tasks)
        )
        if backend == "loky":
            get_reusable_executor().shutdown(wait=True)

    return run


def preexec_fn(tasks: int) -> None:
    """Python code between fork and exec."""
    for number in range(tasks):
        subprocess.run(["true"], preexec_fn=functools.partial(shop.work_and_leave, number), check=True)


def daemons(tasks: int) -> None:
    """Fork twice, as a daemon is made, and work in the grandchild; the child between ends as scripts do."""
    for number in range(tasks):
        ended, end = os.pipe()
        child = os.fork()
        if child == 0:
            os.setsid()
            if os.fork() == 0:
                shop.work(number)
            sys.exit()
        os.close(end)
        assert os.waitpid(child, 0)[1] == 0
        os.read(ended, 1)  # until the daemon has ended too
        os.close(ended)


HOW = {
    "pool, fork": pool("fork"),
    "pool, forkserver": pool("forkserver"),
    "pool, forkserver that preloads": preloading_forkserver,
    "pool, spawn": pool("spawn"),
    "executor, fork": executor("fork"),
    "executor, forkserver": executor("forkserver"),
    "executor, spawn": executor("spawn"),
    "processes from threads": processes_from_threads,
    "joblib, loky": joblib("loky"),
    "joblib, multiprocessing": joblib("multiprocessing"),
    "preexec_fn": preexec_fn,
    "daemons": daemons,
}

if __name__ == "__main__":
    HOW[sys.argv[1]](int(sys.argv[2]))
