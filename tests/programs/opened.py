"""An engine with a transaction open and an idle connection, made by the process that imports this. Takes
DB_URL and POOL from the environment."""

from __future__ import annotations

import multiprocessing.util
import os

from pools import make_engine
from sqlalchemy import text

engine = make_engine(os.environ["DB_URL"], os.environ["POOL"])
opener = os.getpid()
held = engine.connect()
engine.connect().close()
server_pid = held.scalar(text("select pg_backend_pid()"))


def end_well() -> None:
    """Have this process close its connections when it ends: workers run no `atexit`."""
    multiprocessing.util.Finalize(None, _close, exitpriority=10)


def _close() -> None:
    held.close()
    engine.dispose()


end_well()
