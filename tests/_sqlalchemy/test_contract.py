"""A private name of SQLAlchemy's that pidpool relies on is renamed: importing pidpool, or making a pool, says
which one, instead of going on without a hook that is never called."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import sqlalchemy
from sqlalchemy.pool import base

from pidpool._sqlalchemy import contract, copies

RECORD = ("fairy_ref", "finalize_callback", "fresh", "starttime", "_soft_invalidate_time", "_checkin_failed")
FAIRY = ("_connection_record", "_counter", "_checkin", "_reset", "_finalize_fairy", "_ConnectionFairy")
POOL = (
    *("_create_connection", "_should_wrap_creator", "_invoke_creator", "_close_connection", "_invalidate"),
    *("_return_conn", "_dialect", "_reset_on_return", "_recycle", "_pre_ping", "_invalidate_time"),
    *("_creator", "_orig_logging_name", "_ConnectionRecord", "reset_rollback", "get_connection"),
)
QUEUE_POOL = (
    *("_do_get", "_do_return_conn", "_queue_class"),
    *("_overflow", "_max_overflow", "_timeout", "QueueCommon", "_sqla_logger_namespace"),
)
EVENTS = ("_exec_once_mutex", "_exec_w_sync_once", "_exec_w_sync_on_first_run", "_CompoundListener")
# Renamed in one file alone, as the same word means other things elsewhere.
IN_ONE_FILE = {
    "__pool": "pool/base.py",
    "__connect": "pool/base.py",
    "__close": "pool/base.py",
    "_echo": "pool/base.py",
    "_checkout": "pool/base.py",
    "_pool": "pool/impl.py",
    "once": "util/langhelpers.py",
    "parent_listeners": "event/attr.py",
    "only_once": "util/langhelpers.py",
}
ASYNCIO = ("await_only", "greenlet_spawn", "_execute_mutex")
if not contract.FINALIZER_TAKES_REFERENCE:
    FAIRY = (*FAIRY, "_finalizer", "needs_gc", "is_gc_cleanup")

NAMES = [*RECORD, *FAIRY, *POOL, *QUEUE_POOL, *EVENTS, *ASYNCIO, *IN_ONE_FILE]

PROGRAM = """
import pidpool, sqlalchemy
engine = sqlalchemy.create_engine("sqlite:///:memory:", poolclass=pidpool.PidPool)
with engine.connect() as connection:
    connection.execute(sqlalchemy.text("select 1"))
print("works")
"""


class Patched:
    """A copy of SQLAlchemy in which names can be changed."""

    def __init__(self, folder: Path) -> None:
        spec = find_spec("sqlalchemy")
        assert spec is not None and spec.submodule_search_locations
        self._original = Path(spec.submodule_search_locations[0])
        self._copy = folder / "sqlalchemy"
        ignored = shutil.ignore_patterns("testing", "mssql", "oracle", "mysql")
        # With the compiled files, which stay valid: the times of the files are copied as well.
        shutil.copytree(self._original, self._copy, ignore=ignored)
        (self._copy / "dialects" / "mysql").mkdir(exist_ok=True)
        self._path = os.pathsep.join([str(folder), str(Path(contract.__file__).parents[2])])

    def run(self, name: str, file: str | None) -> subprocess.CompletedProcess[str]:
        changed = []
        word = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(name)}(?![A-Za-z0-9_])")
        for path in [self._copy / file] if file else self._copy.rglob("*.py"):
            text = path.read_text()
            renamed = word.sub(f"{name}_renamed", text)
            if renamed != text:
                changed.append(path)
                path.write_text(renamed)
        assert changed, f"SQLAlchemy has no {name}"
        try:
            return subprocess.run(
                [sys.executable, "-B", "-c", PROGRAM],
                env={**os.environ, "PYTHONPATH": self._path},
                capture_output=True,
                text=True,
                timeout=60,
            )
        finally:
            for path in changed:
                shutil.copy2(self._original / path.relative_to(self._copy), path)


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Patched:
    return Patched(tmp_path_factory.mktemp("patched"))


@pytest.mark.parametrize("name", NAMES)
def test_a_renamed_name_is_named(patched: Patched, name: str) -> None:
    done = patched.run(name, IN_ONE_FILE.get(name))
    assert done.returncode == 1, done.stdout
    error = done.stderr.splitlines()[-1]
    assert re.search(rf"{re.escape(name)}(?!_renamed)", error), done.stderr
    assert "works" not in done.stdout


def test_another_shape_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def checkin(self: object, was_created: bool = True) -> None: ...

    monkeypatch.setattr(base._ConnectionRecord, "checkin", checkin)
    with pytest.raises(
        contract.ContractBroken, match=r"checkin\(_fairy_was_created\).*has checkin\(was_created\)"
    ):
        contract._check_base()


def test_the_copies_are_used_with_the_versions_that_they_were_compared_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PIDPOOL_COPIES", raising=False)
    assert contract.use_copies() == sqlalchemy.__version__.startswith(("2.0.", "2.1."))
    monkeypatch.setattr(contract, "__version__", "2.2.0")
    assert not contract.use_copies()


def test_sqlalchemys_own_code_can_be_asked_for() -> None:
    program = "from pidpool._sqlalchemy import copies; print(copies.USED)"
    environment = {**os.environ, "PIDPOOL_COPIES": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "False\n", done.stderr
    assert (os.environ.get("PIDPOOL_COPIES") != "0" and contract.use_copies()) == copies.USED
