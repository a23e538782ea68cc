"""A fork while a thread begins or ends its use of OpenSSL: no child waits for ever for OpenSSL's lock."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pidpool.tools.demo.postgres import EmbeddedPostgres

PROGRAM = Path(__file__).parents[1] / "programs" / "openssl_locked.py"


@pytest.mark.usefixtures("clean_log")
@pytest.mark.parametrize(
    ("what", "seen"),
    [
        ("ends", "0 left the list without the GIL"),
        ("forked thread", "used"),
        ("other thread", "not free within 1.0 s; end pid"),
    ],
)
def test_a_fork_beside_a_thread_that_ends_leaves_no_child_waiting(
    postgres: EmbeddedPostgres, what: str, seen: str
) -> None:
    """Threads of a pool are never in the middle. Of others, the thread that forked does not wait."""
    # Python 3.12 and later warn of a fork beside threads.
    program = [sys.executable, "-W", "ignore::DeprecationWarning", str(PROGRAM), postgres.url(tls=True), what]
    done = subprocess.run(program, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    assert seen in line if what == "other thread" else seen == line
