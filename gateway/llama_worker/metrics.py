"""What the worker counts, as Prometheus text. Written on the decode loop's thread, read on the HTTP thread."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STEP_KINDS = ("prompt", "decode")
STEP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Steps(Collector):
    """How long the calls of llama.cpp took. In bare lists, since every step counts: the library's own histogram takes locks."""

    def __init__(self) -> None:
        self._counts = {kind: [0] * (len(STEP_SECONDS) + 1) for kind in STEP_KINDS}
        self._sums = dict.fromkeys(STEP_KINDS, 0.0)

    def observe(self, kind: str, seconds: float) -> None:
        """One llama_decode of that kind."""
        self._counts[kind][bisect_left(STEP_SECONDS, seconds)] += 1
        self._sums[kind] += seconds

    def collect(self) -> Iterator[Metric]:
        """What the library asks at every scrape."""
        family = HistogramMetricFamily(
            "tunegate_worker_step_seconds", "Time of one llama_decode, by kind", labels=["kind"]
        )
        borders = [*map(str, STEP_SECONDS), "+Inf"]
        for kind, counts in self._counts.items():
            family.add_metric([kind], list(zip(borders, accumulate(counts), strict=True)), self._sums[kind])
        yield family


class Metrics:
    """The worker's gauges, counters and histograms, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.running = self._gauge("sequences_running", "Sequences that hold a place")
        self.waiting = self._gauge("requests_waiting", "Requests queued for a place")
        self.adapters = self._gauge("adapters", "Adapters registered")
        self.adapters_in_memory = self._gauge("adapters_in_memory", "Adapters in memory")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens computed")
        self.cached_tokens = self._counter("cached_tokens", "Prompt tokens taken from the prefix cache")
        self.generated_tokens = self._counter("generated_tokens", "Tokens generated")
        self.cache_bytes = self._gauge("prefix_cache_bytes", "Memory that saved prefixes take")
        self.cache_entries = self._gauge("prefix_cache_entries", "Saved prefixes")
        self.kv_positions = self._gauge("kv_positions_used", "KV positions that sequences hold")
        self.kv_capacity = self._gauge("kv_positions", "KV positions there are")
        self.moves = self._counter("sequences_moved", "Sequences moved to sit beside their group")
        self.turns = self._counter("adapter_turns", "Changes from one adapter's work to another's")
        self.loop_cpu = self._gauge("loop_cpu_seconds", "CPU time of the decode loop outside llama.cpp")
        self.http_cpu = self._gauge("http_cpu_seconds", "CPU time of the HTTP thread")
        self.finished = Counter(
            "tunegate_worker_sequences_finished", "Sequences that ended, by reason", ["reason"], registry=self._registry
        )
        self.steps = Steps()
        self._registry.register(self.steps)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)

    def _gauge(self, name: str, meaning: str) -> Gauge:
        return Gauge(f"tunegate_worker_{name}", meaning, registry=self._registry)

    def _counter(self, name: str, meaning: str) -> Counter:
        return Counter(f"tunegate_worker_{name}", meaning, registry=self._registry)
