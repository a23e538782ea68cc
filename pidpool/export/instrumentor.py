"""`PidPoolInstrumentor`: the entry point by which ``opentelemetry-instrument`` finds pidpool."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from opentelemetry.instrumentation.instrumentor import BaseInstrumentor  # type: ignore[attr-defined]

from pidpool.export.opentelemetry import instrument_all, uninstrument_all


class PidPoolInstrumentor(BaseInstrumentor):  # type: ignore[misc, unused-ignore]
    """Has the metrics of every pool of the process collected, those of pools that are made later included.

    ``opentelemetry-instrument`` calls it; ``OTEL_PYTHON_DISABLED_INSTRUMENTATIONS=pidpool`` turns it off. In
    code ``PidPoolInstrumentor().instrument(meter_provider=provider)`` does the same, by default for the
    provider of the process.
    """

    def instrumentation_dependencies(self) -> Collection[str]:
        """Return what has to be installed."""
        return ("sqlalchemy >= 2.0.31",)

    def _instrument(self, **options: Any) -> None:
        instrument_all(options.get("meter_provider"))

    def _uninstrument(self, **options: Any) -> None:
        uninstrument_all()
