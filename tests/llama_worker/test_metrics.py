"""The worker's own histogram, as Prometheus reads it."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from gateway.llama_worker.metrics import STEP_SECONDS, Metrics


def test_steps_fall_into_their_buckets() -> None:
    metrics = Metrics()
    for seconds in (0.0005, 0.001, 0.0011, 7.0):
        metrics.steps.observe("decode", seconds)
    families = {family.name: family for family in text_string_to_metric_families(metrics.text().decode())}
    steps = families["tunegate_worker_step_seconds"]
    assert steps.type == "histogram"
    values = {
        (sample.name.rpartition("_")[2], sample.labels["kind"], sample.labels.get("le")): sample.value
        for sample in steps.samples
    }
    # A border belongs to its bucket.
    assert [values["bucket", "decode", str(border)] for border in STEP_SECONDS[:3]] == [2, 3, 3]
    assert values["bucket", "decode", "5.0"] == 3
    assert values["bucket", "decode", "+Inf"] == values["count", "decode", None] == 4
    assert abs(values["sum", "decode", None] - 7.0026) < 1e-9
    assert values["count", "prompt", None] == 0
