"""The public name of the Prometheus export: ``REGISTRY.register(pidpool.prometheus.PoolCollector(engine))``.

The code is in `pidpool.export.prometheus`; without a registry of the application's, see `pidpool.StatsApp`.
"""

try:
    from pidpool.export.prometheus import PoolCollector
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"pidpool.prometheus needs prometheus-client ({error}): pip install 'pidpool[endpoint]'",
        name=error.name,
    ) from error

__all__ = ["PoolCollector"]
