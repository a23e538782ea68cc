"""Runs SQLAlchemy's own pool and reconnect tests twice, with its QueuePool and with PidPool in its
place, and compares test by test: what passes with the one has to pass with the other.

    python tests/_sqlalchemy/suite.py                       # the newest 2.1 and the newest 2.0
    python tests/_sqlalchemy/suite.py --sqlalchemy 2.0.40   # one version
    DB_URL=postgresql://… python tests/_sqlalchemy/suite.py # on a PostgreSQL of yours

The tests come from SQLAlchemy's source distribution, and run against its wheel, in one virtual
environment per version with pidpool installed from this checkout. They run on PostgreSQL, over TLS,
and those for which the database matters on SQLite as well. The PostgreSQL is pidpool's embedded one;
with DB_URL, databases of the suite's own are created on that server, and dropped.

Needs nothing but the standard library, pip's package index and about 100 s. Exits with 0 when PidPool
passes, 1 when it does not, 2 when no such thing could be found out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import selectors
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent
PLUGIN = HERE / "suite_plugin.py"

TESTS = ("test/engine/test_pool.py", "test/engine/test_reconnect.py")
NEEDED_FROM_SDIST = ("test/", "setup.cfg", "pyproject.toml", "lib/sqlalchemy/testing/plugin/")
FEWEST_TESTS = 200  # both versions have 210 and more; fewer means that something was not collected

QUEUE_POOL = "sqlalchemy.pool:QueuePool"

NOT_RUN = "not run"
OUTCOMES = ("passed", "failed", "error", "hung", "skipped", "xfailed", "xpassed")

TIME_LIMIT = 170.0  # seconds for everything
RUN_LIMIT = 110.0  # seconds for one run of the tests; 32 are usual, most of them asleep
RERUN_LIMIT = 55.0  # a test that hangs is ended by the plugin after 40
LEAST_FOR_RERUN = 20.0  # 4 are usual
RERUNS = 2
MOST_RERUN = 10  # so many do not differ by chance

POSTGRES = """
import json, os, sys
from contextlib import ExitStack
from sqlalchemy import create_engine, make_url

names = sys.argv[1:]
with ExitStack() as stack:
    if "DB_URL" in os.environ:
        url = make_url(os.environ["DB_URL"])
    else:
        from pidpool.tools.demo.postgres import EmbeddedPostgres

        url = make_url(stack.enter_context(EmbeddedPostgres()).url(tls=True))
    url = url.set(drivername="postgresql+psycopg2")
    engine = create_engine(url, isolation_level="AUTOCOMMIT", pool_size=1)
    stack.callback(engine.dispose)
    with engine.connect() as connection:
        version = connection.exec_driver_sql("SHOW server_version").scalar()
        for name in names:
            connection.exec_driver_sql(f'CREATE DATABASE "{name}"')
            stack.callback(
                lambda name=name: engine.connect().exec_driver_sql(
                    f'DROP DATABASE "{name}" WITH (FORCE)'
                )
            )
    urls = [url.set(database=name).render_as_string(hide_password=False) for name in names]
    print(json.dumps({"version": version, "urls": urls}), flush=True)
    sys.stdin.read()  # until the suite is done, or dead
"""
"""Run in a virtual environment, because the suite's own interpreter need not have pidpool."""


class SuiteError(Exception):
    """The comparison could not be made."""


@dataclasses.dataclass(frozen=True)
class Deadline:
    """When the suite has to be over."""

    at: float

    def left(self, at_most: float) -> float:
        return max(0.1, min(at_most, self.at - time.monotonic()))


@dataclasses.dataclass(frozen=True)
class Environment:
    """One version of SQLAlchemy: its wheel, installed, and the tests from its sdist."""

    version: str
    python: Path
    source: Path
    logs: Path

    @property
    def name(self) -> str:
        return f"SQLAlchemy {self.version}"


@dataclasses.dataclass(frozen=True)
class Run:
    """What became of each test with one pool."""

    outcomes: Mapping[str, str]
    texts: Mapping[str, str]  # why a test failed
    pools_made: Mapping[str, int]
    pool: str  # full name of the class under test
    hung: str | None  # the test that the run was ended in
    log: Path

    def outcome(self, test: str) -> str:
        return self.outcomes.get(test, NOT_RUN)

    def text(self, test: str) -> str:
        return self.texts.get(test, "")

    def counts(self) -> Counter[str]:
        return Counter(self.outcomes.values())


@dataclasses.dataclass(frozen=True)
class Difference:
    """A test that came out differently, at the first try and each time when run by itself."""

    test: str
    queue_pool: str
    pidpool: str
    text: str

    @property
    def is_failure(self) -> bool:
        return self.queue_pool == "passed"

    def __str__(self) -> str:
        return f"{self.test}: {self.queue_pool} with QueuePool, {self.pidpool} with PidPool"


