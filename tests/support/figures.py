"""Lines that tests record by `record_property(name, line)`, printed after all tests as a table."""

from __future__ import annotations

import pytest


def print_figures(terminalreporter: pytest.TerminalReporter, name: str, heading: str) -> None:
    """Print the lines of all tests that have run, those in processes of pytest-xdist included."""
    reports = [report for of_a_kind in terminalreporter.stats.values() for report in of_a_kind]
    properties = {pair for report in reports for pair in getattr(report, "user_properties", [])}
    lines = sorted(line for its_name, line in properties if its_name == name)
    for line in [heading, *lines] if lines else []:
        terminalreporter.write_line(line)
