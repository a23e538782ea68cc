"""The answers as a table in the terminal, as Markdown and as a plot."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import contenders
from bench.harness import Answer, Panel, Row, machine

_COLOURS = {
    contenders.PID: "#0b6e4f",
    contenders.QUEUE: "#8d99ae",
    contenders.QUEUE_AGAIN: "#8d99ae",
    contenders.RECIPE: "#b56576",
    contenders.OSLO: "#e5989b",
    contenders.FLOOR: "#e9c46a",
    contenders.NULL: "#6d597a",
    contenders.PSYCOPG: "#457b9d",
    contenders.PSYCOPG2: "#a8dadc",
}


def verdict(row: Row) -> str:
    """Return whether a row met its target, in words; nothing where it has none."""
    return "" if row.met is None else "met" if row.met else "not met"


def print_answers(answers: Sequence[Answer]) -> None:
    # Wide enough for a log, where there is no terminal to ask.
    console = Console(width=None if sys.stdout.isatty() else 120)
    for answer in answers:
        table = Table(title=answer.question, title_justify="left", title_style="bold", expand=True)
        table.add_column("what", ratio=5)
        table.add_column("measured", ratio=4)
        table.add_column("target", ratio=4)
        table.add_column("", min_width=7)
        for row in answer.rows:
            style = {True: "green", False: "bold red", None: ""}[row.met]
            table.add_row(row.what, row.measured, row.target, f"[{style}]{verdict(row)}" if style else "")
        console.print(table)
    judged = [row for answer in answers for row in answer.rows if row.met is not None]
    met = sum(bool(row.met) for row in judged)
    console.print(f"{met} of {len(judged)} targets met; {machine()}")


def write_markdown(answers: Sequence[Answer], path: Path) -> None:
    lines = ["# What it costs to switch to PidPool", "", f"Measured by `make bench` with {machine()}.", ""]
    lines += [
        "Numbers are medians, with the quartiles in brackets. Ratios are PidPool's against the other's,"
    ]
    lines += ["round by round.", "", "![The numbers as a plot](plot.svg)"]
    for answer in answers:
        lines += ["", f"## {answer.question}", "", "| what | measured | target | |", "|---|---|---|---|"]
        lines += [f"| {row.what} | {row.measured} | {row.target} | {verdict(row)} |" for row in answer.rows]
        lines += ["", answer.reading]
    path.write_text("\n".join(lines) + "\n")


def write_plot(answers: Sequence[Answer], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    # The same numbers make the same file.
    matplotlib.rcParams["svg.hashsalt"] = "pidpool"
    from matplotlib import pyplot

    panels = [panel for answer in answers for panel in answer.panels]
    columns = 2
    rows = -(-len(panels) // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(12, 3.6 * rows), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, panel in zip(grid.flat, panels, strict=False):
        (_bars if isinstance(panel.x[0], str) else _lines)(axes, panel)
        axes.set_title(panel.title, loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    # matplotlib ends lines with spaces, which an editor would take away.
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def _bars(axes, panel: Panel) -> None:  # type: ignore[no-untyped-def]
    """Horizontal: one group for each name in `x`, one bar in it for each series."""
    height = min(0.8, 0.2 * len(panel.x)) / len(panel.series)
    for number, (name, values) in enumerate(panel.series.items()):
        at = [place + (number - (len(panel.series) - 1) / 2) * height for place in range(len(panel.x))]
        colours = [_COLOURS.get(each, _COLOURS.get(name, "#8d99ae")) for each in panel.x]
        bars = axes.barh(at, values, height=height * 0.9, color=colours, label=name)
        axes.bar_label(bars, fmt="{:,.3g}" if max(values) < 1000 else "{:,.0f}", padding=3, fontsize=8)
    axes.set_yticks(range(len(panel.x)), panel.x, fontsize=9)
    axes.set_ylim(len(panel.x) - 0.4, -0.6)
    axes.margins(x=0.15)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel(panel.y_label, fontsize=9)
    if len(panel.series) > 1:
        # Below: beside the bars there is no place that is free in every panel.
        axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=2)


def _lines(axes, panel: Panel) -> None:  # type: ignore[no-untyped-def]
    for name, values in panel.series.items():
        axes.plot(panel.x, values, marker="o", markersize=4, label=name, color=_COLOURS.get(name))
    if panel.logarithmic:
        axes.set_xscale("log")
        axes.set_yscale("log")
    else:
        axes.set_xscale("symlog")
        axes.set_ylim(bottom=0)
    axes.set_xlabel(panel.x_label, fontsize=9)
    axes.set_ylabel(panel.y_label, fontsize=9)
    axes.legend(fontsize=8, frameon=False)