@dataclasses.dataclass(frozen=True)
class Comparison:
    environment: Environment
    queue_pool: Run
    pidpool: Run
    differences: Sequence[Difference]
    notes: Sequence[str]

    @property
    def passes(self) -> bool:
        return not any(difference.is_failure for difference in self.differences)


def tail(path: Path, lines: int = 25) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return "(no output)"
    return "\n".join(text.splitlines()[-lines:])


def clean_environ(**more: str) -> dict[str, str]:
    """This process's environment without what would change a run of Python, pytest or SQLAlchemy."""
    foreign = ("PYTHON", "PYTEST", "SQLALCHEMY", "VIRTUAL_ENV", "PG")
    return {key: value for key, value in os.environ.items() if not key.startswith(foreign)} | more


def call(
    command: Sequence[str | Path],
    log: Path,
    limit: float,
    *,
    cwd: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> int | None:
    """Run a command to its end and return its exit status, or None where `limit` seconds passed."""
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=clean_environ() if environ is None else environ,
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            process.kill()
            process.wait()


def prepare(wanted: str, pool: str, work: Path, deadline: Deadline) -> Environment:
    """Make the virtual environment of one version, and unpack its tests."""
    home = work / f"sqlalchemy-{wanted}"
    python = home / "venv" / "bin" / "python"
    logs = home / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)

    def step(what: str, *command: str | Path) -> str:
        log = logs / f"{what}.log"
        status = call(command, log, deadline.left(90))
        if status != 0:
            how = "did not end in time" if status is None else f"exit status {status}"
            raise SuiteError(f"{what} for SQLAlchemy {wanted}: {how}\n{tail(log)}")
        return log.read_text(encoding="utf-8")

    if not python.exists():
        step("venv", sys.executable, "-m", "venv", home / "venv")
    pip = (python, "-m", "pip", "--disable-pip-version-check")
    step(
        "install",
        *pip,
        "install",
        "--quiet",
        f"sqlalchemy[asyncio]=={wanted}.*",
        "pytest>=8,<10",
        "setuptools>=77",  # for the metadata of the sdist, see below
        # pip installs a local directory afresh each time, so a kept environment has today's pidpool.
        f"pidpool[demo] @ {CHECKOUT.as_uri()}",
    )
    module = pool.partition(":")[0]
    found = step("version", python, "-c", f"import sqlalchemy, {module}; print(sqlalchemy.__version__)")
    version = found.split()[-1]
    # pip downloads no sdist without asking its build backend for metadata. Without build isolation
    # that takes the setuptools at hand and neither Cython nor a build.
    step(
        "sdist",
        *pip,
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary=sqlalchemy",
        "--no-build-isolation",
        f"--dest={home}",
        f"sqlalchemy=={version}",
    )
    archives = list(home.glob(f"[sS][qQ][lL]*-{version}.tar.gz"))
    if len(archives) != 1:
        raise SuiteError(f"no source distribution of SQLAlchemy {version}: pip left {archives}")
    source = home / archives[0].name.removesuffix(".tar.gz")
    shutil.rmtree(source, ignore_errors=True)
    with tarfile.open(archives[0]) as archive:
        members = [m for m in archive if m.name.partition("/")[2].startswith(NEEDED_FROM_SDIST)]
        archive.extractall(home, members, filter="data")
    shutil.copy(PLUGIN, home)  # alone, so that nothing else of our tests can be imported
    return Environment(version, python, source, logs)


@contextlib.contextmanager
def postgres(
    python: Path, databases: Sequence[str], log: Path, deadline: Deadline
) -> Iterator[tuple[str, list[str]]]:
    """Give the server's version and the URL of each database; they are gone at the end."""
    with log.open("w", encoding="utf-8") as output:
        server = subprocess.Popen(
            [python, "-c", POSTGRES, *databases],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            cwd=log.parent,
            env=clean_environ(),
        )
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(server.stdout, selectors.EVENT_READ)
                line = server.stdout.readline() if selector.select(deadline.left(45)) else b""
            if not line:
                whose = "at DB_URL" if "DB_URL" in os.environ else "from pidpool.tools.demo.postgres"
                raise SuiteError(f"there is no PostgreSQL {whose}:\n{tail(log)}")
            answer = json.loads(line)
            yield answer["version"], answer["urls"]
        finally:
            server.stdin.close()
            try:
                server.wait(15)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
            server.stdout.close()


