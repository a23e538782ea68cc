"""structlog's JSON to a file, as docs/watching.md has it."""

import sys

import structlog
from sqlalchemy import create_engine

from pidpool import PidPool

log = open(sys.argv[2], "a")  # noqa: SIM115
structlog.configure(
    processors=[
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
        structlog.processors.JSONRenderer(),
    ],
    wrapper_class=structlog.make_filtering_bound_logger("debug"),
    logger_factory=structlog.WriteLoggerFactory(log),
    cache_logger_on_first_use=True,
)

engine = create_engine(sys.argv[1], poolclass=PidPool, pool_logging_name="main", hold_warning=30)
