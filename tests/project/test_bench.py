"""The benchmarks run, one by one, and their results have every row; no number is checked here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench import report
from bench.__main__ import QUESTIONS
from bench.harness import Answer, Panel, Row, Spread, alternate, ratios

ROOT = Path(__file__).parent.parent.parent

ROWS = {
    "cycle": [
        "against QueuePool",
        "against the documented recipe",
        "oslo.db",
        "against the floor",
        "NullPool",
    ],
    "threads": [
        f"{threads} threads: {what}"
        for threads in (4, 16, 64)
        for what in ("cycles a second", "99th percentile", "threads that starved", "QueuePool", "PidPool")
    ],
    "select_one": ["against QueuePool", "against NullPool's", "documented recipe", "oslo.db"],
    "first_row": ["against the documented way", "by the clock"],
    "fork_price": [
        "per inherited connection",
        "linear from 1 to 1,000",
        "without connections",
        "hook, 1 connection",
        *(f"os.fork(), {size} connections{what}" for size in (0, 10, 100) for what in ("", ", pages")),
    ],
    "events": ["an event", "structlog's own", "events off"],
    "memory": ["QueuePool, per connection", "PidPool, per connection"],
    "growth": [
        "1 to 1,000 connections",
        "1 to 256 processes: a cycle",
        "1 to 256 processes: the parent's next",
    ],
    "scrape": [
        *(f"{what}: 1, 64, 256 processes" for what in ("family_stats()", "/metrics", "/stats.json")),
        "a worker's cycle while polled",
        "against beside nobody",
    ],
    "configured": [
        "pre-ping",
        "recycle",
        *(f"a {name} listener" for name in ("checkout", "checkin", "reset")),
    ],
    "async_cycle": ["AsyncPidPool against AsyncAdaptedQueuePool", "with a statement"],
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=100)


@pytest.mark.parametrize("question", QUESTIONS)
def test_each_question_is_answered_with_every_row(question: str, tmp_path: Path) -> None:
    file = tmp_path / "answer.json"
    ran = run(f"bench.{question}", "--quick", "--json", str(file))
    assert ran.returncode == 0, ran.stderr
    answer = Answer.from_json(file.read_text())
    assert answer.question and len(answer.reading) > 100 and answer.panels
    for what in ROWS[question]:
        rows = [row for row in answer.rows if what in row.what]
        assert rows, f"no row about {what!r} in {[row.what for row in answer.rows]}"
        assert all(row.measured for row in rows)
    assert all(row.target for row in answer.rows if row.met is not None)


def test_the_profile_shows_the_parts_of_a_cycle(tmp_path: Path) -> None:
    ran = run("bench.profile", "--quick", "--results", str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    text = (tmp_path / "profile.md").read_text()
    assert "| the whole cycle |" in text and "## PidPool, " in text and "_finalize_fairy" in text


def test_the_results_are_written_as_markdown_and_as_a_plot(tmp_path: Path) -> None:
    answer = Answer(
        "Is it fast?",
        "Read it so.",
        [Row("PidPool", "0.9 ×", "at most 1 × QueuePool", True), Row("slow", "2 ×", "at most 1 ×", False)],
        [
            Panel("bars", "µs", ["PidPool", "QueuePool"], {"": [1.0, 2.0]}),
            Panel("lines", "µs", [1, 10], {"PidPool": [1.0, 10.0]}, "connections", True),
        ],
    )
    report.write_markdown([answer], tmp_path / "table.md")
    report.write_plot([answer], tmp_path / "plot.svg")
    assert "| PidPool | 0.9 × | at most 1 × QueuePool | met |" in (tmp_path / "table.md").read_text()
    assert "| slow | 2 × | at most 1 × | not met |" in (tmp_path / "table.md").read_text()
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_contenders_take_turns_and_are_compared_within_each_round() -> None:
    order: list[str] = []

    def contender(name: str, slow: float) -> float:
        order.append(name)
        # The machine is four times slower in the second half.
        return slow * (4.0 if len(order) > 42 else 1.0)

    measured = alternate({"a": lambda: contender("a", 1.0), "b": lambda: contender("b", 2.0)}, rounds=40)
    del order[:2]  # the first turn is not measured
    assert order.count("a") == order.count("b") == 40
    assert min(order[::2].count("a"), order[::2].count("b")) > 10
    assert ratios(measured["b"], measured["a"]) == Spread(2.0, 2.0, 2.0)
