"""The README is true: its commands run, its programs run, its options, events and metrics are there."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from events import LEVELS_AND_FIELDS
from sqlalchemy import create_engine

from pidpool import PidPool, serve_stats
from pidpool.tools.demo.postgres import EmbeddedPostgres

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
CHECK = (ROOT / ".ci" / "run").read_text()
BOUND = 240

URL = "postgresql+psycopg2://app@127.0.0.1/app"
STATS = "http://127.0.0.1:9432/"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines()]


def run(command: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=directory, timeout=BOUND, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


@pytest.mark.timeout(BOUND + 30)
@pytest.mark.parametrize("command", [each for each in COMMANDS if each.startswith("pidpool ")])
def test_a_command_of_pidpool_runs(command: str, postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    program = blocks("python")[1] + blocks("python")[0].replace(URL, postgres.url(tls=True))
    assert run([sys.executable, "-c", program], tmp_path).returncode == 0  # application.log
    engine = create_engine("sqlite://", poolclass=PidPool)
    with serve_stats(engine, port=0) as server:
        command = command.replace(URL, postgres.url(tls=True)).replace(STATS, server.url)
        words = shlex.split(command)
        done = run([str(Path(sys.executable).with_name(words[0])), *words[1:]], tmp_path)
    # `ps --check` looks at the whole machine, on which other tests may be sharing sockets.
    assert done.returncode == 0 or (words[1:] == ["ps", "--check"] and done.returncode == 1), done
    assert done.stdout.strip() or "--html" in words
    assert ("--html" not in words) or (tmp_path / "page.html").read_text().startswith("<!")


@pytest.mark.parametrize("command", [each for each in COMMANDS if each.startswith("make ")])
def test_a_target_of_make_is_run_by_the_projects_check(command: str) -> None:
    done = run(["make", "--dry-run", *command.split()[1:]], ROOT)
    assert done.returncode == 0
    if command == "make soak":  # the long form of tests that `make test` runs
        arguments = shlex.split(done.stdout.strip().splitlines()[-1].partition(" -m pytest ")[2])
        collected = run([sys.executable, "-m", "pytest", "--collect-only", "-q", *arguments], ROOT)
        assert collected.returncode == 0, collected.stdout
    else:
        assert re.search(rf"^ *(ordinary )?{command}\b(?!-)", CHECK, re.MULTILINE)


def test_the_extras_are_there() -> None:
    named = set(re.findall(r"pip install 'pidpool\[(\w+)\]'", README))
    assert named == {"cli", "demo", "endpoint", "otel"}
    assert named <= set(importlib.metadata.metadata("pidpool").get_all("Provides-Extra") or ())


def test_no_command_is_left_out() -> None:
    known = ("pidpool ", "make ", "pip install 'pidpool[")
    assert [each for each in COMMANDS if not each.startswith(known)] == []


@pytest.mark.parametrize("program", blocks("python"))
def test_a_program_runs(program: str, postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    done = run([sys.executable, "-W", "error", "-c", program.replace(URL, postgres.url(tls=True))], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("1\n" if "print" in program else "")


def table(heading: str) -> Iterator[list[str]]:
    """Return the rows of the table that begins so, as their cells."""
    rows = README[README.index(heading) :].splitlines()
    for row in rows[2:]:
        if not row.startswith("|"):
            return
        yield [cell.strip() for cell in row.strip("|").split(" | ")]


def test_every_option_is_in_the_table() -> None:
    parameters = inspect.signature(PidPool.__init__).parameters
    of_queue_pool = {"self", "creator", "pool_size", "max_overflow", "timeout", "use_lifo", "options"}
    described = {row[0].strip("| `"): row[2].strip("`") for row in table("| option | takes")}
    assert described.pop("pool_logging_name") == "host:port/database"  # QueuePool's, with another default
    assert described.keys() == parameters.keys() - of_queue_pool
    for name, default in described.items():
        assert default in (
            repr(parameters[name].default).replace("'", '"'),
            'structlog.get_logger("pidpool")',
        )


def test_every_event_is_in_the_table() -> None:
    described = set()
    for row in table("| event | level"):
        first, *more = re.findall(r"`([\w.]+)`", row[0])
        described.add(first)
        described |= {first.partition(".")[0] + each if each.startswith(".") else each for each in more}
    assert described == set(LEVELS_AND_FIELDS)


def test_every_metric_of_the_table_is_exposed() -> None:
    from pidpool import StatsApp

    engine = create_engine("sqlite:///a.db", poolclass=PidPool)
    status: list[str] = []
    body = b"".join(
        StatsApp(engine)(
            {"REQUEST_METHOD": "GET", "PATH_INFO": "/metrics", "HTTP_HOST": "localhost"},
            lambda code, headers, *error: status.append(code),  # type: ignore[arg-type,return-value]
        )
    ).decode()
    assert status == ["200 OK"]
    exposed = set(re.findall(r"^# TYPE (\w+) ", body, re.MULTILINE))
    described = set()
    for row in table("| metric | |"):
        first, *more = re.findall(r"`(\w+)`", row[0])
        described.add(first)
        described |= {"db_client_connection" + each if each.startswith("_") else each for each in more}
    # If the server has been asked, and with a limit.
    optional = {
        "pidpool_server_max_connections",
        "pidpool_family_limit",
        "pidpool_permits",
        "pidpool_wanting",
    }
    assert {each.removesuffix("_total") for each in described - optional} <= {
        each.removesuffix("_total") for each in exposed
    }
