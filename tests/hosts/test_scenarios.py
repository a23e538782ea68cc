"""Whole programs that fork with a connection open, each run with SQLAlchemy's pool too, which shows that
what PidPool is to prevent would happen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from pidpool.tools.demo.postgres import EmbeddedPostgres

PROGRAMS = Path(__file__).parent.parent / "programs"


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAMS / program), *arguments],
        capture_output=True,
        text=True,
        timeout=90,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )


@pytest.fixture
def question(postgres: EmbeddedPostgres) -> None:
    engine = create_engine(postgres.url(tls=False))
    with engine.begin() as connection:
        connection.execute(text("set local lock_timeout = '10s'"))
        connection.execute(text("drop table if exists question_counters"))
    engine.dispose()


@pytest.mark.usefixtures("clean_log", "question")
@pytest.mark.parametrize("shape", ["globals", "context"])
def test_children_with_engines_of_their_own(tls_url: str, shape: str) -> None:
    ended = run("question.py", tls_url, "pidpool", shape, "15")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


@pytest.mark.usefixtures("question")
def test_children_with_engines_of_their_own_harm_the_parent_with_queuepool(
    tls_url: str, postgres: EmbeddedPostgres
) -> None:
    mark = postgres.log_mark()
    ended = run("question.py", tls_url, "queue", "globals", "40")
    assert ended.returncode == 1
    assert "OperationalError" in ended.stderr
    assert postgres.complaints(mark)


@pytest.mark.usefixtures("clean_log")
@pytest.mark.parametrize("tls", [True, False])
def test_a_commit_that_is_reported_is_there(postgres: EmbeddedPostgres, tls: bool) -> None:
    ended = run("silent_loss.py", postgres.url(tls=tls), "pidpool", "20")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "20 20\n", "")


def test_a_commit_that_is_reported_is_not_there_with_queuepool(postgres: EmbeddedPostgres) -> None:
    ended = run("silent_loss.py", postgres.url(tls=False), "queue", "20")
    assert (ended.returncode, ended.stdout) == (0, "20 0\n")


@pytest.mark.parametrize(("pool", "lock"), [("pidpool", "free"), ("queue", "held")])
def test_the_lock_of_a_parent_that_was_killed(tls_url: str, pool: str, lock: str) -> None:
    """No clean log here: the server has to notice that the parent is gone."""
    ended = run("orphan_lock.py", tls_url, pool)
    assert (ended.returncode, ended.stdout) == (0, f"{lock}\n"), ended.stderr


@pytest.mark.usefixtures("clean_log")
def test_a_parent_of_gevents_greenlets(tls_url: str) -> None:
    ended = run("greenlets.py", tls_url, "10")
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr
