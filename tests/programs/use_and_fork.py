"""Takes the engine of one of the programs beside it, uses it, and forks:

use_and_fork.py URL LOG PROGRAM
"""

import importlib
import os
import sys

import structlog
from sqlalchemy import text

structlog.contextvars.bind_contextvars(request_id="r-1")
engine = importlib.import_module(sys.argv[3]).engine

with engine.connect() as connection:
    connection.execute(text("select 1"))
    child = os.fork()
    if child == 0:
        structlog.contextvars.bind_contextvars(request_id="r-2")
        with engine.connect() as own:
            own.execute(text("select 1"))
        engine.dispose()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    connection.commit()
engine.dispose()
sys.exit(os.waitstatus_to_exitcode(status))