def run_tests(
    environment: Environment,
    pool: str,
    database: str,
    deadline: Deadline,
    *,
    label: str,
    limit: float = RUN_LIMIT,
    only: Sequence[str] = (),
) -> Run:
    """Run the tests with one pool, all of them or `only` some."""
    log, lines, stacks = (environment.logs / f"{label}.{kind}" for kind in ("log", "jsonl", "stacks"))
    status = call(
        [
            environment.python,
            "-s",  # or SQLAlchemy's conftest puts the sdist's lib before the wheel
            "-B",
            "-m",
            "pytest",
            "-p",
            PLUGIN.stem,
            "-p",
            "no:cacheprovider",
            "--tb=short",
            # The first is the one that tests without a database of their own use. With SQLite in
            # memory that would be a SingletonThreadPool, and nothing to compare.
            f"--dburi={database}",
            "--dburi=sqlite://",
            *TESTS,
        ],
        log,
        deadline.left(limit),
        cwd=environment.source,
        environ=clean_environ(
            PYTHONPATH=str(environment.source.parent),
            SQLALCHEMY_SUITE_POOL=pool,
            SQLALCHEMY_SUITE_OUTCOMES=str(lines),
            SQLALCHEMY_SUITE_STACKS=str(stacks),
            SQLALCHEMY_SUITE_ONLY=json.dumps(only),
        ),
    )
    outcomes: dict[str, str] = {}
    texts: dict[str, str] = {}
    end: dict[str, object] = {}
    running = None
    for text in lines.read_text(encoding="utf-8").splitlines() if lines.exists() else ():
        line = json.loads(text)
        if line["when"] == "end":
            end = line
        elif line["when"] == "begin":
            running = line["test"]
        else:
            test = line["test"]
            # A later phase says more only when it failed: the teardown of a failed test passes.
            if line["outcome"] != "passed" or test not in outcomes:
                outcomes[test] = line["outcome"]
                texts[test] = line["text"]
            if line["when"] == "teardown":
                running = None
    if running is not None and not end:
        outcomes[running] = "hung"
        texts[running] = tail(stacks, 60) or f"ended after {limit:.0f} s"
    elif status not in (0, 1, 5) or not end:  # passed, failed, nothing to run
        how = "did not end in time" if status is None else f"ended with status {status}"
        raise SuiteError(f"{environment.name} with {pool}: pytest {how}\n{tail(log)}")
    made = end.get("pools_made")
    return Run(
        outcomes=outcomes,
        texts=texts,
        pools_made=made if isinstance(made, dict) else {},
        pool=str(end.get("pool", pool.replace(":", "."))),
        hung=running if not end else None,
        log=log,
    )


def check_queue_pool(environment: Environment, run: Run) -> None:
    """Refuse to compare with a run that says nothing."""
    if run.hung is not None:
        raise SuiteError(f"{environment.name} with its own QueuePool hung in {run.hung}: see {run.log}")
    passed = [test for test, outcome in run.outcomes.items() if outcome == "passed"]
    if len(passed) < FEWEST_TESTS:
        raise SuiteError(
            f"{environment.name} with its own QueuePool passed {len(passed)} tests; "
            f"at least {FEWEST_TESTS} are expected\n{tail(run.log)}"
        )
    if not any("RealReconnectTest_postgresql" in test for test in passed):
        raise SuiteError(f"{environment.name}: the reconnect tests did not run on PostgreSQL")


def check_pidpool(environment: Environment, run: Run) -> None:
    """Prove that the pool under test was used, and nothing else in QueuePool's place.

    A run that hung has counted nothing, and fails without that.
    """
    if run.hung is not None:
        return
    made = run.pools_made.get(run.pool, 0)
    strays = run.pools_made.get("sqlalchemy.pool.impl.QueuePool", 0)
    if not made or strays:
        raise SuiteError(
            f"{environment.name} was not tested with {run.pool}: it made {made} of them "
            f"and {strays} plain QueuePools"
        )


def run_again(
    difference: Difference, run: Callable[..., Run], deadline: Deadline
) -> tuple[Difference | None, str | None]:
    """Run one test by itself with both pools, till they agree or RERUNS times."""
    test = difference.test
    for number in range(1, RERUNS + 1):
        if deadline.left(RERUN_LIMIT) < LEAST_FOR_RERUN:
            return difference, f"no time left for rerun {number} of {test}"
        with ThreadPoolExecutor(2) as threads:
            one, two = threads.map(functools.partial(run, only=[test]), ("QueuePool", "PidPool"))
        if one.outcome(test) == two.outcome(test):
            return None, f"{difference}; {one.outcome(test)} with both in rerun {number}, by itself"
        text = two.text(test) or difference.text
        difference = Difference(test, one.outcome(test), two.outcome(test), text)
    return difference, None


