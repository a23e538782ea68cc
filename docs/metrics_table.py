"""The directive ``metrics-table``: the metrics' reference, written from the table that all exporters use."""

from __future__ import annotations

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from pidpool.stats.metrics import DURATIONS, FAMILY_NUMBERS, NUMBERS, NUMBERS_BY

PROMETHEUS_SUFFIX = {"counter": "_total", "updowncounter": "", "gauge": "", "histogram": "_seconds"}


def in_prometheus(name: str, kind: str) -> str:
    """Return a metric's name as Prometheus has it."""
    return name.replace(".", "_") + PROMETHEUS_SUFFIX[kind]


def rows() -> list[tuple[str, str, str, str]]:
    """Return name, kind, attribute and description of each metric."""
    return [
        *((each.name, each.kind, "", each.description) for each in NUMBERS),
        *((each.name, each.kind, each.attribute, each.description) for each in NUMBERS_BY),
        *((each.name, "histogram", "", each.description) for each in DURATIONS),
        *((each.name, "gauge", "", each.description) for each in FAMILY_NUMBERS),
    ]


class MetricsTable(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        lines = [
            "```{list-table}",
            ":header-rows: 1",
            ":widths: 42 26 32",
            "",
            "* - name",
            "  - kind, by",
            "  - counts",
        ]
        for name, kind, attribute, description in rows():
            by = f", by `{attribute}`" if attribute else ""
            lines += [
                f"* - `{name}`<br>`{in_prometheus(name, kind)}`",
                f"  - {kind}{by}",
                f"  - {description}",
            ]
        lines.append("```")
        found = nodes.container()
        self.state.nested_parse(StringList(lines, "the table of metrics"), self.content_offset, found)
        return found.children


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("metrics-table", MetricsTable)
    return {"parallel_read_safe": True}
