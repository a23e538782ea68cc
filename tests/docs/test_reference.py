"""The reference pages agree with the code: options, events, metrics, names, fixed words; links work."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pages
import pytest
import sqlalchemy.pool.impl
from events import COUNTS, FAMILY, LEVELS_AND_FIELDS, TAG

import pidpool
import pidpool.otel
from pidpool import PidPool, terms
from pidpool.options.in_url import IN_URL
from pidpool.stats.metrics import DURATIONS, FAMILY_NUMBERS, NUMBERS, NUMBERS_BY

OPTIONS = pages.DOCS / "reference" / "options.md"
EVENTS = (pages.DOCS / "reference" / "events.md").read_text()
API = (pages.DOCS / "reference" / "api.md").read_text()
EVERYTHING = [pages.README, *pages.PAGES]


def test_every_option_is_in_the_table() -> None:
    parameters = inspect.signature(PidPool.__init__).parameters
    of_queue_pool = {"self", "creator", "pool_size", "max_overflow", "timeout", "use_lifo", "options"}
    described = {row[0].strip("| `"): row[2].strip("`") for row in pages.table(OPTIONS, "| option | takes")}
    assert described.pop("pool_logging_name") == "host:port/database"  # QueuePool's, with another default
    assert described.keys() == parameters.keys() - of_queue_pool
    for name, default in described.items():
        assert default in (
            repr(parameters[name].default).replace("'", '"'),
            'structlog.get_logger("pidpool")',
        )


def test_every_option_of_a_url_is_in_the_table() -> None:
    described = {
        name
        for row in pages.table(OPTIONS, "| in the URL | keyword")
        for name in re.findall(r"`(\w+)`", row[0])
    }
    assert described == set(IN_URL)


@pytest.mark.parametrize("event", LEVELS_AND_FIELDS)
def test_every_event_has_an_entry_with_its_level_and_fields(event: str) -> None:
    level, fields = LEVELS_AND_FIELDS[event]
    text = re.search(rf"^### `{re.escape(event)}`\n\n(.*?)(?=^#|\Z)", EVENTS, re.DOTALL | re.MULTILINE)
    assert text is not None
    first = text[1].partition(". ")[0]
    assert first.startswith(("DEBUG", "INFO", "WARNING"))
    assert level.upper() in text[1]
    named = set(re.findall(r"`(\w+)`", first))
    assert ("tag" in re.split(r"[, ]+", first)) == (fields >= TAG)
    assert fields - TAG <= named | {"reason"}
    assert {*COUNTS, *FAMILY} <= set(re.findall(r"`(\w+)`", EVENTS))


def test_no_event_is_described_that_is_not_there() -> None:
    assert set(re.findall(r"^### `([\w.]+)`", EVENTS, re.MULTILINE)) == set(LEVELS_AND_FIELDS)


def test_the_words_with_fixed_values_are_named() -> None:
    for words in (terms.CLOSE_REASONS, terms.STATES_AT_FORK, terms.SOCKET_ACTIONS, terms.TRIGGERS):
        for word in words:
            assert f"`{word}`" in EVENTS


def test_every_metric_is_in_the_table() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import metrics_table; print([row[0] for row in metrics_table.rows()])"],
        cwd=pages.DOCS,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert eval(done.stdout) == [
        each.name for table in (NUMBERS, NUMBERS_BY, DURATIONS, FAMILY_NUMBERS) for each in table
    ]


@pytest.mark.parametrize(
    "name", [*pidpool.__all__, *(f"pidpool.otel.{each}" for each in pidpool.otel.__all__)]
)
def test_every_public_name_is_in_the_api_reference(name: str) -> None:
    assert re.search(rf"^\.\. (auto\w+|py:data):: (pidpool\.)?{re.escape(name)}$", API, re.MULTILINE)


def test_the_extras_that_pages_name_are_there() -> None:
    named = {
        extra
        for page in EVERYTHING
        for extra in re.findall(r"pip install 'pidpool\[(\w+)\]'", page.read_text())
    }
    assert named >= {"cli", "demo", "endpoint", "otel"}
    assert named <= set(importlib.metadata.metadata("pidpool").get_all("Provides-Extra") or ())


def anchors(page: Path) -> dict[str, str]:
    """Return the sections of a page by what a link to their heading ends in."""
    sections = re.split(r"^#+ ", page.read_text(), flags=re.MULTILINE)[1:]
    headings = [section.partition("\n")[0].lower() for section in sections]
    slugs = [re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings]
    return dict(zip(slugs, sections, strict=True))


@pytest.mark.parametrize("page", EVERYTHING, ids=lambda page: page.stem)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([\w-]+))?\)", page.read_text()):
        file = page.parent / target if target else page
        assert file.exists(), file
        assert not anchor or anchor in anchors(file), (file, anchor)


def test_someone_with_the_error_text_alone_finds_the_cure() -> None:
    """The first click leads from the README to the entry with that text, the second one to the reasons."""
    readme = pages.README.read_text()
    error, anchor = re.findall(r"\[`(SSL error: [^`]*)`\]\(docs/troubleshooting.md#(.*)\)", readme)[0]
    entries = anchors(pages.DOCS / "troubleshooting.md")
    del entries["troubleshooting"]
    assert next(iter(entries)) == anchor
    assert entries[anchor].startswith(f"`{error}`")
    assert all("**Cause.**" in entry and "**Cure.**" in entry for entry in entries.values())
    assert "poolclass=PidPool" in entries[anchor].partition("**Cure.**")[2]
    assert "(forks.md)" in entries[anchor]


def test_the_error_texts_of_troubleshooting_are_those_of_the_code() -> None:
    """Those with a gap; the others are a server's or a driver's."""
    raised = [*Path(pidpool.__file__).parent.rglob("*.py"), Path(str(sqlalchemy.pool.impl.__file__))]
    code = re.sub(r'"\s*f?"', "", "".join(file.read_text() for file in raised))
    titles = re.findall(r"^## `(.*….*)`", (pages.DOCS / "troubleshooting.md").read_text(), re.M)
    assert len(titles) >= 5
    for title in titles:
        for part in re.sub(r"^\w+Error: |^\w+Broken: ", "", title).split("…"):
            assert part.strip() in code, title


def test_every_command_is_of_a_kind_that_is_tested() -> None:
    known = ("pidpool ", "make ", "pip install ")
    for page in EVERYTHING:
        assert [each for each in pages.commands(page) if not each.startswith(known)] == []


def test_what_pages_install_is_what_the_tests_run_with() -> None:
    """Also pidpool's extras; what a guide installs is installed when the guide is followed."""
    for page in EVERYTHING:
        for command in pages.commands(page):
            if command.startswith("pip install "):
                for word in shlex.split(command)[2:]:
                    importlib.metadata.version(re.split(r"[\[<>=]", word)[0])


LONGEST_LINE = 90
"""Characters of code that fit beside the sidebars."""


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.stem)
def test_no_line_of_code_is_cut_off_on_a_wide_page(page: Path) -> None:
    lines = [line for _, text in pages.blocks(page) for line in text.splitlines()]
    assert [line for line in lines if len(line) > LONGEST_LINE] == []
