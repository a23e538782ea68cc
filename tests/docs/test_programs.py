"""Every command and every program of the README and of the documentation runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pages
import pytest
from following import with_server
from sqlalchemy import create_engine

from pidpool import PidPool, serve_stats
from pidpool.tools.demo.postgres import EmbeddedPostgres

CHECK = (pages.ROOT / ".ci" / "run").read_text()
BOUND = 240

STATS = "http://127.0.0.1:9432/"
EVERYTHING = [pages.README, pages.ROOT / "CONTRIBUTING.md", *pages.PAGES]
COMMANDS = sorted({command for page in EVERYTHING for command in pages.commands(page)})
PROGRAMS = [
    pytest.param(program, id=f"{page.stem}-{number}")
    for page in EVERYTHING
    for number, program in enumerate(pages.programs(page))
]


def run(command: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=directory, timeout=BOUND, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def on(postgres: EmbeddedPostgres, text: str) -> str:
    for driver in ("postgresql+psycopg2", "postgresql+asyncpg"):
        text = with_server(text, driver, postgres.url(driver=driver))
    return text


@pytest.mark.timeout(BOUND + 30)
@pytest.mark.parametrize("command", [each for each in COMMANDS if each.startswith("pidpool ")])
def test_a_command_of_pidpool_runs(command: str, postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    logging, use = pages.programs(pages.DOCS / "watching.md")[0], pages.programs(pages.DOCS / "start.md")[0]
    assert run([sys.executable, "-c", on(postgres, logging + use)], tmp_path).returncode == 0
    assert (tmp_path / "application.log").stat().st_size
    engine = create_engine("sqlite://", poolclass=PidPool)
    with serve_stats(engine, port=0) as server:
        words = shlex.split(on(postgres, command).replace(STATS, server.url))
        done = run([str(Path(sys.executable).with_name(words[0])), *words[1:]], tmp_path)
    # `ps --check` looks at the whole machine, on which other tests may be sharing sockets.
    assert done.returncode == 0 or (words[1:] == ["ps", "--check"] and done.returncode == 1), done
    assert done.stdout.strip() or "--html" in words
    assert ("--html" not in words) or (tmp_path / "page.html").read_text().startswith("<!")


@pytest.mark.parametrize("command", [each for each in COMMANDS if each.startswith("make ")])
def test_a_target_of_make_is_run_by_the_projects_check(command: str) -> None:
    command = command.partition("#")[0].strip()
    done = run(["make", "--dry-run", *shlex.split(command)[1:]], pages.ROOT)
    assert done.returncode == 0
    if command == "make soak":  # the long form of tests that `make test` runs
        arguments = shlex.split(done.stdout.strip().splitlines()[-1].partition(" -m pytest ")[2])
        collected = run([sys.executable, "-m", "pytest", "--collect-only", "-q", *arguments], pages.ROOT)
        assert collected.returncode == 0, collected.stdout
    elif command not in ("make help", "make test-applications"):
        assert re.search(rf"^ *(ordinary )?{command}\b(?!-)", CHECK, re.MULTILINE)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_runs(program: str, postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    done = run([sys.executable, "-W", "error", "-c", on(postgres, program)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("1\n" if "print" in program else "")
