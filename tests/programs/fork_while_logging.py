"""Forks many times while eight threads log through one configuration; each child logs at once, uses
its pool, and logs again. Prints how many children it had, as JSON; a hung one shows its stacks.

    fork_while_logging.py URL WRITER HOW FORKS
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import IO, Any

import structlog
from forking import How, run_in_child
from sqlalchemy import create_engine, text

from pidpool import PidPool

THREADS = 8


def to_structlog(factory: Any) -> Any:
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=factory,
    )
    return structlog.get_logger("application")


def to_stdlib(*handlers: logging.Handler) -> Any:
    structlog.configure(
        processors=[structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    formatter = structlog.stdlib.ProcessorFormatter(processor=structlog.processors.JSONRenderer())
    for handler in handlers:
        handler.setFormatter(formatter)
        logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.DEBUG)
    return structlog.get_logger("application")


def queued(file: IO[str]) -> Any:
    lines: queue.Queue[Any] = queue.Queue()
    logging.handlers.QueueListener(lines, logging.StreamHandler(file)).start()
    return to_stdlib(logging.handlers.QueueHandler(lines))


def unconfigured(file: IO[str]) -> Any:
    logging.basicConfig(stream=file, level=logging.DEBUG)
    return logging.getLogger("application")


WRITERS: dict[str, Callable[[IO[str]], Any]] = {
    "PrintLogger": lambda file: to_structlog(structlog.PrintLoggerFactory(file)),
    "WriteLogger": lambda file: to_structlog(structlog.WriteLoggerFactory(file)),
    "FileHandler": lambda file: to_stdlib(logging.FileHandler(file.name)),
    "StreamHandlers": lambda file: to_stdlib(logging.StreamHandler(file), logging.StreamHandler(file)),
    "QueueHandler": queued,
    "unconfigured": unconfigured,
}


def main(url: str, writer: str, how: How, forks: int) -> None:
    # In Python: more forks in the middle of something. In C: threads change at their writes only, since a
    # child can't hand the GIL to a thread that it does not have.
    sys.setswitchinterval(0.0005 if how == "python" else 1)
    with tempfile.TemporaryDirectory() as directory, open(f"{directory}/log", "a") as file:
        log = WRITERS[writer](file)  # type: ignore[arg-type]
        engine = create_engine(url, poolclass=PidPool)
        with engine.connect() as connection:
            server_pid = connection.scalar(text("select pg_backend_pid()"))
        ended = threading.Event()
        threads = [threading.Thread(target=keep_logging, args=(log, ended)) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        started = time.monotonic()

        def child() -> None:
            if how != "c":  # with no hook at all, the first use of a pool is what frees the writers
                log.info("at once after the fork")
            with engine.connect() as connection:
                assert connection.scalar(text("select pg_backend_pid()")) != server_pid
            log.info("later")
            engine.dispose()

        try:
            for number in range(forks):
                run_in_child(child, how=how, life=60)
                if number % 50 == 0:
                    os.ftruncate(file.fileno(), 0)
        finally:
            ended.set()
            for thread in threads:
                thread.join()
        seconds = time.monotonic() - started
        with engine.connect() as connection:
            assert connection.scalar(text("select pg_backend_pid()")) == server_pid
        engine.dispose()
        print(json.dumps({"writer": writer, "how": how, "forks": forks, "seconds": round(seconds, 1)}))
        sys.stdout.flush()
        os._exit(0)  # a QueueListener's thread would be waited for


def keep_logging(log: Any, ended: threading.Event) -> None:
    while not ended.is_set():
        log.info("a line of the application's")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))  # type: ignore[arg-type]
