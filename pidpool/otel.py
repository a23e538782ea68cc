"""A pool's figures as OpenTelemetry metrics: ``pidpool.otel.instrument(engine)``."""

from pidpool.export.opentelemetry import instrument

__all__ = ["instrument"]
