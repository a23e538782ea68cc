"""Optuna's storage, inherited by the workers that make its trials."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from applications import Application

pytestmark = [pytest.mark.applications, pytest.mark.timeout(600)]

STUDY = Path(__file__).parent.parent / "programs" / "applications" / "study.py"
TRIALS = 30


@pytest.mark.parametrize("pool", ["pidpool", "queue"])
def test_optuna(
    application: Callable[[str, str], Application], record_property: Callable[[str, object], None], pool: str
) -> None:
    optuna = application("optuna", pool)
    with optuna.watched() as family:
        with optuna.running("python", str(STUDY), optuna.url(), str(TRIALS)) as process:
            status = process.wait(300)
        counters = family().counters
    found = optuna.ask("select count(*) from trials where state = 'COMPLETE'")
    complaints = optuna.complaints()
    figures = f"trials {TRIALS}, "
    if pool == "pidpool":
        figures += f"forks {counters.forks}, connections inherited {sum(counters.inherited.values())}, "
    figures += f"rows expected {TRIALS}, found {found}, log lines {len(complaints)}"
    record_property("application", f"Optuna {pool}: {figures}")
    if pool == "queue":
        assert status or complaints or found < TRIALS
        return
    assert (status, found) == (0, TRIALS), optuna.log.read_text()[-3000:]
    assert counters.inherited["idle"] >= 3
    assert complaints == []
