"""The stats of a pool over HTTP: a page for people, JSON, and metrics for Prometheus.

`StatsApp` is mounted in a web application; `serve_stats` serves it beside one that has no web server.
"""

from pidpool.export.endpoint.app import StatsApp
from pidpool.export.endpoint.server import StatsServer, serve_stats

__all__ = ["StatsApp", "StatsServer", "serve_stats"]
