"""One job by one process and by two, in each way to split the model: how far the losses are apart, and what it took.

    python -m tests.bench.distributed [--processes 2] [none fsdp zero2 zero3]

On processors, with a tiny model: it shows that the numbers are the same, not what GPUs gain. Asserts nothing. DeepSpeed
compiles a piece of itself on its first run, for about a minute.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

from gateway.jobdir import Hyperparameters, JobDir, Launch, Method, read_events
from tests.tiny_model import write_examples, write_job, write_tiny_model

METHODS: tuple[Method, ...] = ("supervised", "dpo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shardings", nargs="*", default=["none", "fsdp", "zero2", "zero3"])
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    names = ["", "sharding", "steps", "loss, at most apart", "weights, at most apart", "seconds"]
    table = Table(*names, title=f"{options.processes} processes beside one")
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        base = prepare(folder)
        for method in METHODS:
            alone, took_s = train(folder / method, base, method, Launch())
            table.add_row(method, "one process", str(len(losses(alone))), "", "", f"{took_s:.1f}")
            for sharding in options.shardings:
                launch = Launch(options.processes, sharding)
                job, took_s = train(folder / f"{method}-{sharding}", base, method, launch)
                loss = max(abs(a - b) for a, b in zip(losses(job), losses(alone), strict=True))
                weights = max(float(np.abs(a - b).max()) for a, b in zip(tensors(job), tensors(alone), strict=True))
                row = [str(len(losses(job))), f"{loss:.1e}", f"{weights:.1e}", f"{took_s:.1f}"]
                table.add_row("", sharding, *row)
    Console(width=120).print(table)


def prepare(folder: Path) -> Path:
    source = write_tiny_model(folder / "source")
    command = [sys.executable, "-m", "trainer.export.prepare", "--source", str(source), "--out", str(folder / "base")]
    subprocess.run([*command, "--template", "vicuna_v1.1"], check=True, stdout=subprocess.DEVNULL)
    write_examples(folder / "supervised.jsonl", 33)
    (folder / "dpo.jsonl").write_text("".join(json.dumps(pair(number)) + "\n" for number in range(33)))
    return folder / "base"


def pair(number: int) -> dict[str, Any]:
    return {
        "input": {"messages": [{"role": "user", "content": f"Set a timer for {number} minutes."}]},
        "preferred_output": [{"role": "assistant", "content": f"timer(minutes={number})"}],
        "non_preferred_output": [{"role": "assistant", "content": f"note(text='{number}')"}],
    }


def train(folder: Path, base: Path, method: Method, launch: Launch) -> tuple[JobDir, float]:
    asked = Hyperparameters(n_epochs=4, batch_size=8, learning_rate_multiplier=0.5)
    job = write_job(folder, base, base.parent / f"{method}.jsonl", hyperparameters=asked, threads=2)
    job.write_spec(replace(job.read_spec(), method=method, launch=launch))
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "trainer", str(job.path)], check=True, stdout=subprocess.DEVNULL)
    result = job.read_result()
    assert result is not None and result.status == "succeeded", result
    return job, time.monotonic() - began


def losses(job: JobDir) -> list[float]:
    return [event.data["train_loss"] for event, _ in read_events(job.events_path(1)) if event.type == "metrics"]


def tensors(job: JobDir) -> list[np.ndarray]:
    return [tensor for _, tensor in sorted(load_file(job.adapter / "adapter_model.safetensors").items())]


if __name__ == "__main__":
    main()
