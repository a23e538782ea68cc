"""Runs every question, each in a process of its own, and writes the results: ``python -m bench``.

``--quick`` only sees that everything runs and has few numbers behind each median; it prints its results
and writes them only where ``--results DIRECTORY`` says.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from bench import profile, report
from bench.harness import RESULTS, Answer, Scale, argument

QUESTIONS = (
    "cycle",
    "threads",
    "select_one",
    "first_row",
    "fork_price",
    "events",
    "memory",
    "growth",
    "scrape",
    "configured",
    "async_cycle",
)


def _ask(question: str, quick: bool) -> Answer:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "answer.json")
        command = [sys.executable, "-m", f"bench.{question}", "--json", str(file)]
        subprocess.run([*command, *(["--quick"] if quick else [])], check=True)
        return Answer.from_json(file.read_text())


def run(scale: Scale, directory: Path | None) -> None:
    console = Console(stderr=True)
    answers = []
    for question in QUESTIONS:
        console.print(f"bench.{question} ...", style="dim")
        answers.append(_ask(question, scale.quick))
    report.print_answers(answers)
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        report.write_markdown(answers, directory / "table.md")
        report.write_plot(answers, directory / "plot.svg")
        profile.write(scale, directory)


if __name__ == "__main__":
    quick = "--quick" in sys.argv
    chosen = argument("--results", None if quick else str(RESULTS))
    run(Scale(quick), None if chosen is None else Path(chosen))
