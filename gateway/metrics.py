"""What the gateway does, as Prometheus shows it: counted in plain numbers, put into Prometheus' form when it is asked for.

tunegate_http_requests_total{resource,method,status}      by the first part of the path behind /v1/
tunegate_http_request_seconds{resource}                   from the first byte read to the last one sent
tunegate_in_flight{who}                                   replies under way: live, batch
tunegate_tokens_total{model,kind,what}                    what: input, output, cached
tunegate_replies_total{model,kind}
tunegate_keys                                             that are not revoked
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from gateway.inference import Inference
    from gateway.metering import Meter

BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class RequestMetrics(Collector):
    """`observe` at each request's end; it costs about a microsecond."""

    def __init__(self, inference: Inference, meter: Meter, n_keys: Callable[[], int]) -> None:
        self._inference, self._meter, self._n_keys = inference, meter, n_keys
        self._counts: dict[tuple[str, str, int], int] = {}
        self._buckets: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, resource: str, method: str, status: int, took_s: float) -> None:
        """`resource` and `method` must be of a bounded set: each is a series of its own."""
        slot = (resource, method, status)
        self._counts[slot] = self._counts.get(slot, 0) + 1
        buckets = self._buckets.get(resource)
        if buckets is None:
            buckets = self._buckets[resource] = [0] * (len(BOUNDS_S) + 1)
        buckets[bisect_left(BOUNDS_S, took_s)] += 1
        self._sums[resource] = self._sums.get(resource, 0.0) + took_s

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "tunegate_http_requests", "Requests answered", labels=("resource", "method", "status")
        )
        for (resource, method, status), count in self._counts.copy().items():
            requests.add_metric((resource, method, str(status)), count)
        yield requests
        seconds = HistogramMetricFamily("tunegate_http_request_seconds", "How long they took", labels=("resource",))
        for resource, buckets in self._buckets.copy().items():
            total, shown = 0, []
            for bound, count in zip([*map(str, BOUNDS_S), "+Inf"], list(buckets), strict=True):
                total += count
                shown.append((bound, float(total)))
            seconds.add_metric((resource,), shown, self._sums.get(resource, 0.0))
        yield seconds
        in_flight = GaugeMetricFamily("tunegate_in_flight", "Replies under way", labels=("who",))
        in_flight.add_metric(("live",), self._inference.live)
        in_flight.add_metric(("batch",), self._inference.in_flight - self._inference.live)
        yield in_flight
        tokens = CounterMetricFamily("tunegate_tokens", "Tokens", labels=("model", "kind", "what"))
        replies = CounterMetricFamily("tunegate_replies", "Replies", labels=("model", "kind"))
        for (model, kind), sums in self._meter.totals.copy().items():
            replies.add_metric((model, kind), sums.requests)
            for what, count in (
                ("input", sums.input_tokens),
                ("output", sums.output_tokens),
                ("cached", sums.cached_tokens),
            ):
                tokens.add_metric((model, kind, what), count)
        yield tokens
        yield replies
        yield GaugeMetricFamily("tunegate_keys", "Keys that are not revoked", value=self._n_keys())
