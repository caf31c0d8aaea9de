"""What the worker counts, as Prometheus text. Written on the decode loop's thread, read on the HTTP thread."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STEP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    """The worker's gauges, counters and histograms, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        name = "tunegate_worker"
        self.running = Gauge(f"{name}_sequences_running", "Sequences that hold a place", registry=self._registry)
        self.waiting = Gauge(f"{name}_requests_waiting", "Requests queued for a place", registry=self._registry)
        self.adapters = Gauge(f"{name}_adapters", "Adapters in memory", registry=self._registry)
        self.prompt_tokens = Counter(f"{name}_prompt_tokens", "Prompt tokens computed", registry=self._registry)
        self.generated_tokens = Counter(f"{name}_generated_tokens", "Tokens generated", registry=self._registry)
        self.finished = Counter(
            f"{name}_sequences_finished", "Sequences that ended, by reason", ["reason"], registry=self._registry
        )
        self.step_seconds = Histogram(
            f"{name}_step_seconds",
            "Time of one llama_decode, by kind",
            ["kind"],
            buckets=STEP_SECONDS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)
