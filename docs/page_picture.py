"""Makes pictures/page.png, a picture of the stats page, in the environment of the tests.

A master with a transaction open forks three workers, one of which is killed, on a PostgreSQL of its own.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from browser import chromium
from sqlalchemy import Engine, create_engine, text

from pidpool import PidPool, serve_stats
from pidpool.tools.demo.postgres import EmbeddedPostgres


def work(engine: Engine, started: int) -> None:
    """What a worker does: some requests, and then one that lasts."""
    for _ in range(40):
        with engine.connect() as connection:
            connection.execute(text("select pg_sleep(0.002)"))
    with engine.connect() as connection:
        connection.execute(text("select 1"))
        os.write(started, b".")
        signal.pause()


def main() -> None:
    with EmbeddedPostgres() as postgres, tempfile.TemporaryDirectory() as profile:
        engine = create_engine(
            postgres.url(),
            poolclass=PidPool,
            pool_size=2,
            max_overflow=3,
            pool_logging_name="shop",
            family_limit=12,
        )
        ready, started = os.pipe()
        with engine.connect() as transaction:
            transaction.execute(text("create temporary table kept (v integer)"))
            workers = []
            for _ in range(3):
                pid = os.fork()
                if pid == 0:
                    signal.signal(signal.SIGTERM, signal.SIG_DFL)
                    work(engine, started)
                workers.append(pid)
            for _ in workers:
                os.read(ready, 1)
            os.kill(workers[-1], signal.SIGKILL)
            os.waitpid(workers.pop(), 0)
            with serve_stats(engine, port=0) as server, chromium(Path(profile)) as browser:
                browser.emulate(width=1160, height=980, prefers_color_scheme="light")
                browser.go(server.url)
                browser.wait_for(".process")
                time.sleep(3)  # until the page has drawn its first rates
                browser.driver.save_screenshot(str(Path(__file__).parent / "pictures" / "page.png"))
            for pid in workers:
                os.kill(pid, signal.SIGTERM)
                os.waitpid(pid, 0)
        engine.dispose()


if __name__ == "__main__":
    main()
