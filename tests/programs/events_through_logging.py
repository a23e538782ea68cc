"""The stdlib's logging with structlog's ProcessorFormatter, as docs/watching.md has it."""

import logging
import sys

import structlog
from sqlalchemy import create_engine

from pidpool import PidPool

shared = [structlog.contextvars.merge_contextvars, structlog.stdlib.add_log_level]

structlog.configure(
    processors=[
        structlog.stdlib.filter_by_level,
        *shared,
        structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
    ],
    wrapper_class=structlog.stdlib.BoundLogger,
    logger_factory=structlog.stdlib.LoggerFactory(),
)
handler = logging.FileHandler(sys.argv[2])
handler.setFormatter(
    structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,  # for lines that were not logged through structlog
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.JSONRenderer(),
        ],
    )
)
logging.getLogger().addHandler(handler)
logging.getLogger("pidpool").setLevel(logging.DEBUG)

engine = create_engine(sys.argv[1], poolclass=PidPool, pool_logging_name="main", hold_warning=30)
