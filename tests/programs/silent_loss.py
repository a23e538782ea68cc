"""A child drops the session in which its parent has a transaction open: silent_loss.py URL POOL COMMITS

Prints how many commits were reported to the parent, and how many of their rows are there."""

from __future__ import annotations

import gc
import os
import sys

from pools import make_engine
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

url, pool, commits = sys.argv[1:]
engine = make_engine(url, pool)
with engine.begin() as connection:
    connection.execute(text("drop table if exists silent_loss"))
    connection.execute(text("create table silent_loss (v int)"))
reported = 0
for number in range(int(commits)):
    session: Session | None = Session(engine)
    assert session is not None
    session.execute(text("insert into silent_loss values (:number)"), {"number": number})
    pid = os.fork()
    if pid == 0:
        session = None
        gc.collect()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    try:
        session.commit()
        reported += 1
    except DBAPIError:
        pass
    session.close()
with engine.begin() as connection:
    print(reported, connection.scalar(text("select count(*) from silent_loss")))
    connection.execute(text("drop table silent_loss"))
engine.dispose()
