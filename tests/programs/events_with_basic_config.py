"""structlog not configured: events are lines of the stdlib logger `pidpool`, as docs/watching.md has it."""

import logging
import sys

from sqlalchemy import create_engine

from pidpool import PidPool

logging.basicConfig(filename=sys.argv[2], level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
logging.getLogger("pidpool").setLevel(logging.DEBUG)

engine = create_engine(sys.argv[1], poolclass=PidPool, pool_logging_name="main", hold_warning=30)
