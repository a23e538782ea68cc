"""A database for each application, and the figures, printed after the tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from applications import Application
from figures import print_figures

from pidpool.tools.demo.postgres import EmbeddedPostgres


@pytest.fixture
def application(postgres: EmbeddedPostgres, tmp_path: Path) -> Callable[[str, str], Application]:
    def make(name: str, pool: str) -> Application:
        directory = tmp_path / f"{name}_{pool}"
        directory.mkdir()
        return Application(name, pool, postgres, directory)

    return make


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    print_figures(terminalreporter, "application", "Applications by their database URL alone:")