def compare(environment: Environment, pool: str, databases: Sequence[str], deadline: Deadline) -> Comparison:
    """Run everything with both pools, then each test that differs by itself."""

    def run(name: str, *, label: str, only: Sequence[str] = ()) -> Run:
        return run_tests(
            environment,
            QUEUE_POOL if name == "QueuePool" else pool,
            databases[0] if name == "QueuePool" else databases[1],
            deadline,
            label=f"{label}-{name}",
            limit=RERUN_LIMIT if only else RUN_LIMIT,
            only=only,
        )

    stock = run("QueuePool", label="all")
    check_queue_pool(environment, stock)
    ours = run("PidPool", label="all")
    check_pidpool(environment, ours)

    tests = dict.fromkeys((*stock.outcomes, *ours.outcomes))
    differences = [
        Difference(test, stock.outcome(test), ours.outcome(test), ours.text(test) or stock.text(test))
        for test in tests
        if stock.outcome(test) != ours.outcome(test)
    ]
    notes = []
    if ours.hung is not None:
        notes.append(f"PidPool's run was ended in {ours.hung}; the tests after it were not run")
    if len(differences) > MOST_RERUN:
        notes.append(f"{len(differences)} tests differ: none was run again")
        return Comparison(environment, stock, ours, differences, notes)

    still = []
    for index, difference in enumerate(differences):
        after, note = run_again(difference, functools.partial(run, label=f"rerun-{index}"), deadline)
        still.extend(filter(None, [after]))
        notes.extend(filter(None, [note]))
    return Comparison(environment, stock, ours, still, notes)


def report(comparison: Comparison, databases: str) -> str:
    """Render one version's result, the reasons for each difference included."""
    lines = [
        f"{comparison.environment.name} on {databases}",
        f"  {'':10}" + "".join(map("{:>9}".format, OUTCOMES)),
    ]
    for name, run in (("QueuePool", comparison.queue_pool), ("PidPool", comparison.pidpool)):
        counts = run.counts()
        # A run that hung has not reported how many.
        made = run.pools_made.get(run.pool, "?")
        lines.append(
            f"  {name:10}"
            + "".join(f"{counts[outcome]:>9}" for outcome in OUTCOMES)
            + f"   {made} pools made"
        )
    lines.extend(f"  note: {note}" for note in comparison.notes)
    for difference in comparison.differences:
        lines.append(f"  {'FAILS' if difference.is_failure else 'differs'}: {difference}")
        lines.extend(f"      {line[:300]}" for line in difference.text.splitlines()[-40:])
    if not comparison.differences:
        lines.append("  no test differs")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--sqlalchemy",
        action="append",
        metavar="VERSION",
        help="2.1, or 2.0.40; may be given several times (default: 2.1 and 2.0)",
    )
    parser.add_argument(
        "--pool",
        default="pidpool:PidPool",
        metavar="MODULE:CLASS",
        help="the pool to test (default: %(default)s)",
    )
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="work in this directory, and leave the environments and the full logs there",
    )
    options = parser.parse_args(arguments)
    versions = list(dict.fromkeys(options.sqlalchemy or ("2.1", "2.0")))
    deadline = Deadline(time.monotonic() + TIME_LIMIT)
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        if options.keep is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sqlalchemy-suite-")))
        else:
            work = options.keep.resolve()
            work.mkdir(parents=True, exist_ok=True)
        # One thread per version, and no more runs at a time: some of the tests measure time.
        threads = stack.enter_context(ThreadPoolExecutor(len(versions)))
        prepared = threads.map(lambda wanted: prepare(wanted, options.pool, work, deadline), versions)
        environments = list(prepared)
        print(f"environments ready after {time.monotonic() - started:.0f} s", flush=True)
        # A database per run: the suite empties the one that it is given.
        names = [f"sqlalchemy_suite_{os.getpid()}_{number}" for number in range(2 * len(versions))]
        server, urls = stack.enter_context(
            postgres(environments[0].python, names, work / "postgres.log", deadline)
        )
        compared = threads.map(
            lambda environment, *databases: compare(environment, options.pool, databases, deadline),
            environments,
            urls[::2],
            urls[1::2],
        )
        passes = True
        for comparison in compared:
            print(report(comparison, f"PostgreSQL {server} and SQLite"), flush=True)
            passes = passes and comparison.passes
    print(f"{'passed' if passes else 'FAILED'} after {time.monotonic() - started:.0f} s")
    return 0 if passes else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SuiteError as error:
        print(f"sqlalchemy_suite: {error}", file=sys.stderr)
        sys.exit(2)
