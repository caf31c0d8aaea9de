"""What the router decided and how each replica does, as Prometheus shows it. Read when it is asked for.

tunegate_requests_chosen_total{model,replica,why}     where requests went, and why there: only, warm, spilled, …
tunegate_requests_retried_total{model,replica}        that went on from here to another before their first byte
tunegate_replica_faults_total{model,replica,fault}    connect, lost, timeout, refused
tunegate_replica_busy_total{model,replica}            requests that it turned away
tunegate_replica_in_flight{model,replica}
tunegate_replica_ready{model,replica}                 1: it can be asked
tunegate_replica_breaker{model,replica,state}         1 for the state that it is in: closed, half_open, open
tunegate_replica_breaker_opened_total{model,replica}
tunegate_replica_adapters{model,replica}              tuned models that it has verified
tunegate_replicas_leaving{model}                      that answer their last requests
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from gateway.engines.breaker import BreakerState
from gateway.engines.catalog import Catalog
from gateway.engines.replica import Member, Replica

LABELS = ("model", "replica")


def register_routing(registry: CollectorRegistry, catalog: Catalog) -> None:
    """Shows all replicas of all bases and upstreams of the catalog, whichever there are when it is asked."""
    registry.register(_Routing(catalog))


class _Routing(Collector):
    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def describe(self) -> Iterable[Metric]:
        return ()  # nothing is asked of the engines before they are there

    def collect(self) -> Iterator[Metric]:
        chosen = CounterMetricFamily("tunegate_requests_chosen", "Requests by where they went", labels=(*LABELS, "why"))
        retried = CounterMetricFamily(
            "tunegate_requests_retried", "Requests that went on to another replica", labels=LABELS
        )
        faults = CounterMetricFamily(
            "tunegate_replica_faults", "Requests that failed by its fault", labels=(*LABELS, "fault")
        )
        busy = CounterMetricFamily("tunegate_replica_busy", "Requests that it turned away", labels=LABELS)
        in_flight = GaugeMetricFamily("tunegate_replica_in_flight", "Requests under way", labels=LABELS)
        ready = GaugeMetricFamily("tunegate_replica_ready", "Whether it can be asked", labels=LABELS)
        breaker = GaugeMetricFamily(
            "tunegate_replica_breaker", "State of its circuit breaker", labels=(*LABELS, "state")
        )
        opened = CounterMetricFamily("tunegate_replica_breaker_opened", "Times that its breaker opened", labels=LABELS)
        adapters = GaugeMetricFamily("tunegate_replica_adapters", "Tuned models that it has verified", labels=LABELS)
        leaving = GaugeMetricFamily(
            "tunegate_replicas_leaving", "Replicas that answer their last requests", labels=("model",)
        )
        now = time.monotonic()
        for model, member in self._members():
            labels = (model, member.name)
            for why, count in member.chosen.items():
                chosen.add_metric((*labels, why), count)
            for fault, count in member.faults.items():
                faults.add_metric((*labels, fault), count)
            for state in BreakerState:
                breaker.add_metric((*labels, state.value), member.breaker.state(now) is state)
            retried.add_metric(labels, member.retried)
            busy.add_metric(labels, member.busy)
            in_flight.add_metric(labels, member.in_flight)
            opened.add_metric(labels, member.breaker.opened)
            if isinstance(member, Replica):
                ready.add_metric(labels, member.engine.ready)
                adapters.add_metric(labels, member.verified_adapters)
        for base in self._catalog.bases:
            leaving.add_metric((base.name,), len(base.engine.leavers))
        yield from (chosen, retried, faults, busy, in_flight, ready, breaker, opened, adapters, leaving)

    def _members(self) -> Iterator[tuple[str, Member]]:
        for base in self._catalog.bases:
            for replica in base.engine.replicas:
                yield base.name, replica
        for upstream in self._catalog.upstreams:
            for server in upstream.servers:
                yield upstream.name, server
