"""The table of what the hosts did, printed after the tests."""

from __future__ import annotations

import pytest
from figures import print_figures
from hosting import HEADING


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    print_figures(terminalreporter, "host", HEADING)
