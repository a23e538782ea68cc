"""The exports of a pool's stats: over HTTP, for Prometheus, for OpenTelemetry."""
