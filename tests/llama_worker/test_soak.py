"""Mixed load, compressed: whatever comes and goes, the worker ends with the places, memory and descriptors it began with."""

from __future__ import annotations

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.llama_worker.running import RunningWorker, hanging_request, prompt, running
from tests.tiny_gguf import write_tiny_lora

PHASE_S = 5.0
CLIENTS = 10
GROWTH_BYTES = (
    24 * 2**20
)  # the allocator's slack; one leaked context or adapter a request would be hundreds of times that


def test_mixed_load_leaks_nothing(tiny_model: Path, tmp_path: Path) -> None:
    for seed in range(6):
        write_tiny_lora(tmp_path / f"adapter-{seed}" / "adapter.gguf", seed=seed)
    arguments = ["--max-seqs", "6", "--max-queue", "4", "--max-adapters", "3", "--cache-mib", "2"]
    with running(tmp_path / "worker", tiny_model, *arguments) as worker:
        for seed in range(4):
            assert worker.load(f"fixed-{seed}", tmp_path / f"adapter-{seed}").status_code == 200
        expected = {
            name: worker.ids(model=name, prompt=prompt(70), max_tokens=30) for name in ("base", "fixed-0", "fixed-3")
        }
        load(worker, tmp_path, 1)  # caches, pools and allocators fill
        before = resources(worker)
        load(worker, tmp_path, 2)
        after = resources(worker)
        assert after["descriptors"] <= before["descriptors"] + 2
        assert after["threads"] == before["threads"]
        assert after["memory_bytes"] <= before["memory_bytes"] + GROWTH_BYTES
        assert worker.metric("sequences_running") == worker.metric("requests_waiting") == 0
        assert worker.metric("kv_positions_used") == 0
        assert worker.metric("adapters") == 4
        assert worker.metric("adapters_in_memory") <= 3
        assert worker.metric("prefix_cache_bytes") <= 2 * 2**20
        for name, ids in expected.items():
            assert worker.ids(model=name, prompt=prompt(70), max_tokens=30) == ids
        assert worker.client.get("/health").status_code == 200


def load(worker: RunningWorker, folder: Path, seed: int) -> None:
    """Ten clients for some seconds, each with its own mixture; every answer is one that the request may get."""
    until = time.monotonic() + PHASE_S
    with ThreadPoolExecutor(CLIENTS + 1) as pool:
        clients = [pool.submit(client, worker, random.Random(f"{seed}-{number}"), until) for number in range(CLIENTS)]
        clients.append(pool.submit(come_and_go, worker, folder, random.Random(seed), until))
    for finished in clients:
        finished.result()
    worker.wait_metric("sequences_running", 0, timeout_s=10)
    worker.wait_metric("requests_waiting", 0, timeout_s=10)


def client(worker: RunningWorker, order: random.Random, until: float) -> None:
    """Completions, streams, cancelled ones in every state, and wrong ones."""
    while time.monotonic() < until:
        fields = {
            "model": order.choice(["base", "fixed-0", "fixed-1", "fixed-2", "fixed-3", "guest"]),
            "prompt": prompt(order.choice([0, 64, 200]), 9) + prompt(order.randrange(1, 100), order.randrange(50)),
            "max_tokens": order.randrange(1, 60),
            "n": order.choice([1, 1, 1, 3]),
            "temperature": order.choice([0, 1.0]),
            "cache_salt": order.choice(["one", "two"]),
        }
        if order.random() < 0.2:
            fields["structured_outputs"] = {"regex": f"[a-z]{{{order.randrange(1, 60)}}} é?"}
        what = order.random()
        if what < 0.3:
            with hanging_request(worker, **{**fields, "max_tokens": 200, "ignore_eos": True}):
                time.sleep(order.choice([0, 0.001, 0.01, 0.05]))
        elif what < 0.4:
            assert worker.post(**{**fields, "top_p": 7}).status_code == 400
        elif what < 0.5:
            assert worker.post(**{**fields, "prompt": [1] * 600}).status_code == 400
        elif what < 0.75:
            with worker.client.stream("POST", "/v1/completions", json={**fields, "stream": True}) as response:
                body = response.read()
                assert response.status_code in (200, 404, 429, 503)
                assert response.status_code != 200 or body.endswith(b"data: [DONE]\n\n")
        else:
            assert worker.post(**fields).status_code in (200, 404, 429, 503)


def come_and_go(worker: RunningWorker, folder: Path, order: random.Random, until: float) -> None:
    """One adapter that is loaded and unloaded all the time, and files that are none."""
    while time.monotonic() < until:
        assert worker.load("guest", folder / f"adapter-{order.randrange(4, 6)}").status_code == 200
        assert worker.load("guest", folder / "adapter-0").status_code == 400
        assert worker.load("nothing", folder).status_code == 404
        time.sleep(order.choice([0, 0.02]))
        assert worker.unload("guest").status_code == 200


def resources(worker: RunningWorker) -> dict[str, int]:
    """What the process holds when nothing runs."""
    with httpx.Client() as other:  # the pooled connections of the clients are closed on both sides first
        worker.client.close()
        worker.client = httpx.Client(headers=worker.client.headers, base_url=worker.client.base_url, timeout=60)
        assert other.get(f"{worker.client.base_url}/health").status_code == 200
    time.sleep(0.2)
    process = Path("/proc") / str(worker.process.pid)
    status = (process / "status").read_text()
    values = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if ":" in line and line.split()[1:]}
    return {
        "descriptors": len(os.listdir(process / "fd")),
        "threads": int(values["Threads"]),
        "memory_bytes": int(values["VmRSS"]) * 1024,
    }
