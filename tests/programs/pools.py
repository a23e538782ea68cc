"""The engines of the programs: with PidPool, or with SQLAlchemy's own pool to compare."""

from __future__ import annotations

import logging

from sqlalchemy import Engine, create_engine
from sqlalchemy.pool import QueuePool

from pidpool import PidPool

# Each connection inherited in a transaction is a warning; here that is the point of the test.
logging.getLogger("pidpool").setLevel(logging.ERROR)


def make_engine(url: str, pool: str) -> Engine:
    return create_engine(url, poolclass={"pidpool": PidPool, "queue": QueuePool}[pool])
