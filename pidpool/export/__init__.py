"""A pool's figures for others: over HTTP, for Prometheus, for OpenTelemetry."""
