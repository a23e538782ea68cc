"""The pytest plugin that suite.py loads into its runs of SQLAlchemy's own tests: puts the
pool class under test wherever SQLAlchemy says QueuePool, counts the pools that are made, and writes
what became of each test as lines of JSON.

Loaded with `-p`, so before SQLAlchemy's conftest: every later `from ..pool import QueuePool` gets the
class under test. What it has to know comes in environment variables, because options are parsed later.
"""

from __future__ import annotations

import collections
import faulthandler
import importlib
import json
import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy.engine import make_url
from sqlalchemy.pool import Pool, QueuePool

HANGS_AFTER = 40.0
"""Seconds after which a test counts as hung; the slowest takes five."""

pools_made: collections.Counter[str] = collections.Counter()

_outcomes = Path(os.environ["SQLALCHEMY_SUITE_OUTCOMES"])
_only = frozenset(json.loads(os.environ.get("SQLALCHEMY_SUITE_ONLY", "[]")))
# Not stderr: pytest captures that, and a hung run ends before anyone could read it back.
_stacks = os.open(os.environ["SQLALCHEMY_SUITE_STACKS"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)


def _class_named(name: str) -> type[Pool]:
    module, _, attribute = name.partition(":")
    found: type[Pool] = getattr(importlib.import_module(module), attribute)
    return found


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _count_pools() -> None:
    """Count every pool by its class.

    In `__new__`, because create_engine() reads the signature of `__init__`.
    """

    def new(cls: type[Pool], *_args: Any, **_options: Any) -> Any:
        pools_made[_full_name(cls)] += 1
        return object.__new__(cls)

    Pool.__new__ = new  # type: ignore[method-assign,assignment]


def _replace_queue_pool(replacement: type[Pool]) -> None:
    """Put `replacement` under every name by which SQLAlchemy knows its QueuePool.

    The subclasses that SQLAlchemy has made of it (AsyncAdaptedQueuePool) stay as they are.
    """
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "sqlalchemy":
            for attribute, value in list(vars(module).items()):
                if value is QueuePool:
                    setattr(module, attribute, replacement)
    # Dialects look the class up when they are asked; prove it for the two that are tested.
    for url in map(make_url, ("sqlite:///a-file", "postgresql+psycopg2://")):
        assert url.get_dialect()().get_dialect_pool_class(url) is replacement, url


_pool_class = _class_named(os.environ["SQLALCHEMY_SUITE_POOL"])
assert "__new__" not in vars(_pool_class), "_count_pools() would not see its instances"
_count_pools()
_replace_queue_pool(_pool_class)


def _write(**line: object) -> None:
    with _outcomes.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _name(nodeid: str) -> str:
    """Name a test alike with every pool: the ids of parametrized tests have the class's name in them."""
    test, bracket, parameters = nodeid.partition("[")
    return test + bracket + parameters.replace(_pool_class.__name__, "QueuePool")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep only the tests asked for.

    Last, because SQLAlchemy's plugin makes one test per database here, and with that new node ids.
    """
    if _only:
        config.hook.pytest_deselected(items=[item for item in items if _name(item.nodeid) not in _only])
        items[:] = [item for item in items if _name(item.nodeid) in _only]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Name the test before it runs, and end a run that hangs in it, with the stack of every thread."""
    _write(test=_name(item.nodeid), when="begin")
    faulthandler.dump_traceback_later(HANGS_AFTER, exit=True, file=_stacks)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    outcome: str = report.outcome
    if hasattr(report, "wasxfail"):
        outcome = "xfailed" if report.skipped else "xpassed"
    elif report.failed and report.when != "call":
        outcome = "error"
    _write(
        test=_name(report.nodeid),
        when=report.when,
        outcome=outcome,
        text=report.longreprtext if report.failed else "",
    )


def pytest_sessionfinish() -> None:
    _write(
        when="end",
        sqlalchemy=sqlalchemy.__version__,
        pool=_full_name(_pool_class),
        pools_made=pools_made,
    )
