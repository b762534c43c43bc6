"""What a metric is: its definition stands in the module that fills it, and `catalogue` gathers them into a page.

Histograms are classic ones. Labels take values from a small set that the module's definitions name, never from a
caller.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client import Metric as Family
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

ROWS: Final = (1, 2, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
"""Buckets of rows in a decoding step."""


class Kind(enum.StrEnum):
    """The type, as Prometheus calls it."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric under the name that queries use. `unit` is for the reader: "seconds", "tokens"; "" counts things."""

    name: str
    kind: Kind
    text: str
    unit: str = ""
    labels: Sequence[str] = ()
    buckets: Sequence[float] = ()

    def counter(self, registry: CollectorRegistry) -> Counter:
        """Return a counter in the registry."""
        assert self.kind is Kind.COUNTER, f"{self.name} is a {self.kind}"
        return Counter(self.name, self.text, self.labels, registry=registry)

    def gauge(self, registry: CollectorRegistry) -> Gauge:
        """Return a gauge in the registry."""
        assert self.kind is Kind.GAUGE, f"{self.name} is a {self.kind}"
        return Gauge(self.name, self.text, self.labels, registry=registry)

    def histogram(self, registry: CollectorRegistry) -> Histogram:
        """Return a histogram in the registry."""
        assert self.kind is Kind.HISTOGRAM, f"{self.name} is a {self.kind}"
        return Histogram(self.name, self.text, self.labels, buckets=self.buckets, registry=registry)

    def counter_family(self) -> CounterMetricFamily:
        """Return an empty family, for a collector of one's own."""
        assert self.kind is Kind.COUNTER, f"{self.name} is a {self.kind}"
        return CounterMetricFamily(self.name, self.text, labels=self.labels)

    def gauge_family(self) -> GaugeMetricFamily:
        """Return an empty family, for a collector of one's own."""
        assert self.kind is Kind.GAUGE, f"{self.name} is a {self.kind}"
        return GaugeMetricFamily(self.name, self.text, labels=self.labels)

    def histogram_family(self) -> HistogramMetricFamily:
        """Return an empty family, for a collector of one's own."""
        assert self.kind is Kind.HISTOGRAM, f"{self.name} is a {self.kind}"
        return HistogramMetricFamily(self.name, self.text, labels=self.labels)


def counter(name: str, text: str, labels: Sequence[str] = (), unit: str = "") -> Metric:
    """Define a counter; its name ends in _total."""
    assert name.endswith("_total"), f"{name} must end in _total"
    return Metric(name=name, kind=Kind.COUNTER, text=text, labels=labels, unit=unit)


def gauge(name: str, text: str, labels: Sequence[str] = (), unit: str = "") -> Metric:
    """Define a gauge."""
    return Metric(name=name, kind=Kind.GAUGE, text=text, labels=labels, unit=unit)


def histogram(
    name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = (), unit: str = "seconds"
) -> Metric:
    """Define a histogram."""
    return Metric(name=name, kind=Kind.HISTOGRAM, text=text, labels=labels, unit=unit, buckets=buckets)


def described(*metrics: Metric) -> list[Family]:
    """Return what a collector of one's own describes itself with, so that the registry refuses a name given twice."""
    families: dict[Kind, Callable[[Metric], Family]] = {
        Kind.COUNTER: Metric.counter_family,
        Kind.GAUGE: Metric.gauge_family,
        Kind.HISTOGRAM: Metric.histogram_family,
    }
    return [families[metric.kind](metric) for metric in metrics]
