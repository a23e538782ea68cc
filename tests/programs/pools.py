"""The engines of the programs: with PidPool, or with SQLAlchemy's own pool to compare."""

from __future__ import annotations

import logging

from sqlalchemy import Engine, create_engine
from sqlalchemy.pool import QueuePool

from pidpool import PidPool

# What a child inherits in a transaction is a warning each time; here it is what is tried.
logging.getLogger("pidpool").setLevel(logging.ERROR)


def make_engine(url: str, pool: str) -> Engine:
    return create_engine(url, poolclass={"pidpool": PidPool, "queue": QueuePool}[pool])
