"""Runs the program `driver_forks.py`, and reads what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).parent.parent / "programs" / "driver_forks.py"
FORKS = 8
UNHARMED = {"forks": FORKS, "committed": FORKS, "failed": None, "found": FORKS}


def run(url: str, pool: str, ca: str = "-", **environment: str) -> dict[str, Any]:
    """Return what the program found."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), url, pool, ca],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines, done.stderr
    return dict(json.loads(lines[-1]))


def is_harmed(found: dict[str, Any]) -> bool:
    """Return whether the parent failed, or what it committed is not there."""
    return bool(found["failed"]) or found["found"] < found["committed"]
