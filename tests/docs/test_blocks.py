"""No block of code and no command of the README and of the documentation escapes the tests."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pages
import pytest

EVERYTHING = [
    pages.README,
    *(pages.ROOT / f"{name}.md" for name in ("CONTRIBUTING", "SECURITY", "CHANGELOG")),
]
EVERYTHING += pages.PAGES

RUN_BY = {
    "sh": "test_programs.py, but for pip's: test_reference.py compares these with what is installed",
    "console": "test_guides.py, or a test in tests/applications/ if it is an application's guide",
    "python": "test_programs.py, or as a file of a guide",
    "shell": "tests/tools/test_cli.py: completion in three shells",
}
OF_SPHINX = {"{toctree}", "{eval-rst}", "{metrics-table}"}
"""What `make docs` runs."""


def fences(page: Path) -> list[tuple[str, str]]:
    """Return what stands behind the backticks, and the text, of every block, whether or not it is run."""
    found = []
    info, text = None, ""
    for line in page.read_text().splitlines(keepends=True):
        if not line.lstrip().startswith(("```", "~~~", ":::")):
            text += line
        elif info is None:
            info, text = line.strip().lstrip("`~:"), ""
        else:
            found.append((info, text))
            info = None
    assert info is None, f"{page} has a block without an end"
    return found


@pytest.mark.parametrize("page", EVERYTHING, ids=lambda page: page.stem)
def test_every_block_is_run_by_a_test(page: Path) -> None:
    files = pages.files(page)
    for info, text in fences(page):
        assert info in RUN_BY or info in OF_SPHINX or text in files.values(), (info, text)
    read = [(info, text) for info, text in fences(page) if info not in OF_SPHINX]
    assert read == pages.blocks(page), "a block is not where the tests look for one"
    commands = [step.command for step in pages.steps(page)]
    for name, text in files.items():
        others = [*commands, *(other for other in files.values() if other is not text)]
        assert any(Path(name).stem in other for other in others), f"nothing uses {name}"


@pytest.mark.parametrize("page", EVERYTHING, ids=lambda page: page.stem)
def test_no_code_is_written_as_an_indented_block(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"\n\n {4,}\S.*", text) == []


INLINE = sorted(
    {
        " ".join(command.split())
        for page in EVERYTHING
        for command in re.findall(
            r"`((?:[A-Z_]+=\S+ )*(?:pidpool|make|python -m pidpool)(?: [^`]*)?)`", page.read_text()
        )
    }
)


@pytest.mark.parametrize("command", [each for each in INLINE if "make" in each])
def test_a_target_in_a_sentence_is_there(command: str) -> None:
    words = shlex.split(command.replace("<seed>", "1"))
    done = subprocess.run(
        ["make", "--dry-run", *words[words.index("make") + 1 :]],
        cwd=pages.ROOT,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [each for each in INLINE if "make" not in each])
def test_a_command_in_a_sentence_takes_its_options(command: str) -> None:
    words = shlex.split(command.removeprefix("python -m "))[1:]
    done = subprocess.run(
        [sys.executable, "-m", "pidpool", *words[:1], "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    for option in words[1:]:
        assert not option.startswith("-") or option in done.stdout
