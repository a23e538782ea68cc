"""The table of what the hosts did, printed after the tests."""

from __future__ import annotations

import pytest
from hosting import TABLE


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for row in config.stash.get(TABLE, []):
        terminalreporter.write_line(row)
