"""What the applications of the server tests share: an engine with a connection that the parent opens at
import and holds a transaction on, and what a worker does with both. Takes DB_URL from the environment."""

from __future__ import annotations

import atexit
import logging
import os
from typing import Any

from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

from pidpool import ForeignConnectionError, PidPool

logging.getLogger("pidpool").setLevel(logging.ERROR)
engine = create_engine(os.environ["DB_URL"], poolclass=PidPool)
engine.connect().close()
held = engine.connect()
held.execute(text("insert into kept values ('parent')"))
owner = os.getpid()
held_server_pid = held.scalar(text("select pg_backend_pid()"))
held_connection = held.connection.dbapi_connection


@atexit.register
def end() -> None:
    if os.getpid() == owner:
        held.commit()
        held.close()
    engine.dispose()


def answer(**more: Any) -> dict[str, Any]:
    return {"pid": os.getpid(), "owner": owner, "held_server_pid": held_server_pid, **more}


def use_the_pool() -> dict[str, Any]:
    with engine.connect() as connection:
        return answer(server_pid=connection.scalar(text("select pg_backend_pid()")))


def use_what_is_held() -> dict[str, Any]:
    """Return the error of the first use of the parent's connection, and the connection used afterwards."""
    befell = "nothing"
    try:
        held.execute(text("select 1"))
    except OperationalError as error:
        if isinstance(error.orig, ForeignConnectionError):
            befell = f"{error.orig.owner_pid} {error.orig.pid}"
    held.rollback()
    number = held.scalar(text("select pg_backend_pid()"))
    held.rollback()
    return answer(befell=befell, server_pid=number)
