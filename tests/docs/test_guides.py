"""Every guide can be followed: its files are written, its commands run in their order and print what the page
shows, on a real PostgreSQL with TLS whose log stays clean."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pages
import pytest
from following import Adapted, follow, shell, write_files

from pidpool.tools.demo.postgres import EmbeddedPostgres

OF_OTHER_PACKAGES = {"airflow", "mlflow", "superset"}
"""Applications with a virtual environment of their own; tests/applications/ runs them as the pages say."""
OF_THE_SYSTEM = {"pgbouncer", "rq"}
GUIDES = [page for page in pages.PAGES if pages.steps(page)]


def parameters() -> Iterator[object]:
    for page in GUIDES:
        if page.stem not in OF_OTHER_PACKAGES:
            marks = [pytest.mark.system] if page.stem in OF_THE_SYSTEM else []
            yield pytest.param(page, id=page.stem, marks=marks)


@pytest.mark.parametrize("page", list(parameters()))
def test_a_guide_can_be_followed(page: Path, postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    adapt = Adapted(lambda driver: postgres.url(driver=driver))
    write_files(pages.files(page), adapt, tmp_path)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:/usr/sbin:{os.environ['PATH']}"}
    environment.pop("PYTHONWARNINGS", None)
    mark = postgres.log_mark()
    with shell(tmp_path, environment) as bash:
        follow(bash, pages.steps(page), adapt, tmp_path)
    # A worker that ends without closing its own connections leaves that line, with every pool.
    harmed = [line for line in postgres.complaints(mark) if "Connection reset by peer" not in line]
    assert harmed == []


def test_every_guide_has_something_to_follow() -> None:
    guides = {page for page in pages.PAGES if page.parent.name == "guides" and page.stem != "index"}
    assert len(guides) >= 14
    assert guides <= set(GUIDES)


@pytest.mark.parametrize("name", sorted(OF_OTHER_PACKAGES))
def test_the_other_guides_are_followed_by_a_test_of_the_application(name: str) -> None:
    program = (pages.ROOT / "tests" / "applications" / f"test_{name}.py").read_text()
    assert f'"{name}.md"' in program
    assert "pages.steps(GUIDE" in program
