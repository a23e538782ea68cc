"""The public name of the OpenTelemetry export: ``pidpool.otel.instrument(engine)``.

The code is in `pidpool.export.opentelemetry`.
"""

from pidpool.export.opentelemetry import instrument

__all__ = ["instrument"]
