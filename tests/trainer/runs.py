"""A training run within the process that tests it: examples in memory, losses and order as they were."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gateway.jobdir import BaseRef, Check, JobDir, Lora, Method, Options, read_events
from tests.tiny_model import write_examples, write_job
from trainer import loop
from trainer.arithmetic import choose
from trainer.data.batches import Batches
from trainer.data.examples import Examples
from trainer.events import EventLog
from trainer.methods import make_objective
from trainer.model import add_lora, load_base
from trainer.progress import Progress


@dataclass(frozen=True)
class Settings:
    method: Method = "supervised"
    lora: Lora = field(default_factory=lambda: Lora(rank=4, alpha=8))
    options: Options = field(default_factory=Options)
    batch_size: int = 4
    n_epochs: int = 1
    learning_rate_multiplier: float = 1.0
    beta: float | None = 0.1
    pass_tokens: int = 16_384
    validation: Examples | None = None
    start: Path | None = None  # the adapter to go on from


@dataclass(frozen=True)
class Trained:
    job: JobDir
    metrics: list[dict[str, Any]]
    losses: list[float]
    order: list[int]  # conversations of the first epoch


def train_in_process(folder: Path, base: BaseRef, examples: Examples, settings: Settings) -> Trained:
    """Trains anew, or goes on from the newest checkpoint in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    job = JobDir(folder / "job")
    if not job.path.is_dir():
        write_job(job.path, Path(base.path), write_examples(folder / "unused.jsonl", 1), lora=settings.lora)
    spec = replace(job.read_spec(), method=settings.method, options=settings.options)
    check = Check(
        n_examples=len(examples),
        n_tokens=len(examples.ids),
        n_trained_tokens=int(examples.trained.sum()),
        n_epochs=settings.n_epochs,
        batch_size=settings.batch_size,
        learning_rate_multiplier=settings.learning_rate_multiplier,
        beta=settings.beta,
        total_steps=settings.n_epochs * -(-len(examples) // settings.batch_size),
    )
    numbers = choose(spec.options)
    model = add_lora(load_base(spec.base, numbers), spec.lora, spec.seed, settings.start)
    objective = make_objective(spec, check, examples)
    attempt = job.next_attempt()
    with EventLog(job.events_path(attempt)) as events:
        progress = Progress(events, check, model, settings.validation, set(), objective, job, spec.options)
        run = loop.Run(job, spec, check, model, examples, settings.validation, objective, numbers, settings.pass_tokens)
        loop.train(run, progress)
    metrics = [event.data for event, _ in read_events(job.events_path(attempt)) if event.type == "metrics"]
    order = Batches(examples, settings.batch_size, settings.batch_size, spec.seed)
    return Trained(
        job,
        metrics,
        [data["train_loss"] for data in metrics],
        [number for inputs in order for number in inputs["numbers"].tolist()],
    )
