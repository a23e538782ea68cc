"""A web application as the question has it, for a server that forks its workers after importing this:
the connection that is opened at import is every worker's. The environment names URL and pool class.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy import create_engine, pool, text

from pidpool import PidPool

poolclass = {"QueuePool": pool.QueuePool, "PidPool": PidPool}[os.environ["POOL"]]
engine = create_engine(os.environ["DATABASE_URL"], poolclass=poolclass)
connection = engine.connect()
connection.execute(text("select 1"))


def application(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    """Answer with the pid of the worker."""
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]
