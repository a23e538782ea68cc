"""Superset under gunicorn as its guide says: on SQLAlchemy 1.4, which it requires, and on 2.0."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pages
import pytest
from applications import ROOT, Application

pytestmark = [pytest.mark.applications, pytest.mark.timeout(900)]

GUIDE = pages.DOCS / "guides" / "superset.md"
SET_UP = "Set up"
SHARED = "What a fork does to it"
WITH_PIDPOOL = "With pidpool, on SQLAlchemy 2.0"
PROGRAMS = Path(__file__).parent.parent / "programs" / "applications"
BOUND = 300
ROWS = 60


def run(superset: Application, section: str, name: str, replaced: dict[str, str]) -> tuple[int, list[str]]:
    """Follow a section, whose rows get the given name.

    :returns: how many of them are there, and what the server's log complained of.
    """
    superset.write_files_of(GUIDE, section)
    # Each section has a shell of its own, as a reader has who ends one server before the next.
    steps = [step for step in pages.steps(GUIDE, SET_UP) if step.command.startswith("export ")]
    for step in pages.steps(GUIDE, section):
        command = step.command
        for old, new in replaced.items():
            command = command.replace(old, new)
        steps.append(dataclasses.replace(step, command=command))
    superset.mark = superset.postgres.log_mark()
    with superset.followed(steps, BOUND):
        found = superset.ask(f"select count(*) from annotation_layer where name like '{name} %'")
        return found, superset.complaints()


def test_superset(
    application: Callable[[str, str], Application], record_property: Callable[[str, object], None]
) -> None:
    superset = application("superset", "page")
    superset.environment |= {
        # pidpool's command looks at Superset from an environment of its own.
        "PATH": f"{superset.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}",
    }

    def record(what: str, found: int, complaints: list[str]) -> None:
        figures = f"rows expected {ROWS}, found {found}, log lines {len(complaints)}"
        record_property("application", f"Superset, {what}: {figures}")

    superset.write_files_of(GUIDE, SET_UP)
    with superset.followed(pages.steps(GUIDE, SET_UP), BOUND):
        pass

    shared = run(superset, SHARED, "shared", {})
    record("1.4, QueuePool", *shared)
    assert any("bad record mac" in line for line in shared[1])
    for section, name in (("Without preload", "apart"), ("With preload and NullPool", "unpooled")):
        apart = run(superset, section, name, {})
        record(f"1.4, {section.lower()}", *apart)
        assert apart == (ROWS, [])

    superset.environment["PATH"] = f"{ROOT}/.venv-superset-2/bin:{superset.environment['PATH']}"
    superset.environment["PYTHONPATH"] = str(PROGRAMS)
    on_2 = {"superset.app:": "superset_on_2:"}
    superset.write_files_of(GUIDE, SET_UP)
    shared = run(superset, SHARED, "2", {**on_2, "ask.py shared": "ask.py 2"})
    record("2.0, QueuePool", *shared)
    assert any("bad record mac" in line for line in shared[1])
    with superset.watched() as family:
        cured = run(superset, WITH_PIDPOOL, "pidpool", on_2)
        counters = family().counters
    inherited = sum(counters.inherited.values())
    record(f"2.0, PidPool, forks {counters.forks}, connections inherited {inherited}", *cured)
    assert cured == (ROWS, [])
    assert inherited >= 4


def test_superset_requires_what_the_guide_says() -> None:
    (packages,) = (ROOT / ".venv-superset" / "lib").glob("python*/site-packages")
    (superset,) = importlib.metadata.distributions(name="apache-superset", path=[str(packages)])
    assert "sqlalchemy<2,>=1.4" in (superset.requires or [])
