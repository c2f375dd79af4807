"""Metrics for Prometheus: how many rows each table has, and which version is live."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily

MEDIA_TYPE = "text/plain; version=0.0.4"


def render(counts: Mapping[str, int], live: str) -> bytes:
    """Return the counts (by table) and the name of the live version, in Prometheus's text format."""
    registry = CollectorRegistry()
    registry.register(_Counts(counts, live))
    return generate_latest(registry)


class _Counts:
    def __init__(self, counts: Mapping[str, int], live: str):
        self.counts, self.live = counts, live

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for table, count in self.counts.items():
            yield GaugeMetricFamily(f"kibitz_{table}", f"Number of {table.replace('_', ' ')}.", value=count)
        live = GaugeMetricFamily("kibitz_live", "The live version.", labels=["version"])
        live.add_metric([self.live], 1)
        yield live
