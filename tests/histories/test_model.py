"""The model of the histories can fail, and a history is a program that can be run."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from histories import History, HistoryFailed, Stage

ROOT = Path(__file__).parent.parent.parent


def test_a_history_is_a_program(stage: Stage, tmp_path: Path) -> None:
    with History(stage, pool_size=1, max_overflow=0) as history:
        history.checkout("p0", "a")
        history.write("p0", "a")
        history.fork("p0", "c")
        history.write("p1", "a")
        history.rollback("p1", "a")
        history.write("p1", "a")
        history.commit("p1", "a")
        history.commit("p0", "a")
    program = tmp_path / "history.py"
    program.write_text(history.program())
    ran = subprocess.run([sys.executable, program], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr


def failure_of(stage: Stage, happens: Callable[[History], None], **options: Any) -> str:
    def run() -> None:
        with History(stage, **options) as history:
            happens(history)

    with pytest.raises(HistoryFailed) as failed:
        run()
    return str(failed.value)


def test_bytes_of_a_child_on_its_parents_connection_are_found(stage: Stage) -> None:
    """With SQLAlchemy's own pool: the child's ROLLBACK ends the parent's transaction."""

    def happens(history: History) -> None:
        history.checkout("p0", "a")
        history.write("p0", "a")
        history.fork("p0", "python")
        history.drop("p1", "a")
        history.collect("p1")

    failure = failure_of(stage, happens, stock=True, tls=False)
    assert re.match(r"\d+ bytes were sent on session \d+ of p0, by a command to p1", failure), failure
    assert "history.drop('p1', 'a')\n" in failure


def _loses_a_place(history: History) -> None:
    history._overflow += 1


def _writes_what_was_rolled_back(history: History) -> None:
    history.checkout("p0", "a")
    history.write("p0", "a")
    history.commit("p0", "a")
    history._rolled_back |= history._committed


def _writes_twice(history: History) -> None:
    history.checkout("p0", "a")
    history.write("p0", "a")
    history.commit("p0", "a")
    history.stage.ask(f"insert into kept values ({history.number}, 1)")


def _expects_another_transaction(history: History) -> None:
    history.checkout("p0", "a")
    history.write("p0", "a")
    history.fork("p0", "python")
    history.processes["p1"].slots["a"].inherited = "no transaction"
    history.write("p1", "a")


def _has_the_server_complain(history: History) -> None:
    history.checkout("p0", "a")
    history.begin("p0", "a")
    history.stage.proxy.reset(history.sessions[0].wire)
    history.sessions[0].is_harmed = True


@pytest.mark.parametrize(
    ("happens", "failure"),
    [
        (_loses_a_place, "p0 can check out 3 connections, not 4"),
        (_writes_what_was_rolled_back, "rolled back, but there: [1]"),
        (_writes_twice, "written twice: {1: 2}"),
        (_expects_another_transaction, "foreign, not ok: OperationalError"),
        (_has_the_server_complain, "the server complains: "),
    ],
)
def test_the_model_fails(stage: Stage, happens: Callable[[History], None], failure: str) -> None:
    found = failure_of(stage, happens)
    assert found.startswith(failure), found
