"""Real data through the API, as a user would: each file becomes a job on the demo model, and what it learnt is measured.

    python -m tests.bench.quality --data FOLDER [--only squad alpaca tools preferences] [--epochs 1] [--lines N]

A tenth of each file is held out (SQuAD has a validation file) and scored token by token under the base and under the tuned
model: `/v1/fine_tuning/preview` gives the very ids that training sees, `/v1/completions` with `echo` their
log-probabilities. For preference pairs the share of pairs counts whose chosen reply gained more than the rejected one.
Nothing here is a goal: the demo model has 6M parameters and knows no English. Asserts only that each job succeeds.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI
from rich.console import Console
from rich.table import Table

from gateway.settings import DEMO_MODEL_PATH
from tests.e2e.training import CHAT_TEMPLATE
from tests.server import Server

MODEL, TOOLS_MODEL = "tunegate-demo", "tunegate-tools"  # the latter has a template that can offer tools
SCORED_LINES = 40
LONGEST = 1023  # tokens that are scored of a sequence: the engine makes one more
HELD_OUT = 0.1


@dataclass(frozen=True)
class Source:
    """A file of `--data` and how it is asked to be learnt."""

    name: str
    file: str
    method: str = "supervised"
    validation: str | None = None
    model: str = MODEL


SOURCES = (
    Source("squad", "squad_messages_train.jsonl", validation="squad_messages_validation.jsonl"),
    Source("alpaca", "alpaca_en_demo.json"),
    Source("tools", "glaive_toolcall_en_demo.json", model=TOOLS_MODEL),
    Source("preferences", "dpo_en_demo.json", "dpo"),
)


@dataclass(frozen=True)
class Scored:
    """One sequence under one model: the log-probabilities of its trained tokens."""

    logprobs: list[float]
    correct: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=[source.name for source in SOURCES])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lines", type=int, help="take only the first N lines of each file")
    options = parser.parse_args()
    console = Console()
    table = Table("data", "lines", "shortened", "tokens", "job s", "held out", "base", "tuned")
    chosen = [source for source in SOURCES if not options.only or source.name in options.only]
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), settings=write_bases(Path(folder))).start()
        try:
            for source in chosen:
                for row in measure(server, source, options):
                    table.add_row(*map(str, row))
        finally:
            server.stop()
    console.print(table)
    return 0


def write_bases(folder: Path) -> str:
    """The settings of the demo model and of a copy of it that brings a chat template."""
    copy = folder / "model"
    shutil.copytree(DEMO_MODEL_PATH, copy, ignore=shutil.ignore_patterns("*.py", "README.md"))
    (copy / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    bases = ((MODEL, DEMO_MODEL_PATH, "vicuna_v1.1"), (TOOLS_MODEL, copy, "model"))
    return "".join(f'[bases.{name}]\npath = "{path}"\ntemplate = "{template}"\n' for name, path, template in bases)


def measure(server: Server, source: Source, options: argparse.Namespace) -> list[tuple[Any, ...]]:
    """The rows of the table for one file."""
    client = server.client()
    loose = OpenAI(
        base_url=server.base_url, api_key="unused"
    )  # strictly, a prompt's first log-probability may not be null
    lines = read_lines(options.data / source.file)[: options.lines]
    if source.validation is None:
        random.Random(0).shuffle(lines)
        cut = max(1, round(len(lines) * HELD_OUT))
        held_out, lines = lines[:cut], lines[cut:]
    else:
        held_out = read_lines(options.data / source.validation)
    began = time.monotonic()
    job = client.fine_tuning.jobs.create(
        model=source.model,
        training_file=upload(client, "training.jsonl", lines),
        validation_file=upload(client, "validation.jsonl", held_out),
        method={"type": source.method, source.method: {"hyperparameters": {"n_epochs": options.epochs}}},  # type: ignore[arg-type]
        suffix=source.name,
        seed=1,
    )
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(0.5)
        job = client.fine_tuning.jobs.retrieve(job.id)
    wall_s = time.monotonic() - began
    events = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
    assert job.status == "succeeded", f"{source.name}: {job.error}\n" + "\n".join(events)
    print(f"{source.name}:", *[e for e in reversed(events) if not e.startswith("Step ")], sep="\n  ", file=sys.stderr)
    shortened = sum(line["truncated"] for line in previewed(server, lines, source))
    told = (source.name, len(lines), shortened, job.trained_tokens, f"{wall_s:.0f}")
    sample = previewed(server, held_out[:SCORED_LINES], source)
    base, tuned = (
        [[score(loose, model, sequence) for sequence in line["sequences"]] for line in sample]
        for model in (source.model, job.fine_tuned_model or "")
    )
    if source.method == "supervised":
        return [
            (*told, "nats a token", *(f"{mean_loss(found):.3f}" for found in (base, tuned))),
            (*[""] * len(told), "next token right", *(f"{accuracy(found):.1%}" for found in (base, tuned))),
        ]
    gains = [
        [sum(after.logprobs) - sum(before.logprobs) for before, after in zip(pair_before, pair_after, strict=True)]
        for pair_before, pair_after in zip(base, tuned, strict=True)
    ]
    preferred = sum(chosen > rejected for chosen, rejected in gains) / len(gains)
    margin = sum(chosen - rejected for chosen, rejected in gains) / len(gains)
    return [
        (*told, "chosen gained more", "50% by chance", f"{preferred:.1%}"),
        (*[""] * len(told), "margin, nats", "0", f"{margin:.2f}"),
    ]


def read_lines(path: Path) -> list[Any]:
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line]


def upload(client: OpenAI, name: str, lines: list[Any]) -> str:
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    return client.files.create(file=(name, io.BytesIO(content)), purpose="fine-tune").id


def previewed(server: Server, lines: list[Any], source: Source) -> list[dict[str, Any]]:
    """Each line as it is trained on, with its ids."""
    asked = {"model": source.model, "lines": lines, "limit": len(lines)}
    answer = httpx.post(f"{server.base_url}/fine_tuning/preview", json=asked, timeout=300)
    assert answer.status_code == 200, answer.text
    return [line for line in answer.json()["data"] if "sequences" in line]


def score(client: OpenAI, model: str, sequence: dict[str, Any]) -> Scored:
    runs = sequence["runs"]
    ids = [token for run in runs for token in run["token_ids"]][:LONGEST]
    trained = [run["trained"] for run in runs for _ in run["token_ids"]]
    reply = client.completions.create(model=model, prompt=ids, echo=True, logprobs=1, max_tokens=0)
    found = reply.choices[0].logprobs
    assert found is not None and found.token_logprobs is not None and found.top_logprobs is not None
    logprobs, correct = [], 0
    for is_trained, logprob, top in zip(trained[:LONGEST], found.token_logprobs, found.top_logprobs, strict=True):
        if is_trained and logprob is not None:
            logprobs.append(logprob)
            correct += logprob >= max(top.values(), default=-math.inf)
    return Scored(logprobs, correct)


def mean_loss(found: list[list[Scored]]) -> float:
    logprobs = [value for line in found for scored in line for value in scored.logprobs]
    return -sum(logprobs) / len(logprobs)


def accuracy(found: list[list[Scored]]) -> float:
    scored = [one for line in found for one in line]
    return sum(one.correct for one in scored) / sum(len(one.logprobs) for one in scored)


if __name__ == "__main__":
    sys.exit(main())
