"""The documentation as built: readable in each look, without barriers or a network, with its search."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pages
import pytest
from browser import LOOKS, Browser, chromium, violations

pytestmark = pytest.mark.system

NAMES = [str(page.relative_to(pages.DOCS).with_suffix("")) for page in pages.PAGES]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("docs")
    arguments = ["--fail-on-warning", "--keep-going", "--quiet", "--builder", "html"]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *arguments, str(pages.DOCS), str(directory)],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def is_remote(url: str) -> bool:
    return url.startswith(("http:", "https:", "ws:", "wss:"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("look", ["light", "narrow dark"])
def test_every_page_is_free_of_barriers_and_fits(built: Path, browser: Browser, axe: str, look: str) -> None:
    browser.emulate(**LOOKS[look], prefers_reduced_motion="reduce")
    found = {}
    for name in NAMES:
        browser.go((built / f"{name}.html").as_uri())
        wrong = violations(browser, axe)
        if browser.run("document.documentElement.scrollWidth > window.innerWidth"):
            wrong.append("the page is wider than the window")
        if wrong:
            found[name] = wrong
    assert found == {}
    assert [url for url in browser.requested() if is_remote(url)] == []


def test_the_search_finds_the_error_without_a_network(built: Path, browser: Browser) -> None:
    browser.emulate()
    browser.go((built / "search.html").as_uri() + "?q=bad+record+mac")
    browser.wait_for("#search-results li a")
    assert "troubleshooting.html" in str(
        browser.run("[...document.querySelectorAll('#search-results li a')].map(a => a.href).join(' ')")
    )
    assert [url for url in browser.requested() if is_remote(url)] == []


def test_options_keep_their_hyphens(built: Path) -> None:
    page = (built / "reference" / "command-line.html").read_text()
    assert "--check" in page
    assert re.findall(r"–\w+", page) == []
