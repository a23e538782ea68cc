"""The pages of the documentation, as tests read them: their programs, files, commands and tables.

In a page a fenced block is one of these:

``sh``       commands to try, one a line: `pip`, `make` or `pidpool`
``console``  commands after ``$ ``, each followed by what it prints; ``...`` stands for anything, and a
             command whose line ends with a backslash goes on in the next one
``python``   a program, or a file if its first line is ``# name.py``
anything     a file if its first line is a comment with its name
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)

URL = "postgresql+psycopg2://app@127.0.0.1/app"
"""The database of every page's programs."""

_BLOCK = re.compile(r"^```([\w-]+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_COMMAND = re.compile(r"((?:[^\n]*\\\n)*[^\n]*)\n(.*)", re.DOTALL)
_FILE = re.compile(r"(?:#|;|//|--) ([\w./-]+\.\w+)\n")


@dataclass(frozen=True)
class Step:
    """A command of a transcript, and the lines that it prints."""

    command: str
    output: str

    def prints(self, output: str) -> bool:
        """Whether this is what the page shows."""
        pattern = re.escape(self.output.rstrip("\n")).replace(re.escape("..."), ".*")
        return re.fullmatch(pattern, output.rstrip("\n"), re.DOTALL) is not None


def blocks(page: Path, under: str | None = None) -> list[tuple[str, str]]:
    """Return the languages and texts of a page's blocks in their order, or of those under one heading."""
    text = page.read_text()
    if under is not None:
        sections = re.split(r"^## ", text, flags=re.MULTILINE)
        (text,) = [section for section in sections if section.startswith(f"{under}\n")]
    return _BLOCK.findall(text)


def files(page: Path, under: str | None = None) -> dict[str, str]:
    """Return the files that a page has its reader write."""
    found = {}
    for _, text in blocks(page, under):
        named = _FILE.match(text)
        if named:
            found[named[1]] = text
    return found


def programs(page: Path) -> list[str]:
    """Return the programs that run by themselves."""
    return [text for language, text in blocks(page) if language == "python" and not _FILE.match(text)]


def commands(page: Path) -> list[str]:
    """Return the commands to try."""
    return [line for language, text in blocks(page) if language == "sh" for line in text.splitlines()]


def steps(page: Path, under: str | None = None) -> list[Step]:
    """Return a page's transcript."""
    found: list[Step] = []
    for language, text in blocks(page, under):
        for part in re.split(r"^\$ ", text, flags=re.MULTILINE) if language == "console" else ():
            if part:
                command, output = _COMMAND.fullmatch(part).groups()
                found.append(Step(command, output))
    return found


def table(page: Path, heading: str) -> Iterator[list[str]]:
    """Return the rows of the table that begins so, as their cells."""
    text = page.read_text()
    rows = text[text.index(heading) :].splitlines()
    for row in rows[2:]:
        if not row.startswith("|"):
            return
        yield [cell.strip() for cell in row.strip("|").split(" | ")]
